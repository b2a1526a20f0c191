// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package retry

import (
	"context"
	"io"
	"math"
	"sync"
	"sync/atomic"

	"google.golang.org/grpc"
	"google.golang.org/grpc/metadata"

	"github.com/belfry-go/belfry/interceptor"
	"github.com/belfry-go/belfry/internal/attempt"
	"github.com/belfry-go/belfry/internal/further"
)

// inline is the most bytes that the goroutine that found the failure sends again itself.
// It is less than gRPC's windows, so sending them does not block on a server that waits
// for its responses to be read. Another goroutine sends the rest, and what the caller
// sends meanwhile.
const inline = 32 << 10

// open opens a stream that is repeated until it commits.
func (l *Layer) open(ctx context.Context, c *interceptor.Call, next interceptor.Next, again interceptor.Again) error {
	set := l.set.Load()
	if set.attempts(c) == 1 {
		return next(ctx, c)
	}
	of := l.maker.Of(c, c.Origin(), again)
	err := next(ctx, c)
	may := l.policy != nil || l.maker.May(&set.methods, c) // A policy may know that it is safe.
	if err == nil && !may {
		return nil
	}
	s := &stream{ctx: ctx, limit: set.buffer, live: true, series: series{Call: of, layer: l, next: next}}
	s.changed.L = &s.mu
	first := s.series.first(ctx, err)
	last := &first
	for last.Err != nil {
		again, err := s.series.step(ctx, last)
		if again == nil {
			return err
		}
		last = again
	}
	if !may { // The method may not be repeated, and now it was sent.
		c.Adopt(last.Call)
		c.SetStream(last.Call.Stream())
		return nil
	}
	s.cur, s.attempt = last.Call.Stream(), last.Call
	c.SetStream(s)
	return nil
}

// stream is a stream that can still be repeated, until it commits.
//
// What the caller sends is kept in sent. While the current attempt is live it also goes
// there directly. A new attempt is not live: replay sends it what was kept, and what
// comes meanwhile, until it has caught up.
type stream struct {
	ctx   context.Context
	limit int

	// committed is the stream once it has committed and is live. From then on calls go
	// straight to it.
	committed atomic.Pointer[grpc.ClientStream]

	// retrying serialises retries, because Header and RecvMsg may both start one. It is
	// held through back-off and opening, and locked before mu. It guards series.
	retrying sync.Mutex
	series   series

	// mu guards the fields below. It is not held while a message is sent or received,
	// because these may block on one another.
	mu      sync.Mutex
	changed sync.Cond // Signals live and curGen.
	cur     grpc.ClientStream
	attempt *interceptor.Call // Whose stream cur is.
	gen     int               // Counts attempts.
	curGen  int               // The generation of cur; less than gen during a retry.
	live    bool              // cur was sent everything that was kept.
	final   bool              // cur will not be repeated.
	sent    []any
	size    int
	closed  bool // CloseSend was called.
}

// current returns the current attempt.
func (s *stream) current() (cur grpc.ClientStream, gen int, final bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.cur, s.gen, s.final
}

// settled returns the current attempt after any retry has ended. During a retry cur is
// the previous attempt.
func (s *stream) settled() (cur grpc.ClientStream, gen int, final bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for s.curGen != s.gen {
		s.changed.Wait()
	}
	return s.cur, s.gen, s.final
}

// commitTo makes attempt gen the last, if it is the current one.
func (s *stream) commitTo(gen int) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.gen != gen {
		return false
	}
	s.commitLocked()
	return true
}

// commit makes the current attempt the last.
func (s *stream) commit() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.commitLocked()
}

// commitLocked is commit. Caller must hold s.mu.
func (s *stream) commitLocked() {
	s.final = true
	if !s.live {
		return // replay calls it again.
	}
	s.sent = nil
	if of := s.series.Call.Call; s.attempt != of {
		of.Adopt(s.attempt)
	}
	s.committed.CompareAndSwap(nil, &s.cur) // cur is not changed any more.
	s.changed.Broadcast()
}

func (s *stream) RecvMsg(m any) error {
	if c := s.committed.Load(); c != nil {
		return (*c).RecvMsg(m)
	}
	for {
		cur, gen, final := s.current()
		err := cur.RecvMsg(m)
		if err == nil || err == io.EOF {
			s.commit()
		}
		if err == nil || err == io.EOF || final {
			return err
		}
		if again, err := s.retry(cur, gen, err); !again {
			return err
		}
	}
}

// Header waits for the header of the current attempt. It commits the stream, because a
// caller that has seen a header would notice another attempt. For an attempt that ended
// without a header gRPC returns neither a header nor an error; RecvMsg may repeat it.
func (s *stream) Header() (metadata.MD, error) {
	if c := s.committed.Load(); c != nil {
		return (*c).Header()
	}
	for {
		cur, gen, final := s.settled()
		md, err := cur.Header()
		if err == nil && len(md) > 0 && !s.commitTo(gen) {
			continue // RecvMsg has replaced the attempt meanwhile.
		}
		if err == nil || final {
			return md, err
		}
		if again, err := s.retry(cur, gen, err); !again {
			return nil, err
		}
	}
}

// retry replaces attempt gen, which failed with err, by another one. If it does not, it
// returns the stream's error.
func (s *stream) retry(cur grpc.ClientStream, gen int, err error) (again bool, _ error) {
	s.retrying.Lock()
	defer s.retrying.Unlock()
	s.mu.Lock()
	if s.gen != gen || s.final {
		defer s.mu.Unlock()
		return s.gen != gen, err
	}
	s.gen++
	gen = s.gen
	s.live = false
	s.mu.Unlock()
	defer func() {
		if !again { // Or a panic.
			s.mu.Lock()
			defer s.mu.Unlock()
			s.live, s.curGen = true, s.gen // The last attempt has ended, and SendMsg will see that.
			s.commitLocked()
		}
	}()
	last := &failure{Attempt: further.Attempt{Call: s.attempt, Err: err, Sent: true}, trailer: cur.Trailer()}
	if s.series.layer.policy != nil {
		last.header, _ = cur.Header() // There already, if there is one.
	}
	for last.Err != nil {
		next, err := s.series.step(s.ctx, last)
		if next == nil {
			return false, err
		}
		last = next
	}
	s.mu.Lock()
	s.cur, s.attempt, s.curGen = last.Call.Stream(), last.Call, gen
	s.changed.Broadcast()
	n := len(s.sent)
	if s.size > inline {
		n = 0
	}
	s.mu.Unlock()
	s.replay(last.Call.Stream(), gen, 0, n)
	return true, nil
}

// replay sends an attempt what was sent before, from the i-th message on, until it has
// caught up or ended. It leaves the messages from the n-th on to a goroutine.
func (s *stream) replay(cur grpc.ClientStream, gen, i, n int) {
	var err error
	for ; ; i++ {
		s.mu.Lock()
		if s.gen != gen {
			s.mu.Unlock()
			return
		}
		if i == len(s.sent) || err != nil { // If it has ended, RecvMsg returns how.
			s.live = true
			closed := s.closed
			if s.final {
				s.commitLocked()
			}
			s.mu.Unlock()
			if closed && err == nil {
				cur.CloseSend()
			}
			return
		}
		m := s.sent[i]
		s.mu.Unlock()
		if i == n {
			go s.replay(cur, gen, i, math.MaxInt)
			return
		}
		err = cur.SendMsg(m)
	}
}

func (s *stream) SendMsg(m any) error {
	if c := s.committed.Load(); c != nil {
		return (*c).SendMsg(m)
	}
	cur, gen, ok := s.keep(m)
	if !ok {
		return (*s.committed.Load()).SendMsg(m)
	}
	if cur == nil {
		return nil // replay sends it.
	}
	err := cur.SendMsg(m)
	if err == nil {
		return nil
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.gen != gen {
		return nil // The next attempt gets it too.
	}
	if err == io.EOF {
		if s.final {
			return err
		}
		return nil // The attempt has ended. RecvMsg will find out how, and may repeat it.
	}
	s.commitLocked() // No attempt can send the message.
	return err
}

// keep keeps a message for further attempts and returns the attempt to send it to, nil
// if replay sends it. If the message cannot be kept the stream commits, and keep returns
// false once the stream is live.
func (s *stream) keep(m any) (cur grpc.ClientStream, gen int, ok bool) {
	n, known := attempt.Size(m)
	s.mu.Lock()
	defer s.mu.Unlock()
	fits := known && s.size+n <= s.limit
	if !s.final && !fits {
		s.commitLocked()
	}
	// replay sends a message that fits until the attempt has caught up. Do not wait for
	// that: replay may itself wait for the caller to receive.
	if s.final && (s.live || !fits) {
		for !s.live {
			s.changed.Wait()
		}
		return nil, 0, false
	}
	s.sent = append(s.sent, m)
	s.size += n
	if !s.live {
		return nil, 0, true
	}
	return s.cur, s.gen, true
}

func (s *stream) CloseSend() error {
	if c := s.committed.Load(); c != nil {
		return (*c).CloseSend()
	}
	s.mu.Lock()
	s.closed = true
	cur, live := s.cur, s.live
	s.mu.Unlock()
	if !live {
		return nil // replay does it.
	}
	return cur.CloseSend()
}

func (s *stream) Trailer() metadata.MD {
	cur, _, _ := s.current()
	return cur.Trailer()
}

func (s *stream) Context() context.Context {
	cur, _, _ := s.current()
	return cur.Context()
}

// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package hedge

import (
	"context"
	"io"
	"sync/atomic"

	"google.golang.org/grpc"
	"google.golang.org/grpc/metadata"

	"github.com/belfry-go/belfry/interceptor"
	"github.com/belfry-go/belfry/internal/attempt"
	"github.com/belfry-go/belfry/internal/message"
)

// inline is the most bytes that are sent to an extra attempt before its first response is
// waited for. It is less than gRPC's windows, so sending them does not block on a server
// that waits for its responses to be read. Another goroutine sends the rest.
const inline = 32 << 10

// measured is a stream that is not hedged. It measures the time to the first response
// message.
type measured struct {
	grpc.ClientStream
	plan plan
	done atomic.Bool
}

func (m *measured) RecvMsg(msg any) error {
	if m.done.Load() {
		return m.ClientStream.RecvMsg(msg)
	}
	m.done.Store(true)
	start := interceptor.Now()
	err := m.ClientStream.RecvMsg(msg)
	answer := err
	if err == io.EOF {
		answer = nil
	}
	m.plan.record(start, interceptor.Now(), answer)
	return err
}

// stream is a stream that can be hedged until its first response message. The first
// RecvMsg runs the race.
//
// What the caller sends goes to the first attempt directly, and is kept for the others.
// pump sends it to each of those at its own pace.
type stream struct {
	race   race
	single bool // The server sends one message.

	// decided is the winning attempt once the first RecvMsg has returned: it receives
	// directly. chosen is the same attempt once it was sent all that was kept: it sends
	// directly.
	decided, chosen atomic.Pointer[chosen]

	// Guarded by race.mu.
	choice  *try // The attempt that will be chosen.
	started bool // The first RecvMsg has started.
	target  any  // What it receives to.
	sent    []any
	size    int
	closed  bool // CloseSend was called.
	pinned  bool // There is only the first attempt, and nothing is kept.
}

// open opens the first attempt.
func (s *stream) open() error {
	first := &s.race.first
	opened := false
	defer func() {
		if !opened {
			first.cancel()
		}
	}()
	if err := s.race.next(first.ctx, first.call); err != nil {
		return err
	}
	opened = true
	first.lane = &lane{stream: first.call.Stream(), caughtUp: true}
	first.call.SetStream(s)
	return nil
}

// lane is an open attempt.
type lane struct {
	stream grpc.ClientStream
	reply  any  // Of an extra attempt, what its first message is received to.
	eof    bool // It ended well without a message.

	caughtUp bool // It was sent all that was kept. Guarded by race.mu.
}

// chosen is the attempt that a stream has become.
type chosen struct {
	grpc.ClientStream
	try    *try
	single bool
}

func (c *chosen) SendMsg(m any) error {
	err := c.ClientStream.SendMsg(m)
	if err != nil && err != io.EOF {
		c.try.cancel() // As in RecvMsg, which the caller need not call any more.
	}
	return err
}

func (c *chosen) RecvMsg(m any) error {
	err := c.ClientStream.RecvMsg(m)
	if err != nil || c.single {
		c.try.cancel() // It has ended; only its context is left.
	}
	return err
}

// chooseLocked makes an attempt the stream, at once or when it has caught up. Caller must
// hold race.mu.
func (s *stream) chooseLocked(t *try) {
	if s.choice == nil {
		s.choice = t
		s.race.closeLocked(t)
	}
	s.race.change.Broadcast()
	if s.choice != t || !t.lane.caughtUp || s.chosen.Load() != nil {
		return
	}
	s.sent = nil
	s.chosen.Store(&chosen{ClientStream: t.lane.stream, try: t, single: s.single})
}

func (s *stream) RecvMsg(m any) error {
	if c := s.decided.Load(); c != nil {
		return c.RecvMsg(m)
	}
	r := &s.race
	s.start(m)
	ran := false
	defer func() {
		if !ran { // It panicked, which must not leave a SendMsg waiting.
			r.mu.Lock()
			defer r.mu.Unlock()
			s.chooseLocked(&r.first)
		}
	}()
	t, err := r.run(interceptor.Now())
	ran = true
	r.mu.Lock()
	defer r.mu.Unlock()
	if t.lane == nil { // An extra attempt that could not be opened was the last to fail.
		t = &r.first
	}
	s.chooseLocked(t)
	if t != &r.first {
		r.Adopt(t.call)
		if err == nil && !t.lane.eof {
			message.CopyInto(m, t.lane.reply)
		}
	}
	if err == nil && t.lane.eof {
		err = io.EOF
	}
	if err != nil || s.single {
		t.cancel()
	}
	s.decided.Store(&chosen{ClientStream: t.lane.stream, try: t, single: s.single})
	return err
}

// start records that the first RecvMsg has started.
func (s *stream) start(m any) {
	r := &s.race
	r.mu.Lock()
	defer r.mu.Unlock()
	s.started, s.target = true, m
	r.closed = s.pinned
}

// receive carries out an attempt up to its first response message.
func (s *stream) receive(ctx context.Context, t *try) error {
	r := &s.race
	if t == &r.first {
		return s.end(t, t.lane.stream.RecvMsg(s.target))
	}
	if err := r.next(ctx, t.call); err != nil {
		return err
	}
	l := &lane{stream: t.call.Stream(), reply: message.NewLike(s.target)}
	r.mu.Lock()
	t.lane = l
	wait := s.closed && s.size <= inline
	r.change.Broadcast()
	r.mu.Unlock()
	if wait {
		s.pump(t)
	} else {
		go s.pump(t)
	}
	return s.end(t, l.stream.RecvMsg(l.reply))
}

// message returns the first message of an attempt, nil if there was none.
func (s *stream) message(t *try) any {
	switch {
	case t.lane.eof:
		return nil
	case t == &s.race.first:
		return s.target
	}
	return t.lane.reply
}

// end turns the end of a stream without a message into a success.
func (s *stream) end(t *try, err error) error {
	if err == io.EOF {
		t.lane.eof = true
		return nil
	}
	return err
}

// pump sends an extra attempt what was sent before and what comes meanwhile, until the
// attempt has ended, or is chosen and has caught up, or nothing more can come.
func (s *stream) pump(t *try) {
	r, l := &s.race, t.lane
	for i := 0; ; i++ {
		r.mu.Lock()
		for i >= len(s.sent) && !s.closed && s.choice == nil && !t.lost && !t.over {
			r.change.Wait()
		}
		if i >= len(s.sent) || t.lost { // What was kept is dropped once there is a choice.
			l.caughtUp = true
			closed := s.closed
			if s.choice == t {
				s.chooseLocked(t)
			}
			r.mu.Unlock()
			if closed {
				l.stream.CloseSend()
			}
			return
		}
		m := s.sent[i]
		r.mu.Unlock()
		if l.stream.SendMsg(m) != nil {
			r.mu.Lock()
			l.caughtUp = true // It has ended. RecvMsg returns how.
			if s.choice == t {
				s.chooseLocked(t)
			}
			r.mu.Unlock()
			return
		}
	}
}

func (s *stream) SendMsg(m any) error {
	if c := s.chosen.Load(); c != nil {
		return c.SendMsg(m)
	}
	first, ok := s.keep(m)
	if !ok {
		return s.chosen.Load().SendMsg(m)
	}
	err := first.SendMsg(m)
	if err == nil {
		return nil
	}
	s.race.mu.Lock()
	defer s.race.mu.Unlock()
	if s.race.first.lost || err == io.EOF && !s.pinned && s.choice != &s.race.first {
		return nil // The attempt has ended, or lost. RecvMsg will find out.
	}
	if err != io.EOF {
		s.race.first.cancel() // RecvMsg need not be called any more.
	}
	return err
}

// keep keeps a message for extra attempts, and returns the first attempt, to which it is
// sent. If the message cannot be kept, no more attempts are made. keep returns false if
// the message must go to the chosen attempt.
func (s *stream) keep(m any) (first grpc.ClientStream, ok bool) {
	r := &s.race
	n, known := attempt.Size(m)
	r.mu.Lock()
	defer r.mu.Unlock()
	first = r.first.lane.stream
	if s.pinned {
		return first, true
	}
	if s.choice == nil {
		if known && s.size+n <= s.race.set.buffer {
			s.sent = append(s.sent, m)
			s.size += n
			r.change.Broadcast()
			return first, true
		}
		if !s.started {
			s.pinned, s.sent = true, nil
			return first, true
		}
		if !r.first.over {
			s.chooseLocked(&r.first)
		}
	}
	for s.choice == nil {
		for _, t := range r.extra {
			if t.lane != nil && !t.over {
				s.chooseLocked(t)
				break
			}
		}
		if s.choice == nil {
			r.change.Wait()
		}
	}
	for s.chosen.Load() == nil {
		r.change.Wait()
	}
	return nil, false
}

func (s *stream) CloseSend() error {
	if c := s.chosen.Load(); c != nil {
		return c.CloseSend()
	}
	r := &s.race
	r.mu.Lock()
	s.closed = true
	r.change.Broadcast()
	c := s.chosen.Load()
	r.mu.Unlock()
	if c != nil { // Chosen a moment ago, by a pump that has not seen the message.
		return c.CloseSend()
	}
	return r.first.lane.stream.CloseSend()
}

// Header waits for the header of the chosen attempt. Before the first RecvMsg
// that is the first one, and a caller who asks for it gives up hedging: it could
// tell if another attempt came after it.
func (s *stream) Header() (metadata.MD, error) {
	if c := s.decided.Load(); c != nil {
		return c.Header()
	}
	r := &s.race
	r.mu.Lock()
	if !s.started {
		s.pinned, s.sent = true, nil
	}
	for !s.pinned && s.choice == nil {
		r.change.Wait()
	}
	t := s.choice
	r.mu.Unlock()
	if t == nil {
		t = &r.first
	}
	return t.lane.stream.Header()
}

// now is the attempt that the stream is, as far as is known.
func (s *stream) now() grpc.ClientStream {
	if c := s.decided.Load(); c != nil {
		return c
	}
	return s.race.first.lane.stream
}

func (s *stream) Trailer() metadata.MD     { return s.now().Trailer() }
func (s *stream) Context() context.Context { return s.now().Context() }

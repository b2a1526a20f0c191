// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package interceptor_test

import (
	"context"
	"fmt"
	"io"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"go.uber.org/goleak"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"github.com/belfry-go/belfry/interceptor"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// The toys below are the smallest layers that show what the core must do for
// real ones.

// limitToy lets n calls run at a time; the others wait.
type limitToy struct {
	interceptor.GateOnly
	name  string
	slots chan struct{} // A free slot each.
	n     int
	full  *interceptor.Refusal
}

func newLimit(name string, n int) *limitToy {
	l := &limitToy{name: name, slots: make(chan struct{}, n), n: n, full: interceptor.Refuse(name, interceptor.ReasonConcurrency, "")}
	for range n {
		l.slots <- struct{}{}
	}
	return l
}

func (l *limitToy) String() string { return l.name }

func (l *limitToy) WrapGate(inner interceptor.Gate) interceptor.Gate {
	return interceptor.GateFunc(func(ctx context.Context, c *interceptor.Call, w interceptor.Wait) error {
		if err := w.On(ctx, l.slots); err == interceptor.ErrWaitOver {
			return l.full
		} else if err != nil {
			return interceptor.Ended(ctx, l.name)
		}
		c.Hold(l, 0)
		return inner.Admit(ctx, c, w)
	})
}

func (l *limitToy) Release(int64, interceptor.Outcome, error) { l.slots <- struct{}{} }

func (l *limitToy) atRest() error {
	if free := len(l.slots); free != l.n {
		return fmt.Errorf("%s: %d of %d slots free", l.name, free, l.n)
	}
	return nil
}

// tokenToy has a number of tokens that are not filled up; NotSent refunds.
type tokenToy struct {
	interceptor.GateOnly
	tokens atomic.Int64
	empty  *interceptor.Refusal
}

func newTokens(n int64) *tokenToy {
	l := &tokenToy{empty: interceptor.Refuse("tokens", interceptor.ReasonRateLimit, "")}
	l.tokens.Store(n)
	return l
}

func (l *tokenToy) WrapGate(inner interceptor.Gate) interceptor.Gate {
	return interceptor.GateFunc(func(ctx context.Context, c *interceptor.Call, w interceptor.Wait) error {
		if l.tokens.Add(-1) < 0 {
			l.tokens.Add(1)
			return l.empty
		}
		c.Hold(l, 1)
		return inner.Admit(ctx, c, w)
	})
}

func (l *tokenToy) Release(n int64, o interceptor.Outcome, _ error) {
	if o == interceptor.NotSent {
		l.tokens.Add(n)
	}
}

// shedToy never lets anything inside wait.
type shedToy struct {
	interceptor.GateOnly
	_ byte
}

func (*shedToy) String() string { return "shed" }

func (*shedToy) WrapGate(inner interceptor.Gate) interceptor.Gate {
	return interceptor.GateFunc(func(ctx context.Context, c *interceptor.Call, w interceptor.Wait) error {
		return inner.Admit(ctx, c, w.Narrow(interceptor.None))
	})
}

// failFastToy lets what is inside wait for d at most.
type failFastToy struct {
	interceptor.GateOnly
	d time.Duration
}

func (l *failFastToy) WrapGate(inner interceptor.Gate) interceptor.Gate {
	return interceptor.GateFunc(func(ctx context.Context, c *interceptor.Call, w interceptor.Wait) error {
		return inner.Admit(ctx, c, w.Narrow(c.Now().Add(l.d).Wait()))
	})
}

// bufferToy has n places in which calls may wait for what is inside.
type bufferToy struct {
	interceptor.GateOnly
	n    int64
	used atomic.Int64
	full *interceptor.Refusal
}

func newBuffer(n int64) *bufferToy {
	return &bufferToy{n: n, full: interceptor.Refuse("buffer", interceptor.ReasonQueueFull, "")}
}

func (*bufferToy) String() string { return "buffer" }

func (l *bufferToy) Validate(inner []interceptor.Layer) error {
	if len(inner) == 0 {
		return fmt.Errorf("there is nothing behind it to wait for")
	}
	return nil
}

func (l *bufferToy) WrapGate(inner interceptor.Gate) interceptor.Gate {
	return interceptor.GateFunc(func(ctx context.Context, c *interceptor.Call, w interceptor.Wait) error {
		mark := c.Mark()
		err := inner.Admit(ctx, c, interceptor.None)
		if err == nil {
			return nil
		}
		c.Rollback(mark, err)
		defer l.used.Add(-1)
		if l.used.Add(1) > l.n {
			return l.full
		}
		return inner.Admit(ctx, c, c.Widen(w, interceptor.Forever))
	})
}

// timeoutToy gives what is inside d, waiting included.
type timeoutToy struct {
	d     time.Duration
	fired atomic.Int64
}

func (*timeoutToy) String() string { return "timeout" }

func (l *timeoutToy) Release(int64, interceptor.Outcome, error) {}

func (l *timeoutToy) refusal(err error, sent bool) error {
	l.fired.Add(1)
	return interceptor.Refuse("timeout", interceptor.ReasonDeadline, "").Because(err, sent)
}

func (l *timeoutToy) WrapGate(inner interceptor.Gate) interceptor.Gate {
	return interceptor.GateFunc(func(ctx context.Context, c *interceptor.Call, w interceptor.Wait) error {
		deadline := c.Now().Add(l.d)
		if t, ok := ctx.Deadline(); ok && interceptor.InstantOf(t) <= deadline {
			return inner.Admit(ctx, c, w)
		}
		c.Hold(l, int64(deadline))
		before := c.Bound(deadline)
		err := inner.Admit(ctx, c, w.Narrow(deadline.Wait()))
		c.SetBound(before)
		if err != nil && interceptor.Now() >= deadline {
			return l.refusal(err, false)
		}
		return err
	})
}

func (l *timeoutToy) WrapCall(next interceptor.Next, _ interceptor.Gate) interceptor.Next {
	return func(ctx context.Context, c *interceptor.Call) error {
		deadline, ok := c.Token(l)
		if !ok {
			return next(ctx, c)
		}
		tctx, cancel := context.WithDeadline(ctx, interceptor.Instant(deadline).Time())
		err := next(tctx, c)
		if c.Kind() == interceptor.Unary || err != nil {
			defer cancel()
			if err != nil && ctx.Err() == nil && tctx.Err() != nil {
				return l.refusal(err, true)
			}
			return err
		}
		context.AfterFunc(tctx, cancel)
		c.SetStream(&cancelStream{ClientStream: c.Stream(), cancel: cancel})
		return nil
	}
}

// cancelStream frees the timer when the stream has been read to its end.
type cancelStream struct {
	grpc.ClientStream
	cancel context.CancelFunc
}

func (s *cancelStream) RecvMsg(m any) error {
	err := s.ClientStream.RecvMsg(m)
	if err != nil {
		s.cancel()
	}
	return err
}

// retryToy makes up to n attempts of calls that fail with UNAVAILABLE, at once,
// and of streams as long as they have received nothing.
type retryToy struct {
	interceptor.CallOnly
	n       int
	backoff time.Duration
}

func (*retryToy) String() string { return "retry" }

func retryable(err error) bool {
	_, refused := interceptor.AsRefusal(err)
	return !refused && status.Code(err) == codes.Unavailable
}

func (l *retryToy) WrapCall(next interceptor.Next, inner interceptor.Gate) interceptor.Next {
	return func(ctx context.Context, c *interceptor.Call) error {
		origin := c.Origin()
		err := next(ctx, c)
		for n := 1; n < l.n && err != nil && retryable(err); n++ {
			if l.backoff > 0 {
				t := time.NewTimer(l.backoff)
				select {
				case <-t.C:
				case <-ctx.Done():
					t.Stop()
					return err
				}
			}
			f := origin.Fork()
			if inner.Admit(ctx, f, interceptor.None) != nil {
				break
			}
			err = next(ctx, f)
			c.Adopt(f)
			if err == nil && c.Kind() != interceptor.Unary {
				c.SetStream(f.Stream())
			}
		}
		if err == nil && c.Kind() != interceptor.Unary {
			c.SetStream(&retryStream{layer: l, ctx: ctx, origin: origin, next: next, inner: inner, call: c, cur: c.Stream(), left: l.n - 1})
		}
		return err
	}
}

// retryStream replays what was sent on a new stream until something was received.
type retryStream struct {
	layer  *retryToy
	ctx    context.Context
	origin interceptor.Origin
	next   interceptor.Next
	inner  interceptor.Gate
	call   *interceptor.Call

	mu        sync.Mutex // Guards the fields below.
	cur       grpc.ClientStream
	sent      []any
	closed    bool
	committed bool
	left      int
}

func (s *retryStream) stream() grpc.ClientStream {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.cur
}

func (s *retryStream) Header() (metadata.MD, error) { return s.stream().Header() }
func (s *retryStream) Trailer() metadata.MD         { return s.stream().Trailer() }
func (s *retryStream) Context() context.Context     { return s.stream().Context() }

func (s *retryStream) SendMsg(m any) error {
	s.mu.Lock()
	cur := s.cur
	if !s.committed {
		s.sent = append(s.sent, m)
	}
	committed := s.committed
	s.mu.Unlock()
	err := cur.SendMsg(m)
	if err == io.EOF && !committed {
		return nil // RecvMsg will find out, and send it again.
	}
	return err
}

func (s *retryStream) CloseSend() error {
	s.mu.Lock()
	s.closed = true
	cur := s.cur
	s.mu.Unlock()
	return cur.CloseSend()
}

func (s *retryStream) RecvMsg(m any) error {
	for {
		cur := s.stream()
		err := cur.RecvMsg(m)
		s.mu.Lock()
		if err == nil || err == io.EOF || s.committed || s.left == 0 || !retryable(err) {
			s.committed, s.sent = true, nil
			s.mu.Unlock()
			return err
		}
		s.left--
		f := s.origin.Fork()
		if s.inner.Admit(s.ctx, f, interceptor.None) != nil {
			s.mu.Unlock()
			return err
		}
		if oerr := s.next(s.ctx, f); oerr != nil {
			s.mu.Unlock()
			return oerr
		}
		s.call.Adopt(f)
		s.cur = f.Stream()
		for _, m := range s.sent {
			s.cur.SendMsg(m)
		}
		if s.closed {
			s.cur.CloseSend()
		}
		s.mu.Unlock()
	}
}

// logToy notes how its tickets are released.
type logToy struct {
	interceptor.GateOnly
	name string
	log  *eventLog
}

type eventLog struct {
	mu     sync.Mutex
	events []string
}

func (l *eventLog) add(format string, args ...any) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.events = append(l.events, fmt.Sprintf(format, args...))
}

func (l *eventLog) take() []string {
	l.mu.Lock()
	defer l.mu.Unlock()
	e := l.events
	l.events = nil
	return e
}

func (l *logToy) WrapGate(inner interceptor.Gate) interceptor.Gate {
	return interceptor.GateFunc(func(ctx context.Context, c *interceptor.Call, w interceptor.Wait) error {
		c.Hold(l, int64(c.Attempt()))
		return inner.Admit(ctx, c, w)
	})
}

func (l *logToy) Release(attempt int64, o interceptor.Outcome, err error) {
	l.log.add("%s %d %s %s", l.name, attempt, o, status.Code(err))
}

// passToy only passes calls on, in both paths.
type passToy struct{ _ byte }

func (*passToy) WrapGate(inner interceptor.Gate) interceptor.Gate {
	return interceptor.GateFunc(func(ctx context.Context, c *interceptor.Call, w interceptor.Wait) error {
		return inner.Admit(ctx, c, w)
	})
}

func (*passToy) WrapCall(next interceptor.Next, _ interceptor.Gate) interceptor.Next {
	return func(ctx context.Context, c *interceptor.Call) error { return next(ctx, c) }
}

// conn is a connection made of two functions.
type conn struct {
	invoke func(ctx context.Context, method string, req, reply any, opts ...grpc.CallOption) error
	stream func(ctx context.Context, desc *grpc.StreamDesc, method string, opts ...grpc.CallOption) (grpc.ClientStream, error)
}

func (c *conn) Invoke(ctx context.Context, method string, req, reply any, opts ...grpc.CallOption) error {
	return c.invoke(ctx, method, req, reply, opts...)
}

func (c *conn) NewStream(ctx context.Context, desc *grpc.StreamDesc, method string, opts ...grpc.CallOption) (grpc.ClientStream, error) {
	return c.stream(ctx, desc, method, opts...)
}

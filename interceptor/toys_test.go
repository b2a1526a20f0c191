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

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"github.com/belfry-go/belfry/interceptor"
	"github.com/belfry-go/belfry/internal/test/leaktest"
)

func TestMain(m *testing.M) { leaktest.Main(m) }

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

func (l *limitToy) NewLayer() (interceptor.Layer, error) { return l, nil }

func (l *limitToy) String() string { return l.name }

func (l *limitToy) WrapGate(inner interceptor.Gate) interceptor.Gate {
	return interceptor.GateFunc(func(ctx context.Context, a *interceptor.Admission, w interceptor.Wait) error {
		select {
		case <-l.slots:
		default:
			parked, done := a.Park(ctx)
			defer done()
			since := interceptor.Now()
			err := w.On(parked, l.slots)
			a.Waited(l.name, since)
			if err == interceptor.ErrWaitOver {
				return l.full
			} else if err != nil {
				return interceptor.Ended(parked, l.name)
			}
		}
		a.Hold(l, 0)
		return inner.Admit(ctx, a, w)
	})
}

func (l *limitToy) Release(int64, interceptor.End) { l.slots <- struct{}{} }

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

func (l *tokenToy) NewLayer() (interceptor.Layer, error) { return l, nil }

func (l *tokenToy) WrapGate(inner interceptor.Gate) interceptor.Gate {
	return interceptor.GateFunc(func(ctx context.Context, a *interceptor.Admission, w interceptor.Wait) error {
		if l.tokens.Add(-1) < 0 {
			l.tokens.Add(1)
			return l.empty
		}
		a.Hold(l, 1)
		return inner.Admit(ctx, a, w)
	})
}

func (*tokenToy) Traits() interceptor.Traits { return interceptor.Waits | interceptor.Decides }

func (l *tokenToy) Release(n int64, e interceptor.End) {
	if !e.Outcome.Sent() {
		l.tokens.Add(n)
	}
}

// shedToy never lets anything inside wait.
type shedToy struct {
	interceptor.GateOnly
	_ byte
}

func (l *shedToy) NewLayer() (interceptor.Layer, error) { return l, nil }

func (*shedToy) Traits() interceptor.Traits { return interceptor.Governs | interceptor.Sheds }

func (*shedToy) String() string { return "shed" }

func (*shedToy) WrapGate(inner interceptor.Gate) interceptor.Gate {
	return interceptor.GateFunc(func(ctx context.Context, a *interceptor.Admission, w interceptor.Wait) error {
		return inner.Admit(ctx, a, w.Narrow(interceptor.None))
	})
}

// failFastToy lets what is inside wait for d at most.
type failFastToy struct {
	interceptor.GateOnly
	d time.Duration
}

func (l *failFastToy) NewLayer() (interceptor.Layer, error) { return l, nil }

func (*failFastToy) Traits() interceptor.Traits { return interceptor.Governs }

func (l *failFastToy) WrapGate(inner interceptor.Gate) interceptor.Gate {
	return interceptor.GateFunc(func(ctx context.Context, a *interceptor.Admission, w interceptor.Wait) error {
		return inner.Admit(ctx, a, w.Narrow(a.Now().Add(l.d).Wait()))
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

func (l *bufferToy) NewLayer() (interceptor.Layer, error) { return l, nil }

func (*bufferToy) Traits() interceptor.Traits { return interceptor.Governs }

func (*bufferToy) String() string { return "buffer" }

func (l *bufferToy) WrapGate(inner interceptor.Gate) interceptor.Gate {
	return interceptor.GateFunc(func(ctx context.Context, a *interceptor.Admission, w interceptor.Wait) error {
		if mayWait, err := a.Try(ctx, inner, interceptor.None); !mayWait {
			return err
		}
		defer l.used.Add(-1)
		if l.used.Add(1) > l.n {
			return l.full
		}
		return inner.Admit(ctx, a, a.Internals().Widen(w, interceptor.Forever))
	})
}

var timeoutCause = &interceptor.Refusal{Layer: "timeout", Reason: interceptor.ReasonDeadline, Sent: true}

// timeoutToy gives what is inside d, waiting included.
type timeoutToy struct {
	d     time.Duration
	fired atomic.Int64
}

func (l *timeoutToy) NewLayer() (interceptor.Layer, error) { return l, nil }

func (*timeoutToy) Traits() interceptor.Traits { return 0 }

func (*timeoutToy) String() string { return "timeout" }

func (l *timeoutToy) refusal(err error, sent bool) error {
	l.fired.Add(1)
	return interceptor.Refuse("timeout", interceptor.ReasonDeadline, "").Because(err, sent)
}

func (l *timeoutToy) WrapGate(inner interceptor.Gate) interceptor.Gate {
	return interceptor.GateFunc(func(ctx context.Context, a *interceptor.Admission, w interceptor.Wait) error {
		deadline := a.Now().Add(l.d)
		if t, ok := ctx.Deadline(); ok && interceptor.InstantOf(t) <= deadline {
			return inner.Admit(ctx, a, w)
		}
		a.Note(l, int64(deadline))
		before := a.Internals().Bound(deadline)
		err := inner.Admit(ctx, a, w.Narrow(deadline.Wait()))
		a.Internals().SetBound(before)
		if err != nil && interceptor.Now() >= deadline {
			return l.refusal(err, false)
		}
		return err
	})
}

func (l *timeoutToy) WrapCall(next interceptor.Next, _ interceptor.Again) interceptor.Next {
	return func(ctx context.Context, c *interceptor.Call) error {
		deadline, ok := c.Noted(l)
		if !ok {
			return next(ctx, c)
		}
		tctx, cancel := context.WithDeadlineCause(ctx, interceptor.Instant(deadline).Time(), timeoutCause)
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

// retryToy makes up to n attempts of calls that fail with UNAVAILABLE, and of
// streams as long as they have received nothing.
type retryToy struct {
	interceptor.CallOnly
	n       int
	backoff time.Duration
}

func (l *retryToy) NewLayer() (interceptor.Layer, error) { return l, nil }

func (*retryToy) Traits() interceptor.Traits { return interceptor.Retries }

func (*retryToy) String() string { return "retry" }

func retryable(err error) bool {
	_, refused := interceptor.AsRefusal(err)
	return !refused && status.Code(err) == codes.Unavailable
}

func (l *retryToy) WrapCall(next interceptor.Next, again interceptor.Again) interceptor.Next {
	return func(ctx context.Context, c *interceptor.Call) error {
		origin := c.Origin()
		err := next(ctx, c)
		if c.Kind() == interceptor.Unary && !retryable(err) {
			return err
		}
		r := &retryingToy{ctx: ctx, origin: origin, next: next, again: again, call: c, left: l.n - 1}
		for retryable(err) && r.left > 0 {
			if l.backoff > 0 {
				parked, done := c.Park(ctx)
				serr := interceptor.Forever.Sleep(parked, interceptor.Now().Add(l.backoff))
				done()
				if serr != nil {
					return err
				}
			}
			if err = r.attempt(err); err == nil && c.Kind() != interceptor.Unary {
				c.SetStream(r.cur.Stream())
			}
		}
		if err == nil && c.Kind() != interceptor.Unary {
			c.SetStream(&retryStream{ClientStream: c.Stream(), r: r})
		}
		return err
	}
}

// retryingToy is a call that may be retried.
type retryingToy struct {
	ctx    context.Context
	origin interceptor.Origin
	next   interceptor.Next
	again  interceptor.Again
	call   *interceptor.Call
	cur    *interceptor.Call // The further attempt.
	left   int
}

// attempt makes a further attempt after one that failed with last.
func (r *retryingToy) attempt(last error) error {
	r.left--
	f, err := r.again(r.ctx, &r.origin, interceptor.Forever)
	if err != nil {
		return interceptor.RefusedAgain(err, last)
	}
	err = r.next(r.ctx, f)
	r.call.Adopt(f)
	r.cur = f
	return err
}

// retryStream opens a further stream if the one there is fails before it has
// delivered a message. It is used by one goroutine.
type retryStream struct {
	grpc.ClientStream
	r         *retryingToy
	committed bool
	sent      []any
	closed    bool
}

func (s *retryStream) SendMsg(m any) error {
	if !s.committed {
		s.sent = append(s.sent, m)
	}
	if err := s.ClientStream.SendMsg(m); err != io.EOF || s.committed {
		return err
	}
	return nil // RecvMsg will find out, and send it again.
}

func (s *retryStream) CloseSend() error {
	s.closed = true
	return s.ClientStream.CloseSend()
}

func (s *retryStream) RecvMsg(m any) error {
	err := s.ClientStream.RecvMsg(m)
	for !s.committed && retryable(err) && s.r.left > 0 {
		if err = s.r.attempt(err); err == nil {
			s.ClientStream = s.r.cur.Stream()
			for _, m := range s.sent {
				s.ClientStream.SendMsg(m)
			}
			if s.closed {
				s.ClientStream.CloseSend()
			}
			err = s.ClientStream.RecvMsg(m)
		}
	}
	s.committed = true
	return err
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

func (l *logToy) NewLayer() (interceptor.Layer, error) { return l, nil }

func (*logToy) Traits() interceptor.Traits { return 0 }

func (l *logToy) WrapGate(inner interceptor.Gate) interceptor.Gate {
	return interceptor.GateFunc(func(ctx context.Context, a *interceptor.Admission, w interceptor.Wait) error {
		a.Hold(l, int64(a.Attempt()))
		return inner.Admit(ctx, a, w)
	})
}

func (l *logToy) Release(attempt int64, e interceptor.End) {
	l.log.add("%s %d %s %s", l.name, attempt, e.Outcome, e.Code())
}

// passToy only passes calls on, in both paths.
type passToy struct{ _ byte }

func (l *passToy) NewLayer() (interceptor.Layer, error) { return l, nil }

func (*passToy) Traits() interceptor.Traits { return 0 }

func (*passToy) WrapGate(inner interceptor.Gate) interceptor.Gate {
	return interceptor.GateFunc(func(ctx context.Context, a *interceptor.Admission, w interceptor.Wait) error {
		return inner.Admit(ctx, a, w)
	})
}

func (*passToy) WrapCall(next interceptor.Next, _ interceptor.Again) interceptor.Next {
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

// answers is a connection that answers with errs, one after the other.
func answers(errs ...error) *conn {
	var mu sync.Mutex
	return &conn{invoke: func(context.Context, string, any, any, ...grpc.CallOption) error {
		mu.Lock()
		defer mu.Unlock()
		err := errs[0]
		errs = errs[1:]
		return err
	}}
}

// scriptStream answers RecvMsg with errs, one after the other.
type scriptStream struct {
	grpc.ClientStream
	ctx  context.Context
	errs []error
}

func (s *scriptStream) RecvMsg(any) error {
	err := s.errs[0]
	s.errs = s.errs[1:]
	return err
}

func (s *scriptStream) SendMsg(any) error { return nil }

func (s *scriptStream) Header() (metadata.MD, error) { return metadata.Pairs("key", "value"), nil }

func (s *scriptStream) CloseSend() error { return nil }

func (s *scriptStream) Context() context.Context { return s.ctx }

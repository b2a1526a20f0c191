// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package filter

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/sync/semaphore"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/belfry-go/belfry/interceptor"
	"github.com/belfry-go/belfry/interceptor/adapt"
	"github.com/belfry-go/belfry/interceptor/buffer"
	"github.com/belfry-go/belfry/interceptor/concurrency"
	"github.com/belfry-go/belfry/interceptor/failfast"
	"github.com/belfry-go/belfry/interceptor/hedge"
	"github.com/belfry-go/belfry/interceptor/layertest"
	"github.com/belfry-go/belfry/interceptor/loadshed"
	"github.com/belfry-go/belfry/interceptor/retry"
	"github.com/belfry-go/belfry/interceptor/timeout"
	"github.com/belfry-go/belfry/internal/test/calltest"
	"github.com/belfry-go/belfry/internal/test/leaktest"
)

func TestMain(m *testing.M) { leaktest.Main(m) }

const method = "/s/m"

// ponger is a connection that answers "ping-1" with "pong-1" and keeps what it saw.
type ponger struct {
	requests []string
	tenants  []string
	streams  []*stream2
}

// stream2 is a stream that keeps what is sent on it and ends with its context.
type stream2 struct {
	grpc.ClientStream
	ctx context.Context

	mu   sync.Mutex // Guards sent.
	sent []string
}

func (p *ponger) saw(ctx context.Context) {
	md, _ := metadata.FromOutgoingContext(ctx)
	p.tenants = append(p.tenants, strings.Join(md.Get("tenant"), ","))
}

func (p *ponger) Invoke(ctx context.Context, _ string, req, reply any, _ ...grpc.CallOption) error {
	p.saw(ctx)
	s := req.(*wrapperspb.StringValue).GetValue()
	p.requests = append(p.requests, s)
	reply.(*wrapperspb.StringValue).Value = strings.Replace(s, "ping", "pong", 1)
	return nil
}

func (p *ponger) NewStream(ctx context.Context, _ *grpc.StreamDesc, _ string, _ ...grpc.CallOption) (grpc.ClientStream, error) {
	p.saw(ctx)
	s := &stream2{ctx: ctx}
	p.streams = append(p.streams, s)
	return s, nil
}

func (s *stream2) SendMsg(m any) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.sent = append(s.sent, m.(*wrapperspb.StringValue).GetValue())
	if s.sent[len(s.sent)-1] == "too large" {
		return status.Error(codes.ResourceExhausted, "too large")
	}
	return nil
}

func (s *stream2) Header() (metadata.MD, error) { return nil, status.Error(codes.Unavailable, "") }

func (s *stream2) RecvMsg(m any) error {
	s.mu.Lock()
	ended := slices.Contains(s.sent, "end")
	s.mu.Unlock()
	if ended {
		return io.EOF
	}
	if m != nil {
		return nil
	}
	<-s.ctx.Done()
	return status.FromContextError(s.ctx.Err()).Err()
}

func wrap(t testing.TB, conn grpc.ClientConnInterface, layers ...interceptor.Spec) (grpc.ClientConnInterface, *interceptor.Stack) {
	t.Helper()
	s := calltest.Stack(t, layers...)
	return s.Wrap(conn), s
}

func mustNew(t testing.TB, p Predicate, opts ...Option) *Filter {
	t.Helper()
	f, err := New(Config{}, p, opts...)
	if err != nil {
		t.Fatal(err)
	}
	return f
}

func mustNewGate(t testing.TB, p GatePredicate) *Gate {
	t.Helper()
	g, err := NewGate(Config{}, p)
	if err != nil {
		t.Fatal(err)
	}
	return g
}

// both makes a layer of each form of a predicate that only decides.
func both(t *testing.T, p GatePredicate, f func(t *testing.T, l interceptor.Layer)) {
	t.Helper()
	t.Run("filter", func(t *testing.T) {
		f(t, mustNew(t, func(ctx context.Context, c *interceptor.Call, req any) (context.Context, error) {
			return nil, p(ctx, nil, req)
		}))
	})
	t.Run("gate", func(t *testing.T) { f(t, mustNewGate(t, p)) })
}

func call(c grpc.ClientConnInterface, ctx context.Context, ping string) (string, error) {
	var reply wrapperspb.StringValue
	err := c.Invoke(ctx, method, wrapperspb.String(ping), &reply)
	return reply.GetValue(), err
}

func TestAccepted(t *testing.T) {
	accept := func(context.Context, *interceptor.Admission, any) error { return nil }
	both(t, accept, func(t *testing.T, l interceptor.Layer) {
		c, _ := wrap(t, &ponger{}, l)
		for i := range 10 {
			got, err := call(c, context.Background(), fmt.Sprintf("ping-%d", i))
			if want := fmt.Sprintf("pong-%d", i); err != nil || got != want {
				t.Errorf("call %d: %q, %v, want %q", i, got, err, want)
			}
		}
	})
}

// ledger is a gate that counts how its tickets come back.
type ledger struct {
	interceptor.GateOnly
	admitted int
	outcomes []interceptor.Outcome
}

func (l *ledger) NewLayer() (interceptor.Layer, error) { return l, nil }

func (l *ledger) WrapGate(inner interceptor.Gate) interceptor.Gate {
	return interceptor.GateFunc(func(ctx context.Context, a *interceptor.Admission, w interceptor.Wait) error {
		l.admitted++
		a.Hold(l, 0)
		return inner.Admit(ctx, a, w)
	})
}

func (l *ledger) Release(_ int64, e interceptor.End) { l.outcomes = append(l.outcomes, e.Outcome) }

var errNo = errors.New("not for this tenant")

func TestRejectedCostsNothing(t *testing.T) {
	reject := func(context.Context, *interceptor.Admission, any) error { return errNo }
	both(t, reject, func(t *testing.T, l interceptor.Layer) {
		srv := &ponger{}
		outer, inner := &ledger{}, &ledger{}
		c, stack := wrap(t, srv, outer, l, inner)
		_, err := call(c, context.Background(), "ping")
		r, ok := interceptor.AsRefusal(err)
		if !ok || r.Reason != interceptor.ReasonFilter || r.Layer != "filter" || !r.NotSent() || !errors.Is(err, errNo) || status.Code(err) != codes.PermissionDenied {
			t.Errorf("unary call: %v, want a refusal with PERMISSION_DENIED and reason FILTER, of the predicate's error", err)
		}
		s, err := c.NewStream(context.Background(), &grpc.StreamDesc{ClientStreams: true}, method)
		if s != nil || !errors.Is(err, errNo) {
			t.Errorf("stream: %v, %v, want no stream, and the predicate's error", s, err)
		}
		if len(srv.tenants) != 0 {
			t.Errorf("%d calls reached the server, want none", len(srv.tenants))
		}
		for name, l := range map[string]*ledger{"outer": outer, "inner": inner} {
			for _, o := range l.outcomes {
				if o != interceptor.NotSent {
					t.Errorf("a ticket of the %s gate came back %v, want not_sent", name, o)
				}
			}
			if len(l.outcomes) != l.admitted {
				t.Errorf("%d of %d tickets of the %s gate came back", len(l.outcomes), l.admitted, name)
			}
		}
		if _, isGate := l.(*Gate); isGate && inner.admitted != 0 {
			t.Errorf("the gate inside was asked %d times, want never", inner.admitted)
		}
		if n := stack.InFlight(); n != 0 {
			t.Errorf("%d calls in flight, want 0", n)
		}
	})
}

func TestGateRejectsBeforeQueue(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		sem := semaphore.NewWeighted(1)
		limit := adapt.FromSemaphore("limit", sem)
		sem.TryAcquire(1) // Full.
		c, _ := wrap(t, &ponger{}, mustNewGate(t, func(context.Context, *interceptor.Admission, any) error { return errNo }), limit)
		start := time.Now()
		if _, err := call(c, context.Background(), "ping"); !errors.Is(err, errNo) || time.Since(start) != 0 {
			t.Errorf("call: %v after %v, want the rejection at once", err, time.Since(start))
		}
	})
}

func TestPredicateChangesContextAndRequest(t *testing.T) {
	f := mustNew(t, func(ctx context.Context, c *interceptor.Call, req any) (context.Context, error) {
		if m, ok := req.(*wrapperspb.StringValue); ok {
			c.SetRequest(wrapperspb.String(m.GetValue() + "!"))
		} else if req != nil {
			t.Errorf("the request of a stream is %v, want nil", req)
		}
		return metadata.AppendToOutgoingContext(ctx, "tenant", "blue"), nil
	})
	srv := &ponger{}
	c, _ := wrap(t, srv, f)
	req := wrapperspb.String("ping")
	var reply wrapperspb.StringValue
	if err := c.Invoke(context.Background(), method, req, &reply); err != nil || reply.GetValue() != "pong!" {
		t.Errorf("call: %q, %v, want %q", reply.GetValue(), err, "pong!")
	}
	if req.GetValue() != "ping" {
		t.Errorf("the caller's request is now %q", req.GetValue())
	}
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	if _, err := c.NewStream(ctx, &grpc.StreamDesc{ClientStreams: true}, method); err != nil {
		t.Fatal(err)
	}
	if want := []string{"blue", "blue"}; !slices.Equal(srv.tenants, want) {
		t.Errorf("the server saw tenants %q, want %q", srv.tenants, want)
	}
}

func TestSlowPredicateMeetsDeadline(t *testing.T) {
	slow := func(ctx context.Context, _ *interceptor.Admission, _ any) error {
		select {
		case <-time.After(time.Second):
			return nil
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	both(t, slow, func(t *testing.T, l interceptor.Layer) {
		synctest.Test(t, func(t *testing.T) {
			c, _ := wrap(t, &ponger{}, l)
			if got, err := call(c, context.Background(), "ping"); err != nil || got != "pong" {
				t.Errorf("without a deadline: %q, %v, want it to pass", got, err)
			}
			ctx, cancel := context.WithTimeout(context.Background(), 300*time.Millisecond)
			defer cancel()
			start := time.Now()
			_, err := call(c, ctx, "ping")
			if got := time.Since(start); status.Code(err) != codes.DeadlineExceeded || got != 300*time.Millisecond {
				t.Errorf("%v after %v, want DEADLINE_EXCEEDED after 300ms", err, got)
			}
			ctx, cancel2 := context.WithCancel(context.Background())
			time.AfterFunc(time.Millisecond, cancel2)
			if _, err := call(c, ctx, "ping"); status.Code(err) != codes.Canceled {
				t.Errorf("cancelled: %v, want CANCELLED", err)
			}
		})
	})
}

// A predicate in a gate is bounded by the deadlines of the layers outside it, which reach
// gates as a Wait, also where the call must not wait for capacity.
func TestPredicateMeetsDeadlineOfALayer(t *testing.T) {
	deadline := timeout.Config{Timeout: 50 * time.Millisecond, Lifetime: 50 * time.Millisecond}
	both(t, untilItsEnd, func(t *testing.T, l interceptor.Layer) {
		for name, specs := range map[string][]interceptor.Spec{
			"timeout":      {deadline, l},
			"shed_timeout": {loadshed.Config{}, deadline, l, concurrency.Config{Limit: 1}},
			"failfast":     {failfast.Config{After: time.Second}, deadline, l, concurrency.Config{Limit: 1}},
			"recommended": {
				loadshed.Config{}, deadline, hedge.Config{Delay: time.Second}, retry.Config{},
				buffer.Config{Size: 1}, l, concurrency.Config{Limit: 1},
			},
		} {
			t.Run(name, func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					c, _ := wrap(t, &ponger{}, specs...)
					for _, open := range []func() error{
						func() error { _, err := call(c, context.Background(), "ping"); return err },
						func() error {
							_, err := c.NewStream(context.Background(), &grpc.StreamDesc{ClientStreams: true}, method)
							return err
						},
					} {
						start := time.Now()
						err := open()
						r, ok := interceptor.AsRefusal(err)
						if got := time.Since(start); got != 50*time.Millisecond || !ok || r.Reason != interceptor.ReasonDeadline || r.Layer != "timeout" {
							t.Errorf("%v after %v, want the timeout's refusal after 50ms", err, got)
						}
					}
				})
			})
		}
	})
}

func TestGatePredicateMeetsWait(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c, stack := wrap(t, &ponger{}, mustNewGate(t, untilItsEnd))
		invoke := func(w interceptor.Wait) error {
			return c.Invoke(context.Background(), method, wrapperspb.String("ping"), new(wrapperspb.StringValue), interceptor.WithWait(w))
		}
		start := time.Now()
		err := invoke(interceptor.For(50 * time.Millisecond))
		r, ok := interceptor.AsRefusal(err)
		if got := time.Since(start); got != 50*time.Millisecond || status.Code(err) != codes.DeadlineExceeded || !ok || r.Reason != interceptor.ReasonFilter {
			t.Errorf("%v after %v, want a refusal with DEADLINE_EXCEEDED and reason FILTER after 50ms", err, got)
		}
		// The predicate waits, so the end of the stack reaches it.
		done := make(chan error)
		go func() { done <- invoke(interceptor.For(50 * time.Millisecond)) }()
		synctest.Wait()
		if err := stack.Drain(t.Context()); err != nil {
			t.Error(err)
		}
		if err := <-done; calltest.Reason(err) != interceptor.ReasonDrain {
			t.Errorf("the stack drained: %v, want a refusal with reason DRAIN", err)
		}
	})
}

// untilItsEnd is a predicate that waits for the end of its context.
func untilItsEnd(ctx context.Context, _ *interceptor.Admission, _ any) error {
	if d, ok := ctx.Deadline(); !ok || time.Until(d) != 50*time.Millisecond {
		return fmt.Errorf("the predicate has %v, %t, want 50ms", time.Until(d), ok)
	}
	<-ctx.Done()
	return ctx.Err()
}

// waits is an observer of waiting.
type waits struct {
	interceptor.NopObserver
	d []time.Duration
}

func (w *waits) Waited(_ interceptor.Observed, _ string, d time.Duration) { w.d = append(w.d, d) }

func TestSlowGateIsSeenAsWaiting(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		obs := &waits{}
		d := 20 * time.Millisecond
		g := mustNewGate(t, func(context.Context, *interceptor.Admission, any) error { time.Sleep(d); return nil })
		c, _ := wrap(t, &ponger{}, interceptor.Observe(obs), g)
		call(c, context.Background(), "ping")
		d = 0
		call(c, context.Background(), "ping")
		if want := []time.Duration{20 * time.Millisecond}; !slices.Equal(obs.d, want) {
			t.Errorf("waited %v, want %v", obs.d, want)
		}
	})
}

func TestRejectionStatus(t *testing.T) {
	own, err := status.New(codes.FailedPrecondition, "no such plan").WithDetails(wrapperspb.String("detail"))
	if err != nil {
		t.Fatal(err)
	}
	refusal := interceptor.Refuse("mine", interceptor.ReasonQuota, "")
	for _, tc := range []struct {
		name    string
		config  Config
		err     error
		code    codes.Code
		message string
	}{
		{"a plain error", Config{}, errNo, codes.PermissionDenied, "belfry: filter: FILTER: rejected: not for this tenant"},
		{"a plain error with a code configured", Config{Code: codes.Unauthenticated}, errNo, codes.Unauthenticated, "belfry: filter: FILTER: rejected: not for this tenant"},
		{"a status", Config{Code: codes.Unauthenticated}, own.Err(), codes.FailedPrecondition, "no such plan"},
		{"a wrapped status", Config{}, fmt.Errorf("plans: %w", own.Err()), codes.FailedPrecondition, "plans: rpc error: code = FailedPrecondition desc = no such plan"},
		{"a deadline of the predicate's own", Config{}, context.DeadlineExceeded, codes.DeadlineExceeded, "belfry: filter: FILTER: rejected: context deadline exceeded"},
		{"a refusal", Config{}, refusal, codes.ResourceExhausted, "belfry: mine: QUOTA"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			f, err := New(tc.config, func(context.Context, *interceptor.Call, any) (context.Context, error) { return nil, tc.err })
			if err != nil {
				t.Fatal(err)
			}
			c, _ := wrap(t, &ponger{}, f)
			_, err = call(c, context.Background(), "ping")
			st := status.Convert(err)
			if st.Code() != tc.code || st.Message() != tc.message {
				t.Errorf("status %v %q, want %v %q", st.Code(), st.Message(), tc.code, tc.message)
			}
			if !errors.Is(err, tc.err) {
				t.Errorf("errors.Is does not find the predicate's error in %v", err)
			}
			info, detail := false, false
			for _, d := range st.Details() {
				switch d := d.(type) {
				case *errdetails.ErrorInfo:
					info = d.GetDomain() == interceptor.Domain
				case *wrapperspb.StringValue:
					detail = d.GetValue() == "detail"
				}
			}
			if !info {
				t.Error("the status has no ErrorInfo of belfry's")
			}
			if want := status.Code(tc.err) == codes.FailedPrecondition; detail != want {
				t.Errorf("the predicate's own detail is there: %v, want %v", detail, want)
			}
		})
	}
}

func TestMessagesFiltered(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := mustNew(t, func(context.Context, *interceptor.Call, any) (context.Context, error) { return nil, nil },
			WithMessages(func(_ context.Context, m string, msg any) (any, error) {
				if m != method {
					t.Errorf("the method is %q, want %q", m, method)
				}
				switch s := msg.(*wrapperspb.StringValue).GetValue(); s {
				case "bad":
					return nil, errNo
				case "same":
					return nil, nil
				default:
					return wrapperspb.String(s + "!"), nil
				}
			}))
		srv := &ponger{}
		outer, inner := &ledger{}, &ledger{}
		c, stack := wrap(t, srv, outer, f, inner)
		s, err := c.NewStream(context.Background(), &grpc.StreamDesc{ClientStreams: true, ServerStreams: true}, method)
		if err != nil {
			t.Fatal(err)
		}
		received := make(chan error, 1)
		go func() { received <- s.RecvMsg(nil) }()
		for _, m := range []string{"one", "same"} {
			if err := s.SendMsg(wrapperspb.String(m)); err != nil {
				t.Errorf("SendMsg(%q): %v, want no error", m, err)
			}
		}
		err = s.SendMsg(wrapperspb.String("bad"))
		r, ok := interceptor.AsRefusal(err)
		if !ok || r.NotSent() || !errors.Is(err, errNo) || status.Code(err) != codes.PermissionDenied {
			t.Errorf("SendMsg of what is rejected: %v, want a refusal of a call that was sent", err)
		}
		if got := <-received; got != err {
			t.Errorf("RecvMsg: %v, want the same refusal", got)
		}
		if got := s.SendMsg(wrapperspb.String("one")); got != err {
			t.Errorf("SendMsg after that: %v, want the same refusal", got)
		}
		if want := []string{"one!", "same"}; !slices.Equal(srv.streams[0].sent, want) {
			t.Errorf("sent %q, want %q", srv.streams[0].sent, want)
		}
		if srv.streams[0].ctx.Err() == nil {
			t.Error("the stream's context lives on, want it cancelled")
		}
		if err := stack.Drain(context.Background()); err != nil {
			t.Fatal(err)
		}
		if len(inner.outcomes) != 1 || inner.outcomes[0] != interceptor.Ignored {
			t.Errorf("inside, the stream was %v, want it ignored: the server did nothing wrong", inner.outcomes)
		}
		if len(outer.outcomes) != 1 || outer.outcomes[0] == interceptor.NotSent {
			t.Errorf("outside, the stream was %v, want it to have been sent", outer.outcomes)
		}
	})
}

func TestMessagesLeaveNoContext(t *testing.T) {
	f := mustNew(t, func(context.Context, *interceptor.Call, any) (context.Context, error) { return nil, nil },
		WithMessages(func(context.Context, string, any) (any, error) { return nil, nil }))
	for name, end := range map[string]func(s grpc.ClientStream) error{
		"EOF":            func(s grpc.ClientStream) error { s.SendMsg(wrapperspb.String("end")); return s.RecvMsg(nil) },
		"the one answer": func(s grpc.ClientStream) error { return s.RecvMsg(&wrapperspb.StringValue{}) },
		"an error of Header": func(s grpc.ClientStream) error {
			if _, err := s.Header(); err == nil {
				return errors.New("Header returned no error")
			}
			return nil
		},
		"an error of SendMsg": func(s grpc.ClientStream) error {
			if s.SendMsg(wrapperspb.String("too large")) == nil {
				return errors.New("SendMsg returned no error")
			}
			return nil
		},
	} {
		t.Run(name, func(t *testing.T) {
			srv := &ponger{}
			c, _ := wrap(t, srv, f)
			s, err := c.NewStream(context.Background(), &grpc.StreamDesc{ClientStreams: true, ServerStreams: name == "EOF"}, method)
			if err != nil {
				t.Fatal(err)
			}
			if err := end(s); err != nil && err != io.EOF {
				t.Fatal(err)
			}
			if srv.streams[0].ctx.Err() == nil {
				t.Error("the stream has ended and its context lives on")
			}
		})
	}
}

func TestUpdate(t *testing.T) {
	both(t, func(context.Context, *interceptor.Admission, any) error { return errNo }, func(t *testing.T, l interceptor.Layer) {
		c, _ := wrap(t, &ponger{}, l)
		u := l.(interface{ Update(Config) error })
		want := func(code codes.Code) {
			t.Helper()
			if _, err := call(c, context.Background(), "ping"); status.Code(err) != code {
				t.Errorf("call: %v, want %v", err, code)
			}
		}
		want(codes.PermissionDenied)
		if err := u.Update(Config{Code: codes.NotFound}); err != nil {
			t.Fatal(err)
		}
		want(codes.NotFound)
		if err := u.Update(Config{Code: 99}); err == nil || !strings.HasPrefix(err.Error(), "filter: Code is Code(99), must be") {
			t.Errorf("Update with code 99: %v, want an error that names Code", err)
		}
		want(codes.NotFound)
	})
}

func TestConfigErrors(t *testing.T) {
	gate := func(context.Context, *interceptor.Admission, any) error { return nil }
	pred := func(context.Context, *interceptor.Call, any) (context.Context, error) { return nil, nil }
	for name, f := range map[string]func() (any, error){
		"filter: predicate is nil":                     func() (any, error) { return New(Config{}, nil) },
		"filter: predicate is nil, must be a function": func() (any, error) { return NewGate(Config{}, nil) },
		"filter: Code is Code(17)":                     func() (any, error) { return New(Config{Code: 17}, pred) },
		"filter: Code is Code(18)":                     func() (any, error) { return NewGate(Config{Code: 18}, gate) },
		"filter: WithMessages is set": func() (any, error) {
			return NewGate(Config{}, gate, WithMessages(func(context.Context, string, any) (any, error) { return nil, nil }))
		},
	} {
		if _, err := f(); err == nil || !strings.HasPrefix(err.Error(), name) {
			t.Errorf("%v, want an error that begins with %q", err, name)
		}
	}
}

func TestName(t *testing.T) {
	f := mustNew(t, func(context.Context, *interceptor.Call, any) (context.Context, error) { return nil, errNo }, WithName("acl"))
	c, stack := wrap(t, &ponger{}, f)
	_, err := call(c, context.Background(), "ping")
	if r, ok := interceptor.AsRefusal(err); !ok || r.Layer != "acl" || stack.String() != "[acl]" {
		t.Errorf("refusal %v in %v, want both to say acl", err, stack)
	}
}

func TestConformance(t *testing.T) {
	accept := func(context.Context, *interceptor.Admission, any) error { return nil }
	both(t, accept, func(t *testing.T, l interceptor.Layer) {
		layertest.RunStack(t, func() ([]interceptor.Spec, func() error) {
			led := &counter{sem: semaphore.NewWeighted(4000)}
			return []interceptor.Spec{l, adapt.FromSemaphore("limit", led.sem)}, led.atRest
		})
	})
	t.Run("messages", func(t *testing.T) {
		layertest.Run(t, func() (interceptor.Spec, func() error) {
			return mustNew(t, func(ctx context.Context, _ *interceptor.Call, _ any) (context.Context, error) { return ctx, nil },
				WithMessages(func(_ context.Context, _ string, m any) (any, error) { return m, nil })), nil
		})
	})
}

// counter is a limit inside the filter, all of whose permits have to come back.
type counter struct{ sem *semaphore.Weighted }

func (c *counter) atRest() error {
	if !c.sem.TryAcquire(4000) {
		return errors.New("permits of the limit inside are out, want none")
	}
	return nil
}

func benchmarks(t testing.TB) map[string]grpc.UnaryClientInterceptor {
	out := map[string]grpc.UnaryClientInterceptor{}
	for name, err := range map[string]error{"accepted": nil, "rejected": errNo} {
		for form, l := range map[string]interceptor.Layer{
			"filter": mustNew(t, func(context.Context, *interceptor.Call, any) (context.Context, error) { return nil, err }),
			"gate":   mustNewGate(t, func(context.Context, *interceptor.Admission, any) error { return err }),
		} {
			s, err := interceptor.NewStack(l)
			if err != nil {
				t.Fatal(err)
			}
			out[form+"_"+name] = s.UnaryClientInterceptor()
		}
	}
	return out
}

func TestAllocations(t *testing.T) { calltest.AllocateNothing(t, benchmarks(t), method) }

func BenchmarkFilter(b *testing.B) { calltest.Bench(b, benchmarks(b), method) }

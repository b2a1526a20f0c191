// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package interceptor_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/grpc-ecosystem/go-grpc-middleware/v2/interceptors"
	"github.com/grpc-ecosystem/go-grpc-middleware/v2/interceptors/selector"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/belfry-go/belfry/interceptor"
	"github.com/belfry-go/belfry/internal/test/calltest"
	"github.com/belfry-go/belfry/internal/testserver"
	testingv1 "github.com/belfry-go/belfry/proto/belfry/testing/v1"
)

// openToy admits calls without asking the gate inside, if forget says so.
type openToy struct {
	interceptor.GateOnly
	forget func(a *interceptor.Admission) bool
}

func (l *openToy) NewLayer() (interceptor.Layer, error) { return l, nil }
func (*openToy) Traits() interceptor.Traits             { return 0 }
func (*openToy) String() string                         { return "open" }

func (l *openToy) WrapGate(inner interceptor.Gate) interceptor.Gate {
	return interceptor.GateFunc(func(ctx context.Context, a *interceptor.Admission, w interceptor.Wait) error {
		if l.forget(a) {
			return nil
		}
		return inner.Admit(ctx, a, w)
	})
}

func TestForgetfulGate(t *testing.T) {
	always := &openToy{forget: func(*interceptor.Admission) bool { return true }}
	check := func(t *testing.T, err error) {
		t.Helper()
		if status.Code(err) != codes.Internal || !strings.Contains(err.Error(), "[outer > open > limit]") && !strings.Contains(err.Error(), "inner.Admit") {
			t.Errorf("the call ended with %v, want INTERNAL that says what to call", err)
		}
	}
	t.Run("fails_the_first_call", func(t *testing.T) {
		log := &eventLog{}
		limit := newLimit("limit", 1)
		s := calltest.Stack(t, &logToy{name: "outer", log: log}, always, limit)
		check(t, s.Wrap(answers()).Invoke(t.Context(), calltest.Method, nil, nil))
		_, err := s.Wrap(&conn{}).NewStream(t.Context(), descOf(interceptor.BidiStream), calltest.Method)
		check(t, err)
		want := []string{"outer 0 not_sent Internal", "outer 0 not_sent Internal"}
		if got := log.take(); !slices.Equal(got, want) {
			t.Errorf("released %q, want %q", got, want)
		}
	})
	t.Run("inside_of_a_buffer", func(t *testing.T) {
		check(t, calltest.Stack(t, newBuffer(1), always, newLimit("limit", 1)).Wrap(answers()).Invoke(t.Context(), calltest.Method, nil, nil))
	})
	t.Run("of_a_further_attempt", func(t *testing.T) {
		second := &openToy{forget: func(a *interceptor.Admission) bool { return a.Attempt() > 0 }}
		unavailable := status.Error(codes.Unavailable, "the server's")
		err := calltest.Stack(t, &retryToy{n: 3}, second, newLimit("limit", 1)).Wrap(answers(unavailable)).Invoke(t.Context(), calltest.Method, nil, new(wrapperspb.StringValue))
		if !errors.Is(err, unavailable) || !strings.Contains(err.Error(), "inner.Admit") {
			t.Errorf("the call ended with %v, want the server's error and what to call", err)
		}
	})
}

// errToy asks inside and then returns what a function does.
type errToy func(ctx context.Context, a *interceptor.Admission) error

func (f errToy) NewLayer() (interceptor.Layer, error) { return &errLayer{f: f}, nil }

type errLayer struct {
	interceptor.GateOnly
	f errToy
}

func (l *errLayer) NewLayer() (interceptor.Layer, error) { return l, nil }

func (l *errLayer) WrapGate(inner interceptor.Gate) interceptor.Gate {
	return interceptor.GateFunc(func(ctx context.Context, a *interceptor.Admission, w interceptor.Wait) error {
		if err := inner.Admit(ctx, a, w); err != nil {
			return err
		}
		return l.f(ctx, a)
	})
}

// noStreamToy answers by itself, streams too.
type noStreamToy struct{ interceptor.CallOnly }

func (l *noStreamToy) NewLayer() (interceptor.Layer, error) { return l, nil }

func (*noStreamToy) WrapCall(interceptor.Next, interceptor.Again) interceptor.Next {
	return func(context.Context, *interceptor.Call) error { return nil }
}

// A gate of a user's that errs leaves nothing taken, and its callers get a code that
// says what happened.
func TestErrorsOfGates(t *testing.T) {
	for _, tc := range []struct {
		name string
		err  error
		want codes.Code
	}{
		{"nil_refusal", (*interceptor.Refusal)(nil), codes.Internal},
		{"deadline_of_its_own", context.DeadlineExceeded, codes.DeadlineExceeded},
		{"deadline_that_is_wrapped", fmt.Errorf("quota: %w", context.DeadlineExceeded), codes.DeadlineExceeded},
		{"cancellation", context.Canceled, codes.Canceled},
		{"status", status.Error(codes.ResourceExhausted, "quota"), codes.ResourceExhausted},
		{"status_in_a_context_error", errors.Join(context.Canceled, status.Error(codes.Aborted, "")), codes.Aborted},
		{"neither", errors.New("quota"), codes.Unknown},
	} {
		t.Run(tc.name, func(t *testing.T) {
			limit := newLimit("limit", 1)
			late := errToy(func(context.Context, *interceptor.Admission) error { return tc.err })
			s := calltest.Stack(t, limit, late)
			err := s.Wrap(answers()).Invoke(t.Context(), calltest.Method, nil, nil)
			if status.Code(err) != tc.want || tc.want != codes.Internal && !errors.Is(err, tc.err) {
				t.Errorf("the call ended with %v (%v), want %v", err, status.Code(err), tc.want)
			}
			if _, err := s.Wrap(&conn{}).NewStream(t.Context(), descOf(interceptor.BidiStream), calltest.Method); status.Code(err) != tc.want {
				t.Errorf("the stream ended with %v, want %v", err, tc.want)
			}
			if err := limit.atRest(); err != nil {
				t.Error(err)
			}
			second := errToy(func(_ context.Context, a *interceptor.Admission) error {
				if a.Attempt() == 0 {
					return nil
				}
				return tc.err
			})
			unavailable := status.Error(codes.Unavailable, "the server's")
			err = calltest.Stack(t, &retryToy{n: 3}, limit, second).Wrap(answers(unavailable)).Invoke(t.Context(), calltest.Method, nil, new(wrapperspb.StringValue))
			if !errors.Is(err, unavailable) {
				t.Errorf("a further attempt: %v, want the server's error", err)
			}
			if err := limit.atRest(); err != nil {
				t.Error(err)
			}
		})
	}
	t.Run("of_a_wait_that_drain_ends", func(t *testing.T) {
		began := make(chan struct{})
		waits := errToy(func(ctx context.Context, a *interceptor.Admission) error {
			parked, end := a.Park(ctx)
			defer end()
			close(began)
			<-parked.Done()
			return parked.Err()
		})
		s := calltest.Stack(t, waits)
		done := make(chan error)
		go func() { done <- s.Wrap(answers()).Invoke(t.Context(), calltest.Method, nil, nil) }()
		<-began
		if err := s.Drain(t.Context()); err != nil {
			t.Error(err)
		}
		if r, ok := interceptor.AsRefusal(<-done); !ok || r.Reason != interceptor.ReasonDrain {
			t.Errorf("the call ended with %v, want DRAIN", r)
		}
	})
}

// A layer that says that it has opened a stream, and has not, fails the call instead
// of the caller's first use of it.
func TestLayerWithoutStream(t *testing.T) {
	limit := newLimit("limit", 1)
	none := &noStreamToy{}
	for _, s := range []*interceptor.Stack{
		calltest.Stack(t, limit, none),
		calltest.Stack(t, &passToy{}, limit, none),
	} {
		st, err := s.Wrap(&conn{}).NewStream(t.Context(), descOf(interceptor.BidiStream), calltest.Method)
		if status.Code(err) != codes.Internal || st != nil {
			t.Errorf("%v: the stream is %v, %v, want INTERNAL", s, st, err)
		}
		if n := s.InFlight(); n != 0 {
			t.Errorf("%v: %d calls in flight, want 0", s, n)
		}
		if err := limit.atRest(); err != nil {
			t.Error(err)
		}
	}
}

// lateToy holds after it has asked the gate inside.
type lateToy struct {
	logToy
}

func (l *lateToy) NewLayer() (interceptor.Layer, error) { return l, nil }

func (l *lateToy) WrapGate(inner interceptor.Gate) interceptor.Gate {
	return interceptor.GateFunc(func(ctx context.Context, a *interceptor.Admission, w interceptor.Wait) error {
		if err := inner.Admit(ctx, a, w); err != nil {
			return err
		}
		a.Hold(&l.logToy, int64(a.Attempt()))
		return nil
	})
}

// A gate that holds after it has asked inside holds for the same time as one that
// holds before.
func TestHoldAfterAdmit(t *testing.T) {
	unavailable := status.Error(codes.Unavailable, "")
	for _, tc := range []struct {
		name   string
		layers func(late, log func(string) interceptor.Spec) []interceptor.Spec
		want   []string
	}{
		{"outside_a_retry_is_the_calls", func(late, log func(string) interceptor.Spec) []interceptor.Spec {
			return []interceptor.Spec{log("a"), late("late"), log("b"), &retryToy{n: 2}, log("attempt")}
		}, []string{"attempt 0 failed Unavailable", "attempt 1 ok OK", "late 0 ok OK", "b 0 ok OK", "a 0 ok OK"}},
		{"inside_a_retry_is_the_attempts", func(late, log func(string) interceptor.Spec) []interceptor.Spec {
			return []interceptor.Spec{log("a"), &retryToy{n: 2}, late("late"), log("attempt")}
		}, []string{"late 0 failed Unavailable", "attempt 0 failed Unavailable", "late 1 ok OK", "attempt 1 ok OK", "a 0 ok OK"}},
		{"through_many_boundaries", func(late, log func(string) interceptor.Spec) []interceptor.Spec {
			layers := []interceptor.Spec{late("late")}
			for range 9 {
				layers = append(layers, &passToy{})
			}
			return append(layers, log("outside"), &retryToy{n: 2}, &passToy{}, log("inside"))
		}, []string{"inside 0 failed Unavailable", "inside 1 ok OK", "outside 0 ok OK", "late 0 ok OK"}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			events := &eventLog{}
			layers := tc.layers(
				func(name string) interceptor.Spec { return &lateToy{logToy{name: name, log: events}} },
				func(name string) interceptor.Spec { return &logToy{name: name, log: events} })
			s := calltest.Stack(t, layers...)
			if err := s.Wrap(answers(unavailable, nil)).Invoke(t.Context(), calltest.Method, nil, new(wrapperspb.StringValue)); err != nil {
				t.Fatal(err)
			}
			if got := events.take(); !slices.Equal(got, tc.want) {
				t.Errorf("a unary call released %q, want %q", got, tc.want)
			}
			scripts := [][]error{{unavailable}, {nil, io.EOF}}
			c := &conn{stream: func(ctx context.Context, _ *grpc.StreamDesc, _ string, _ ...grpc.CallOption) (grpc.ClientStream, error) {
				script := scripts[0]
				scripts = scripts[1:]
				return &scriptStream{ctx: ctx, errs: script}, nil
			}}
			st, err := s.Wrap(c).NewStream(t.Context(), descOf(interceptor.ServerStream), calltest.Method)
			if err != nil {
				t.Fatal(err)
			}
			if err := errors.Join(st.RecvMsg(nil), st.RecvMsg(nil)); !errors.Is(err, io.EOF) {
				t.Fatal(err)
			}
			if got := events.take(); !slices.Equal(got, tc.want) {
				t.Errorf("a stream released %q, want %q", got, tc.want)
			}
		})
	}
}

func TestSameStackTwice(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		limit := newLimit("limit", 5)
		s := calltest.Stack(t, &passToy{}, limit)
		srv := testserver.New(t, testserver.InMemory())
		for name, c := range map[string]grpc.ClientConnInterface{
			"dial options twice":    testserver.Dial(t, srv, append(s.DialOptions(), s.DialOptions()...)...),
			"dial options and wrap": s.Wrap(testserver.Dial(t, srv, s.DialOptions()...)),
			"wrap twice":            s.Wrap(s.Wrap(testserver.Dial(t, srv))),
		} {
			for _, kind := range allKinds {
				err := exchange(t.Context(), c, kind, new(testingv1.UnaryRequest), new(testingv1.UnaryResponse))
				if status.Code(err) != codes.Internal || !strings.Contains(err.Error(), "the same stack is twice") {
					t.Errorf("%s, %v: the call ended with %v, want INTERNAL that says so", name, kind, err)
				}
			}
		}
		other := testserver.Dial(t, srv, calltest.Stack(t, newLimit("other", 1)).DialOptions()...)
		if err := exchange(t.Context(), s.Wrap(other), interceptor.Unary, new(testingv1.UnaryRequest), new(testingv1.UnaryResponse)); err != nil {
			t.Errorf("two stacks on one connection: %v", err)
		}
		if err := limit.atRest(); err != nil {
			t.Error(err)
		}
	})
}

// probeToy looks at each call from the gate and from the call path.
type probeToy struct {
	gate func(a *interceptor.Admission, w interceptor.Wait)
	call func(c *interceptor.Call)
	end  func(e interceptor.End)
	_    byte
}

func (l *probeToy) NewLayer() (interceptor.Layer, error) { return l, nil }
func (*probeToy) Traits() interceptor.Traits             { return 0 }

func (l *probeToy) WrapGate(inner interceptor.Gate) interceptor.Gate {
	return interceptor.GateFunc(func(ctx context.Context, a *interceptor.Admission, w interceptor.Wait) error {
		if l.gate != nil {
			l.gate(a, w)
		}
		if l.end != nil {
			a.Hold(l, 0)
		}
		return inner.Admit(ctx, a, w)
	})
}

func (l *probeToy) Release(_ int64, e interceptor.End) { l.end(e) }

func (l *probeToy) WrapCall(next interceptor.Next, _ interceptor.Again) interceptor.Next {
	return func(ctx context.Context, c *interceptor.Call) error {
		if l.call != nil {
			l.call(c)
		}
		return next(ctx, c)
	}
}

// tryToy asks inside without waiting, and then does what then says.
type tryToy struct {
	interceptor.GateOnly
	// then says how the admission ends; errAskAgain asks inside once more.
	then func(ctx context.Context, a *interceptor.Admission, mayWait bool, err error) error
}

var errAskAgain = errors.New("ask again")

func (l *tryToy) NewLayer() (interceptor.Layer, error) { return l, nil }
func (*tryToy) Traits() interceptor.Traits             { return 0 }

func (l *tryToy) WrapGate(inner interceptor.Gate) interceptor.Gate {
	return interceptor.GateFunc(func(ctx context.Context, a *interceptor.Admission, w interceptor.Wait) error {
		defer a.Internals().SetSlot(a.Internals().SetSlot(slotFunc(func() {})))
		mayWait, err := a.Try(ctx, inner, interceptor.None)
		if a.Internals().Slot() == nil {
			return errors.New("Try lost the slot")
		}
		err = l.then(ctx, a, mayWait, err)
		if err == errAskAgain {
			return inner.Admit(ctx, a, w)
		}
		return err
	})
}

// refuseToy asks inside and then refuses all the same.
type refuseToy struct {
	interceptor.GateOnly
	err    error
	refuse func(a *interceptor.Admission)
}

func (l *refuseToy) NewLayer() (interceptor.Layer, error) { return l, nil }
func (*refuseToy) Traits() interceptor.Traits             { return 0 }

func (l *refuseToy) WrapGate(inner interceptor.Gate) interceptor.Gate {
	return interceptor.GateFunc(func(ctx context.Context, a *interceptor.Admission, w interceptor.Wait) error {
		if l.refuse != nil {
			l.refuse(a)
		}
		if err := inner.Admit(ctx, a, w); err != nil {
			return err
		}
		return l.err
	})
}

func TestTry(t *testing.T) {
	reasons := map[interceptor.Reason]bool{
		interceptor.ReasonRateLimit: true, interceptor.ReasonQuota: true, interceptor.ReasonConcurrency: true,
		interceptor.ReasonQueueFull: true, interceptor.ReasonShed: true, interceptor.ReasonNotReady: true, "OF_A_USER": true,
		interceptor.ReasonFailFast: false, interceptor.ReasonThrottled: false, interceptor.ReasonBreakerOpen: false,
		interceptor.ReasonDrain: false, interceptor.ReasonClosed: false, interceptor.ReasonDeadline: false,
		interceptor.ReasonCancelled: false, interceptor.ReasonFilter: false, interceptor.ReasonBudget: false,
	}
	for reason, want := range reasons {
		t.Run("may_wait/"+string(reason), func(t *testing.T) {
			refusal := interceptor.Refuse("x", reason, "")
			s := calltest.Stack(t, &tryToy{then: func(_ context.Context, _ *interceptor.Admission, mayWait bool, err error) error {
				if mayWait != want {
					t.Errorf("mayWait = %v, want %v", mayWait, want)
				}
				return err
			}}, &refuseToy{err: refusal})
			if err := s.Wrap(answers()).Invoke(t.Context(), calltest.Method, nil, nil); err != error(refusal) {
				t.Errorf("the call ended with %v, want the refusal", err)
			}
		})
	}

	t.Run("gives_everything_back", func(t *testing.T) {
		log := &eventLog{}
		outer, note := &logToy{name: "outer", log: log}, &refuseToy{err: errors.New("not now")}
		note.refuse = func(a *interceptor.Admission) {
			if a.Internals().Slot() != nil {
				t.Error("a gate that may not wait sees a slot")
			}
			a.Note(note, 1)
		}
		tried, end := false, errAskAgain
		s := calltest.Stack(t,
			outer,
			&endToy{f: func(c *interceptor.Call) {
				if _, ok := c.Noted(note); ok {
					t.Error("a note is left of what Try gave back")
				}
			}},
			&tryToy{then: func(_ context.Context, _ *interceptor.Admission, mayWait bool, err error) error {
				if !mayWait || err == nil {
					t.Errorf("Try returned %v, %v, want true and an error", mayWait, err)
				}
				if got, want := log.take(), []string{"inner 0 not_sent Unknown"}; !slices.Equal(got, want) {
					t.Errorf("Try released %q, want %q", got, want)
				}
				tried = true
				return end
			}},
			interceptor.Only(selector.MatchFunc(func(context.Context, interceptors.CallMeta) bool { return !tried }), note),
			&logToy{name: "inner", log: log},
		)
		if err := s.Wrap(answers(nil)).Invoke(t.Context(), calltest.Method, nil, nil); err != nil {
			t.Errorf("a call that was admitted the second time: %v", err)
		}
		if got, want := log.take(), []string{"inner 0 ok OK", "outer 0 ok OK"}; !slices.Equal(got, want) {
			t.Errorf("released %q, want %q", got, want)
		}
		tried, end = false, nil // As if it had been admitted.
		if err := s.Wrap(answers()).Invoke(t.Context(), calltest.Method, nil, nil); status.Code(err) != codes.Internal {
			t.Errorf("a gate that admits what Try gave back: %v, want INTERNAL", err)
		}
		if got, want := log.take(), []string{"outer 0 not_sent Internal"}; !slices.Equal(got, want) {
			t.Errorf("released %q, want %q", got, want)
		}
	})

	t.Run("may_not_wait_when_the_context_is_over", func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		s := calltest.Stack(t, &tryToy{then: func(_ context.Context, _ *interceptor.Admission, mayWait bool, err error) error {
			if mayWait {
				t.Error("mayWait = true, want false")
			}
			return err
		}}, &refuseToy{err: errors.New("not now"), refuse: func(*interceptor.Admission) { cancel() }})
		s.Wrap(answers()).Invoke(ctx, calltest.Method, nil, nil)
	})
}

// A connection that is not gRPC's is not asked once the context is over.
func TestOtherConnection(t *testing.T) {
	log := &eventLog{}
	ctx, cancel := context.WithCancel(t.Context())
	s := calltest.Stack(t, &logToy{name: "gate", log: log}, &hookToy{hook: func(context.Context) { cancel() }})
	if err := s.Wrap(answers()).Invoke(ctx, calltest.Method, nil, nil); calltest.Reason(err) != interceptor.ReasonCancelled {
		t.Errorf("the call ended with %v, want CANCELLED", err)
	}
	if got, want := log.take(), []string{"gate 0 not_sent Canceled"}; !slices.Equal(got, want) {
		t.Errorf("released %q, want %q", got, want)
	}
}

// Nothing of a call is left on the Call that the next caller's call is given.
func TestPooledCall(t *testing.T) {
	t.Run("sent", func(t *testing.T) {
		tokens, answers := newTokens(1000), &answerToy{}
		c := calltest.Stack(t, tokens, answers).Wrap(&conn{invoke: func(context.Context, string, any, any, ...grpc.CallOption) error { return nil }})
		sent := 0
		for i := range 100 {
			answers.err = nil
			if i%10 != 0 {
				answers.err = errors.New("answered by the layer")
			} else {
				sent++
			}
			c.Invoke(t.Context(), calltest.Method, nil, nil)
		}
		if got, want := tokens.tokens.Load(), int64(1000-sent); got != want {
			t.Errorf("%d tokens are left after %d calls that were sent, want %d", got, sent, want)
		}
	})

	t.Run("peer_and_trailer", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			tokens := newTokens(1000)
			f := newFixture(t, "pick_first", "dial_options", nil, tokens)
			f.behaviour.ResponseTrailers = map[string]string{"k": "v"}
			for range 20 {
				f.call(t, interceptor.Unary)
				exchange(f.ctx, f.conn, interceptor.Unary, f.req, f.reply, grpc.MaxCallSendMsgSize(1))
				exchange(f.ctx, f.conn, interceptor.Unary, f.req, f.reply, grpc.PerRPCCredentials(badCredentials{status.Error(codes.Unavailable, "")}))
			}
			if got := tokens.tokens.Load(); got != 1000-20 {
				t.Errorf("%d tokens are left after 20 calls that were sent and 40 that were not, want 980", got)
			}
		})
	})

	t.Run("admitted", func(t *testing.T) {
		obs, forget, refuse := &recorder{}, false, newTokens(1000)
		gate := &openToy{forget: func(*interceptor.Admission) bool { return forget }}
		c := calltest.Stack(t, interceptor.Observe(obs), gate, refuse).Wrap(&conn{invoke: func(context.Context, string, any, any, ...grpc.CallOption) error { return nil }})
		for range 20 {
			forget = false
			if err := c.Invoke(t.Context(), "/m", nil, nil); err != nil {
				t.Fatal(err)
			}
			obs.log.take()
			forget = true
			if err := c.Invoke(t.Context(), "/m", nil, nil); status.Code(err) != codes.Internal {
				t.Fatalf("a call through a forgetful gate: %v, want INTERNAL", err)
			}
			if got, want := obs.log.take(), []string{"inflight +1", "ended /m unary not_sent Internal", "inflight -1"}; !slices.Equal(got, want) {
				t.Fatalf("observed %q of it, want %q", got, want)
			}
		}
	})

	t.Run("trailer", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			var trailer metadata.MD
			want := &endToy{f: func(c *interceptor.Call) { trailer = c.Internals().Trailer() }}
			f := newFixture(t, "pick_first", "dial_options", nil, want)
			f.behaviour.ResponseTrailers = map[string]string{"k": "v"}
			for range 20 {
				f.call(t, interceptor.Unary)
				if len(trailer["k"]) == 0 {
					t.Fatal("the trailer is missing")
				}
				exchange(f.ctx, f.conn, interceptor.Unary, f.req, f.reply, grpc.PerRPCCredentials(badCredentials{status.Error(codes.Unavailable, "")}))
				if trailer != nil {
					t.Fatalf("a call that was not sent has the trailer %v, want none", trailer)
				}
			}
		})
	})

	t.Run("attempt_that_outlives_its_call", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			tokens, answers := newTokens(100), &answerToy{}
			loser, first := make(chan struct{}), new(wrapperspb.StringValue)
			c := calltest.Stack(t, tokens, answers, &hedgeToy{}).Wrap(&conn{invoke: func(ctx context.Context, _ string, _, reply any, _ ...grpc.CallOption) error {
				if reply != any(first) {
					<-loser
					return nil
				}
				time.Sleep(time.Second)
				return nil
			}})
			for range 10 {
				answers.err, answers.before = nil, nil
				if err := c.Invoke(t.Context(), calltest.Method, nil, first); err != nil {
					t.Fatal(err)
				}
				answers.err = errors.New("answered by the layer")
				answers.before = func() {
					loser <- struct{}{} // The last call's attempt ends while this call runs.
					synctest.Wait()
				}
				c.Invoke(t.Context(), calltest.Method, nil, first)
			}
			if got := tokens.tokens.Load(); got != 90 {
				t.Errorf("%d tokens are left after ten calls that were sent, want 90", got)
			}
		})
	})

	t.Run("everything_else", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			// Calls of one method leave all that they can, those of the other look.
			outer, inner := &probeToy{}, &probeToy{}
			limit := newLimit("limit", 1)
			s := calltest.Stack(t, outer, &retryToy{n: 2}, newBuffer(5), limit, inner)
			var took time.Duration
			dirty := true
			inner.end = func(e interceptor.End) { took = e.Took() }
			outer.gate = func(a *interceptor.Admission, w interceptor.Wait) {
				in := a.Internals()
				if got, want := a.Now(), interceptor.Now(); got != want {
					t.Errorf("Now() = %v, want %v", got, want)
				}
				if dirty {
					a.Timed()
					a.Note(outer, 7)
					in.Bound(interceptor.Now().Add(time.Hour))
					in.SetSlot(slotFunc(func() {}))
					return
				}
				if got := a.Attempt(); got != 0 {
					t.Errorf("Attempt() = %d, want 0", got)
				}
				if a.Held(outer) || a.Held(limit) || a.Held(inner) {
					t.Error("tickets are held before any gate")
				}
				if in.Slot() != nil || in.NeverWaits() || in.Widen(w, interceptor.Forever) != interceptor.Forever {
					t.Error("a slot or a bound is left of another call")
				}
				if w != interceptor.Forever {
					t.Errorf("the call may wait %v, want forever", w)
				}
			}
			outer.call = func(c *interceptor.Call) {
				if dirty {
					c.Internals().WantTrailer()
					c.AddOptions(grpc.StaticMethod())
					c.SetRequest(wrapperspb.String("changed"))
					return
				}
				if _, ok := c.Noted(outer); ok {
					t.Error("a note is left of another call")
				}
				if c.Internals().Trailer() != nil || len(c.Options()) != 0 || c.Request() != any("request") {
					t.Errorf("trailer %v, options %v or request %v is left of another call", c.Internals().Trailer(), c.Options(), c.Request())
				}
			}
			unavailable := status.Error(codes.Unavailable, "")
			n := 0
			c := s.Wrap(&conn{invoke: func(_ context.Context, _ string, _, _ any, opts ...grpc.CallOption) error {
				time.Sleep(time.Second)
				if n++; dirty && n%4 == 1 {
					return unavailable // So that some are retried.
				}
				return nil
			}})
			for i := range 40 {
				dirty = i%2 == 0
				if err := c.Invoke(t.Context(), calltest.Method, "request", new(wrapperspb.StringValue)); err != nil {
					t.Fatalf("call %d: %v", i, err)
				}
				if want := map[bool]time.Duration{true: time.Second}[dirty]; took != want {
					t.Errorf("call %d: Took() = %v, want %v", i, took, want)
				}
			}
			if err := limit.atRest(); err != nil {
				t.Error(err)
			}
		})
	})
}

// endToy looks at a call when it is over.
type endToy struct {
	interceptor.CallOnly
	f func(c *interceptor.Call)
}

func (l *endToy) NewLayer() (interceptor.Layer, error) { return l, nil }

func (l *endToy) WrapCall(next interceptor.Next, _ interceptor.Again) interceptor.Next {
	return func(ctx context.Context, c *interceptor.Call) error {
		c.Internals().WantTrailer()
		err := next(ctx, c)
		l.f(c)
		return err
	}
}

type slotFunc func()

func (f slotFunc) Pass() { f() }

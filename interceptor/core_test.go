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
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/grpc-ecosystem/go-grpc-middleware/v2/interceptors"
	"github.com/grpc-ecosystem/go-grpc-middleware/v2/interceptors/selector"
	"golang.org/x/sync/semaphore"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/belfry-go/belfry/interceptor"
	"github.com/belfry-go/belfry/internal/calltest"
	"github.com/belfry-go/belfry/internal/layertest"
)

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

// refused is the end of a call that is refused with a code.
func refused(after time.Duration, r interceptor.Reason, code codes.Code) calltest.End {
	return calltest.End{After: after, Reason: r, Code: code}
}

func TestALimitWaitsAndAShedOutsideItRefusesInstead(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		calltest.Expect(t, calltest.Burst(calltest.Stack(t, newLimit("limit", 1)).Wrap(calltest.Takes(time.Second)), 3),
			calltest.OK(time.Second), calltest.OK(2*time.Second), calltest.OK(3*time.Second))
		calltest.Expect(t, calltest.Burst(calltest.Stack(t, &shedToy{}, newLimit("limit", 1)).Wrap(calltest.Takes(time.Second)), 3),
			calltest.OK(time.Second), refused(0, interceptor.ReasonConcurrency, codes.Unavailable), refused(0, interceptor.ReasonConcurrency, codes.Unavailable))
		calltest.Expect(t, calltest.Burst(calltest.Stack(t, newLimit("limit", 1), &shedToy{}).Wrap(calltest.Takes(time.Second)), 2),
			calltest.OK(time.Second), calltest.OK(2*time.Second))
	})
}

func TestABufferInsideAShedLetsItsCallsWaitAgain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := calltest.Stack(t, &shedToy{}, newBuffer(2), newLimit("limit", 1))
		calltest.Expect(t, calltest.Burst(s.Wrap(calltest.Takes(time.Second)), 4),
			calltest.OK(time.Second), calltest.OK(2*time.Second), calltest.OK(3*time.Second),
			refused(0, interceptor.ReasonQueueFull, codes.Unavailable))
	})
}

func TestFailFastRefusesAtExactlyItsBound(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := calltest.Stack(t, &failFastToy{d: 300 * time.Millisecond}, newLimit("limit", 1))
		calltest.Expect(t, calltest.Burst(s.Wrap(calltest.Takes(time.Second)), 2),
			calltest.OK(time.Second), refused(300*time.Millisecond, interceptor.ReasonConcurrency, codes.Unavailable))
	})
}

func TestACallerSaysNoWaitPerCallAndItOnlyNarrows(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := calltest.Stack(t, newLimit("limit", 1))
		c := s.Wrap(calltest.Takes(time.Second))
		calltest.Expect(t, calltest.Burst(c, 2, interceptor.WithWait(interceptor.None)),
			calltest.OK(time.Second), refused(0, interceptor.ReasonConcurrency, codes.Unavailable))
		calltest.Expect(t, calltest.Burst(c, 2, interceptor.WithWait(interceptor.For(500*time.Millisecond)), interceptor.WithWait(interceptor.Forever)),
			calltest.OK(time.Second), refused(500*time.Millisecond, interceptor.ReasonConcurrency, codes.Unavailable))
	})
}

func TestTheWaitIsCarriedAcrossAForeignInterceptorToASecondStack(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		outer := calltest.Stack(t, &shedToy{}, interceptor.CarryWait())
		inner := calltest.Stack(t, newLimit("limit", 1))
		calltest.Expect(t, calltest.Burst(outer.Wrap(inner.Wrap(calltest.Takes(time.Second))), 2),
			calltest.OK(time.Second), refused(0, interceptor.ReasonConcurrency, codes.Unavailable))
	})
}

func TestADeadlineCoversTheWaitEvenInABufferThatWidensIt(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		timeout := &timeoutToy{d: 1500 * time.Millisecond}
		s := calltest.Stack(t, timeout, &shedToy{}, newBuffer(5), newLimit("limit", 1))
		calltest.Expect(t, calltest.Burst(s.Wrap(calltest.Takes(time.Second)), 3),
			calltest.OK(time.Second),
			refused(1500*time.Millisecond, interceptor.ReasonDeadline, codes.DeadlineExceeded),
			refused(1500*time.Millisecond, interceptor.ReasonDeadline, codes.DeadlineExceeded))
		if got := timeout.fired.Load(); got != 2 {
			t.Errorf("the timeout fired %d times, want 2: one waiting, one running", got)
		}
	})
}

func TestADeadlineInsideALimitBeginsAfterTheLimitsWait(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		sem, err := interceptor.FromSemaphore("limit", semaphore.NewWeighted(1))
		if err != nil {
			t.Fatal(err)
		}
		s := calltest.Stack(t, &failFastToy{d: time.Hour}, sem, &timeoutToy{d: 1500 * time.Millisecond})
		calltest.Expect(t, calltest.Burst(s.Wrap(calltest.Takes(time.Second)), 2),
			calltest.OK(time.Second), calltest.OK(2*time.Second))
	})
}

func TestRefusalsFurtherInCostNoTokens(t *testing.T) {
	tokens, limit := newTokens(10), newLimit("limit", 1)
	c := calltest.Stack(t, &shedToy{}, tokens, limit).Wrap(answers(nil))
	<-limit.slots // The limit is full.
	for range 10 {
		if err := c.Invoke(context.Background(), calltest.Method, nil, nil); calltest.Reason(err) != interceptor.ReasonConcurrency {
			t.Fatalf("a call at a full limit: %v, want a refusal of the limit", err)
		}
	}
	if got := tokens.tokens.Load(); got != 10 {
		t.Errorf("%d tokens left after ten refusals, want all 10", got)
	}
	limit.slots <- struct{}{}
	if err := c.Invoke(context.Background(), calltest.Method, nil, nil); err != nil {
		t.Fatal(err)
	}
	if got := tokens.tokens.Load(); got != 9 {
		t.Errorf("%d tokens left after a call, want 9", got)
	}
}

func TestTicketsAreReleasedInReverseOrderWithTheTrueError(t *testing.T) {
	log := &eventLog{}
	a, b := &logToy{name: "a", log: log}, &logToy{name: "b", log: log}
	for _, tc := range []struct {
		name string
		err  error
		want []string
	}{
		{"success", nil, []string{"b 0 ok OK", "a 0 ok OK"}},
		{"failure", status.Error(codes.NotFound, ""), []string{"b 0 failed NotFound", "a 0 failed NotFound"}},
		{"a server that says cancelled", status.Error(codes.Canceled, ""), []string{"b 0 failed Canceled", "a 0 failed Canceled"}},
		{"a refusal of a stack further in", interceptor.Refuse("x", interceptor.ReasonShed, ""), []string{"b 0 not_sent Unavailable", "a 0 not_sent Unavailable"}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			calltest.Stack(t, a, b).Wrap(answers(tc.err)).Invoke(context.Background(), calltest.Method, nil, nil)
			if got := log.take(); !slices.Equal(got, tc.want) {
				t.Errorf("released %q, want %q", got, tc.want)
			}
		})
	}
}

func TestAttemptsHaveTheirOwnTicketsInsideARetryAndTheCallHasItsOutside(t *testing.T) {
	log := &eventLog{}
	unavailable := status.Error(codes.Unavailable, "")
	s := calltest.Stack(t, &logToy{name: "call", log: log}, &retryToy{n: 3}, &logToy{name: "attempt", log: log})
	if err := s.Wrap(answers(unavailable, unavailable, nil)).Invoke(context.Background(), calltest.Method, new(wrapperspb.StringValue), new(wrapperspb.StringValue)); err != nil {
		t.Fatal(err)
	}
	want := []string{"attempt 0 failed Unavailable", "attempt 1 failed Unavailable", "attempt 2 ok OK", "call 0 ok OK"}
	if got := log.take(); !slices.Equal(got, want) {
		t.Errorf("released %q, want %q", got, want)
	}
}

// againToy passes a call that failed on once more, without a fork.
type againToy struct {
	interceptor.CallOnly
	_ byte
}

func (*againToy) WrapCall(next interceptor.Next, _ interceptor.Gate) interceptor.Next {
	return func(ctx context.Context, c *interceptor.Call) error {
		if err := next(ctx, c); err == nil {
			return nil
		}
		return next(ctx, c)
	}
}

func TestACallPassedOnAgainIsAFurtherAttempt(t *testing.T) {
	log, obs := &eventLog{}, &recorder{}
	s := calltest.Stack(t, interceptor.Observe(obs), &againToy{}, &logToy{name: "attempt", log: log})
	unavailable := status.Error(codes.Unavailable, "")
	for range 2 { // The second call may be given the first one's Call.
		if err := s.Wrap(answers(unavailable, nil)).Invoke(context.Background(), "/m", nil, nil); err != nil {
			t.Fatal(err)
		}
		if got, want := log.take(), []string{"attempt 0 failed Unavailable", "attempt 1 ok OK"}; !slices.Equal(got, want) {
			t.Errorf("released %q, want %q", got, want)
		}
		want := []string{"inflight +1", "admitted /m unary 0", "attempt /m 0", "admitted /m unary 1", "attempt /m 1", "ended /m unary ok OK", "inflight -1"}
		if got := obs.log.take(); !slices.Equal(got, want) {
			t.Errorf("observed %q, want %q", got, want)
		}
	}
}

func TestARetryHoldsNoPermitWhileItBacksOffAndNeverQueues(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		unavailable := status.Error(codes.Unavailable, "the server's own")
		limit := newLimit("limit", 1)
		s := calltest.Stack(t, &retryToy{n: 2, backoff: time.Second}, limit)
		done := make(chan error)
		go func() {
			done <- s.Wrap(answers(unavailable)).Invoke(context.Background(), calltest.Method, nil, new(wrapperspb.StringValue))
		}()
		synctest.Wait()
		select {
		case <-limit.slots: // Taken by somebody else during the back-off.
		default:
			t.Fatal("the permit is held while the call backs off")
		}
		if err := <-done; err != unavailable {
			t.Errorf("a retry that cannot be admitted returned %v, want the server's error", err)
		}
		limit.slots <- struct{}{}
	})
}

func TestEachAttemptHasItsOwnReplyAndOutOptionsAndTheWinnersAreTheCalls(t *testing.T) {
	var replies []any
	var headers []*metadata.MD
	n := 0
	c := &conn{invoke: func(_ context.Context, _ string, _, reply any, opts ...grpc.CallOption) error {
		n++
		replies = append(replies, reply)
		reply.(*wrapperspb.StringValue).Value = fmt.Sprint("attempt ", n)
		for _, o := range opts {
			switch o := o.(type) {
			case grpc.HeaderCallOption:
				headers = append(headers, o.HeaderAddr)
				*o.HeaderAddr = metadata.Pairs("attempt", fmt.Sprint(n))
			case grpc.OnFinishCallOption:
				t.Error("an attempt was given the call's OnFinish")
			}
		}
		if n < 3 {
			return status.Error(codes.Unavailable, "")
		}
		return nil
	}}
	finished := 0
	var header metadata.MD
	reply := new(wrapperspb.StringValue)
	err := calltest.Stack(t, &retryToy{n: 3}).Wrap(c).Invoke(context.Background(), calltest.Method, nil, reply,
		grpc.Header(&header), grpc.OnFinish(func(err error) {
			finished++
			if err != nil {
				t.Errorf("OnFinish(%v), want nil", err)
			}
		}))
	if err != nil || reply.Value != "attempt 3" || len(header["attempt"]) != 1 || header["attempt"][0] != "3" {
		t.Errorf("got %v, reply %q, header %v; want the third attempt's", err, reply.Value, header)
	}
	if finished != 1 {
		t.Errorf("OnFinish was called %d times, want once", finished)
	}
	if len(replies) != 3 || replies[0] == replies[1] || replies[1] == replies[2] || headers[1] == headers[2] || headers[0] == headers[1] {
		t.Errorf("attempts share a reply or a header")
	}
}

func TestForksAreMadeFromTheCallAsItWasOutside(t *testing.T) {
	var sent []string
	c := &conn{invoke: func(_ context.Context, _ string, req, _ any, _ ...grpc.CallOption) error {
		sent = append(sent, req.(*wrapperspb.StringValue).Value)
		return status.Error(codes.Unavailable, "")
	}}
	double := interceptor.MapRequest(func(_ context.Context, _ string, m *wrapperspb.StringValue) (*wrapperspb.StringValue, error) {
		return wrapperspb.String(m.Value + m.Value), nil
	})
	calltest.Stack(t, &retryToy{n: 3}, double).Wrap(c).Invoke(context.Background(), calltest.Method, wrapperspb.String("x"), new(wrapperspb.StringValue))
	if want := []string{"xx", "xx", "xx"}; !slices.Equal(sent, want) {
		t.Errorf("sent %q, want %q", sent, want)
	}
}

// hedgeToy runs the call and one more attempt side by side, and the first success
// wins.
type hedgeToy struct{ interceptor.CallOnly }

func (*hedgeToy) WrapCall(next interceptor.Next, inner interceptor.Gate) interceptor.Next {
	return func(ctx context.Context, c *interceptor.Call) error {
		origin := c.Origin()
		attempts := []*interceptor.Call{c.Detach(), origin.Fork()}
		type result struct {
			f   *interceptor.Call
			err error
		}
		results := make(chan result, len(attempts))
		for i, f := range attempts {
			actx, cancel := context.WithCancel(ctx)
			defer cancel()
			if i > 0 {
				if inner.Admit(actx, f, interceptor.None) != nil {
					results <- result{f, errors.New("not admitted")}
					continue
				}
			}
			go func() { results <- result{f, next(actx, f)} }()
		}
		var r result
		for range attempts {
			if r = <-results; r.err == nil {
				break
			}
		}
		c.Adopt(r.f)
		return r.err
	}
}

func TestALoserOfAHedgeIsIgnoredAndDrainWaitsForIt(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		log := &eventLog{}
		n := make(chan int, 2)
		n <- 0
		n <- 1
		c := &conn{invoke: func(ctx context.Context, _ string, _, reply any, _ ...grpc.CallOption) error {
			if <-n == 0 {
				reply.(*wrapperspb.StringValue).Value = "winner"
				time.Sleep(time.Second)
				return nil
			}
			<-ctx.Done()
			reply.(*wrapperspb.StringValue).Value = "loser"
			time.Sleep(time.Second) // A loser that takes its time.
			return status.FromContextError(ctx.Err()).Err()
		}}
		s := calltest.Stack(t, &logToy{name: "call", log: log}, &hedgeToy{}, &logToy{name: "attempt", log: log})
		start := time.Now()
		reply := new(wrapperspb.StringValue)
		if err := s.Wrap(c).Invoke(context.Background(), calltest.Method, nil, reply); err != nil || time.Since(start) != time.Second {
			t.Errorf("got %v after %v, want success after 1s", err, time.Since(start))
		}
		if err := s.Drain(context.Background()); err != nil || time.Since(start) != 2*time.Second {
			t.Errorf("Drain returned %v after %v, want nil after 2s, when the loser has ended", err, time.Since(start))
		}
		if reply.Value != "winner" {
			t.Errorf("reply = %q, want the winner's", reply.Value)
		}
		got := log.take()
		if len(got) != 3 || !strings.HasSuffix(got[0], "ok OK") || got[1] != "call 0 ok OK" || !strings.HasSuffix(got[2], "ignored Canceled") {
			t.Errorf("released %q, want the winner ok, the call ok, the loser ignored", got)
		}
	})
}

// pairToy opens a second stream beside the one that the caller gets.
type pairToy struct {
	interceptor.CallOnly
	opened chan struct{} // Closed when the second one is open.
}

func (l *pairToy) WrapCall(next interceptor.Next, inner interceptor.Gate) interceptor.Next {
	return func(ctx context.Context, c *interceptor.Call) error {
		origin := c.Origin()
		second := origin.Fork()
		if err := next(ctx, c); err != nil {
			return err
		}
		if err := inner.Admit(ctx, second, interceptor.None); err != nil {
			return err
		}
		go func() {
			defer close(l.opened)
			next(ctx, second)
		}()
		return nil
	}
}

func TestAStreamThatOpensAfterTheCallIsOverIsIgnored(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		log := &eventLog{}
		n := 0
		c := &conn{stream: func(ctx context.Context, _ *grpc.StreamDesc, _ string, _ ...grpc.CallOption) (grpc.ClientStream, error) {
			if n++; n == 2 {
				time.Sleep(time.Second)
			}
			return &scriptStream{ctx: ctx, errs: []error{io.EOF}}, nil
		}}
		pair := &pairToy{opened: make(chan struct{})}
		s := calltest.Stack(t, pair, &logToy{name: "attempt", log: log})
		st, err := s.Wrap(c).NewStream(context.Background(), &grpc.StreamDesc{ServerStreams: true}, calltest.Method)
		if err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		if err := st.RecvMsg(nil); err != io.EOF {
			t.Fatal(err)
		}
		<-pair.opened
		if err := s.Drain(context.Background()); err != nil {
			t.Fatal(err)
		}
		if got, want := log.take(), []string{"attempt 0 ok OK", "attempt 1 ignored Canceled"}; !slices.Equal(got, want) {
			t.Errorf("released %q, want %q", got, want)
		}
	})
}

func TestWhatAForeignInterceptorRefusesWasNotSent(t *testing.T) {
	log := &eventLog{}
	denied := status.Error(codes.PermissionDenied, "")
	f, err := interceptor.Foreign("auth", func(context.Context, string, any, any, *grpc.ClientConn, grpc.UnaryInvoker, ...grpc.CallOption) error {
		return denied
	}, nil)
	if err != nil {
		t.Fatal(err)
	}
	s := calltest.Stack(t, &logToy{name: "outer", log: log}, f, &logToy{name: "inner", log: log})
	if err := s.Wrap(answers()).Invoke(context.Background(), calltest.Method, nil, nil); err != denied {
		t.Errorf("got %v, want the interceptor's error", err)
	}
	want := []string{"inner 0 not_sent OK", "outer 0 not_sent PermissionDenied"}
	if got := log.take(); !slices.Equal(got, want) {
		t.Errorf("released %q, want %q", got, want)
	}
}

// lazyStream is opened by its first SendMsg.
type lazyStream struct {
	grpc.ClientStream
	open func() (grpc.ClientStream, error)
}

func (s *lazyStream) SendMsg(m any) (err error) {
	if s.ClientStream == nil {
		if s.ClientStream, err = s.open(); err != nil {
			return err
		}
	}
	return s.ClientStream.SendMsg(m)
}

func TestAStreamThatAForeignInterceptorOpensLaterWasSent(t *testing.T) {
	log := &eventLog{}
	f, err := interceptor.Foreign("lazy", nil, func(ctx context.Context, desc *grpc.StreamDesc, cc *grpc.ClientConn, m string, streamer grpc.Streamer, opts ...grpc.CallOption) (grpc.ClientStream, error) {
		return &lazyStream{open: func() (grpc.ClientStream, error) { return streamer(ctx, desc, cc, m, opts...) }}, nil
	})
	if err != nil {
		t.Fatal(err)
	}
	failed := status.Error(codes.Internal, "")
	c := &conn{stream: func(ctx context.Context, _ *grpc.StreamDesc, _ string, _ ...grpc.CallOption) (grpc.ClientStream, error) {
		return &scriptStream{ctx: ctx, errs: []error{failed}}, nil
	}}
	s := calltest.Stack(t, &logToy{name: "outer", log: log}, f, &logToy{name: "inner", log: log})
	st, err := s.Wrap(c).NewStream(context.Background(), &grpc.StreamDesc{ServerStreams: true, ClientStreams: true}, calltest.Method)
	if err != nil {
		t.Fatal(err)
	}
	if err := st.SendMsg(nil); err != nil {
		t.Fatal(err)
	}
	if err := st.RecvMsg(nil); err != failed {
		t.Errorf("got %v, want the server's error", err)
	}
	want := []string{"inner 0 not_sent OK", "inner 1 failed Internal", "outer 0 failed Internal"}
	if got := log.take(); !slices.Equal(got, want) {
		t.Errorf("released %q, want %q", got, want)
	}
}

func TestAForeignRetryIsAdmittedAnewForEachAttempt(t *testing.T) {
	log := &eventLog{}
	f, err := interceptor.Foreign("twice", func(ctx context.Context, m string, req, reply any, cc *grpc.ClientConn, invoker grpc.UnaryInvoker, opts ...grpc.CallOption) error {
		if err := invoker(ctx, m, req, reply, cc, opts...); err == nil {
			return nil
		}
		return invoker(ctx, m, req, reply, cc, opts...)
	}, nil)
	if err != nil {
		t.Fatal(err)
	}
	s := calltest.Stack(t, &logToy{name: "outer", log: log}, f, &logToy{name: "inner", log: log})
	if err := s.Wrap(answers(status.Error(codes.Internal, ""), nil)).Invoke(context.Background(), calltest.Method, nil, nil); err != nil {
		t.Error(err)
	}
	want := []string{"inner 0 failed Internal", "inner 1 ok OK", "outer 0 ok OK"}
	if got := log.take(); !slices.Equal(got, want) {
		t.Errorf("released %q, want %q", got, want)
	}
}

// passForeign is an interceptor of others that only passes calls on.
func passForeign(ctx context.Context, m string, req, reply any, cc *grpc.ClientConn, invoker grpc.UnaryInvoker, opts ...grpc.CallOption) error {
	return invoker(ctx, m, req, reply, cc, opts...)
}

func TestTheReplyOfAFurtherAttemptPassesThroughWhatIsInsideTheRetry(t *testing.T) {
	passes, err := interceptor.Foreign("passes", passForeign, nil)
	if err != nil {
		t.Fatal(err)
	}
	n := 0
	answersItself, err := interceptor.Foreign("answers", func(ctx context.Context, m string, req, reply any, cc *grpc.ClientConn, invoker grpc.UnaryInvoker, opts ...grpc.CallOption) error {
		if n == 0 {
			return invoker(ctx, m, req, reply, cc, opts...)
		}
		reply.(*wrapperspb.StringValue).Value = "second"
		return nil
	}, nil)
	if err != nil {
		t.Fatal(err)
	}
	c := &conn{invoke: func(_ context.Context, _ string, _, reply any, _ ...grpc.CallOption) error {
		if n++; n == 1 {
			reply.(*wrapperspb.StringValue).Value = "first"
			return status.Error(codes.Unavailable, "")
		}
		reply.(*wrapperspb.StringValue).Value = "second"
		return nil
	}}
	for _, inside := range []interceptor.Layer{passes, answersItself} {
		n = 0
		reply := new(wrapperspb.StringValue)
		err := calltest.Stack(t, &retryToy{n: 2}, inside).Wrap(c).Invoke(context.Background(), calltest.Method, nil, reply)
		if err != nil || reply.Value != "second" {
			t.Errorf("retry > %v: got %v, reply %q; want the second attempt's", inside, err, reply.Value)
		}
	}
}

func TestTicketsAreReleasedWhenTheInvokerPanics(t *testing.T) {
	log := &eventLog{}
	c := &conn{invoke: func(context.Context, string, any, any, ...grpc.CallOption) error { panic("oh") }}
	s := calltest.Stack(t, &logToy{name: "a", log: log}, &passToy{}, &logToy{name: "b", log: log})
	func() {
		defer func() {
			if r := recover(); r != "oh" {
				t.Errorf("recovered %v, want the invoker's panic", r)
			}
		}()
		s.Wrap(c).Invoke(context.Background(), calltest.Method, nil, nil)
	}()
	want := []string{"b 0 failed Internal", "a 0 failed Internal"}
	if got := log.take(); !slices.Equal(got, want) {
		t.Errorf("released %q, want %q", got, want)
	}
	if err := s.Drain(context.Background()); err != nil {
		t.Error(err)
	}
}

func TestAGateThatPanicsAndAReleaserThatPanicsLoseNoTicket(t *testing.T) {
	log := &eventLog{}
	bad := &panicToy{}
	s := calltest.Stack(t, &logToy{name: "a", log: log}, bad, &logToy{name: "b", log: log})
	for _, where := range []string{"admit", "release"} {
		bad.where = where
		func() {
			defer func() { recover() }()
			s.Wrap(answers(nil)).Invoke(context.Background(), calltest.Method, nil, nil)
			t.Errorf("%s: no panic", where)
		}()
	}
	want := []string{"a 0 not_sent Internal", "b 0 ok OK", "a 0 ok OK"}
	if got := log.take(); !slices.Equal(got, want) {
		t.Errorf("released %q, want %q", got, want)
	}
	if err := s.Drain(context.Background()); err != nil {
		t.Error(err)
	}
}

type panicToy struct {
	interceptor.GateOnly
	where string
}

func (l *panicToy) WrapGate(inner interceptor.Gate) interceptor.Gate {
	return interceptor.GateFunc(func(ctx context.Context, c *interceptor.Call, w interceptor.Wait) error {
		if l.where == "admit" {
			panic(l.where)
		}
		c.Hold(l, 0)
		return inner.Admit(ctx, c, w)
	})
}

func (l *panicToy) Release(int64, interceptor.Outcome, error) {
	if l.where == "release" {
		panic(l.where)
	}
}

func TestDrainRefusesNewCallsAndWaitsForThoseInFlight(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := calltest.Stack(t, newLimit("limit", 1))
		c := s.Wrap(calltest.Takes(time.Second))
		start := time.Now()
		for range 2 { // One runs, one waits.
			go c.Invoke(context.Background(), calltest.Method, nil, nil)
		}
		synctest.Wait()
		ctx, cancel := context.WithTimeout(context.Background(), 100*time.Millisecond)
		defer cancel()
		if err := s.Drain(ctx); !errors.Is(err, context.DeadlineExceeded) || !strings.Contains(err.Error(), "2 calls") {
			t.Errorf("Drain with a short deadline: %v, want 2 calls in flight and the deadline", err)
		}
		err := c.Invoke(context.Background(), calltest.Method, nil, nil)
		if status.Code(err) != codes.Unavailable || calltest.Reason(err) != interceptor.ReasonDrain {
			t.Errorf("a call to a draining stack: %v, want UNAVAILABLE and DRAIN", err)
		}
		if err := s.Drain(context.Background()); err != nil || time.Since(start) != 2*time.Second {
			t.Errorf("Drain returned %v after %v, want nil after 2s", err, time.Since(start))
		}
		if err := s.Drain(context.Background()); err != nil {
			t.Errorf("Drain again: %v", err)
		}
	})
}

func TestACallThatADrainingStackRefusesIsFinished(t *testing.T) {
	s := calltest.Stack(t)
	if err := s.Drain(context.Background()); err != nil {
		t.Fatal(err)
	}
	var finished []interceptor.Reason
	opt := grpc.OnFinish(func(err error) { finished = append(finished, calltest.Reason(err)) })
	c := s.Wrap(&conn{})
	c.Invoke(context.Background(), calltest.Method, nil, nil, opt)
	c.NewStream(context.Background(), &grpc.StreamDesc{ServerStreams: true}, calltest.Method, opt)
	if want := []interceptor.Reason{interceptor.ReasonDrain, interceptor.ReasonDrain}; !slices.Equal(finished, want) {
		t.Errorf("OnFinish saw %q, want %q", finished, want)
	}
}

func TestDrainWaitsForStreams(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := &conn{stream: func(ctx context.Context, _ *grpc.StreamDesc, _ string, _ ...grpc.CallOption) (grpc.ClientStream, error) {
			return &scriptStream{ctx: ctx, errs: []error{nil, io.EOF}}, nil
		}}
		s := calltest.Stack(t, newLimit("limit", 1), &passToy{})
		st, err := s.Wrap(c).NewStream(context.Background(), &grpc.StreamDesc{ServerStreams: true}, calltest.Method)
		if err != nil {
			t.Fatal(err)
		}
		drained := make(chan error, 1)
		go func() { drained <- s.Drain(context.Background()) }()
		if err := st.RecvMsg(nil); err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		if len(drained) != 0 {
			t.Fatal("Drain returned while a stream is open")
		}
		if err := st.RecvMsg(nil); err != io.EOF {
			t.Fatal(err)
		}
		if err := <-drained; err != nil {
			t.Error(err)
		}
	})
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
func (s *scriptStream) SendMsg(any) error        { return nil }
func (s *scriptStream) CloseSend() error         { return nil }
func (s *scriptStream) Context() context.Context { return s.ctx }

func TestAStreamIsRetriedUntilItsFirstMessageAndDeliversNothingTwice(t *testing.T) {
	unavailable := status.Error(codes.Unavailable, "")
	log := &eventLog{}
	opened := 0
	scripts := [][]error{{unavailable}, {unavailable}, {nil, unavailable}}
	c := &conn{stream: func(ctx context.Context, _ *grpc.StreamDesc, _ string, _ ...grpc.CallOption) (grpc.ClientStream, error) {
		opened++
		return &scriptStream{ctx: ctx, errs: scripts[opened-1]}, nil
	}}
	s := calltest.Stack(t, &logToy{name: "call", log: log}, &retryToy{n: 5}, &logToy{name: "attempt", log: log})
	st, err := s.Wrap(c).NewStream(context.Background(), &grpc.StreamDesc{ServerStreams: true}, calltest.Method)
	if err != nil {
		t.Fatal(err)
	}
	if err := st.RecvMsg(nil); err != nil {
		t.Fatalf("the first message: %v, want the third attempt's", err)
	}
	if err := st.RecvMsg(nil); err != unavailable {
		t.Errorf("after the first message: %v, want the server's error", err)
	}
	if opened != 3 {
		t.Errorf("%d streams were opened, want 3", opened)
	}
	want := []string{"attempt 0 failed Unavailable", "attempt 1 failed Unavailable", "attempt 2 failed Unavailable", "call 0 failed Unavailable"}
	if got := log.take(); !slices.Equal(got, want) {
		t.Errorf("released %q, want %q", got, want)
	}
	if err := s.Drain(context.Background()); err != nil {
		t.Error(err)
	}
}

func TestAnAbandonedStreamReleasesInsideOutWhenItsContextEnds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		log := &eventLog{}
		c := &conn{stream: func(ctx context.Context, _ *grpc.StreamDesc, _ string, _ ...grpc.CallOption) (grpc.ClientStream, error) {
			return &scriptStream{ctx: ctx}, nil
		}}
		s := calltest.Stack(t, &logToy{name: "outer", log: log}, &passToy{}, &logToy{name: "middle", log: log}, &passToy{}, &logToy{name: "inner", log: log})
		ctx, cancel := context.WithCancel(context.Background())
		if _, err := s.Wrap(c).NewStream(ctx, &grpc.StreamDesc{ServerStreams: true}, calltest.Method); err != nil {
			t.Fatal(err)
		}
		cancel()
		if err := s.Drain(context.Background()); err != nil {
			t.Fatal(err)
		}
		want := []string{"inner 0 ignored Canceled", "middle 0 ignored Canceled", "outer 0 ignored Canceled"}
		got := log.take()
		slices.Sort(got) // Whose watch fires first decides where it begins.
		slices.Sort(want)
		if !slices.Equal(got, want) {
			t.Errorf("released %q, want %q", got, want)
		}
	})
}

func TestOnFinishThatIsNotTheEndIsNotBelieved(t *testing.T) {
	log := &eventLog{}
	var finish func(error)
	c := &conn{stream: func(ctx context.Context, _ *grpc.StreamDesc, _ string, opts ...grpc.CallOption) (grpc.ClientStream, error) {
		for _, o := range opts {
			if o, ok := o.(grpc.OnFinishCallOption); ok {
				finish = o.OnFinish
			}
		}
		finish(status.Error(codes.Unavailable, "an attempt of a retry behind the stack"))
		return &scriptStream{ctx: ctx, errs: []error{io.EOF}}, nil
	}}
	s := calltest.Stack(t, &logToy{name: "a", log: log})
	st, err := s.Wrap(c).NewStream(context.Background(), &grpc.StreamDesc{ServerStreams: true}, calltest.Method)
	if err != nil {
		t.Fatal(err)
	}
	finish(status.Error(codes.Unavailable, "another"))
	if got := log.take(); len(got) != 0 {
		t.Errorf("released %q while the stream is open", got)
	}
	if err := st.RecvMsg(nil); err != io.EOF {
		t.Fatal(err)
	}
	finish(nil)
	if got, want := log.take(), []string{"a 0 ok OK"}; !slices.Equal(got, want) {
		t.Errorf("released %q, want %q", got, want)
	}
}

func TestACreationFailureThatIsReportedTwiceIsReleasedOnce(t *testing.T) {
	log := &eventLog{}
	fails := status.Error(codes.Canceled, "")
	c := &conn{stream: func(_ context.Context, _ *grpc.StreamDesc, _ string, opts ...grpc.CallOption) (grpc.ClientStream, error) {
		for _, o := range opts {
			if o, ok := o.(grpc.OnFinishCallOption); ok {
				o.OnFinish(fails)
				o.OnFinish(fails)
			}
		}
		return nil, fails
	}}
	s := calltest.Stack(t, &logToy{name: "a", log: log}, &passToy{}, &logToy{name: "b", log: log})
	if _, err := s.Wrap(c).NewStream(context.Background(), &grpc.StreamDesc{ServerStreams: true}, calltest.Method); err != fails {
		t.Errorf("got %v, want the streamer's error", err)
	}
	if got, want := log.take(), []string{"b 0 failed Canceled", "a 0 failed Canceled"}; !slices.Equal(got, want) {
		t.Errorf("released %q, want %q", got, want)
	}
}

func TestNewStackRejectsWhatCannotWork(t *testing.T) {
	limit := newLimit("limit", 1)
	for _, tc := range []struct {
		name   string
		layers []interceptor.Layer
		want   string
	}{
		{"nil", []interceptor.Layer{limit, nil}, "layer 1 is nil"},
		{"nil pointer", []interceptor.Layer{(*limitToy)(nil)}, "layer 0 is nil"},
		{"duplicate", []interceptor.Layer{limit, &shedToy{}, limit}, "layer 2 (limit) is the same value as layer 0"},
		{"duplicate behind an only", []interceptor.Layer{limit, interceptor.Only(everything, limit)}, "layer 1 (only(limit)) is the same value as layer 0"},
		{"duplicate before an only", []interceptor.Layer{interceptor.Only(everything, interceptor.Only(everything, limit)), limit}, "layer 1 (limit) is the same value as layer 0"},
		{"buffer with nothing behind it", []interceptor.Layer{limit, newBuffer(1)}, "layer 1 (buffer): there is nothing behind it"},
		{"only of such a buffer", []interceptor.Layer{limit, interceptor.Only(everything, newBuffer(1))}, "layer 1 (only(buffer)): there is nothing behind it"},
		{"only of an observer", []interceptor.Layer{interceptor.Only(everything, interceptor.Observe(interceptor.NopObserver{}))}, "sees the whole stack"},
		{"only of nothing", []interceptor.Layer{interceptor.Only(nil, limit)}, "layer 0 is nil"},
		{"two observers", []interceptor.Layer{interceptor.Observe(interceptor.NopObserver{}), interceptor.Observe(interceptor.NopObserver{})}, "one observer"},
		{"no observer", []interceptor.Layer{interceptor.Observe(nil)}, "observer is nil"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			_, err := interceptor.NewStack(tc.layers...)
			if err == nil || !strings.Contains(err.Error(), tc.want) {
				t.Errorf("NewStack returned %v, want an error with %q", err, tc.want)
			}
		})
	}
}

var everything = selector.MatchFunc(func(context.Context, interceptors.CallMeta) bool { return true })

func TestStringPrintsTheOrderWithoutLayersThatAreOff(t *testing.T) {
	s := calltest.Stack(t, &shedToy{}, interceptor.Optional(false, nil), interceptor.Optional(true, newBuffer(1)), interceptor.Only(everything, newLimit("limit", 1)))
	if got, want := s.String(), "[shed > buffer > only(limit)]"; got != want {
		t.Errorf("String() = %q, want %q", got, want)
	}
}

func TestOnlyAppliesALayerToTheCallsThatMatch(t *testing.T) {
	writes := selector.MatchFunc(func(_ context.Context, m interceptors.CallMeta) bool { return m.Method == "write" })
	tokens := newTokens(1)
	timeout := &timeoutToy{d: time.Hour}
	var deadline bool
	c := &conn{invoke: func(ctx context.Context, _ string, _, _ any, _ ...grpc.CallOption) error {
		_, deadline = ctx.Deadline()
		return nil
	}}
	s := calltest.Stack(t, interceptor.Only(writes, tokens), interceptor.Only(writes, timeout)).Wrap(c)
	ctx := context.Background()
	for i, tc := range []struct {
		method   string
		reason   interceptor.Reason
		deadline bool
	}{{"/s/read", "", false}, {"/s/write", "", true}, {"/s/read", "", false}, {"/s/write", interceptor.ReasonRateLimit, false}} {
		deadline = false
		err := s.Invoke(ctx, tc.method, nil, nil)
		if calltest.Reason(err) != tc.reason || deadline != tc.deadline {
			t.Errorf("call %d of %s: %v, deadline %v; want reason %q, deadline %v", i, tc.method, err, deadline, tc.reason, tc.deadline)
		}
	}
}

func TestReplaceLetsCallsInFlightEndWithTheirLayers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		old, new := newLimit("old", 1), newLimit("new", 1)
		s := calltest.Stack(t, old)
		c := s.Wrap(calltest.Takes(time.Second))
		go c.Invoke(context.Background(), calltest.Method, nil, nil)
		synctest.Wait()
		if err := s.Replace(new, new); err == nil || s.String() != "[old]" {
			t.Errorf("a bad Replace returned %v and left %s, want an error and the old layers", err, s)
		}
		if err := s.Replace(new); err != nil {
			t.Fatal(err)
		}
		start := time.Now()
		if err := c.Invoke(context.Background(), calltest.Method, nil, nil); err != nil || time.Since(start) != time.Second {
			t.Errorf("a call of the new layers: %v after %v, want success after 1s", err, time.Since(start))
		}
		if err := errors.Join(s.Drain(context.Background()), old.atRest(), new.atRest()); err != nil {
			t.Error(err)
		}
	})
}

func TestARefusalIsFoundByErrorsAsAndCarriesItsDetails(t *testing.T) {
	r := interceptor.Refuse("rate", interceptor.ReasonRateLimit, "over 5/s").After(200 * time.Millisecond)
	err := fmt.Errorf("outer: %w", r)
	var got *interceptor.Refusal
	if !errors.As(err, &got) || !got.NotSent() || got.Layer != "rate" {
		t.Fatalf("errors.As found %+v", got)
	}
	st := status.Convert(error(r))
	if st.Code() != codes.ResourceExhausted {
		t.Errorf("code %v, want RESOURCE_EXHAUSTED", st.Code())
	}
	var info *errdetails.ErrorInfo
	var retry *errdetails.RetryInfo
	for _, d := range st.Details() {
		switch d := d.(type) {
		case *errdetails.ErrorInfo:
			info = d
		case *errdetails.RetryInfo:
			retry = d
		}
	}
	if info.GetDomain() != "belfry" || info.GetReason() != "RATE_LIMIT" || info.GetMetadata()["layer"] != "rate" {
		t.Errorf("ErrorInfo %v", info)
	}
	if retry.GetRetryDelay().AsDuration() != 200*time.Millisecond {
		t.Errorf("RetryInfo %v, want 200ms", retry)
	}
	server := status.Error(codes.Aborted, "the server's")
	spent := interceptor.Refuse("retry", interceptor.ReasonBudget, "").Because(server, true)
	if st := status.Convert(error(spent)); st.Code() != codes.Aborted || st.Message() != "the server's" || spent.NotSent() || !errors.Is(spent, server) {
		t.Errorf("an exhausted budget is %v, want the server's error", st)
	}
}

func TestMapErrorSeesCallsAndStreams(t *testing.T) {
	mapped := errors.New("mapped")
	l := interceptor.MapError(func(context.Context, string, error) error { return mapped })
	c := answers(status.Error(codes.NotFound, ""))
	c.stream = func(ctx context.Context, _ *grpc.StreamDesc, _ string, _ ...grpc.CallOption) (grpc.ClientStream, error) {
		return &scriptStream{ctx: ctx, errs: []error{nil, status.Error(codes.NotFound, "")}}, nil
	}
	log := &eventLog{}
	s := calltest.Stack(t, l, &logToy{name: "inside", log: log}).Wrap(c)
	if err := s.Invoke(context.Background(), calltest.Method, nil, nil); err != mapped {
		t.Errorf("unary: %v, want the mapped error", err)
	}
	st, err := s.NewStream(context.Background(), &grpc.StreamDesc{ServerStreams: true}, calltest.Method)
	if err != nil {
		t.Fatal(err)
	}
	if err := st.RecvMsg(nil); err != nil {
		t.Errorf("a message: %v", err)
	}
	if err := st.RecvMsg(nil); err != mapped {
		t.Errorf("stream: %v, want the mapped error", err)
	}
	want := []string{"inside 0 failed NotFound", "inside 0 failed NotFound"}
	if got := log.take(); !slices.Equal(got, want) {
		t.Errorf("released %q, want the server's error inside: %q", got, want)
	}
}

func TestMapResponseAndMapRequestSeeEachMessageOfTheirType(t *testing.T) {
	var sent []any
	c := &conn{
		invoke: func(_ context.Context, _ string, req, reply any, _ ...grpc.CallOption) error {
			sent = append(sent, req)
			reply.(*wrapperspb.StringValue).Value = "world"
			return nil
		},
		stream: func(ctx context.Context, _ *grpc.StreamDesc, _ string, _ ...grpc.CallOption) (grpc.ClientStream, error) {
			return &sendStream{scriptStream: scriptStream{ctx: ctx, errs: []error{nil, io.EOF}}, sent: &sent}, nil
		},
	}
	request := interceptor.MapRequest(func(_ context.Context, _ string, m *wrapperspb.StringValue) (*wrapperspb.StringValue, error) {
		return wrapperspb.String(m.Value + "!"), nil
	})
	response := interceptor.MapResponse(func(_ context.Context, _ string, m *wrapperspb.StringValue) error {
		m.Value += "?"
		return nil
	})
	s := calltest.Stack(t, request, response).Wrap(c)
	reply := new(wrapperspb.StringValue)
	if err := s.Invoke(context.Background(), calltest.Method, wrapperspb.String("hello"), reply); err != nil || reply.Value != "world?" {
		t.Errorf("got %v, %q; want %q", err, reply.Value, "world?")
	}
	st, err := s.NewStream(context.Background(), &grpc.StreamDesc{ServerStreams: true, ClientStreams: true}, calltest.Method)
	if err != nil {
		t.Fatal(err)
	}
	other := wrapperspb.Int32(1)
	if err := errors.Join(st.SendMsg(wrapperspb.String("a")), st.SendMsg(other)); err != nil {
		t.Fatal(err)
	}
	reply.Value = "x"
	if err := st.RecvMsg(reply); err != nil || reply.Value != "x?" {
		t.Errorf("received %v, %q; want %q", err, reply.Value, "x?")
	}
	if err := st.RecvMsg(reply); err != io.EOF {
		t.Errorf("the end: %v, want EOF", err)
	}
	if len(sent) != 3 || sent[0].(*wrapperspb.StringValue).Value != "hello!" || sent[1].(*wrapperspb.StringValue).Value != "a!" || sent[2] != any(other) {
		t.Errorf("sent %v, want hello!, a! and the other message as it was", sent)
	}
}

func TestAStreamWhoseMessageCannotBeMappedIsCancelled(t *testing.T) {
	boom := errors.New("boom")
	m := wrapperspb.String("x")
	for _, tc := range []struct {
		layer interceptor.Layer
		do    func(st grpc.ClientStream) error
	}{
		{
			interceptor.MapRequest(func(context.Context, string, *wrapperspb.StringValue) (*wrapperspb.StringValue, error) {
				return nil, boom
			}),
			func(st grpc.ClientStream) error { return st.SendMsg(m) },
		},
		{
			interceptor.MapResponse(func(context.Context, string, *wrapperspb.StringValue) error { return boom }),
			func(st grpc.ClientStream) error { return st.RecvMsg(m) },
		},
	} {
		var stream *scriptStream
		c := &conn{stream: func(ctx context.Context, _ *grpc.StreamDesc, _ string, _ ...grpc.CallOption) (grpc.ClientStream, error) {
			stream = &scriptStream{ctx: ctx, errs: []error{nil}}
			return stream, nil
		}}
		log := &eventLog{}
		s := calltest.Stack(t, &logToy{name: "outer", log: log}, tc.layer, &logToy{name: "inner", log: log})
		st, err := s.Wrap(c).NewStream(context.Background(), &grpc.StreamDesc{ServerStreams: true, ClientStreams: true}, calltest.Method)
		if err != nil {
			t.Fatal(err)
		}
		if err := tc.do(st); err != boom {
			t.Errorf("%v: got %v, want the function's error", tc.layer, err)
		}
		if got, want := log.take(), []string{"inner 0 ignored Unknown", "outer 0 failed Unknown"}; !slices.Equal(got, want) {
			t.Errorf("%v: released %q, want %q", tc.layer, got, want)
		}
		if stream.ctx.Err() == nil {
			t.Errorf("%v: nothing is held for the stream any more, but it goes on", tc.layer)
		}
		stream.errs = []error{status.FromContextError(context.Canceled).Err()}
		if err := st.RecvMsg(m); err != boom {
			t.Errorf("%v: RecvMsg afterwards returned %v, want the function's error", tc.layer, err)
		}
	}
}

type sendStream struct {
	scriptStream
	sent *[]any
}

func (s *sendStream) SendMsg(m any) error {
	*s.sent = append(*s.sent, m)
	return nil
}

type permitToy struct{ events []string }

func (p *permitToy) Success() { p.events = append(p.events, "success") }
func (p *permitToy) Drop()    { p.events = append(p.events, "drop") }
func (p *permitToy) Ignore()  { p.events = append(p.events, "ignore") }

type limiterFunc func(ctx context.Context) error

func (f limiterFunc) Limit(ctx context.Context) error { return f(ctx) }

func TestLimitersOfOthersBecomeLayers(t *testing.T) {
	ctx := context.Background()
	boom := errors.New("boom")
	p := &permitToy{}
	layers := func(l interceptor.Layer, err error) interceptor.Layer {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return l
	}
	var refuse error
	permits := layers(interceptor.FromPermit("adaptive", interceptor.ReasonConcurrency, func(context.Context, bool) (interceptor.Permit, error) { return p, refuse }))
	var done []interceptor.Outcome
	allow := layers(interceptor.FromAllow("breaker", interceptor.ReasonBreakerOpen, func(context.Context) (func(interceptor.Outcome, error), error) {
		return func(o interceptor.Outcome, _ error) { done = append(done, o) }, nil
	}))
	var limited error
	limiter := layers(interceptor.FromLimiter("ggm", limiterFunc(func(context.Context) error { return limited })))
	failed := status.Error(codes.Internal, "")
	c := calltest.Stack(t, permits, allow, limiter).Wrap(answers(nil, failed))
	c.Invoke(ctx, calltest.Method, nil, nil)
	c.Invoke(ctx, calltest.Method, nil, nil)
	limited = boom
	if err := c.Invoke(ctx, calltest.Method, nil, nil); calltest.Reason(err) != interceptor.ReasonRateLimit || !errors.Is(err, boom) || status.Code(err) != codes.ResourceExhausted {
		t.Errorf("the limiter refused with %v, want RESOURCE_EXHAUSTED around its error", err)
	}
	refuse = boom
	if err := c.Invoke(ctx, calltest.Method, nil, nil); calltest.Reason(err) != interceptor.ReasonConcurrency || !errors.Is(err, boom) {
		t.Errorf("the permit was refused with %v, want CONCURRENCY around its error", err)
	}
	if want := []string{"success", "drop", "ignore"}; !slices.Equal(p.events, want) {
		t.Errorf("the permits saw %q, want %q", p.events, want)
	}
	if want := []interceptor.Outcome{interceptor.OK, interceptor.Failed, interceptor.NotSent}; !slices.Equal(done, want) {
		t.Errorf("done saw %v, want %v", done, want)
	}
	for name, err := range map[string]error{
		"FromSemaphore": errOf(interceptor.FromSemaphore("x", nil)), "FromPermit": errOf(interceptor.FromPermit("x", "", nil)),
		"FromAllow": errOf(interceptor.FromAllow("x", "", nil)), "FromLimiter": errOf(interceptor.FromLimiter("x", nil)),
		"Foreign": errOf(interceptor.Foreign("x", nil, nil)),
	} {
		if err == nil || !strings.Contains(err.Error(), name) {
			t.Errorf("%s of nil returned %v, want an error that names it", name, err)
		}
	}
}

// slowLimiters are layers of limiters of others that each wait for d, as long as
// their context lives.
func slowLimiters(t *testing.T, d time.Duration) []interceptor.Layer {
	t.Helper()
	wait := func(ctx context.Context) error {
		select {
		case <-time.After(d):
			return nil
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	permits, err1 := interceptor.FromPermit("permits", interceptor.ReasonConcurrency, func(ctx context.Context, _ bool) (interceptor.Permit, error) {
		return &permitToy{}, wait(ctx)
	})
	limiter, err2 := interceptor.FromLimiter("limiter", limiterFunc(wait))
	if err := errors.Join(err1, err2); err != nil {
		t.Fatal(err)
	}
	return []interceptor.Layer{permits, limiter}
}

func TestTheTimeThatALimiterOfOthersTakesIsWaiting(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		for _, l := range slowLimiters(t, time.Second) {
			obs := &recorder{}
			// The fail-fast reads the clock before the wait, the timeout after it.
			s := calltest.Stack(t, interceptor.Observe(obs), &failFastToy{d: time.Hour}, l, &timeoutToy{d: 1500 * time.Millisecond})
			if err := s.Wrap(calltest.Takes(time.Second)).Invoke(context.Background(), "/m", nil, nil); err != nil {
				t.Errorf("a call of 1s inside %v and a timeout of 1.5s: %v", l, err)
			}
			if got, want := obs.log.take(), fmt.Sprintf("waited /m %v 1s", l); !slices.Contains(got, want) {
				t.Errorf("observed %q, want %q among it", got, want)
			}
		}
	})
}

func TestADeadlineCoversTheWaitInALimiterOfOthers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		for _, l := range slowLimiters(t, time.Hour) {
			start := time.Now()
			err := calltest.Stack(t, &timeoutToy{d: time.Second}, l).Wrap(answers()).Invoke(context.Background(), calltest.Method, nil, nil)
			if calltest.Reason(err) != interceptor.ReasonDeadline || time.Since(start) != time.Second {
				t.Errorf("%v: %v after %v, want the timeout's refusal after 1s", l, err, time.Since(start))
			}
		}
	})
}

func errOf(_ interceptor.Layer, err error) error { return err }

type recorder struct {
	interceptor.NopObserver
	log eventLog
}

func (r *recorder) Admitted(m string, k interceptor.Kind, n int) {
	r.log.add("admitted %s %s %d", m, k, n)
}
func (r *recorder) Refused(m, l string, re interceptor.Reason) {
	r.log.add("refused %s %s %s", m, l, re)
}
func (r *recorder) Attempt(m string, n int)             { r.log.add("attempt %s %d", m, n) }
func (r *recorder) InFlight(d int)                      { r.log.add("inflight %+d", d) }
func (r *recorder) Waited(m, l string, d time.Duration) { r.log.add("waited %s %s %v", m, l, d) }
func (r *recorder) Ended(m string, k interceptor.Kind, o interceptor.Outcome, err error) {
	r.log.add("ended %s %s %s %s", m, k, o, status.Code(err))
}

func TestTheObserverSeesAdmissionAttemptsRefusalsAndEnds(t *testing.T) {
	obs := &recorder{}
	tokens := newTokens(2)
	s := calltest.Stack(t, interceptor.Observe(obs), &retryToy{n: 3}, tokens)
	unavailable := status.Error(codes.Unavailable, "")
	s.Wrap(answers(unavailable, unavailable)).Invoke(context.Background(), "/m", nil, new(wrapperspb.StringValue))
	want := []string{"inflight +1", "admitted /m unary 0", "attempt /m 0", "admitted /m unary 1", "attempt /m 1",
		"refused /m tokens RATE_LIMIT", "ended /m unary failed Unavailable", "inflight -1"}
	if got := obs.log.take(); !slices.Equal(got, want) {
		t.Errorf("observed %q, want %q", got, want)
	}
	s.Wrap(answers()).Invoke(context.Background(), "/m", nil, nil)
	want = []string{"inflight +1", "refused /m tokens RATE_LIMIT", "inflight -1"}
	if got := obs.log.take(); !slices.Equal(got, want) {
		t.Errorf("observed %q, want %q", got, want)
	}
}

func TestWaitsCompareNarrowAndWiden(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		soon, later := interceptor.For(time.Second), interceptor.For(time.Minute)
		if soon != interceptor.Until(time.Now().Add(time.Second)) {
			t.Error("Until and For of the same moment differ")
		}
		wall := time.Now().Add(time.Second).Round(0) // As if it had been parsed.
		if soon != interceptor.Until(wall) {
			t.Error("Until of a wall clock time differs")
		}
		for _, tc := range []struct{ a, b, narrow, widen interceptor.Wait }{
			{interceptor.None, soon, interceptor.None, soon},
			{soon, later, soon, later},
			{later, interceptor.Forever, later, interceptor.Forever},
		} {
			if n, w := tc.a.Narrow(tc.b), tc.b.Widen(tc.a); n != tc.narrow || w != tc.widen {
				t.Errorf("%v and %v: narrowed %v, widened %v; want %v, %v", tc.a, tc.b, n, w, tc.narrow, tc.widen)
			}
		}
		if got := soon.Remaining(); got != time.Second {
			t.Errorf("Remaining() = %v, want 1s", got)
		}
		ctx, cancel := context.WithTimeout(context.Background(), time.Second)
		defer cancel()
		if got := interceptor.Forever.Within(ctx); got != soon {
			t.Errorf("Forever within a second = %v, want %v", got, soon)
		}
		if got := interceptor.Until(time.Now().Add(-time.Hour)).Remaining(); got != 0 {
			t.Errorf("a moment that has passed leaves %v, want 0", got)
		}
		start := time.Now()
		if err := later.Sleep(ctx, interceptor.Now().Add(2*time.Second)); err != context.DeadlineExceeded || time.Since(start) != 0 {
			t.Errorf("Sleep past the context's deadline: %v after %v, want the deadline at once", err, time.Since(start))
		}
		if err := soon.Sleep(context.Background(), interceptor.Now().Add(2*time.Second)); err != interceptor.ErrWaitOver || time.Since(start) != 0 {
			t.Errorf("Sleep past the Wait: %v after %v, want ErrWaitOver at once", err, time.Since(start))
		}
		if err := later.Sleep(context.Background(), interceptor.Now().Add(2*time.Second)); err != nil || time.Since(start) != 2*time.Second {
			t.Errorf("Sleep: %v after %v, want nil after 2s", err, time.Since(start))
		}
	})
}

func TestAStackOfEverythingIsAtRestAfterEveryEndOfEveryKindOfCall(t *testing.T) {
	layertest.RunStack(t, func() ([]interceptor.Layer, func() error) {
		outer, middle, inner := newLimit("outer", 2000), newLimit("middle", 2000), newLimit("inner", 50)
		f, err := interceptor.Foreign("foreign",
			func(ctx context.Context, m string, req, reply any, cc *grpc.ClientConn, invoker grpc.UnaryInvoker, opts ...grpc.CallOption) error {
				return invoker(ctx, m, req, reply, cc, opts...)
			},
			func(ctx context.Context, desc *grpc.StreamDesc, cc *grpc.ClientConn, m string, streamer grpc.Streamer, opts ...grpc.CallOption) (grpc.ClientStream, error) {
				return streamer(ctx, desc, cc, m, opts...)
			})
		if err != nil {
			t.Fatal(err)
		}
		buffer := newBuffer(2000)
		layers := []interceptor.Layer{
			interceptor.Observe(&recorder{}), outer, &shedToy{}, &timeoutToy{d: 10 * time.Second}, f, middle,
			&retryToy{n: 3}, interceptor.MapError(func(_ context.Context, _ string, err error) error { return err }),
			interceptor.Only(everything, &passToy{}), buffer, inner,
		}
		return layers, func() error {
			if n := buffer.used.Load(); n != 0 {
				return fmt.Errorf("%d places of the buffer taken", n)
			}
			return errors.Join(outer.atRest(), middle.atRest(), inner.atRest())
		}
	})
}

// cutToy cuts each stream short as soon as it is open, as a timeout does, but leaves
// it to gRPC to tell the others.
type cutToy struct{ interceptor.CallOnly }

func (*cutToy) WrapCall(next interceptor.Next, _ interceptor.Gate) interceptor.Next {
	return func(ctx context.Context, c *interceptor.Call) error {
		ctx, cancel := context.WithCancelCause(ctx)
		err := next(ctx, c)
		cancel(&interceptor.Refusal{Layer: "cut", Reason: interceptor.ReasonDeadline, Sent: true})
		return err
	}
}

type endsWith struct {
	grpc.ClientStream
	ctx context.Context
}

func (s *endsWith) RecvMsg(any) error {
	<-s.ctx.Done()
	return status.FromContextError(s.ctx.Err()).Err()
}

// Whoever hears of it first, the layers inside are told what the layer says and not
// that somebody has cancelled: a breaker has to count it.
func TestAStreamThatALayerCutsShortEndsInsideForThatLayersReason(t *testing.T) {
	log := new(eventLog)
	s := calltest.Stack(t, &cutToy{}, &logToy{name: "inside", log: log})
	cs, err := s.Wrap(&conn{stream: func(ctx context.Context, _ *grpc.StreamDesc, _ string, _ ...grpc.CallOption) (grpc.ClientStream, error) {
		return &endsWith{ctx: ctx}, nil
	}}).NewStream(context.Background(), &grpc.StreamDesc{ServerStreams: true}, "/s/m")
	if err != nil {
		t.Fatal(err)
	}
	if err := cs.RecvMsg(nil); status.Code(err) != codes.Canceled {
		t.Errorf("RecvMsg: %v, want what the stream says", err)
	}
	if err := s.Drain(context.Background()); err != nil {
		t.Fatal(err)
	}
	if got, want := log.take(), []string{"inside 0 failed DeadlineExceeded"}; !slices.Equal(got, want) {
		t.Errorf("released as %q, want %q", got, want)
	}
}

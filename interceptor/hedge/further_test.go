// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package hedge_test

import (
	"context"
	"errors"
	"math"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/belfry-go/belfry/interceptor"
	"github.com/belfry-go/belfry/interceptor/budget"
	"github.com/belfry-go/belfry/interceptor/buffer"
	"github.com/belfry-go/belfry/interceptor/concurrency"
	"github.com/belfry-go/belfry/interceptor/hedge"
	"github.com/belfry-go/belfry/interceptor/loadshed"
	"github.com/belfry-go/belfry/interceptor/timeout"
	"github.com/belfry-go/belfry/internal/test/calltest"
)

// wantRefusedAgain checks that err is the server's, with its status, and says who
// refused the further attempt.
func wantRefusedAgain(t *testing.T, err error, layer string, reason interceptor.Reason) {
	t.Helper()
	if status.Code(err) != codes.Unavailable || status.Convert(err).Message() != status.Convert(unavailable).Message() {
		t.Errorf("the status of %v is not the server's, %v", err, unavailable)
	}
	if r, ok := interceptor.AsRefusal(err); !ok || r.Layer != layer || r.Reason != reason || !r.Further || r.NotSent() {
		t.Errorf("got %v, want that %s refused the further attempt: %s", err, layer, reason)
	}
}

func wantBalance(t *testing.T, l *hedge.Layer, want float64) {
	t.Helper()
	if got := l.Budget().Balance(); math.Abs(got-want) > 1e-9 {
		t.Errorf("balance = %v, want %v", got, want)
	}
}

func (e *events) without(prefix string) []string {
	e.mu.Lock()
	defer e.mu.Unlock()
	return slices.DeleteFunc(slices.Clone(e.log), func(s string) bool { return strings.HasPrefix(s, prefix) })
}

// work takes d, or until ctx ends.
func work(ctx context.Context, d time.Duration) error {
	select {
	case <-time.After(d):
		return nil
	case <-ctx.Done():
		return status.FromContextError(ctx.Err()).Err()
	}
}

func TestAdmission(t *testing.T) {
	one := concurrency.Config{Limit: 1}
	t.Run("takes_nothing_before_it_fires_and_leaves_the_queue_when_the_first_answers", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			limit, err := concurrency.New(one)
			if err != nil {
				t.Fatal(err)
			}
			e, l := &events{}, mustNew(t, fixed)
			time.AfterFunc(5*ms, func() {
				if in, waiting := limit.InUse(), limit.Waiting(); in != 1 || waiting != 0 {
					t.Errorf("%d permits and %d waiting before the delay is over, want 1 and none", in, waiting)
				}
			})
			time.AfterFunc(20*ms, func() {
				if in, waiting := limit.InUse(), limit.Waiting(); in != 1 || waiting != 1 {
					t.Errorf("%d permits and %d waiting after the delay, want 1 and 1", in, waiting)
				}
			})
			s := newServer(t, answer{after: 50 * ms, reply: "orig"})
			if got, took, err := s.call(nil, interceptor.Observe(e), l, limit); got != "orig" || err != nil || took != 50*ms {
				t.Errorf("got %q, %v after %v; want the original's answer after 50ms", got, err, took)
			}
			if want := []string{"attempt 0"}; !slices.Equal(e.without("budget"), want) {
				t.Errorf("the observer saw %q, want %q: nobody was refused", e.log, want)
			}
			wantBalance(t, l, 1000.0475)
		})
	})
	t.Run("waits_ahead_of_first_attempts", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			type key struct{}
			var mu sync.Mutex
			var sent []string
			first := true
			c := calltest.Stack(t, mustNew(t, fixed), concurrency.Config{Limit: 2}).Wrap(calltest.Server(func(ctx context.Context) error {
				name := ctx.Value(key{}).(string)
				mu.Lock()
				sent = append(sent, name)
				d := 9 * ms
				switch {
				case name == "slow" && first:
					d, first = time.Hour, false
				case name == "other":
					d = 30 * ms
				}
				mu.Unlock()
				select {
				case <-time.After(d):
					return nil
				case <-ctx.Done():
					return status.FromContextError(ctx.Err()).Err()
				}
			}))
			var wg sync.WaitGroup
			for _, name := range []string{"slow", "other", "one", "two"} {
				wg.Go(func() {
					ctx := context.WithValue(context.Background(), key{}, name)
					if err := c.Invoke(ctx, method, nil, &struct{}{}); err != nil {
						t.Errorf("%s: %v", name, err)
					}
				})
				time.Sleep(ms)
			}
			wg.Wait()
			// The extra attempts of "slow" and "other" wait from 10 and 11 ms on. At 31 ms
			// "other" answers, and its permit goes to that of "slow".
			if want := []string{"slow", "other", "slow"}; len(sent) != 5 || !slices.Equal(sent[:3], want) {
				t.Errorf("sent %v, want %v and then the two that wait", sent, want)
			}
		})
	})
	t.Run("a_refused_one_has_no_number_and_is_made_later", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			limit, err := concurrency.New(one)
			if err != nil {
				t.Fatal(err)
			}
			time.AfterFunc(25*ms, func() {
				if err := limit.Update(concurrency.Config{Limit: 2}); err != nil {
					t.Error(err)
				}
			})
			e, l := &events{}, mustNew(t, fixed)
			s := newServer(t, answer{after: time.Second}, answer{after: 5 * ms, reply: "hedge"})
			got, took, err := s.call(nil, interceptor.Observe(e), loadshed.Config{}, l, limit)
			if got != "hedge" || err != nil || took != 35*ms {
				t.Errorf("got %q, %v after %v; want the answer of the attempt at 30ms, after 35ms", got, err, took)
			}
			want := []string{"attempt 0", "refused concurrency CONCURRENCY", "refused concurrency CONCURRENCY", "fired hedge", "attempt 1", "won hedge"}
			if log := e.without("budget"); !slices.Equal(log, want) {
				t.Errorf("the observer saw %q, want %q", log, want)
			}
			md, _ := metadata.FromOutgoingContext(s.ctxs[1])
			if got := md.Get("grpc-previous-rpc-attempts"); !slices.Equal(got, []string{"1"}) {
				t.Errorf("the attempt carries grpc-previous-rpc-attempts %q, want 1", got)
			}
			wantBalance(t, l, 1000.0475-1)
		})
	})
	t.Run("no_call_is_refused_for_its_sake", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			// The first call holds the permit, and its extra attempt waits in the only slot.
			unary := calltest.Stack(t, loadshed.Config{}, mustNew(t, fixed), buffer.Config{Size: 1}, one).UnaryClientInterceptor()
			call := func() error {
				return unary(t.Context(), method, nil, nil, nil, func(ctx context.Context, _ string, _, _ any, _ *grpc.ClientConn, _ ...grpc.CallOption) error {
					return work(ctx, 50*ms)
				})
			}
			first := make(chan error)
			go func() { first <- call() }()
			time.Sleep(20 * ms)
			if err := call(); err != nil {
				t.Errorf("a call that came while the extra attempt of another one waited: %v", err)
			}
			if err := <-first; err != nil {
				t.Errorf("the other one: %v", err)
			}
		})
	})
	t.Run("one_that_leaves_the_queue_was_not_refused", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			// The extra attempts of two calls wait. The second call answers first, and its
			// permit goes to the extra attempt of the first one.
			e := &events{}
			unary := calltest.Stack(t, interceptor.Observe(e), mustNew(t, fixed), concurrency.Config{Limit: 2}).UnaryClientInterceptor()
			var wg sync.WaitGroup
			for _, took := range []time.Duration{100 * ms, 20 * ms} {
				wg.Go(func() {
					if err := unary(t.Context(), method, nil, nil, nil, func(ctx context.Context, _ string, _, _ any, _ *grpc.ClientConn, _ ...grpc.CallOption) error {
						return work(ctx, took)
					}); err != nil {
						t.Error(err)
					}
				})
				time.Sleep(ms)
			}
			wg.Wait()
			for _, log := range e.without("budget") {
				if strings.HasPrefix(log, "refused") {
					t.Errorf("the observer saw %q, want no refusal", log)
				}
			}
		})
	})
	t.Run("a_refused_one_does_not_explain_a_later_failure", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			s := newServer(t, answer{after: 50 * ms, err: fatal})
			if _, _, err := s.call(nil, loadshed.Config{}, mustNew(t, fixed), one); !errors.Is(err, fatal) {
				t.Errorf("got %v, want the server's error as it is", err)
			}
		})
	})
	t.Run("a_spent_budget_leaves_the_servers_error", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			e := &events{}
			l := mustNew(t, hedge.Config{Delay: 10 * ms, Budget: budget.Config{MinPerSecond: budget.None}})
			_, _, err := newServer(t, answer{after: ms, err: unavailable}).call(nil, interceptor.Observe(e), l)
			wantRefusedAgain(t, err, "hedge", interceptor.ReasonBudget)
			if want := []string{"attempt 0", "refused hedge BUDGET"}; !slices.Equal(e.without("budget"), want) {
				t.Errorf("the observer saw %q, want %q", e.log, want)
			}
		})
	})
}

// A refusal of the first attempt, which some layer inside gives it late, says less
// than the error of a server that the extra attempt met.
func TestRefusalDoesNotReplaceServersError(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var calls atomic.Int32
		late := interceptor.Foreign("late", func(ctx context.Context, m string, req, reply any, cc *grpc.ClientConn, invoker grpc.UnaryInvoker, opts ...grpc.CallOption) error {
			if calls.Add(1) > 1 {
				return invoker(ctx, m, req, reply, cc, opts...)
			}
			time.Sleep(20 * ms)
			return interceptor.Refuse("late", interceptor.ReasonShed, "")
		}, nil)
		if _, _, err := newServer(t, answer{after: ms, err: unavailable}).call(nil, mustNew(t, fixed), late); !errors.Is(err, unavailable) {
			t.Errorf("got %v, want the server's error", err)
		}
	})
}

func TestEnd(t *testing.T) {
	t.Run("drain_ends_the_wait_for_a_pushback", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			s := newServer(t, answer{err: unavailable, trailer: metadata.Pairs("grpc-retry-pushback-ms", "5000")})
			stack := calltest.Stack(t, mustNew(t, fixed))
			done := make(chan error)
			go func() {
				done <- stack.Wrap(s).Invoke(t.Context(), method, wrapperspb.String("hello"), new(wrapperspb.StringValue))
			}()
			time.Sleep(time.Second)
			go stack.Drain(t.Context())
			start := time.Now()
			wantRefusedAgain(t, <-done, "stack", interceptor.ReasonDrain)
			if took := time.Since(start); took != 0 || s.n != 1 {
				t.Errorf("the call ended %v later after %d attempts, want at once and one", took, s.n)
			}
		})
	})
	t.Run("a_stack_that_drains_makes_no_extra_attempt", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			s := newServer(t, answer{after: time.Second, reply: "orig"})
			stack := calltest.Stack(t, mustNew(t, fixed))
			time.AfterFunc(5*ms, func() { stack.Drain(t.Context()) })
			if err := stack.Wrap(s).Invoke(t.Context(), method, wrapperspb.String("hello"), new(wrapperspb.StringValue)); err != nil {
				t.Errorf("got %v, want what is on the wire to go on", err)
			}
			s.want("0s 0 sent", "1s 0 answered")
		})
	})
}

// lateGate admits extra attempts only after their context has ended.
type lateGate struct{ interceptor.GateOnly }

func (lateGate) NewLayer() (interceptor.Layer, error) { return lateGate{}, nil }

func (lateGate) WrapGate(inner interceptor.Gate) interceptor.Gate {
	return interceptor.GateFunc(func(ctx context.Context, a *interceptor.Admission, w interceptor.Wait) error {
		if a.Attempt() > 0 {
			<-ctx.Done()
			time.Sleep(ms)
		}
		return inner.Admit(ctx, a, w)
	})
}

// A permit may come just when the deadline of the call has ended the race.
func TestExtraAttemptAdmittedAfterTheEnd(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newServer(t, answer{after: time.Hour})
		_, took, err := s.call(nil, timeout.Config{Timeout: 100 * ms}, mustNew(t, fixed), lateGate{})
		if status.Code(err) != codes.DeadlineExceeded || took != 101*ms || s.n != 1 {
			t.Errorf("got %v after %v and %d attempts, want DEADLINE_EXCEEDED of the first", err, took, s.n)
		}
	})
}

func TestMaxServerDelay(t *testing.T) {
	for _, tc := range []struct {
		bound, delay time.Duration
		want         int
	}{
		{0, 10 * time.Second, 2}, {0, 11 * time.Second, 1}, {0, time.Hour, 1},
		{time.Minute, time.Minute, 2}, {time.Second, 2 * time.Second, 1},
	} {
		synctest.Test(t, func(t *testing.T) {
			c := fixed
			c.MaxServerDelay = tc.bound
			s := newServer(t, answer{err: retryInfo(t, tc.delay)})
			_, took, err := s.call(nil, mustNew(t, c))
			if status.Code(err) != codes.Unavailable || s.n != tc.want || took != time.Duration(tc.want-1)*tc.delay {
				t.Errorf("%v of at most %v: %v after %d attempts and %v, want %d", tc.delay, tc.bound, err, s.n, took, tc.want)
			}
		})
	}
}

// A failure that is not one of NonFatal keeps an attempt from being made that waits
// for a server's delay, and says so, not why that one was not made.
func TestServerDelayEndedByFatalFailure(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := fixed
		c.MaxAttempts = 3
		s := newServer(t, answer{after: 20 * ms, err: fatal}, answer{after: ms, err: unavailable, trailer: metadata.Pairs("grpc-retry-pushback-ms", "5000")})
		if _, took, err := s.call(nil, mustNew(t, c)); !errors.Is(err, fatal) || took != 20*ms || s.n != 2 {
			t.Errorf("got %v after %v and %d attempts, want the last failure after 20ms and 2", err, took, s.n)
		}
	})
}

// On a connection the first attempt has a goroutine of its own. There is no other one
// while no extra attempt is made, also where a layer inside adds a value to the context
// that gRPC derives its own from.
func TestGoroutinesWithoutExtraAttempt(t *testing.T) {
	l := mustNew(t, hedge.Config{Delay: time.Hour})
	type key struct{}
	valued := interceptor.Foreign("valued", func(ctx context.Context, m string, req, reply any, cc *grpc.ClientConn, invoker grpc.UnaryInvoker, opts ...grpc.CallOption) error {
		return invoker(context.WithValue(ctx, key{}, "value"), m, req, reply, cc, opts...)
	}, nil)
	const calls = 50
	var wg sync.WaitGroup
	arrived, end := make(chan struct{}), make(chan struct{})
	c := calltest.Stack(t, l, valued).Wrap(calltest.Server(func(ctx context.Context) error {
		ctx, cancel := context.WithCancel(ctx)
		defer cancel()
		arrived <- struct{}{}
		select {
		case <-end:
		case <-ctx.Done():
		}
		return ctx.Err()
	}))
	before := runtime.NumGoroutine()
	for range calls {
		wg.Go(func() {
			if err := c.Invoke(context.Background(), method, nil, nil); err != nil {
				t.Error(err)
			}
		})
	}
	for range calls {
		<-arrived
	}
	// A few goroutines of tests before this one may have come and gone.
	if got := runtime.NumGoroutine() - before; got > 2*calls+calls/2 {
		t.Errorf("%d calls run in %d goroutines, want two each", calls, got)
	}
	close(end)
	wg.Wait()
}

// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package adapt_test

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/sync/semaphore"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/belfry-go/belfry/interceptor"
	"github.com/belfry-go/belfry/interceptor/adapt"
	"github.com/belfry-go/belfry/interceptor/failfast"
	"github.com/belfry-go/belfry/interceptor/timeout"
	"github.com/belfry-go/belfry/internal/test/calltest"
)

type permitToy struct{ events []string }

func (p *permitToy) Success() { p.events = append(p.events, "success") }

func (p *permitToy) Drop() { p.events = append(p.events, "drop") }

func (p *permitToy) Ignore() { p.events = append(p.events, "ignore") }

type limiterFunc func(ctx context.Context) error

func (f limiterFunc) Limit(ctx context.Context) error { return f(ctx) }

// conn answers a unary call as it returns.
type conn func() error

func (c conn) Invoke(context.Context, string, any, any, ...grpc.CallOption) error { return c() }

func (c conn) NewStream(context.Context, *grpc.StreamDesc, string, ...grpc.CallOption) (grpc.ClientStream, error) {
	panic("no streams")
}

// waits records how long gates have waited.
type waits struct {
	interceptor.NopObserver
	got []string
}

func (w *waits) Waited(c interceptor.Observed, layer string, d time.Duration) {
	w.got = append(w.got, fmt.Sprintf("%s %s %v", c.Method, layer, d))
}

func TestAdapt(t *testing.T) {
	t.Run("third_party_limiters", func(t *testing.T) {
		ctx := context.Background()
		boom := errors.New("boom")
		p := &permitToy{}
		var refuse error
		permits := adapt.FromPermit("adaptive", interceptor.ReasonConcurrency, func(context.Context, bool) (adapt.Permit, error) { return p, refuse })
		var done []interceptor.Outcome
		allow := adapt.FromAllow("breaker", interceptor.ReasonBreakerOpen, func(context.Context) (func(interceptor.Outcome, error), error) {
			return func(o interceptor.Outcome, _ error) { done = append(done, o) }, nil
		})
		var limited error
		limiter := adapt.FromLimiter("ggm", limiterFunc(func(context.Context) error { return limited }))
		var answer error
		c := calltest.Stack(t, permits, allow, limiter).Wrap(conn(func() error { return answer }))
		c.Invoke(ctx, calltest.Method, nil, nil)
		answer = status.Error(codes.Internal, "")
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
			"FromSemaphore": errOf(adapt.FromSemaphore("x", nil)), "FromPermit": errOf(adapt.FromPermit("x", "", nil)),
			"FromAllow": errOf(adapt.FromAllow("x", "", nil)), "FromLimiter": errOf(adapt.FromLimiter("x", nil)),
		} {
			if err == nil || !strings.Contains(err.Error(), name) {
				t.Errorf("%s of nil returned %v, want an error that names it", name, err)
			}
		}
	})

	t.Run("their_time_counts_as_waiting", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			for _, l := range slowLimiters(t, time.Second) {
				obs := &waits{}
				// The fail-fast reads the clock before the wait, the timeout after it.
				s := calltest.Stack(t, interceptor.Observe(obs), failfast.Config{After: time.Hour}, l, timeout.Config{Timeout: 1500 * time.Millisecond}, adapt.FromSemaphore("limit", semaphore.NewWeighted(1)))
				if err := s.Wrap(calltest.Takes(time.Second)).Invoke(context.Background(), "/m", nil, nil); err != nil {
					t.Errorf("a call of 1s inside %v and a timeout of 1.5s: %v", l, err)
				}
				if got, want := obs.got, fmt.Sprintf("/m %v 1s", l); !slices.Contains(got, want) {
					t.Errorf("observed %q, want %q among it", got, want)
				}
			}
		})
	})

	t.Run("deadline_bounds_their_wait", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			for _, l := range slowLimiters(t, time.Hour) {
				start := time.Now()
				err := calltest.Stack(t, timeout.Config{Timeout: time.Second}, l).Wrap(calltest.Takes(0)).Invoke(context.Background(), calltest.Method, nil, nil)
				if calltest.Reason(err) != interceptor.ReasonDeadline || time.Since(start) != time.Second {
					t.Errorf("%v: %v after %v, want the timeout's refusal after 1s", l, err, time.Since(start))
				}
			}
		})
	})
}

// badObserver panics when a gate has waited.
type badObserver struct{ interceptor.NopObserver }

func (badObserver) Waited(interceptor.Observed, string, time.Duration) { panic("observer") }

// What a limiter has granted is given back even if the observer panics when it is told of
// the wait.
func TestPanicOfObserver(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p, done := &permitToy{}, 0
		sem := semaphore.NewWeighted(1)
		for _, l := range []interceptor.Spec{
			adapt.FromSemaphore("semaphore", sem),
			adapt.FromPermit("permits", interceptor.ReasonConcurrency, func(context.Context, bool) (adapt.Permit, error) {
				time.Sleep(time.Second)
				return p, nil
			}),
			adapt.FromAllow("allow", interceptor.ReasonBreakerOpen, func(context.Context) (func(interceptor.Outcome, error), error) {
				time.Sleep(time.Second)
				return func(interceptor.Outcome, error) { done++ }, nil
			}),
		} {
			if !sem.TryAcquire(1) {
				t.Fatal("the permit of the semaphore is lost")
			}
			time.AfterFunc(time.Second, func() { sem.Release(1) })
			func() {
				defer func() {
					if recover() == nil {
						t.Errorf("%v: no panic", l)
					}
				}()
				calltest.Stack(t, interceptor.Observe(badObserver{}), l).Wrap(calltest.Takes(0)).Invoke(t.Context(), calltest.Method, nil, nil)
			}()
			time.Sleep(time.Second)
		}
		if !sem.TryAcquire(1) || !slices.Equal(p.events, []string{"ignore"}) || done != 1 {
			t.Errorf("the permit saw %q, done was called %d times; want all to be given back", p.events, done)
		}
	})
}

// slowLimiters are layers of third-party limiters that each wait for d, as long as
// their context lives.
func slowLimiters(t *testing.T, d time.Duration) []interceptor.Spec {
	t.Helper()
	wait := func(ctx context.Context) error {
		select {
		case <-time.After(d):
			return nil
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	permits := adapt.FromPermit("permits", interceptor.ReasonConcurrency, func(ctx context.Context, _ bool) (adapt.Permit, error) {
		return &permitToy{}, wait(ctx)
	})
	limiter := adapt.FromLimiter("limiter", limiterFunc(wait))
	allow := adapt.FromAllow("allow", interceptor.ReasonBreakerOpen, func(ctx context.Context) (func(interceptor.Outcome, error), error) {
		return nil, wait(ctx)
	})
	return []interceptor.Spec{permits, limiter, allow}
}

func errOf(s interceptor.Spec) error {
	_, err := interceptor.NewStack(s)
	return err
}

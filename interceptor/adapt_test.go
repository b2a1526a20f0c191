// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package interceptor_test

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
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/belfry-go/belfry/interceptor"
	"github.com/belfry-go/belfry/internal/test/calltest"
)

type permitToy struct{ events []string }

func (p *permitToy) Success() { p.events = append(p.events, "success") }

func (p *permitToy) Drop() { p.events = append(p.events, "drop") }

func (p *permitToy) Ignore() { p.events = append(p.events, "ignore") }

type limiterFunc func(ctx context.Context) error

func (f limiterFunc) Limit(ctx context.Context) error { return f(ctx) }

func TestAdapt(t *testing.T) {
	t.Run("third_party_limiters", func(t *testing.T) {
		ctx := context.Background()
		boom := errors.New("boom")
		p := &permitToy{}
		var refuse error
		permits := interceptor.FromPermit("adaptive", interceptor.ReasonConcurrency, func(context.Context, bool) (interceptor.Permit, error) { return p, refuse })
		var done []interceptor.Outcome
		allow := interceptor.FromAllow("breaker", interceptor.ReasonBreakerOpen, func(context.Context) (func(interceptor.Outcome, error), error) {
			return func(o interceptor.Outcome, _ error) { done = append(done, o) }, nil
		})
		var limited error
		limiter := interceptor.FromLimiter("ggm", limiterFunc(func(context.Context) error { return limited }))
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
	})

	t.Run("their_time_counts_as_waiting", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			for _, l := range slowLimiters(t, time.Second) {
				obs := &recorder{}
				// The fail-fast reads the clock before the wait, the timeout after it.
				s := calltest.Stack(t, interceptor.Observe(obs), &failFastToy{d: time.Hour}, l, &timeoutToy{d: 1500 * time.Millisecond}, interceptor.FromSemaphore("limit", semaphore.NewWeighted(1)))
				if err := s.Wrap(calltest.Takes(time.Second)).Invoke(context.Background(), "/m", nil, nil); err != nil {
					t.Errorf("a call of 1s inside %v and a timeout of 1.5s: %v", l, err)
				}
				if got, want := obs.log.take(), fmt.Sprintf("waited /m %v 1s", l); !slices.Contains(got, want) {
					t.Errorf("observed %q, want %q among it", got, want)
				}
			}
		})
	})

	t.Run("deadline_bounds_their_wait", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			for _, l := range slowLimiters(t, time.Hour) {
				start := time.Now()
				err := calltest.Stack(t, &timeoutToy{d: time.Second}, l).Wrap(answers()).Invoke(context.Background(), calltest.Method, nil, nil)
				if calltest.Reason(err) != interceptor.ReasonDeadline || time.Since(start) != time.Second {
					t.Errorf("%v: %v after %v, want the timeout's refusal after 1s", l, err, time.Since(start))
				}
				// A call that must not wait for capacity lets them find out, for as long.
				start = time.Now()
				err = calltest.Stack(t, &timeoutToy{d: time.Second}, l).Wrap(answers()).Invoke(context.Background(), calltest.Method, nil, nil, interceptor.WithWait(interceptor.None))
				if calltest.Reason(err) != interceptor.ReasonDeadline || time.Since(start) != time.Second {
					t.Errorf("%v: %v after %v for a call that must not wait, want the timeout's refusal after 1s", l, err, time.Since(start))
				}
			}
		})
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
	permits := interceptor.FromPermit("permits", interceptor.ReasonConcurrency, func(ctx context.Context, _ bool) (interceptor.Permit, error) {
		return &permitToy{}, wait(ctx)
	})
	limiter := interceptor.FromLimiter("limiter", limiterFunc(wait))
	allow := interceptor.FromAllow("allow", interceptor.ReasonBreakerOpen, func(ctx context.Context) (func(interceptor.Outcome, error), error) {
		return nil, wait(ctx)
	})
	return []interceptor.Spec{permits, limiter, allow}
}

func errOf(s interceptor.Spec) error {
	_, err := interceptor.NewStack(s)
	return err
}

// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package hedge_test

import (
	"context"
	"fmt"
	"slices"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc"

	"github.com/belfry-go/belfry/interceptor"
	"github.com/belfry-go/belfry/interceptor/budget"
	"github.com/belfry-go/belfry/interceptor/hedge"
	"github.com/belfry-go/belfry/internal/test/calltest"
)

// reasons notes why further attempts are made.
type reasons struct {
	interceptor.NopObserver
	log []string
}

func (r *reasons) Further(_ interceptor.Observed, layer string, f interceptor.FurtherAttempt) {
	r.log = append(r.log, fmt.Sprintf("%s %d %s %v", layer, f.Attempt, f.Reason, f.After))
}

// traces notes which call extra attempts are made of.
type traces struct {
	interceptor.NopObserver
	log []string
}

type traceKey struct{}

func (r *traces) add(ctx context.Context, what string) {
	r.log = append(r.log, fmt.Sprint(what, " of call ", ctx.Value(traceKey{})))
}

func (r *traces) Further(c interceptor.Observed, _ string, _ interceptor.FurtherAttempt) {
	r.add(c.Context, "further attempt")
}
func (r *traces) HedgeFired(c interceptor.Observed, _ string) { r.add(c.Context, "hedge") }
func (r *traces) HedgeWon(c interceptor.Observed, _ string)   { r.add(c.Context, "win") }

// A tracer finds the call of an extra attempt in the context.
func TestObserverContext(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := new(traces)
		l := mustNew(t, hedge.Config{Delay: 10 * ms})
		unary := calltest.Stack(t, interceptor.Observe(r), l).UnaryClientInterceptor()
		var attempts atomic.Int32
		err := unary(context.WithValue(t.Context(), traceKey{}, 7), method, nil, nil, nil, func(ctx context.Context, _ string, _, _ any, _ *grpc.ClientConn, _ ...grpc.CallOption) error {
			if attempts.Add(1) == 1 {
				return work(ctx, time.Second)
			}
			return nil
		})
		if err != nil {
			t.Error(err)
		}
		if want := []string{"further attempt of call 7", "hedge of call 7", "win of call 7"}; !slices.Equal(r.log, want) {
			t.Errorf("the observer was told of %q, want %q", r.log, want)
		}
	})
}

func TestObserverFurther(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := new(reasons)
		l := mustNew(t, hedge.Config{Delay: 10 * ms, MaxAttempts: 3, Budget: budget.Config{MinPerSecond: 100}})
		newServer(t, answer{after: time.Second}, answer{after: ms, err: unavailable}, answer{}).call(nil, interceptor.Observe(r), l)
		want := []string{"hedge 1 SLOW <nil>", fmt.Sprint("hedge 2 Unavailable ", unavailable)}
		if !slices.Equal(r.log, want) {
			t.Errorf("the observer was told of %q, want %q", r.log, want)
		}
	})
}

// An attempt that follows a reply which the policy did not take is not made because an
// attempt is slow.
func TestObserverFurther_policy(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := new(reasons)
		l := mustNew(t, hedge.Config{Delay: time.Second, MaxAttempts: 2, Budget: budget.Config{MinPerSecond: 100}},
			hedge.WithPolicy(func(_ context.Context, a *hedge.Attempt) hedge.Verdict {
				if a.N == 1 {
					return hedge.Hedge
				}
				return hedge.ByCode
			}))
		newServer(t, answer{after: ms}, answer{}).call(nil, interceptor.Observe(r), l)
		if want := []string{"hedge 1 OK <nil>"}; !slices.Equal(r.log, want) {
			t.Errorf("the observer was told of %q, want %q", r.log, want)
		}
	})
}

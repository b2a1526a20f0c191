// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package hedge_test

import (
	"context"
	"fmt"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"github.com/belfry-go/belfry/interceptor"
	"github.com/belfry-go/belfry/interceptor/budget"
	"github.com/belfry-go/belfry/interceptor/hedge"
)

// reasons notes why further attempts are made.
type reasons struct {
	interceptor.NopObserver
	log []string
}

func (r *reasons) Further(_, layer string, f interceptor.FurtherAttempt) {
	r.log = append(r.log, fmt.Sprintf("%s %d %s %v", layer, f.Attempt, f.Reason, f.After))
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

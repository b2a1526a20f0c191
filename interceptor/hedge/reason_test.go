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
				if a.Number == 0 {
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

// lateGate admits further attempts after the call's end.
type lateGate struct {
	interceptor.GateOnly
	_ byte
}

func (g *lateGate) NewLayer() (interceptor.Layer, error) { return g, nil }

func (*lateGate) WrapGate(inner interceptor.Gate) interceptor.Gate {
	return interceptor.GateFunc(func(ctx context.Context, a *interceptor.Admission, w interceptor.Wait) error {
		if a.Attempt() > 0 {
			time.Sleep(time.Second)
		}
		return inner.Admit(ctx, a, w)
	})
}

// A call ends whose extra attempt is admitted after the call's deadline, even if the cause
// of that is a refusal which says that the call was sent.
func TestAdmittedTooLate(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		overdue := &interceptor.Refusal{Layer: "outside", Reason: interceptor.ReasonDeadline, Sent: true, Err: context.DeadlineExceeded}
		ctx, cancel := context.WithTimeoutCause(t.Context(), 50*ms, overdue)
		defer cancel()
		sent := 0
		err := calltest.Stack(t, mustNew(t, fixed), new(lateGate)).UnaryClientInterceptor()(ctx, method, nil, nil, nil,
			func(ctx context.Context, _ string, _, _ any, _ *grpc.ClientConn, _ ...grpc.CallOption) error {
				sent++
				return work(ctx, time.Hour)
			})
		if err == nil || sent != 1 {
			t.Errorf("%v after %d attempts, want an error after one", err, sent)
		}
	})
}

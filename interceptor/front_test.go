// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package interceptor_test

import (
	"context"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/sync/semaphore"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/belfry-go/belfry/interceptor"
	"github.com/belfry-go/belfry/interceptor/adapt"
	"github.com/belfry-go/belfry/internal/test/calltest"
)

// The end of each stack in front of another one reaches what waits in that.
func TestDrainReachesTheStackBehind(t *testing.T) {
	for _, i := range []int{0, 1} {
		synctest.Test(t, func(t *testing.T) {
			last := calltest.Stack(t, adapt.FromSemaphore("limit", semaphore.NewWeighted(1)))
			fronts := []*interceptor.Stack{calltest.Stack(t), calltest.Stack(t)}
			c := fronts[0].Wrap(fronts[1].Wrap(last.Wrap(calltest.Takes(time.Second))))
			ends := calltest.Begin(c, 2) // One runs, one waits.
			if err := fronts[i].Drain(context.Background()); err != nil {
				t.Error(err)
			}
			calltest.Expect(t, ends(), calltest.OK(time.Second), calltest.Refused(0, interceptor.ReasonDrain))
		})
	}
}

// parkToy lets further attempts wait until something ends their wait.
type parkToy struct{ interceptor.GateOnly }

func (l *parkToy) NewLayer() (interceptor.Layer, error) { return l, nil }

func (l *parkToy) WrapGate(inner interceptor.Gate) interceptor.Gate {
	return interceptor.GateFunc(func(ctx context.Context, a *interceptor.Admission, w interceptor.Wait) error {
		if a.Attempt() == 0 {
			return inner.Admit(ctx, a, w)
		}
		parked, done := a.Park(ctx)
		defer done()
		<-parked.Done()
		return interceptor.Ended(parked, "park")
	})
}

func TestDrainReachesFurtherAttemptsBehind(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		behind := calltest.Stack(t, &retryToy{n: 2}, &parkToy{})
		front := calltest.Stack(t)
		c := front.Wrap(behind.Wrap(answers(status.Error(codes.Unavailable, ""))))
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		done := make(chan error, 1)
		go func() { done <- c.Invoke(ctx, calltest.Method, nil, new(wrapperspb.StringValue)) }()
		synctest.Wait()
		if err := front.Drain(context.Background()); err != nil {
			t.Error(err)
		}
		if err := <-done; calltest.Reason(err) != interceptor.ReasonDrain {
			t.Errorf("got %v, want a further attempt that was refused by the drain", err)
		}
	})
}

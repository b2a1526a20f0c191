// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package interceptor_test

import (
	"context"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/sync/semaphore"

	"github.com/belfry-go/belfry/interceptor"
	"github.com/belfry-go/belfry/internal/test/calltest"
)

// The end of each stack in front of another one reaches what waits in that.
func TestDrainReachesTheStackBehind(t *testing.T) {
	for _, i := range []int{0, 1} {
		synctest.Test(t, func(t *testing.T) {
			last := calltest.Stack(t, interceptor.FromSemaphore("limit", semaphore.NewWeighted(1)))
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

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

	"github.com/belfry-go/belfry/interceptor"
	"github.com/belfry-go/belfry/interceptor/adapt"
	"github.com/belfry-go/belfry/internal/test/calltest"
)

// refused is the end of a call that is refused with a code.
func refused(after time.Duration, r interceptor.Reason, code codes.Code) calltest.End {
	return calltest.End{After: after, Reason: r, Code: code}
}

func TestWait(t *testing.T) {
	t.Run("shed_refuses_where_a_limit_would_wait", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			calltest.Expect(t, calltest.Burst(calltest.Stack(t, newLimit("limit", 1)).Wrap(calltest.Takes(time.Second)), 3),
				calltest.OK(time.Second), calltest.OK(2*time.Second), calltest.OK(3*time.Second))
			calltest.Expect(t, calltest.Burst(calltest.Stack(t, &shedToy{}, newLimit("limit", 1)).Wrap(calltest.Takes(time.Second)), 3),
				calltest.OK(time.Second), refused(0, interceptor.ReasonConcurrency, codes.Unavailable), refused(0, interceptor.ReasonConcurrency, codes.Unavailable))
		})
	})

	t.Run("buffer_inside_a_shed_lets_calls_wait_again", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			s := calltest.Stack(t, &shedToy{}, newBuffer(2), newLimit("limit", 1))
			calltest.Expect(t, calltest.Burst(s.Wrap(calltest.Takes(time.Second)), 4),
				calltest.OK(time.Second), calltest.OK(2*time.Second), calltest.OK(3*time.Second),
				refused(0, interceptor.ReasonQueueFull, codes.Unavailable))
		})
	})

	t.Run("fail_fast_refuses_at_its_bound", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			s := calltest.Stack(t, &failFastToy{d: 300 * time.Millisecond}, newLimit("limit", 1))
			calltest.Expect(t, calltest.Burst(s.Wrap(calltest.Takes(time.Second)), 2),
				calltest.OK(time.Second), refused(300*time.Millisecond, interceptor.ReasonConcurrency, codes.Unavailable))
		})
	})

	t.Run("call_option_only_narrows", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			s := calltest.Stack(t, newLimit("limit", 1))
			c := s.Wrap(calltest.Takes(time.Second))
			calltest.Expect(t, calltest.Burst(c, 2, interceptor.WithWait(interceptor.None)),
				calltest.OK(time.Second), refused(0, interceptor.ReasonConcurrency, codes.Unavailable))
			calltest.Expect(t, calltest.Burst(c, 2, interceptor.WithWait(interceptor.For(500*time.Millisecond)), interceptor.WithWait(interceptor.Forever)),
				calltest.OK(time.Second), refused(500*time.Millisecond, interceptor.ReasonConcurrency, codes.Unavailable))
		})
	})

	t.Run("carried_to_a_second_stack", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			outer := calltest.Stack(t, &shedToy{}, interceptor.CarryWait())
			inner := calltest.Stack(t, newLimit("limit", 1))
			calltest.Expect(t, calltest.Burst(outer.Wrap(inner.Wrap(calltest.Takes(time.Second))), 2),
				calltest.OK(time.Second), refused(0, interceptor.ReasonConcurrency, codes.Unavailable))
		})
	})

	t.Run("deadline_bounds_what_a_buffer_widens", func(t *testing.T) {
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
	})

	t.Run("deadline_inside_a_limit_starts_after_its_wait", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			sem := adapt.FromSemaphore("limit", semaphore.NewWeighted(1))
			s := calltest.Stack(t, &failFastToy{d: time.Hour}, sem, &timeoutToy{d: 1500 * time.Millisecond})
			calltest.Expect(t, calltest.Burst(s.Wrap(calltest.Takes(time.Second)), 2),
				calltest.OK(time.Second), calltest.OK(2*time.Second))
		})
	})

	t.Run("values", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			soon, later := interceptor.For(time.Second), interceptor.For(time.Minute)
			if soon != interceptor.Until(time.Now().Add(time.Second)) {
				t.Error("Until and For of the same moment differ")
			}
			wall := time.Now().Add(time.Second).Round(0) // As if it had been parsed.
			if soon != interceptor.Until(wall) {
				t.Error("Until of a wall clock time differs")
			}
			for _, tc := range []struct{ a, b, narrow interceptor.Wait }{
				{interceptor.None, soon, interceptor.None},
				{soon, later, soon},
				{later, interceptor.Forever, later},
			} {
				if n, m := tc.a.Narrow(tc.b), tc.b.Narrow(tc.a); n != tc.narrow || m != tc.narrow {
					t.Errorf("%v and %v: narrowed %v and %v, want %v", tc.a, tc.b, n, m, tc.narrow)
				}
			}
			if got := soon.Remaining(); got != time.Second {
				t.Errorf("Remaining() = %v, want 1s", got)
			}
			ctx, cancel := context.WithTimeout(context.Background(), time.Second)
			defer cancel()
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
	})
}

// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package interceptor

import (
	"context"
	"errors"
	"math"
	"time"
)

// epoch is the zero of Instants: long enough ago that every Instant is positive, even in
// a testing/synctest bubble, whose clock starts in 2000.
var epoch = time.Now().Add(-50 * 365 * 24 * time.Hour)

// An Instant is a moment on the process's monotonic clock, in nanoseconds since
// an arbitrary moment long before the process started. It fits in a ticket's token.
// The zero Instant is "no moment".
type Instant int64

// Now reads the clock. On a hot path prefer [Admission.Now], which reads it once for
// all gates of a call.
func Now() Instant { return Instant(time.Since(epoch)) }

// InstantOf converts t. If t carries a monotonic reading, as the deadlines made
// by package context do, steps of the wall clock do not matter.
func InstantOf(t time.Time) Instant {
	if t == t.Round(0) { // Wall clock only, so the distance to now is all there is.
		return Now().Add(time.Until(t))
	}
	return Instant(t.Sub(epoch))
}

// Add returns i+d, or the end of the scale if that overflows.
func (i Instant) Add(d time.Duration) Instant {
	s := i + Instant(d)
	if d > 0 && s < i {
		return math.MaxInt64
	}
	if d < 0 && s > i {
		return math.MinInt64
	}
	return s
}

// Sub returns i-j.
func (i Instant) Sub(j Instant) time.Duration { return time.Duration(i - j) }

// Time returns i as a [time.Time] with a monotonic reading, fit for
// [context.WithDeadline].
func (i Instant) Time() time.Time { return epoch.Add(time.Duration(i)) }

// A Wait says how long a gate may wait for capacity: not at all ([None], the
// zero value), until a moment ([Until]), or as long as the context lives
// ([Forever]). It never says whether a call may be admitted: capacity that is
// there now is granted under every Wait.
//
// A Wait is a moment on the monotonic clock, so == compares, and of two Waits
// the smaller allows less.
type Wait int64

const (
	// None does not wait: a gate that has no capacity now refuses.
	None Wait = 0
	// Forever waits as long as the context allows.
	Forever Wait = math.MaxInt64
)

// Until waits until t. A moment that has passed allows no waiting, as [None].
func Until(t time.Time) Wait { return InstantOf(t).Wait() }

// For waits for d from now. A d that is not positive is [None].
func For(d time.Duration) Wait {
	if d <= 0 {
		return None
	}
	return Now().Add(d).Wait()
}

// Wait is the Wait that ends at i.
func (i Instant) Wait() Wait { return Wait(max(i, 0)) }

// Narrow returns the Wait that allows the less of the two.
func (w Wait) Narrow(o Wait) Wait { return min(w, o) }

// End is the moment up to which w allows waiting. ok is false for [None] and
// [Forever], which have none.
func (w Wait) End() (end Instant, ok bool) { return Instant(w), w != None && w != Forever }

// Remaining returns how long w still allows waiting: zero for [None] and for a
// moment that has passed, the greatest Duration for [Forever].
func (w Wait) Remaining() time.Duration {
	switch w {
	case None:
		return 0
	case Forever:
		return math.MaxInt64
	}
	return max(Instant(w).Sub(Now()), 0)
}

// String returns "none", "forever" or the time left, such as "250ms".
func (w Wait) String() string {
	switch w {
	case None:
		return "none"
	case Forever:
		return "forever"
	}
	return w.Remaining().String()
}

// ErrWaitOver is returned by [Wait.On] and [Wait.Sleep] when the Wait ends first. A gate
// turns it into its own [Refusal], and ctx's error into what [Ended] returns.
var ErrWaitOver = errors.New("interceptor: nothing became ready in the time allowed")

// On waits until ready delivers or is closed, and returns nil. It returns [ErrWaitOver]
// if w ends first and ctx.Err() if ctx ends first. If ready is ready already it wins over
// both. It makes a timer only if it has to wait until a moment.
func (w Wait) On(ctx context.Context, ready <-chan struct{}) error {
	select {
	case <-ready:
		return nil
	default:
	}
	d := w.Remaining()
	if d == 0 {
		return ErrWaitOver
	}
	var end <-chan time.Time
	if w != Forever {
		t := time.NewTimer(d)
		defer t.Stop()
		end = t.C
	}
	select {
	case <-ready:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	case <-end:
		return ErrWaitOver
	}
}

// Sleep waits until i and returns nil. If w does not allow that, it returns
// [ErrWaitOver] at once, because the wait would be in vain. If ctx ends first, or will
// because of its deadline, it returns ctx's error. A gate that took something for the
// call beforehand gives it back on any error.
func (w Wait) Sleep(ctx context.Context, i Instant) error {
	now := Now()
	if i <= now {
		return nil
	}
	d := i.Sub(now)
	if Wait(i) > w {
		return ErrWaitOver
	}
	if t, ok := ctx.Deadline(); ok && InstantOf(t) < i {
		return context.DeadlineExceeded
	}
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

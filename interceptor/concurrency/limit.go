// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package concurrency

import (
	"math"
	"time"

	"github.com/belfry-go/belfry/interceptor"
	"github.com/belfry-go/belfry/internal/check"
)

// A Limit is an algorithm that finds the right limit; the [Layer] enforces it. The split,
// and the three outcomes of a call, are those of Netflix's concurrency-limits.
//
// The Layer calls the methods one at a time, at the end of calls and while it
// holds a lock: they must not block, nor call back into the Layer.
type Limit interface {
	// Limit returns the current limit. The Layer takes less than 1 for 1, because a limit
	// of 0 would never see another sample.
	Limit() int64
	// OnSample learns from a call that has ended.
	OnSample(s Sample)
}

// Bounded is a [Limit] that takes a call longer than its Bound for a sign of overload.
// Calls that their callers gave up after more than that are drops to it; other calls that
// were given up are no sample. A Bound that is not positive is none.
type Bounded interface {
	Limit
	Bound() time.Duration
}

// A Sample is a call that has ended, with success or with a sign of overload.
// Calls that say nothing about the server's load make no sample.
type Sample struct {
	Start    interceptor.Instant // when the call, or its first attempt, was sent
	RTT      time.Duration       // from Start to its end, or to a stream's first response; positive
	InFlight int64               // permits in use when it ended, its own included
	Dropped  bool                // it failed in a way that speaks of overload
}

func (s Sample) end() interceptor.Instant { return s.Start.Add(s.RTT) }

// defaultInitial, defaultMin and defaultMax hold for all three algorithms.
const (
	defaultInitial = 20
	defaultMin     = 1
	defaultMax     = 1000
	// maxLimit bounds what may be configured, so that sums of permits do not overflow.
	maxLimit = math.MaxInt32
)

// bounds are the settings that all algorithms share, with defaults applied.
type bounds struct{ initial, min, max int64 }

func newBounds(errs *check.Errors, initial, lo, hi int64) bounds {
	check.Default(errs, "Min", &lo, check.From[int64](1, maxLimit), defaultMin)
	defMax := max(defaultMax, lo)
	if hi == 0 {
		hi = defMax
	}
	errs.Require(hi >= lo && hi <= maxLimit, "Max", hi, "must be from Min, %d, to %d, or 0 for %d", lo, int64(maxLimit), defMax)
	defInitial := min(max(defaultInitial, lo), hi)
	if initial == 0 {
		initial = defInitial
	}
	errs.Require(initial >= lo && initial <= hi || hi < lo, "Initial", initial, "must be from Min, %d, to Max, %d, or 0 for %d", lo, hi, defInitial)
	return bounds{initial: initial, min: lo, max: hi}
}

func (b bounds) clamp(limit float64) float64 {
	return min(max(limit, float64(b.min)), float64(b.max))
}

// backoffRatio is the default factor of the limit on a drop. It is Netflix's.
const backoffRatio = 0.9

// recovery lets all drops of one overload decrease the limit once, as a TCP sender halves
// its window once for all losses of one window. Calls that were already running when the
// limit was last decreased say nothing about the new limit.
type recovery struct{ since interceptor.Instant }

// counts reports whether the drop calls for a decrease, and remembers it.
func (r *recovery) counts(s Sample) bool {
	if s.Start <= r.since {
		return false
	}
	r.since = s.end()
	return true
}

const (
	defaultWindow        = 100 * time.Millisecond
	defaultWindowSamples = 10
)

// window gathers samples until there are enough to act on: the latency of a
// single call is mostly noise. An algorithm acts once per window, on the mean.
type window struct {
	length  time.Duration
	samples int

	began    interceptor.Instant // When the previous one was complete.
	seen     int                 // successes
	sum      time.Duration       // of their round trips
	inFlight int64               // the most seen
}

// add adds a successful sample. When the window is complete it returns the mean round
// trip and the most permits in use, and starts a new window.
func (w *window) add(s Sample) (mean time.Duration, inFlight int64, complete bool) {
	w.seen++
	w.sum += s.RTT
	w.inFlight = max(w.inFlight, s.InFlight)
	if w.seen < w.samples || s.end().Sub(w.began) < w.length {
		return 0, 0, false
	}
	mean, inFlight = w.sum/time.Duration(w.seen), w.inFlight
	w.began = s.end()
	w.reset()
	return max(mean, 1), inFlight, true
}

// reset forgets the samples, which belong to an earlier limit.
func (w *window) reset() { w.seen, w.sum, w.inFlight = 0, 0, 0 }

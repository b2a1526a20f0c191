// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package concurrency

import (
	"fmt"
	"math"
	"time"

	"github.com/belfry-go/belfry/interceptor"
)

// A Limit is an algorithm that looks for the right limit; the [Layer] enforces
// it. The split, and the three outcomes of a call, are those of Netflix's
// concurrency-limits.
//
// The Layer calls the methods one at a time, at the end of calls and while it
// holds a lock: they must not block, nor call back into the Layer.
type Limit interface {
	// Limit is the limit now. The Layer takes what is below 1 for 1: a limit of 0
	// would never see another sample.
	Limit() int64
	// OnSample learns from a call that has ended.
	OnSample(s Sample)
}

// A Sample is a call that has ended, with success or with a sign of overload.
// Calls that say nothing about the server's load make no sample.
type Sample struct {
	Start    interceptor.Instant // when the call was admitted
	RTT      time.Duration       // from Start to its end; not negative
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

func newBounds(field string, initial, lo, hi int64) (bounds, error) {
	b := bounds{initial: initial, min: lo, max: hi}
	if b.min == 0 {
		b.min = defaultMin
	}
	if b.max == 0 {
		b.max = max(defaultMax, b.min)
	}
	if b.initial == 0 {
		b.initial = min(max(defaultInitial, b.min), b.max)
	}
	switch {
	case b.min < 1 || b.min > maxLimit:
		return b, fmt.Errorf("concurrency: %s.Min %d: must be from 1 to %d, or 0 for %d", field, lo, maxLimit, defaultMin)
	case b.max < b.min || b.max > maxLimit:
		return b, fmt.Errorf("concurrency: %s.Max %d: must be from Min, %d, to %d, or 0 for %d", field, hi, b.min, maxLimit, defaultMax)
	case b.initial < b.min || b.initial > b.max:
		return b, fmt.Errorf("concurrency: %s.Initial %d: must be from Min to Max, %d to %d, or 0 for %d", field, initial, b.min, b.max, defaultInitial)
	}
	return b, nil
}

func (b bounds) clamp(limit float64) float64 {
	return min(max(limit, float64(b.min)), float64(b.max))
}

// inRange returns v, or def if v is zero. The range includes lo and hi.
func inRange(field string, v, def, lo, hi float64) (float64, error) {
	if v == 0 {
		return def, nil
	}
	if !(v >= lo && v <= hi) { // Not a number is in no range.
		return 0, fmt.Errorf("concurrency: %s %v: must be from %v to %v, or 0 for %v", field, v, lo, hi, def)
	}
	return v, nil
}

// backoffRatio is by how much the limit shrinks on a drop unless configured
// otherwise: Netflix's value.
const backoffRatio = 0.9

// recovery makes one decrease of all the drops of one overload. Calls that were
// already running when the limit was last decreased say nothing about the new
// limit, as a TCP sender halves its window once for all losses of one window.
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

	began    interceptor.Instant // When the one before was complete.
	seen     int                 // successes
	sum      time.Duration       // of their round trips
	inFlight int64               // the most seen
}

func (w *window) configure(field string, length time.Duration, samples int) error {
	if length < 0 {
		return fmt.Errorf("concurrency: %s.Window %v: must be positive, or 0 for %v", field, length, defaultWindow)
	}
	if samples < 0 {
		return fmt.Errorf("concurrency: %s.WindowSamples %d: must be positive, or 0 for %d", field, samples, defaultWindowSamples)
	}
	if length == 0 {
		length = defaultWindow
	}
	if samples == 0 {
		samples = defaultWindowSamples
	}
	w.length, w.samples = length, samples
	return nil
}

// add adds a successful sample. When the window is complete it returns the mean
// round trip and the most permits in use, and begins a new one.
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

// reset forgets what was gathered, which belongs to a limit that no longer holds.
func (w *window) reset() { w.seen, w.sum, w.inFlight = 0, 0, 0 }

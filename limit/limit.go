// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package limit

import (
	"math"
	"time"

	"github.com/belfry-go/belfry/internal/check"
)

// An Algorithm finds the right limit; whoever owns it enforces it. The split, and the
// outcomes of a call, are those of Netflix's concurrency-limits.
//
// The owner calls the methods one at a time, at the end of calls and while it holds a
// lock: they must not block, nor call the owner.
type Algorithm interface {
	// Limit returns the current limit. The owner takes less than 1 for 1, because a limit
	// of 0 would never see another sample.
	Limit() int64
	// OnSample learns from a call that has ended.
	OnSample(s Sample)
}

// A Starter is an [Algorithm] that follows some calls from their start to their end.
type Starter interface {
	Algorithm
	// OnStart is called when a call that may become a sample has got its permit. It is
	// called concurrently, without a lock. If it returns a mark, from 1 to [MaxMark],
	// every end of the call is a sample with that Mark, also one that says nothing; 0 is
	// no mark.
	OnStart() (mark uint8)
}

// MaxMark is the greatest mark of a [Starter].
const MaxMark = 1<<markBits - 1

const markBits = 4

// An Explainer is an [Algorithm] that can say why its limit is what it is.
type Explainer interface {
	Algorithm
	// Explain returns what the algorithm thinks now. The owner calls it as it calls
	// OnSample.
	Explain() State
}

// A State is what an algorithm thinks.
type State struct {
	Baseline time.Duration // the latency that Latency is compared with; 0 before it is known
	Latency  time.Duration // the mean latency of calls now; 0 before it is known
	Lowered  string        // why the limit went down the last time: "latency", "drop" or "drain"; empty if it did not
}

// An Instant is a moment on a monotonic clock, in nanoseconds since an origin that the
// owner of an algorithm chooses. 0 is no moment.
type Instant int64

func (i Instant) add(d time.Duration) Instant { return i + Instant(d) }

func (i Instant) sub(j Instant) time.Duration { return time.Duration(i - j) }

// A Result is what the end of a call says about the load of the server.
type Result uint8

const (
	// Succeeded says that the server has answered, after RTT.
	Succeeded Result = iota
	// Dropped says that the call failed in a way that speaks of overload.
	Dropped
	// GivenUp says that the caller gave up after RTT: the call would have taken at
	// least that long.
	GivenUp
	// Void says nothing. Only calls with a Mark end so.
	Void
)

// A Sample is a call that has ended. Calls that say nothing about the server's load make
// no sample, unless they have a Mark.
type Sample struct {
	Start    Instant       // when the call, or its first attempt, was sent; 0 if it was not
	RTT      time.Duration // from Start to its end, or to a stream's first response; positive if it was sent
	InFlight int64         // permits in use when it ended, its own included
	Limited  bool          // a call was refused, or had to wait, for want of a permit since the last sample
	Result   Result
	Mark     uint8 // what [Starter] gave it
}

func (s Sample) end() Instant { return s.Start.add(s.RTT) }

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

func newBounds(errs *check.Errors, initial, lo, hi, defMin, defMax int64) bounds {
	check.Default(errs, "Min", &lo, check.From[int64](1, maxLimit), defMin)
	defMax = max(defMax, lo)
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

// Why a limit went down.
const (
	becauseLatency = "latency"
	becauseDrop    = "drop"
	becauseDrain   = "drain"
)

// recovery lets all drops of one overload decrease the limit once, as a TCP sender halves
// its window once for all losses of one window. Calls that were already running when the
// limit was last decreased say nothing about the new limit.
type recovery struct{ since Instant }

// counts reports whether the drop calls for a decrease, and remembers it.
func (r *recovery) counts(s Sample) bool {
	if s.Start <= r.since {
		return false
	}
	r.since = s.end()
	return true
}

// The least time and number of calls of a window. Those of Gradient2 and Vegas are
// Netflix's (WindowedLimit).
const (
	defaultWindow        = time.Second
	defaultWindowSamples = 10
)

// window gathers samples until there are enough to act on: the latency of a
// single call is mostly noise. An algorithm acts once per window, on the mean.
type window struct {
	length  time.Duration
	samples float64

	began    Instant       // 0 before the first sample.
	n        float64       // calls that succeeded
	cut      float64       // calls that were given up
	sum      time.Duration // of all their times
	inFlight int64         // the most seen
	limited  bool
}

// add adds a sample that is no drop, and reports whether the window is complete. A call
// that was given up counts if it took longer than known, the mean latency so far: it would
// have taken at least that long, but a short one says nothing.
func (w *window) add(s Sample, known float64) (complete bool) {
	if w.began == 0 {
		w.began = s.Start
	}
	w.limited = w.limited || s.Limited
	switch {
	case s.Result == Succeeded:
		w.n++
	case s.Result == GivenUp && float64(s.RTT) > known:
		w.cut++
	default:
		return false
	}
	w.sum += s.RTT
	w.inFlight = max(w.inFlight, s.InFlight)
	return w.size() >= w.samples && s.end().sub(w.began) >= w.length
}

// size is how many calls there are in the window.
func (w *window) size() float64 { return w.n + w.cut }

// mean is the mean latency, in nanoseconds. If calls were given up it is the estimate for
// exponential latencies.
func (w *window) mean() float64 { return max(float64(w.sum)/max(w.n, 1), 1) }

// reset begins a new window.
func (w *window) reset(now Instant) {
	*w = window{length: w.length, samples: w.samples, began: now}
}

// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package limit

import (
	"math"
	"sync/atomic"
	"time"

	"github.com/belfry-go/belfry/internal/check"
)

// AutoConfig configures [Auto]. The zero value is the default.
type AutoConfig struct {
	// Initial, Min and Max are the initial limit and its bounds: 20, 1 and 2147483647 if
	// zero. 1 <= Min <= Initial <= Max.
	Initial, Min, Max int64
	// NoDrains turns drains off. Then the latency of the server without a queue is
	// measured only while there is no sign of one. If the first calls meet a queue, or the
	// server becomes slower or faster during a lasting overload, the limit is wrong until
	// the overload ends.
	NoDrains bool
}

// Auto keeps the mean latency near that of the server without a queue. It needs no
// number from the user, and is the default.
//
//	most  = 1.3 + 2/sqrt(limit)
//	ratio = mean latency / base
//
//	ratio > most   limit shrinks by half of the excess, at most by a fifth
//	ratio < most   limit grows by limit/10 × (most-ratio)/(most-1), at least by 0.1,
//	               if a call was refused or had to wait because of the limit;
//	               by limit/2 until the limit shrinks for the first time
//	on a drop      limit shrinks by a tenth, once for all calls that were running
//
// The room that most leaves for chance is that of square-root staffing. It gives small
// limits more of it, so that clients of one server become equal. The mean is that of
// windows of at least 16 calls and 100 ms, smoothed over 150 calls, or more if
// latencies vary much; a window with fewer calls than that moves the limit less.
//
// # Drains
//
// base cannot be measured under a queue that the limit itself allows. So Auto lowers the
// limit for a moment, to 0.7 × limit/most, until the server's queue is empty and 40 calls
// or more were sent without one, at most for a second or so. Some calls are refused, or
// wait, meanwhile. When all calls of this cohort have ended, base moves towards their
// mean: by their share in the last 480 calls, or by 0.7 of the difference if chance does
// not explain it. At first, and after a cohort that was faster than chance explains, the limit
// is lowered to half of that, because the earlier ones may have met a queue.
//
// One client cannot empty a queue that others fill, so all drain at the same time: when
// the wall clock is at a multiple of 10 s, and of 30 s once three cohorts in a row have
// agreed. Clocks may differ by half a second. While ratio is below 1.1 there is no queue,
// and a cohort is measured without lowering the limit. [AutoConfig.NoDrains] turns drains
// off.
//
// A call that its caller gave up counts with the time that it had taken, if that is longer
// than base: it would have taken at least that long.
type Auto struct {
	bounds
	drains bool
	wall   func(Instant) time.Time

	limit  float64
	shrunk string // Why the limit shrank last; empty until it does.
	recovery

	base   float64 // Mean latency of the server without a queue, in nanoseconds; 0 before the first cohort.
	weight float64 // How many calls base stands for.
	spread float64 // The variance of latencies without a queue, in units of base squared.
	mean   float64 // The smoothed mean latency; 0 before the first window.
	window window

	phase   autoPhase
	since   Instant // When the phase began; 0 if that is not known.
	next    Instant // When the next cohort is due.
	resumed Instant // Calls that were sent before say nothing about the limit.
	lowered int64   // The limit in a drain; 0 if it is not lowered.
	agreed  int     // How many cohorts in a row agreed with base.
	deep    bool    // The next drain lowers the limit to half of the usual.
	cohort  cohort
}

// cohort is the calls that base is measured with.
type cohort struct {
	// state counts the calls that were sent, above the mark in its lowest bits; 0 while
	// the cohort is closed. It changes without a lock.
	state atomic.Int64

	mark         uint8
	sent, ended  int64   // sent is known when the cohort is closed.
	n            float64 // how many succeeded
	sum, squares float64 // of all their times, and of those that succeeded
}

type autoPhase uint8

const (
	steady    autoPhase = iota
	emptying            // The limit is lowered until the queue is empty.
	gathering           // The cohort is sent.
	pending             // The calls of the cohort end.
)

const (
	autoLeast      = 16 // calls in a window
	autoWindow     = 100 * time.Millisecond
	autoSmoothing  = 150 // calls
	autoMemory     = 480 // calls
	autoSpread     = 4   // The most that the spread makes averages longer by.
	autoQueued     = 1.1 // A lower ratio shows no queue.
	autoDepth      = 0.7 // What a drain lowers the limit to, in units of limit/most.
	autoDrain      = 10 * time.Second
	autoAgreed     = 3 // After as many cohorts that agreed, drains are rarer,
	autoRarer      = 3 // by this factor.
	autoLate       = time.Second
	cohortSize     = 40 // calls, more if latencies vary much
	cohortLeast    = 8
	cohortShortest = 50 * time.Millisecond
	cohortLongest  = time.Second // unless there are not cohortLeast calls
)

// withDefaults checks cfg and returns it with all bounds set.
func (cfg AutoConfig) withDefaults(errs *check.Errors) bounds {
	return newBounds(errs, cfg.Initial, cfg.Min, cfg.Max, 1, maxLimit)
}

// NewAuto returns an Auto at its initial limit.
func NewAuto(cfg AutoConfig) (*Auto, error) {
	a := &Auto{wall: wallClock, spread: 1, deep: true}
	if err := a.Update(cfg); err != nil {
		return nil, err
	}
	a.limit = float64(a.initial)
	a.window.length, a.window.samples = autoWindow, autoLeast
	a.gather(0)
	return a, nil
}

// Update changes the configuration and keeps the limit, within the new bounds, and what
// was measured. On an error nothing has changed.
func (a *Auto) Update(cfg AutoConfig) error {
	errs := check.Of("limit")
	b := cfg.withDefaults(errs.In("Auto"))
	if err := errs.Err(); err != nil {
		return err
	}
	a.bounds, a.drains = b, !cfg.NoDrains
	a.limit = b.clamp(a.limit)
	return nil
}

// SetWallClock sets the function that tells the wall clock's time at an Instant, for
// tests and simulations. It must be set before the first call.
func (a *Auto) SetWallClock(wall func(Instant) time.Time) { a.wall = wall }

// wallClock is the clock of the machine: the Instants that it is asked for are now.
func wallClock(Instant) time.Time { return time.Now() }

// Limit returns the current limit, which is lower in a drain.
func (a *Auto) Limit() int64 {
	if a.lowered > 0 {
		return a.lowered
	}
	return int64(a.limit)
}

// SetLimit moves the limit to n, or to the nearest bound.
func (a *Auto) SetLimit(n int64) { a.limit = a.clamp(float64(n)) }

// OnStart marks the calls of a cohort.
func (a *Auto) OnStart() (mark uint8) {
	for {
		s := a.cohort.state.Load()
		if s == 0 {
			return 0
		}
		if a.cohort.state.CompareAndSwap(s, s+1<<markBits) {
			return uint8(s & MaxMark)
		}
	}
}

// OnSample applies the rules above.
func (a *Auto) OnSample(s Sample) {
	if s.Mark != 0 && s.Mark == a.cohort.mark {
		a.cohort.add(s, a.base)
	}
	if s.Start == 0 {
		return
	}
	now := s.end()
	a.advance(now)
	switch {
	case s.Result == Dropped:
		if a.counts(s) {
			a.shrink(1-backoffRatio, becauseDrop)
		}
	case s.Start >= a.resumed && a.lowered == 0 && a.base > 0 && a.window.add(s, a.base):
		a.adjust(now)
	}
}

// adjust adjusts the limit to the window, and begins a new one.
func (a *Auto) adjust(now Instant) {
	w := &a.window
	mean := w.mean()
	part := min(1, w.size()/(autoSmoothing*a.longer()))
	if a.mean == 0 {
		a.mean = mean
	}
	a.mean += (mean - a.mean) * part
	switch ratio, most := a.ratio(), a.most(); {
	case ratio > most:
		a.shrink(part*min(0.2, (1-most/ratio)/2), becauseLatency)
	case w.limited:
		step := 0.1
		if a.shrunk == "" {
			step = 0.5
		}
		a.limit = a.clamp(a.limit + part*max(0.1, step*a.limit*min(1, (most-ratio)/(most-1))))
	}
	w.reset(now)
}

func (a *Auto) shrink(part float64, why string) {
	a.limit = a.clamp(a.limit * (1 - part))
	a.shrunk = why
}

// Explain returns the latency of the server without a queue as the baseline.
func (a *Auto) Explain() State {
	lowered := a.shrunk
	if a.lowered > 0 {
		lowered = becauseDrain
	}
	return State{Baseline: time.Duration(a.base), Latency: time.Duration(a.mean), Lowered: lowered}
}

func (a *Auto) most() float64 { return 1.3 + 2/math.Sqrt(a.limit) }

func (a *Auto) ratio() float64 { return a.mean / max(a.base, 1) }

// longer returns by how much averages are longer because latencies vary: 1 for
// exponential ones.
func (a *Auto) longer() float64 { return min(max(1, a.spread), autoSpread) }

// advance begins a drain that is due, or moves it on.
func (a *Auto) advance(now Instant) {
	switch a.phase {
	case steady:
		if now < a.next {
			return
		}
		late := now.sub(a.next)
		a.schedule(now)
		switch {
		case a.ratio() < autoQueued || a.base == 0:
			a.gather(now)
		case a.drains && late < autoLate: // The others drain now, too.
			depth := autoDepth
			if a.deep {
				depth /= 2
			}
			a.lowered = max(a.min, int64(depth*a.limit/a.most()))
			a.phase, a.since = emptying, now
		}
	case emptying:
		if now.sub(a.since) >= time.Duration(2*a.mean) {
			a.gather(now)
		}
	case gathering:
		if a.since == 0 {
			a.since = now
			a.schedule(now)
		}
		if !a.gathered(now.sub(a.since)) {
			return
		}
		a.cohort.close()
		a.phase = pending
		if a.lowered > 0 {
			a.lowered = 0
			a.resume(now)
		}
		fallthrough
	case pending:
		due := now >= a.next
		if a.cohort.ended < a.cohort.sent && !due {
			return
		}
		a.judge(now)
		a.phase = steady
		if !due {
			a.schedule(now) // Whether drains are rarer may have changed.
		}
	}
}

// resume begins a new window, with calls that are sent from now on.
func (a *Auto) resume(now Instant) {
	a.resumed = now
	a.window.reset(now)
}

// schedule sets when the next cohort is due.
func (a *Auto) schedule(now Instant) {
	every := autoDrain
	if a.agreed >= autoAgreed {
		every *= autoRarer
	}
	wall := a.wall(now)
	a.next = now.add(wall.Truncate(every).Add(every).Sub(wall))
}

// gather opens a cohort.
func (a *Auto) gather(now Instant) {
	a.phase, a.since = gathering, now
	a.cohort.open()
}

// gathered reports whether the cohort that was opened so long ago is large enough.
func (a *Auto) gathered(took time.Duration) bool {
	sent := a.cohort.state.Load() >> markBits
	return float64(sent) >= cohortSize*a.longer() && took >= cohortShortest || sent >= cohortLeast && took >= cohortLongest
}

// judge moves base towards the mean of the cohort.
func (a *Auto) judge(now Instant) {
	c := &a.cohort
	if c.n < cohortLeast {
		return
	}
	mean := c.sum / c.n
	spread := max(0, c.squares/c.n/(mean*mean)-1)
	diff := mean - a.base
	switch {
	case a.base == 0:
		a.base, a.weight, a.spread = mean, c.n, spread
		a.resume(now)
		return
	case math.Abs(diff) > 3*a.base*math.Sqrt(max(a.spread, 0.01)/c.n): // Chance does not explain it.
		a.base += 0.7 * diff
		a.weight = c.n
		a.agreed = 0
		a.deep = diff < 0 // The last ones were measured under a queue; this one may be, too.
	default:
		a.weight = min(a.weight+c.n, autoMemory)
		a.base += diff * c.n / a.weight
		a.agreed++
		a.deep = false
	}
	a.spread += (spread - a.spread) / 5
}

// open begins a new cohort, with another mark.
func (c *cohort) open() {
	c.mark = c.mark%MaxMark + 1
	c.sent, c.ended, c.n, c.sum, c.squares = 0, 0, 0, 0, 0
	c.state.Store(int64(c.mark))
}

func (c *cohort) close() { c.sent = c.state.Swap(0) >> markBits }

// add adds the end of a call.
func (c *cohort) add(s Sample, base float64) {
	c.ended++
	rtt := float64(s.RTT)
	switch {
	case s.Result == Succeeded:
		c.n++
		c.sum += rtt
		c.squares += rtt * rtt
	case s.Result != Void && rtt > base:
		c.sum += rtt
	}
}

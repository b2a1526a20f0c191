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
	// NoDrains turns drains off, see [Auto]. Then the latency of the server without a queue
	// is measured only while there is no sign of one. If the first calls meet a queue, or the
	// server becomes slower or faster during a lasting overload, the limit is wrong until
	// the overload ends.
	NoDrains bool
}

// Auto keeps the mean latency near that of the server without a queue. It needs no
// number from the user, and is the default.
//
//	most  = 1.15 + 3.07/sqrt(limit+2)
//	ratio = mean latency / base
//
//	ratio > most   limit shrinks by (1-most/ratio) × (1.5-most/ratio), half of a small excess
//	ratio < most   limit grows by 0.5 × limit × (most-ratio)/(most-1), at least by 0.1,
//	               if a call was refused or had to wait because of the limit
//	on a drop      limit shrinks by a tenth, once for all calls that were running
//
// The room that most leaves for chance is that of square-root staffing. It gives small
// limits more of it, so that clients of one server become equal. The mean is that of
// windows of at least 16 calls and 100 ms, smoothed over 100 calls, or more if latencies
// vary much, and, after limit has shrunk for the first time, over 1.2 s. A window that is a
// part of that moves the limit by as large a part.
//
// When a server that answered nothing for a while answers again as fast as before, only one
// of the drops meanwhile stands.
//
// # Drains
//
// base cannot be measured under a queue that the limit itself allows. So Auto lowers the
// limit for a moment, to 0.75 × limit/most: for four times the mean latency or 150 ms, in
// which the server's queue empties, and for four times or 300 ms, in which a cohort of calls
// is sent without a queue, whichever is longer. Some calls are refused, or wait, meanwhile.
// When the cohort has ended, base moves towards its mean by its share in the last 240 calls.
// If chance does not explain the latest cohorts, base becomes their mean.
//
// The limit is lowered to a quarter of that at first, after a base that was too high, and
// when it has doubled since, because the other cohorts may have met a queue.
//
// One client cannot empty a queue that others fill, so all drain at the same time: when the
// wall clock is at a multiple of 20 s, or of 40, 80 and so on where that is less than 500
// times base. Until it stands for 16 calls, they are at multiples of 5 s, unless the mean
// latency is above 125 ms. So is the next one after ratio has passed 1.4 × most, if base stands
// for 240 calls and a cohort as large as the last can show by itself whether the server
// became slower. Clocks may differ by half a second. While ratio is below 1.1 there is no
// queue, and a cohort is measured without lowering the limit. [AutoConfig.NoDrains] turns
// drains off.
//
// A call that its caller gave up counts with the time that it had taken, if that is longer
// than base: it would have taken at least that long. A window with more such calls than others
// shrinks the limit, but does not enter the mean, which would be too long for many windows more.
type Auto struct {
	bounds
	drains bool
	wall   func(Instant) time.Time

	limit   float64
	shrunk  string  // Why the limit shrank last; empty until it does.
	restore float64 // What the limit may return to after drops; 0 if there were none.
	recovery

	base   float64 // Mean latency of the server without a queue, in nanoseconds; 0 before the first cohort.
	weight float64 // How many calls base stands for.
	spread float64 // The variance of latencies without a queue, in units of base squared.
	recent calls   // The latest cohorts that were all above base, or all below.
	last   float64 // How many calls the latest cohort had.
	mean   float64 // The smoothed mean latency; 0 before the first window.
	window window

	phase   autoPhase
	until   Instant // When the phase ends, by the clock that all clients share; 0 before the first sample.
	next    Instant // When the next cohort is due.
	suspect bool    // The server may have become slower, and the next cohort will show it.
	resumed Instant // Calls that were sent before say nothing about the limit.
	lowered int64   // The limit in a drain; 0 if it is not lowered.
	deep    bool    // The next drain lowers the limit to a quarter of the usual.
	proven  float64 // The least limit since the last deep drain.
	cohort  cohort
}

// calls are calls that have succeeded, and the sum of their times.
type calls struct{ n, sum float64 }

func (c calls) mean() float64 { return c.sum / c.n }

// cohort is the calls that base is measured with.
type cohort struct {
	// state counts the calls that were sent, above the mark in its lowest bits; 0 while
	// the cohort is closed. It changes without a lock.
	state atomic.Int64

	mark        uint8
	sent, ended int64   // sent is known when the cohort is closed.
	calls               // those that succeeded, but sum is of all that count
	squares     float64 // the sum of the squares of the times of those that succeeded
}

type autoPhase uint8

const (
	steady    autoPhase = iota
	emptying            // The limit is lowered until the queue is empty.
	gathering           // The cohort is sent.
	pending             // The calls of the cohort end.
)

const (
	autoLeast     = 16 // calls in a window
	autoWindow    = 100 * time.Millisecond
	autoSmoothing = 100 // calls
	autoSlowest   = 1200 * time.Millisecond
	autoGrowth    = 0.5
	autoSpread    = 4           // The most that the spread makes averages longer by.
	autoRestore   = time.Second // How long after a drop the limit may be restored.

	autoQueued      = 1.1  // A lower ratio shows no queue.
	autoDepth       = 0.75 // What a drain lowers the limit to, in units of limit/most.
	autoDeep        = 4    // A deep one lowers it by this more.
	autoEmpty       = 4    // How long the queue may take to empty, in mean latencies.
	autoGather      = 4    // How long a cohort is sent, in mean latencies.
	autoExtend      = 20   // By how much longer, if it shows that the server became slower.
	autoDrain       = 20 * time.Second
	autoSuspect     = 1.4                    // The ratio, in units of most, above which the server may have become slower.
	autoSooner      = 4                      // By how much sooner the drain after that comes, and the first ones
	autoKnown       = 16                     // until base stands for as many calls.
	autoLeastEmpty  = 150 * time.Millisecond // Not less, because clocks differ.
	autoLeastGather = 300 * time.Millisecond
	autoRarer       = 500 // The least time between drains, in units of base.
	autoMemory      = 240 // calls
	autoFirst       = 2   // How many calls the first cohort counts as, because it may have met a queue.

	// The first cohort.
	cohortSize     = 40
	cohortShortest = 50 * time.Millisecond
	cohortLongest  = time.Second // unless there are not cohortLeast calls

	cohortLeast = 8 // The least number of calls that chance may be excluded for.
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
	a.phase = gathering
	a.cohort.open()
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
			if a.restore == 0 {
				a.restore = a.limit
			}
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
	if a.shrunk != "" {
		part = min(part, float64(now.sub(w.began))/float64(autoSlowest))
	}
	if a.mean == 0 {
		a.mean = mean
	}
	ratio, most := mean/a.base, a.most()
	if w.cut <= w.n {
		a.mean += (mean - a.mean) * part
		ratio = a.ratio()
	} // Otherwise nobody knows by how much calls take too long, so it is not remembered.
	if a.phase == steady && !a.suspect && a.restore == 0 && a.weight >= autoMemory && ratio > autoSuspect*most && 3*a.chance(a.last) < math.Log(autoSuspect) {
		a.suspect = true
		a.schedule(now)
	}
	switch {
	case ratio > most:
		a.shrink(part*(1-most/ratio)*(1.5-most/ratio), becauseLatency)
	case a.restore > a.limit && now.sub(a.recovery.since) < autoRestore:
		a.limit = a.clamp(a.restore)
	case w.limited:
		a.limit = a.clamp(a.limit + part*max(0.1, autoGrowth*a.limit*(most-ratio)/(most-1)))
	}
	if now.sub(a.recovery.since) >= autoRestore {
		a.restore = 0
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

func (a *Auto) most() float64 { return 1.15 + 3.07/math.Sqrt(a.limit+2) }

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
		a.until = a.next.add(max(autoLeastEmpty, time.Duration(autoEmpty*a.mean)))
		a.schedule(now)
		switch {
		case a.ratio() < autoQueued || a.base == 0:
			a.gather(now)
		case a.drains && now < a.until: // Later, the others are not in their drain any more.
			a.lower()
			a.phase = emptying
		}
	case emptying:
		if now >= a.until {
			a.gather(now)
		}
	case gathering:
		if !a.gathered(now) {
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
		if a.cohort.ended < a.cohort.sent && now < a.next {
			return
		}
		a.judge(now)
		a.phase = steady
	}
}

// lower lowers the limit for a drain.
func (a *Auto) lower() {
	to := autoDepth * a.limit / a.most()
	if a.deep || a.limit > 2*a.proven {
		to /= autoDeep
		a.proven = a.limit
	}
	a.proven = min(a.proven, a.limit)
	a.lowered = max(a.min, int64(to))
}

// resume begins a new window, with calls that are sent from now on.
func (a *Auto) resume(now Instant) {
	a.resumed = now
	a.window.reset(now)
}

// schedule sets when the next cohort is due.
func (a *Auto) schedule(now Instant) {
	every := autoDrain
	if (a.weight < autoKnown || a.suspect) && 20*(autoEmpty+autoGather)*a.mean < float64(every) {
		every /= autoSooner
	}
	for a.weight >= autoKnown && !a.suspect && float64(every) < autoRarer*a.base {
		every *= 2
	}
	wall := a.wall(now)
	a.next = now.add(wall.Truncate(every).Add(every).Sub(wall))
}

// gather opens a cohort.
func (a *Auto) gather(now Instant) {
	a.phase, a.until = gathering, max(a.until, now).add(max(autoLeastGather, time.Duration(autoGather*a.mean)))
	a.cohort.open()
}

// gathered reports whether the cohort is large enough.
func (a *Auto) gathered(now Instant) bool {
	c := &a.cohort
	if a.base > 0 {
		// Where many clients share the server, all end the drain at once. Where one alone
		// may have more calls in flight, it can tell more about a server that became slower.
		slower := c.n >= cohortLeast && c.sum > a.base*(c.n+1.2*math.Sqrt(c.n*a.spread))
		return now >= a.until && (a.lowered <= 1 || !slower || now >= a.until.add(time.Duration(autoExtend*a.mean)))
	}
	if a.until == 0 {
		a.until = now.add(cohortShortest)
		a.schedule(now)
	}
	sent := c.state.Load() >> markBits
	return sent >= cohortSize && now >= a.until || sent >= cohortLeast && now >= a.until.add(cohortLongest-cohortShortest)
}

// judge moves base towards the mean of the cohort.
func (a *Auto) judge(now Instant) {
	c := &a.cohort
	if c.n == 0 {
		return
	}
	mean := c.mean()
	if a.base == 0 {
		a.base, a.weight = mean, min(c.n, autoFirst)
		a.resume(now)
		return
	}
	// What was measured before a sudden change says nothing about the server now.
	if a.suspect || a.recent.n == 0 || (mean > a.base) != (a.recent.mean() > a.base) {
		a.recent = calls{}
	}
	a.last, a.suspect = c.n, false
	a.recent.n += c.n
	a.recent.sum += c.sum
	recent := a.recent.mean()
	if a.recent.n >= cohortLeast && math.Abs(math.Log(recent/a.base)) > 3*a.chance(a.recent.n) {
		a.deep = recent < a.base
		a.base, a.weight = recent, a.recent.n
		a.recent = calls{}
	} else {
		a.weight = min(a.weight+c.n, max(c.n, autoMemory))
		a.base += (mean - a.base) * c.n / a.weight
		a.deep = false
	}
	spread := max(0, c.squares/c.n/(mean*mean)-1)
	a.spread += (spread - a.spread) * min(1, c.n/autoMemory)
}

// chance is the standard error of the logarithm of the mean of n calls in units of base.
func (a *Auto) chance(n float64) float64 {
	return math.Sqrt(max(a.spread, 0.01) * (1/n + 1/a.weight))
}

// open begins a new cohort, with another mark.
func (c *cohort) open() {
	c.mark = c.mark%MaxMark + 1
	c.sent, c.ended, c.calls, c.squares = 0, 0, calls{}, 0
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

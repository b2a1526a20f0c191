// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package limit

import (
	"math"
	"time"

	"github.com/belfry-go/belfry/internal/check"
)

// VegasConfig configures [Vegas]. The zero value is the default.
type VegasConfig struct {
	// Initial, Min and Max are the initial limit and its bounds: 20, 1 and 1000 if zero.
	// 1 <= Min <= Initial <= Max.
	Initial, Min, Max int64
	// Smoothing is how much of a new value enters the limit, from 0.01 to 1; 1 if
	// zero.
	Smoothing float64
	// ProbeWindows is the number of windows after which the best round trip is measured
	// again, from 10 to 1,000,000; 30 if zero.
	ProbeWindows int
	// Window and WindowSamples are the least time and the least number of calls for
	// which samples are gathered before the limit is computed again: 1 s and 10 if
	// zero, as Netflix's WindowedLimit. They must not be negative.
	Window        time.Duration
	WindowSamples int
}

// Vegas follows TCP Vegas (Brakmo and Peterson 1995) with the constants of
// Netflix's concurrency-limits: it estimates how many calls queue in the server
// from how far the round trip is above the best one,
//
//	queue = ceil(limit × (1 - best/now))
//
// and with l = max(1, floor(log10(limit))) moves the limit
//
//	by +6l   if queue <= l
//	by +l    if queue < 3l
//	by -l    if queue > 6l, or on a drop
//
// so that between 3l and 6l calls queue. The limit stays while less than half of
// it is in use.
//
// Three things differ from Netflix's. It acts on the mean of a window of samples, not on
// each. The best round trip is not the least of all, which noise makes too low, nor taken
// from under a queue that the limit itself allows, which makes the limit creep upwards: every
// ProbeWindows windows the limit is halved for one window (as BBR does in PROBE_RTT), and
// its mean is the best round trip until the next time. A window of fewer than 100 calls
// moves it by its share in as many. And on a drop the limit goes down once for all calls
// that were running.
//
// Each client probes on its own, so several clients of one server measure each other's
// queues, and their limits creep upwards. [Auto] is the better choice then, and for a server
// whose latencies vary much.
type Vegas struct {
	bounds
	cfg    VegasConfig
	limit  float64
	window window
	recovery

	best    float64 // Round trip without queueing, in nanoseconds; 0 before the first window.
	now     float64 // The mean of the last window.
	why     string  // Why the limit went down last.
	windows int     // Since the last probe.
	halved  bool    // A probe is going on.
	since   Instant // Calls that were sent before do not count.
}

// withDefaults checks cfg and returns it with all fields set.
func (cfg VegasConfig) withDefaults(errs *check.Errors) (VegasConfig, bounds) {
	b := newBounds(errs, cfg.Initial, cfg.Min, cfg.Max, defaultMin, defaultMax)
	check.Default(errs, "Smoothing", &cfg.Smoothing, check.From(0.01, 1), 1)
	check.Default(errs, "ProbeWindows", &cfg.ProbeWindows, check.From(10, 1_000_000), 30)
	check.Default(errs, "Window", &cfg.Window, check.Positive, defaultWindow)
	check.Default(errs, "WindowSamples", &cfg.WindowSamples, check.Positive, defaultWindowSamples)
	return cfg, b
}

// NewVegas returns a Vegas at its initial limit.
func NewVegas(cfg VegasConfig) (*Vegas, error) {
	v := new(Vegas)
	if err := v.Update(cfg); err != nil {
		return nil, err
	}
	v.limit = float64(v.initial)
	v.halved = true // The first window is a probe.
	return v, nil
}

// Update changes the configuration and keeps the limit, within the new bounds,
// and the best round trip. On an error nothing has changed.
func (v *Vegas) Update(cfg VegasConfig) error {
	errs := check.Of("limit")
	cfg, b := cfg.withDefaults(errs.In("Vegas"))
	if err := errs.Err(); err != nil {
		return err
	}
	v.bounds, v.cfg = b, cfg
	v.window.length, v.window.samples = cfg.Window, float64(cfg.WindowSamples)
	v.limit = b.clamp(v.limit)
	return nil
}

// Limit returns the current limit, half of it in a probe.
func (v *Vegas) Limit() int64 {
	if v.halved {
		return max(v.min, int64(v.limit/2))
	}
	return int64(v.limit)
}

// SetLimit moves the limit to n, or to the nearest bound.
func (v *Vegas) SetLimit(n int64) { v.limit = v.clamp(float64(n)) }

// OnSample applies the formulas above when a window is complete.
func (v *Vegas) OnSample(s Sample) {
	step := max(1, math.Floor(math.Log10(v.limit)))
	w := &v.window
	if s.Result == Dropped {
		if v.counts(s) {
			v.move(-step)
			w.reset(s.end())
			v.why = becauseDrop
		}
		return
	}
	// Calls that were sent before a probe began, or soon after, met the queue, and those of
	// the probe did not meet that of the limit.
	if s.Start < v.since || !w.add(s, v.best) {
		return
	}
	now, calls, inFlight := w.mean(), w.size(), w.inFlight
	v.now = now
	w.reset(s.end())
	if v.halved {
		v.measure(now, calls)
		v.since = s.end()
		return
	}
	if v.windows++; v.windows >= v.cfg.ProbeWindows {
		v.halved, v.since = true, s.end().add(time.Duration(2*now))
		return
	}
	if float64(inFlight)*2 < v.limit {
		return
	}
	switch queue := math.Ceil(v.limit * (1 - v.best/now)); {
	case queue <= step:
		v.move(6 * step)
	case queue < 3*step:
		v.move(step)
	case queue > 6*step:
		v.move(-step)
		v.why = becauseLatency
	}
}

// Explain returns the best round trip as the baseline.
func (v *Vegas) Explain() State {
	lowered := v.why
	if v.halved {
		lowered = becauseDrain
	}
	return State{Baseline: time.Duration(v.best), Latency: time.Duration(v.now), Lowered: lowered}
}

// measure takes the mean of a window without a queue into best, and ends the probe.
func (v *Vegas) measure(now, calls float64) {
	if v.best == 0 {
		v.best = now
	}
	v.best += (now - v.best) * min(1, calls/100)
	v.halved, v.windows = false, 0
}

func (v *Vegas) move(by float64) { v.limit = v.clamp(v.limit + v.cfg.Smoothing*by) }

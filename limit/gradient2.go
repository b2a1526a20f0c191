// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package limit

import (
	"time"

	"github.com/belfry-go/belfry/internal/check"
)

// Gradient2Config configures [Gradient2]. The zero value is the default.
type Gradient2Config struct {
	// Initial, Min and Max are the initial limit and its bounds: 20, 20 and 200 if zero,
	// as Netflix's. 1 <= Min <= Initial <= Max.
	Initial, Min, Max int64
	// QueueSize is how many calls may queue in the server: what the limit grows by
	// when there is no sign of queueing, before smoothing. From 0.1 to 1000; 4 if
	// zero.
	QueueSize float64
	// Smoothing is how much of a new value enters the limit, from 0.01 to 1; 0.2 if
	// zero.
	Smoothing float64
	// Tolerance is how many times the long-term round trip is still no sign of
	// queueing, from 1 to 10; 1.5 if zero.
	Tolerance float64
	// LongWindow is the number of windows over which the long-term round trip is
	// averaged, from 10 to 1,000,000; 600 if zero.
	LongWindow int
	// BackoffRatio is the factor of the limit on a drop, from 0.5 to 0.99; 0.9 if zero.
	BackoffRatio float64
	// Window and WindowSamples are the least time and the least number of calls for
	// which samples are gathered before the limit is computed again: 1 s and 10 if
	// zero, as Netflix's WindowedLimit. They must not be negative.
	Window        time.Duration
	WindowSamples int
}

// Gradient2 is Netflix's algorithm of that name (concurrency-limits). It compares
// the round trip now with its long-term average:
//
//	gradient = max(0.5, min(1, Tolerance × long / now))
//	limit    = (1 - Smoothing) × limit + Smoothing × (gradient × limit + QueueSize)
//
// long is an exponential average over LongWindow windows; while it is more than
// twice the round trip now it is reduced by 5 % per window, to recover faster
// from a time of high latency. The limit stays while less than half of it is in
// use.
//
// Two things differ from the original. Windows count in long by their number of samples.
// And on a drop, which the original ignores, it backs off as [AIMD] does, because a server
// that refuses fast has the best round trip of all.
//
// Like the original it takes a lasting latency for the new normal, within about LongWindow
// windows: if clients always want more than the server can do, the limit creeps to Max.
// Use it, with Max, for a server that refuses what it cannot do; [Auto] is the better
// choice for others.
type Gradient2 struct {
	bounds
	cfg    Gradient2Config
	limit  float64
	window window
	long   average
	now    float64 // The mean of the last window.
	why    string  // Why the limit went down last.
	recovery
}

// withDefaults checks cfg and returns it with all fields set.
func (cfg Gradient2Config) withDefaults(errs *check.Errors) (Gradient2Config, bounds) {
	b := newBounds(errs, cfg.Initial, cfg.Min, cfg.Max, 20, 200)
	check.Default(errs, "QueueSize", &cfg.QueueSize, check.From(0.1, 1000), 4)
	check.Default(errs, "Smoothing", &cfg.Smoothing, check.From(0.01, 1), 0.2)
	check.Default(errs, "Tolerance", &cfg.Tolerance, check.From(1.0, 10), 1.5)
	check.Default(errs, "LongWindow", &cfg.LongWindow, check.From(10, 1_000_000), 600)
	check.Default(errs, "BackoffRatio", &cfg.BackoffRatio, check.From(0.5, 0.99), backoffRatio)
	check.Default(errs, "Window", &cfg.Window, check.Positive, defaultWindow)
	check.Default(errs, "WindowSamples", &cfg.WindowSamples, check.Positive, defaultWindowSamples)
	return cfg, b
}

// NewGradient2 returns a Gradient2 at its initial limit.
func NewGradient2(cfg Gradient2Config) (*Gradient2, error) {
	g := new(Gradient2)
	if err := g.Update(cfg); err != nil {
		return nil, err
	}
	g.limit = float64(g.initial)
	return g, nil
}

// Update changes the configuration and keeps the limit, within the new bounds,
// and the averages. On an error nothing has changed.
func (g *Gradient2) Update(cfg Gradient2Config) error {
	errs := check.Of("limit")
	cfg, b := cfg.withDefaults(errs.In("Gradient2"))
	if err := errs.Err(); err != nil {
		return err
	}
	g.bounds, g.cfg = b, cfg
	g.window.length, g.window.samples = cfg.Window, float64(cfg.WindowSamples)
	g.limit = b.clamp(g.limit)
	return nil
}

// Limit returns the current limit.
func (g *Gradient2) Limit() int64 { return int64(g.limit) }

// SetLimit moves the limit to n, or to the nearest bound.
func (g *Gradient2) SetLimit(n int64) { g.limit = g.clamp(float64(n)) }

// OnSample applies the formulas above when a window is complete.
func (g *Gradient2) OnSample(s Sample) {
	if s.Result == Dropped {
		if g.counts(s) {
			g.limit = g.clamp(g.limit * g.cfg.BackoffRatio)
			g.window.reset(s.end())
			g.why = becauseDrop
		}
		return
	}
	w := &g.window
	if !w.add(s, g.long.value) {
		return
	}
	now, inFlight := w.mean(), w.inFlight
	g.now = now
	long := g.long.add(now, w.size(), g.cfg.LongWindow)
	w.reset(s.end())
	if long/now > 2 {
		g.long.value *= 0.95
	}
	if float64(inFlight) < g.limit/2 {
		return
	}
	gradient := max(0.5, min(1, g.cfg.Tolerance*long/now))
	target := gradient*g.limit + g.cfg.QueueSize
	if target < g.limit {
		g.why = becauseLatency
	}
	g.limit = g.clamp((1-g.cfg.Smoothing)*g.limit + g.cfg.Smoothing*target)
}

// Explain returns the long-term round trip as the baseline.
func (g *Gradient2) Explain() State {
	return State{Baseline: time.Duration(g.long.value), Latency: time.Duration(g.now), Lowered: g.why}
}

// average is the mean of the samples of the first ten windows, and from then on an
// exponential average over n windows: a window with as many samples as usual has the
// weight 2/(n+1), others in proportion.
type average struct {
	value, usual float64
	windows      int
}

func (a *average) add(v, samples float64, n int) float64 {
	weight := 2 / float64(n+1)
	if a.windows < 10 {
		a.windows++
		weight = 1 / float64(a.windows)
	}
	a.usual += (samples - a.usual) * weight
	a.value += (v - a.value) * min(1, weight*samples/a.usual)
	return a.value
}

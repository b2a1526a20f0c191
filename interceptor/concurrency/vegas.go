// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package concurrency

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
	// again, from 10 to 1,000,000; 300 if zero.
	ProbeWindows int
	// Window and WindowSamples are the least time and the least number of successes for
	// which samples are gathered before the limit is computed again: 100 ms and 10 if
	// zero. They must not be negative.
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
// Two things differ from Netflix's. It acts on the mean of a window of samples, not on
// each. And when it measures the best round trip again, every ProbeWindows windows, it
// takes the best of the windows since the last time and not the next one, so that one
// slow window does not raise the limit.
type Vegas struct {
	bounds
	cfg    VegasConfig
	limit  float64
	window window
	recovery

	best    float64 // Round trip without queueing, in nanoseconds; 0 before the first window.
	next    float64 // The best since the last probe.
	windows int     // Since the last probe.
}

// withDefaults checks cfg and returns it with all fields set.
func (cfg VegasConfig) withDefaults(errs *check.Errors) (VegasConfig, bounds) {
	b := newBounds(errs, cfg.Initial, cfg.Min, cfg.Max)
	check.Default(errs, "Smoothing", &cfg.Smoothing, check.From(0.01, 1), 1)
	check.Default(errs, "ProbeWindows", &cfg.ProbeWindows, check.From(10, 1_000_000), 300)
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
	return v, nil
}

// Update changes the configuration and keeps the limit, within the new bounds,
// and the best round trip. On an error nothing has changed.
func (v *Vegas) Update(cfg VegasConfig) error {
	errs := check.Of("concurrency")
	cfg, b := cfg.withDefaults(errs.In("Vegas"))
	if err := errs.Err(); err != nil {
		return err
	}
	v.bounds, v.cfg = b, cfg
	v.window.length, v.window.samples = cfg.Window, cfg.WindowSamples
	v.limit = b.clamp(v.limit)
	return nil
}

// Limit returns the current limit.
func (v *Vegas) Limit() int64 { return int64(v.limit) }

func (v *Vegas) start(limit float64) { v.limit = v.clamp(limit) }

// OnSample applies the formulas above when a window is complete.
func (v *Vegas) OnSample(s Sample) {
	step := max(1, math.Floor(math.Log10(v.limit)))
	if s.Dropped {
		if v.counts(s) {
			v.move(-step)
			v.window.reset()
		}
		return
	}
	mean, inFlight, complete := v.window.add(s)
	if !complete {
		return
	}
	now := float64(mean)
	v.probe(now)
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
	}
}

// probe keeps best up to date with the round trip of a window.
func (v *Vegas) probe(now float64) {
	if v.next == 0 || now < v.next {
		v.next = now
	}
	if v.best == 0 || now < v.best {
		v.best = now
	}
	if v.windows++; v.windows >= v.cfg.ProbeWindows {
		v.best, v.next, v.windows = v.next, 0, 0
	}
}

func (v *Vegas) move(by float64) { v.limit = v.clamp(v.limit + v.cfg.Smoothing*by) }

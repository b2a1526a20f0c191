// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package limit

import (
	"time"

	"github.com/belfry-go/belfry/internal/check"
)

// AIMDConfig configures [AIMD]. The zero value is the default.
type AIMDConfig struct {
	// Initial, Min and Max are the initial limit and its bounds: 20, 1 and 1000 if zero.
	// 1 <= Min <= Initial <= Max.
	Initial, Min, Max int64
	// BackoffRatio is the factor of the limit on a drop, from 0.5 to 0.99; 0.9 if zero.
	BackoffRatio float64
	// Increase is how much the limit grows when as many calls as it allows have
	// succeeded, from 0.01 to 100; 1 if zero.
	Increase float64
	// Timeout makes a call that takes longer a drop, whether it succeeds or its caller
	// gives up. Zero means no such bound; it must not be negative.
	Timeout time.Duration
}

// AIMD is additive increase, multiplicative decrease, as TCP does it (Jacobson
// 1988; Chiu and Jain 1989 show that it is fair between clients):
//
//	on a success   limit += Increase/limit
//	on a drop      limit *= BackoffRatio, once for all drops of calls that were
//	               running at the time
//
// Successes count only while at least half the limit is in use, because a client that
// does not use its limit cannot tell whether the server would bear more.
//
// It looks at latency only through Timeout, so it finds the limit of a server
// that refuses or times out when overloaded, by running into it now and then.
// Drops that have nothing to do with load hold it down as well: with a share p of
// them, and the defaults, it settles near sqrt(10/p) however idle the server is.
type AIMD struct {
	bounds
	cfg   AIMDConfig
	limit float64
	why   string // Why the limit went down last.
	recovery
}

// withDefaults checks cfg and returns it with all fields set.
func (cfg AIMDConfig) withDefaults(errs *check.Errors) (AIMDConfig, bounds) {
	b := newBounds(errs, cfg.Initial, cfg.Min, cfg.Max, defaultMin, defaultMax)
	check.Default(errs, "BackoffRatio", &cfg.BackoffRatio, check.From(0.5, 0.99), backoffRatio)
	check.Default(errs, "Increase", &cfg.Increase, check.From(0.01, 100), 1)
	check.Zero(errs, "Timeout", cfg.Timeout, check.Positive, "none")
	return cfg, b
}

// NewAIMD returns an AIMD at its initial limit.
func NewAIMD(cfg AIMDConfig) (*AIMD, error) {
	a := new(AIMD)
	if err := a.Update(cfg); err != nil {
		return nil, err
	}
	a.limit = float64(a.initial)
	return a, nil
}

// Update changes the configuration and keeps the limit, within the new bounds.
// On an error nothing has changed.
func (a *AIMD) Update(cfg AIMDConfig) error {
	errs := check.Of("limit")
	cfg, b := cfg.withDefaults(errs.In("AIMD"))
	if err := errs.Err(); err != nil {
		return err
	}
	a.bounds, a.cfg = b, cfg
	a.limit = b.clamp(a.limit)
	return nil
}

// Limit returns the current limit.
func (a *AIMD) Limit() int64 { return int64(a.limit) }

// SetLimit moves the limit to n, or to the nearest bound.
func (a *AIMD) SetLimit(n int64) { a.limit = a.clamp(float64(n)) }

// Explain says why the limit went down. AIMD compares no latencies.
func (a *AIMD) Explain() State { return State{Lowered: a.why} }

// OnSample applies the formulas above.
func (a *AIMD) OnSample(s Sample) {
	switch {
	case s.Result == Dropped || s.Result != Void && a.cfg.Timeout > 0 && s.RTT > a.cfg.Timeout:
		if a.counts(s) {
			a.limit = a.clamp(a.limit * a.cfg.BackoffRatio)
			a.why = becauseDrop
			if s.Result != Dropped {
				a.why = becauseLatency
			}
		}
	case s.Result == Succeeded && float64(s.InFlight)*2 >= float64(a.Limit()):
		a.limit = a.clamp(a.limit + a.cfg.Increase/a.limit)
	}
}

// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package load

import (
	"fmt"
	"math"
	"time"
)

// An Instant is a point in time, in nanoseconds of a monotonic clock since an
// origin that the owner of the Metric chooses. All Instants given to the Meters
// of one Metric share the origin.
type Instant int64

// A Metric makes the Meters of one channel. What its endpoints share, such as
// the mean latency of them all, lives in it. It is safe for concurrent use.
type Metric interface {
	// NewMeter returns the Meter of one more endpoint.
	NewMeter() Meter
}

// A Meter measures one endpoint. It is safe for concurrent use, and its methods
// neither block nor allocate.
type Meter interface {
	// Load says how busy the endpoint is now: the endpoint with the lower load is
	// picked. It is finite and never negative.
	Load(now Instant) float64

	// Start says that an attempt was sent to the endpoint. Every Start is
	// followed by exactly one Finish with the Ticket that it returned.
	Start(now Instant) Ticket

	// Respond says that the first response message of an attempt arrived, of an
	// attempt that goes on. It is called at most once for an attempt and only for
	// streams: the time to the first message is their latency, but they count as
	// pending until they end.
	Respond(now Instant, t Ticket)

	// Finish says that an attempt ended. It may come after Close.
	Finish(now Instant, s Sample)

	// Close says that the endpoint is gone: it no longer counts as one of the
	// channel's endpoints. It is called at most once.
	Close()
}

// A Ticket is what a Meter has to be told again about an attempt when it ends.
// It is a plain value; only the Meter that made it can read it.
type Ticket struct {
	started Instant // when the attempt was sent
	pending uint32  // attempts in flight to the endpoint when it was sent, itself not counted
	weight  uint32  // what the latency is multiplied by, fixed point, see weightOne
	epoch   uint32  // the generation of ages that it was counted in
}

// A Sample is how an attempt ended.
type Sample struct {
	// Ticket is what Start returned for the attempt.
	Ticket Ticket
	// Outcome is how it ended.
	Outcome Outcome
	// Responded is whether Respond was called for the attempt, so that its
	// latency has been taken already.
	Responded bool
}

// Outcome is how an attempt ended, as far as the load of its endpoint goes.
type Outcome uint8

const (
	// Completed is an attempt that the endpoint answered. Its latency counts.
	Completed Outcome = iota
	// Failed is an attempt that the server or the path to it failed, a deadline
	// that passed included. However fast it failed, it never makes the endpoint
	// look fast.
	Failed
	// Cancelled is an attempt that its caller gave up, such as the loser of a
	// hedge. It counts as pending until it ends. However early that is, it never
	// makes the endpoint look fast, and it is no failure. That it took so long may
	// count: each Metric says how.
	Cancelled
	// NotSent is an attempt that never left. It undoes the Start.
	NotSent
)

// String returns the name of the outcome in lower case.
func (o Outcome) String() string {
	switch o {
	case Completed:
		return "completed"
	case Failed:
		return "failed"
	case Cancelled:
		return "cancelled"
	case NotSent:
		return "not_sent"
	default:
		return fmt.Sprintf("outcome(%d)", uint8(o))
	}
}

// A Weight is the relative capacity of an endpoint: one of weight 2 takes twice
// the load of one of weight 1 before it counts as equally busy. Only the ratio
// of weights matters. The zero Weight says that none is known and counts as 1.
type Weight uint32

// Value returns the weight as a number, 1 for the zero Weight.
func (w Weight) Value() float64 {
	if w == 0 {
		return 1
	}
	return float64(w)
}

// Divide returns a load in proportion to the capacity that bears it.
func (w Weight) Divide(load float64) float64 { return load / w.Value() }

// A ConfigError says which parameter of a Metric is out of its range.
type ConfigError struct {
	Field string // the name of the parameter in a service config, such as "decay"
	Value any
	Rule  string // what the value must be
}

// Error names the field, the value and the rule.
func (e *ConfigError) Error() string {
	return fmt.Sprintf("load: %s: %v, must be %s", e.Field, e.Value, e.Rule)
}

// checkRange returns an error unless lo <= v <= hi. NaN is in no range.
func checkRange(field string, v, lo, hi float64) error {
	if v >= lo && v <= hi {
		return nil
	}
	return &ConfigError{field, v, fmt.Sprintf("between %v and %v", lo, hi)}
}

// checkPositive is checkRange for numbers that must be above zero.
func checkPositive(field string, v, hi float64) error {
	if v > 0 && v <= hi {
		return nil
	}
	return &ConfigError{field, v, fmt.Sprintf("above 0 and at most %v", hi)}
}

// checkDuration returns an error unless d is above zero.
func checkDuration(field string, d time.Duration) error {
	if d > 0 {
		return nil
	}
	return &ConfigError{field, d, "above 0s"}
}

// latency returns the time from the start of an attempt until now, at least one
// nanosecond, for a clock that stands still has measured nothing.
func (t Ticket) latency(now Instant) float64 {
	return float64(max(now-t.started, 1))
}

// The penalty of a failure counts as this many times the mean latency unless
// configured otherwise.
const (
	defaultFailurePenalty = 10
	maxFailurePenalty     = 1e6
)

func checkFailurePenalty(v float64) error {
	return checkRange("failurePenalty", v, 1, maxFailurePenalty)
}

func bits32(hi, lo float64) uint64 {
	return uint64(math.Float32bits(float32(hi)))<<32 | uint64(math.Float32bits(float32(lo)))
}

func floats32(w uint64) (hi, lo float64) {
	return float64(math.Float32frombits(uint32(w >> 32))), float64(math.Float32frombits(uint32(w)))
}

// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package load

import "math"

// Constant is the same load for every endpoint and for ever. With it a policy
// that picks the least of a few chooses at random.
type Constant struct{ load float64 }

// NewConstant returns a Metric whose endpoints have the given load, which must
// be finite and not negative.
func NewConstant(load float64) (*Constant, error) {
	if !(load >= 0 && load <= math.MaxFloat64) {
		return nil, &ConfigError{"load", load, "finite and at least 0"}
	}
	return &Constant{load: load}, nil
}

// NewMeter returns the Meter of one more endpoint.
func (c *Constant) NewMeter() Meter { return c }

// Load returns the constant.
func (c *Constant) Load(Instant) float64 { return c.load }

// Start does nothing: a constant does not depend on what is in flight.
func (c *Constant) Start(Instant) Ticket { return Ticket{} }

// Respond does nothing.
func (c *Constant) Respond(Instant, Ticket) {}

// Finish does nothing.
func (c *Constant) Finish(Instant, Sample) {}

// Close does nothing.
func (c *Constant) Close() {}

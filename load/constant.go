// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package load

import "math"

// Constant is the same load for every endpoint, always. With it the policy picks at
// random, in proportion to the weights.
type Constant struct {
	MetricBase
	load float64
}

// NewConstant returns a Metric whose endpoints have the given load, in no unit. The load
// must be finite and at least 0; otherwise the error is a *[ConfigError].
func NewConstant(load float64) (*Constant, error) {
	if !(load >= 0 && load <= math.MaxFloat64) {
		return nil, &ConfigError{"load", load, "finite and at least 0"}
	}
	return &Constant{load: load}, nil
}

// NewMeter returns the Meter of one more endpoint.
func (c *Constant) NewMeter(Endpoint) Meter { return &constantMeter{load: c.load} }

type constantMeter struct {
	MeterBase
	load float64
}

func (c *constantMeter) Load(Query) Estimate { return Estimate{Cost: c.load, Good: forever} }

func (*constantMeter) Start(*Attempt) Ticket { return Ticket{} }

func (*constantMeter) Finish(*Sample) bool { return false }

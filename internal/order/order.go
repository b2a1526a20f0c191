// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

// Package order says what the order of a stack's layers means.
package order

import (
	"fmt"
	"time"
)

// A Layer is what the order depends on. [interceptor.Traits] says what the flags mean.
type Layer struct {
	Name    string
	Waits   bool
	Decides bool
	Governs bool
	Sheds   bool // And for every call.
	Retries bool
	Hedges  bool
	Timeout time.Duration // Zero if it has none.
}

// Advice returns what is legal in the order of layers and surprising, one sentence each.
// layers[0] is the outermost.
func Advice(layers []Layer) (advice []string) {
	say := func(format string, args ...any) { advice = append(advice, fmt.Sprintf(format, args...)) }
	for i, outer := range layers {
		inside := layers[i+1:]
		shed := false // Inside a load shed, where nothing waits.
		for _, inner := range inside {
			if inner.Governs {
				shed = inner.Sheds
			}
			// A rate both waits and decides: two rates are right in any order.
			if !shed && outer.Decides && inner.Waits && !(outer.Waits && inner.Decides) {
				say("%s is outside %s: it decides when a call arrives and not when it is sent, so calls that it let pass wait and are sent later, when its decision may be wrong; put it inside", outer.Name, inner.Name)
				break
			}
		}
		for _, inner := range inside {
			if inner.Waits || !outer.Governs {
				break
			}
			if inner.Sheds {
				say("%s is outside %s, which lets no call wait: it never acts; put it inside", outer.Name, inner.Name)
				break
			}
		}
		for _, inner := range inside {
			if outer.Retries && inner.Retries || outer.Hedges && inner.Hedges {
				say("%s is outside %s: each of its attempts makes attempts of its own, so a call makes up to as many as both multiplied; leave one out", outer.Name, inner.Name)
			}
			if outer.Retries && inner.Hedges {
				say("%s is outside %s: each of its attempts may be hedged, so a call makes up to as many attempts as both multiplied; put the hedge outside", outer.Name, inner.Name)
			}
			if outer.Timeout > 0 && inner.Timeout >= outer.Timeout {
				say("%s (%v) is inside %s (%v), which ends first: it never acts; give it less time", inner.Name, inner.Timeout, outer.Name, outer.Timeout)
			}
		}
	}
	return advice
}

// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package p2c

import (
	"math"
	"slices"
	"time"

	configv1 "github.com/belfry-go/belfry/proto/belfry/config/v1"
)

// This file is what the field slowStart does: the weight of an endpoint that is new, or was
// away, rises over a window. A weight is a share of the draws and of what is in flight, so
// an endpoint that looks idle gets no more than that, and one that looks dear no less.

const (
	defaultRampWindow = 30 * time.Second
	defaultRampFloor  = 0.1
	minRampFloor      = 0.01

	// A weight rises in so many steps, and at least every second.
	rampSteps = 64
	rampEvery = time.Second

	// While there is a slow start weights are counted in parts, so that a part of 1 can be
	// told, as far as the greatest weight has room for them in 31 bits.
	rampParts = 1 << 10
)

// slowStartConfig is the parsed form of belfry.config.v1.SlowStart. Immutable.
type slowStartConfig struct {
	window time.Duration
	floor  float64
}

// newSlowStartConfig returns nil without an error if there is none.
func newSlowStartConfig(m *configv1.SlowStart) (*slowStartConfig, error) {
	if m == nil {
		return nil, nil
	}
	c := &slowStartConfig{floor: defaultRampFloor}
	var err error
	if c.window, err = durationBetween("slowStart.window", m.GetWindow(), defaultRampWindow, minWindow, maxWindow); err != nil {
		return nil, err
	}
	if m.Floor != nil {
		if c.floor = m.GetFloor(); !(c.floor >= minRampFloor && c.floor <= 1) {
			return nil, configError("slowStart.floor", c.floor, "between 0.01 and 1")
		}
	}
	return c, nil
}

// part returns which part of its share an endpoint has after a time.
func (c *slowStartConfig) part(after time.Duration) float64 {
	return min(max(c.floor, float64(after)/float64(c.window)), 1)
}

// ramps is the endpoints whose share rises. policy.mu guards it.
type ramps struct {
	parts     uint64 // in how many a weight of 1 is counted; 1 without a slow start
	endpoints []*endpoint
	ticking   bool
}

// rampLocked makes the share of the endpoint rise from now on, if the config says so.
func (ep *endpoint) rampLocked() {
	b := ep.policy
	ep.cold = false
	cfg := b.picker.config.slowStart
	if cfg == nil {
		return
	}
	if !ep.ramping {
		ep.ramping = true
		b.ramps.endpoints = append(b.ramps.endpoints, ep)
		b.metrics.ramping(1)
	}
	ep.rampFrom = b.now()
	ep.weighLocked()
	logger.Infof("%s: endpoint %s starts slowly, over %v", b.opts.Target.String(), ep.addr, cfg.window)
	if !b.ramps.ticking {
		b.ramps.ticking = true
		b.after(cfg.step(), b.stepRamps)
	}
}

func (c *slowStartConfig) step() time.Duration { return min(c.window/rampSteps, rampEvery) }

// stepRamps raises the shares, until all have risen.
func (b *policy) stepRamps() {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.closed {
		return
	}
	b.stepRampsLocked()
	cfg := b.picker.config.slowStart
	if b.ramps.ticking = cfg != nil && len(b.ramps.endpoints) > 0; b.ramps.ticking {
		b.after(cfg.step(), b.stepRamps)
	}
}

func (b *policy) stepRampsLocked() {
	cfg := b.picker.config.slowStart
	b.ramps.endpoints = slices.DeleteFunc(b.ramps.endpoints, func(ep *endpoint) bool {
		if ep.ramping && (cfg == nil || ep.partLocked() == 1) {
			ep.endRampLocked()
			logger.Infof("%s: endpoint %s has all of its share", b.opts.Target.String(), ep.addr)
		}
		ep.weighLocked()
		return !ep.ramping
	})
}

func (ep *endpoint) endRampLocked() {
	if ep.ramping {
		ep.ramping = false
		ep.policy.metrics.ramping(-1)
	}
}

// partLocked returns which part of its share the endpoint has.
func (ep *endpoint) partLocked() float64 {
	cfg := ep.policy.picker.config.slowStart
	if !ep.ramping || cfg == nil {
		return 1
	}
	return cfg.part(time.Duration(ep.policy.now() - ep.rampFrom))
}

// weighLocked gives the endpoint its weight in the READY set.
func (ep *endpoint) weighLocked() {
	w := float64(uint64(ep.weight)*ep.policy.ramps.parts) * ep.partLocked()
	if weight := uint32(min(max(w, 1), math.MaxUint32)); weight != ep.candidate.weight.Load() {
		ep.policy.ready.reweigh(ep.candidate, weight)
		ep.candidate.changed()
	}
}

// countParts sets in how many parts weights are counted.
func (b *policy) countParts() {
	b.mu.Lock()
	defer b.mu.Unlock()
	parts := uint64(1)
	if b.picker.config.slowStart != nil {
		heaviest := uint64(1)
		for _, ep := range b.endpoints.All() {
			heaviest = max(heaviest, ep.capacity)
		}
		parts = min(max(math.MaxInt32/heaviest, 1), rampParts)
	}
	if parts != b.ramps.parts {
		b.ramps.parts = parts
		for _, ep := range b.endpoints.All() {
			ep.weighLocked()
		}
	}
}

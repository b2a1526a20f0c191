// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package p2c

import (
	"math"
	"slices"
	"time"

	configv1 "github.com/belfry-go/belfry/proto/belfry/config/v1"
)

// This file implements the field slowStart. The weight of an endpoint that is new, or comes
// back, rises over a window. A weight is a share of the draws and of the attempts in flight. So
// the endpoint gets no more than that share if it looks idle, and no less if it looks slow.

const (
	defaultRampWindow = 30 * time.Second
	defaultRampFloor  = 0.1
	minRampFloor      = 0.01

	// A weight rises in rampSteps steps, or in more if these would be longer than rampEvery.
	rampSteps = 64
	rampEvery = time.Second

	// With a slow start a weight of 1 counts as rampParts, so that it can be divided, or as
	// fewer if the greatest weight would not fit in 31 bits.
	rampParts = 1 << 10
)

// slowStartConfig is the parsed form of belfry.config.v1.SlowStart. Immutable.
type slowStartConfig struct {
	window time.Duration
	floor  float64
}

// newSlowStartConfig returns nil, without an error, if there is no slow start.
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

// part returns the part of its share that an endpoint has after a time, from floor to 1.
func (c *slowStartConfig) part(after time.Duration) float64 {
	return min(max(c.floor, float64(after)/float64(c.window)), 1)
}

// ramps is the endpoints whose share rises. policy.mu guards it.
type ramps struct {
	parts     uint64      // as how much a weight of 1 counts; 1 without a slow start
	endpoints []*endpoint // those whose share rises
	ticking   bool        // whether a timer for stepRamps is set
}

// rampLocked starts a slow start of the endpoint, if the config has one.
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

// step returns the time between two steps.
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

// partLocked returns the part of its share that the endpoint has now, from 0.01 to 1.
func (ep *endpoint) partLocked() float64 {
	cfg := ep.policy.picker.config.slowStart
	if !ep.ramping || cfg == nil {
		return 1
	}
	return cfg.part(time.Duration(ep.policy.now() - ep.rampFrom))
}

// weighLocked sets the weight of the endpoint in the READY set.
func (ep *endpoint) weighLocked() {
	w := float64(uint64(ep.weight)*ep.policy.ramps.parts) * ep.partLocked()
	if weight := uint32(min(max(w, 1), math.MaxUint32)); weight != ep.candidate.weight.Load() {
		ep.policy.ready.reweigh(ep.candidate, weight)
		ep.candidate.changed()
	}
}

// countParts sets ramps.parts from the greatest weight.
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

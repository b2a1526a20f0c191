// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package p2c

import (
	"github.com/belfry-go/belfry/internal/attempt"
	"github.com/belfry-go/belfry/load"
)

// chooseAgain is chooseAny for a call that has tried endpoints, without memory. It looks at
// choices endpoints that the call has not tried, and at the tried ones that it draws. The
// cheapest tried endpoint is chosen if it costs less than the others even at costlier times
// its cost, and if the call has not gone back to it before. Otherwise all attempts of a call
// could go to an endpoint that hangs: beside endpoints with long streams it may look cheap
// for long.
func (p *picker) chooseAgain(now load.Instant, call call, tried *attempt.Tried) *candidate {
	v := p.ready.view()
	n, d := len(v.slots), p.config.choices
	if n == 0 {
		return nil
	}
	r := random(p.policy.random())
	others, before := selection{picker: p, call: call, random: r}, selection{picker: p, call: call, random: r}
	home := 0
	if p.config.zones != nil {
		home = min(int(p.ready.home.Load()), n)
		others.home, before.home = int32(home), int32(home)
	}
	look := func(c *candidate) {
		s := &others
		if c != nil && tried.Has(c.id()) {
			s = &before
		}
		if s.count < d && !s.has(c) {
			s.add(c)
		}
	}
	// A call tries few endpoints, so 2*d draws find d others as a rule. With at most 2*d
	// endpoints it looks at all of them, so that it finds the tried ones too.
	few := n <= 2*d
	if !few {
		for i := 0; home > 0 && i < p.config.zones.draws; i++ {
			look(v.slots[v.drawOf(&others.random, home)].Load())
		}
		for i := 0; i < 2*d && others.count < d; i++ {
			k := 0
			if p.ready.unequal.Load() {
				k = v.draw(&others.random)
			} else {
				k = int(others.random.below(uint32(n)))
			}
			look(v.slots[k].Load())
		}
	}
	first := int(others.random.below(uint32(n)))
	for i := 0; i < n && (few || others.count < d); i++ {
		look(v.slots[(first+i)%n].Load())
	}
	others.drawn, before.drawn = others.count, before.count
	c, back := others.choose(now), before.choose(now)
	if c == nil || back != nil && tried.Times(back.id()) == 1 && p.price(back, now, costlier) < p.price(c, now, 1) {
		return back
	}
	return c
}

// costlier is how many times as much an endpoint costs a call that has tried it. In a
// simulation in virtual time, with two endpoints, retries at once and calls of 10 ms in the
// mean:
//
//   - One endpoint fails at once, and looks idle to pendingRequests. Of 6,000 calls with
//     three attempts 2,460 fail at a factor of 1, 276 at 4, 19 at 8, 4 at 10, and none if
//     the endpoint is never picked again. With the default metric none fails at any factor.
//   - Each endpoint fails a tenth of its attempts, and one is 15 times slower. With the
//     default metric the mean latency is 19 ms at 1, 26 at 4, 32 at 8, 34 at 10, and 52 if
//     the call never goes back.
const costlier = 10

// price returns the cost of a candidate times a factor. With pendingRequests an idle endpoint
// costs 1 here, because 0 times a factor would be 0.
func (p *picker) price(c *candidate, now load.Instant, factor float32) float32 {
	l := c.look(p, now)
	if p.config.zones != nil && p.isAway(c) {
		l = p.awayCost(l)
	}
	if p.config.counts {
		l = max(l, 1)
	}
	return l * factor
}

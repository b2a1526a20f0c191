// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package concurrency

import (
	"math/bits"
	"sync"
	"sync/atomic"
	"time"

	"github.com/belfry-go/belfry/interceptor"
)

// heavy lets heavy calls through where calls may not wait. There a light call takes each
// permit as it comes back, so that the permits for a heavy one never come together. Calls
// are told apart by the magnitude of their cost. For each magnitude
//
//	credit grows   by the greatest share of admitted calls among the lighter ones,
//	               with each call that arrives
//	       shrinks by 1 with each call that is admitted
//
// While the credit is 1 or more, permits for one such call are kept from lighter calls, so
// that they come together for the next one that arrives. So heavy calls are admitted as
// often as lighter ones. It is deficit round robin (Shreedhar and Varghese 1995), without
// a queue: the credit is what a queue would remember.
//
// Until a heavy call is refused there is nothing to keep, and admission reads one word.
type heavy struct {
	active atomic.Bool // A heavy call was refused not long ago.

	mu         sync.Mutex       // Guards magnitudes.
	magnitudes []heavyMagnitude // Nil until a heavy call is refused for the first time.
}

// heavyMagnitude is what is known of calls that cost from 2^n to 2^(n+1)-1 permits.
type heavyMagnitude struct {
	calls    float64             // How many calls share stands for, at most heavySmoothing.
	share    float64             // Of the calls that arrived lately, how many were admitted.
	credit   float64             // From -heavyCredit to heavyCredit.
	seen     interceptor.Instant // When the last call arrived.
	cost     int64               // What the last call that was refused costs,
	priority int                 // and its priority.
}

const (
	heavyMagnitudes = 31 // Costs are at most maxLimit.
	heavySmoothing  = 100
	heavyCredit     = 2
	// heavyHold is how long permits are kept for a magnitude without calls, and
	// heavyForget after how long none is remembered.
	heavyHold   = time.Second
	heavyForget = 10 * time.Second
)

func magnitude(cost int64) int { return bits.Len64(uint64(cost)) - 1 }

// against returns how many permits are kept from a call.
func (h *heavy) against(cost int64, priority int, now interceptor.Instant) (keep int64) {
	h.mu.Lock()
	defer h.mu.Unlock()
	for m := magnitude(cost) + 1; m < len(h.magnitudes); m++ {
		if g := &h.magnitudes[m]; g.credit >= 1 && g.priority >= priority && now.Sub(g.seen) < heavyHold {
			keep = max(keep, g.cost)
		}
	}
	return keep
}

// arrived learns from a call that was admitted or refused.
func (h *heavy) arrived(cost int64, priority int, admitted bool, now interceptor.Instant) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.magnitudes == nil {
		h.magnitudes = make([]heavyMagnitude, heavyMagnitudes)
	}
	lighter, remembered := 0.0, false
	for m := range magnitude(cost) {
		if g := &h.magnitudes[m]; now.Sub(g.seen) < heavyForget {
			lighter = max(lighter, g.share)
		}
	}
	g := &h.magnitudes[magnitude(cost)]
	if now.Sub(g.seen) >= heavyForget {
		*g = heavyMagnitude{}
	}
	g.seen = now
	g.calls = min(g.calls+1, heavySmoothing)
	g.credit = min(g.credit+lighter, heavyCredit)
	if admitted {
		g.share += (1 - g.share) / g.calls
		g.credit = max(g.credit-1, -heavyCredit)
	} else {
		g.share -= g.share / g.calls
		g.cost, g.priority = cost, priority
	}
	for m := 1; m < heavyMagnitudes; m++ {
		remembered = remembered || now.Sub(h.magnitudes[m].seen) < heavyForget
	}
	h.active.Store(remembered)
}

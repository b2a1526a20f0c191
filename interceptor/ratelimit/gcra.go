// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package ratelimit

import (
	"math"
	"slices"
	"sync"
	"sync/atomic"

	"github.com/belfry-go/belfry/interceptor"
)

// unit is how many parts of a nanosecond a gcra counts in, so that a rate of ten
// million calls a second is met to a quarter of a percent. More would not leave room
// for the Instants of virtual time, which start at some thirty years.
const unit = 4

// gcra is the generic cell rate algorithm in its form of virtual scheduling
// (ITU-T I.371, annex A). With T the interval between tokens and τ = Burst·T, a
// call at t conforms if
//
//	TAT' - t <= τ    where TAT' = max(TAT, t) + T
//
// and moves the theoretical arrival time TAT to TAT'. It is a token bucket that
// holds (t+τ-max(TAT,t))/T tokens, in one word.
//
// The standard writes τ-T for what is τ here, the tolerance besides the first
// call's own interval.
//
// A token is a slot: the T units of time from max(TAT,t) on. The slot of a call at t
// starts between t and t+τ-T, and slots do not overlap. Whatever is given back and
// taken again, no more than Burst + d/T calls can be admitted in an interval of
// length d as long as this holds, because their slots lie in an interval of length
// d+τ. So a slot that is given back is free for another call if it starts in the
// future, and lost if it does not: the bucket could have refilled without it. The
// last slot is given back at any time, by moving TAT to its start.
type gcra struct {
	tat  atomic.Int64 // In units since the epoch of Instants; 0 is a full bucket.
	rate atomic.Pointer[params]
	// settled is TAT as it was before the last update. Tokens of slots before it are not
	// given back, because they may be of the old rate.
	settled atomic.Int64

	frees atomic.Int64 // The length of free. Written under mu.
	mu    sync.Mutex   // Guards free. Nothing is locked under it.
	free  []int64      // The starts of free slots before TAT, sorted.
}

func newGCRA(p *params) *gcra {
	g := new(gcra)
	g.rate.Store(p)
	return g
}

// take returns the start of the slot that it takes.
func (g *gcra) take(now interceptor.Instant) (slot int64, ok bool) {
	p, t := g.rate.Load(), int64(now)*unit
	if g.frees.Load() > 0 {
		if slot, ok := g.takeFree(t); ok {
			return slot, true
		}
	}
	for {
		tat := g.tat.Load()
		slot = max(tat, t)
		if slot+p.interval-t > p.tolerance {
			return 0, false
		}
		if g.tat.CompareAndSwap(tat, slot+p.interval) {
			return slot, true
		}
	}
}

// takeFree takes the first free slot.
func (g *gcra) takeFree(t int64) (slot int64, ok bool) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.dropStartedLocked(t) == 0 {
		return 0, false
	}
	slot = g.free[0]
	g.setFreeLocked(g.free[1:])
	return slot, true
}

// dropStartedLocked drops the free slots that have started by t, and returns how
// many there are then. Caller must hold g.mu.
func (g *gcra) dropStartedLocked(t int64) int {
	if i, _ := slices.BinarySearch(g.free, t); i > 0 {
		g.setFreeLocked(g.free[i:])
	}
	return len(g.free)
}

// setFreeLocked sets the free slots. Caller must hold g.mu.
func (g *gcra) setFreeLocked(free []int64) {
	if len(free) == 0 {
		free = nil
	}
	g.free = free
	g.frees.Store(int64(len(free)))
}

func (g *gcra) next(now interceptor.Instant, ahead int) interceptor.Instant {
	p, t := g.rate.Load(), int64(now)*unit
	if g.frees.Load() > 0 {
		g.mu.Lock()
		free := g.dropStartedLocked(t)
		g.mu.Unlock()
		if ahead < free {
			return now
		}
		ahead -= free
	}
	tat := max(g.tat.Load(), t)
	n := int64(ahead) + 1
	if n > (math.MaxInt64-tat)/p.interval {
		return never
	}
	turn := tat + n*p.interval - p.tolerance
	return max(now, interceptor.Instant((turn+unit-1)/unit))
}

func (g *gcra) refund(slot int64) {
	p := g.rate.Load()
	if slot < g.settled.Load() {
		return
	}
	if g.tat.CompareAndSwap(slot+p.interval, slot) {
		if g.frees.Load() > 0 {
			g.joinFree(p)
		}
		return
	}
	t := int64(interceptor.Now()) * unit
	if slot < t {
		return
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	g.dropStartedLocked(t)
	i, _ := slices.BinarySearch(g.free, slot)
	g.setFreeLocked(slices.Insert(g.free, i, slot))
}

// joinFree moves TAT before the free slots that are the last ones.
func (g *gcra) joinFree(p *params) {
	g.mu.Lock()
	defer g.mu.Unlock()
	for n := len(g.free); n > 0; n-- {
		last := g.free[n-1]
		if !g.tat.CompareAndSwap(last+p.interval, last) {
			return
		}
		g.setFreeLocked(g.free[:n-1])
	}
}

func (g *gcra) full(now interceptor.Instant) bool { return g.tat.Load() <= int64(now)*unit }

// update keeps the number of tokens that are missing from the bucket. A call that
// takes one at the same time may take it at the old rate.
func (g *gcra) update(now interceptor.Instant, p *params) {
	g.mu.Lock()
	defer g.mu.Unlock()
	old, t := g.rate.Swap(p), int64(now)*unit
	free := float64(g.dropStartedLocked(t))
	g.setFreeLocked(nil)
	for {
		tat := g.tat.Load()
		missing := float64(max(tat-t, 0))/float64(old.interval) - free
		missing = min(max(missing, 0), float64(p.burst))
		if g.tat.CompareAndSwap(tat, t+int64(math.Ceil(missing*float64(p.interval)))) {
			g.settled.Store(tat)
			return
		}
	}
}

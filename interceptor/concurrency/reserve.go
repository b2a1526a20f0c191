// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package concurrency

import (
	"math"
	"sync"
	"sync/atomic"
	"time"

	"github.com/belfry-go/belfry/interceptor"
)

// reserve keeps permits free for calls of higher priorities, where calls may not wait
// and so a queue cannot let them go first. Telephone exchanges call it trunk
// reservation; of all ways of preferring calls it costs the others least (Miller 1969).
// A call is admitted only while more than so many permits are free:
//
//	keep = the greatest kept of the higher priorities
//
// kept adjusts itself. For each priority it
//
//	grows   by reserveStep × min(1, 2 × share) when a call is refused because no permit
//	        is free, where share is the part of the permits in use that calls of lower
//	        priorities hold
//	shrinks by reserveStep × reserveLoss/(1-reserveLoss) when a call is admitted
//
// so it settles where about reserveLoss of the calls are refused. More are refused if
// calls of the priority itself hold most permits, because keeping permits helps less
// then. The permits of a priority without calls go back to all within seconds.
//
// Until calls of two priorities were refused there is nothing to keep, and admission
// reads one word.
type reserve struct {
	levels atomic.Pointer[[reserveLevels]reserveLevel] // Nil until permits are kept for the first time.
	active atomic.Bool                                 // Permits are kept for somebody.
	lowest atomic.Int64                                // The lowest priority of a refused call.

	mu sync.Mutex // Orders changes of which levels there are.
}

// reserveLevel is a priority for which permits are kept. A limiter has a few, which are
// reused.
type reserveLevel struct {
	priority atomic.Int64  // noLevel if it is not used.
	kept     atomic.Uint64 // How many permits: the bits of a float64.
	seen     atomic.Int64  // The Instant of the last call.
	inUse    atomic.Int64  // Permits that calls of the level hold.
}

const (
	reserveLevels = 7
	reserveLoss   = 0.025
	reserveStep   = 0.25
	reserveGain   = reserveStep * reserveLoss / (1 - reserveLoss)

	// reserveHold is how long permits are kept for a priority without calls. After that
	// they halve every reserveHalf. After reserveForget the priority is forgotten.
	reserveHold   = time.Second
	reserveHalf   = 500 * time.Millisecond
	reserveForget = 10 * time.Second

	noLevel = math.MinInt64
)

func (r *reserve) init() { r.lowest.Store(math.MaxInt64) }

// against returns how many permits are kept from calls of a priority.
func (r *reserve) against(priority int, now interceptor.Instant) (keep int64) {
	levels := r.levels.Load()
	forgotten := true
	for i := range levels {
		l := &levels[i]
		p := l.priority.Load()
		if p == noLevel {
			continue
		}
		forgotten = forgotten && l.unseen(now) >= reserveForget
		if p > int64(priority) {
			keep = max(keep, int64(l.at(now)))
		}
	}
	if forgotten {
		r.active.Store(false)
	}
	return keep
}

// admitted learns from a call that got its permits. It returns the number of its level
// for released, from 1; 0 if it has none.
func (r *reserve) admitted(priority int, cost int64, now interceptor.Instant) int64 {
	l, i := r.level(priority)
	if l == nil {
		return 0
	}
	l.inUse.Add(cost)
	l.add(-reserveGain, math.MaxInt64, now)
	return i
}

// released records that a call of a level gave its permits back.
func (r *reserve) released(level, cost int64) {
	if level != 0 {
		r.levels.Load()[level-1].inUse.Add(-cost)
	}
}

// refused learns from a call that got no permits while inUse of limit were taken.
func (r *reserve) refused(priority int, inUse, limit int64, now func() interceptor.Instant) {
	p := int64(priority)
	lowest := r.lowest.Load()
	for p < lowest && !r.lowest.CompareAndSwap(lowest, p) {
		lowest = r.lowest.Load()
	}
	if p <= lowest {
		return
	}
	l, _ := r.level(priority)
	if l == nil {
		if l = r.addLevel(priority, now()); l == nil {
			return
		}
	}
	lower := inUse
	levels := r.levels.Load()
	for i := range levels {
		if levels[i].priority.Load() >= p {
			lower -= levels[i].inUse.Load()
		}
	}
	share := float64(max(lower, 0)) / float64(max(inUse, 1))
	l.add(reserveStep*min(1, 2*share), limit-1, now())
	if !r.active.Load() {
		r.active.Store(true)
	}
}

// level returns the level of a priority and its number, nil and 0 if it has none.
func (r *reserve) level(priority int) (*reserveLevel, int64) {
	if levels := r.levels.Load(); levels != nil {
		for i := range levels {
			if levels[i].priority.Load() == int64(priority) {
				return &levels[i], int64(i) + 1
			}
		}
	}
	return nil, 0
}

// addLevel returns a level for a priority, nil if all are used.
func (r *reserve) addLevel(priority int, now interceptor.Instant) *reserveLevel {
	r.mu.Lock()
	defer r.mu.Unlock()
	if l, _ := r.level(priority); l != nil {
		return l
	}
	levels := r.levels.Load()
	if levels == nil {
		levels = new([reserveLevels]reserveLevel)
		for i := range levels {
			levels[i].priority.Store(noLevel)
		}
		r.levels.Store(levels)
	}
	for i := range levels {
		l := &levels[i]
		if l.priority.Load() == noLevel || l.unseen(now) >= reserveForget && l.inUse.Load() == 0 {
			l.kept.Store(0)
			l.seen.Store(int64(now))
			l.priority.Store(int64(priority))
			return l
		}
	}
	return nil
}

func (l *reserveLevel) unseen(now interceptor.Instant) time.Duration {
	return now.Sub(interceptor.Instant(l.seen.Load()))
}

// at returns how many permits are kept at a moment.
func (l *reserveLevel) at(now interceptor.Instant) float64 {
	return faded(math.Float64frombits(l.kept.Load()), l.unseen(now))
}

func faded(kept float64, unseen time.Duration) float64 {
	if unseen <= reserveHold {
		return kept
	}
	return kept * math.Exp2(-float64(unseen-reserveHold)/float64(reserveHalf))
}

// add changes how many permits are kept, from 0 to most.
func (l *reserveLevel) add(delta float64, most int64, now interceptor.Instant) {
	unseen := l.unseen(now)
	for {
		bits := l.kept.Load()
		kept := min(max(faded(math.Float64frombits(bits), unseen)+delta, 0), float64(max(most, 0)))
		if l.kept.CompareAndSwap(bits, math.Float64bits(kept)) {
			break
		}
	}
	if unseen > 0 {
		l.seen.Store(int64(now))
	}
}

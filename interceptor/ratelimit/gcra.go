// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package ratelimit

import (
	"math"
	"sync/atomic"

	"github.com/belfry-go/belfry/interceptor"
)

// unit is how many parts of a nanosecond a gcra counts in, so that a rate of ten
// million calls a second is met to a quarter of a percent. More would not leave room
// for the Instants of virtual time, which begin at some thirty years.
const unit = 4

// gcra is the generic cell rate algorithm in its form of virtual scheduling
// (ITU-T I.371, annex A): with T the interval between tokens and τ = Burst·T,
// a call at t conforms if
//
//	TAT' - t <= τ    where TAT' = max(TAT, t) + T
//
// and moves the theoretical arrival time TAT to TAT'. It is a token bucket that
// holds (t+τ-max(TAT,t))/T tokens, in one word. Giving a token back is to move TAT
// back by T; if the bucket is full by then, max forgets it.
//
// The standard writes τ-T for what is τ here, the tolerance besides the first
// call's own interval.
type gcra struct {
	tat  atomic.Int64 // In units since the epoch of Instants; 0 is a full bucket.
	rate atomic.Pointer[params]
}

func newGCRA(p *params) *gcra {
	g := new(gcra)
	g.rate.Store(p)
	return g
}

func (g *gcra) take(now interceptor.Instant) (interceptor.Instant, bool) {
	p, t := g.rate.Load(), int64(now)*unit
	for {
		old := g.tat.Load()
		tat := max(old, t) + p.interval
		if tat-t > p.tolerance {
			return 0, false
		}
		if g.tat.CompareAndSwap(old, tat) {
			return now, true
		}
	}
}

func (g *gcra) next(now interceptor.Instant, ahead int) interceptor.Instant {
	p, t := g.rate.Load(), int64(now)*unit
	tat := max(g.tat.Load(), t)
	n := int64(ahead) + 1
	if n > (math.MaxInt64-tat)/p.interval {
		return never
	}
	turn := tat + n*p.interval - p.tolerance
	return max(now, interceptor.Instant((turn+unit-1)/unit))
}

func (g *gcra) refund(interceptor.Instant) { g.tat.Add(-g.rate.Load().interval) }

func (g *gcra) full(now interceptor.Instant) bool { return g.tat.Load() <= int64(now)*unit }

// update keeps the number of tokens that are missing from the bucket. A call that
// takes one at the same time may take it at the old rate.
func (g *gcra) update(now interceptor.Instant, p *params) {
	old, t := g.rate.Swap(p), int64(now)*unit
	for {
		tat := g.tat.Load()
		missing := min(float64(max(tat-t, 0))/float64(old.interval), float64(p.burst))
		if g.tat.CompareAndSwap(tat, t+int64(math.Ceil(missing*float64(p.interval)))) {
			return
		}
	}
}

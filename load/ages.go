// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package load

import (
	"math"
	"sync/atomic"
)

// ages sums how long attempts in flight have taken so far, each up to a limit,
// without a list of them.
//
// For attempts of weight w_i that started at s_i the sum of the weighted ages at
// time t is t*W - T with W the sum of w_i and T the sum of w_i*s_i. To bound
// single ages, the attempts are kept in two such sums by generation: the current
// one and the one before. When the current generation is as old as the limit, a
// new one begins in the place of the older. Of the attempts that were in it only the
// weights are known from then on.
//
// The weights are exact: together they are zero when nothing is in flight. A race
// between a new generation and the start or end of an attempt may leave a sum a little
// off. It counts wrong by at most one limit, and is cleared when its generation is
// reused.
type ages struct {
	weights [2]atomic.Int64 // and number
	starts  [2]atomic.Int64 // weight times start, in age units, modulo 2^64
	epoch   atomic.Uint32   // number of the current generation
	began   atomic.Uint32   // when it began, in epochUnitBits
	older   atomic.Int64    // the weights of the attempts before, and their number
}

const (
	// weightOne is the weight of 1 in fixed point. What is added at the start of an
	// attempt is subtracted at its end, so weights must be integers.
	weightOne = 1 << 16
	maxWeight = 1 << 22

	// The weights of attempts are summed above the number of the attempts: two
	// numbers in one word cost one atomic addition.
	countBits = 20

	// Ages are summed in units of 1024 ns. 10,000 attempts of weight 1 can be an
	// hour old before their sum overflows.
	ageUnitBits = 10

	// The beginning of a generation is kept in units of 65 microseconds. They wrap
	// after 78 hours, and what comes of that is one generation that ends too late.
	epochUnitBits = 16
)

// add counts an attempt and returns its generation.
func (a *ages) add(weight uint32, started Instant, limit float64) uint32 {
	began, now := a.began.Load(), uint32(uint64(started)>>epochUnitBits)
	const little = 1 << 16 // A start that was read a little before began is not past it.
	if d := now - began; d < math.MaxUint32-little && float64(d)*(1<<epochUnitBits) > limit && a.began.CompareAndSwap(began, now) {
		next := a.epoch.Load() + 1
		a.older.Add(a.weights[next&1].Swap(0))
		a.starts[next&1].Store(0)
		a.epoch.Store(next)
	}
	epoch := a.epoch.Load()
	w := int64(weight)<<countBits + 1
	// In this order, and in remove in the other, an attempt half counted has a
	// negative age, which counts as none, and not an enormous one.
	a.starts[epoch&1].Add(int64(weight) * (int64(started) >> ageUnitBits))
	a.weights[epoch&1].Add(w)
	return epoch
}

// total returns the weights and number of all attempts.
func (a *ages) total() int64 { return a.older.Load() + a.weights[0].Load() + a.weights[1].Load() }

// split returns the weights in a sum of them, and the number. After a race both may be
// below zero.
func split(sum int64) (weights int64, number int) {
	n := sum << (64 - countBits) >> (64 - countBits)
	return (sum - n) >> countBits, int(n)
}

// remove takes an attempt out again.
func (a *ages) remove(epoch, weight uint32, started Instant) {
	w := int64(weight)<<countBits + 1
	if a.epoch.Load()-epoch > 1 {
		a.older.Add(-w) // its generation is gone
		return
	}
	a.weights[epoch&1].Add(-w)
	a.starts[epoch&1].Add(-int64(weight) * (int64(started) >> ageUnitBits))
}

// sum returns the weighted ages in nanoseconds, each up to the limit, the weight of
// the attempts in it, the number of old attempts, and of those that are left out. An
// attempt is old after two generations.
//
// Old attempts are left out if the endpoint was heard of after they had become old,
// because then they are no sign that it does not answer, and in any case if silence is
// no sign of that.
func (a *ages) sum(now, heard Instant, limit, generation float64, sign bool) (sum, weight float64, old, left int) {
	total := a.total()
	if total == 0 {
		return 0, 0, 0, 0
	}
	began := a.began.Load()
	since := func(t Instant) float64 {
		return float64(int32(uint32(uint64(t)>>epochUnitBits)-began)) * (1 << epochUnitBits)
	}
	// All attempts of the current generation started within one of its beginning, and
	// so on.
	current := int(a.epoch.Load() & 1)
	stale := since(now) > 2*generation
	counts := [2]bool{true, true}
	oldest := sign && since(heard) < -generation
	if stale {
		counts[current] = sign && since(heard) < generation
		counts[1-current] = sign && since(heard) < 0
	}
	rest, old := split(total)
	left = old
	var counted int64
	for i := range a.weights {
		weights, number := split(a.weights[i].Load())
		if !stale {
			old -= number
		}
		rest -= weights
		if counts[i] {
			left -= number
			s, w := a.generation(i, now, limit)
			sum += s
			counted += w
		}
	}
	if oldest {
		left = 0
		sum += float64(max(rest, 0)) * limit / weightOne
		counted += max(rest, 0)
	}
	return sum, float64(counted) / weightOne, max(old, 0), max(left, 0)
}

// generation returns the weighted ages of the attempts of one, each up to the
// limit, and their weight in fixed point.
func (a *ages) generation(i int, now Instant, limit float64) (float64, int64) {
	const unit = float64(1<<ageUnitBits) / weightOne
	w, _ := split(a.weights[i].Load())
	if w <= 0 {
		return 0, 0
	}
	age := float64(int64(now)>>ageUnitBits*w-a.starts[i].Load()) * unit
	return min(max(age, 0), limit*float64(w)/weightOne), w
}

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
// single ages, there are two such sums: one of the current generation of attempts
// and one of the generation before. When the current generation is as old as the
// limit, a new one replaces the older of the two. Of the attempts of the replaced
// generation only the weights are known from then on.
//
// The weights are exact: their sum is zero when nothing is in flight. A race between
// a new generation and the start or end of an attempt may make a sum of starts wrong,
// by one limit at most. It is cleared when a new generation replaces its own.
type ages struct {
	weights [2]atomic.Int64 // the sums of the weights, and the numbers of attempts, of both generations
	starts  [2]atomic.Int64 // the sums of weight times start, in age units, modulo 2^64
	epoch   atomic.Uint32   // the number of the current generation
	began   atomic.Uint32   // when it began, in units of 2^epochUnitBits ns
	older   atomic.Int64    // the sum of the weights, and the number, of attempts of earlier generations
}

const (
	// weightOne is the weight of 1 in fixed point. What is added at the start of an
	// attempt is subtracted at its end, so weights must be integers.
	weightOne = 1 << 16
	maxWeight = 1 << 22

	// A word holds the sum of the weights of attempts above the number of attempts.
	// Two numbers in one word cost one atomic addition.
	countBits = 20

	// Ages are summed in units of 1024 ns. 10,000 attempts of weight 1 may be an hour old
	// without an overflow of the sum.
	ageUnitBits = 10

	// The beginning of a generation is kept in units of 65 us. They wrap after 78 hours.
	// Then one generation ends too late.
	epochUnitBits = 16
)

// add counts an attempt and returns its generation.
func (a *ages) add(weight uint32, started Instant, limit float64) uint32 {
	began, now := a.began.Load(), uint32(uint64(started)>>epochUnitBits)
	const little = 1 << 16 // another goroutine may have read its start a little before began
	if d := now - began; d < math.MaxUint32-little && float64(d)*(1<<epochUnitBits) > limit && a.began.CompareAndSwap(began, now) {
		next := a.epoch.Load() + 1
		a.older.Add(a.weights[next&1].Swap(0))
		a.starts[next&1].Store(0)
		a.epoch.Store(next)
	}
	epoch := a.epoch.Load()
	w := int64(weight)<<countBits + 1
	// In this order, and in the reverse order in remove, an attempt that is half counted
	// has a negative age, which counts as 0. Otherwise it would have an enormous age.
	a.starts[epoch&1].Add(int64(weight) * (int64(started) >> ageUnitBits))
	a.weights[epoch&1].Add(w)
	return epoch
}

// total returns the sum of the weights, and the number, of all attempts.
func (a *ages) total() int64 { return a.older.Load() + a.weights[0].Load() + a.weights[1].Load() }

// split returns the two numbers in a word: the sum of the weights, and the number of
// attempts. After a race both may be below zero.
func split(sum int64) (weights int64, number int) {
	n := sum << (64 - countBits) >> (64 - countBits)
	return (sum - n) >> countBits, int(n)
}

// remove removes an attempt that add has counted.
func (a *ages) remove(epoch, weight uint32, started Instant) {
	w := int64(weight)<<countBits + 1
	if a.epoch.Load()-epoch > 1 {
		a.older.Add(-w) // its generation was replaced
		return
	}
	a.weights[epoch&1].Add(-w)
	a.starts[epoch&1].Add(-int64(weight) * (int64(started) >> ageUnitBits))
}

// sum returns the sum of the weighted ages in nanoseconds, each up to the limit, and the
// sum of the weights of these attempts. It also returns the number of old attempts, and
// how many of them it left out. An attempt is old after two generations.
//
// sign is whether a silent attempt is a sign that the endpoint does not answer. If not,
// all old attempts are left out. If it is, those are left out that were old already when
// the endpoint last answered or failed.
func (a *ages) sum(now, heard Instant, limit, generation float64, sign bool) (sum, weight float64, old, left int) {
	total := a.total()
	if total == 0 {
		return 0, 0, 0, 0
	}
	began := a.began.Load()
	since := func(t Instant) float64 {
		return float64(int32(uint32(uint64(t)>>epochUnitBits)-began)) * (1 << epochUnitBits)
	}
	// All attempts of a generation started within the time generation after its beginning.
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

// generation returns the sum of the weighted ages of the attempts of generation i, each
// up to the limit, and the sum of their weights in fixed point.
func (a *ages) generation(i int, now Instant, limit float64) (float64, int64) {
	const unit = float64(1<<ageUnitBits) / weightOne
	w, _ := split(a.weights[i].Load())
	if w <= 0 {
		return 0, 0
	}
	age := float64(int64(now)>>ageUnitBits*w-a.starts[i].Load()) * unit
	return min(max(age, 0), limit*float64(w)/weightOne), w
}

// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

// Package retryafter lets a layer say when to try again without an allocation for each
// refused call.
//
// The time until calls may pass again differs from call to call, but a few round numbers
// are enough. A Cache rounds the time up, so that nobody comes back too early, and keeps
// the value made for each rounded time.
package retryafter

import (
	"sync/atomic"
	"time"
)

const (
	// unit is the shortest rounded time.
	unit = 100 * time.Microsecond
	// longest is the longest one, 285 years. It stands for all that are longer.
	longest = 9e18
	// PerDecade is how many rounded times there are from one power of ten to the next.
	PerDecade = 32
)

// RoundUp rounds left up, by at most an eighth, to a round number: one of
//
//	1, 1.1, 1.2 … 2, 2.25, 2.5 … 5, 5.5, 6 … 10
//
// times a power of ten, and at least 100 µs.
func RoundUp(left time.Duration) time.Duration {
	d, _ := round(left)
	return d
}

// round also returns the number of the rounded time: 0 for 100 µs, and one more for
// each that is longer.
func round(left time.Duration) (d time.Duration, i int) {
	left = min(left, longest)
	if left <= unit {
		return unit, 0
	}
	power := unit
	for left/10 >= power { // Not left >= 10*power, which could overflow.
		power *= 10
		i += PerDecade
	}
	from, step := power, power/10
	switch {
	case left > 5*power:
		from, step = 5*power, power/2
		i += 22
	case left > 2*power:
		from, step = 2*power, power/4
		i += 10
	}
	n := (left - from + step - 1) / step
	return from + n*step, i + int(n)
}

// A Cache holds a value for each of the rounded times that were asked for lately.
// It is safe for concurrent use. Asking for a value that it holds takes no lock and
// allocates nothing.
type Cache[V any] struct {
	build func(d time.Duration) *V
	slots []atomic.Pointer[entry[V]] // The slot of a rounded time is its number modulo their count.
}

type entry[V any] struct {
	d time.Duration
	v *V
}

// New returns an empty Cache. build makes the value of a rounded time; it may be
// called concurrently, and now and then again for the same time.
//
// size is the most values that the Cache holds, at least 1. A few are enough if all calls
// have about the same time left. If times differ at random, with two times [PerDecade] 49
// of 50 calls find their value.
func New[V any](size int, build func(d time.Duration) *V) *Cache[V] {
	return &Cache[V]{build: build, slots: make([]atomic.Pointer[entry[V]], size)}
}

// Get returns the value of left, rounded up as [RoundUp] does.
func (c *Cache[V]) Get(left time.Duration) *V {
	d, i := round(left)
	slot := &c.slots[i%len(c.slots)]
	if e := slot.Load(); e != nil && e.d == d {
		return e.v
	}
	e := &entry[V]{d, c.build(d)}
	slot.Store(e)
	return e.v
}

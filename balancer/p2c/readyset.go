// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package p2c

import (
	"math/bits"
	"sync/atomic"
)

// readySet is the endpoints that picks can choose: the READY ones, without those that are
// aside or draining, see seating. Pickers read it without a lock while it changes: a reader
// takes a view, and loads slots of it. A slot has a candidate, or nil if one was just removed.
// Which candidate it has may change at any time, so a reader keeps the candidate and not the
// index of the slot.
//
// The endpoints at home have the first slots. See zones.go.
//
// add, remove, settle and reweigh take logarithmic time, add amortized. The caller holds
// policy.mu.
type readySet struct {
	seats   atomic.Pointer[seats]
	size    atomic.Int32   // how many endpoints there are
	unequal atomic.Bool    // whether weights differ
	home    atomic.Int32   // atHome if zones count, else 0
	atHome  int            // how many endpoints are at home
	weights map[uint32]int // how many endpoints have each weight
}

// seats are the slots of a set. A set that grows gets new ones.
type seats struct {
	slots []atomic.Pointer[candidate]
	// tree holds sums of weights (Fenwick, "A new data structure for cumulative
	// frequency tables", 1994): tree[i] is the sum of the i&-i slots before slot i. A
	// reader may see that one sum has changed and another not yet. Then its draw is
	// wrong by one change.
	tree  []atomic.Int64
	total atomic.Int64
}

// view is what a pick reads of the set.
type view struct {
	slots []atomic.Pointer[candidate] // each may be nil
	seats *seats
}

func (s *readySet) view() view {
	size := int(s.size.Load())
	seats := s.seats.Load()
	if seats == nil {
		return view{}
	}
	return view{seats.slots[:min(size, len(seats.slots))], seats}
}

// first returns the candidate in the first slot, nil if the set is empty.
func (s *readySet) first() *candidate {
	if v := s.view(); len(v.slots) > 0 {
		return v.slots[0].Load()
	}
	return nil
}

// relative returns the weight of a candidate divided by the mean weight of the set.
func (s *readySet) relative(c *candidate) float64 {
	if !s.unequal.Load() {
		return 1
	}
	total := s.seats.Load().total.Load()
	return max(float64(c.weight.Load())*float64(s.size.Load())/float64(max(total, 1)), 1e-9)
}

// draw returns the index of a slot, with a probability in proportion to its
// weight.
func (v view) draw(r *random) int {
	return v.find(r, v.seats.total.Load())
}

// drawOf is draw among the first n slots.
func (v view) drawOf(r *random, n int) int {
	sum := int64(0)
	for k := n; k > 0; k -= k & -k {
		sum += v.seats.tree[k].Load()
	}
	return min(v.find(r, sum), n-1)
}

// find returns the index of the slot at a random point of the first sum of the weights.
func (v view) find(r *random, sum int64) int {
	hi, _ := bits.Mul64(r.next(), uint64(max(sum, 0)))
	left, i := int64(hi), 0
	for step := 1 << (bits.Len(uint(len(v.seats.slots))) - 1); step > 0; step >>= 1 {
		if k := i + step; k < len(v.seats.tree) {
			if sum := v.seats.tree[k].Load(); sum <= left {
				i, left = k, left-sum
			}
		}
	}
	return min(i, len(v.slots)-1)
}

// weigh adds w to the weight of slot i.
func (s *seats) weigh(i int, w int64) {
	for k := i + 1; k < len(s.tree); k += k & -k {
		s.tree[k].Add(w)
	}
	s.total.Add(w)
}

func (s *readySet) add(c *candidate) {
	n := int(s.size.Load())
	old := s.seats.Load()
	if old == nil || n == len(old.slots) {
		size := max(2*n, 8)
		grown := &seats{slots: make([]atomic.Pointer[candidate], size), tree: make([]atomic.Int64, size+1)}
		for i := range n {
			c := old.slots[i].Load()
			grown.slots[i].Store(c)
			grown.weigh(i, int64(c.weight.Load()))
		}
		s.seats.Store(grown)
		old = grown
	}
	old.slots[n].Store(c)
	old.weigh(n, int64(c.weight.Load()))
	s.count(c.weight.Load(), 1)
	c.slot.Store(int32(n))
	s.size.Store(int32(n + 1))
}

// settle moves a candidate to the slots of endpoints at home, or of those away. A candidate
// that is not in the set stays out of it.
func (s *readySet) settle(c *candidate, home bool) {
	i := int(c.slot.Load())
	if i == notReady || home == (i < s.atHome) {
		return
	}
	at := s.atHome // the first that is away
	if home {
		s.atHome++
	} else {
		s.atHome--
		at = s.atHome
	}
	seats := s.seats.Load()
	other := seats.slots[at].Load()
	seats.slots[at].Store(c)
	seats.slots[i].Store(other)
	c.slot.Store(int32(at))
	other.slot.Store(int32(i))
	d := int64(c.weight.Load()) - int64(other.weight.Load())
	seats.weigh(at, d)
	seats.weigh(i, -d)
}

// remove removes c, and moves the last candidate into its slot.
func (s *readySet) remove(c *candidate) {
	s.settle(c, false)
	seats := s.seats.Load()
	last := int(s.size.Load()) - 1
	i := int(c.slot.Load())
	moved := seats.slots[last].Load()
	seats.slots[i].Store(moved)
	moved.slot.Store(int32(i))
	c.slot.Store(notReady)
	s.size.Store(int32(last))
	seats.slots[last].Store(nil)
	seats.weigh(i, int64(moved.weight.Load())-int64(c.weight.Load()))
	seats.weigh(last, -int64(moved.weight.Load()))
	s.count(c.weight.Load(), -1)
}

// reweigh sets the weight of a candidate, which may be in the set or not.
func (s *readySet) reweigh(c *candidate, w uint32) {
	old := c.weight.Swap(w)
	i := int(c.slot.Load())
	if i == notReady || old == w {
		return
	}
	s.seats.Load().weigh(i, int64(w)-int64(old))
	s.count(old, -1)
	s.count(w, 1)
}

// count counts n more endpoints of a weight, or fewer if n is negative.
func (s *readySet) count(w uint32, n int) {
	if s.weights == nil {
		s.weights = make(map[uint32]int)
	}
	if s.weights[w] += n; s.weights[w] == 0 {
		delete(s.weights, w)
	}
	if unequal := len(s.weights) > 1; unequal != s.unequal.Load() {
		s.unequal.Store(unequal)
	}
}

// notReady is the slot of a candidate that is not in the set.
const notReady = -1

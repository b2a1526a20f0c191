// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package p2c

import "sync/atomic"

// readySet is the endpoints that are READY. Pickers read it without a lock while
// it changes: a reader takes a view, which is a slice and a length, and loads
// entries from it. An entry is a candidate, whichever stands there at that
// moment, or nil where one was just removed; a reader holds the candidate from
// then on and never an index.
//
// add, remove and replace take constant time, add amortized. The caller holds policy.mu.
type readySet struct {
	slots atomic.Pointer[[]atomic.Pointer[candidate]]
	size  atomic.Int32
}

// view returns the entries. Each may be nil.
func (s *readySet) view() []atomic.Pointer[candidate] {
	size := int(s.size.Load())
	slots := s.slots.Load()
	if slots == nil {
		return nil
	}
	return (*slots)[:min(size, len(*slots))]
}

func (s *readySet) add(c *candidate) {
	n := int(s.size.Load())
	var slots []atomic.Pointer[candidate]
	if p := s.slots.Load(); p != nil {
		slots = *p
	}
	if n == len(slots) {
		grown := make([]atomic.Pointer[candidate], max(2*n, 8))
		for i := range slots {
			grown[i].Store(slots[i].Load())
		}
		s.slots.Store(&grown)
		slots = grown
	}
	slots[n].Store(c)
	c.slot.Store(int32(n))
	s.size.Store(int32(n + 1))
}

// remove moves the last entry into the place of c.
func (s *readySet) remove(c *candidate) {
	slots := *s.slots.Load()
	last := int(s.size.Load()) - 1
	i := c.slot.Load()
	moved := slots[last].Load()
	slots[i].Store(moved)
	moved.slot.Store(i)
	c.slot.Store(notReady)
	s.size.Store(int32(last))
	slots[last].Store(nil)
}

// replace puts c into the place of old.
func (s *readySet) replace(old, c *candidate) {
	i := old.slot.Load()
	c.slot.Store(i)
	(*s.slots.Load())[i].Store(c)
	old.slot.Store(notReady)
}

// notReady is the slot of a candidate that is not in the set.
const notReady = -1

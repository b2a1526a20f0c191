// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

// Package waitlist is the list of the calls that wait at a gate, in the order in which
// they are admitted.
//
// A gate that makes calls wait (a concurrency limit, a rate limit, a fail-fast, a buffer)
// keeps a List under its own mutex. The gate knows what a call waits for and how to wake
// it; the list knows which call goes first:
//
//  1. the higher priority,
//  2. at the same priority a further attempt of a call before a first attempt,
//     because work has been spent on that call already,
//  3. otherwise the one that arrived first, or last if the gate is LIFO.
package waitlist

import (
	"cmp"
	"iter"
	"slices"
)

// A Rank says which calls go before others, whenever they arrived.
type Rank struct {
	Priority int  // The higher goes first.
	Further  bool // It is a retry or a hedge. At the same Priority these go first.
}

// Before reports whether calls of rank a go before those of rank b.
func (a Rank) Before(b Rank) bool { return a.compare(b) < 0 }

// compare is negative if a goes before b.
func (a Rank) compare(b Rank) int {
	switch {
	case a.Priority != b.Priority:
		return cmp.Compare(b.Priority, a.Priority)
	case a.Further == b.Further:
		return 0
	case a.Further:
		return -1
	}
	return 1
}

// A Node is one call that waits, with a Value that belongs to the gate. A gate allocates
// one per waiting call.
type Node[T any] struct {
	Value T

	rank       Rank
	list       *List[T] // The list it is in; nil if it is in none.
	prev, next *Node[T] // Its neighbours by arrival at its level.
}

// A List holds the nodes of the calls that wait. The zero value is an empty list.
// It must not be copied once it has been used.
//
// A List has no lock. The owner's mutex guards it and the nodes in it, and is held
// for each method call, and as long as an iterator of the list runs.
//
// With n the number of different ranks among the nodes, Push, Remove and a step of
// All take O(log n), besides moving up to n small entries when a rank appears or
// disappears. First, Last and Len take O(1).
type List[T any] struct {
	levels []level[T] // By rank, those that go first at the front; none is empty.
	len    int
}

// A level is the nodes of one rank, linked in the order of arrival.
type level[T any] struct {
	rank           Rank
	oldest, newest *Node[T]
	len            int
}

// first returns the node that goes first at this level.
func (l *level[T]) first(lifo bool) *Node[T] {
	if lifo {
		return l.newest
	}
	return l.oldest
}

// Len returns how many nodes are in the list.
func (l *List[T]) Len() int { return l.len }

// find returns the index of the level of r, or the index where it would be.
func (l *List[T]) find(r Rank) (i int, found bool) {
	return slices.BinarySearchFunc(l.levels, r, func(l level[T], r Rank) int { return l.rank.compare(r) })
}

// Push adds n to the list, as the latest to arrive. It panics if n is in a list already.
// It allocates only if there are more different ranks at once than ever before.
func (l *List[T]) Push(n *Node[T], r Rank) {
	if n.list != nil {
		panic("waitlist: Push of a node that is in a list")
	}
	n.list, n.rank = l, r
	l.len++
	i, found := l.find(r)
	if !found {
		l.levels = slices.Insert(l.levels, i, level[T]{rank: r, oldest: n, newest: n, len: 1})
		return
	}
	lv := &l.levels[i]
	n.prev, lv.newest.next, lv.newest = lv.newest, n, n
	lv.len++
}

// Remove takes n out of the list, and reports whether it was in it. Afterwards n may be
// pushed again.
func (l *List[T]) Remove(n *Node[T]) bool {
	if n.list != l {
		return false
	}
	i, _ := l.find(n.rank)
	lv := &l.levels[i]
	lv.len--
	if n.prev == nil {
		lv.oldest = n.next
	} else {
		n.prev.next = n.next
	}
	if n.next == nil {
		lv.newest = n.prev
	} else {
		n.next.prev = n.prev
	}
	if lv.oldest == nil {
		l.levels = slices.Delete(l.levels, i, i+1)
	}
	n.list, n.prev, n.next = nil, nil, nil
	l.len--
	return true
}

// First returns the node that goes first, or nil if the list is empty. Among nodes of one
// rank that is the latest to arrive if lifo is true, otherwise the earliest.
func (l *List[T]) First(lifo bool) *Node[T] {
	if l.len == 0 {
		return nil
	}
	return l.levels[0].first(lifo)
}

// Last returns the node that goes last, or nil if the list is empty.
func (l *List[T]) Last(lifo bool) *Node[T] {
	if l.len == 0 {
		return nil
	}
	return l.levels[len(l.levels)-1].first(!lifo)
}

// All returns the nodes, the one that goes first in front. The loop may remove the node
// that it was given, and no other.
func (l *List[T]) All(lifo bool) iter.Seq[*Node[T]] {
	return func(yield func(*Node[T]) bool) {
		for n := l.First(lifo); n != nil; {
			next := l.after(n, lifo)
			if !yield(n) {
				return
			}
			n = next
		}
	}
}

// after returns the node that goes after n, nil if n is the last.
func (l *List[T]) after(n *Node[T], lifo bool) *Node[T] {
	next := n.next
	if lifo {
		next = n.prev
	}
	if next != nil {
		return next
	}
	if i, _ := l.find(n.rank); i+1 < len(l.levels) {
		return l.levels[i+1].first(lifo)
	}
	return nil
}

// Before returns how many nodes go before one of rank r that arrives now, in a list that
// is not LIFO. It takes O(n).
func (l *List[T]) Before(r Rank) int {
	before := 0
	for i := range l.levels {
		if l.levels[i].rank.compare(r) > 0 {
			break
		}
		before += l.levels[i].len
	}
	return before
}

// Ahead returns how many nodes go before n, or -1 if n is not in the list. It takes O(n).
func (l *List[T]) Ahead(n *Node[T], lifo bool) int {
	if n.list != l {
		return -1
	}
	ahead := 0
	for other := range l.All(lifo) {
		if other == n {
			break
		}
		ahead++
	}
	return ahead
}

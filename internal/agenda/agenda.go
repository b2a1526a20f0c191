// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

// Package agenda is what the simulations in virtual time share: the events to come, and a
// queue. Its types are not safe for concurrent use.
package agenda

// An Event is something that happens at a time. Events of the same time happen in the
// order in which they were scheduled, so that a run depends on nothing but its seed.
type Event[H any] struct {
	At     int64 // nanoseconds since the beginning of the run
	Number uint64
	Do     H
}

func (e *Event[H]) before(o *Event[H]) bool {
	return e.At < o.At || e.At == o.At && e.Number < o.Number
}

// An Agenda is the events to come, each with what happens then: a heap of four children to
// a node, which is half as deep as one of two and stays in fewer cache lines. The zero value
// is empty.
type Agenda[H any] struct {
	heap   []Event[H]
	number uint64
}

// Add schedules an event and returns its number, by which it can be told later that another
// overtook it.
func (a *Agenda[H]) Add(at int64, do H) uint64 {
	a.number++
	e := Event[H]{at, a.number, do}
	a.heap = append(a.heap, e)
	i := len(a.heap) - 1
	for i > 0 {
		parent := (i - 1) / 4
		if !e.before(&a.heap[parent]) {
			break
		}
		a.heap[i] = a.heap[parent]
		i = parent
	}
	a.heap[i] = e
	return a.number
}

// Len returns the number of events.
func (a *Agenda[H]) Len() int { return len(a.heap) }

// Next returns the first event without removing it. There must be one.
func (a *Agenda[H]) Next() *Event[H] { return &a.heap[0] }

// Pop removes the first event. There must be one.
func (a *Agenda[H]) Pop() Event[H] {
	first := a.heap[0]
	n := len(a.heap) - 1
	last := a.heap[n]
	a.heap[n] = Event[H]{}
	a.heap = a.heap[:n]
	if n == 0 {
		return first
	}
	i := 0
	for {
		child := 4*i + 1
		if child >= n {
			break
		}
		least := child
		for k := child + 1; k < min(child+4, n); k++ {
			if a.heap[k].before(&a.heap[least]) {
				least = k
			}
		}
		if !a.heap[least].before(&last) {
			break
		}
		a.heap[i] = a.heap[least]
		i = least
	}
	a.heap[i] = last
	return first
}

// A Queue is first in, first out. The zero value is empty.
type Queue[T any] struct {
	items []T
	head  int
}

// Len returns the number of items.
func (q *Queue[T]) Len() int { return len(q.items) - q.head }

// Push adds an item.
func (q *Queue[T]) Push(v T) { q.items = append(q.items, v) }

// Front returns the oldest item. There must be one.
func (q *Queue[T]) Front() *T { return &q.items[q.head] }

// Pop removes the oldest item. There must be one.
func (q *Queue[T]) Pop() T {
	var zero T
	v := q.items[q.head]
	q.items[q.head] = zero
	q.head++
	// Moving the rest when it is the smaller half costs one move an item.
	if 2*q.head >= len(q.items) {
		n := copy(q.items, q.items[q.head:])
		clear(q.items[n:])
		q.items, q.head = q.items[:n], 0
	}
	return v
}

// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package limitsim

// event is something that happens at a time. Events of the same time happen in the order
// in which they were scheduled, so that a run depends on nothing but its seed.
type event struct {
	at     int64 // nanoseconds since the beginning of the run
	number uint64
	do     func(number uint64)
}

func (e *event) before(o *event) bool { return e.at < o.at || e.at == o.at && e.number < o.number }

// agenda is the events to come: a heap with four children to a node.
type agenda struct {
	heap   []event
	number uint64
}

// add schedules an event and returns its number.
func (a *agenda) add(at int64, do func(uint64)) uint64 {
	a.number++
	e := event{at, a.number, do}
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

// pop removes the first event. There must be one.
func (a *agenda) pop() event {
	first := a.heap[0]
	n := len(a.heap) - 1
	last := a.heap[n]
	a.heap[n] = event{}
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

// fifo is a queue. The zero value is empty.
type fifo[T any] struct {
	items []T
	head  int
}

func (q *fifo[T]) len() int { return len(q.items) - q.head }

func (q *fifo[T]) push(v T) { q.items = append(q.items, v) }

// front returns the oldest item. There must be one.
func (q *fifo[T]) front() T { return q.items[q.head] }

func (q *fifo[T]) pop() T {
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

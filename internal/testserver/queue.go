// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package testserver

import (
	"container/list"
	"sync"
	"sync/atomic"
)

// A queue is the one FIFO queue before a server's workers. It holds calls in
// the order in which they called acquire. A call leaves it early only when it is
// cancelled.
type queue struct {
	length atomic.Int64 // calls that wait, for Stats

	mu      sync.Mutex // guards what follows; held for a few instructions only
	idle    int        // workers without work; positive only if nobody waits
	waiting list.List  // of *waiter
}

// A waiter is a call in the queue.
type waiter struct {
	arrived moment
	turn    chan moment // of capacity 1: when its work begins
}

func newQueue(workers int) *queue { return &queue{idle: workers} }

// acquire waits for a worker and returns the moment at which work begins. It
// returns false if stop was closed first.
func (q *queue) acquire(arrived moment, stop <-chan struct{}, changed func()) (moment, bool) {
	q.mu.Lock()
	if q.idle > 0 {
		q.idle--
		q.mu.Unlock()
		return arrived, true
	}
	w := &waiter{arrived: arrived, turn: make(chan moment, 1)}
	place := q.waiting.PushBack(w)
	q.length.Add(1)
	q.mu.Unlock()
	changed()

	select {
	case m := <-w.turn:
		return m, true
	case <-stop:
	}
	q.mu.Lock()
	select {
	case m := <-w.turn:
		// The turn came at the same time. The next call gets it.
		q.mu.Unlock()
		q.release(m)
	default:
		q.waiting.Remove(place)
		q.length.Add(-1)
		q.mu.Unlock()
	}
	return moment{}, false
}

// release gives a worker back that was free from moment m on. The work of the
// next call begins then, even if this goroutine runs a little later: a worker
// loses no time to timers.
func (q *queue) release(m moment) {
	q.mu.Lock()
	defer q.mu.Unlock()
	first := q.waiting.Front()
	if first == nil {
		q.idle++
		return
	}
	w := q.waiting.Remove(first).(*waiter)
	q.length.Add(-1)
	if w.arrived.at > m.at {
		m = w.arrived
	}
	w.turn <- m
}

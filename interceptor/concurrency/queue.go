// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package concurrency

import (
	"slices"
	"sync"
	"time"

	"github.com/belfry-go/belfry/interceptor"
)

// permits gives out permits and queues the calls that find none. A free permit
// goes to the next waiter at the moment it becomes free, under the lock, so none
// is ever lost to a waiter that has gone, and no newcomer overtakes.
type permits struct {
	// mu guards everything below. It is held for a few instructions, never while
	// waiting. The sampler's lock is taken before it; a Place is left under it.
	mu         sync.Mutex
	limit      int64
	inUse      int64
	waiting    int
	levels     []level // The priorities that calls wait at, highest first; none is empty.
	discipline Discipline
	maxWaiters int // 0 is no bound.
	codel      codel
}

// level is the queue of one priority, in order of arrival.
type level struct {
	priority    int
	first, last *waiter
}

// waiter is a call that waits. The first five fields do not change; the others
// are guarded by permits.mu, and may be read when done has been received from.
type waiter struct {
	cost       int64
	priority   int
	since      interceptor.Instant
	place      interceptor.Place // May be nil.
	done       chan struct{}     // One slot: sent on once, when the wait is over.
	prev, next *waiter
	queued     bool
	why        refused // Set before done is sent on.
}

// refused is why a waiter got no permit.
type refused uint8

const (
	admitted     refused = iota
	noPlace              // The queue is full, and others come first.
	displaced            // The queue was full and another came first.
	delayed              // CoDel.
	noneInTime           // The wait allowed by others is over.
	maxWaitOver          // The layer's own bound is over.
	noneFree             // No waiting allowed.
	refusedCount         // How many there are.
)

// fitsLocked reports whether a call of the given cost may run now. One that costs
// more than there are permits runs when nothing else does.
func (p *permits) fitsLocked(cost int64) bool {
	return p.limit > 0 && (cost <= p.limit-p.inUse || p.inUse == 0)
}

// try takes permits if they are free and nobody waits for them. A call that has
// them waits no more, so it leaves its place, if it has one, in the same moment.
func (p *permits) try(cost int64, place interceptor.Place) bool {
	p.mu.Lock()
	ok := p.waiting == 0 && p.fitsLocked(cost)
	if ok {
		p.inUse += cost
		if place != nil {
			place.Leave()
		}
	}
	p.mu.Unlock()
	return ok
}

// enqueue lets w wait, unless it is admitted or refused at once: then its done
// has been sent on.
func (p *permits) enqueue(w *waiter) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.waiting == 0 && p.fitsLocked(w.cost) {
		p.inUse += w.cost
		w.end(admitted)
		return
	}
	p.insertLocked(w)
	if p.maxWaiters > 0 && p.waiting > p.maxWaiters {
		out := p.lastLocked()
		p.removeLocked(out)
		if out == w {
			out.end(noPlace)
		} else {
			out.end(displaced)
		}
	}
	// A call of higher priority may fit where the one that was first did not.
	p.grantLocked()
}

// abandon takes w from the queue and reports true. If its wait is over already,
// it reports false, and w.why says how it ended.
func (p *permits) abandon(w *waiter) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if !w.queued {
		<-w.done // It has a value: it was sent under mu.
		return false
	}
	p.removeLocked(w)
	p.grantLocked() // w may have been one that did not fit and stood in the way.
	return true
}

// release gives permits back and hands them on.
func (p *permits) release(cost int64) {
	p.mu.Lock()
	p.inUse -= cost
	if p.waiting > 0 {
		p.grantLocked()
	}
	p.mu.Unlock()
}

// configure sets the limit and the rules of the queue. Waiters stay, also beyond a
// new bound.
func (p *permits) configure(limit int64, d Discipline, maxWaiters int, target, interval time.Duration) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.limit, p.discipline, p.maxWaiters = limit, d, maxWaiters
	p.codel.target, p.codel.interval = target, interval
	p.grantLocked()
}

func (p *permits) setLimit(limit int64) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.limit = limit
	p.grantLocked()
}

// read returns the limit, the permits in use and the number of waiters.
func (p *permits) read() (limit, inUse int64, waiting int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.limit, p.inUse, p.waiting
}

// grantLocked hands free permits to those whose turn it is. If the one whose turn
// it is does not fit, the others wait behind it, or it would wait for ever.
func (p *permits) grantLocked() {
	var now interceptor.Instant
	for p.waiting > 0 {
		w := p.firstLocked()
		if !p.fitsLocked(w.cost) {
			return
		}
		if p.discipline == CoDel {
			if now == 0 {
				now = interceptor.Now()
			}
			if p.codel.drop(now, now.Sub(w.since), p.waiting == 1) {
				p.removeLocked(w)
				w.end(delayed)
				continue
			}
		}
		p.removeLocked(w)
		p.inUse += w.cost
		w.end(admitted)
	}
}

// end ends the wait. Caller holds permits.mu.
func (w *waiter) end(why refused) {
	if w.place != nil {
		w.place.Leave()
	}
	w.why = why
	w.done <- struct{}{}
}

// firstLocked is the waiter whose turn it is.
func (p *permits) firstLocked() *waiter {
	l := &p.levels[0]
	if p.discipline == LIFO {
		return l.last
	}
	return l.first
}

// lastLocked is the waiter whose turn would be last.
func (p *permits) lastLocked() *waiter {
	l := &p.levels[len(p.levels)-1]
	if p.discipline == LIFO {
		return l.first
	}
	return l.last
}

// levelLocked finds where the level of a priority is, or would be.
func (p *permits) levelLocked(priority int) (i int, found bool) {
	return slices.BinarySearchFunc(p.levels, priority, func(l level, priority int) int {
		switch {
		case l.priority > priority:
			return -1
		case l.priority < priority:
			return 1
		}
		return 0
	})
}

func (p *permits) insertLocked(w *waiter) {
	w.queued = true
	p.waiting++
	i, found := p.levelLocked(w.priority)
	if !found {
		p.levels = slices.Insert(p.levels, i, level{w.priority, w, w})
		return
	}
	l := &p.levels[i]
	w.prev, l.last.next, l.last = l.last, w, w
}

func (p *permits) removeLocked(w *waiter) {
	i, _ := p.levelLocked(w.priority)
	l := &p.levels[i]
	if w.prev == nil {
		l.first = w.next
	} else {
		w.prev.next = w.next
	}
	if w.next == nil {
		l.last = w.prev
	} else {
		w.next.prev = w.prev
	}
	if l.first == nil {
		p.levels = slices.Delete(p.levels, i, i+1)
	}
	w.prev, w.next, w.queued = nil, nil, false
	p.waiting--
}

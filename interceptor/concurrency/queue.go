// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package concurrency

import (
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/belfry-go/belfry/interceptor"
)

// permits gives out permits and queues the calls that find none. While nobody
// waits that takes no lock, but of a call that has a place to leave. Otherwise a
// free permit goes to the next waiter at the moment it becomes free, under the lock,
// so none is ever lost to a waiter that has gone, and no newcomer overtakes.
type permits struct {
	// state holds the permits in use, and in its lowest bit whether calls wait.
	// While they do it changes only under mu; otherwise anybody may change it who
	// finds it unchanged.
	state atomic.Int64
	limit atomic.Int64 // Set under mu.

	// mu guards everything below. It is held for a few instructions, never while
	// waiting. The sampler's lock is taken before it; a Place is left under it.
	mu         sync.Mutex
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

const (
	queueBit   = 1 // In permits.state: calls wait.
	permitBits = 1 // By how many bits the permits in use are shifted there.
)

// fits reports whether a call of the given cost may run while so many permits are
// in use. One that costs more than there are permits runs when nothing else does.
func (p *permits) fits(cost, inUse int64) bool {
	limit := p.limit.Load()
	return limit > 0 && (cost <= limit-inUse || inUse == 0)
}

// take takes permits if they are free and nobody waits for them. If it does not,
// it returns the state that it found.
func (p *permits) take(cost int64) (state int64, ok bool) {
	for {
		s := p.state.Load()
		if s&queueBit != 0 || !p.fits(cost, s>>permitBits) {
			return s, false
		}
		if p.state.CompareAndSwap(s, s+cost<<permitBits) {
			return s, true
		}
	}
}

// try takes permits if they are free and nobody waits for them. A call that has
// them waits no more, so it leaves its place, if it has one, in the same moment:
// none is told that there is no permit, and then finds the place still taken.
func (p *permits) try(cost int64, place interceptor.Place) bool {
	if place == nil {
		if _, ok := p.take(cost); ok {
			return true
		}
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	_, ok := p.take(cost)
	if ok && place != nil {
		place.Leave()
	}
	return ok
}

// enqueue lets w wait, unless it is admitted or refused at once: then its done
// has been sent on.
func (p *permits) enqueue(w *waiter) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for p.waiting == 0 {
		s, ok := p.take(w.cost)
		if ok {
			w.end(admitted)
			return
		}
		// From here on permits come back under the lock, which is held.
		if p.state.CompareAndSwap(s, s|queueBit) {
			break
		}
	}
	defer p.settleLocked()
	p.insertLocked(w)
	// A call that goes first may fit where the one that was first did not. Then it
	// does not wait, and displaces nobody.
	p.grantLocked()
	if p.maxWaiters > 0 && p.waiting > p.maxWaiters {
		out := p.lastLocked()
		p.removeLocked(out)
		if out == w {
			out.end(noPlace)
		} else {
			out.end(displaced)
		}
	}
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
	defer p.settleLocked()
	p.removeLocked(w)
	p.grantLocked() // w may have been one that did not fit and stood in the way.
	return true
}

// settleLocked lets calls pass without the lock again when nobody waits any more.
// It follows on whatever may have ended a wait.
func (p *permits) settleLocked() {
	if p.waiting == 0 {
		p.state.And(^queueBit)
	}
}

// release gives permits back and hands them on.
func (p *permits) release(cost int64) {
	for {
		s := p.state.Load()
		if s&queueBit != 0 {
			break
		}
		if p.state.CompareAndSwap(s, s-cost<<permitBits) {
			return
		}
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	defer p.settleLocked()
	p.state.Add(-cost << permitBits)
	p.grantLocked()
}

// configure sets the limit and the rules of the queue. Waiters stay, also beyond a
// new bound.
func (p *permits) configure(limit int64, d Discipline, maxWaiters int, target, interval time.Duration) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.limit.Store(limit)
	p.discipline, p.maxWaiters = d, maxWaiters
	p.codel.target, p.codel.interval = target, interval
	defer p.settleLocked()
	p.grantLocked()
}

func (p *permits) setLimit(limit int64) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.limit.Store(limit)
	defer p.settleLocked()
	p.grantLocked()
}

// read returns the limit, the permits in use and the number of waiters.
func (p *permits) read() (limit, inUse int64, waiting int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.limit.Load(), p.state.Load() >> permitBits, p.waiting
}

// grantLocked hands free permits to those whose turn it is. If the one whose turn
// it is does not fit, the others wait behind it, or it would wait for ever.
func (p *permits) grantLocked() {
	var now interceptor.Instant
	for p.waiting > 0 {
		w := p.firstLocked()
		if !p.fits(w.cost, p.state.Load()>>permitBits) {
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
		p.state.Add(w.cost << permitBits)
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

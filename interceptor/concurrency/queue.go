// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package concurrency

import (
	"sync"
	"sync/atomic"
	"time"

	"github.com/belfry-go/belfry/interceptor"
	"github.com/belfry-go/belfry/internal/waitlist"
)

// permits gives out permits and queues the calls that find none. It takes no lock while
// nobody waits. Otherwise a permit that comes back goes to the next waiter under the lock,
// so a permit is never lost to a waiter that has left, and no newcomer overtakes.
type permits struct {
	// state holds the permits in use, and in its lowest bit whether it is locked. It is
	// locked while calls wait or mu is held, and then changes only under mu. Otherwise it
	// changes by compare-and-swap.
	state atomic.Int64
	limit atomic.Int64 // Set under mu.

	// mu guards everything below. It is held for a few instructions, never while
	// waiting. The limiter's lock is taken before it; slots are passed under it.
	mu         sync.Mutex
	calls      waitlist.List[*waiter]
	discipline Discipline
	maxWaiters int // 0 is no bound.
	codel      codel
	waitSince  interceptor.Instant // When calls began to wait without a break; set if they do.
}

// waiter is a call that waits. why may be read when done has been received from.
type waiter struct {
	cost  int64
	rank  waitlist.Rank
	since interceptor.Instant
	slot  interceptor.Slot // May be nil.
	done  chan struct{}    // Has room for one: sent on once, when the wait is over.
	node  waitlist.Node[*waiter]
	why   refused // Set before done is sent on.

	expendable bool // It must not push another call out of the queue.
}

func newWaiter(cost int64, rank waitlist.Rank, since interceptor.Instant, slot interceptor.Slot) *waiter {
	w := &waiter{cost: cost, rank: rank, since: since, slot: slot, done: make(chan struct{}, 1)}
	w.node.Value = w
	return w
}

// refused is why a call got no permit.
type refused uint8

const (
	admitted     refused = iota
	queueFull            // The queue is full of calls that go before it.
	evicted              // The queue was full, and a call came that goes before it.
	delayed              // CoDel.
	noneInTime           // The call's Wait has ended.
	maxWaitOver          // The layer's own MaxWait has ended.
	noneFree             // The call may not wait.
	reserved             // The call may not wait, and what is free is for higher priorities.
	owedToHeavy          // The call may not wait, and what is free is for a heavier call.
	refusedCount         // How many there are.
)

const (
	lockedBit  = 1 // In permits.state.
	permitBits = 1 // By how many bits the permits in use are shifted there.
)

// fits reports whether a call of the given cost may run while inUse permits are taken and
// keep others are reserved. A call that costs more than the limit runs when nothing else
// does.
func (p *permits) fits(cost, keep, inUse int64) bool {
	limit := p.limit.Load()
	return limit > 0 && (cost <= limit-inUse-keep || inUse == 0)
}

// take takes permits if they are free and the state is not locked. If it does not, it
// returns how many are in use.
func (p *permits) take(cost, keep int64) (inUse int64, ok bool) {
	for {
		s := p.state.Load()
		inUse = s >> permitBits
		if s&lockedBit != 0 || !p.fits(cost, keep, inUse) {
			return inUse, false
		}
		if p.state.CompareAndSwap(s, s+cost<<permitBits) {
			return inUse, true
		}
	}
}

// takeLocked takes permits if they are free, unless a waiting call goes first. It passes
// the slot before others can see that the permits are taken. Otherwise a call could be
// refused a permit and then find the slot of this one still taken.
func (p *permits) takeLocked(cost, keep int64, rank waitlist.Rank, slot interceptor.Slot) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.state.Or(lockedBit)
	defer p.settleLocked()
	first := p.firstLocked()
	if first != nil && !rank.Before(first.rank) || !p.fits(cost, keep, p.inUse()) {
		return false
	}
	if slot != nil {
		slot.Pass()
	}
	p.state.Add(cost << permitBits)
	return true
}

// enqueue lets w wait, unless it is admitted or refused at once; then its done was sent
// on.
func (p *permits) enqueue(w *waiter) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.state.Or(lockedBit)
	defer p.settleLocked()
	if p.calls.Len() == 0 {
		p.waitSince = w.since
	}
	p.calls.Push(&w.node, w.rank)
	// w may fit where the call that was first did not. Then it does not wait, and evicts
	// nobody.
	p.grantLocked()
	if p.maxWaiters > 0 && p.calls.Len() > p.maxWaiters {
		out := p.calls.Last(p.newestFirstLocked()).Value
		if w.expendable {
			out = w
		}
		p.calls.Remove(&out.node)
		if out == w {
			out.end(queueFull)
		} else {
			out.end(evicted)
		}
	}
}

// abandon takes w from the queue and reports true. If its wait has already ended it
// reports false, and w.why says how.
func (p *permits) abandon(w *waiter) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if !p.calls.Remove(&w.node) {
		<-w.done // It has a value: it was sent under mu.
		return false
	}
	defer p.settleLocked()
	p.grantLocked() // w may have been a call that did not fit and blocked others.
	return true
}

// settleLocked is called after whatever may have ended a wait. If nobody waits any more,
// it unlocks the state and tells CoDel that the queue is empty.
func (p *permits) settleLocked() {
	if p.calls.Len() == 0 {
		p.codel.empty()
		p.state.And(^lockedBit)
	}
}

// release gives permits back and hands them on.
func (p *permits) release(cost int64) {
	for {
		s := p.state.Load()
		if s&lockedBit != 0 {
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

// configure sets the limit and the rules of the queue. Waiters stay, even beyond a new
// bound.
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

// waits reports whether calls wait.
func (p *permits) waits() bool { return p.state.Load()&lockedBit != 0 }

// read returns the limit, the permits in use and the number of waiters.
func (p *permits) read() (limit, inUse int64, waiting int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.limit.Load(), p.inUse(), p.calls.Len()
}

// inUse returns how many permits are in use. Without the lock it may miss some that are
// on their way from one call to the next.
func (p *permits) inUse() int64 { return p.state.Load() >> permitBits }

// grantLocked gives free permits to the first waiters. If the first does not fit, the
// others wait behind it, because it would otherwise wait for ever.
func (p *permits) grantLocked() {
	var now interceptor.Instant
	for w := p.firstLocked(); w != nil && p.fits(w.cost, 0, p.inUse()); w = p.firstLocked() {
		why := admitted
		if p.discipline == CoDel {
			if now == 0 {
				now = interceptor.Now()
			}
			if p.codel.drop(now, now.Sub(w.since), p.calls.Len()-1) {
				why = delayed
			}
		}
		p.calls.Remove(&w.node)
		w.end(why)
		if why == admitted {
			p.state.Add(w.cost << permitBits)
		}
	}
}

// end ends the wait. It passes the slot before others can see that the permits are taken,
// see takeLocked. Caller must hold permits.mu.
func (w *waiter) end(why refused) {
	if why == admitted && w.slot != nil {
		w.slot.Pass()
	}
	w.why = why
	w.done <- struct{}{}
}

// firstLocked returns the waiter that goes first, nil if nobody waits.
func (p *permits) firstLocked() *waiter {
	if n := p.calls.First(p.newestFirstLocked()); n != nil {
		return n.Value
	}
	return nil
}

// newestFirstLocked reports whether the call that came last goes first.
func (p *permits) newestFirstLocked() bool {
	return p.discipline == LIFO || p.discipline == Adaptive && p.calls.Len() > 0 && interceptor.Now().Sub(p.waitSince) >= p.codel.interval
}

// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package ratelimit

import (
	"context"
	"math"
	"sync"
	"sync/atomic"
	"time"

	"github.com/belfry-go/belfry/interceptor"
)

// never is when a token comes that does not come.
const never interceptor.Instant = math.MaxInt64

// lookAgain is how often at least to look for tokens of a source that may be changed
// by others, while calls wait for them.
const lookAgain = time.Second

// A source says when tokens come. It is safe for concurrent use.
type source interface {
	// take takes a token if there is one now. at is what refund wants to know.
	take(now interceptor.Instant) (at interceptor.Instant, ok bool)
	// next is when the token after so many others can be taken; not before now.
	next(now interceptor.Instant, ahead int) interceptor.Instant
	// refund gives a token back.
	refund(at interceptor.Instant)
}

// An own source is one of this package.
type own interface {
	source
	// full reports whether it is as if nothing had ever been taken.
	full(now interceptor.Instant) bool
	// update changes the rate and keeps what was taken.
	update(now interceptor.Instant, p *params)
}

// A queue gives the tokens of a source to calls, first come, first served. A call
// that finds a token and nobody waiting takes no lock.
//
// Waiting calls do not reserve tokens ahead of time: then a token that is given
// back goes to the first in the queue and everyone moves up, a call that gives
// up leaves no trace, and a changed rate holds for those who wait already.
type queue struct {
	name    string
	src     source
	over    atomic.Pointer[refusals]
	waiting atomic.Int64 // The length of the list below. Written under mu.

	// mu guards the fields below. The source's own lock may be taken under it, and
	// that of a gate further out, by interceptor.Place.
	mu         sync.Mutex
	head, tail *waiter
	timer      *time.Timer // Fires when the head's token comes; nil until first needed.
}

// A waiter is a call in a queue. Its fields are guarded by the queue's mu, but for
// at and turn, which are set before done is closed and read after.
type waiter struct {
	prev, next *waiter
	latest     interceptor.Instant // It waits for no token that comes later.
	place      interceptor.Place   // Where it waits on behalf of a gate further out; may be nil.
	done       chan struct{}       // Closed when the waiter leaves the list with a token or a refusal.
	at         interceptor.Instant // When its token was taken; 0 for a refusal.
	turn       interceptor.Instant // Of a refusal: when its token would have come.
}

func newQueue(name string, src source, over *refusals) *queue {
	q := &queue{name: name, src: src}
	q.over.Store(over)
	return q
}

// acquire takes a token for c.
func (q *queue) acquire(ctx context.Context, c *interceptor.Call, w interceptor.Wait) (interceptor.Instant, error) {
	if q.waiting.Load() == 0 {
		if at, ok := q.src.take(c.Now()); ok {
			return at, nil
		}
	}
	return q.acquireSlow(ctx, c, w)
}

func (q *queue) acquireSlow(ctx context.Context, c *interceptor.Call, w interceptor.Wait) (interceptor.Instant, error) {
	if ctx.Err() != nil {
		return 0, interceptor.Ended(ctx, q.name)
	}
	latest := latestOf(ctx, w)
	now := interceptor.Now()
	q.mu.Lock()
	q.serveLocked(now)
	if q.head == nil {
		if at, ok := q.src.take(now); ok {
			q.mu.Unlock()
			return at, nil
		}
	}
	if turn := q.src.next(now, int(q.waiting.Load())); turn > latest || turn == never {
		q.mu.Unlock()
		return 0, q.over.Load().after(turn, now)
	}
	me := &waiter{latest: latest, place: c.Place(), done: make(chan struct{})}
	q.pushLocked(me)
	// Who gives a token back looks at the length of the list, so one that came back
	// before the list grew is found here.
	q.serveLocked(now)
	q.armLocked(now)
	q.mu.Unlock()

	var end <-chan time.Time
	if w != interceptor.Forever {
		t := time.NewTimer(w.Remaining())
		defer t.Stop()
		end = t.C
	}
	select {
	case <-me.done:
	case <-ctx.Done():
		q.leave(me)
		c.Waited(q.name, now)
		return 0, interceptor.Ended(ctx, q.name)
	case <-end:
		q.expire(me)
	}
	c.Waited(q.name, now)
	if me.at == 0 {
		return 0, q.over.Load().after(me.turn, interceptor.Now())
	}
	return me.at, nil
}

// latestOf is the last moment that a token is of use to a call: within its Wait,
// and before its deadline, for at its deadline it is over.
func latestOf(ctx context.Context, w interceptor.Wait) interceptor.Instant {
	latest := interceptor.Instant(w)
	if w == interceptor.None {
		return latest
	}
	if t, ok := ctx.Deadline(); ok {
		latest = min(latest, interceptor.InstantOf(t)-1)
	}
	return latest
}

// Release takes a token back that was not used.
func (q *queue) Release(token int64, o interceptor.Outcome, _ error) {
	if o != interceptor.NotSent {
		return
	}
	q.src.refund(interceptor.Instant(token))
	if q.waiting.Load() > 0 {
		q.serve()
	}
}

// leave is the end of me's waiting without a token.
func (q *queue) leave(me *waiter) {
	q.mu.Lock()
	defer q.mu.Unlock()
	select {
	case <-me.done:
		if me.at == 0 {
			return
		}
		q.src.refund(me.at)
	default:
		q.removeLocked(me)
	}
	now := interceptor.Now()
	q.serveLocked(now)
	q.armLocked(now)
}

// expire is the end of me's Wait. Its turn was to come before that, but others may
// have taken its token from the source. One that has come by now is still its own.
func (q *queue) expire(me *waiter) {
	q.mu.Lock()
	defer q.mu.Unlock()
	now := interceptor.Now()
	q.serveLocked(now)
	select {
	case <-me.done:
	default:
		ahead := 0
		for other := me.prev; other != nil; other = other.prev {
			ahead++
		}
		me.turn = q.src.next(now, ahead)
		q.wakeLocked(me)
	}
	q.armLocked(now)
}

// serve gives out what tokens there are. The timer calls it, too.
func (q *queue) serve() {
	q.mu.Lock()
	defer q.mu.Unlock()
	now := interceptor.Now()
	q.serveLocked(now)
	q.armLocked(now)
}

// serveLocked gives tokens to the first waiters as long as there are any. Caller
// must hold q.mu.
func (q *queue) serveLocked(now interceptor.Instant) {
	for q.head != nil {
		at, ok := q.src.take(now)
		if !ok {
			return
		}
		me := q.head
		me.at = at
		q.wakeLocked(me)
	}
}

// wakeLocked ends the waiting of me, whose fields say how. Caller must hold q.mu.
func (q *queue) wakeLocked(me *waiter) {
	q.removeLocked(me)
	if me.place != nil {
		me.place.Leave()
	}
	close(me.done)
}

// armLocked sets the timer to the moment when the head's token comes. Caller must
// hold q.mu.
func (q *queue) armLocked(now interceptor.Instant) {
	if q.head == nil {
		if q.timer != nil {
			q.timer.Stop()
		}
		return
	}
	d := max(q.src.next(now, 0).Sub(now), 1)
	if _, ok := q.src.(own); !ok {
		d = min(d, lookAgain)
	}
	if q.timer == nil {
		q.timer = time.AfterFunc(d, q.serve)
		return
	}
	q.timer.Reset(d)
}

// update changes the rate of a source that is this package's own. Waiters whose
// turn comes too late now are refused.
func (q *queue) update(p *params) {
	q.mu.Lock()
	defer q.mu.Unlock()
	now := interceptor.Now()
	q.over.Store(p.over)
	if src, ok := q.src.(own); ok {
		src.update(now, p)
	}
	q.serveLocked(now)
	ahead := 0
	for me := q.head; me != nil; {
		next := me.next
		if turn := q.src.next(now, ahead); turn > me.latest {
			me.turn = turn
			q.wakeLocked(me)
		} else {
			ahead++
		}
		me = next
	}
	q.armLocked(now)
}

// full reports whether it is as if nothing had ever been taken.
func (q *queue) full(now interceptor.Instant) bool {
	src, ok := q.src.(own)
	return ok && src.full(now)
}

func (q *queue) pushLocked(me *waiter) {
	if q.tail == nil {
		q.head = me
	} else {
		q.tail.next, me.prev = me, q.tail
	}
	q.tail = me
	q.waiting.Add(1)
}

func (q *queue) removeLocked(me *waiter) {
	if me.prev == nil {
		q.head = me.next
	} else {
		me.prev.next = me.next
	}
	if me.next == nil {
		q.tail = me.prev
	} else {
		me.next.prev = me.prev
	}
	me.prev, me.next = nil, nil
	q.waiting.Add(-1)
}

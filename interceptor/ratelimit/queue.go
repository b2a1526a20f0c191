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
	"github.com/belfry-go/belfry/internal/waitlist"
)

// never is the moment of a token that does not come.
const never interceptor.Instant = math.MaxInt64

// lookAgain is the longest time between looks for the tokens of a source that may change
// from outside, while calls wait.
const lookAgain = time.Second

// A source says when tokens come. It is safe for concurrent use.
type source interface {
	// take takes a token if there is one now. token is what refund needs.
	take(now interceptor.Instant) (token int64, ok bool)
	// next is when the token after so many others can be taken; not before now.
	next(now interceptor.Instant, ahead int) interceptor.Instant
	// refund gives a token back, unless it comes too late.
	refund(token int64)
}

// An own source is one of this package.
type own interface {
	source
	// full reports whether no token is missing.
	full(now interceptor.Instant) bool
	// update changes the rate and keeps what was taken.
	update(now interceptor.Instant, p *params)
}

// A queue gives the tokens of a source to calls, in the order of their ranks. A
// call that finds a token and nobody waiting takes no lock, and neither does one
// that is refused because it may not wait.
//
// Waiting calls do not reserve tokens. So a token that is given back goes to the first in
// the queue and all others move up, a call that gives up leaves no trace, and a changed
// rate applies to those that already wait.
type queue struct {
	name     string
	key      string // Empty if calls are not told apart.
	src      source
	priority interceptor.PriorityFunc
	over     atomic.Pointer[refusals] // Nil until needed. Written under mu.
	waiting  atomic.Int64             // The length of list. Written under mu.

	// mu guards the fields below. The source's own lock may be taken under it, and
	// that of a gate further out, by interceptor.Slot.
	mu      sync.Mutex
	message string // Of refusals.
	list    waitlist.List[waiter]
	timer   *time.Timer // Fires when the token of the first in the list comes; nil until first needed.
}

// A waiter is a call in a queue. Its fields are guarded by the queue's mu, except
// for ok, token and turn, which are set before done is closed and read after.
type waiter struct {
	latest interceptor.Instant // The last moment at which a token is of use to it.
	slot   interceptor.Slot    // The slot that it waits in for a gate further out; may be nil.
	done   chan struct{}       // Closed when the waiter leaves the list with a token or a refusal.
	ok     bool                // It has a token.
	token  int64
	turn   interceptor.Instant // Of a refusal: when its token would have come.
}

func newQueue(name, key string, src source, priority interceptor.PriorityFunc, message string) *queue {
	return &queue{name: name, key: key, src: src, priority: priority, message: message}
}

// acquire takes a token for a call.
func (q *queue) acquire(ctx context.Context, a *interceptor.Admission, w interceptor.Wait) (token int64, err error) {
	waiting, now := q.waiting.Load(), a.Now()
	if waiting == 0 {
		if token, ok := q.src.take(now); ok {
			a.Internals().Pass()
			return token, nil
		}
	}
	latest := latestOf(ctx, w)
	if waiting == 0 || w == interceptor.None { // It does not have to wait behind others.
		if turn := q.src.next(now, int(waiting)); turn > latest || turn == never {
			return 0, q.refusals().after(turn, now)
		}
	}
	if ctx.Err() != nil {
		return 0, interceptor.Ended(ctx, q.name)
	}
	return q.wait(ctx, a, w, latest)
}

// wait waits for a token, unless that would come after latest.
func (q *queue) wait(ctx context.Context, a *interceptor.Admission, w interceptor.Wait, latest interceptor.Instant) (int64, error) {
	rank := waitlist.Rank{Priority: q.priority(ctx, a), Further: a.Attempt() > 0}
	slot := a.Internals().Slot()
	since := interceptor.Now()
	q.mu.Lock()
	q.serveLocked(since)
	if q.list.Len() == 0 {
		if token, ok := q.src.take(since); ok {
			if slot != nil {
				slot.Pass()
			}
			q.mu.Unlock()
			return token, nil
		}
	}
	if turn := q.src.next(since, q.list.Before(rank)); turn > latest || turn == never {
		q.mu.Unlock()
		return 0, q.refusals().after(turn, since)
	}
	me := &waitlist.Node[waiter]{Value: waiter{latest: latest, slot: slot, done: make(chan struct{})}}
	q.list.Push(me, rank)
	q.waiting.Add(1)
	// Whoever gives a token back looks at the length of the list, so a token that came
	// back before the list grew is found here.
	q.serveLocked(since)
	q.armLocked(since)
	q.mu.Unlock()

	parked, done := a.Park(ctx)
	defer done()
	err := w.On(parked, me.Value.done)
	switch err {
	case nil:
	case interceptor.ErrWaitOver:
		q.expire(me)
	default:
		q.leave(me)
	}
	a.Waited(q.name, since)
	switch {
	case err != nil && err != interceptor.ErrWaitOver:
		return 0, interceptor.Ended(parked, q.name)
	case !me.Value.ok:
		return 0, q.refusals().after(me.Value.turn, interceptor.Now())
	}
	return me.Value.token, nil
}

// latestOf returns the last moment at which a token is of use to a call: within its Wait,
// and before its deadline, when it is over.
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

// refusals returns what calls are refused with. Caller must not hold q.mu.
func (q *queue) refusals() *refusals {
	if r := q.over.Load(); r != nil {
		return r
	}
	q.mu.Lock()
	defer q.mu.Unlock()
	r := q.over.Load()
	if r == nil {
		r = newRefusals(q.name, q.key, q.message)
		q.over.Store(r)
	}
	return r
}

// Release takes back the token of a call that was not sent.
func (q *queue) Release(token int64, e interceptor.End) {
	if e.Outcome.Sent() {
		return
	}
	q.src.refund(token)
	if q.waiting.Load() > 0 {
		q.serve()
	}
}

// leave removes me from the queue without a token.
func (q *queue) leave(me *waitlist.Node[waiter]) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.list.Remove(me) {
		q.waiting.Add(-1)
	} else if me.Value.ok {
		q.src.refund(me.Value.token)
	}
	now := interceptor.Now()
	q.serveLocked(now)
	q.armLocked(now)
}

// expire ends me's Wait. Its token was to come before that, but calls of a higher rank or
// other users of the source may have taken it. If a token has come by now, me gets it.
func (q *queue) expire(me *waitlist.Node[waiter]) {
	q.mu.Lock()
	defer q.mu.Unlock()
	now := interceptor.Now()
	q.serveLocked(now)
	if ahead := q.list.Ahead(me, false); ahead >= 0 {
		q.refuseLocked(me, q.src.next(now, ahead))
	}
	q.armLocked(now)
}

// serve gives out the tokens that there are. The timer calls it too.
func (q *queue) serve() {
	q.mu.Lock()
	defer q.mu.Unlock()
	now := interceptor.Now()
	q.serveLocked(now)
	q.armLocked(now)
}

// serveLocked gives tokens to the first in the list as long as there are any.
// Caller must hold q.mu.
func (q *queue) serveLocked(now interceptor.Instant) {
	for me := q.list.First(false); me != nil; me = q.list.First(false) {
		token, ok := q.src.take(now)
		if !ok {
			return
		}
		q.removeLocked(me)
		me.Value.token, me.Value.ok = token, true
		if me.Value.slot != nil {
			me.Value.slot.Pass()
		}
		close(me.Value.done)
	}
}

// refuseLocked refuses me, whose token would come at turn. Caller must hold q.mu.
func (q *queue) refuseLocked(me *waitlist.Node[waiter], turn interceptor.Instant) {
	q.removeLocked(me)
	me.Value.turn = turn
	close(me.Value.done)
}

// removeLocked takes me off the list. Caller must hold q.mu.
func (q *queue) removeLocked(me *waitlist.Node[waiter]) {
	q.list.Remove(me)
	q.waiting.Add(-1)
}

// armLocked sets the timer to the moment when the next token comes. Caller must hold
// q.mu.
func (q *queue) armLocked(now interceptor.Instant) {
	if q.list.Len() == 0 {
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

// update changes the rate of a source of this package. It refuses waiters whose token now
// comes too late.
func (q *queue) update(p *params) {
	q.mu.Lock()
	defer q.mu.Unlock()
	now := interceptor.Now()
	q.message = p.message
	q.over.Store(nil)
	if src, ok := q.src.(own); ok {
		src.update(now, p)
	}
	q.serveLocked(now)
	ahead := 0
	for me := range q.list.All(false) {
		if turn := q.src.next(now, ahead); turn > me.Value.latest {
			q.refuseLocked(me, turn)
		} else {
			ahead++
		}
	}
	q.armLocked(now)
}

// full reports whether no token is missing.
func (q *queue) full(now interceptor.Instant) bool {
	src, ok := q.src.(own)
	return ok && src.full(now)
}

// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package hedge

import (
	"context"
	"sync"
	"time"

	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"github.com/belfry-go/belfry/interceptor"
	"github.com/belfry-go/belfry/internal/repeat"
)

// race is the attempts of one call side by side, until one succeeds or all have
// failed. The first runs on the caller's goroutine; the others on that of the
// timer that started them, or on whichever has just failed. It is over, and no
// goroutine of it is left, when run returns.
type race struct {
	layer    *Layer
	set      *settings
	delay    time.Duration
	ctx      context.Context // The call's.
	call     *interceptor.Call
	origin   interceptor.Origin
	next     interceptor.Next
	inner    interceptor.Gate
	observer interceptor.Observer
	stream   *stream // Nil for a unary call.

	first try

	// mu guards the fields below and, for a stream, its own. Nothing is locked
	// under it but what context.CancelFunc locks.
	mu       sync.Mutex
	change   sync.Cond // Signals running, and what streams wait for.
	timer    *time.Timer
	extra    []*try
	running  int  // Attempts, and goroutines that wait to make one.
	closed   bool // No attempt begins any more.
	winner   *try
	last     *try // The last that failed.
	err      error
	panicked any // What an attempt on a goroutine of ours panicked with.
}

// try is one attempt.
type try struct {
	call   *interceptor.Call
	ctx    context.Context
	cancel context.CancelFunc
	start  interceptor.Instant
	lane   *lane // Of a stream, once it is open.

	// Guarded by race.mu.
	lost bool // It was cancelled because of another; its end means nothing.
	over bool
}

// trailer is what came with the failure of t.
func (t *try) trailer(unary bool) metadata.MD {
	switch {
	case unary:
		return t.call.Trailer()
	case t.lane != nil:
		return t.lane.stream.Trailer()
	}
	return nil
}

// unary carries out a unary call.
func (r *race) unary() error {
	r.first.call = r.call
	r.first.ctx, r.first.cancel = context.WithCancel(r.ctx)
	defer r.first.cancel()
	t, err := r.run()
	if t != &r.first {
		r.call.Adopt(t.call)
		t.cancel()
	}
	return err
}

// run carries out the race. It returns the attempt that decided it, which is the
// last one that failed if err is not nil.
func (r *race) run() (*try, error) {
	r.change.L = &r.mu
	r.first.start = interceptor.Now()
	r.mu.Lock()
	r.running = 1
	if !r.closed {
		r.timer = time.AfterFunc(r.delay, r.tick)
	}
	r.mu.Unlock()
	defer r.close()
	returned := false
	defer func() {
		if !returned { // A panic: the others have to end before it goes on.
			r.mu.Lock()
			defer r.mu.Unlock()
			r.running--
		}
	}()
	err := r.carryOut(&r.first)
	again := r.ended(&r.first, err)
	returned = true
	for again {
		again = r.another(true)
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	for r.running > 0 {
		r.change.Wait()
	}
	if r.panicked != nil {
		panic(r.panicked)
	}
	if r.winner != nil {
		return r.winner, nil
	}
	return r.last, r.err
}

// close ends all attempts but the winner, and waits for them.
func (r *race) close() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.closeLocked(r.winner)
	for r.running > 0 {
		r.change.Wait()
	}
}

// closeLocked ends all attempts but one. Caller must hold r.mu.
func (r *race) closeLocked(but *try) {
	r.noMoreLocked()
	lose := func(t *try) {
		if t != but && !t.over {
			t.lost = true
			t.cancel()
		}
	}
	lose(&r.first)
	for _, t := range r.extra {
		lose(t)
	}
	r.change.Broadcast()
}

// noMoreLocked lets no attempt begin any more. Caller must hold r.mu.
func (r *race) noMoreLocked() {
	r.closed = true
	if r.timer != nil {
		r.timer.Stop()
	}
}

// carryOut carries out an attempt as far as the race goes.
func (r *race) carryOut(t *try) error {
	if r.stream != nil {
		return r.stream.receive(t)
	}
	return r.next(t.ctx, t.call)
}

// tick is called on a goroutine of its own when the delay is over.
func (r *race) tick() {
	for again := r.another(false); again; {
		again = r.another(true)
	}
}

// another makes an extra attempt, and reports whether the next one should follow
// at once. follows says that it follows one that ended, and counts as running
// already.
func (r *race) another(follows bool) (again bool) {
	r.mu.Lock()
	if !follows {
		r.running++
	}
	if r.closed || 1+len(r.extra) >= r.set.max || r.ctx.Err() != nil {
		r.running--
		r.change.Broadcast()
		r.mu.Unlock()
		return false
	}
	t := &try{start: interceptor.Now()}
	t.ctx, t.cancel = context.WithCancel(r.ctx)
	r.extra = append(r.extra, t)
	if 1+len(r.extra) < r.set.max {
		r.timer.Reset(r.delay)
	} else {
		r.timer.Stop()
	}
	r.mu.Unlock()

	var err error
	made, ended := false, false
	defer func() {
		if ended {
			return
		}
		v := recover()
		r.mu.Lock()
		defer r.mu.Unlock()
		if v != nil && r.panicked == nil {
			r.panicked = v // For the caller's goroutine.
			r.closeLocked(nil)
		}
		t.over = true
		t.cancel()
		r.running--
		r.change.Broadcast()
	}()
	if made, err = r.attempt(t); !made {
		return false
	}
	ended = true
	return r.ended(t, err)
}

// attempt pays for an extra attempt, has it admitted and carries it out. made is
// false if it was not sent, which leaves the race as it was.
func (r *race) attempt(t *try) (made bool, err error) {
	b := r.layer.budget
	if !b.Withdraw(t.start) {
		r.observer.Budget(r.layer.name, b.Balance())
		r.observer.Refused(r.call.Method(), r.layer.name, interceptor.ReasonBudget)
		r.mu.Lock()
		r.noMoreLocked() // A call does not live long enough for that to change.
		r.mu.Unlock()
		return false, nil
	}
	defer func() {
		if !made {
			b.Refund(t.start)
		}
		r.observer.Budget(r.layer.name, b.Balance())
	}()
	f := r.origin.Fork()
	f.KeepTrailer()
	ctx := repeat.WithPrevious(t.ctx, f.Attempt())
	if r.inner.Admit(ctx, f, interceptor.None) != nil {
		return false, nil // The stack has told the observer.
	}
	t.call, t.ctx = f, ctx
	r.observer.HedgeFired(r.call.Method(), r.layer.name)
	err = r.carryOut(t)
	if refusal, ok := interceptor.AsRefusal(err); ok && refusal.NotSent() {
		return false, nil
	}
	return true, err
}

// ended notes how an attempt ended, and reports whether the next one should
// follow at once. If so it still counts as running, until that does.
func (r *race) ended(t *try, err error) (again bool) {
	now := interceptor.Now()
	r.mu.Lock()
	defer r.mu.Unlock()
	defer func() {
		if !again {
			r.running--
			r.change.Broadcast()
		}
		t.over = true
		if t != r.winner {
			t.cancel()
		}
	}()
	switch {
	case r.winner != nil || t.lost:
		// How long the first attempt took until another one won is less than it would
		// have taken. But leaving it out would leave out the slowest calls, and move
		// the percentile down, to where more and more calls are hedged. Of other
		// attempts it says nothing.
		if t == &r.first && r.winner != nil {
			r.layer.latencies.Record(now.Sub(t.start))
		}
		return false
	case err == nil:
		r.winner = t
		if r.stream != nil {
			r.stream.chooseLocked(t)
		} else {
			r.closeLocked(t)
		}
		r.layer.latencies.Record(now.Sub(t.start))
		if t != &r.first {
			r.observer.HedgeWon(r.call.Method(), r.layer.name)
		}
		return false
	}
	refusal, refused := interceptor.AsRefusal(err)
	if r.err == nil || !refused || !refusal.NotSent() {
		r.last, r.err = t, err
	}
	wish := repeat.WishOf(err, t.trailer(r.stream == nil))
	nonFatal := r.set.nonFatal.Has(status.Code(err))
	if refused {
		nonFatal = !refusal.NotSent() && refusal.Reason == interceptor.ReasonDeadline // Of the attempt.
	}
	if r.ctx.Err() != nil || wish.Stop || !nonFatal {
		r.noMoreLocked() // The others go on: one of them may succeed.
		return false
	}
	if wish.After == 0 || r.closed {
		return !r.closed
	}
	// The server's delay replaces ours. The attempt counts as running meanwhile, so
	// that the race is not over, and is cancelled if another one wins.
	r.timer.Stop()
	r.mu.Unlock()
	slept := interceptor.Forever.Sleep(t.ctx, now.Add(wish.After))
	r.mu.Lock()
	return slept == nil && !r.closed
}

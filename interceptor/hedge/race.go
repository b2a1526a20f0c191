// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package hedge

import (
	"context"
	"slices"
	"sync"
	"time"

	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"github.com/belfry-go/belfry/interceptor"
	"github.com/belfry-go/belfry/internal/attempt"
	"github.com/belfry-go/belfry/internal/further"
	"github.com/belfry-go/belfry/internal/replay"
)

// race runs the attempts of one call side by side, until one succeeds or all have failed.
// The first runs on the caller's goroutine. The others run on one that the layer's clock
// starts, or on that of the attempt that has just failed. When run returns, the race is
// over and none of its goroutines is left.
//
// A race whose first attempt ends before the delay is reused: such a call allocates only
// the context of the attempt.
type race struct {
	further.Call
	layer  *Layer
	set    *settings
	max    int // Attempts.
	delay  time.Duration
	ctx    context.Context // The call's.
	next   interceptor.Next
	stream *stream // Nil for a unary call.

	first  try
	alarm  alarm // When the next extra attempt is due.
	reused bool  // It will be.

	// mu guards the fields below. The layer's clock, and what cancelling a context locks,
	// are locked under it.
	mu       sync.Mutex
	change   sync.Cond // Signals running.
	hedged   bool      // Another attempt was made or tried.
	extra    []*try    // Without those that were refused.
	running  int       // Attempts, and goroutines that are about to make one.
	closed   bool      // No attempt starts any more.
	winner   *try
	last     *try  // The last that failed,
	err      error // with this error,
	refusal  error // and the refusal of the attempt that was to follow it, if any.
	panicked any   // What an attempt on a goroutine of ours panicked with.
}

// try is one attempt.
type try struct {
	ctx   *cancelContext
	call  *interceptor.Call
	start interceptor.Instant // When it was sent.
	lane  *replay.Lane        // Of a stream, once it is open.
	reply any                 // Of a stream: what the first message of an extra attempt is received to.
	eof   bool                // Of a stream: it ended well without a message.

	// Guarded by race.mu.
	started bool // It was admitted.
	lost    bool // It was cancelled because another one won; its end means nothing.
	over    bool
}

func (t *try) cancel() { t.ctx.cancel() }

// trailer returns the trailer of a failed attempt.
func (t *try) trailer() metadata.MD {
	if t.lane != nil {
		return t.lane.Trailer()
	}
	return t.call.Internals().Trailer()
}

// verdict says what follows the end of an attempt.
type verdict struct {
	again bool          // Another attempt,
	after time.Duration // after the delay that the server asks for,
	err   error         // because the last one failed with this error.
}

// init prepares a race.
func (r *race) init(l *Layer, set *settings, delay time.Duration, ctx context.Context, c *interceptor.Call, next interceptor.Next, again interceptor.Again) {
	r.Call, r.layer, r.set, r.delay, r.ctx, r.next = l.maker.Of(c, c.Origin(), again), l, set, delay, ctx, next
	r.max = set.attempts(c)
	r.first.ctx, r.first.call = &cancelContext{Context: ctx}, c
	r.Call.Origin.Expendable = true
	r.alarm.race = r
	r.change.L = &r.mu
	c.Internals().WantTrailer()
}

// unary carries out a unary call.
func (r *race) unary(now interceptor.Instant) error {
	defer r.first.cancel()
	t, err := r.run(now)
	if t != &r.first {
		r.Adopt(t.call)
		t.cancel()
	}
	return err
}

// reuse gives back a race that is over and that only the caller has seen.
func (r *race) reuse() {
	if l := r.layer; r.reused {
		*r = race{}
		l.races.Put(r)
	}
}

// run carries out the race. It returns the attempt that decided it: the winner, or the
// last one that failed if err is not nil.
func (r *race) run(now interceptor.Instant) (*try, error) {
	r.first.start = now
	r.mu.Lock()
	r.running = 1
	r.first.started = true
	if !r.closed {
		r.layer.clock.set(&r.alarm, r.first.start, r.delay)
	}
	r.mu.Unlock()
	returned := false
	defer func() {
		if !returned {
			r.close()
		}
	}()
	err := r.carryOut(r.first.ctx, &r.first)
	v := r.ended(&r.first, err)
	returned = true
	for v.again {
		v = r.another(v, true)
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	for r.running > 0 {
		r.change.Wait()
	}
	r.noMoreLocked()
	switch {
	case r.panicked != nil:
		panic(r.panicked)
	case r.winner != nil:
		return r.winner, nil
	case r.refusal != nil:
		return r.last, r.Refused(r.ctx, r.refusal, r.err)
	}
	return r.last, r.err
}

// close ends the other attempts when the first one panics.
func (r *race) close() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.running--
	r.closeLocked(nil)
	for r.running > 0 {
		r.change.Wait()
	}
}

// closeLocked ends all attempts but one. Caller must hold r.mu.
func (r *race) closeLocked(but *try) {
	r.noMoreLocked()
	r.loseLocked(&r.first, but)
	for _, t := range r.extra {
		r.loseLocked(t, but)
	}
	r.change.Broadcast()
}

func (r *race) loseLocked(t, but *try) {
	if t != but && !t.over {
		t.lost = true
		t.cancel()
	}
}

// noMoreLocked keeps further attempts from starting. Caller must hold r.mu.
func (r *race) noMoreLocked() {
	if !r.closed {
		r.closed = true
		// An alarm that could be stopped has started nothing.
		r.reused = r.layer.clock.stop(&r.alarm) && !r.hedged
	}
	for _, t := range r.extra {
		if !t.started {
			t.cancel()
		}
	}
}

// carryOut runs an attempt: a unary call, or a stream up to its first response.
func (r *race) carryOut(ctx context.Context, t *try) error {
	if r.stream != nil {
		return r.stream.receive(ctx, t)
	}
	return r.next(ctx, t.call)
}

// tick is called on a goroutine of its own when the delay is over.
func (r *race) tick() {
	r.mu.Lock()
	closed := r.closed
	if !closed {
		r.running++
	}
	r.mu.Unlock()
	if closed {
		return
	}
	for v := r.another(verdict{}, false); v.again; {
		v = r.another(v, true)
	}
}

// another makes an extra attempt, which already counts as running. follows says that it
// follows one that failed.
func (r *race) another(v verdict, follows bool) verdict {
	r.mu.Lock()
	r.hedged = true
	r.layer.clock.stop(&r.alarm)
	if r.closed || 1+len(r.extra) >= r.max || r.ctx.Err() != nil {
		r.leaveLocked()
		r.mu.Unlock()
		return verdict{}
	}
	t := &try{ctx: &cancelContext{Context: r.ctx}}
	r.extra = append(r.extra, t)
	r.mu.Unlock()

	ended := false
	defer func() {
		if ended {
			return
		}
		p := recover()
		r.mu.Lock()
		defer r.mu.Unlock()
		if p != nil && r.panicked == nil {
			r.panicked = p // For the caller's goroutine.
			r.closeLocked(nil)
		}
		t.over = true
		t.cancel()
		r.leaveLocked()
	}()
	// It may wait for the layers inside, ahead of first attempts, until another attempt
	// answers.
	a, err := r.Make(t.ctx, further.Plan{Delay: v.after, After: v.err, Run: func(ctx context.Context, c *interceptor.Call) error {
		if !r.start(t, c) {
			return interceptor.Ended(ctx, r.layer.maker.Name)
		}
		return r.carryOut(ctx, t)
	}})
	if a.Call == nil {
		r.refused(t, err, follows)
		return verdict{}
	}
	v = r.ended(t, a.Err)
	ended = true
	return v
}

// start records that an extra attempt was admitted, and now runs on c. It gives c up
// and returns false if it comes too late: a permit that an attempt waits for may be the
// one that the first attempt had when it answered.
func (r *race) start(t *try, c *interceptor.Call) (started bool) {
	defer func() {
		if !started { // Or a panic of the observer.
			c.GiveUp()
		}
	}()
	t.call, t.start = c, interceptor.Now()
	r.mu.Lock()
	closed := r.closed
	if !closed {
		t.started = true
		if 1+len(r.extra) < r.max {
			r.layer.clock.set(&r.alarm, t.start, r.delay)
		}
	}
	r.mu.Unlock()
	if closed {
		return false
	}
	r.HedgeFired()
	return true
}

// refused records that an extra attempt was refused.
func (r *race) refused(t *try, err error, follows bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if i := slices.Index(r.extra, t); i >= 0 {
		r.extra = slices.Delete(r.extra, i, i+1)
	}
	if r.closed && r.ctx.Err() == nil {
		return // It was cancelled.
	}
	if follows {
		r.refusal = err
	}
	if refusal, ok := interceptor.AsRefusal(err); ok && refusal.Reason == interceptor.ReasonBudget {
		r.noMoreLocked() // That does not change during a call.
	} else if !r.closed && r.running > 1 { // The others may stay slow.
		r.layer.clock.set(&r.alarm, interceptor.Now(), r.delay)
	}
}

// leaveLocked ends an attempt, or a goroutine that was to make one. Caller must hold
// r.mu.
func (r *race) leaveLocked() {
	r.running--
	r.change.Broadcast()
}

// ended records how an attempt ended. If another one follows, this one counts as running
// until the other does.
func (r *race) ended(t *try, err error) verdict {
	now := interceptor.Now()
	r.mu.Lock()
	defer r.mu.Unlock()
	v := r.judgeLocked(t, err, now)
	t.over = true
	if t != r.winner {
		t.cancel()
	}
	if !v.again {
		r.leaveLocked()
	}
	if s := r.stream; s != nil && t.lane != nil && r.winner == nil && r.running > 0 {
		s.Pass(t.lane)
	}
	return v
}

// judgeLocked decides what follows the end of an attempt. Caller must hold r.mu.
func (r *race) judgeLocked(t *try, err error, now interceptor.Instant) verdict {
	switch {
	case r.winner != nil || t.lost:
		// The time of a first attempt until another one won is less than it would have
		// taken. But leaving it out would leave out the slowest calls, and the percentile
		// would sink until more and more calls are hedged. It is not recorded for other
		// attempts.
		if t == &r.first && r.winner != nil {
			r.layer.record(t.start, now)
		}
		return verdict{}
	case err == nil:
		r.winner = t
		r.closeLocked(t)
		r.layer.record(t.start, now)
		if t != &r.first {
			r.HedgeWon()
		}
		return verdict{}
	}
	refusal, refused := interceptor.AsRefusal(err)
	if r.err == nil || !refused || !refusal.NotSent() {
		r.last, r.err = t, err
	}
	v := r.follows(err, t.trailer())
	if !v.again {
		r.noMoreLocked() // The others continue: one of them may succeed.
	}
	v.again = v.again && !r.closed
	return v
}

// follows decides whether an attempt that failed with err may be followed by another one.
func (r *race) follows(err error, trailer metadata.MD) verdict {
	nonFatal := r.set.nonFatal.Has(status.Code(err))
	if refusal, refused := interceptor.AsRefusal(err); refused {
		nonFatal = !refusal.NotSent() && refusal.Reason == interceptor.ReasonDeadline // Of the attempt.
	}
	wish := attempt.WishOf(err, trailer)
	return verdict{r.ctx.Err() == nil && nonFatal && !wish.Stop && wish.After <= r.set.longest, wish.After, err}
}

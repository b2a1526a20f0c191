// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package hedge

import (
	"context"
	"runtime/debug"
	"slices"
	"sync"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/grpclog"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"github.com/belfry-go/belfry/interceptor"
	"github.com/belfry-go/belfry/internal/attempt"
	"github.com/belfry-go/belfry/internal/further"
	"github.com/belfry-go/belfry/internal/replay"
)

// race runs the attempts of one call side by side, until one of them decides it or all
// have failed. What a connection does with an attempt may take longer than its context:
// credentials fetch a token, a large request is compressed. So each attempt of a unary call
// runs on a goroutine of its own, with a Call of its own, and those that lose may end after
// the call has returned. The streams are open by then: the first one is received from on
// the caller's goroutine, which waits for it to notice that it has lost.
type race struct {
	raceState

	mu     sync.Mutex // Guards the fields of raceState that say so.
	change sync.Cond  // Signals making, running and decided.

	leads func() // The method lead. Nil for a stream.
	ticks func() // The method tick.
}

// raceState is what a race knows of one call. A race that is reused starts with the zero
// raceState.
type raceState struct {
	further.Call
	plan
	layer  *Layer
	set    *settings
	max    int             // Attempts.
	ctx    context.Context // The call's.
	next   interceptor.Next
	stream *stream // Nil for a unary call.

	first try

	// Guarded by race.mu. What cancelling a context locks is locked under it.
	timer    *time.Timer // Calls tick after the delay. Nil before it is first set.
	armed    bool        // It is set, and was not stopped.
	shared   bool        // Another goroutine than the first attempt's may know the race.
	extra    []*try      // Without those that were refused.
	making   int         // Attempts that are not admitted yet.
	running  int         // Attempts, and goroutines that are about to make one.
	closed   bool        // No attempt starts any more.
	decided  bool        // The call ends with best.
	slow     bool        // An extra attempt was made because the others took long.
	chosen   *try        // Of a stream: the attempt with which the call ends, however that ends.
	best     *try        // The attempt that the call would end with now,
	rank     rank        // how much its end says,
	err      error       // and its error.
	refusal  error       // The refusal of an attempt that was to follow best, if any.
	panicked any         // What an attempt panicked with.
}

// try is one attempt.
type try struct {
	ctx    context.Context
	cancel context.CancelFunc
	call   *interceptor.Call
	start  interceptor.Instant // When it was sent.
	lane   *replay.Lane        // Of a stream, once it is open.
	reply  any                 // Of a stream: what the first message of an extra attempt is received to.
	eof    bool                // Of a stream: it ended well without a message.

	// Guarded by race.mu.
	making  bool // It is not admitted yet.
	started bool // It was admitted.
	lost    bool // It was cancelled because the call is decided; its end means nothing.
	over    bool
}

// trailer returns the trailer of an attempt whose end is err; nil of a stream that has
// answered with a message, and goes on.
func (t *try) trailer(err error) metadata.MD {
	switch {
	case t.lane != nil && err == nil && !t.eof && t.call.Desc().ServerStreams:
		return nil
	case t.lane != nil:
		return t.lane.Trailer()
	}
	return t.call.Internals().Trailer()
}

// A rank is how much the end of an attempt says to the caller. One of a lower rank never
// replaces one of a higher.
type rank uint8

const (
	notSent  rank = iota // A layer inside refused it, or gRPC made no stream for it.
	deadline             // It did not answer in time.
	answer
)

// verdict says what follows the end of an attempt.
type verdict struct {
	again bool          // Another attempt,
	after time.Duration // after the delay that the server asks for,
	err   error         // because the last one failed with this error.
}

// init prepares a race.
func (r *race) init(l *Layer, set *settings, p plan, ctx context.Context, c *interceptor.Call, next interceptor.Next, again interceptor.Again) {
	r.Call = further.Call{Call: c, Maker: l.maker, Origin: c.Origin(), Again: again}
	r.layer, r.set, r.plan, r.ctx, r.next = l, set, p, ctx, next
	r.max = set.attempts(c)
	r.first.call = c
	r.first.ctx, r.first.cancel = context.WithCancel(ctx)
	r.Call.Origin.Expendable = true
}

// unary carries out a unary call.
func (r *race) unary(now interceptor.Instant) error {
	defer r.first.cancel()
	r.first.call = r.Internals().Detach()
	r.first.call.Internals().WantTrailer()
	t, err := r.run(now)
	r.Adopt(t.call)
	t.cancel()
	if !r.shared {
		r.reuse()
	}
	return err
}

// races are unary races that nobody uses.
var races = sync.Pool{New: func() any {
	r := new(race)
	r.setUp()
	r.leads = r.lead
	return r
}}

// setUp makes r, which is new, a race of a stream.
func (r *race) setUp() { r.change.L, r.ticks = &r.mu, r.tick }

// reuse gives a race back that nobody else knows: the first attempt has ended, and none was
// made beside it. Its goroutine may still be about to return from the lock.
func (r *race) reuse() {
	r.Internals().Reattach(r.first.call)
	r.raceState = raceState{}
	races.Put(r)
}

// run carries out the race. It returns the attempt that decided it, and its error.
func (r *race) run(now interceptor.Instant) (*try, error) {
	r.first.start = now
	r.mu.Lock()
	r.running = 1
	r.first.started = true
	if !r.closed {
		r.armLocked()
	}
	r.mu.Unlock()
	if r.stream == nil {
		go r.leads()
	} else {
		r.lead()
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	for r.making > 0 || r.running > 0 && !r.decided {
		r.change.Wait()
	}
	r.noMoreLocked()
	if r.slow && r.ctx.Err() != context.Canceled {
		r.tell(r.err == nil && r.best != &r.first)
	}
	switch {
	case r.panicked != nil:
		panic(r.panicked)
	case r.err == nil && r.best != &r.first:
		r.HedgeWon()
	case r.refusal != nil:
		return r.best, r.Refused(r.ctx, r.refusal, r.err)
	}
	return r.best, r.err
}

// lead carries out the first attempt. Unless another one follows, it does not use the race
// after ended, because the caller may have given it back.
func (r *race) lead() {
	t, returned := &r.first, false
	defer r.unwind(t, &returned)
	v := r.ended(t, r.carryOut(t.ctx, t))
	returned = true
	if v.again {
		go r.follow(v, true)
	}
}

// follow makes an attempt, which counts as running already, and those that follow it at
// once. follows says that it follows one that failed itself.
func (r *race) follow(v verdict, follows bool) {
	for v.again = true; v.again; follows = true {
		v = r.another(v, follows)
	}
}

// unwind ends an attempt that has panicked, or whose goroutine has ended in it, unless it
// has returned.
func (r *race) unwind(t *try, returned *bool) {
	if *returned {
		return
	}
	p := recover()
	r.mu.Lock()
	defer r.mu.Unlock()
	switch {
	case r.decided: // The caller may have gone on, so its goroutine cannot panic.
		if p != nil {
			logger.Errorf("hedge: an attempt that had lost panicked: %v\n%s", p, debug.Stack())
		}
	case p != nil:
		r.panicked = p // For the caller's goroutine.
		r.decideLocked(t, errGone)
	case r.best == nil || r.chosen == t:
		r.best, r.err = t, errGone
	}
	t.over = true
	t.cancel()
	r.madeLocked(t)
	r.leaveLocked()
}

var logger = grpclog.Component("belfry")

var errGone = status.Error(codes.Internal, "belfry: hedge: an attempt ended its goroutine (runtime.Goexit)")

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
	r.closed = true
	r.disarmLocked()
	for _, t := range r.extra {
		if !t.started {
			t.cancel()
		}
	}
}

// armLocked makes an extra attempt after the delay. Caller must hold r.mu.
func (r *race) armLocked() {
	r.armed = true
	if r.timer == nil {
		r.timer = time.AfterFunc(r.delay, r.ticks)
		return
	}
	r.timer.Reset(r.delay)
}

func (r *race) disarmLocked() {
	if r.armed && !r.timer.Stop() {
		r.shared = true // It calls tick.
	}
	r.armed = false
}

// carryOut runs an attempt: a unary call, or a stream up to its first response.
func (r *race) carryOut(ctx context.Context, t *try) error {
	if r.stream != nil {
		return r.stream.receive(ctx, t)
	}
	return r.next(ctx, t.call)
}

// tick is called by the timer.
func (r *race) tick() {
	r.mu.Lock()
	due, first := !r.closed, len(r.extra) == 0
	r.mu.Unlock()
	if !due || first && !r.due() {
		return
	}
	r.mu.Lock()
	if due = !r.closed; due {
		r.running++
	}
	r.mu.Unlock()
	if due {
		r.follow(verdict{}, false)
	}
}

// another makes an extra attempt, which already counts as running. follows says that it
// follows one that failed.
func (r *race) another(v verdict, follows bool) verdict {
	r.mu.Lock()
	r.disarmLocked()
	if r.closed || 1+len(r.extra) >= r.max || r.ctx.Err() != nil {
		r.leaveLocked()
		r.mu.Unlock()
		return verdict{}
	}
	t := &try{making: true}
	t.ctx, t.cancel = context.WithCancel(r.ctx)
	r.making++
	r.extra = append(r.extra, t)
	r.mu.Unlock()

	returned := false
	defer r.unwind(t, &returned)
	// It may wait for the layers inside, ahead of first attempts, until another attempt
	// answers.
	reason := "SLOW"
	if follows {
		reason = status.Code(v.err).String()
	}
	a, err := r.Make(t.ctx, further.Plan{Hedge: true, Delay: v.after, After: v.err, Reason: reason, Run: func(ctx context.Context, c *interceptor.Call) error {
		if !r.start(t, c, !follows) {
			return interceptor.Ended(ctx, r.layer.maker.Name)
		}
		return r.carryOut(ctx, t)
	}})
	if a.Call == nil {
		r.refused(t, err, follows)
		v = verdict{}
	} else {
		v = r.ended(t, a.Err)
	}
	returned = true
	return v
}

// start records that an extra attempt was admitted, and now runs on c. It gives c up
// and returns false if it comes too late: a permit that an attempt waits for may be the
// one that the first attempt had when it answered.
func (r *race) start(t *try, c *interceptor.Call, slow bool) (started bool) {
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
		r.slow = r.slow || slow
		if 1+len(r.extra) < r.max {
			r.armLocked()
		}
	}
	r.mu.Unlock()
	if closed {
		return false
	}
	r.HedgeFired()
	r.mu.Lock()
	defer r.mu.Unlock()
	r.madeLocked(t)
	return true
}

// madeLocked records that an extra attempt was admitted or will never be: it does not
// use the call of the race any more. Caller must hold r.mu.
func (r *race) madeLocked(t *try) {
	if t.making {
		t.making = false
		r.making--
		r.change.Broadcast()
	}
}

// refused records that an extra attempt was refused.
func (r *race) refused(t *try, err error, follows bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	defer r.leaveLocked()
	r.madeLocked(t)
	if i := slices.Index(r.extra, t); i >= 0 {
		r.extra = slices.Delete(r.extra, i, i+1)
	}
	if r.decided || r.closed && r.ctx.Err() == nil {
		return // It was cancelled.
	}
	if follows {
		r.refusal = err
	}
	if refusal, ok := interceptor.AsRefusal(err); ok && refusal.Reason == interceptor.ReasonBudget {
		r.noMoreLocked() // That does not change during a call.
	} else if !r.closed && r.running > 1 { // The others may stay slow.
		r.armLocked()
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
	rank := r.rankOf(t, err)
	opinion := r.ask(t, err, rank)
	r.mu.Lock()
	defer r.mu.Unlock()
	var v verdict
	if !r.decided && !t.lost {
		v = r.judgeLocked(t, err, rank, opinion, now)
	}
	t.over = true
	if t != r.best || r.err != nil {
		t.cancel()
	}
	if v.again {
		r.shared = true
	} else {
		r.leaveLocked()
	}
	if s := r.stream; s != nil && t.lane != nil && !r.decided && r.running > 0 {
		s.Pass(t.lane)
	}
	return v
}

// ask asks the policy about an attempt that was sent.
func (r *race) ask(t *try, err error, end rank) Verdict {
	p := r.layer.policy
	if p == nil || end == notSent {
		return ByCode
	}
	r.mu.Lock()
	late := r.decided || t.lost
	r.mu.Unlock()
	if late {
		return ByCode
	}
	a := Attempt{Method: t.call.Method(), N: t.call.Attempt() + 1, Err: err, Trailer: t.trailer(err)}
	switch {
	case err != nil:
	case r.stream == nil:
		a.Reply = t.call.Reply()
	default:
		a.Reply = r.stream.message(t)
	}
	return p(r.ctx, &a)
}

// judgeLocked decides what follows the end of an attempt. Caller must hold r.mu.
func (r *race) judgeLocked(t *try, err error, rank rank, v Verdict, now interceptor.Instant) verdict {
	more := true
	over := r.ctx.Err() != nil
	if v == ByCode {
		v, more = r.byCode(err, rank)
	}
	if r.best == nil || rank >= r.rank || t == r.chosen {
		if r.best != nil && r.best != t {
			r.best.cancel()
		}
		r.best, r.rank, r.err, r.refusal = t, rank, err, nil
	}
	if rank == answer && !over {
		r.record(t.start, now, err)
	}
	if v == Answer || over || t == r.chosen {
		r.decideLocked(t, err)
		if t != &r.first && !r.first.over && !over {
			// The time of a first attempt until another one won is less than it would have
			// taken. But leaving it out would leave out the slowest calls, and the percentile
			// would sink until more and more calls are hedged. It is not recorded for other
			// attempts.
			r.record(r.first.start, now, nil)
		}
		return verdict{}
	}
	after, may := r.wish(err, t.trailer(err))
	if !more || !may {
		r.noMoreLocked() // The others continue: one of them may succeed.
		return verdict{}
	}
	return verdict{v == Hedge && !r.closed, after, err}
}

// decideLocked ends the call with best. t has ended with err. Caller must hold r.mu.
func (r *race) decideLocked(t *try, err error) {
	r.decided = true
	if r.best == nil {
		r.best, r.err = t, err
	}
	r.closeLocked(t)
}

// wish returns what the server that failed an attempt says about another one: whether it
// may be made, and after how long.
func (r *race) wish(err error, trailer metadata.MD) (after time.Duration, may bool) {
	w := attempt.WishOf(err, trailer)
	return w.After, !w.Stop && w.After <= r.set.longest
}

// follows decides whether another attempt follows the first one, which failed with err
// before the race.
func (r *race) follows(err error) (after time.Duration, again bool) {
	rank, more := r.rankOf(&r.first, err), true
	v := r.ask(&r.first, err, rank)
	if v == ByCode {
		v, more = r.byCode(err, rank)
	}
	after, may := r.wish(err, r.first.trailer(err))
	return after, v == Hedge && more && may && r.ctx.Err() == nil && 1+len(r.extra) < r.max
}

// byCode is the verdict of Config.NonFatal. more says that further attempts may be made.
func (r *race) byCode(err error, end rank) (v Verdict, more bool) {
	if err == nil {
		return Answer, false
	}
	nonFatal := r.set.nonFatal.Has(status.Code(err))
	_, refused := interceptor.AsRefusal(err)
	switch {
	case end == deadline && refused: // Of the attempt.
		return Hedge, true
	case nonFatal && !refused:
		return Hedge, true
	case nonFatal || end == notSent: // A retry inside could not make another attempt either.
		return Wait, false
	}
	return Answer, false
}

func (r *race) rankOf(t *try, err error) rank {
	if err == nil {
		return answer
	}
	refusal, refused := interceptor.AsRefusal(err)
	switch {
	case refused && refusal.NotSent():
		return notSent
	case refused && refusal.Reason == interceptor.ReasonDeadline:
		return deadline
	case !t.call.Internals().LastOutcome(t.ctx, err).Sent():
		return notSent
	}
	switch status.Code(err) {
	case codes.DeadlineExceeded, codes.Canceled:
		if r.expired() {
			return deadline
		}
	}
	return answer
}

// expired reports whether a deadline of the call has passed, the caller's or that of a
// layer outside.
func (r *race) expired() bool {
	if r.ctx.Err() == context.Canceled {
		refusal, ok := interceptor.AsRefusal(context.Cause(r.ctx))
		return ok && refusal.Reason == interceptor.ReasonDeadline
	}
	d, ok := r.ctx.Deadline()
	return ok && !time.Now().Before(d)
}

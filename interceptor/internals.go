// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package interceptor

import (
	"context"
	"sync/atomic"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/metadata"

	"github.com/belfry-go/belfry/internal/attempt"
	"github.com/belfry-go/belfry/internal/message"
	"github.com/belfry-go/belfry/internal/result"
)

// Internals are the methods of a call that only belfry's own layers need. They may
// change in any release.
type Internals Call

// A Slot is what a call holds while it waits on behalf of a gate further out, such as
// a slot of a buffer.
//
// A gate that can wait ([Waits]) calls Pass once for each admission, at the moment
// that it gives the call what it waits for: under its own lock if it has one, and
// before it wakes the call. If it waited until the call's goroutine ran, a call that
// comes in between would be refused for a slot that nobody waits in. The slot is free
// when the last gate inside the buffer that can wait has called Pass. A gate may leave
// this out; then the slot is given back when the inner gates have answered.
//
// Pass may be called from any goroutine. It does not block.
type Slot interface {
	Pass()
}

// Seen is the call as observers are told about it.
func (i *Internals) Seen() Observed { return (*Call)(i).observed() }

// Slot returns the slot that the call waits in, nil if it has none. A gate reads it on
// the call's own goroutine before it parks the call.
func (i *Internals) Slot() Slot { return i.slot }

// Pass calls Pass of the slot that the call waits in, if it has one. A gate that can wait
// and knows no better moment calls it when it has let the call through.
func (i *Internals) Pass() {
	if i.slot != nil {
		i.slot.Pass()
	}
}

// SetSlot sets the slot for the gates inside, and returns the previous one, which the
// gate restores after the inner gate. A Slot that replaces another passes that one too.
func (i *Internals) SetSlot(s Slot) (before Slot) {
	before, i.slot = i.slot, s
	return before
}

// SetLater sets how long further attempts may wait that are made inside, where the call
// itself does not wait, and returns what held before.
func (i *Internals) SetLater(w Wait) (before Wait) {
	before, i.later = i.later, w
	return before
}

// Trying reports whether a gate further out asks with [Admission.Try]. Then a refusal
// is not necessarily the end of the call.
func (i *Internals) Trying() bool { return i.trying }

// Bound sets the deadline of a layer for the gates inside it: no Wait that they choose
// ends later. It returns the previous bound, zero if there was none, which the layer
// restores with SetBound after the inner gate. A later bound than the previous one
// changes nothing. It saves a deadline layer the context that only an admitted call
// needs.
func (i *Internals) Bound(deadline Instant) (before Instant) {
	before = i.bound
	if before == 0 || deadline < before {
		i.bound = deadline
	}
	return before
}

// Deadline returns the deadline of the call: that of ctx, or an earlier one of a layer
// outside; zero if there is none.
func (i *Internals) Deadline(ctx context.Context) Instant {
	end := i.bound
	if t, ok := ctx.Deadline(); ok && (end == 0 || InstantOf(t) < end) {
		end = InstantOf(t)
	}
	return end
}

// SetBound restores a bound that [Internals.Bound] returned.
func (i *Internals) SetBound(b Instant) { i.bound = b }

// Widen returns the longer of the Waits w and to, but not beyond the deadlines of the
// layers outside ([Internals.Bound]), and None for an attempt that never waits. The
// gate that widens bounds how many calls wait: a buffer has a bounded number of slots.
func (i *Internals) Widen(w, to Wait) Wait {
	w = max(w, to)
	if i.bound != 0 {
		w = min(w, i.bound.Wait())
	}
	return w
}

// NeverWaits reports whether this is an attempt that must not wait anywhere.
func (i *Internals) NeverWaits() bool { return i.bound == never }

// Expendable reports whether this attempt must not push another call out of a full
// queue ([Origin.Expendable]): it is refused, or pushed out itself. It is admitted in
// the same order as other further attempts.
func (i *Internals) Expendable() bool { return i.expendable }

// never is the bound of an attempt that never waits: a moment that has passed.
const never Instant = 1

// Observed reports whether the stack has an observer. A layer asks if it is costly to
// find out what it would report.
func (i *Internals) Observed() bool { return i.prog.obs != nil }

// OnGRPC reports whether the connection of the call is gRPC's own.
func (i *Internals) OnGRPC() bool { return i.grpcConn != nil }

// slowAnswer is the duration above which a third-party limiter or a predicate in a gate
// is reported as waiting. It does not say whether it waited.
const slowAnswer = time.Millisecond

// Consulted reports that a gate of the named layer called a third-party limiter or a
// predicate at the given moment, which has answered now. The gates inside go by the
// moment of the answer. Consult does it.
func (i *Internals) Consulted(layer string, since Instant) {
	i.now = Now()
	if i.now.Sub(since) >= slowAnswer {
		(*Admission)(i).Waited(layer, since)
	}
}

// MayRepeat says that a layer may make further attempts of the call. Then the balancing
// policy learns where the earlier ones of it went, and the server how many they are. The
// layer calls it in the call path, before it passes the call on. It costs an allocation,
// but for calls without a connection, as in a test.
func (i *Internals) MayRepeat() {
	if i.series == nil && (i.cc != nil || i.conn != nil) {
		i.series = new(attempt.Series)
	}
}

// Detach moves the first attempt to a Call of its own, with its own reply and results, as
// [Again] makes one, so that it may outlive the call. The layer passes that one to next,
// instead of the call, and adopts it ([Call.Adopt]) if the call ends with it.
func (i *Internals) Detach() *Call {
	c := (*Call)(i)
	o, inside := c.Origin(), boundary{id: c.entered + 1} // The one inside the layer that runs.
	f := inside.detach(&o)
	f.reply = message.NewLike(c.reply)
	f.own, f.opts = result.Redirect(c.opts)
	f.vars = f.own
	return f
}

// Reattach takes back f, which Detach made of the call, so that both can be reused. f has
// ended and the caller uses it no more. Nothing else does: nobody has made a further
// attempt of it that may still run.
func (i *Internals) Reattach(f *Call) {
	// If other attempts were made of the call, one of them may still refer to f.
	if f.root.forks.Add(-1) == 0 {
		p := f.prog
		f.reset(p)
		p.calls.Put(f)
	}
}

// AdmittedAt is when the call was admitted: the last reading of the clock by its gates,
// provided that every gate that waits says so with [Admission.Waited].
func (i *Internals) AdmittedAt() Instant { return (*Admission)(i).Now() }

// WantTrailer asks for the trailer of a unary attempt. A layer that obeys what a server
// says in it calls it before it passes the call on.
func (i *Internals) WantTrailer() { i.wantTrailer = true }

// Trailer returns the trailer of a unary attempt that has ended, if WantTrailer was
// called before, or nil.
func (i *Internals) Trailer() metadata.MD { return i.trailer }

// Outcome returns how the call or attempt ended with err, as the gates outside the layer
// that asks will be told. ctx is what the layer passed to next.
func (i *Internals) Outcome(ctx context.Context, err error) Outcome {
	return judge(ctx, err, i.fate|attempt.Fate(i.fates.Load()))
}

// LastOutcome is Outcome for the last of the attempts that layers inside have made of the
// call, whose error err is.
func (i *Internals) LastOutcome(ctx context.Context, err error) Outcome {
	if last := i.last.Load(); last != 0 {
		return judge(ctx, err, attempt.Fate(last-1))
	}
	return i.Outcome(ctx, err)
}

// ReportRefusal tells the observer that a further attempt was refused with err.
func (i *Internals) ReportRefusal(err error) { (*Call)(i).refused(err) }

// Repeatable prepares a stream of which the layer may make further attempts, before the
// layer passes it on: the first attempt then has its own results for Header, Trailer and
// Peer options, as the further ones have. See [Call.Adopt].
func (i *Internals) Repeatable() {
	v, opts := result.Redirect(i.opts)
	if v == nil {
		return
	}
	i.scope.around = i.vars
	i.scope.chosen.Store(v)
	i.vars, i.opts = v, opts
}

// AtStreamEnd has f.StreamEnded called when the stream that the layer returns has ended
// for the layers outside, however it ended. It is called once, from any goroutine, and
// must not block. A layer calls AtStreamEnd before it returns.
func (i *Internals) AtStreamEnd(f interface{ StreamEnded() }) { i.scope.ender = f }

// Sends returns the count of the messages that the connection takes for the stream that the
// call is about to open. A layer inside that keeps a message for an attempt that it has yet
// to make takes it, too, but nothing is sent. A layer calls Sends before it calls next.
func (i *Internals) Sends() *atomic.Uint32 {
	i.root.counts.Store(true)
	return &i.scope.sends
}

// A StreamEnd ends a stream for the layers outside the one that made it. A layer that
// cuts streams short, such as an idle timeout, needs it: if nobody reads from the stream
// any more, the layers outside would not learn that it is over, and would keep what they
// hold for it.
type StreamEnd struct{ scope *scope }

// StreamEnd returns the StreamEnd of the stream that the call is about to open. A layer
// calls it in the call path, before it calls next.
func (i *Internals) StreamEnd() StreamEnd { return StreamEnd{i.scope} }

// End releases what the layers outside hold for the stream, up to the nearest one that
// may open another stream, as if RecvMsg had returned err to them. The layer cancels
// the stream's context first, with a [*Refusal] as the cause. End may be called from any
// goroutine. It does nothing if the stream has ended.
func (e StreamEnd) End(err error) {
	if e.scope != nil {
		e.scope.await(true)
		_ = e.scope.end(err, false)
	}
}

// ParkOf is [Admission.Park] for a connection that lets calls wait itself, such as a
// Maker behind a stack. opts are the options that the connection was called with. If no
// stack is in front, parked is ctx.
func ParkOf(ctx context.Context, opts []grpc.CallOption) (parked context.Context, done func()) {
	for _, o := range opts {
		if o, ok := o.(*carriedWait); ok {
			return o.call.Park(ctx)
		}
	}
	return ctx, func() {}
}

// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package interceptor

import (
	"context"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/metadata"
)

// Internals is the face of a call that belfry's own layers see, and that no other
// layer needs. It may change in any release.
type Internals Call

// A Slot is where a call waits on behalf of a gate further out, such as one of the
// slots of a buffer, which is taken only while the call waits.
//
// A gate that can wait ([Waits]) calls Pass once for each admission, in the same
// moment in which it gives the call what it waits for: under the lock of its own
// state if it has one, and before it wakes the call. Otherwise the slot stays
// taken until the call's goroutine happens to run, and a call that comes in
// between is refused for lack of a slot that nobody waits in. When the last gate
// inside the buffer that can wait has passed the call, its slot is free. A gate
// may leave this out: the slot is given back when the inner gates have answered.
//
// Pass may be called from any goroutine. It does not block.
type Slot interface {
	Pass()
}

// Slot returns the slot that the call waits in, nil if there is none. A gate reads
// it before it parks the call, on the call's own goroutine.
func (i *Internals) Slot() Slot { return i.slot }

// SetSlot sets the slot for the gates inside, and returns the one that held
// before, which the gate restores after the inner gate. A Slot that replaces
// another one passes that one too.
func (i *Internals) SetSlot(s Slot) (before Slot) {
	before, i.slot = i.slot, s
	return before
}

// Trying reports whether a gate further out asks with [Admission.Try], so that a
// refusal need not be the end of the call.
func (i *Internals) Trying() bool { return i.trying }

// Bound sets the deadline of a layer for the gates inside it: whatever Wait they
// choose, it ends by then. It returns the bound that held before, zero if none
// did, which the layer restores after the inner gate with SetBound. A bound later
// than the one that holds changes nothing. It spares a deadline layer the context
// that the call path will need, should the call be admitted.
func (i *Internals) Bound(deadline Instant) (before Instant) {
	before = i.bound
	if before == 0 || deadline < before {
		i.bound = deadline
	}
	return before
}

// SetBound restores a bound that [Internals.Bound] returned.
func (i *Internals) SetBound(b Instant) { i.bound = b }

// Widen returns the Wait that allows the more of w and to, but never more than
// the deadlines of the layers outside ([Internals.Bound]), and nothing for an
// attempt that never waits. The gate that widens has made sure
// that not every call gets to wait: a buffer has a bounded number of slots.
func (i *Internals) Widen(w, to Wait) Wait {
	w = max(w, to)
	if i.bound != 0 {
		w = min(w, i.bound.Wait())
	}
	return w
}

// NeverWaits reports whether this is an attempt that must not wait anywhere.
func (i *Internals) NeverWaits() bool { return i.bound == never }

// Expendable reports whether this is an attempt for whose sake no other call should
// be refused ([Origin.Expendable]): where the room to wait is full it is refused, or
// makes room. In the order in which calls are admitted it is a further attempt like
// all others.
func (i *Internals) Expendable() bool { return i.expendable }

// never is the bound of an attempt that never waits: a moment that has passed.
const never Instant = 1

// Observed reports whether the stack has an observer, for a layer to which it costs
// something to know what it would tell one.
func (i *Internals) Observed() bool { return i.prog.obs != nil }

// slowAnswer is the duration from which on the time that foreign code took in a gate
// is reported as waiting, because the code does not say whether it has waited.
const slowAnswer = time.Millisecond

// Consulted says that a gate of the named layer has called foreign code at the given
// moment, such as a limiter or a predicate, which has answered now. The gates inside
// go by that moment.
func (i *Internals) Consulted(layer string, since Instant) {
	i.now = Now()
	if i.now.Sub(since) >= slowAnswer {
		(*Admission)(i).Waited(layer, since)
	}
}

// Balanced reports whether a picker may choose the endpoint of the attempt,
// which is so for every connection. It is not for an interceptor that was given
// none, as in a test; a layer then need not say for the picker what it knows.
func (i *Internals) Balanced() bool { return i.cc != nil || i.conn != nil }

// AdmittedAt is the last reading of the clock by the gates of a call that enters the
// call path: when it was admitted, if every gate that waits says so
// ([Admission.Waited]).
func (i *Internals) AdmittedAt() Instant { return (*Admission)(i).Now() }

// WantTrailer asks for the trailer of a unary attempt, for a layer that obeys what
// a server says in it. It is called before the call is passed on.
func (i *Internals) WantTrailer() { i.wantTrailer = true }

// Trailer returns the trailer of a unary attempt that has ended, if WantTrailer
// was called before it; otherwise, or if the server sent none, nil.
func (i *Internals) Trailer() metadata.MD { return i.trailer }

// Outcome says how the call or attempt ended with err, as the gates outside of the
// layer that asks will be told. ctx is what the layer passed to next.
func (i *Internals) Outcome(ctx context.Context, err error) Outcome {
	return judge(ctx, err, i.fate|fate(i.fates.Load()))
}

// ReportRefusal tells the observer that err refused a further attempt.
func (i *Internals) ReportRefusal(err error) { i.prog.refused(i.method, err) }

// A StreamEnd ends a stream for the layers outside the one that made it. A layer
// that cuts streams short on its own account, such as an idle timeout, needs it:
// nobody may be reading from the stream any more, and then the layers outside
// would not hear that it is over, and would keep what they hold for it.
type StreamEnd struct{ scope *scope }

// StreamEnd returns what ends the stream that the call is about to open. A layer
// calls it in the call path, before it calls next.
func (i *Internals) StreamEnd() StreamEnd { return StreamEnd{i.scope} }

// End releases what the layers outside hold for the stream, as if RecvMsg had
// returned err to them, up to the nearest that may open another one. The layer
// has cancelled the stream's context by then, with a [*Refusal] as the cause. It
// may be called from any goroutine; if the stream has ended it does nothing.
func (e StreamEnd) End(err error) {
	if e.scope != nil {
		e.scope.end(err, false)
	}
}

// ParkOf is [Admission.Park] for a connection that lets calls wait itself, such as
// a Maker behind a stack: opts are what the connection was called with. Without a
// stack in front parked is ctx.
func ParkOf(ctx context.Context, opts []grpc.CallOption) (parked context.Context, done func()) {
	for _, o := range opts {
		if o, ok := o.(*carriedWait); ok {
			return o.call.Park(ctx)
		}
	}
	return ctx, func() {}
}

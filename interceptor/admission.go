// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package interceptor

import (
	"context"

	"google.golang.org/grpc"
)

// A Releaser takes back what a gate took for a call. Its dynamic type must be
// comparable, as pointers are. Release is called exactly once for each
// [Admission.Hold], possibly from another goroutine than Admit; it must not block.
// token is what Hold was given, and e says how the call or attempt ended as seen
// where the ticket's gate stands.
type Releaser interface {
	Release(token int64, e End)
}

// A Responder is a [Releaser] that learns of a stream by its first response, not
// by its end. Respond is called at most once for each Hold, before Release, when
// a stream whose server may send many messages has delivered its header or its
// first message; e is a success. End.Responded then tells Release of it.
type Responder interface {
	Releaser
	Respond(token int64, e End)
}

// A note is what one half of a layer tells the other about a call.
type note struct {
	of    any
	value int64
}

// An Admission is a call on its way through the gates. It is the call as gates see
// it; [Call] is the same as the call path sees it.
//
// It belongs to the goroutine that runs the gates; none of its methods may be
// called concurrently. A gate does not keep it.
type Admission Call

// Method is the full method name, such as "/helloworld.Greeter/SayHello".
func (a *Admission) Method() string { return a.method }

// Kind is the kind of the call.
func (a *Admission) Kind() Kind { return a.kind }

// Desc describes the stream; nil for a unary call.
func (a *Admission) Desc() *grpc.StreamDesc { return a.desc }

// Attempt counts the attempts of the call that were begun before this one: 0 is
// the first. Further attempts go ahead of first ones in every queue.
func (a *Admission) Attempt() int { return a.attempt }

// Request is the request of a unary call; nil for a stream.
func (a *Admission) Request() any { return a.req }

// Observer is the stack's observer; never nil.
func (a *Admission) Observer() Observer { return (*Call)(a).Observer() }

// Now is the time, read once per admission and then remembered: all gates that a
// call passes without waiting share one reading. A gate that has waited says so
// ([Admission.Waited]), and the next reading is fresh.
func (a *Admission) Now() Instant {
	if a.now == 0 {
		a.now = Now()
	}
	return a.now
}

// Waited says that a gate of the named layer has waited since the given moment,
// whether it then admitted the call or not.
func (a *Admission) Waited(layer string, since Instant) {
	a.now = Now()
	if o := a.prog.obs; o != nil {
		o.Waited(a.method, layer, a.now.Sub(since))
	}
}

// Timed says that somebody wants to know when the call was sent: [End.Took] and
// [End.SentAt] tell.
func (a *Admission) Timed() { a.timed = true }

// Held reports whether r holds a ticket on this call.
func (a *Admission) Held(r Releaser) bool {
	for i := range a.tickets {
		if a.tickets[i].r == r {
			return true
		}
	}
	return false
}

// Note leaves a note for the call half of a layer, which finds it with
// [Call.Noted]. of is the layer.
func (a *Admission) Note(of any, value int64) {
	a.notes = append(a.notes, note{of, value})
}

// Try asks inner for capacity that is there now, without waiting. If it refuses,
// everything that inner left on the call is released, and mayWait says whether it
// could admit the call if that waited.
func (a *Admission) Try(ctx context.Context, inner Gate) (mayWait bool, err error) {
	tickets, notes, slot, trying := len(a.tickets), len(a.notes), a.slot, a.trying
	a.slot, a.trying = nil, true
	err = inner.Admit(ctx, a, None)
	a.slot, a.trying = slot, trying
	if err == nil {
		return false, nil
	}
	a.admitted = false
	(*Call)(a).release(tickets, -1, End{Outcome: NotSent, Err: err})
	clear(a.notes[notes:])
	a.notes = a.notes[:notes]
	return ctx.Err() == nil && a.waitMayHelp(ctx, err), err
}

// pass tells a buffer further out that a gate which can wait has passed the call.
func (a *Admission) pass() {
	if a.slot != nil {
		a.slot.Pass()
	}
}

// waitMayHelp reports whether a call that was refused under [None] with err could
// be admitted if it waited. It is so unless err is a [Refusal] for a reason that
// has nothing to do with capacity, or one that says that capacity comes after the
// call's deadline: what was decided by a filter, a throttle or a breaker would only
// be decided once more.
func (a *Admission) waitMayHelp(ctx context.Context, err error) bool {
	r, ok := AsRefusal(err)
	if !ok {
		return true
	}
	switch r.Reason {
	case ReasonFilter, ReasonThrottled, ReasonBreakerOpen, ReasonFailFast, ReasonDrain, ReasonBudget,
		ReasonDeadline, ReasonCancelled, ReasonClosed:
		return false
	}
	if r.RetryAfter == 0 {
		return true
	}
	end := a.bound
	if t, ok := ctx.Deadline(); ok && (end == 0 || InstantOf(t) < end) {
		end = InstantOf(t)
	}
	// A RetryAfter may be rounded up by an eighth.
	return end == 0 || a.Now().Add(r.RetryAfter-r.RetryAfter/9) <= end
}

// Park says that the call is about to wait in this gate. parked is the context to
// wait with: it ends with ctx, and also when the stack drains, when the connection
// is closed and when a buffer further out gives the call's slot to another one.
// [Ended] of parked says which. The gate calls done when the call no longer waits.
func (a *Admission) Park(ctx context.Context) (parked context.Context, done func()) {
	return (*Call)(a).Park(ctx)
}

// Internals is what only belfry's own layers need of a call.
func (a *Admission) Internals() *Internals { return (*Internals)(a) }

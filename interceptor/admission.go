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
// token is what Hold was given, and e says how the call or attempt ended as that gate
// sees it.
type Releaser interface {
	Release(token int64, e End)
}

// A Responder is a [Releaser] that judges a stream by its first response and not by
// its end. Respond is called at most once for each Hold, before Release, when a stream
// whose server may send many messages has delivered its header or its first message;
// e is a success. Release then gets an End with Responded set.
type Responder interface {
	Releaser
	Respond(token int64, e End)
}

// A note is what the gate of a layer tells its call half about a call.
type note struct {
	of    any
	value int64
}

// An Admission is a call as gates see it, on its way through them. [Call] is the same
// call as the call path sees it.
//
// It belongs to the goroutine that runs the gates. None of its methods may be called
// concurrently, and a gate must not keep it.
type Admission Call

// Method is the full method name, such as "/helloworld.Greeter/SayHello".
func (a *Admission) Method() string { return a.method }

// Kind is the kind of the call.
func (a *Admission) Kind() Kind { return a.kind }

// Desc describes the stream; nil for a unary call.
func (a *Admission) Desc() *grpc.StreamDesc { return a.desc }

// Attempt is the number of attempts of the call before this one: 0 for the first.
// Further attempts go ahead of first ones in every queue.
func (a *Admission) Attempt() int { return a.attempt }

// Request is the request of a unary call; nil for a stream.
func (a *Admission) Request() any { return a.req }

// Observer is the stack's observer; never nil.
func (a *Admission) Observer() Observer { return (*Call)(a).Observer() }

// Now returns the time. It is read once per admission, so all gates that a call passes
// without waiting share one reading. A gate that has waited says so
// ([Admission.Waited]), and the next reading is fresh.
func (a *Admission) Now() Instant {
	if a.now == 0 {
		a.now = Now()
	}
	return a.now
}

// Waited reports to the observer that a gate of the named layer has waited since the
// given moment, whether or not it then admitted the call.
func (a *Admission) Waited(layer string, since Instant) {
	a.now = Now()
	if o := a.prog.obs; o != nil {
		o.Waited((*Call)(a).observed(), layer, a.now.Sub(since))
	}
}

// Timed asks for [End.Took] and [End.SentAt], which are zero without it.
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

// Note leaves a note for the call half of a layer, which reads it with [Call.Noted].
// of is the layer.
func (a *Admission) Note(of any, value int64) {
	a.notes = append(a.notes, note{of, value})
}

// Try asks inner to admit the call without waiting. If inner refuses, everything that
// it left on the call is released, and mayWait says whether the call could be admitted
// if it waited. If inner admits the call, its further attempts may wait until later.
func (a *Admission) Try(ctx context.Context, inner Gate, later Wait) (mayWait bool, err error) {
	tickets, notes, slot, trying, before := len(a.tickets), len(a.notes), a.slot, a.trying, a.later
	a.slot, a.trying, a.later = nil, true, later
	err = inner.Admit(ctx, a, None)
	a.slot, a.trying, a.later = slot, trying, before
	if err == nil {
		return false, nil
	}
	a.admitted = false
	if tickets < len(a.tickets) {
		(*Call)(a).release(tickets, End{Outcome: NotSent, Err: err})
	}
	clear(a.notes[notes:])
	a.notes = a.notes[:notes]
	return ctx.Err() == nil && a.waitMayHelp(ctx, err), err
}

// waitMayHelp reports whether a call that was refused under [None] with err could be
// admitted if it waited. It could not if err is a [Refusal] that waiting cannot
// change, because a filter, throttle or breaker decided it, or if capacity comes after
// the call's deadline.
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
	end := a.Internals().Deadline(ctx)
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

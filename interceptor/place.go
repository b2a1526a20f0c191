// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package interceptor

// A Place is where a call waits on behalf of a gate further out, such as one of
// the places of a buffer, which is taken only while the call waits.
//
// A gate that shares a state among calls, such as a limit, calls Leave in the same
// moment in which it gives the call what it waits for, under the lock of that
// state if it has one, and before it wakes the call. Otherwise the place stays
// taken until the call's goroutine happens to run, and a call that comes in
// between is refused for lack of a place that nobody waits in. A gate may leave
// this to the gate that gave the place: it takes it back when the inner gates have
// answered.
//
// Leave may be called from any goroutine, also more than once. It does not block.
type Place interface {
	Leave()
}

// Place returns the place the call waits in, nil if there is none. A gate reads
// it before it parks the call, on the call's own goroutine, and forgets it when
// the call no longer waits.
func (c *Call) Place() Place { return c.place }

// SetPlace sets the place the call waits in for the gates inside, and returns
// the one that held before, which the gate restores after the inner gate. A
// Place that replaces another one leaves that one too when it is left.
func (c *Call) SetPlace(p Place) (before Place) {
	before, c.place = c.place, p
	return before
}

// WaitMayHelp reports whether a call that a gate refused under [None] with err
// could be admitted by it if it waited, which is what a gate asks that is about to
// let the call wait. It is so unless err is a [Refusal] for a reason that has
// nothing to do with capacity: what was decided by a filter, a throttle or a
// breaker would only be decided once more.
func WaitMayHelp(err error) bool {
	r, ok := AsRefusal(err)
	if !ok {
		return true
	}
	switch r.Reason {
	case ReasonFilter, ReasonThrottled, ReasonBreakerOpen, ReasonFailFast, ReasonDrain, ReasonBudget, ReasonDeadline, ReasonCancelled:
		return false
	}
	return true
}

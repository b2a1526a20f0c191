// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package interceptor

import (
	"context"
	"time"

	"github.com/belfry-go/belfry/internal/isnil"
)

// An Observer sees what a stack does. Its methods are called on the path of
// every call, concurrently, and while layers hold their locks: they must not block, and
// must not call back into the stack. Embed [NopObserver] to be ready for methods that
// later versions add.
type Observer interface {
	// Admitted is called when a call has passed all gates, and again when a further
	// attempt (attempt > 0) has passed those inside the layer that makes it.
	Admitted(method string, kind Kind, attempt int)
	// Refused is called when a layer refused a call, before or after it was sent,
	// or refused a further attempt.
	Refused(method, layer string, reason Reason)
	// Waited is called when a gate has waited for d, whether it admitted the call or not.
	Waited(method, layer string, d time.Duration)
	// Attempt is called when an attempt is handed to the connection; 0 is the first.
	Attempt(method string, attempt int)
	// Ended is called once for each call that was admitted, when it is over; err is
	// what the caller got.
	Ended(method string, kind Kind, o Outcome, err error)
	// InFlight is called with +1 when a call enters the stack, and with -1 when it is
	// over or was refused. Calls that wait count.
	InFlight(delta int)

	// Further is called when a layer makes a further attempt, before that runs. ctx is of
	// the attempt. It derives from that of the call.
	Further(ctx context.Context, method, layer string, f FurtherAttempt)
	// HedgeFired is called by a hedge layer when it starts an extra attempt,
	// HedgeWon when the result of an extra attempt is the call's. ctx is of the call.
	HedgeFired(ctx context.Context, method, layer string)
	HedgeWon(ctx context.Context, method, layer string)
	// Budget is called by a layer when the balance of its budget has changed.
	Budget(layer string, balance float64)
	// Limit is called when a limit has changed, or that of a key, with the next call that
	// it admits.
	Limit(l LimitState)
	// Observes is called when s begins to use the observer, and again after
	// [Stack.Replace]. The observer may read the limits of s at any time, see [Limits]; it
	// should not keep s alive.
	Observes(s *Stack)
}

// A FurtherAttempt is what a layer makes after, or beside, other attempts of a call.
type FurtherAttempt struct {
	Attempt int // its number: 1 is the first further attempt of the call
	// Reason is the status code that the attempt before it ended with, such as
	// "Unavailable", or what a retry's policy says. It is "SLOW" for an attempt of a hedge
	// that follows none.
	Reason string
	Delay  time.Duration // the back-off before it
	After  error         // what the attempt before it failed with; nil if it did not fail
}

// NopObserver observes nothing. It is what a stack without [Observe] has.
type NopObserver struct{}

// Admitted does nothing.
func (NopObserver) Admitted(string, Kind, int) {}

// Refused does nothing.
func (NopObserver) Refused(string, string, Reason) {}

// Waited does nothing.
func (NopObserver) Waited(string, string, time.Duration) {}

// Attempt does nothing.
func (NopObserver) Attempt(string, int) {}

// Ended does nothing.
func (NopObserver) Ended(string, Kind, Outcome, error) {}

// InFlight does nothing.
func (NopObserver) InFlight(int) {}

// Further does nothing.
func (NopObserver) Further(context.Context, string, string, FurtherAttempt) {}

// HedgeFired does nothing.
func (NopObserver) HedgeFired(context.Context, string, string) {}

// HedgeWon does nothing.
func (NopObserver) HedgeWon(context.Context, string, string) {}

// Budget does nothing.
func (NopObserver) Budget(string, float64) {}

// Limit does nothing.
func (NopObserver) Limit(LimitState) {}

// Observes does nothing.
func (NopObserver) Observes(*Stack) {}

// Observe returns the Spec of a layer that lets o see its whole stack, at whatever
// position. A stack may have one, and the same observer may serve many stacks.
func Observe(o Observer) Spec {
	if isnil.Value(o) {
		return failed{&ConfigError{Layer: "interceptor", Field: "Observe", Value: o, Rule: "must be an observer"}}
	}
	return &observe{o: o}
}

type observe struct {
	GateOnly
	CallOnly
	o Observer
}

func (l *observe) NewLayer() (Layer, error) { return l, nil }
func (*observe) String() string             { return "observe" }
func (*observe) Traits() Traits             { return 0 }

// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package interceptor

import (
	"context"
	"net"
	"slices"
	"strconv"
	"time"

	"google.golang.org/grpc"

	"github.com/belfry-go/belfry/internal/attempt"
	"github.com/belfry-go/belfry/internal/isnil"
)

// An Observer sees what a stack does. Its methods are called on the path of
// every call, concurrently, and while layers hold their locks: they must not block, and
// must not call back into the stack. Embed [NopObserver] to be ready for methods that
// later versions add.
type Observer interface {
	// InFlight is called with +1 when a call enters the stack, and with -1 when it is
	// over or was refused. Calls that wait count.
	InFlight(c Observed, delta int)
	// Waited is called when a gate has waited for d, whether it admitted the call or not.
	Waited(c Observed, layer string, d time.Duration)
	// Admitted is called when a call has passed all gates, and again when a further
	// attempt has passed those inside the layer that makes it.
	Admitted(c Observed)
	// Refused is called when a layer refused a call, before or after it was sent,
	// or refused a further attempt. r must not be changed.
	Refused(c Observed, r *Refusal)
	// Attempt is called when an attempt is handed to the connection, and AttemptEnded when
	// that has ended. A hedge may continue after its call has ended.
	Attempt(c Observed)
	AttemptEnded(c Observed, e ObservedEnd)
	// Ended is called once for each call, also one that was refused, when it is over.
	Ended(c Observed, e ObservedEnd)

	// Further is called when a layer makes a further attempt, before that runs. c is that
	// attempt.
	Further(c Observed, layer string, f FurtherAttempt)
	// HedgeFired is called by a hedge layer when it starts an extra attempt,
	// HedgeWon when the result of an extra attempt is the call's.
	HedgeFired(c Observed, layer string)
	HedgeWon(c Observed, layer string)
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

// An Observed is the call, or the attempt of it, that an [Observer] is told about.
type Observed struct {
	// Context is that of the call as the stack was given it. That of a further attempt
	// derives from it.
	Context context.Context
	Stack   string           // the name of the stack, see [Named]
	Conn    *grpc.ClientConn // where the call goes; nil if that is not gRPC's own
	Method  string           // the full name
	// Static says that generated code makes the call, so that there are only so many names
	// like Method. It is not known yet when a call is turned away because the stack drains.
	Static  bool
	Kind    Kind
	Attempt int // 0 is the first
}

// An ObservedEnd is how a call or an attempt ended.
type ObservedEnd struct {
	// Took is the time since the call entered the stack, all waiting included, or since
	// the attempt was handed to the connection.
	Took    time.Duration
	Outcome Outcome
	Err     error    // what the caller, or the layer that made the attempt, gets
	Peer    net.Addr // the endpoint of an attempt; nil if it is not known
}

// A FurtherAttempt is what a layer makes after, or beside, other attempts of a call.
type FurtherAttempt struct {
	Hedge   bool // whether it is made beside others, and not after them
	Attempt int  // its number: 1 is the first further attempt of the call
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
func (NopObserver) Admitted(Observed) {}

// Refused does nothing.
func (NopObserver) Refused(Observed, *Refusal) {}

// Waited does nothing.
func (NopObserver) Waited(Observed, string, time.Duration) {}

// Attempt does nothing.
func (NopObserver) Attempt(Observed) {}

// AttemptEnded does nothing.
func (NopObserver) AttemptEnded(Observed, ObservedEnd) {}

// Ended does nothing.
func (NopObserver) Ended(Observed, ObservedEnd) {}

// InFlight does nothing.
func (NopObserver) InFlight(Observed, int) {}

// Further does nothing.
func (NopObserver) Further(Observed, string, FurtherAttempt) {}

// HedgeFired does nothing.
func (NopObserver) HedgeFired(Observed, string) {}

// HedgeWon does nothing.
func (NopObserver) HedgeWon(Observed, string) {}

// Budget does nothing.
func (NopObserver) Budget(string, float64) {}

// Limit does nothing.
func (NopObserver) Limit(LimitState) {}

// Observes does nothing.
func (NopObserver) Observes(*Stack) {}

// Observe returns the Spec of a layer that lets observers see its whole stack, at whatever
// position. Each is told in turn. A stack may have one such layer, and the same observer may
// serve many stacks.
func Observe(o Observer, more ...Observer) Spec {
	all := append([]Observer{o}, more...)
	if i := slices.IndexFunc(all, func(o Observer) bool { return isnil.Value(o) }); i >= 0 {
		return failed{&ConfigError{Layer: "interceptor", Field: "Observe", Value: all[i], Rule: "must be an observer"}}
	}
	if len(all) > 1 {
		o = observers(all)
	}
	return &observe{o: o}
}

// observers are told one after the other.
type observers []Observer

func (os observers) InFlight(c Observed, delta int) {
	for _, o := range os {
		o.InFlight(c, delta)
	}
}

func (os observers) Waited(c Observed, layer string, d time.Duration) {
	for _, o := range os {
		o.Waited(c, layer, d)
	}
}

func (os observers) Admitted(c Observed) {
	for _, o := range os {
		o.Admitted(c)
	}
}

func (os observers) Refused(c Observed, r *Refusal) {
	for _, o := range os {
		o.Refused(c, r)
	}
}

func (os observers) Attempt(c Observed) {
	for _, o := range os {
		o.Attempt(c)
	}
}

func (os observers) AttemptEnded(c Observed, e ObservedEnd) {
	for _, o := range os {
		o.AttemptEnded(c, e)
	}
}

func (os observers) Ended(c Observed, e ObservedEnd) {
	for _, o := range os {
		o.Ended(c, e)
	}
}

func (os observers) Further(c Observed, layer string, f FurtherAttempt) {
	for _, o := range os {
		o.Further(c, layer, f)
	}
}

func (os observers) HedgeFired(c Observed, layer string) {
	for _, o := range os {
		o.HedgeFired(c, layer)
	}
}

func (os observers) HedgeWon(c Observed, layer string) {
	for _, o := range os {
		o.HedgeWon(c, layer)
	}
}

func (os observers) Budget(layer string, balance float64) {
	for _, o := range os {
		o.Budget(layer, balance)
	}
}

func (os observers) Limit(l LimitState) {
	for _, o := range os {
		o.Limit(l)
	}
}

func (os observers) Observes(s *Stack) {
	for _, o := range os {
		o.Observes(s)
	}
}

// observed is c as the observer is told about it.
func (c *Call) observed() Observed {
	return Observed{Context: c.ctx, Stack: c.prog.name, Conn: c.grpcConn, Method: c.method, Static: c.root.static, Kind: c.kind, Attempt: c.attempt}
}

// attemptEnded tells the observer how an attempt ended that ctx was the context of.
func (c *Call) attemptEnded(ctx context.Context, o Observer, fate attempt.Fate, err error, peer net.Addr) {
	e := ObservedEnd{Took: Now().Sub(c.departed), Err: err, Peer: peer}
	if err != nil {
		e.Outcome = judge(ctx, err, fate)
	}
	o.AttemptEnded(c.observed(), e)
}

// Named returns the Spec of a layer that does nothing but give its stack a name, which
// observers and pages tell stacks apart by. It must not be empty. A stack may have one; the
// name of one without is "stack".
func Named(name string) Spec {
	if name == "" {
		return failed{&ConfigError{Layer: "interceptor", Field: "Named", Value: name, Rule: "must not be empty"}}
	}
	return &named{name: name}
}

type named struct {
	GateOnly
	CallOnly
	name string
}

func (l *named) NewLayer() (Layer, error) { return l, nil }
func (l *named) String() string           { return "name " + strconv.Quote(l.name) }
func (*named) Traits() Traits             { return 0 }

type observe struct {
	GateOnly
	CallOnly
	o Observer
}

func (l *observe) NewLayer() (Layer, error) { return l, nil }
func (*observe) String() string             { return "observe" }
func (*observe) Traits() Traits             { return 0 }

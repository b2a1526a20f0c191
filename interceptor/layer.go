// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package interceptor

import (
	"context"
	"fmt"
	"strings"
)

// A Gate admits calls: the counterpart of Tower's poll_ready. Admit may wait as
// long as w allows, or refuse with an error, which is what the caller gets: a
// [*Refusal], what [Ended] returns if ctx ended, or any error with a gRPC status.
// What it takes for the call it leaves on the admission with [Admission.Hold].
//
// Every gate asks the gate inside it once before it admits, with the w it was given
// or one that it has narrowed ([Wait.Narrow]); one that wants to ask without waiting
// first uses [Admission.Try]. A gate that fails need not clean up: what it and the
// gates inside it left on the admission is released as [NotSent].
// A gate may be asked twice for one call, because a buffer or a fail-fast further
// out asks first whether there is capacity now, and then lets the call wait; what
// it held the first time has been released by then.
//
// A gate sees the context and the call as they are outside of all layers that
// take part in the call path: admission runs before any of these.
//
// Admit is called concurrently. It does not keep a.
type Gate interface {
	Admit(ctx context.Context, a *Admission, w Wait) error
}

// GateFunc is a function as a [Gate].
type GateFunc func(ctx context.Context, a *Admission, w Wait) error

// Admit calls f.
func (f GateFunc) Admit(ctx context.Context, a *Admission, w Wait) error { return f(ctx, a, w) }

// Next is the call path: it carries out the call, or the attempt, that c
// describes. For a unary call it returns when the call is over, and its error is
// the call's. For a stream it returns when the stream is open, [Call.Stream] is
// then the stream, or when it could not be opened.
//
// A Next is called at most once for each Call. A further attempt is a Call of its
// own, which [Again] makes.
type Next func(ctx context.Context, c *Call) error

// A Layer takes part in admission, in the call, or in both; most do one and embed
// [GateOnly] or [CallOnly] for the other half. It has one state, however many
// connections, methods and kinds of call it serves, so both methods may be
// called more than once and what they return is used concurrently.
//
// Both are called when a stack is compiled, not for each call. They may not
// return nil. A layer may also have a method Traits() [Traits].
type Layer interface {
	// NewLayer returns the layer itself.
	Spec
	// WrapGate returns the gate of this layer and all inside it. inner is the gate
	// of the layers inside.
	WrapGate(inner Gate) Gate
	// WrapCall returns the call path of this layer and all inside it. next is the
	// call path of the layers inside: what the gates inside took for the call is
	// released when it is over. again makes further attempts; a layer that makes
	// none ignores it.
	WrapCall(next Next, again Again) Next
}

// A Spec can become a layer: the Config of every layer package can, and every
// Layer can. NewStack takes Specs.
type Spec interface {
	// NewLayer makes the layer, or says what is wrong, with a [*ConfigError] where a
	// setting is.
	NewLayer() (Layer, error)
}

// GateOnly is embedded by a layer that takes part in admission alone. It also
// tells the stack that nothing needs to be done between this layer and the next
// when a call ends, so a type that embeds it must not define WrapCall.
type GateOnly struct{}

// WrapCall returns next.
func (GateOnly) WrapCall(next Next, _ Again) Next { return next }

func (GateOnly) gateOnly() {}

// CallOnly is embedded by a layer that takes part in the call alone.
type CallOnly struct{}

// WrapGate returns inner.
func (CallOnly) WrapGate(inner Gate) Gate { return inner }

func (CallOnly) callOnly() {}

// isGateOnly reports whether l leaves the call path alone.
func isGateOnly(l Layer) bool {
	_, ok := l.(interface{ gateOnly() })
	return ok
}

// Traits say what a layer does, as far as its place in a stack depends on it. A
// layer says so with a method Traits; one that has none [Waits] unless it embeds
// [CallOnly].
type Traits uint8

const (
	// Waits is a layer that can be not ready: its gate lets calls wait for
	// something, or refuses those that may not wait.
	Waits Traits = 1 << iota
	// Decides is a layer whose gate decides by what holds at that moment, such as a
	// rate or a breaker. It belongs inside of what waits, so that its decision still
	// holds when the call is sent.
	Decides
	// Governs is a layer that says how long calls may wait inside it. NewStack
	// rejects it where nothing inside can be not ready.
	Governs
	// Retries is a layer that makes further attempts one after the other, and Hedges
	// one that makes them side by side.
	Retries
	Hedges
	// Sheds is a layer that governs waiting and allows none, such as a load shed.
	Sheds
)

func traitsOf(l Layer) Traits {
	if t, ok := l.(interface{ Traits() Traits }); ok {
		return t.Traits()
	}
	if _, ok := l.(interface{ callOnly() }); ok {
		return 0
	}
	return Waits
}

// nameOf is what String prints for a layer: its own String, or its type.
func nameOf(l Layer) string {
	if s, ok := l.(fmt.Stringer); ok {
		return s.String()
	}
	return strings.TrimPrefix(fmt.Sprintf("%T", l), "*")
}

// Optional returns s if on is true, and otherwise a Spec of a layer that does
// nothing. s may be nil if on is false.
func Optional(on bool, s Spec) Spec {
	if on {
		return s
	}
	return off{}
}

// off takes part in nothing. NewStack leaves it out.
type off struct {
	GateOnly
	CallOnly
}

func (off) NewLayer() (Layer, error) { return off{}, nil }
func (off) String() string           { return "off" }

// failed is a Spec that could not be made.
type failed struct{ err error }

func (f failed) NewLayer() (Layer, error) { return nil, f.err }

// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package interceptor

import (
	"context"
	"fmt"
	"strings"
)

// A Gate admits calls: the counterpart of Tower's poll_ready. Admit may wait as long as
// w allows, or refuse with an error that the caller gets: a [*Refusal], what [Ended]
// returns if ctx ended, or any error with a gRPC status. It leaves what it takes for the
// call on the admission with [Admission.Hold].
//
// Every gate asks the gate inside it once before it admits, with the w that it was given
// or a narrower one ([Wait.Narrow]). [Admission.Try] asks first without waiting. A gate
// that fails need not clean up: what it and the gates inside it left on the admission is
// released as [NotSent]. A gate may be asked twice for one call, because a buffer or a
// fail-fast further out asks first whether there is capacity now, and then lets the call
// wait. What the gate held the first time is released before the second.
//
// A gate sees the context and the call as they were before any layer of the call path
// changed them, because admission runs first.
//
// Admit is called concurrently. It must not keep a.
type Gate interface {
	Admit(ctx context.Context, a *Admission, w Wait) error
}

// GateFunc is a function as a [Gate].
type GateFunc func(ctx context.Context, a *Admission, w Wait) error

// Admit calls f.
func (f GateFunc) Admit(ctx context.Context, a *Admission, w Wait) error { return f(ctx, a, w) }

// Next is the rest of the call path. It carries out the call or attempt c. For a unary
// call it returns when the call is over, with the call's error. For a stream it returns
// when the stream is open, and [Call.Stream] is the stream, or when it could not be
// opened.
//
// A Next is called at most once for each Call. A further attempt is another Call, which
// [Again] makes.
type Next func(ctx context.Context, c *Call) error

// A Layer takes part in admission, in the call, or in both. Most do one, and embed
// [GateOnly] or [CallOnly] for the other half. A layer has one state, however many
// connections, methods and kinds of call it serves, so both methods may be called more
// than once, and what they return is used concurrently.
//
// A stack calls both when it is compiled, not for each call. They must not return nil. A
// layer may also have a method Traits() [Traits].
type Layer interface {
	// NewLayer returns the layer itself.
	Spec
	// WrapGate returns the gate of this layer and all inside it. inner is the gate
	// of the layers inside.
	WrapGate(inner Gate) Gate
	// WrapCall returns the call path of this layer and all inside it. next is the call
	// path of the layers inside; when it returns, what the gates inside took for the
	// call is released. again makes further attempts; a layer that makes none ignores
	// it.
	WrapCall(next Next, again Again) Next
}

// A Spec can become a layer: the Config of every layer package can, and every
// Layer can. NewStack takes Specs.
type Spec interface {
	// NewLayer makes the layer. If a setting is wrong, the error is a [*ConfigError].
	NewLayer() (Layer, error)
}

// GateOnly is embedded by a layer that takes part only in admission. It also tells the
// stack that there is nothing to do between this layer and the next when a call ends,
// so a type that embeds it must not define WrapCall.
type GateOnly struct{}

// WrapCall returns next.
func (GateOnly) WrapCall(next Next, _ Again) Next { return next }

func (GateOnly) gateOnly() {}

// CallOnly is embedded by a layer that takes part only in the call.
type CallOnly struct{}

// WrapGate returns inner.
func (CallOnly) WrapGate(inner Gate) Gate { return inner }

func (CallOnly) callOnly() {}

// isGateOnly reports whether l leaves the call path alone.
func isGateOnly(l Layer) bool {
	_, ok := l.(interface{ gateOnly() })
	return ok
}

// Traits say what a layer does as far as the order of layers depends on it. A layer has
// a method Traits; one without it [Waits], unless it embeds [CallOnly].
type Traits uint8

const (
	// Waits is a layer that can be not ready: its gate lets calls wait for
	// something, or refuses those that may not wait.
	Waits Traits = 1 << iota
	// Decides is a layer whose gate decides by the state of the moment, such as a rate
	// or a breaker. Put it inside what waits, so that its decision still holds when the
	// call is sent.
	Decides
	// Governs is a layer that says how long calls may wait inside it. NewStack rejects
	// it if nothing inside can be not ready.
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

// nameOf returns the name of a layer: its String, or its type.
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

// off does nothing. NewStack leaves it out.
type off struct {
	GateOnly
	CallOnly
}

func (off) NewLayer() (Layer, error) { return off{}, nil }
func (off) String() string           { return "off" }

// failed is a Spec that could not be made.
type failed struct{ err error }

func (f failed) NewLayer() (Layer, error) { return nil, f.err }

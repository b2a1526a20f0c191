// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package interceptor

import (
	"context"
	"fmt"
	"strings"
)

// A Gate admits calls: the counterpart of Tower's poll_ready. Admit may wait as
// long as w allows, or refuse with an error, which is what the caller gets and so
// ought to be a [*Refusal]; if ctx ended, what [Ended] returns. What it takes for
// the call it leaves on the call with [Call.Hold].
//
// Every gate calls the gate inside it exactly once before it admits, with the w
// it was given or one that it has narrowed ([Wait.Narrow]) or widened
// ([Call.Widen]). A gate that fails needs not clean up: what it and the gates
// inside it left on the call is released as [NotSent]. Only one that calls its
// inner gate again after an error rolls back first ([Call.Mark], [Call.Rollback]).
//
// Admit is called concurrently. It does not retain c.
type Gate interface {
	Admit(ctx context.Context, c *Call, w Wait) error
}

// GateFunc is a function as a [Gate].
type GateFunc func(ctx context.Context, c *Call, w Wait) error

// Admit calls f.
func (f GateFunc) Admit(ctx context.Context, c *Call, w Wait) error { return f(ctx, c, w) }

// Next is the call path: it carries out the call, or the attempt, that c
// describes. For a unary call it returns when the call is over, and its error is
// the call's. For a stream it returns when the stream is open, [Call.Stream] is
// then the stream, or when it could not be opened.
//
// A Next is called once for each admission. Called again on the same Call it
// admits the call anew, with [None], as a further attempt must; but attempts
// that may overlap, and all further attempts of a stream, need a Call each:
// [Origin.Fork].
type Next func(ctx context.Context, c *Call) error

// A Layer takes part in admission, in the call, or in both; most do one and embed
// [GateOnly] or [CallOnly] for the other half. It has one state, however many
// connections, methods and kinds of call it serves, so both methods may be
// called more than once and what they return is used concurrently.
//
// Both are called when a stack is compiled, not for each call. They may not
// return nil.
type Layer interface {
	// WrapGate returns the gate of this layer and all inside it. inner is the gate
	// of the layers inside.
	WrapGate(inner Gate) Gate
	// WrapCall returns the call path of this layer and all inside it. next is the
	// call path of the layers inside: what the gates inside took for the call is
	// released when it is over. inner admits a further attempt to them, and a
	// layer that makes none ignores it.
	WrapCall(next Next, inner Gate) Next
}

// GateOnly is embedded by a layer that takes part in admission alone. It also
// tells the stack that nothing needs to be done between this layer and the next
// when a call ends, so a type that embeds it must not define WrapCall.
type GateOnly struct{}

// WrapCall returns next.
func (GateOnly) WrapCall(next Next, _ Gate) Next { return next }

func (GateOnly) gateOnly() {}

// CallOnly is embedded by a layer that takes part in the call alone.
type CallOnly struct{}

// WrapGate returns inner.
func (CallOnly) WrapGate(inner Gate) Gate { return inner }

// isGateOnly reports whether l leaves the call path alone.
func isGateOnly(l Layer) bool {
	_, ok := l.(interface{ gateOnly() })
	return ok
}

// A Validator is a [Layer] that cannot stand everywhere, such as a buffer, which
// is pointless with nothing behind it. NewStack asks it; inner are the layers
// inside it, outermost first.
type Validator interface {
	Layer
	Validate(inner []Layer) error
}

// nameOf is what String prints for a layer: its own String, or its type.
func nameOf(l Layer) string {
	if s, ok := l.(fmt.Stringer); ok {
		return s.String()
	}
	return strings.TrimPrefix(fmt.Sprintf("%T", l), "*")
}

// Optional returns l if on is true, and otherwise a layer that does nothing.
// l may be nil if on is false.
func Optional(on bool, l Layer) Layer {
	if on {
		return l
	}
	return off{}
}

// off takes part in nothing. NewStack leaves it out.
type off struct {
	GateOnly
	CallOnly
}

func (off) String() string { return "off" }

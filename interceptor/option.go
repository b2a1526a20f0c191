// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package interceptor

import (
	"context"

	"google.golang.org/grpc"
)

// WithWait is a call option that bounds how long the gates of every stack on the call's
// way may wait. With None the call is refused where it would have queued. It can only
// narrow: of several the narrowest counts. Connections without a stack ignore it.
//
//	client.Get(ctx, req, interceptor.WithWait(interceptor.None))
//	client.Get(ctx, req, interceptor.WithWait(interceptor.For(50*time.Millisecond)))
func WithWait(w Wait) grpc.CallOption {
	if w == None {
		return noWait // The common case costs nothing.
	}
	return waitOption{w: w}
}

// WaitOf returns the Wait that the [WithWait] options among opts allow together, or
// Forever. Use it in your own connection that lets calls wait.
func WaitOf(opts []grpc.CallOption) Wait {
	w := Forever
	for _, o := range opts {
		switch o := o.(type) {
		case waitOption:
			w = min(w, o.w)
		case *carriedWait:
			w = min(w, o.call.wait)
		}
	}
	return w
}

// waitOption is how long gates may wait.
type waitOption struct {
	grpc.EmptyCallOption
	w Wait
}

// carriedWait tells a connection that is not gRPC's own, and may let calls wait itself,
// which call it is, and so how long it may wait.
type carriedWait struct {
	grpc.EmptyCallOption
	call *Call
}

var noWait grpc.CallOption = waitOption{w: None}

// CarryWait returns a layer for the end of a stack that is followed, across third-party
// interceptors, by another stack. It passes on how long the call may wait, as a call
// option, so that a load shed in the first stack sheds when the second one is not ready.
// It costs an allocation for a call that may not wait forever. Where the interceptor in
// between can become a layer itself, use [Foreign] instead.
func CarryWait() Layer { return new(carryWait) }

type carryWait struct{ _ byte } // Not empty, so that each value has its own address.

func (l *carryWait) NewLayer() (Layer, error) { return l, nil }
func (l *carryWait) String() string           { return "carrywait" }

// Traits says that it waits, because what is behind it may.
func (l *carryWait) Traits() Traits { return Waits }

func (l *carryWait) WrapGate(inner Gate) Gate {
	return GateFunc(func(ctx context.Context, a *Admission, w Wait) error {
		a.Internals().Pass() // It waits behind the stack, where no gate further out waits for it.
		return inner.Admit(ctx, a, w)
	})
}

func (l *carryWait) WrapCall(next Next, _ Again) Next {
	return func(ctx context.Context, c *Call) error {
		if c.wait != Forever {
			c.AddOptions(WithWait(c.wait))
		}
		return next(ctx, c)
	}
}

// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package interceptor

import (
	"context"

	"google.golang.org/grpc"
)

// WithWait is a call option that bounds how long the gates of every stack on the
// call's way may wait: None makes the call refuse where it would have queued.
// It can only narrow; of several the narrowest counts. Connections without a
// stack ignore it.
//
//	client.Get(ctx, req, interceptor.WithWait(interceptor.None))
//	client.Get(ctx, req, interceptor.WithWait(interceptor.For(50*time.Millisecond)))
func WithWait(w Wait) grpc.CallOption {
	if w == None {
		return noWait // The common case costs nothing.
	}
	return waitOption{w: w}
}

// WaitOf returns the Wait that [WithWait] options among opts allow together, and
// Forever without one: for a connection of yours that has something to wait for.
func WaitOf(opts []grpc.CallOption) Wait {
	w := Forever
	for _, o := range opts {
		if o, ok := o.(waitOption); ok {
			w = min(w, o.w)
		}
	}
	return w
}

type waitOption struct {
	grpc.EmptyCallOption
	w Wait
}

var noWait grpc.CallOption = waitOption{w: None}

// CarryWait returns a layer for the end of a stack behind which, across
// interceptors of others, stands another stack: it passes on how long the call
// may wait, as a call option, so that a load shed in the first stack sheds when
// the second one is not ready. It costs an allocation for a call that may not
// wait forever, and is not needed where the interceptor in between can become
// a layer itself ([Foreign]).
func CarryWait() Layer { return new(carryWait) }

type carryWait struct{ _ byte } // Not empty, so that each value has its own address.

func (l *carryWait) String() string { return "carrywait" }

func (l *carryWait) Release(int64, Outcome, error) {}

func (l *carryWait) WrapGate(inner Gate) Gate { return &carryGate{layer: l, inner: inner} }

func (l *carryWait) WrapCall(next Next, _ Gate) Next {
	return func(ctx context.Context, c *Call) error {
		if w, ok := c.Token(l); ok {
			c.AddOptions(WithWait(Wait(w)))
		}
		return next(ctx, c)
	}
}

type carryGate struct {
	layer *carryWait
	inner Gate
}

func (g *carryGate) Admit(ctx context.Context, c *Call, w Wait) error {
	if w != Forever {
		c.Hold(g.layer, int64(w))
	}
	return g.inner.Admit(ctx, c, w)
}

// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package interceptor

import (
	"context"
	"errors"

	"github.com/grpc-ecosystem/go-grpc-middleware/v2/interceptors"
	"github.com/grpc-ecosystem/go-grpc-middleware/v2/interceptors/selector"
)

// Only applies l to the calls that m matches; for the others it is not there.
// m is asked once for each admission, by each Only of its own. The state of l is
// one whatever it is applied to, and the same l may stand behind several
// matchers, as long as no call matches two of them.
//
//	interceptor.Only(selector.MatchFunc(func(ctx context.Context, m interceptors.CallMeta) bool {
//		return m.Service == "helloworld.Greeter"
//	}), limit)
func Only(m selector.Matcher, l Layer) Layer {
	if isNil(m) || isNil(l) {
		return nil // NewStack says which layer it is.
	}
	o := only{match: m, layer: l}
	if isGateOnly(l) {
		return &onlyGate{only: o}
	}
	return &onlyCall{only: o}
}

type only struct {
	match selector.Matcher
	layer Layer
}

func (o *only) String() string { return "only(" + nameOf(o.layer) + ")" }

// Validate asks the layer.
func (o *only) Validate(inner []Layer) error {
	if _, ok := o.layer.(*observe); ok {
		return errors.New("an observer sees the whole stack, not some of its calls")
	}
	if v, ok := o.layer.(Validator); ok {
		return v.Validate(inner)
	}
	return nil
}

func (o *only) matches(ctx context.Context, c *Call) bool {
	return o.match.Match(ctx, interceptors.NewClientCallMeta(c.Method(), c.Desc(), c.Request()))
}

// onlyGate is only for a layer that leaves the call path alone.
type onlyGate struct {
	GateOnly
	only
}

func (o *onlyGate) WrapGate(inner Gate) Gate {
	layer := o.layer.WrapGate(inner)
	return GateFunc(func(ctx context.Context, c *Call, w Wait) error {
		if o.matches(ctx, c) {
			return layer.Admit(ctx, c, w)
		}
		return inner.Admit(ctx, c, w)
	})
}

// onlyCall is only for any layer. What the gate decided the call path must do
// too, even if what the matcher looks at has changed since, so the decision is
// kept in a ticket.
type onlyCall struct{ only }

func (o *onlyCall) Release(int64, Outcome, error) {}

func (o *onlyCall) WrapGate(inner Gate) Gate {
	layer := o.layer.WrapGate(inner)
	return GateFunc(func(ctx context.Context, c *Call, w Wait) error {
		if o.matches(ctx, c) {
			c.Hold(o, 1)
			return layer.Admit(ctx, c, w)
		}
		return inner.Admit(ctx, c, w)
	})
}

func (o *onlyCall) WrapCall(next Next, inner Gate) Next {
	layer := o.layer.WrapCall(next, inner)
	return func(ctx context.Context, c *Call) error {
		if _, ok := c.Token(o); ok {
			return layer(ctx, c)
		}
		return next(ctx, c)
	}
}

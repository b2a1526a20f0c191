// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package interceptor

import (
	"context"
	"errors"
	"fmt"

	"github.com/grpc-ecosystem/go-grpc-middleware/v2/interceptors"
	"github.com/grpc-ecosystem/go-grpc-middleware/v2/interceptors/selector"

	"github.com/belfry-go/belfry/internal/isnil"
)

// Only applies the layer of s to the calls that m matches, and lets other calls pass. m
// is asked at each admission. A layer has one state. It may be used behind several
// matchers, as long as no call matches two of them.
//
//	interceptor.Only(selector.MatchFunc(func(ctx context.Context, m interceptors.CallMeta) bool {
//		return m.Service == "helloworld.Greeter"
//	}), limit)
func Only(m selector.Matcher, s Spec) Spec { return onlySpec{m, s} }

type onlySpec struct {
	match selector.Matcher
	spec  Spec
}

func (s onlySpec) NewLayer() (Layer, error) {
	if isnil.Value(s.match) || isnil.Value(s.spec) {
		return nil, &ConfigError{Layer: "interceptor", Field: "Only", Value: nil, Rule: "must have a matcher and a layer"}
	}
	l, err := s.spec.NewLayer()
	if err != nil {
		return nil, fmt.Errorf("Only: %w", err)
	}
	if _, ok := l.(*observe); ok {
		return nil, errors.New("Only: an observer sees the whole stack, not some of its calls")
	}
	o := only{match: s.match, layer: l}
	if isGateOnly(l) {
		return &onlyGate{only: o}, nil
	}
	return &onlyCall{only: o}, nil
}

type only struct {
	match selector.Matcher
	layer Layer
}

func (o *only) String() string { return "only(" + nameOf(o.layer) + ")" }
func (o *only) Traits() Traits { return traitsOf(o.layer) }

func (o *only) matches(ctx context.Context, a *Admission) bool {
	return o.match.Match(ctx, interceptors.NewClientCallMeta(a.Method(), a.Desc(), a.Request()))
}

// passBy admits a call that the matcher does not match.
func (o *only) passBy(ctx context.Context, a *Admission, w Wait, inner Gate) error {
	if o.Traits()&Waits != 0 {
		a.Internals().Pass()
	}
	return inner.Admit(ctx, a, w)
}

// WrapGate is not called: the stack calls WrapGateOver instead.
func (o *only) WrapGate(inner Gate) Gate { return o.WrapGateOver(inner, 0) }

// WrapGateOver returns the gate. What it decided the call path must do too, even if
// what the matcher looks at has changed since, so the decision is kept in a note.
func (o *only) WrapGateOver(inner Gate, waits int) Gate {
	layer, gateOnly := wrapGate(o.layer, inner, waits), isGateOnly(o.layer)
	return GateFunc(func(ctx context.Context, a *Admission, w Wait) error {
		if !o.matches(ctx, a) {
			return o.passBy(ctx, a, w, inner)
		}
		if !gateOnly {
			a.Note(o, 1)
		}
		return layer.Admit(ctx, a, w)
	})
}

// onlyGate is Only for a layer that has no call path.
type onlyGate struct {
	GateOnly
	only
}

func (o *onlyGate) NewLayer() (Layer, error) { return o, nil }

// onlyCall is Only for any layer.
type onlyCall struct{ only }

func (o *onlyCall) NewLayer() (Layer, error) { return o, nil }

// WrapCall is not called: the stack calls wrap instead.
func (o *onlyCall) WrapCall(next Next, _ Again) Next { return next }

func (o *onlyCall) wrap(next Next, inside *boundary) Next {
	layer := wrapCall(o.layer, next, inside)
	return func(ctx context.Context, c *Call) error {
		if _, ok := c.Noted(&o.only); ok {
			return layer(ctx, c)
		}
		return next(ctx, c)
	}
}

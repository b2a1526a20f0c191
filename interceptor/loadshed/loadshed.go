// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package loadshed

import (
	"context"

	"github.com/belfry-go/belfry/interceptor"
	"github.com/belfry-go/belfry/internal/check"
)

// Config configures a [Layer]. There is nothing to configure: what overload is,
// the layers inside say.
type Config struct{}

// An Option sets what is not plain data.
type Option func(*options)

type options struct{ name string }

// WithName names the layer in the stack's String and in the refusals it makes
// itself. The default is "loadshed"; it must not be empty.
func WithName(name string) Option { return func(o *options) { o.name = name } }

// A Layer sheds load. It has no state and is safe for concurrent use, also by
// several stacks. It takes nothing for a call, keeps no lock and allocates
// nothing.
type Layer struct {
	interceptor.GateOnly
	name string
	shed *interceptor.Refusal
}

// New returns a load shed. An error is a [*interceptor.ConfigError].
func New(_ Config, opts ...Option) (*Layer, error) {
	o := options{name: "loadshed"}
	for _, opt := range opts {
		opt(&o)
	}
	errs := check.Of("loadshed")
	errs.Name(o.name)
	if err := errs.Err(); err != nil {
		return nil, err
	}
	l := &Layer{name: o.name}
	l.shed = interceptor.Refuse(l.name, interceptor.ReasonShed, "nothing inside is ready")
	return l, nil
}

// Update changes nothing, for there is nothing to change, and returns nil.
func (l *Layer) Update(Config) error { return nil }

// Config returns the configuration.
func (l *Layer) Config() Config { return Config{} }

// String returns the layer's name.
func (l *Layer) String() string { return l.name }

// WrapGate returns the gate.
func (l *Layer) WrapGate(inner interceptor.Gate) interceptor.Gate {
	return &gate{layer: l, inner: inner}
}

type gate struct {
	layer *Layer
	inner interceptor.Gate
}

func (g *gate) Admit(ctx context.Context, c *interceptor.Call, _ interceptor.Wait) error {
	err := g.inner.Admit(ctx, c, interceptor.None)
	if err == nil {
		return nil
	}
	if _, ok := interceptor.AsRefusal(err); ok {
		return err
	}
	if ctx.Err() != nil {
		return interceptor.Ended(ctx, g.layer.name)
	}
	// A gate of somebody else's that does not say in gRPC's terms why it refused.
	return g.layer.shed.Because(err, false)
}

// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package loadshed

import (
	"context"

	"google.golang.org/grpc/status"

	"github.com/belfry-go/belfry/interceptor"
	"github.com/belfry-go/belfry/internal/check"
)

// Config configures a [Layer]. There is nothing to configure: the layers inside say
// what overload is.
type Config struct{}

// NewLayer returns a load shed, as [New] does.
func (cfg Config) NewLayer() (interceptor.Layer, error) {
	l, err := New(cfg)
	if err != nil {
		return nil, err
	}
	return l, nil
}

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
	errs := check.Of("loadshed")
	check.Options(errs, &o, opts)
	errs.Name(o.name)
	if err := errs.Err(); err != nil {
		return nil, err
	}
	l := &Layer{name: o.name}
	l.shed = interceptor.Refuse(l.name, interceptor.ReasonShed, "a layer inside is not ready")
	return l, nil
}

// NewLayer returns the load shed itself.
func (l *Layer) NewLayer() (interceptor.Layer, error) { return l, nil }

// Update changes nothing, because there is nothing to change, and returns nil.
func (l *Layer) Update(Config) error { return nil }

// Config returns the configuration.
func (l *Layer) Config() Config { return Config{} }

// String returns the layer's name.
func (l *Layer) String() string { return l.name }

// Traits says that it lets no call wait inside it.
func (l *Layer) Traits() interceptor.Traits { return interceptor.Governs | interceptor.Sheds }

// WrapGate returns the gate.
func (l *Layer) WrapGate(inner interceptor.Gate) interceptor.Gate {
	return &gate{layer: l, inner: inner}
}

type gate struct {
	layer *Layer
	inner interceptor.Gate
}

// Admit lets nothing inside wait. It returns an error with a gRPC status as it is, and
// makes a refusal of any other.
func (g *gate) Admit(ctx context.Context, a *interceptor.Admission, _ interceptor.Wait) error {
	in := a.Internals()
	later := in.SetLater(interceptor.None) // A retry inside does not wait either.
	err := g.inner.Admit(ctx, a, interceptor.None)
	in.SetLater(later)
	if err == nil {
		return nil
	}
	if _, ok := interceptor.AsRefusal(err); ok {
		return err
	}
	if ctx.Err() != nil {
		return interceptor.Ended(ctx, g.layer.name)
	}
	if _, ok := status.FromError(err); ok {
		return err
	}
	return g.layer.shed.Because(err, false)
}

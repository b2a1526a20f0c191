// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package buffer

import (
	"context"
	"errors"
	"math"
	"sync"
	"sync/atomic"
	"time"

	"github.com/belfry-go/belfry/interceptor"
	"github.com/belfry-go/belfry/internal/check"
)

// Config configures a [Layer].
type Config struct {
	// Size is how many calls may wait, from 1 to 2147483647. There is no default.
	Size int
	// MaxWait is how long a call waits at most; 0 is no bound but the deadlines of
	// the call and of layers outside. It must not be negative.
	MaxWait time.Duration
}

func (cfg Config) check(errs *check.Errors) {
	check.Required(errs, "Size", cfg.Size, check.From(1, math.MaxInt32))
	check.Zero(errs, "MaxWait", cfg.MaxWait, check.Positive, "no bound")
}

// An Option sets what is not plain data.
type Option func(*options)

type options struct{ name string }

// WithName names the layer in refusals, metrics and the stack's String. The
// default is "buffer"; it must not be empty.
func WithName(name string) Option { return func(o *options) { o.name = name } }

// A Layer is a buffer. It is safe for concurrent use, also by several stacks,
// which share its places. It keeps no lock; a call that need not wait, or is
// refused, costs no allocation.
type Layer struct {
	interceptor.GateOnly

	// Set by New and not changed.
	name string
	full *interceptor.Refusal

	config atomic.Pointer[Config]
	taken  atomic.Int64 // Places in use.
	places sync.Pool    // *place
}

// New returns a buffer. An error is a [*interceptor.ConfigError], or several joined.
func New(cfg Config, opts ...Option) (*Layer, error) {
	o := options{name: "buffer"}
	for _, opt := range opts {
		opt(&o)
	}
	errs := check.Of("buffer")
	errs.Name(o.name)
	cfg.check(errs)
	if err := errs.Err(); err != nil {
		return nil, err
	}
	l := &Layer{name: o.name}
	l.full = interceptor.Refuse(l.name, interceptor.ReasonQueueFull, "as many calls wait as may")
	l.places.New = func() any { return &place{layer: l} }
	l.config.Store(&cfg)
	return l, nil
}

// Update changes the configuration while calls wait. They keep their places, also
// beyond a smaller Size, and the MaxWait they began with. On an error nothing has
// changed.
func (l *Layer) Update(cfg Config) error {
	errs := check.Of("buffer")
	cfg.check(errs)
	if err := errs.Err(); err != nil {
		return err
	}
	l.config.Store(&cfg)
	return nil
}

// Config returns the configuration as it was given to New or Update.
func (l *Layer) Config() Config { return *l.config.Load() }

// Waiting returns how many places are taken.
func (l *Layer) Waiting() int { return int(l.taken.Load()) }

// String returns the layer's name.
func (l *Layer) String() string { return l.name }

// Validate rejects a buffer as the innermost layer.
func (l *Layer) Validate(inner []interceptor.Layer) error {
	if len(inner) == 0 {
		return errors.New("there is no layer inside that a call could wait for")
	}
	return nil
}

// WrapGate returns the gate.
func (l *Layer) WrapGate(inner interceptor.Gate) interceptor.Gate {
	return &gate{layer: l, inner: inner}
}

type gate struct {
	layer *Layer
	inner interceptor.Gate
}

// Admit asks for capacity first and for a place second, so that as many calls can
// pass at a time as the layers inside have capacity for, however few places
// there are.
func (g *gate) Admit(ctx context.Context, c *interceptor.Call, w interceptor.Wait) error {
	mark := c.Mark()
	err := g.inner.Admit(ctx, c, interceptor.None)
	if err == nil {
		return nil
	}
	if !interceptor.WaitMayHelp(err) {
		return err
	}
	l := g.layer
	if ctx.Err() != nil {
		return interceptor.Ended(ctx, l.name)
	}
	if c.Attempt() > 0 && w == interceptor.None {
		return err // A retry or hedge never queues.
	}
	c.Rollback(mark, err)
	cfg := l.config.Load()
	if l.taken.Add(1) > int64(cfg.Size) {
		l.taken.Add(-1)
		return l.full
	}
	p := l.places.Get().(*place)
	p.held.Store(true)
	p.outer = c.SetPlace(p)
	defer p.giveBack(c)
	to := interceptor.Forever
	if cfg.MaxWait > 0 {
		to = interceptor.For(cfg.MaxWait)
	}
	return g.inner.Admit(ctx, c, c.Widen(w, to))
}

// place is one of the buffer's places, taken by one call. It is reused.
type place struct {
	layer *Layer
	outer interceptor.Place // That of a buffer further out; may be nil.
	held  atomic.Bool
}

// Leave frees the place if it has not been left yet, and the one further out.
func (p *place) Leave() {
	if p.held.CompareAndSwap(true, false) {
		p.layer.taken.Add(-1)
		if p.outer != nil {
			p.outer.Leave()
		}
	}
}

// giveBack is the end of the waiting, whatever came of it. The place further out
// stays taken, for that is its buffer's to give back.
func (p *place) giveBack(c *interceptor.Call) {
	c.SetPlace(p.outer)
	if p.held.CompareAndSwap(true, false) {
		p.layer.taken.Add(-1)
	}
	p.outer = nil
	p.layer.places.Put(p)
}

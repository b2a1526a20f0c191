// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package ratelimit

import (
	"context"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"github.com/belfry-go/belfry/interceptor"
	"github.com/belfry-go/belfry/internal/check"
	"github.com/belfry-go/belfry/internal/keyed"
)

// Algorithm is how tokens come; see the package documentation.
type Algorithm uint8

const (
	// Smooth lets a token come every Per/Limit, and keeps up to Burst of them. It is
	// the default.
	Smooth Algorithm = iota
	// Window lets up to Limit calls begin in any interval of length Per, as soon as
	// they like.
	Window
)

// String returns the algorithm's name in lower case.
func (a Algorithm) String() string {
	switch a {
	case Smooth:
		return "smooth"
	case Window:
		return "window"
	}
	return fmt.Sprintf("Algorithm(%d)", uint8(a))
}

// KeyBy is what calls are told apart by.
type KeyBy uint8

const (
	// KeyNone does not tell calls apart: they share one rate. It is the default.
	KeyNone KeyBy = iota
	// KeyMethod gives each method its own rate, by its full name.
	KeyMethod
	// KeyMetadata gives each value of the outgoing metadata's entry KeyName its own
	// rate, by the first value if there are several; calls without one share one.
	// It costs a copy of the call's metadata.
	KeyMetadata
)

// String returns the name in lower case.
func (k KeyBy) String() string {
	switch k {
	case KeyNone:
		return "none"
	case KeyMethod:
		return "method"
	case KeyMetadata:
		return "metadata"
	}
	return fmt.Sprintf("KeyBy(%d)", uint8(k))
}

// Config says at what rate calls may begin. It is plain data.
type Config struct {
	// Limit is how many calls may begin in each Per. Required; from 1 to 1e9, and for
	// the Window algorithm, which remembers as many, to 1e6.
	Limit int
	// Per is what Limit is counted in. From 1 ms to 8760 h (a year); 0 is the default,
	// 1 s. Per/Limit must not be less than 1 ns.
	Per time.Duration
	// Burst is how many calls may begin at once after a pause, for the Smooth
	// algorithm; Window has no such number, and it must be 0. From 1 to 1e9, as long
	// as Burst tokens come in a year; 0 is the default, a tenth of Limit and at least
	// 1: enough for calls that come together by chance, at 10 % over the limit in the
	// first Per.
	Burst int
	// Algorithm is [Smooth] or [Window].
	Algorithm Algorithm
	// KeyBy gives calls a rate each by what they are told apart by.
	KeyBy KeyBy
	// KeyName is the name of the metadata entry for [KeyMetadata], otherwise empty.
	KeyName string
	// MaxKeys bounds how many keys are kept, at some 200 bytes each, and for the
	// Window algorithm 8 more for each call in the window. From 1 to 1e6; 0 is the
	// default, 10,000. A key whose tokens are all there is dropped when the place is
	// needed, which forgives nothing. If no key can be dropped, all the keys that find
	// no place share one rate: none is let through unlimited, and no key that is known
	// suffers from those that are not.
	MaxKeys int
}

const (
	maxLimit     = 1_000_000_000
	maxWindow    = 1_000_000
	minPer       = time.Millisecond
	maxPer       = 8760 * time.Hour
	maxKeys      = 1_000_000
	defaultKeys  = 10_000
	defaultPer   = time.Second
	defaultBurst = 10 // As a part of Limit.
)

// params is a valid Config, its defaults filled in, and what follows from it. It is
// not changed.
type params struct {
	given     Config
	limit     int
	per       time.Duration
	burst     int
	algorithm Algorithm
	keyBy     KeyBy
	keyName   string
	maxKeys   int

	// interval is the time between tokens, and tolerance Burst of them, in units of
	// gcra.
	interval, tolerance int64
	over                *refusals
}

func (cfg Config) params(errs *check.Errors, name string) *params {
	given := cfg
	errs.Require(cfg.Algorithm <= Window, "Algorithm", cfg.Algorithm, "must be Smooth or Window")
	if cfg.Algorithm == Window {
		errs.Require(cfg.Limit >= 1 && cfg.Limit <= maxWindow, "Limit", cfg.Limit, "must be from 1 to %d if Algorithm is window", maxWindow)
		errs.Require(cfg.Burst == 0, "Burst", cfg.Burst, "must be 0 if Algorithm is window, whose burst is Limit")
	} else {
		check.Required(errs, "Limit", cfg.Limit, check.From(1, maxLimit))
		check.DefaultText(errs, "Burst", &cfg.Burst, check.From(1, maxLimit), max(cfg.Limit/defaultBurst, 1), "a tenth of Limit")
	}
	check.Default(errs, "Per", &cfg.Per, check.From(minPer, maxPer), defaultPer)
	errs.Require(int64(cfg.Limit) <= int64(cfg.Per), "Limit", cfg.Limit, "must be at most %d, one call in 1ns of Per", int64(cfg.Per))
	switch cfg.KeyBy {
	case KeyNone, KeyMethod:
		errs.Require(cfg.KeyName == "", "KeyName", cfg.KeyName, "must be empty unless KeyBy is metadata")
	case KeyMetadata:
		errs.Require(cfg.KeyName != "", "KeyName", cfg.KeyName, "must name a metadata entry if KeyBy is metadata")
	default:
		errs.Add("KeyBy", cfg.KeyBy, "must be KeyNone, KeyMethod or KeyMetadata")
	}
	check.Default(errs, "MaxKeys", &cfg.MaxKeys, check.From(1, maxKeys), defaultKeys)
	p := &params{
		given: given, limit: cfg.Limit, per: cfg.Per, burst: cfg.Burst, algorithm: cfg.Algorithm,
		keyBy: cfg.KeyBy, keyName: cfg.KeyName, maxKeys: cfg.MaxKeys,
	}
	if errs.Err() != nil {
		return nil
	}
	p.over = newRefusals(name, fmt.Sprintf("more than %d in %v", p.limit, p.per))
	if p.algorithm == Smooth {
		// Rounded up, so that the rate is never more than the limit.
		p.interval = (int64(p.per)*unit + int64(p.limit) - 1) / int64(p.limit)
		most := int64(maxPer) * unit / p.interval
		errs.Require(int64(p.burst) <= most, "Burst", p.burst, "must be at most %d, as many as come in a year", most)
		p.tolerance = int64(p.burst) * p.interval
	}
	return p
}

func (p *params) newQueue(name string) *queue {
	var src source
	if p.algorithm == Window {
		src = newWindow(p)
	} else {
		src = newGCRA(p)
	}
	return newQueue(name, src, p.over)
}

// An Option changes what a layer is besides its Config.
type Option func(*options)

type options struct {
	errs *check.Errors
	name string
	key  KeyFunc
	open bool
}

// WithName names the layer, for refusals, metrics and Stack.String. By default it
// is "ratelimit"; it must not be empty.
func WithName(name string) Option { return func(o *options) { o.name = name } }

// WithKey gives the calls of each key their own rate; [Config.KeyBy] must be
// KeyNone then.
func WithKey(key KeyFunc) Option {
	return func(o *options) {
		o.errs.NotNil(key == nil, "WithKey", "a function")
		o.key = key
	}
}

func optionsOf(opts []Option) options {
	o := options{errs: check.Of("ratelimit"), name: "ratelimit"}
	for _, opt := range opts {
		opt(&o)
	}
	o.errs.Name(o.name)
	return o
}

// notOpen rejects WithFailOpen.
func (o *options) notOpen() {
	o.errs.Require(!o.open, "WithFailOpen", check.Set, "must be used with FromLimiter alone")
}

// Layer is a rate limit. It may stand in any number of stacks, which then share
// the rate.
type Layer struct {
	interceptor.GateOnly
	name string
	key  KeyFunc            // Nil if calls are not told apart.
	one  *queue             // If key is nil.
	keys *keyed.Map[*queue] // If it is not.

	rate atomic.Pointer[params]
	// mu is held by Update, so that what it changes is one configuration in the end.
	// The locks of keys and queues are taken under it.
	mu sync.Mutex
}

// New makes a layer. An error is a [*interceptor.ConfigError], or several joined.
func New(cfg Config, opts ...Option) (*Layer, error) {
	o := optionsOf(opts)
	o.notOpen()
	o.errs.Require(o.key == nil || cfg.KeyBy == KeyNone, "KeyBy", cfg.KeyBy, "must be KeyNone if WithKey is used")
	p := cfg.params(o.errs, o.name)
	if err := o.errs.Err(); err != nil {
		return nil, err
	}
	l := &Layer{name: o.name, key: o.key}
	l.rate.Store(p)
	switch p.keyBy {
	case KeyMethod:
		l.key = byMethod
	case KeyMetadata:
		l.key = byMetadata(p.keyName)
	}
	if l.key == nil {
		l.one = p.newQueue(l.name)
	} else {
		l.keys = newKeys(l)
	}
	return l, nil
}

// Update changes the configuration while calls run. What was taken stays taken:
// tokens missing from a bucket are missing from the new one, and calls in a window
// remain in it. Those who wait keep their order; their turns follow the new rate at
// once, and one whose turn comes too late now is refused. A call that passes
// at the same moment may pass under the old rate.
//
// Algorithm, KeyBy and KeyName cannot be changed, for then there is nothing to
// keep: make a new layer. On an error nothing has changed.
func (l *Layer) Update(cfg Config) error {
	errs := check.Of("ratelimit")
	p := cfg.params(errs, l.name)
	if err := errs.Err(); err != nil {
		return err
	}
	old := l.rate.Load().given // What is compared does not change.
	errs.Require(cfg.Algorithm == old.Algorithm, "Algorithm", cfg.Algorithm, "must stay %v: make a new layer", old.Algorithm)
	errs.Require(cfg.KeyBy == old.KeyBy, "KeyBy", cfg.KeyBy, "must stay %v: make a new layer", old.KeyBy)
	errs.Require(cfg.KeyName == old.KeyName, "KeyName", cfg.KeyName, "must stay %q: make a new layer", old.KeyName)
	if err := errs.Err(); err != nil {
		return err
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.rate.Store(p)
	if l.keys == nil {
		l.one.update(p)
		return nil
	}
	for _, q := range l.keys.All() { // Queues made from here on have the new rate.
		q.update(p)
	}
	return nil
}

// Config returns the configuration as it was given to New or Update.
func (l *Layer) Config() Config { return l.rate.Load().given }

// Waiting returns how many calls wait for a token.
func (l *Layer) Waiting() int {
	if l.keys == nil {
		return int(l.one.waiting.Load())
	}
	n := int64(0)
	for _, q := range l.keys.All() {
		n += q.waiting.Load()
	}
	return int(n)
}

// Keys returns how many keys are kept; 0 if calls are not told apart.
func (l *Layer) Keys() int {
	if l.keys == nil {
		return 0
	}
	return l.keys.Len()
}

// String returns the layer's name.
func (l *Layer) String() string { return l.name }

// WrapGate returns the gate that takes tokens.
func (l *Layer) WrapGate(inner interceptor.Gate) interceptor.Gate {
	if l.keys == nil {
		return &gate{queue: l.one, inner: inner}
	}
	return &keyedGate{layer: l, inner: inner}
}

// gate takes the tokens of one queue.
type gate struct {
	queue *queue
	inner interceptor.Gate
}

func (g *gate) Admit(ctx context.Context, c *interceptor.Call, w interceptor.Wait) error {
	at, err := g.queue.acquire(ctx, c, w)
	if err != nil {
		return err
	}
	c.Hold(g.queue, int64(at))
	return g.inner.Admit(ctx, c, w)
}

// keyedGate takes the tokens of a queue for each key.
type keyedGate struct {
	layer *Layer
	inner interceptor.Gate
}

func (g *keyedGate) Admit(ctx context.Context, c *interceptor.Call, w interceptor.Wait) error {
	e := g.layer.keys.Pin(g.layer.key(ctx, c), int64(c.Now()))
	at, err := e.Value.acquire(ctx, c, w)
	e.Unpin()
	if err != nil {
		return err
	}
	c.Hold(e.Value, int64(at))
	return g.inner.Admit(ctx, c, w)
}

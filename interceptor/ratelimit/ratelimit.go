// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package ratelimit

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"github.com/belfry-go/belfry/interceptor"
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
	maxLimit      = 1e9
	maxWindow     = 1e6
	maxPer        = 8760 * time.Hour
	maxKeys       = 1e6
	defaultKeys   = 10_000
	defaultPer    = time.Second
	defaultBurst  = 10 // As a part of Limit.
	minPer        = time.Millisecond
	burstDuration = maxPer
)

// params is a valid Config, its defaults filled in, and what follows from it. It is
// not changed.
type params struct {
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

func invalid(field string, value any, rule string) error {
	return fmt.Errorf("ratelimit: %s is %v, %s", field, value, rule)
}

func (cfg Config) params(name string) (*params, error) {
	p := &params{
		limit: cfg.Limit, per: cfg.Per, burst: cfg.Burst, algorithm: cfg.Algorithm,
		keyBy: cfg.KeyBy, keyName: cfg.KeyName, maxKeys: cfg.MaxKeys,
	}
	if cfg.Algorithm > Window {
		return nil, invalid("Algorithm", cfg.Algorithm, "must be Smooth or Window")
	}
	if cfg.Limit < 1 || cfg.Limit > maxLimit {
		return nil, invalid("Limit", cfg.Limit, "must be from 1 to 1e9")
	}
	if cfg.Algorithm == Window && cfg.Limit > maxWindow {
		return nil, invalid("Limit", cfg.Limit, "must be at most 1e6 for the Window algorithm")
	}
	if cfg.Per == 0 {
		p.per = defaultPer
	}
	if p.per < minPer || p.per > maxPer {
		return nil, invalid("Per", cfg.Per, "must be from 1ms to 8760h, or 0 for 1s")
	}
	if int64(p.per) < int64(p.limit) {
		return nil, invalid("Limit", cfg.Limit, fmt.Sprintf("must be at most one call in 1ns, here %d in %v", int64(p.per), p.per))
	}
	if err := p.setBurst(); err != nil {
		return nil, err
	}
	switch cfg.KeyBy {
	case KeyNone, KeyMethod:
		if cfg.KeyName != "" {
			return nil, invalid("KeyName", fmt.Sprintf("%q", cfg.KeyName), "must be empty unless KeyBy is KeyMetadata")
		}
	case KeyMetadata:
		if cfg.KeyName == "" {
			return nil, invalid("KeyName", `""`, "must name a metadata entry as KeyBy is KeyMetadata")
		}
	default:
		return nil, invalid("KeyBy", cfg.KeyBy, "must be KeyNone, KeyMethod or KeyMetadata")
	}
	if cfg.MaxKeys < 0 || cfg.MaxKeys > maxKeys {
		return nil, invalid("MaxKeys", cfg.MaxKeys, "must be from 1 to 1e6, or 0 for 10000")
	}
	if cfg.MaxKeys == 0 {
		p.maxKeys = defaultKeys
	}
	p.over = newRefusals(name, fmt.Sprintf("more than %d in %v", p.limit, p.per))
	return p, nil
}

func (p *params) setBurst() error {
	if p.algorithm == Window {
		if p.burst != 0 {
			return invalid("Burst", p.burst, "must be 0 for the Window algorithm, whose burst is Limit")
		}
		return nil
	}
	if p.burst < 0 || p.burst > maxLimit {
		return invalid("Burst", p.burst, "must be from 1 to 1e9, or 0 for a tenth of Limit")
	}
	if p.burst == 0 {
		p.burst = max(p.limit/defaultBurst, 1)
	}
	// Rounded up, so that the rate is never more than the limit.
	p.interval = (int64(p.per)*unit + int64(p.limit) - 1) / int64(p.limit)
	if int64(p.burst) > int64(burstDuration)*unit/p.interval {
		return invalid("Burst", p.burst, "must be as many as come in 8760h at most")
	}
	p.tolerance = int64(p.burst) * p.interval
	return nil
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
	name string
	key  KeyFunc
	open bool
}

// WithName names the layer, for refusals, metrics and Stack.String. By default it
// is "ratelimit"; it must not be empty.
func WithName(name string) Option { return func(o *options) { o.name = name } }

// WithKey gives the calls of each key their own rate; [Config.KeyBy] must be
// KeyNone then.
func WithKey(key KeyFunc) Option { return func(o *options) { o.key = key } }

var errOpen = errors.New("ratelimit: WithFailOpen is used, but only a limiter of FromLimiter can fail")

func optionsOf(opts []Option) (options, error) {
	o := options{name: "ratelimit"}
	for _, opt := range opts {
		opt(&o)
	}
	if o.name == "" {
		return o, errors.New(`ratelimit: WithName "": must not be empty`)
	}
	return o, nil
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

// New makes a layer.
func New(cfg Config, opts ...Option) (*Layer, error) {
	o, err := optionsOf(opts)
	if err != nil {
		return nil, err
	}
	p, err := cfg.params(o.name)
	if err != nil {
		return nil, err
	}
	if o.open {
		return nil, errOpen
	}
	l := &Layer{name: o.name, key: o.key}
	l.rate.Store(p)
	if o.key != nil && p.keyBy != KeyNone {
		return nil, invalid("KeyBy", p.keyBy, "must be KeyNone as there is a key function")
	}
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
	p, err := cfg.params(l.name)
	if err != nil {
		return err
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	old := l.rate.Load()
	switch {
	case p.algorithm != old.algorithm:
		return invalid("Algorithm", p.algorithm, fmt.Sprintf("must stay %v: make a new layer", old.algorithm))
	case p.keyBy != old.keyBy:
		return invalid("KeyBy", p.keyBy, fmt.Sprintf("must stay %v: make a new layer", old.keyBy))
	case p.keyName != old.keyName:
		return invalid("KeyName", fmt.Sprintf("%q", p.keyName), fmt.Sprintf("must stay %q: make a new layer", old.keyName))
	}
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

// Config returns the configuration, its defaults filled in.
func (l *Layer) Config() Config {
	p := l.rate.Load()
	return Config{
		Limit: p.limit, Per: p.per, Burst: p.burst, Algorithm: p.algorithm,
		KeyBy: p.keyBy, KeyName: p.keyName, MaxKeys: p.maxKeys,
	}
}

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

// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package ratelimit

import (
	"context"
	"fmt"
	"iter"
	"sync"
	"sync/atomic"
	"time"

	"github.com/belfry-go/belfry/interceptor"
	"github.com/belfry-go/belfry/internal/check"
	"github.com/belfry-go/belfry/internal/keyed"
	"github.com/belfry-go/belfry/internal/layercheck"
)

// Algorithm says how tokens come; see the package documentation.
type Algorithm uint8

const (
	// Smooth makes a token every Per/Limit, and keeps up to Burst of them. It is the
	// default.
	Smooth Algorithm = iota
	// Window admits up to Limit calls in any interval of length Per, as soon as they
	// arrive.
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

// Config says at what rate calls are admitted. It is plain data, except for a function in
// KeyBy.
type Config struct {
	// Limit is how many calls are admitted in each Per. Required; from 1 to 1e9, and
	// for the Window algorithm, which remembers as many, to 1e6.
	Limit int
	// Per is the time that Limit refers to. From 1 ms to 8760 h (a year); 0 is the
	// default, 1 s. Per/Limit must not be less than 1 ns.
	Per time.Duration
	// Burst is how many calls the Smooth algorithm admits at once after a pause. With
	// Window it must be 0. From 1 to 1e9, and no more than the tokens of a year; 0 is the
	// default, a tenth of Limit and at least 1: enough for calls that arrive together by
	// chance, at 10 % over the limit in the first Per.
	Burst int
	// Algorithm is [Smooth] or [Window].
	Algorithm Algorithm

	// KeyBy gives each key its own rate. By default there is one rate for all calls.
	KeyBy interceptor.KeyBy
	// MaxKeys bounds how many keys have their own rate. From 1 to 1e6; 0 is the default,
	// 10,000. A key takes about 300 bytes, with the Window algorithm 8 more for each call
	// in the window, and up to 6,000 more once calls of it are refused.
	//
	// When new keys arrive, keys with a full bucket are dropped, which forgives nothing.
	// If no key can be dropped, all further keys share one more rate, and refusals name
	// them "(others)". So no key is unlimited, and keys with their own rate do not suffer
	// from the others.
	MaxKeys int
}

const (
	maxLimit     = 1_000_000_000
	maxWindow    = 1_000_000
	minPer       = time.Millisecond
	maxPer       = 8760 * time.Hour
	defaultPer   = time.Second
	defaultBurst = 10 // As a part of Limit.
)

// params is a valid Config with its defaults filled in, and values computed from it. It
// is immutable.
type params struct {
	given     Config
	limit     int
	per       time.Duration
	burst     int
	algorithm Algorithm
	keyBy     interceptor.KeyBy
	maxKeys   int

	// interval is the time between tokens, and tolerance Burst of them, in units of
	// gcra.
	interval, tolerance int64
	message             string // Of refusals.
}

// params checks cfg. old are the params that an update replaces; nil for a new layer.
func (cfg Config) params(errs *check.Errors, old *params) *params {
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
	var oldKeyBy *interceptor.KeyBy
	if old != nil {
		errs.Require(cfg.Algorithm == old.algorithm || cfg.Algorithm > Window, "Algorithm", cfg.Algorithm, "must stay %v: make a new layer", old.algorithm)
		oldKeyBy = &old.keyBy
	}
	layercheck.Keys(errs, cfg.KeyBy, oldKeyBy, &cfg.MaxKeys, nil)
	p := &params{
		given: given, limit: cfg.Limit, per: cfg.Per, burst: cfg.Burst, algorithm: cfg.Algorithm,
		keyBy: cfg.KeyBy, maxKeys: cfg.MaxKeys,
	}
	if errs.Err() != nil {
		return nil
	}
	p.message = fmt.Sprintf("more than %d in %v", p.limit, p.per)
	if p.algorithm == Smooth {
		// Rounded up, so that the rate never exceeds the limit.
		p.interval = (int64(p.per)*unit + int64(p.limit) - 1) / int64(p.limit)
		most := int64(maxPer) * unit / p.interval
		errs.Require(int64(p.burst) <= most, "Burst", p.burst, "must be at most %d, as many as come in a year", most)
		p.tolerance = int64(p.burst) * p.interval
	}
	return p
}

// An Option changes what a layer is besides its Config.
type Option func(*options)

type options struct {
	errs     *check.Errors
	name     string
	priority interceptor.PriorityFunc
	open     bool
}

// WithName names the layer, for refusals, metrics and Stack.String. By default it
// is "ratelimit"; it must not be empty.
func WithName(name string) Option { return func(o *options) { o.name = name } }

// WithPriority sets the function that returns the priority of a waiting call; by default
// [interceptor.ContextPriority]. The higher priority goes first.
func WithPriority(f interceptor.PriorityFunc) Option {
	return func(o *options) {
		o.errs.NotNil(f == nil, "WithPriority", "a function")
		o.priority = f
	}
}

func optionsOf(opts []Option) options {
	o := options{errs: check.Of("ratelimit"), name: "ratelimit", priority: interceptor.ContextPriority}
	check.Options(o.errs, &o, opts)
	o.errs.Name(o.name)
	return o
}

// notOpen rejects WithFailOpen.
func (o *options) notOpen() {
	o.errs.Require(!o.open, "WithFailOpen", check.Set, "must be used with FromLimiter alone")
}

// A Layer is a rate limit. It may be used in any number of stacks, which then share the
// rate. Its methods may be called concurrently.
type Layer struct {
	interceptor.GateOnly
	name     string
	priority interceptor.PriorityFunc
	one      *queue             // If calls are not told apart.
	keys     *keyed.Map[*queue] // If they are.

	rate atomic.Pointer[params]
	// mu serialises Update. The locks of keys and queues are taken under it.
	mu sync.Mutex
}

// New makes a layer. An error is a [*interceptor.ConfigError], or several joined.
func New(cfg Config, opts ...Option) (*Layer, error) {
	o := optionsOf(opts)
	o.notOpen()
	p := cfg.params(o.errs, nil)
	if err := o.errs.Err(); err != nil {
		return nil, err
	}
	l := &Layer{name: o.name, priority: o.priority}
	l.rate.Store(p)
	if !p.keyBy.IsSet() {
		l.one = l.newQueue("")
		return l, nil
	}
	// A queue may be dropped if no call is about to take its token and its bucket is full.
	// A new bucket is as good, so nothing is forgiven, and a token that a call gives back
	// later would not have fitted in.
	l.keys = keyed.New(
		func() int { return l.rate.Load().maxKeys },
		l.newQueue,
		func(q *queue, _ time.Duration, now int64) bool { return q.full(interceptor.Instant(now)) })
	return l, nil
}

// NewLayer makes the layer as New does without options.
func (cfg Config) NewLayer() (interceptor.Layer, error) {
	l, err := New(cfg)
	if err != nil {
		return nil, err
	}
	return l, nil
}

// NewLayer returns the layer itself.
func (l *Layer) NewLayer() (interceptor.Layer, error) { return l, nil }

func (l *Layer) newQueue(key string) *queue {
	p := l.rate.Load()
	var src source
	if p.algorithm == Window {
		src = newWindow(p)
	} else {
		src = newGCRA(p)
	}
	return newQueue(l.name, key, src, l.priority, p.message)
}

// Update changes the configuration while calls run. Tokens that are missing from a bucket
// are missing from the new one, and calls in a window stay in it. Calls that wait keep
// their order. Their tokens come at the new rate at once, and a call whose token now
// comes too late is refused. A call that passes at the same moment may pass under the old
// rate.
//
// Algorithm and KeyBy cannot be changed: make a new layer. After an error nothing has
// changed.
func (l *Layer) Update(cfg Config) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	errs := check.Of("ratelimit")
	p := cfg.params(errs, l.rate.Load())
	if err := errs.Err(); err != nil {
		return err
	}
	l.rate.Store(p)
	if l.keys == nil {
		l.one.update(p)
		return nil
	}
	for _, q := range l.keys.All() { // New queues have the new rate.
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

// Keys returns how many keys have their own rate; 0 without KeyBy.
func (l *Layer) Keys() int {
	if l.keys == nil {
		return 0
	}
	return l.keys.Len()
}

// String returns the layer's name.
func (l *Layer) String() string { return l.name }

// traits are the traits of all layers of this package.
const traits = interceptor.Waits | interceptor.Decides

// Traits says that calls may wait in the layer, and that it decides when they are
// sent.
func (l *Layer) Traits() interceptor.Traits { return traits }

// Readings yields how many calls wait.
func (l *Layer) Readings() iter.Seq[interceptor.Reading] {
	return func(yield func(interceptor.Reading) bool) {
		yield(interceptor.Reading{Layer: l.name, What: interceptor.ReadingWaiting, Value: float64(l.Waiting())})
	}
}

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

func (g *gate) Admit(ctx context.Context, a *interceptor.Admission, w interceptor.Wait) error {
	token, err := g.queue.acquire(ctx, a, w)
	if err != nil {
		return err
	}
	a.Hold(g.queue, token)
	return g.inner.Admit(ctx, a, w)
}

// keyedGate takes the tokens of a queue for each key.
type keyedGate struct {
	layer *Layer
	inner interceptor.Gate
}

func (g *keyedGate) Admit(ctx context.Context, a *interceptor.Admission, w interceptor.Wait) error {
	q, token, err := g.acquire(ctx, a, w)
	if err != nil {
		return err
	}
	a.Hold(q, token)
	return g.inner.Admit(ctx, a, w)
}

// acquire takes a token of the queue of the call's key, which is not dropped meanwhile.
func (g *keyedGate) acquire(ctx context.Context, a *interceptor.Admission, w interceptor.Wait) (q *queue, token int64, err error) {
	e := g.layer.keys.Pin(g.layer.rate.Load().keyBy.Key(ctx, a), int64(a.Now()))
	defer e.Unpin() // Even if a PriorityFunc panics.
	token, err = e.Value.acquire(ctx, a, w)
	return e.Value, token, err
}

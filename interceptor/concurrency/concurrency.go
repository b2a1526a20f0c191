// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package concurrency

import (
	"context"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"github.com/belfry-go/belfry/interceptor"
	"github.com/belfry-go/belfry/internal/check"
	"github.com/belfry-go/belfry/internal/codeset"
)

// Discipline is the order in which waiting calls of the same priority are
// admitted.
type Discipline int

const (
	// FIFO admits the call that has waited longest. It is fair, and the default.
	FIFO Discipline = iota
	// LIFO admits the call that came last. Under overload it serves calls whose
	// callers are still there, where FIFO would serve each just before its deadline;
	// the oldest ones starve.
	LIFO
	// CoDel is FIFO that refuses calls from a queue which has been standing for too
	// long (controlled delay, RFC 8289): a burst is absorbed, a lasting overload is
	// not turned into lasting delay.
	CoDel
)

// String returns the discipline's name.
func (d Discipline) String() string {
	switch d {
	case FIFO:
		return "FIFO"
	case LIFO:
		return "LIFO"
	case CoDel:
		return "CoDel"
	}
	return "Discipline(" + strconv.Itoa(int(d)) + ")"
}

// Config configures a [Layer]. Exactly one of Limit, AIMD, Gradient2 and Vegas is
// set, unless [WithAlgorithm] is used.
type Config struct {
	// Limit is a fixed number of permits, from 1 to 2147483647. There is no default.
	Limit int64
	// AIMD, Gradient2 and Vegas let an algorithm look for the limit.
	AIMD      *AIMDConfig
	Gradient2 *Gradient2Config
	Vegas     *VegasConfig

	// Discipline is the order in which waiting calls are admitted; FIFO if zero.
	Discipline Discipline
	// MaxWaiters is how many calls may wait. When it is exceeded the call whose
	// turn would be last is refused, with reason QUEUE_FULL: by FIFO the one that
	// just came, by LIFO the one that has waited longest, in any case one of the
	// lowest priority. 0 is no bound.
	MaxWaiters int
	// MaxWait is how long a call waits at most, if its Wait allows that much; then
	// it is refused with reason CONCURRENCY. 0 is no bound.
	MaxWait time.Duration
	// CoDelTarget is the delay that a queue may have for longer than
	// CoDelInterval: 5ms and 100ms if zero, the values of RFC 8289. They must not be
	// negative; other disciplines do not look at them.
	CoDelTarget, CoDelInterval time.Duration

	// DropCodes are the codes of failed calls that tell an algorithm of overload;
	// UNAVAILABLE, RESOURCE_EXHAUSTED and DEADLINE_EXCEEDED if nil, none if empty and
	// not nil. Calls that failed with other codes teach it nothing.
	DropCodes []codes.Code
	// SampleStreams lets algorithms learn from streams, with their whole life as
	// the round trip. Set it if streams are answers of several messages; how long a
	// subscription or a conversation lasts says nothing about load. Streams hold
	// permits in any case.
	SampleStreams bool
}

const (
	defaultCoDelTarget   = 5 * time.Millisecond
	defaultCoDelInterval = 100 * time.Millisecond
)

// An Option sets what is not plain data.
type Option func(*options)

type options struct {
	errs     *check.Errors
	name     string
	cost     func(ctx context.Context, c *interceptor.Call) int64
	priority func(ctx context.Context, c *interceptor.Call) int
	custom   Limit
}

// WithName names the layer in refusals, metrics and the stack's String. The
// default is "concurrency"; it must not be empty.
func WithName(name string) Option { return func(o *options) { o.name = name } }

// WithCost lets calls differ in how many permits they take; without it each takes
// one. cost is called once per admission, concurrently, and must be quick;
// what it returns below 1 counts as 1. A call that costs more than the limit runs
// when nothing else does. While a heavy call waits for its turn lighter ones wait
// behind it, and are refused if they may not wait, although there may be a permit
// for them: it is promised.
func WithCost(cost func(ctx context.Context, c *interceptor.Call) int64) Option {
	return func(o *options) {
		o.errs.NotNil(cost == nil, "WithCost", "a function")
		o.cost = cost
	}
}

// WithPriority sets how the priority of a call that has to wait is found;
// without it, it is the one of [ContextWithPriority].
// Calls of a higher priority are admitted before all that wait at a lower one,
// whatever the discipline. If calls of a high priority alone exceed the limit
// those below starve: they wait until their own Wait, their deadline or MaxWait
// ends. The function is not called for calls that find a permit free.
func WithPriority(priority func(ctx context.Context, c *interceptor.Call) int) Option {
	return func(o *options) {
		o.errs.NotNil(priority == nil, "WithPriority", "a function")
		o.priority = priority
	}
}

// WithAlgorithm lets an algorithm of your own look for the limit. None of the four
// in Config is set then. The Layer uses it exclusively; it cannot be shared.
func WithAlgorithm(a Limit) Option {
	return func(o *options) {
		o.errs.NotNil(a == nil, "WithAlgorithm", "an algorithm")
		o.custom = a
	}
}

type priorityKey struct{}

// ContextWithPriority returns a context whose calls have the given priority where
// they have to wait for a permit; 0 is that of all others, and higher goes first.
func ContextWithPriority(ctx context.Context, priority int) context.Context {
	return context.WithValue(ctx, priorityKey{}, priority)
}

func contextPriority(ctx context.Context, _ *interceptor.Call) int {
	p, _ := ctx.Value(priorityKey{}).(int)
	return p
}

// MetadataPriority returns a function for [WithPriority] that reads the priority
// from the call's outgoing metadata, so that it can be passed on from server to
// server. What is missing or not a decimal number has priority 0.
func MetadataPriority(key string) func(ctx context.Context, c *interceptor.Call) int {
	return func(ctx context.Context, _ *interceptor.Call) int {
		md, _ := metadata.FromOutgoingContext(ctx)
		if v := md.Get(key); len(v) > 0 {
			if p, err := strconv.Atoi(v[0]); err == nil {
				return p
			}
		}
		return 0
	}
}

// A Layer is a concurrency limit. It is safe for concurrent use, also by several
// stacks, whose calls it then limits together. A fixed limit takes no lock for a call
// that finds a permit free and nobody waiting, an adaptive one takes one for each
// sample, and every lock is held for a few instructions. It allocates nothing,
// admitted or refused; only a call that waits may.
type Layer struct {
	interceptor.GateOnly

	// Set by New and not changed.
	name     string
	cost     func(context.Context, *interceptor.Call) int64 // Nil: 1.
	priority func(context.Context, *interceptor.Call) int
	custom   Limit
	refusals [refusedCount]*interceptor.Refusal

	permits  permits
	settings atomic.Pointer[settings]
	sampler  sampler // Its mu also orders changes of the configuration.

	observed atomic.Int64 // What an observer was last told.
}

// settings is what admission looks at; it is not changed.
type settings struct {
	config   Config // As it was given.
	adaptive bool
	streams  bool
	maxWait  time.Duration
	drops    codeset.Set
}

// New returns a limit. An error is a [*interceptor.ConfigError], or several joined.
func New(cfg Config, opts ...Option) (*Layer, error) {
	o := options{errs: check.Of("concurrency"), name: "concurrency", priority: contextPriority}
	for _, opt := range opts {
		opt(&o)
	}
	o.errs.Name(o.name)
	l := &Layer{name: o.name, cost: o.cost, priority: o.priority, custom: o.custom}
	l.sampler.layer = l
	l.observed.Store(-1)
	refuse := func(reason interceptor.Reason, message string) *interceptor.Refusal {
		return interceptor.Refuse(l.name, reason, message)
	}
	l.refusals = [refusedCount]*interceptor.Refusal{
		noPlace:     refuse(interceptor.ReasonQueueFull, "as many calls wait for a permit as may"),
		displaced:   refuse(interceptor.ReasonQueueFull, "as many calls wait for a permit as may, and another one goes first"),
		delayed:     refuse(interceptor.ReasonConcurrency, "calls have been waiting for permits for too long"),
		noneInTime:  refuse(interceptor.ReasonConcurrency, "no permit became free in the time allowed"),
		maxWaitOver: refuse(interceptor.ReasonConcurrency, "no permit became free in the longest time a call waits"),
		noneFree:    refuse(interceptor.ReasonConcurrency, "no permit is free"),
	}
	if err := l.update(cfg, o.errs); err != nil {
		return nil, err
	}
	return l, nil
}

// Update changes the configuration while calls run. Permits in use stay in use,
// and calls that wait go on waiting. An algorithm that is configured anew keeps
// what it knows; another algorithm begins at the limit that holds, within its own
// bounds. On an error nothing has changed.
func (l *Layer) Update(cfg Config) error { return l.update(cfg, check.Of("concurrency")) }

func (l *Layer) update(cfg Config, errs *check.Errors) error {
	given := cfg.clone()
	set := l.check(&cfg, errs)
	if err := errs.Err(); err != nil {
		return err
	}
	s := &l.sampler
	s.mu.Lock()
	defer s.mu.Unlock()
	algorithm, err := l.choose(s.algorithm, cfg)
	if err != nil {
		return err
	}
	s.algorithm, set.config = algorithm, given
	limit := cfg.Limit
	if algorithm != nil {
		limit = limitOf(algorithm)
	}
	l.settings.Store(set)
	l.permits.configure(limit, cfg.Discipline, cfg.MaxWaiters, cfg.CoDelTarget, cfg.CoDelInterval)
	return nil
}

// Config returns the configuration as it was last given to New or Update. It knows
// nothing of SetLimit.
func (l *Layer) Config() Config { return l.settings.Load().config.clone() }

// clone copies what cfg points to.
func (cfg Config) clone() Config {
	cfg.AIMD, cfg.Gradient2, cfg.Vegas = clone(cfg.AIMD), clone(cfg.Gradient2), clone(cfg.Vegas)
	cfg.DropCodes = slices.Clone(cfg.DropCodes)
	return cfg
}

func clone[T any](p *T) *T {
	if p == nil {
		return nil
	}
	v := *p
	return &v
}

// check checks cfg and fills in its defaults. The algorithms have their own.
func (l *Layer) check(cfg *Config, errs *check.Errors) *settings {
	l.checkBound(cfg, errs)
	errs.Require(cfg.Discipline >= FIFO && cfg.Discipline <= CoDel, "Discipline", cfg.Discipline, "must be FIFO, LIFO or CoDel")
	check.Zero(errs, "MaxWaiters", cfg.MaxWaiters, check.Positive, "no bound")
	check.Zero(errs, "MaxWait", cfg.MaxWait, check.Positive, "no bound")
	check.Default(errs, "CoDelTarget", &cfg.CoDelTarget, check.Positive, defaultCoDelTarget)
	check.Default(errs, "CoDelInterval", &cfg.CoDelInterval, check.Positive, defaultCoDelInterval)
	return &settings{
		adaptive: cfg.Limit == 0, streams: cfg.SampleStreams, maxWait: cfg.MaxWait,
		drops: check.Codes(errs, "DropCodes", cfg.DropCodes, codes.Unavailable, codes.ResourceExhausted, codes.DeadlineExceeded),
	}
}

// checkBound checks that the limit has one source, and checks that.
func (l *Layer) checkBound(cfg *Config, errs *check.Errors) {
	set := 0
	source := func(field string, isSet bool, value any, checkValue func()) {
		if !isSet {
			return
		}
		set++
		switch {
		case l.custom != nil:
			errs.Add(field, value, "must not be set if WithAlgorithm is used")
		case set > 1:
			errs.Add(field, value, "must be the only one that is set of Limit, AIMD, Gradient2 and Vegas")
		default:
			checkValue()
		}
	}
	source("Limit", cfg.Limit != 0, cfg.Limit, func() { check.Required(errs, "Limit", cfg.Limit, check.From[int64](1, maxLimit)) })
	source("AIMD", cfg.AIMD != nil, cfg.AIMD, func() { cfg.AIMD.withDefaults(errs.In("AIMD")) })
	source("Gradient2", cfg.Gradient2 != nil, cfg.Gradient2, func() { cfg.Gradient2.withDefaults(errs.In("Gradient2")) })
	source("Vegas", cfg.Vegas != nil, cfg.Vegas, func() { cfg.Vegas.withDefaults(errs.In("Vegas")) })
	errs.Require(set > 0 || l.custom != nil, "Limit", cfg.Limit, "must be from 1 to %d unless AIMD, Gradient2 or Vegas is set", int64(maxLimit))
}

// choose returns the algorithm that cfg asks for, nil for a fixed limit: the one
// before, reconfigured, if it is of the same kind. A new one starts at the limit
// that holds, if there is one.
func (l *Layer) choose(before Limit, cfg Config) (Limit, error) {
	var next interface {
		Limit
		start(limit float64)
	}
	var err error
	switch {
	case l.custom != nil:
		return l.custom, nil
	case cfg.AIMD != nil:
		if a, ok := before.(*AIMD); ok {
			return a, a.Update(*cfg.AIMD)
		}
		next, err = NewAIMD(*cfg.AIMD)
	case cfg.Gradient2 != nil:
		if g, ok := before.(*Gradient2); ok {
			return g, g.Update(*cfg.Gradient2)
		}
		next, err = NewGradient2(*cfg.Gradient2)
	case cfg.Vegas != nil:
		if v, ok := before.(*Vegas); ok {
			return v, v.Update(*cfg.Vegas)
		}
		next, err = NewVegas(*cfg.Vegas)
	default:
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	if n := l.Limit(); n > 0 {
		next.start(float64(n))
	}
	return next, nil
}

// SetLimit changes a fixed limit while calls run. Shrinking takes effect as permits
// come back, growing admits waiting calls at once. 0 stops admission: calls wait
// as long as they may, for ever if nothing bounds them, as in Tower, and go on when
// the limit is raised. It fails if n is not from 0 to 2147483647, or an algorithm
// sets the limit.
func (l *Layer) SetLimit(n int64) error {
	errs := check.Of("concurrency")
	check.Required(errs, "SetLimit", n, check.From[int64](0, maxLimit))
	if err := errs.Err(); err != nil {
		return err
	}
	s := &l.sampler
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.algorithm != nil {
		errs.Add("SetLimit", n, "must not be used while an algorithm (%T) sets the limit", s.algorithm)
		return errs.Err()
	}
	l.permits.setLimit(n)
	return nil
}

// String returns the layer's name.
func (l *Layer) String() string { return l.name }

// Limit returns how many permits there are.
func (l *Layer) Limit() int64 { return l.permits.limit.Load() }

// InUse returns how many permits are held by calls. It exceeds Limit for a while
// after the limit has shrunk, and while a call runs that costs more than the limit.
func (l *Layer) InUse() int64 {
	_, n, _ := l.permits.read()
	return n
}

// Waiting returns how many calls wait for permits.
func (l *Layer) Waiting() int {
	_, _, n := l.permits.read()
	return n
}

// WrapGate returns the gate.
func (l *Layer) WrapGate(inner interceptor.Gate) interceptor.Gate {
	return &gate{layer: l, inner: inner}
}

type gate struct {
	layer *Layer
	inner interceptor.Gate
}

func (g *gate) Admit(ctx context.Context, c *interceptor.Call, w interceptor.Wait) error {
	l := g.layer
	cost := int64(1)
	if l.cost != nil {
		cost = min(max(l.cost(ctx, c), 1), maxLimit)
	}
	set := l.settings.Load()
	if !l.permits.try(cost, c.Place()) {
		if err := l.wait(ctx, c, w, cost, set.maxWait); err != nil {
			return err
		}
	}
	c.Hold(l, cost)
	l.observe(c)
	if err := g.inner.Admit(ctx, c, w); err != nil {
		return err
	}
	if set.adaptive && (set.streams || c.Kind() == interceptor.Unary) {
		// Held last: the round trip begins when all gates have been passed, and the
		// sample is taken while the call's permit still counts.
		c.Hold(&l.sampler, int64(c.Now()))
	}
	return nil
}

// wait waits for a permit.
func (l *Layer) wait(ctx context.Context, c *interceptor.Call, w interceptor.Wait, cost int64, maxWait time.Duration) error {
	if w == interceptor.None {
		return l.refusals[noneFree]
	}
	since := interceptor.Now()
	if !w.Allows(since, since+1) {
		return l.refusals[noneFree]
	}
	if ctx.Err() != nil { // It must not take the place of one that still can wait.
		return interceptor.Ended(ctx, l.name)
	}
	over := noneInTime
	if maxWait > 0 {
		if bound := since.Add(maxWait).Wait(); bound < w {
			w, over = bound, maxWaitOver
		}
	}
	wt := &waiter{cost: cost, priority: l.priority(ctx, c), since: since, place: c.Place(), done: make(chan struct{}, 1)}
	l.permits.enqueue(wt)
	err := w.On(ctx, wt.done)
	if err != nil && !l.permits.abandon(wt) {
		if wt.why == admitted && err != interceptor.ErrWaitOver {
			l.permits.release(cost) // The call will not be made; the permit is handed on.
		} else {
			err = nil
		}
	}
	c.Waited(l.name, since)
	switch {
	case err == interceptor.ErrWaitOver:
		return l.refusals[over]
	case err != nil:
		return interceptor.Ended(ctx, l.name)
	case wt.why != admitted:
		return l.refusals[wt.why]
	}
	return nil
}

// Release takes permits back.
func (l *Layer) Release(cost int64, _ interceptor.Outcome, _ error) { l.permits.release(cost) }

// observe tells the call's observer of a limit that has changed. Limits change at
// the end of calls, where there is no observer, so it is the next call's that
// hears of it.
func (l *Layer) observe(c *interceptor.Call) {
	n := l.Limit()
	if was := l.observed.Load(); was != n && l.observed.CompareAndSwap(was, n) {
		c.Observer().Limit(l.name, float64(n))
	}
}

// sampler takes the samples of an adaptive limit.
type sampler struct {
	layer *Layer

	// mu guards algorithm and what it points to, and orders changes of the limit.
	// permits.mu is taken under it.
	mu        sync.Mutex
	algorithm Limit // Nil for a fixed limit.
}

// Release tells the algorithm how a call has ended.
func (s *sampler) Release(start int64, o interceptor.Outcome, err error) {
	l := s.layer
	dropped := false
	switch o {
	case interceptor.OK:
	case interceptor.Failed:
		if l.settings.Load().drops&(1<<code(err)) == 0 {
			return
		}
		dropped = true
	default:
		return
	}
	begun := interceptor.Instant(start)
	sample := Sample{Start: begun, RTT: max(interceptor.Now().Sub(begun), 0), Dropped: dropped}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.algorithm == nil {
		return // The limit has become a fixed one.
	}
	var limit int64
	limit, sample.InFlight, _ = l.permits.read()
	s.algorithm.OnSample(sample)
	if n := limitOf(s.algorithm); n != limit {
		l.permits.setLimit(n)
	}
}

// limitOf is a's limit, within what the layer can enforce.
func limitOf(a Limit) int64 { return min(max(a.Limit(), 1), maxLimit) }

// code is the status code of err, without making a status of a refusal.
func code(err error) codes.Code {
	if r, ok := interceptor.AsRefusal(err); ok && r.Reason != interceptor.ReasonBudget {
		if r.Code != codes.OK {
			return min(r.Code, 31)
		}
		return r.Reason.Code()
	}
	return min(status.Code(err), 31)
}

// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package concurrency

import (
	"context"
	"iter"
	"math"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"google.golang.org/grpc/codes"

	"github.com/belfry-go/belfry/interceptor"
	"github.com/belfry-go/belfry/internal/check"
	"github.com/belfry-go/belfry/internal/codeset"
	"github.com/belfry-go/belfry/internal/keyed"
	"github.com/belfry-go/belfry/internal/layercheck"
	"github.com/belfry-go/belfry/internal/seldom"
	"github.com/belfry-go/belfry/limit"
)

// Discipline is the order in which waiting calls of the same priority are
// admitted.
type Discipline int

const (
	// FIFO admits the call that has waited longest. It is fair, and the default.
	FIFO Discipline = iota
	// LIFO admits the call that came last. Under overload it serves calls whose callers
	// are still there, while FIFO would serve each just before its deadline. The oldest
	// calls starve.
	LIFO
	// CoDel is FIFO that refuses calls from a queue that has been standing for too long
	// (controlled delay, RFC 8289). It absorbs a burst, and does not turn a lasting
	// overload into a lasting delay.
	CoDel
	// Adaptive is FIFO until calls have waited without a break for
	// [Config.CoDelInterval], and then LIFO until no call waits (adaptive LIFO, Maurer,
	// "Fail at Scale", 2015). It is fair in a burst, and under a lasting overload serves
	// calls whose callers are still there. Bound the queue with MaxWaiters or MaxWait.
	Adaptive
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
	case Adaptive:
		return "Adaptive"
	}
	return "Discipline(" + strconv.Itoa(int(d)) + ")"
}

// Config configures a [Layer]. At most one of Limit, Auto, AIMD, Gradient2 and Vegas is
// set. If none is and [WithAlgorithm] is not used, [Auto] finds the limit, with its
// defaults.
type Config struct {
	// Limit is a fixed number of permits, from 1 to 2147483647.
	Limit int64
	// Auto, AIMD, Gradient2 and Vegas let an algorithm find the limit.
	Auto      *limit.AutoConfig
	AIMD      *limit.AIMDConfig
	Gradient2 *limit.Gradient2Config
	Vegas     *limit.VegasConfig

	// Discipline is the order in which waiting calls are admitted; FIFO if zero.
	Discipline Discipline
	// MaxWaiters is how many calls may wait. When it is exceeded, the call that would be
	// admitted last is refused with reason QUEUE_FULL: one of the lowest priority, with
	// FIFO the one that just came, with LIFO the one that has waited longest. 0 means no
	// bound.
	MaxWaiters int
	// MaxWait is the longest that a call waits, if its Wait allows that much; then it is
	// refused with reason CONCURRENCY. 0 means no bound.
	MaxWait time.Duration
	// CoDelTarget is the delay that a queue may have for longer than CoDelInterval: 5 ms
	// and 100 ms if zero, the values of RFC 8289. They must not be negative. Adaptive uses
	// CoDelInterval; other disciplines ignore them.
	CoDelTarget, CoDelInterval time.Duration

	// DropCodes are the codes of failed calls that are a sign of overload to an
	// algorithm: UNAVAILABLE, RESOURCE_EXHAUSTED and DEADLINE_EXCEEDED if nil, none if
	// empty and not nil. Calls that failed with other codes teach it nothing.
	DropCodes []codes.Code
	// SampleStreams lets algorithms learn from streams. The round trip of a stream whose
	// server may send many messages is the time to its first response, a header or a
	// message; that of other streams is their whole life. Streams hold permits in any
	// case.
	SampleStreams bool

	// KeyBy gives each key its own limit, with its own queue and algorithm. If it is zero
	// all calls share one limit. It cannot be changed.
	KeyBy interceptor.KeyBy
	// MaxKeys is how many keys have their own limit, from 1 to 1,000,000; 1000 if zero.
	// Further keys share one limit. A key without a call in flight makes room for new
	// ones. If an algorithm sets the limits it does so only after a minute without calls,
	// because what the algorithm has learnt is lost with it.
	MaxKeys int
}

const (
	defaultCoDelTarget   = 5 * time.Millisecond
	defaultCoDelInterval = 100 * time.Millisecond

	defaultMaxKeys = 1000
	mostKeys       = 1_000_000
	// maxLimit bounds what may be configured, so that sums of permits do not overflow.
	maxLimit   = math.MaxInt32
	keepLearnt = time.Minute
)

// Others is the key of the limit that keys beyond [Config.MaxKeys] share.
const Others = keyed.Others

// NewLayer returns a limit with this configuration, as [New] does.
func (cfg Config) NewLayer() (interceptor.Layer, error) {
	l, err := New(cfg)
	if err != nil {
		return nil, err
	}
	return l, nil
}

// An Option sets what is not plain data.
type Option func(*options)

type options struct {
	errs     *check.Errors
	name     string
	cost     func(ctx context.Context, a *interceptor.Admission) int64
	priority interceptor.PriorityFunc
	custom   limit.Algorithm
}

// WithName names the layer in refusals, metrics and the stack's String. The
// default is "concurrency"; it must not be empty.
func WithName(name string) Option { return func(o *options) { o.name = name } }

// WithCost sets how many permits a call takes; without it each takes one. cost is called
// once per admission, concurrently, and must be quick. Less than 1 counts as 1. A call
// that costs more than the limit runs when nothing else does. While a heavy call waits
// first in the queue, lighter calls wait behind it, or are refused if they may not wait,
// even if there are permits for them: those are kept for the heavy call, unless the light
// ones have a higher priority.
//
// Where calls may not wait, as inside a load shed, light calls would take each permit as
// it comes back. So permits are kept for heavy calls there: of all costs about the same
// share of the calls is admitted, if a heavy call comes every second or more often. Permits
// are idle while they gather. With a limit of 10, every twentieth call of cost 5, and three
// times the load, 26 % of the light and of the heavy calls are admitted, instead of 39 and
// 0.3 %, and 78 % of the permits are in use, instead of 94 % (TestHeavyInOverload). With a
// buffer between the load shed and the limit they are not idle for want of a heavy call.
func WithCost(cost func(ctx context.Context, a *interceptor.Admission) int64) Option {
	return func(o *options) {
		o.errs.NotNil(cost == nil, "WithCost", "a function")
		o.cost = cost
	}
}

// WithPriority sets the function that returns the priority of a call; by default
// [interceptor.ContextPriority]. It is called concurrently, at most twice per admission,
// and not for calls that find a permit free, unless permits are kept for a priority.
//
// Calls of a higher priority are admitted before all that wait at a lower one, whatever
// the discipline. If calls of a high priority alone exceed the limit those below
// starve: they wait until their own Wait, their deadline or MaxWait ends.
//
// Where calls may not wait, as inside a load shed, permits are kept free for higher
// priorities: enough that about 2 % of their calls are refused, at most all but one. The
// layer finds the number from the calls that are refused, and it goes back to zero within
// seconds when calls of that priority stop. Permits that are kept are sometimes idle:
// with three calls of a high priority for every ten permits, the lower ones lose about a
// third of what would be left for them. With a buffer between the load shed and the limit
// they lose nothing.
func WithPriority(priority interceptor.PriorityFunc) Option {
	return func(o *options) {
		o.errs.NotNil(priority == nil, "WithPriority", "a function")
		o.priority = priority
	}
}

// WithAlgorithm lets your own algorithm find the limit. Then none of the five in Config
// may be set, nor KeyBy. The algorithm cannot be shared between Layers.
func WithAlgorithm(a limit.Algorithm) Option {
	return func(o *options) {
		o.errs.NotNil(a == nil, "WithAlgorithm", "an algorithm")
		o.custom = a
	}
}

// A Layer is a concurrency limit. It is safe for concurrent use, also by several
// stacks, whose calls it then limits together. A fixed limit takes no lock for a call
// that finds a permit free and nobody waiting, or is refused; an adaptive one takes one
// for each sample, and every lock is held for a few instructions. It allocates nothing,
// admitted or refused; only a call that waits does.
type Layer struct {
	interceptor.GateOnly

	// Set by New and not changed.
	name     string
	cost     func(context.Context, *interceptor.Admission) int64 // Nil: 1.
	priority interceptor.PriorityFunc
	custom   limit.Algorithm

	log seldom.Log // Of limits that are halved.

	settings atomic.Pointer[settings]

	one  *limiter             // Nil if there are keys.
	keys *keyed.Map[*limiter] // Nil if there are none.

	mu sync.Mutex // Orders changes of the configuration. Limiters are locked under it.
}

// settings are immutable.
type settings struct {
	config           Config // As it was given.
	limit            int64  // The fixed limit; SetLimit changes it.
	adaptive         bool
	maxKeys          int
	target, interval time.Duration
	drops            codeset.Set
}

// refusals returns the refusals that go with s.
func (s *settings) refusals() *refusals {
	rs := &refusals{limit: s.limit, maxWaiters: s.config.MaxWaiters, maxWait: s.config.MaxWait}
	if s.adaptive {
		rs.limit = -1
	}
	return rs
}

// New returns a limit. An error is a [*interceptor.ConfigError], or several joined.
func New(cfg Config, opts ...Option) (*Layer, error) {
	o := options{errs: check.Of("concurrency"), name: "concurrency", priority: interceptor.ContextPriority}
	check.Options(o.errs, &o, opts)
	o.errs.Name(o.name)
	l := &Layer{name: o.name, cost: o.cost, priority: o.priority, custom: o.custom}
	set, err := l.check(cfg, o.errs)
	if err != nil {
		return nil, err
	}
	l.settings.Store(set)
	if cfg.KeyBy.IsSet() {
		l.keys = keyed.New(func() int { return l.settings.Load().maxKeys }, l.newLimiter, l.droppable)
		return l, nil
	}
	l.one = newLimiter(l, "")
	if err := l.one.configure(set); err != nil {
		return nil, err
	}
	return l, nil
}

// NewLayer returns the limit itself.
func (l *Layer) NewLayer() (interceptor.Layer, error) { return l, nil }

// newLimiter makes the limit of a key.
func (l *Layer) newLimiter(key string) *limiter {
	lim := newLimiter(l, key)
	if err := lim.configure(l.settings.Load()); err != nil {
		panic(err) // The settings are checked.
	}
	return lim
}

// droppable reports whether the limit of a key may be forgotten.
func (l *Layer) droppable(lim *limiter, unused time.Duration, _ int64) bool {
	return lim.idle() && (!l.settings.Load().adaptive || unused >= keepLearnt)
}

// limiters calls f with the limit, or with those of all keys.
func (l *Layer) limiters(f func(*limiter) error) error {
	if l.keys == nil {
		return f(l.one)
	}
	for _, lim := range l.keys.All() { // New limiters have the new settings.
		if err := f(lim); err != nil {
			return err
		}
	}
	return nil
}

// Update changes the configuration while calls run. Permits in use stay in use, and
// calls that wait keep waiting. An algorithm keeps what it has learnt when it is
// reconfigured; another algorithm starts at the current limit, within its own bounds.
// After an error nothing has changed.
func (l *Layer) Update(cfg Config) error {
	errs := check.Of("concurrency")
	l.mu.Lock()
	defer l.mu.Unlock()
	if old := l.settings.Load().config.KeyBy; !cfg.KeyBy.Same(old) {
		errs.Add("KeyBy", cfg.KeyBy, "must stay %v: make a new layer", old)
	}
	set, err := l.check(cfg, errs)
	if err != nil {
		return err
	}
	l.settings.Store(set)
	return l.limiters(func(lim *limiter) error { return lim.configure(set) })
}

// Config returns the configuration as it was last given to New or Update. It does not
// show SetLimit.
func (l *Layer) Config() Config { return l.settings.Load().config.clone() }

// clone copies what cfg points to.
func (cfg Config) clone() Config {
	cfg.Auto, cfg.AIMD, cfg.Gradient2, cfg.Vegas = clone(cfg.Auto), clone(cfg.AIMD), clone(cfg.Gradient2), clone(cfg.Vegas)
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

// check checks cfg and returns its settings with defaults filled in. Algorithms check
// theirs themselves.
func (l *Layer) check(cfg Config, errs *check.Errors) (*settings, error) {
	set := &settings{
		config: cfg.clone(), limit: cfg.Limit, adaptive: cfg.Limit == 0,
		maxKeys: cfg.MaxKeys, target: cfg.CoDelTarget, interval: cfg.CoDelInterval,
	}
	l.checkBound(&cfg, errs)
	errs.Require(cfg.Discipline >= FIFO && cfg.Discipline <= Adaptive, "Discipline", cfg.Discipline, "must be FIFO, LIFO, CoDel or Adaptive")
	check.Zero(errs, "MaxWaiters", cfg.MaxWaiters, check.Positive, "no bound")
	check.Zero(errs, "MaxWait", cfg.MaxWait, check.Positive, "no bound")
	check.Default(errs, "CoDelTarget", &set.target, check.Positive, defaultCoDelTarget)
	check.Default(errs, "CoDelInterval", &set.interval, check.Positive, defaultCoDelInterval)
	check.Default(errs, "MaxKeys", &set.maxKeys, check.From(1, mostKeys), defaultMaxKeys)
	layercheck.KeyBy(errs, "KeyBy", cfg.KeyBy)
	errs.Require(l.custom == nil || !cfg.KeyBy.IsSet(), "KeyBy", cfg.KeyBy, "must not be set if WithAlgorithm is used")
	set.drops = check.Codes(errs, "DropCodes", cfg.DropCodes, codes.Unavailable, codes.ResourceExhausted, codes.DeadlineExceeded)
	return set, errs.Err()
}

// checkBound checks that at most one of the limit and the algorithms is set, and checks
// it.
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
			errs.Add(field, value, "must be the only one that is set of Limit, Auto, AIMD, Gradient2 and Vegas")
		default:
			checkValue()
		}
	}
	source("Limit", cfg.Limit != 0, cfg.Limit, func() { check.Required(errs, "Limit", cfg.Limit, check.From[int64](1, maxLimit)) })
	source("Auto", cfg.Auto != nil, cfg.Auto, func() { _, err := limit.NewAuto(*cfg.Auto); errs.Nested("", err) })
	source("AIMD", cfg.AIMD != nil, cfg.AIMD, func() { _, err := limit.NewAIMD(*cfg.AIMD); errs.Nested("", err) })
	source("Gradient2", cfg.Gradient2 != nil, cfg.Gradient2, func() { _, err := limit.NewGradient2(*cfg.Gradient2); errs.Nested("", err) })
	source("Vegas", cfg.Vegas != nil, cfg.Vegas, func() { _, err := limit.NewVegas(*cfg.Vegas); errs.Nested("", err) })
}

// SetLimit changes a fixed limit while calls run; with [Config.KeyBy] that of each key. A
// lower limit takes effect as permits come back, and a higher one admits waiting calls at
// once. 0 stops admission: calls wait as long as they may, as in Tower, and are admitted
// when the limit is raised. It fails if n is not from 0 to 2147483647, or if an algorithm
// sets the limit.
func (l *Layer) SetLimit(n int64) error {
	errs := check.Of("concurrency")
	check.Required(errs, "SetLimit", n, check.From[int64](0, maxLimit))
	if err := errs.Err(); err != nil {
		return err
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	set := *l.settings.Load()
	if set.adaptive {
		errs.Add("SetLimit", n, "must not be used while an algorithm (%s) sets the limit", l.algorithmName(&set.config))
		return errs.Err()
	}
	set.limit = n
	l.settings.Store(&set)
	return l.limiters(func(lim *limiter) error {
		lim.setLimit(&set)
		return nil
	})
}

func (l *Layer) algorithmName(cfg *Config) string {
	switch {
	case l.custom != nil:
		return "WithAlgorithm"
	case cfg.AIMD != nil:
		return "AIMD"
	case cfg.Gradient2 != nil:
		return "Gradient2"
	case cfg.Vegas != nil:
		return "Vegas"
	}
	return "Auto"
}

// String returns the layer's name.
func (l *Layer) String() string { return l.name }

// Traits says that calls may wait for permits.
func (l *Layer) Traits() interceptor.Traits { return interceptor.Waits }

// Stats returns the state of the limit of a key; zero if there is none for it. Without
// [Config.KeyBy] there is one limit, whatever the key.
func (l *Layer) Stats(key string) interceptor.LimitState {
	if l.keys == nil {
		return l.one.state()
	}
	if lim, ok := l.keys.Peek(key); ok {
		return lim.state()
	}
	return interceptor.LimitState{}
}

// Limits yields the states of all limits, in no order.
func (l *Layer) Limits() iter.Seq[interceptor.LimitState] {
	return func(yield func(interceptor.LimitState) bool) {
		if l.keys == nil {
			yield(l.one.state())
			return
		}
		for _, lim := range l.keys.All() {
			if !yield(lim.state()) {
				return
			}
		}
	}
}

// total adds up the figures of all limits, and takes the greatest of them as the limit.
func (l *Layer) total() (limit, inUse int64, waiting int) {
	_ = l.limiters(func(lim *limiter) error {
		n, used, waits := lim.permits.read()
		limit, inUse, waiting = max(limit, n), inUse+used, waiting+waits
		return nil
	})
	return limit, inUse, waiting
}

// Limit returns how many permits there are. With [Config.KeyBy] it is the number for
// each key if it is fixed, and otherwise that of the key that has the most.
func (l *Layer) Limit() int64 {
	if set := l.settings.Load(); !set.adaptive {
		return set.limit
	}
	n, _, _ := l.total()
	return n
}

// InUse returns how many permits are held by calls, with [Config.KeyBy] those of all
// keys. It exceeds Limit for a while after the limit has shrunk, and while a call runs
// that costs more than the limit.
func (l *Layer) InUse() int64 {
	_, n, _ := l.total()
	return n
}

// Waiting returns how many calls wait for permits, with [Config.KeyBy] those of all keys.
func (l *Layer) Waiting() int {
	_, _, n := l.total()
	return n
}

// WrapGate returns the gate.
func (l *Layer) WrapGate(inner interceptor.Gate) interceptor.Gate {
	return &gate{layer: l, inner: inner}
}

// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package hedge

import (
	"context"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"google.golang.org/grpc/codes"

	"github.com/belfry-go/belfry/interceptor"
	"github.com/belfry-go/belfry/interceptor/budget"
	"github.com/belfry-go/belfry/internal/attempt"
	"github.com/belfry-go/belfry/internal/check"
	"github.com/belfry-go/belfry/internal/codeset"
	"github.com/belfry-go/belfry/internal/latency"
	"github.com/belfry-go/belfry/internal/repeat"
)

// Defaults of [Config].
const (
	DefaultMaxExtraLoad  = 0.05
	DefaultMaxAttempts   = 2
	DefaultMinDelay      = time.Millisecond
	DefaultMinDataPoints = 10
	DefaultWindow        = time.Minute
	DefaultBufferBytes   = 256 << 10
	// DefaultMinPerSecond is the reserve of the layer's own budget: one extra attempt
	// a second, so that a client with few calls can hedge some of them, and one with
	// many those that a stall catches all at once.
	DefaultMinPerSecond = 1

	// steady is the part of MaxExtraLoad that the percentile asks for.
	steady = 0.8
)

// Config is when extra attempts are made, and how many. The zero value is the
// default: a second attempt for the slowest 4 % of calls, and never for more than
// 5 % of them and one a second.
type Config struct {
	// MaxExtraLoad is the one knob: the share of calls that may get an extra
	// attempt. It sets the budget to this share of calls, and the delay to the
	// latency that all but four fifths of this share stay below. The last fifth is
	// what the budget has in hand when a server stalls; in steady state a percentile
	// that asks for all of the budget leaves nothing for that. At least 0.000001 and
	// less than 1; zero means 0.05. Delay or Percentile, and Budget, replace one side of it.
	MaxExtraLoad float64
	// Delay is how long to wait before each extra attempt. Zero means a percentile
	// of recent latencies; negative is an error.
	Delay time.Duration
	// Percentile is that percentile, more than 0 and less than 1: 0.95 hedges the
	// calls that take longer than 95 % do. Zero means 1 - 0.8·MaxExtraLoad. It must
	// be zero if Delay is set.
	Percentile float64
	// MinDelay is the least delay that a percentile may ask for. Zero means 1 ms;
	// negative is an error.
	MinDelay time.Duration
	// MinDataPoints is how many latencies must be known before a percentile of them
	// is believed; until then no call is hedged. Zero means 10; negative is an
	// error.
	MinDataPoints int
	// Window is how long latencies are remembered. 1 s to 1 h; zero means one minute.
	Window time.Duration
	// MaxAttempts bounds the attempts of a call, the first included. 1 to 10, where
	// 1 hedges nothing; zero means 2.
	MaxAttempts int
	// NonFatal are the codes of failures after which the next attempt is made at
	// once, and not after the delay. Nil means UNAVAILABLE. After any other failure
	// no further attempt is made.
	NonFatal []codes.Code
	// DeclaredOnly hedges only methods that are declared idempotent in their .proto
	// file, and those of [WithIdempotent].
	DeclaredOnly bool
	// BufferBytes is how many bytes of sent messages are kept for each stream so
	// that it can be hedged. A stream that sends more before its first response is
	// not hedged, nor is one with messages whose size cannot be told: other than
	// protocol buffers, byte slices and what has a Size method. 1 to 64 MiB; zero
	// means 256 KiB.
	BufferBytes int
	// Budget bounds the extra attempts of all calls together. If its Ratio is zero
	// it is MaxExtraLoad; if its MinPerSecond is zero it is 1. It must be the zero
	// value if [WithBudget] is used.
	Budget budget.Config
}

// settings is a Config that has been checked. It is not changed.
type settings struct {
	given      Config
	fixed      time.Duration // If not zero.
	percentile float64
	least      time.Duration
	points     int
	window     time.Duration
	max        int
	nonFatal   codeset.Set
	declared   bool
	buffer     int
	budget     budget.Config
}

// settings checks c. shared says that the budget is given by WithBudget.
func (c Config) settings(errs *check.Errors, shared bool) *settings {
	c.NonFatal = slices.Clone(c.NonFatal) // The caller may change its own.
	given := c
	// A budget counts in millionths.
	check.Default(errs, "MaxExtraLoad", &c.MaxExtraLoad, check.Below(1e-6, 1), DefaultMaxExtraLoad)
	check.Zero(errs, "Delay", c.Delay, check.Positive, "a percentile")
	if c.Delay != 0 {
		errs.Require(c.Percentile == 0, "Percentile", c.Percentile, "must be 0 if Delay is set")
	} else {
		check.DefaultText(errs, "Percentile", &c.Percentile, check.Between(0.0, 1), 1-steady*c.MaxExtraLoad, "what MaxExtraLoad asks for")
	}
	check.Default(errs, "MinDelay", &c.MinDelay, check.Positive, DefaultMinDelay)
	check.Default(errs, "MinDataPoints", &c.MinDataPoints, check.Positive, DefaultMinDataPoints)
	check.Default(errs, "Window", &c.Window, check.From(time.Second, time.Hour), DefaultWindow)
	check.Default(errs, "MaxAttempts", &c.MaxAttempts, check.From(1, 10), DefaultMaxAttempts)
	nonFatal := check.Codes(errs, "NonFatal", c.NonFatal, codes.Unavailable)
	check.Default(errs, "BufferBytes", &c.BufferBytes, check.From(1, 64<<20), DefaultBufferBytes)
	if c.Budget.Ratio == 0 {
		c.Budget.Ratio = c.MaxExtraLoad
	}
	if c.Budget.MinPerSecond == 0 {
		c.Budget.MinPerSecond = DefaultMinPerSecond
	}
	repeat.CheckBudget(errs, given.Budget, c.Budget, shared)
	return &settings{
		given: given, fixed: c.Delay, percentile: c.Percentile, least: c.MinDelay, points: c.MinDataPoints, window: c.Window,
		max: c.MaxAttempts, nonFatal: nonFatal, declared: c.DeclaredOnly, buffer: c.BufferBytes, budget: c.Budget,
	}
}

// An Option is what cannot be said in a Config.
type Option func(*options)

type options struct {
	errs       *check.Errors
	name       string
	budget     *budget.Budget
	shared     bool // WithBudget was used.
	idempotent func(method string) bool
}

// WithName names the layer in metrics and the stack's String. The
// default is "hedge"; it must not be empty.
func WithName(name string) Option { return func(o *options) { o.name = name } }

// WithBudget makes the layer spend b, which it may share with other layers and
// stacks. By default it has a budget of its own.
func WithBudget(b *budget.Budget) Option {
	return func(o *options) {
		o.errs.NotNil(b == nil, "WithBudget", "a budget")
		o.budget, o.shared = b, true
	}
}

// WithIdempotent restricts the layer to the methods, such as "/pkg.Service/Get",
// for which f returns true; with Config.DeclaredOnly those that are declared
// idempotent come on top. f is called concurrently, once for each call.
func WithIdempotent(f func(method string) bool) Option {
	return func(o *options) {
		o.errs.NotNil(f == nil, "WithIdempotent", "a function")
		o.idempotent = f
	}
}

// A Layer hedges calls; see the package's documentation. It is an
// [interceptor.Layer].
type Layer struct {
	// Set by New and not changed.
	name       string
	budget     *budget.Budget
	shared     bool // The budget was given.
	idempotent func(method string) bool
	latencies  *latency.Window

	set atomic.Pointer[settings]
	// mu serialises Update; the budget's and the window's own mutexes are locked
	// under it.
	mu sync.Mutex
}

// New returns a layer that knows no latencies yet. An error is a
// [*interceptor.ConfigError], or several joined.
func New(c Config, opts ...Option) (*Layer, error) {
	errs := check.Of("hedge")
	o := options{errs: errs, name: "hedge"}
	for _, opt := range opts {
		opt(&o)
	}
	errs.Name(o.name)
	s := c.settings(errs, o.shared)
	if err := errs.Err(); err != nil {
		return nil, err
	}
	l := &Layer{name: o.name, budget: o.budget, shared: o.shared, idempotent: o.idempotent, latencies: latency.New(s.window)}
	if !l.shared {
		var err error
		if l.budget, err = budget.New(s.budget); err != nil {
			return nil, err
		}
	}
	l.set.Store(s)
	return l, nil
}

// Update changes the configuration for calls that begin from now on. Latencies
// are kept, and the budget keeps its balance. On an error nothing has changed.
func (l *Layer) Update(c Config) error {
	errs := check.Of("hedge")
	s := c.settings(errs, l.shared)
	if err := errs.Err(); err != nil {
		return err
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if !l.shared {
		if err := l.budget.Update(s.budget); err != nil {
			return err
		}
	}
	if l.set.Load().window != s.window {
		l.latencies.SetWindow(s.window)
	}
	l.set.Store(s)
	return nil
}

// Config returns the configuration as it was given to New or Update.
func (l *Layer) Config() Config {
	c := l.set.Load().given
	c.NonFatal = slices.Clone(c.NonFatal)
	return c
}

// Budget returns the budget that the layer spends.
func (l *Layer) Budget() *budget.Budget { return l.budget }

// Delay returns how long a call that began now would wait before an extra attempt.
// ok is false as long as too few latencies are known, when calls are not hedged.
func (l *Layer) Delay() (d time.Duration, ok bool) { return l.delay(l.set.Load()) }

func (l *Layer) delay(set *settings) (d time.Duration, ok bool) {
	if set.fixed != 0 {
		return set.fixed, true
	}
	d, n := l.latencies.Quantile(set.percentile)
	return max(d, set.least), n >= set.points
}

// mayHedge reports whether calls of the method may be hedged.
func (l *Layer) mayHedge(set *settings, method string) bool {
	return set.max > 1 && repeat.May(set.declared, l.idempotent, method)
}

// String returns the layer's name.
func (l *Layer) String() string { return l.name }

// WrapGate returns a gate that counts calls for the budget.
func (l *Layer) WrapGate(inner interceptor.Gate) interceptor.Gate { return &gate{l, inner} }

type gate struct {
	layer *Layer
	inner interceptor.Gate
}

func (g *gate) Admit(ctx context.Context, c *interceptor.Call, w interceptor.Wait) error {
	g.layer.budget.Count(c, g.layer.name)
	return g.inner.Admit(ctx, c, w)
}

// WrapCall returns the call path that hedges.
func (l *Layer) WrapCall(next interceptor.Next, inner interceptor.Gate) interceptor.Next {
	return func(ctx context.Context, c *interceptor.Call) error {
		set := l.set.Load()
		delay, known := l.delay(set)
		hedged := known && l.mayHedge(set, c.Method())
		if hedged && c.Balanced() {
			ctx, _ = attempt.WithTried(ctx)
		}
		if c.Kind() != interceptor.Unary {
			return l.open(ctx, c, set, delay, hedged, next, inner)
		}
		if !hedged {
			start := interceptor.Now()
			err := next(ctx, c)
			if err == nil {
				l.latencies.Record(interceptor.Now().Sub(start))
			}
			return err
		}
		r := &race{
			layer: l, set: set, delay: delay, ctx: ctx, call: c, origin: c.Origin(), next: next, inner: inner, observer: c.Observer(),
		}
		c.KeepTrailer()
		return r.unary()
	}
}

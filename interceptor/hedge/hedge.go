// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package hedge

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"google.golang.org/grpc/codes"

	"github.com/belfry-go/belfry/interceptor"
	"github.com/belfry-go/belfry/interceptor/budget"
	"github.com/belfry-go/belfry/internal/attempt"
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
	// that asks for all of the budget leaves nothing for that. More than 0 and less
	// than 1; zero means 0.05. Delay or Percentile, and Budget, replace one side of it.
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
	// protocol buffers, byte slices and what has a Size method. Up to 64 MiB; zero
	// means 256 KiB.
	BufferBytes int
	// Budget bounds the extra attempts of all calls together. If its Ratio is zero
	// it is MaxExtraLoad; if its MinPerSecond is zero it is 1. It must be the zero
	// value if [WithBudget] is used.
	Budget budget.Config
}

// settings is a Config that has been checked. It is not changed.
type settings struct {
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

func (c Config) settings() (*settings, error) {
	s := &settings{
		fixed: c.Delay, percentile: c.Percentile, least: c.MinDelay, points: c.MinDataPoints, window: c.Window,
		max: c.MaxAttempts, declared: c.DeclaredOnly, buffer: c.BufferBytes, budget: c.Budget,
	}
	load := c.MaxExtraLoad
	if load == 0 {
		load = DefaultMaxExtraLoad
	}
	if !(load > 0 && load < 1) {
		return nil, fmt.Errorf("hedge: MaxExtraLoad is %v, must be greater than 0 and less than 1, or 0 for %v", c.MaxExtraLoad, DefaultMaxExtraLoad)
	}
	if s.fixed < 0 {
		return nil, fmt.Errorf("hedge: Delay is %v, must be positive, or 0 for a percentile", c.Delay)
	}
	switch {
	case s.percentile != 0 && s.fixed != 0:
		return nil, fmt.Errorf("hedge: Percentile is %v, must be 0 if Delay is set, here to %v", c.Percentile, c.Delay)
	case s.percentile == 0:
		s.percentile = 1 - steady*load
	case !(s.percentile > 0 && s.percentile < 1):
		return nil, fmt.Errorf("hedge: Percentile is %v, must be greater than 0 and less than 1, or 0 for what MaxExtraLoad asks for", c.Percentile)
	}
	if s.least == 0 {
		s.least = DefaultMinDelay
	}
	if s.least < 0 {
		return nil, fmt.Errorf("hedge: MinDelay is %v, must be positive, or 0 for %v", c.MinDelay, DefaultMinDelay)
	}
	if s.points == 0 {
		s.points = DefaultMinDataPoints
	}
	if s.points < 0 {
		return nil, fmt.Errorf("hedge: MinDataPoints is %d, must be positive, or 0 for %d", c.MinDataPoints, DefaultMinDataPoints)
	}
	if s.window == 0 {
		s.window = DefaultWindow
	}
	if s.window < time.Second || s.window > time.Hour {
		return nil, fmt.Errorf("hedge: Window is %v, must be from 1s to 1h, or 0 for %v", c.Window, DefaultWindow)
	}
	if s.max == 0 {
		s.max = DefaultMaxAttempts
	}
	if s.max < 1 || s.max > 10 {
		return nil, fmt.Errorf("hedge: MaxAttempts is %d, must be from 1 to 10, or 0 for %d", c.MaxAttempts, DefaultMaxAttempts)
	}
	list := c.NonFatal
	if list == nil {
		list = []codes.Code{codes.Unavailable}
	}
	var err error
	if s.nonFatal, err = codeset.Of(list...); err != nil {
		return nil, fmt.Errorf("hedge: NonFatal%w", err)
	}
	if s.buffer == 0 {
		s.buffer = DefaultBufferBytes
	}
	if s.buffer < 0 || s.buffer > 64<<20 {
		return nil, fmt.Errorf("hedge: BufferBytes is %d, must be from 1 to %d, or 0 for %d", c.BufferBytes, 64<<20, DefaultBufferBytes)
	}
	if s.budget.Ratio == 0 {
		s.budget.Ratio = load
	}
	if s.budget.MinPerSecond == 0 {
		s.budget.MinPerSecond = DefaultMinPerSecond
	}
	return s, nil
}

// An Option is what cannot be said in a Config.
type Option func(*Layer) error

// WithName names the layer in metrics and the stack's String. The default is
// "hedge"; it must not be empty.
func WithName(name string) Option {
	return func(l *Layer) error {
		if name == "" {
			return errors.New(`hedge: WithName "": must not be empty`)
		}
		l.name = name
		return nil
	}
}

// WithBudget makes the layer spend b, which it may share with other layers and
// stacks. By default it has a budget of its own.
func WithBudget(b *budget.Budget) Option {
	return func(l *Layer) error {
		if b == nil {
			return errors.New("hedge: WithBudget: the budget is nil")
		}
		l.budget, l.shared = b, true
		return nil
	}
}

// WithIdempotent restricts the layer to the methods, such as "/pkg.Service/Get",
// for which f returns true; with Config.DeclaredOnly those that are declared
// idempotent come on top. f is called concurrently, once for each call.
func WithIdempotent(f func(method string) bool) Option {
	return func(l *Layer) error {
		if f == nil {
			return errors.New("hedge: WithIdempotent: the function is nil")
		}
		l.idempotent = f
		return nil
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

// New returns a layer that knows no latencies yet.
func New(c Config, opts ...Option) (*Layer, error) {
	s, err := c.settings()
	if err != nil {
		return nil, err
	}
	l := &Layer{name: "hedge", latencies: latency.New(s.window)}
	for _, o := range opts {
		if err := o(l); err != nil {
			return nil, err
		}
	}
	if !l.shared {
		if l.budget, err = budget.New(s.budget); err != nil {
			return nil, fmt.Errorf("hedge: Budget: %w", err)
		}
	}
	if err := l.Update(c); err != nil {
		return nil, err
	}
	return l, nil
}

// Update changes the configuration for calls that begin from now on. Latencies
// are kept, and the budget keeps its balance. On an error nothing has changed.
func (l *Layer) Update(c Config) error {
	s, err := c.settings()
	if err != nil {
		return err
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.shared {
		if c.Budget != (budget.Config{}) {
			return fmt.Errorf("hedge: Budget is %+v, must not be set, for the layer was given a budget by WithBudget", c.Budget)
		}
	} else if err := l.budget.Update(s.budget); err != nil {
		return fmt.Errorf("hedge: Budget: %w", err)
	}
	if old := l.set.Load(); old == nil || old.window != s.window {
		l.latencies.SetWindow(s.window)
	}
	l.set.Store(s)
	return nil
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

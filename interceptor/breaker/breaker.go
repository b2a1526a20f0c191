// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package breaker

import (
	"context"
	"math"
	"math/rand/v2"
	"slices"
	"sync/atomic"
	"time"

	"google.golang.org/grpc/codes"

	"github.com/belfry-go/belfry/interceptor"
	"github.com/belfry-go/belfry/internal/check"
	"github.com/belfry-go/belfry/internal/codeset"
	"github.com/belfry-go/belfry/internal/keyed"
)

// Config says when a circuit opens, for how long, and what closes it. The zero
// Config is the default. At least one of ConsecutiveFailures, FailureRatio and
// SlowCallRatio trips a circuit; if all three are zero, FailureRatio is 0.5.
type Config struct {
	// ConsecutiveFailures trips the circuit at this many failures with no success
	// in between. RESOURCE_EXHAUSTED, though a failure, is left out here: a server
	// that limits its load is there (linkerd's rule). At least 1; zero is off.
	ConsecutiveFailures int

	// FailureRatio trips the circuit at this share of failures among the calls that
	// ended in Window, from MinCalls of them on. Greater than 0 and at most 1; zero
	// is off.
	FailureRatio float64

	// SlowCallRatio trips the circuit at this share of calls that took SlowCall or
	// longer, among the unary calls that ended in Window, from MinCalls of them on.
	// Streams last as long as they are used, so they are never slow. The time of a
	// call includes what gates inside the breaker waited. Greater than 0 and at most
	// 1; zero is off. SlowCall is at least 1 µs; both are set, or none.
	SlowCallRatio float64
	SlowCall      time.Duration

	// Window is over what time the ratios are taken. It moves in twentieths. Between
	// 100 ms and 24 h; zero means 10 s.
	Window time.Duration

	// MinCalls is from how many calls in Window on its ratios mean something. At
	// least 1; zero means 20.
	MinCalls int

	// OpenFor is how long a circuit is open until it is half-open. At least 1 ms;
	// zero means 5 s. Each time in a row that the probes fail multiplies it by
	// OpenGrowth, up to MaxOpenFor. OpenGrowth is at least 1; zero means 2.
	// MaxOpenFor is at least OpenFor; zero means one minute, or OpenFor if that is
	// longer.
	OpenFor    time.Duration
	OpenGrowth float64
	MaxOpenFor time.Duration

	// Jitter shortens each time open by a random share of up to this, so that
	// clients that tripped together do not probe together. Above 0 and at most 1;
	// zero means 0.2, [None] that there is no jitter.
	Jitter float64

	// Probes is how many calls a half-open circuit lets pass, and how many have to
	// succeed for it to close. If they do not end, as streams may not for long, one
	// more is let pass every OpenFor. At least 1; zero means 1.
	Probes int

	// FailureCodes are the codes that are failures. Nil means UNKNOWN,
	// DEADLINE_EXCEEDED, RESOURCE_EXHAUSTED, INTERNAL, UNAVAILABLE and DATA_LOSS.
	// Nothing tells whether a deadline was exceeded because the server is slow or
	// because the caller was impatient; leave that code out if callers are. A list
	// that is empty is an error, unless SlowCallRatio is set: nothing would trip.
	FailureCodes []codes.Code

	// PerMethod gives each method a circuit of its own. It excludes [WithKey].
	PerMethod bool

	// MaxKeys is how many circuits there are at most, per method or by [WithKey].
	// Keys beyond it share one more ([Others]). At least 1; zero means 1,000.
	MaxKeys int

	// KeyIdle is for how long a key must not have been called before its circuit may
	// be forgotten. That happens when new keys come, at the latest when there are
	// MaxKeys; an open circuit is not forgotten. At least 1 s; zero means 10 minutes.
	KeyIdle time.Duration
}

// Defaults of [Config].
const (
	DefaultFailureRatio = 0.5
	DefaultWindow       = 10 * time.Second
	DefaultMinCalls     = 20
	DefaultOpenFor      = 5 * time.Second
	DefaultOpenGrowth   = 2
	DefaultMaxOpenFor   = time.Minute
	DefaultJitter       = 0.2
	DefaultProbes       = 1
	DefaultMaxKeys      = 1000
	DefaultKeyIdle      = 10 * time.Minute
)

// None, as a Jitter, is no jitter.
const None = check.None

// Others is the key of the circuit that keys beyond Config.MaxKeys share.
const Others = keyed.Others

// settings are a Config that was found good, with its defaults filled in.
type settings struct {
	Config
	given    Config
	failures codeset.Set
}

func (c Config) settings(errs *check.Errors) *settings {
	c.FailureCodes = slices.Clone(c.FailureCodes) // The caller may change its own.
	given := c
	check.Zero(errs, "ConsecutiveFailures", c.ConsecutiveFailures, check.Positive, "off")
	check.Zero(errs, "FailureRatio", c.FailureRatio, check.Above(0.0, 1), "off")
	check.Zero(errs, "SlowCallRatio", c.SlowCallRatio, check.Above(0.0, 1), "off")
	if c.SlowCallRatio == 0 {
		errs.Require(c.SlowCall == 0, "SlowCall", c.SlowCall, "must be 0 unless SlowCallRatio is set")
	} else {
		errs.Require(c.SlowCall >= time.Microsecond, "SlowCall", c.SlowCall, "must be at least 1µs if SlowCallRatio is set")
	}
	if c.ConsecutiveFailures == 0 && c.FailureRatio == 0 && c.SlowCallRatio == 0 {
		c.FailureRatio = DefaultFailureRatio
	}
	check.Default(errs, "Window", &c.Window, check.From(100*time.Millisecond, 24*time.Hour), DefaultWindow)
	check.Default(errs, "MinCalls", &c.MinCalls, check.Positive, DefaultMinCalls)
	check.Default(errs, "OpenFor", &c.OpenFor, check.AtLeast(time.Millisecond), DefaultOpenFor)
	check.Default(errs, "OpenGrowth", &c.OpenGrowth, check.AtLeast(1.0), DefaultOpenGrowth)
	if c.MaxOpenFor == 0 {
		c.MaxOpenFor = max(DefaultMaxOpenFor, c.OpenFor)
	}
	errs.Require(c.MaxOpenFor >= c.OpenFor, "MaxOpenFor", c.MaxOpenFor, "must be at least OpenFor, %v", c.OpenFor)
	check.DefaultOrNone(errs, "Jitter", &c.Jitter, check.Above(0.0, 1), DefaultJitter, "none")
	c.Jitter = max(c.Jitter, 0)
	check.Default(errs, "Probes", &c.Probes, check.Positive, DefaultProbes)
	failures := check.Codes(errs, "FailureCodes", c.FailureCodes,
		codes.Unknown, codes.DeadlineExceeded, codes.ResourceExhausted, codes.Internal, codes.Unavailable, codes.DataLoss)
	errs.Require(c.FailureCodes == nil || len(c.FailureCodes) > 0 || c.SlowCallRatio != 0,
		"FailureCodes", c.FailureCodes, "must hold a code unless SlowCallRatio is set, or be nil for the default")
	check.Default(errs, "MaxKeys", &c.MaxKeys, check.Positive, DefaultMaxKeys)
	check.Default(errs, "KeyIdle", &c.KeyIdle, check.AtLeast(time.Second), DefaultKeyIdle)
	return &settings{Config: c, given: given, failures: failures}
}

// delay is how long a circuit is open that has tripped n times without having
// been closed in between, n ≥ 1: OpenFor×OpenGrowth^(n-1), at most MaxOpenFor,
// less the jitter.
func (s *settings) delay(n int, random float64) time.Duration {
	d := float64(s.OpenFor) * math.Pow(s.OpenGrowth, float64(n-1)) // Perhaps +Inf, which min mends.
	d = min(d, float64(s.MaxOpenFor)) * (1 - s.Jitter*random)
	if d >= math.MaxInt64 { // As a float the greatest Duration is more than fits in one.
		return s.MaxOpenFor
	}
	return max(time.Duration(d), time.Millisecond)
}

// State is the state of a circuit.
type State uint8

// The states of a circuit.
const (
	Closed   State = iota // calls pass and are judged
	HalfOpen              // a few calls pass, to see whether it can close
	Open                  // calls are refused
)

// String returns the state's name.
func (s State) String() string {
	switch s {
	case Closed:
		return "closed"
	case HalfOpen:
		return "half-open"
	case Open:
		return "open"
	}
	return "unknown"
}

// Cause is why a circuit has changed its state.
type Cause string

// The causes of changes.
const (
	CauseConsecutive Cause = "consecutive failures" // closed to open
	CauseRatio       Cause = "failure ratio"        // closed to open
	CauseSlow        Cause = "slow calls"           // closed to open
	CauseDelay       Cause = "open long enough"     // open to half-open
	CauseProbeFailed Cause = "a probe failed"       // half-open to open
	CauseProbesOK    Cause = "the probes succeeded" // half-open to closed
	CauseTrip        Cause = "Trip"                 // any to open
	CauseReset       Cause = "Reset"                // any to closed
)

// A Change is a change of a circuit's state.
type Change struct {
	Key      string // the method or key; empty if there is one circuit for all
	From, To State
	Cause    Cause
	OpenFor  time.Duration // of a change to Open: until it is half-open; zero if only Reset ends it
}

// A Breaker is the layer. It has one state for all stacks it stands in. All its
// methods may be called concurrently.
type Breaker struct {
	interceptor.GateOnly
	name     string
	key      func(ctx context.Context, c *interceptor.Call) string
	onChange func(Change)
	random   func() float64 // In [0, 1); of tests if not math/rand's.

	settings atomic.Pointer[settings]
	all      *circuit // Of all calls, if there are no keys.
	keys     *keyed.Map[*circuit]
}

// An Option configures what is not data.
type Option func(*options)

type options struct {
	errs     *check.Errors
	name     string
	key      func(ctx context.Context, c *interceptor.Call) string
	onChange func(Change)
}

// WithName sets the name of the layer in refusals and in the stack's String; by
// default "breaker"; it must not be empty. It tells several breakers apart.
func WithName(name string) Option { return func(o *options) { o.name = name } }

// WithKey gives each key that f returns a circuit of its own. f is called for each
// admission, concurrently; it must not block and should not allocate. It
// excludes Config.PerMethod.
func WithKey(f func(ctx context.Context, c *interceptor.Call) string) Option {
	return func(o *options) {
		o.errs.NotNil(f == nil, "WithKey", "a function")
		o.key = f
	}
}

// WithOnStateChange has f called at each change of a circuit's state, in order for
// each circuit. f is called while the circuit is locked: it must not block, and
// must not use the Breaker or make calls through it.
func WithOnStateChange(f func(Change)) Option {
	return func(o *options) {
		o.errs.NotNil(f == nil, "WithOnStateChange", "a function")
		o.onChange = f
	}
}

// New returns a Breaker with all circuits closed. An error is a
// [*interceptor.ConfigError], or several joined.
func New(config Config, opts ...Option) (*Breaker, error) {
	o := options{errs: check.Of("breaker"), name: "breaker"}
	for _, opt := range opts {
		opt(&o)
	}
	o.errs.Name(o.name)
	b := &Breaker{name: o.name, key: o.key, onChange: o.onChange, random: rand.Float64}
	if err := b.update(config, o.errs); err != nil {
		return nil, err
	}
	b.all = newCircuit(b, "")
	b.keys = keyed.New(
		func() int { return b.settings.Load().MaxKeys },
		func(key string) *circuit { return newCircuit(b, key) },
		func(c *circuit, unused time.Duration, now int64) bool {
			return unused >= b.settings.Load().KeyIdle && !c.refuses(interceptor.Instant(now))
		})
	return b, nil
}

// Update replaces the config while calls run. Circuits keep their states, what
// they have counted and, if open, the moment at which they will be half-open; the
// window as far as the new one reaches back. If PerMethod changes, the circuits
// of the other kind are kept, but not used. A bad config changes nothing.
func (b *Breaker) Update(config Config) error { return b.update(config, check.Of("breaker")) }

func (b *Breaker) update(config Config, errs *check.Errors) error {
	s := config.settings(errs)
	errs.Require(!s.PerMethod || b.key == nil, "PerMethod", s.PerMethod, "must be false if WithKey is used")
	if err := errs.Err(); err != nil {
		return err
	}
	b.settings.Store(s)
	return nil
}

// Config returns the config as it was given to New or Update.
func (b *Breaker) Config() Config {
	c := b.settings.Load().given
	c.FailureCodes = slices.Clone(c.FailureCodes)
	return c
}

// String returns the layer's name.
func (b *Breaker) String() string { return b.name }

func (b *Breaker) isKeyed(s *settings) bool { return s.PerMethod || b.key != nil }

// find returns the circuit of key if there is one. Where all calls share one, it
// is that one.
func (b *Breaker) find(key string) (*circuit, bool) {
	if !b.isKeyed(b.settings.Load()) {
		return b.all, true
	}
	return b.keys.Peek(key)
}

// State returns the state of the circuit of key: a method, such as
// "/helloworld.Greeter/SayHello", or what the function of [WithKey] returns. If
// there is one circuit for all calls, key does not matter. A circuit whose time
// is over is half-open, also before the first call notices. One that does not
// exist is closed.
func (b *Breaker) State(key string) State {
	if c, ok := b.find(key); ok {
		return c.current(interceptor.Now())
	}
	return Closed
}

// States returns the states of all circuits by key.
func (b *Breaker) States() map[string]State {
	now := interceptor.Now()
	if !b.isKeyed(b.settings.Load()) {
		return map[string]State{"": b.all.current(now)}
	}
	states := map[string]State{}
	for k, c := range b.keys.All() {
		states[k] = c.current(now)
	}
	return states
}

// Trip opens the circuit of key, see [Breaker.State], for d, or until Reset if d
// is not positive. A circuit that does not exist is made.
func (b *Breaker) Trip(key string, d time.Duration) {
	c, ok := b.find(key)
	now := interceptor.Now()
	if !ok {
		c = b.keys.Get(key, int64(now))
	}
	c.trip(now, d)
}

// Reset closes the circuit of key, see [Breaker.State], and forgets what it has
// counted.
func (b *Breaker) Reset(key string) {
	if c, ok := b.find(key); ok {
		c.reset()
	}
}

// WrapGate returns the gate.
func (b *Breaker) WrapGate(inner interceptor.Gate) interceptor.Gate {
	return &gate{breaker: b, inner: inner}
}

type gate struct {
	breaker *Breaker
	inner   interceptor.Gate
}

func (g *gate) Admit(ctx context.Context, c *interceptor.Call, w interceptor.Wait) error {
	b := g.breaker
	s := b.settings.Load()
	cir := b.all
	switch {
	case s.PerMethod:
		cir = b.keys.Get(c.Method(), int64(c.Now()))
	case b.key != nil:
		cir = b.keys.Get(b.key(ctx, c), int64(c.Now()))
	}
	token, err := cir.admit(s, c)
	if err != nil {
		return err
	}
	c.Hold(cir, token)
	return g.inner.Admit(ctx, c, w)
}

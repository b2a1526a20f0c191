// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package breaker

import (
	"context"
	"iter"
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
	"github.com/belfry-go/belfry/internal/layercheck"
	"github.com/belfry-go/belfry/internal/seldom"
)

// Config says when a circuit opens, for how long, and what closes it. The zero
// Config is the default. At least one of ConsecutiveFailures, FailureRatio and
// SlowCallRatio trips a circuit; if all three are zero, FailureRatio is 0.5.
type Config struct {
	// ConsecutiveFailures trips the circuit at this many failures with no success
	// in between. RESOURCE_EXHAUSTED, though a failure, does not count here: a server
	// that limits its load is up (linkerd's rule). At least 1; zero is off.
	ConsecutiveFailures int

	// FailureRatio trips the circuit at this share of failures among the calls that
	// ended in Window, if those are at least MinCalls. Greater than 0 and at most 1;
	// zero is off.
	FailureRatio float64

	// SlowCallRatio trips the circuit at this share of calls that took SlowCall or
	// longer, among the unary calls that ended in Window, if those are at least
	// MinCalls. The time counts from when a call is sent, so it does not include waiting
	// in gates inside the breaker. A call that its caller gave up counts only if it had
	// taken SlowCall by then. Streams are never slow, because they last as long as they
	// are used. Greater than 0 and at most 1; zero is off. SlowCall is at least 1 µs.
	// Set both or neither.
	SlowCallRatio float64
	SlowCall      time.Duration

	// Window is the time over which the ratios are taken. It moves in steps of a
	// twentieth. From 100 ms to 24 h; zero means 10 s.
	Window time.Duration

	// MinCalls is how many calls Window must hold before its ratios count. At least 1;
	// zero means 20.
	MinCalls int

	// OpenFor is how long a circuit is open before it is half-open. At least 1 ms;
	// zero means 5 s. Each further time that the probes fail multiplies it by
	// OpenGrowth, up to MaxOpenFor. OpenGrowth is at least 1; zero means 2. MaxOpenFor
	// is at least OpenFor; zero means one minute, or OpenFor if that is longer.
	OpenFor    time.Duration
	OpenGrowth float64
	MaxOpenFor time.Duration

	// Jitter shortens each open time by a random share of at most this, so that clients
	// that tripped together do not probe together. Above 0 and at most 1; zero means
	// 0.2, [None] means no jitter.
	Jitter float64

	// Probes is how many calls a half-open circuit lets pass, and how many must succeed
	// before it closes. If none says anything, because they hang or their callers give
	// up, as many more may pass every OpenFor. At least 1; zero means 1.
	Probes int

	// FailureCodes are the codes that are failures. Nil means UNKNOWN,
	// DEADLINE_EXCEEDED, RESOURCE_EXHAUSTED, INTERNAL, UNAVAILABLE and DATA_LOSS. An
	// empty list is an error unless SlowCallRatio is set, because nothing would trip.
	// The caller's own deadline is no failure, whatever the list says; that of a timeout
	// layer is.
	FailureCodes []codes.Code

	// IgnoreNotConnected ignores calls that were not sent because there was no
	// connection: no endpoint was READY, or the resolver failed. By default they are
	// failures, whatever FailureCodes says.
	IgnoreNotConnected bool

	// KeyBy gives each key a circuit of its own. By default there is one for all calls.
	KeyBy interceptor.KeyBy

	// MaxKeys is how many keys have their own circuit, at about 1,000 bytes each. All
	// further keys share one more ([Others]). From 1 to 1e6; zero means 10,000.
	MaxKeys int

	// KeyIdle is how long a key must be idle before its circuit may be forgotten. That
	// happens when new keys arrive, at the latest when there are MaxKeys. An open
	// circuit is not forgotten. At least 1 s; zero means 10 minutes.
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
	DefaultMaxKeys      = layercheck.DefaultMaxKeys
	DefaultKeyIdle      = layercheck.DefaultKeyIdle
)

// None is a Jitter of zero, where zero is the default.
const None = check.None

// Others is the key of the circuit that keys beyond Config.MaxKeys share.
const Others = keyed.Others

// settings are a valid Config with its defaults filled in.
type settings struct {
	Config
	given    Config
	failures codeset.Set
}

// settings checks c. old are the settings that an update replaces; nil for a new layer.
func (c Config) settings(errs *check.Errors, old *settings) *settings {
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
	var oldKeyBy *interceptor.KeyBy
	if old != nil {
		oldKeyBy = &old.KeyBy
	}
	layercheck.Keys(errs, c.KeyBy, oldKeyBy, &c.MaxKeys, &c.KeyIdle)
	return &settings{Config: c, given: given, failures: failures}
}

// delay returns how long a circuit is open that tripped n ≥ 1 times without being closed
// in between: OpenFor×OpenGrowth^(n-1), at most MaxOpenFor, less the jitter.
func (s *settings) delay(n int, random float64) time.Duration {
	d := float64(s.OpenFor) * math.Pow(s.OpenGrowth, float64(n-1)) // May be +Inf; capped below.
	d = min(d, float64(s.MaxOpenFor)) * (1 - s.Jitter*random)
	if d >= math.MaxInt64 { // As a float the greatest Duration overflows one.
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

// Cause is why a circuit changed its state.
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

// A Layer is a circuit breaker. It has one state for all stacks that use it. Its methods
// may be called concurrently.
type Layer struct {
	interceptor.GateOnly
	name     string
	onChange func(Change)
	random   func() float64 // In [0, 1); of tests if not math/rand's.
	log      seldom.Log

	settings atomic.Pointer[settings]
	all      *circuit             // If there is one for all calls.
	keys     *keyed.Map[*circuit] // If there is one for each key.
}

// An Option configures what is not data.
type Option func(*options)

type options struct {
	errs     *check.Errors
	name     string
	onChange func(Change)
}

// WithName sets the name of the layer in refusals and in the stack's String; by
// default "breaker"; it must not be empty. It tells several breakers apart.
func WithName(name string) Option { return func(o *options) { o.name = name } }

// WithOnStateChange calls f at each change of a circuit's state, in order for each
// circuit. The circuit is locked meanwhile: f must not block, and must not use the Layer
// or make calls through it.
func WithOnStateChange(f func(Change)) Option {
	return func(o *options) {
		o.errs.NotNil(f == nil, "WithOnStateChange", "a function")
		o.onChange = f
	}
}

// New returns a Layer with all circuits closed. An error is a
// [*interceptor.ConfigError], or several joined.
func New(config Config, opts ...Option) (*Layer, error) {
	o := options{errs: check.Of("breaker"), name: "breaker"}
	check.Options(o.errs, &o, opts)
	o.errs.Name(o.name)
	b := &Layer{name: o.name, onChange: o.onChange, random: rand.Float64}
	if err := b.update(config, o.errs); err != nil {
		return nil, err
	}
	if !config.KeyBy.IsSet() {
		b.all = newCircuit(b, "")
		return b, nil
	}
	b.keys = keyed.New(
		func() int { return b.settings.Load().MaxKeys },
		func(key string) *circuit { return newCircuit(b, key) },
		func(c *circuit, unused time.Duration, now int64) bool {
			return unused >= b.settings.Load().KeyIdle && !c.refuses(interceptor.Instant(now))
		})
	return b, nil
}

// NewLayer makes the layer as New does without options.
func (c Config) NewLayer() (interceptor.Layer, error) {
	b, err := New(c)
	if err != nil {
		return nil, err
	}
	return b, nil
}

// NewLayer returns the layer itself.
func (b *Layer) NewLayer() (interceptor.Layer, error) { return b, nil }

// Update replaces the config while calls run. Circuits keep their states, and what they
// have counted as far as the new window reaches back. An open circuit keeps the moment
// at which it will be half-open. KeyBy cannot be changed: make a new layer. A wrong
// config changes nothing.
func (b *Layer) Update(config Config) error { return b.update(config, check.Of("breaker")) }

func (b *Layer) update(config Config, errs *check.Errors) error {
	s := config.settings(errs, b.settings.Load())
	if err := errs.Err(); err != nil {
		return err
	}
	b.settings.Store(s)
	return nil
}

// Config returns the config as it was given to New or Update.
func (b *Layer) Config() Config {
	c := b.settings.Load().given
	c.FailureCodes = slices.Clone(c.FailureCodes)
	return c
}

// String returns the layer's name.
func (b *Layer) String() string { return b.name }

// Traits says that it decides, and never waits.
func (b *Layer) Traits() interceptor.Traits { return interceptor.Decides }

// find returns the circuit of key, or the one that all calls share.
func (b *Layer) find(key string) (*circuit, bool) {
	if b.keys == nil {
		return b.all, true
	}
	return b.keys.Peek(key)
}

// State returns the state of the circuit of a key, such as the method
// "/helloworld.Greeter/SayHello" with Config.KeyBy.Method. If there is one circuit
// for all calls, key does not matter. An open circuit whose time is over counts as
// half-open even before a call notices. A circuit that does not exist is closed.
func (b *Layer) State(key string) State {
	if c, ok := b.find(key); ok {
		return c.current(interceptor.Now())
	}
	return Closed
}

// States returns the states of all circuits by key.
func (b *Layer) States() map[string]State {
	now := interceptor.Now()
	if b.keys == nil {
		return map[string]State{"": b.all.current(now)}
	}
	states := map[string]State{}
	for k, c := range b.keys.All() {
		states[k] = c.current(now)
	}
	return states
}

// Readings yields the state of each circuit.
func (b *Layer) Readings() iter.Seq[interceptor.Reading] {
	return func(yield func(interceptor.Reading) bool) {
		now, byMethod := interceptor.Now(), b.settings.Load().KeyBy.Method
		read := func(c *circuit) bool {
			state := c.current(now)
			return yield(interceptor.Reading{
				Layer: b.name, Key: c.key, ByMethod: byMethod,
				What: interceptor.ReadingCircuit, Value: float64(state), Text: state.String(),
			})
		}
		if b.keys == nil {
			read(b.all)
			return
		}
		for _, c := range b.keys.All() {
			if !read(c) {
				return
			}
		}
	}
}

// Trip opens the circuit of key, see [Layer.State], for d, or until Reset if d is not
// positive. It makes the circuit if it does not exist.
func (b *Layer) Trip(key string, d time.Duration) {
	c, ok := b.find(key)
	now := interceptor.Now()
	if !ok {
		c = b.keys.Get(key, int64(now))
	}
	c.trip(now, d)
}

// Reset closes the circuit of key, see [Layer.State], and forgets what it has
// counted.
func (b *Layer) Reset(key string) {
	if c, ok := b.find(key); ok {
		c.reset()
	}
}

// WrapGate returns the gate.
func (b *Layer) WrapGate(inner interceptor.Gate) interceptor.Gate {
	return &gate{breaker: b, inner: inner}
}

type gate struct {
	breaker *Layer
	inner   interceptor.Gate
}

func (g *gate) Admit(ctx context.Context, a *interceptor.Admission, w interceptor.Wait) error {
	b := g.breaker
	s, c := b.settings.Load(), b.all
	if c == nil {
		c = b.keys.Get(s.KeyBy.Key(ctx, a), int64(a.Now()))
	}
	token, err := c.admit(s, a)
	if err != nil {
		return err
	}
	a.Hold(c, token)
	return g.inner.Admit(ctx, a, w)
}

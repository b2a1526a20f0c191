// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package throttle

import (
	"context"
	"iter"
	"math/rand/v2"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"google.golang.org/grpc/codes"

	"github.com/belfry-go/belfry/interceptor"
	"github.com/belfry-go/belfry/internal/check"
	"github.com/belfry-go/belfry/internal/codeset"
	"github.com/belfry-go/belfry/internal/keyed"
	"github.com/belfry-go/belfry/internal/layercheck"
	"github.com/belfry-go/belfry/internal/rolling"
)

// Config is what a throttle does. The zero Config is the default.
type Config struct {
	// K is how many requests pass for each one that the server accepts: the lower, the
	// sooner calls are refused. 1.1 spares the server most, but then a client notices
	// late that it has recovered. At least 1; zero means 2.
	K float64

	// Window is the time over which calls are counted. It moves in steps of a twentieth.
	// From 1 s to 24 h; zero means 30 s.
	//
	// It also decides how long calls are refused after the server has recovered, because
	// the window still holds the outage. With the default MaxRefused and K, nine of ten
	// calls are refused for half a window. By then a twentieth of the window is accepted,
	// and the probability falls below 0.9. From then on the accepted share doubles about
	// every third of a window, and the last call is refused after one and three quarters
	// of a window: 53 s.
	//
	// Other settings remember the outage no longer than twice the Window: once the server
	// has rejected nothing for a Window, the probability falls to 0 over another one.
	Window time.Duration

	// MaxRefused is the greatest probability with which a call is refused, so that some
	// calls keep asking whether the server has recovered. Greater than 0 and at most 1;
	// zero means 0.9. It trades the load on a server that rejects everything against how
	// long calls are refused after its recovery: with 0.9 a tenth of the calls and one
	// and three quarters of a window, with Finagle's 0.75 a quarter of the calls and one
	// and a quarter windows. With 1 a client asks about once in a Window or two whether the
	// server has recovered.
	MaxRefused float64

	// MinRequests is how many calls the window must hold before any is refused, because
	// the first failure of a quiet client says little. 1 leaves it to the formula. At
	// least 1; zero means 10.
	MinRequests int

	// RejectCodes are the codes that say that the server did not accept the call.
	// Nil means UNAVAILABLE, RESOURCE_EXHAUSTED and DEADLINE_EXCEEDED. The caller's
	// own deadline is no rejection, whatever the list says.
	RejectCodes []codes.Code

	// CountNotConnected counts calls that were not sent because there was no
	// connection as rejected: no endpoint was READY, or the resolver failed. By
	// default they do not count.
	CountNotConnected bool

	// KeyBy counts and refuses the calls of each key separately, for example of each
	// Method if a server rejects one and serves another. By default all calls are counted
	// together.
	KeyBy interceptor.KeyBy

	// MaxKeys is how many keys are counted separately, at about 500 bytes each. All
	// further keys are counted together. From 1 to 1e6; zero means 10,000.
	MaxKeys int

	// KeyIdle is how long a key must be idle before its counts may be forgotten, and at
	// least a Window. That happens when new keys arrive, at the latest when there are
	// MaxKeys. At least 1 s; zero means 10 minutes.
	KeyIdle time.Duration
}

// Defaults of [Config].
const (
	DefaultK           = 2
	DefaultWindow      = 30 * time.Second
	DefaultMaxRefused  = 0.9
	DefaultMinRequests = 10
	DefaultMaxKeys     = layercheck.DefaultMaxKeys
	DefaultKeyIdle     = layercheck.DefaultKeyIdle
)

// settings are a valid Config with its defaults filled in.
type settings struct {
	Config
	given  Config
	reject codeset.Set
}

// settings checks c. old are the settings that an update replaces; nil for a new layer.
func (c Config) settings(errs *check.Errors, old *settings) *settings {
	c.RejectCodes = slices.Clone(c.RejectCodes) // The caller may change its own.
	given := c
	check.Default(errs, "K", &c.K, check.AtLeast(1.0), DefaultK)
	check.Default(errs, "Window", &c.Window, check.From(time.Second, 24*time.Hour), DefaultWindow)
	check.Default(errs, "MaxRefused", &c.MaxRefused, check.Above(0.0, 1), DefaultMaxRefused)
	check.Default(errs, "MinRequests", &c.MinRequests, check.Positive, DefaultMinRequests)
	reject := check.Codes(errs, "RejectCodes", c.RejectCodes, codes.Unavailable, codes.ResourceExhausted, codes.DeadlineExceeded)
	errs.Require(c.RejectCodes == nil || len(c.RejectCodes) > 0, "RejectCodes", c.RejectCodes, "must hold a code, or be nil for the default")
	var oldKeyBy *interceptor.KeyBy
	if old != nil {
		oldKeyBy = &old.KeyBy
	}
	layercheck.Keys(errs, c.KeyBy, oldKeyBy, &c.MaxKeys, &c.KeyIdle)
	return &settings{Config: c, given: given, reject: reject}
}

// probability returns the share of calls to refuse.
func (s *settings) probability(requests, accepts int64) float64 {
	if requests < int64(s.MinRequests) {
		return 0
	}
	p := (float64(requests) - s.K*float64(accepts)) / (float64(requests) + 1)
	return min(max(p, 0), s.MaxRefused)
}

// atMost is the greatest probability at a time after the last call that the server
// rejected: 1 for a Window, and then falling to 0 in another one.
func (s *settings) atMost(quiet time.Duration) float64 {
	return max(0, 2-max(1, float64(quiet)/float64(s.Window)))
}

// A Layer is a throttle. It has one state for all stacks that use it. Its methods may be
// called concurrently.
type Layer struct {
	interceptor.GateOnly
	name   string
	random func() float64 // In [0, 1); of tests if not math/rand's.

	settings atomic.Pointer[settings]
	all      *counts             // If all calls are counted together.
	keys     *keyed.Map[*counts] // If those of each key are.
}

// An Option configures what is not data.
type Option func(*options)

type options struct{ name string }

// WithName sets the name of the layer in refusals and in the stack's String; by
// default "throttle"; it must not be empty. It tells several throttles apart.
func WithName(name string) Option { return func(o *options) { o.name = name } }

// New returns a Layer. An error is a [*interceptor.ConfigError], or several joined.
func New(config Config, opts ...Option) (*Layer, error) {
	o := options{name: "throttle"}
	errs := check.Of("throttle")
	check.Options(errs, &o, opts)
	errs.Name(o.name)
	s := config.settings(errs, nil)
	if err := errs.Err(); err != nil {
		return nil, err
	}
	t := &Layer{name: o.name, random: rand.Float64}
	t.settings.Store(s)
	if !s.KeyBy.IsSet() {
		t.all = t.newCounts("")
		return t, nil
	}
	t.keys = keyed.New(
		func() int { return t.settings.Load().MaxKeys },
		t.newCounts,
		func(_ *counts, unused time.Duration, _ int64) bool {
			s := t.settings.Load()
			return unused >= max(s.KeyIdle, s.Window)
		})
	return t, nil
}

// NewLayer makes the layer as New does without options.
func (c Config) NewLayer() (interceptor.Layer, error) {
	t, err := New(c)
	if err != nil {
		return nil, err
	}
	return t, nil
}

// NewLayer returns the layer itself.
func (t *Layer) NewLayer() (interceptor.Layer, error) { return t, nil }

// Update replaces the config while calls run. Counts are kept as far as the new window
// reaches back. KeyBy cannot be changed: make a new layer. A wrong config changes
// nothing.
func (t *Layer) Update(config Config) error {
	errs := check.Of("throttle")
	s := config.settings(errs, t.settings.Load())
	if err := errs.Err(); err != nil {
		return err
	}
	t.settings.Store(s)
	return nil
}

// Config returns the config as it was given to New or Update.
func (t *Layer) Config() Config {
	c := t.settings.Load().given
	c.RejectCodes = slices.Clone(c.RejectCodes)
	return c
}

// Stats are the figures that a throttle decides by.
type Stats struct {
	Requests    int64   // calls in the window: those that ended and those refused here
	Accepts     int64   // those among them that the server accepted
	Probability float64 // with which a call is refused now, between 0 and Config.MaxRefused
}

// Stats returns the stats of a key, such as the method
// "/helloworld.Greeter/SayHello" with Config.KeyBy.Method. If all calls are counted
// together, key does not matter.
func (t *Layer) Stats(key string) Stats {
	c := t.all
	if t.keys != nil {
		var ok bool
		if c, ok = t.keys.Peek(key); !ok {
			return Stats{}
		}
	}
	return c.stats(t.settings.Load(), interceptor.Now())
}

func (c *counts) stats(s *settings, now interceptor.Instant) Stats {
	requests, accepts := c.window(s).Sum(int64(now))
	return Stats{Requests: requests, Accepts: accepts, Probability: c.probability(s, now, requests, accepts)}
}

// Readings yields the probability with which the calls of each key are refused now.
func (t *Layer) Readings() iter.Seq[interceptor.Reading] {
	return func(yield func(interceptor.Reading) bool) {
		s, now := t.settings.Load(), interceptor.Now()
		read := func(key string, c *counts) bool {
			return yield(interceptor.Reading{
				Layer: t.name, Key: key, ByMethod: s.KeyBy.Method,
				What: interceptor.ReadingRefusing, Value: c.stats(s, now).Probability,
			})
		}
		if t.keys == nil {
			read("", t.all)
			return
		}
		for key, c := range t.keys.All() {
			if !read(key, c) {
				return
			}
		}
	}
}

// String returns the layer's name.
func (t *Layer) String() string { return t.name }

// Traits says that it decides, and never waits.
func (t *Layer) Traits() interceptor.Traits { return interceptor.Decides }

// WrapGate returns the gate.
func (t *Layer) WrapGate(inner interceptor.Gate) interceptor.Gate {
	return &gate{throttle: t, inner: inner}
}

type gate struct {
	throttle *Layer
	inner    interceptor.Gate
}

func (g *gate) Admit(ctx context.Context, a *interceptor.Admission, w interceptor.Wait) error {
	t := g.throttle
	s, now, c := t.settings.Load(), a.Now(), t.all
	if c == nil {
		c = t.keys.Get(s.KeyBy.Key(ctx, a), int64(now))
	}
	window := c.window(s)
	requests, accepts := window.Sum(int64(now))
	if p := c.probability(s, now, requests, accepts); p > 0 && t.random() < p {
		window.Add(int64(now), false)
		return c.refused
	}
	a.Hold(c, 0)
	return g.inner.Admit(ctx, a, w)
}

// counts are the requests, and the accepts among them, of one key or of all calls.
type counts struct {
	throttle *Layer
	refused  *interceptor.Refusal
	rejected atomic.Int64 // The Instant of the last call that the server did not accept.
	win      atomic.Pointer[rolling.Window]
	resize   sync.Mutex // Serialises changes of win; nothing is locked under it.
}

func (t *Layer) newCounts(key string) *counts {
	c := &counts{throttle: t, refused: interceptor.Refuse(t.name, interceptor.ReasonThrottled, "the server rejects most calls")}
	if key != "" {
		c.refused = c.refused.ForKey(key)
	}
	c.win.Store(rolling.New(t.settings.Load().Window))
	return c
}

// window returns the window, of the span that s wants.
func (c *counts) window(s *settings) *rolling.Window {
	if w := c.win.Load(); w.Span() == s.Window {
		return w
	}
	c.resize.Lock()
	defer c.resize.Unlock()
	s = c.throttle.settings.Load() // Not the caller's, which may be the older one by now.
	w := c.win.Load()
	if w.Span() != s.Window {
		w = w.Resized(int64(interceptor.Now()), s.Window)
		c.win.Store(w)
	}
	return w
}

// Respond counts a stream as accepted at its first response.
func (c *counts) Respond(int64, interceptor.End) { c.add(c.throttle.settings.Load(), true) }

// Release counts a call that has ended, unless Respond counted it before.
func (c *counts) Release(_ int64, e interceptor.End) {
	if e.Responded {
		return
	}
	s := c.throttle.settings.Load()
	switch e.Outcome {
	case interceptor.OK:
		c.add(s, true)
	case interceptor.Failed:
		c.add(s, !s.reject.Has(e.Code()))
	case interceptor.NotConnected:
		if s.CountNotConnected {
			c.add(s, false)
		}
	}
}

func (c *counts) add(s *settings, accepted bool) {
	now := int64(interceptor.Now())
	if !accepted {
		c.rejected.Store(now)
	}
	c.window(s).Add(now, accepted)
}

// probability returns the share of calls to refuse now.
func (c *counts) probability(s *settings, now interceptor.Instant, requests, accepts int64) float64 {
	p := s.probability(requests, accepts)
	if p == 0 {
		return 0
	}
	return min(p, s.atMost(now.Sub(interceptor.Instant(c.rejected.Load()))))
}

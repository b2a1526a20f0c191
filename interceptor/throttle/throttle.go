// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package throttle

import (
	"context"
	"math/rand/v2"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/belfry-go/belfry/interceptor"
	"github.com/belfry-go/belfry/internal/check"
	"github.com/belfry-go/belfry/internal/codeset"
	"github.com/belfry-go/belfry/internal/keyed"
	"github.com/belfry-go/belfry/internal/rolling"
)

// Config is what a Throttle does. The zero Config is the default.
type Config struct {
	// K is how many requests are let through for each one that the server accepts:
	// the lower, the sooner calls are refused. 1.1 spares the server most, but a
	// client then sees late that it has recovered. At least 1; zero means 2.
	K float64

	// Window is over what time calls are counted. It moves in twentieths. Between
	// 1 s and 24 h; zero means 2 minutes.
	Window time.Duration

	// MaxRefused is the greatest probability with which a call is refused, so that
	// a share of calls keeps asking whether the server has recovered. Greater than
	// 0 and at most 1; zero means 0.9. It trades the load of a server that rejects
	// everything against how long after its recovery calls are still refused: with
	// 0.9 a tenth of the calls and one and three quarters of a window, with
	// Finagle's 0.75 a quarter and one and a quarter. With 1 there is hardly any
	// recovery while calls keep coming.
	MaxRefused float64

	// MinRequests is how many calls the window must have counted before any is
	// refused, for the first failure of a quiet client says little. 1 leaves it all
	// to the formula. At least 1; zero means 10.
	MinRequests int

	// RejectCodes are the codes that say that the server did not accept the call.
	// Nil means UNAVAILABLE, RESOURCE_EXHAUSTED and DEADLINE_EXCEEDED. A throttle
	// without codes would refuse nothing: a list that is empty is an error.
	RejectCodes []codes.Code

	// PerMethod counts and refuses each method by itself: right if one server
	// rejects one method and serves another. The first 1,000 methods have a count
	// of their own, the others share one; what is not called for an hour, and for a
	// window, is forgotten.
	PerMethod bool
}

// Defaults of [Config].
const (
	DefaultK           = 2
	DefaultWindow      = 2 * time.Minute
	DefaultMaxRefused  = 0.9
	DefaultMinRequests = 10
)

const (
	maxMethods = 1000
	methodIdle = time.Hour
)

// settings are a Config that was found good, with its defaults filled in.
type settings struct {
	given       Config
	k           float64
	window      time.Duration
	maxRefused  float64
	minRequests int64
	reject      codeset.Set
	perMethod   bool
	idle        time.Duration
}

func (c Config) settings(errs *check.Errors) *settings {
	c.RejectCodes = slices.Clone(c.RejectCodes) // The caller may change its own.
	s := &settings{given: c, perMethod: c.PerMethod}
	check.Default(errs, "K", &c.K, check.AtLeast(1.0), DefaultK)
	check.Default(errs, "Window", &c.Window, check.From(time.Second, 24*time.Hour), DefaultWindow)
	check.Default(errs, "MaxRefused", &c.MaxRefused, check.Above(0.0, 1), DefaultMaxRefused)
	check.Default(errs, "MinRequests", &c.MinRequests, check.Positive, DefaultMinRequests)
	s.reject = check.Codes(errs, "RejectCodes", c.RejectCodes, codes.Unavailable, codes.ResourceExhausted, codes.DeadlineExceeded)
	errs.Require(c.RejectCodes == nil || len(c.RejectCodes) > 0, "RejectCodes", c.RejectCodes, "must hold a code, or be nil for the default")
	s.k, s.window, s.maxRefused, s.minRequests = c.K, c.Window, c.MaxRefused, int64(c.MinRequests)
	s.idle = max(methodIdle, s.window)
	return s
}

// probability is the share of calls that is to be refused.
func (s *settings) probability(requests, accepts int64) float64 {
	if requests < s.minRequests {
		return 0
	}
	p := (float64(requests) - s.k*float64(accepts)) / (float64(requests) + 1)
	return min(max(p, 0), s.maxRefused)
}

// A Throttle is the layer. It has one state for all stacks it stands in. All its
// methods may be called concurrently.
type Throttle struct {
	interceptor.GateOnly
	name    string
	refused *interceptor.Refusal
	random  func() float64 // In [0, 1); of tests if not math/rand's.

	settings atomic.Pointer[settings]
	all      *counts // Of all methods.
	methods  *keyed.Map[*counts]
}

// An Option configures what is not data.
type Option func(*options)

type options struct{ name string }

// WithName sets the name of the layer in refusals and in the stack's String; by
// default "throttle"; it must not be empty. It tells several throttles apart.
func WithName(name string) Option { return func(o *options) { o.name = name } }

// New returns a Throttle. An error is a [*interceptor.ConfigError], or several
// joined.
func New(config Config, opts ...Option) (*Throttle, error) {
	o := options{name: "throttle"}
	for _, opt := range opts {
		opt(&o)
	}
	errs := check.Of("throttle")
	errs.Name(o.name)
	s := config.settings(errs)
	if err := errs.Err(); err != nil {
		return nil, err
	}
	t := &Throttle{name: o.name, random: rand.Float64}
	t.refused = interceptor.Refuse(t.name, interceptor.ReasonThrottled, "the server rejects most calls")
	t.settings.Store(s)
	t.all = t.newCounts()
	t.methods = keyed.New(
		func() int { return maxMethods },
		func(string) *counts { return t.newCounts() },
		func(_ *counts, unused time.Duration, _ int64) bool { return unused >= t.settings.Load().idle })
	return t, nil
}

// Update replaces the config while calls run. What was counted is kept, also if
// the window changes, as far as the new one reaches back; with PerMethod newly
// set, methods start at nothing. A bad config changes nothing.
func (t *Throttle) Update(config Config) error {
	errs := check.Of("throttle")
	s := config.settings(errs)
	if err := errs.Err(); err != nil {
		return err
	}
	t.settings.Store(s)
	return nil
}

// Config returns the config as it was given to New or Update.
func (t *Throttle) Config() Config {
	c := t.settings.Load().given
	c.RejectCodes = slices.Clone(c.RejectCodes)
	return c
}

// Stats are what a Throttle goes by.
type Stats struct {
	Requests    int64   // calls in the window: those that ended and those refused here
	Accepts     int64   // those among them that the server accepted
	Probability float64 // with which a call is refused now, between 0 and Config.MaxRefused
}

// Stats returns the stats of a method, such as "/helloworld.Greeter/SayHello". If
// the config is not per method they are those of all methods together.
func (t *Throttle) Stats(method string) Stats {
	s := t.settings.Load()
	c := t.all
	if s.perMethod {
		var ok bool
		if c, ok = t.methods.Peek(method); !ok {
			return Stats{}
		}
	}
	requests, accepts := c.window(s).Sum(int64(interceptor.Now()))
	return Stats{Requests: requests, Accepts: accepts, Probability: s.probability(requests, accepts)}
}

// String returns the layer's name.
func (t *Throttle) String() string { return t.name }

// WrapGate returns the gate.
func (t *Throttle) WrapGate(inner interceptor.Gate) interceptor.Gate {
	return &gate{throttle: t, inner: inner}
}

type gate struct {
	throttle *Throttle
	inner    interceptor.Gate
}

func (g *gate) Admit(ctx context.Context, c *interceptor.Call, w interceptor.Wait) error {
	t := g.throttle
	s, now := t.settings.Load(), int64(c.Now())
	counted := t.all
	if s.perMethod {
		counted = t.methods.Get(c.Method(), now)
	}
	window := counted.window(s)
	if p := s.probability(window.Sum(now)); p > 0 && t.random() < p {
		window.Add(now, false)
		return t.refused
	}
	c.Hold(counted, 0)
	return g.inner.Admit(ctx, c, w)
}

// counts are the requests, and of note among them the accepts, of one method or
// of all.
type counts struct {
	throttle *Throttle
	win      atomic.Pointer[rolling.Window]
	resize   sync.Mutex // Serialises changes of win; nothing is locked under it.
}

func (t *Throttle) newCounts() *counts {
	c := &counts{throttle: t}
	c.win.Store(rolling.New(t.settings.Load().window))
	return c
}

// window returns the window, of the span that s wants.
func (c *counts) window(s *settings) *rolling.Window {
	if w := c.win.Load(); w.Span() == s.window {
		return w
	}
	c.resize.Lock()
	defer c.resize.Unlock()
	s = c.throttle.settings.Load() // Not the caller's, which may be the older one by now.
	w := c.win.Load()
	if w.Span() != s.window {
		w = w.Resized(int64(interceptor.Now()), s.window)
		c.win.Store(w)
	}
	return w
}

// Release counts a call that has ended.
func (c *counts) Release(_ int64, o interceptor.Outcome, err error) {
	if o == interceptor.Ignored || o == interceptor.NotSent {
		return
	}
	s := c.throttle.settings.Load()
	accepted := o == interceptor.OK || !s.reject.Has(status.Code(err))
	c.window(s).Add(int64(interceptor.Now()), accepted)
}

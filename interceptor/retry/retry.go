// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package retry

import (
	"context"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"github.com/belfry-go/belfry/interceptor"
	"github.com/belfry-go/belfry/interceptor/budget"
	"github.com/belfry-go/belfry/internal/attempt"
	"github.com/belfry-go/belfry/internal/check"
	"github.com/belfry-go/belfry/internal/codeset"
	"github.com/belfry-go/belfry/internal/repeat"
)

const (
	// DefaultMaxAttempts is the first attempt and two retries.
	DefaultMaxAttempts = 3
	// DefaultBufferBytes is also gRPC's own limit for what is kept of a stream.
	DefaultBufferBytes = 256 << 10
)

// Config is what is repeated, how often and when. The zero value is the default.
type Config struct {
	// MaxAttempts bounds the attempts of a call, the first included. 1 to 100, where
	// 1 repeats nothing; zero means 3.
	MaxAttempts int
	// Codes are the status codes to repeat. Nil means UNAVAILABLE and
	// RESOURCE_EXHAUSTED; the latter is repeated only if the server says when to
	// come back. If it is empty, and not nil, only what a deadline inside has cut
	// short is repeated.
	Codes []codes.Code
	// DeclaredOnly repeats only methods that are declared idempotent in their
	// .proto file, and those of [WithIdempotent].
	DeclaredOnly bool
	// BufferBytes is how many bytes of sent messages are kept for each stream so
	// that it can be repeated. A stream that sends more is not repeated any more, nor
	// is one with messages whose size cannot be told: other than protocol buffers,
	// byte slices and what has a Size method. 1 to 64 MiB; zero means 256 KiB.
	BufferBytes int
	// Backoff is how long to wait before each retry.
	Backoff Backoff
	// Budget bounds the retries of all calls together. It must be the zero value
	// if [WithBudget] is used.
	Budget budget.Config
}

// settings is a Config that has been checked. It is not changed.
type settings struct {
	given    Config
	max      int
	codes    codeset.Set
	declared bool
	buffer   int
	backoff  Backoff
}

// settings checks c. shared says that the budget is given by WithBudget.
func (c Config) settings(errs *check.Errors, shared bool) *settings {
	c.Codes = slices.Clone(c.Codes) // The caller may change its own.
	s := &settings{given: c, declared: c.DeclaredOnly}
	check.Default(errs, "MaxAttempts", &c.MaxAttempts, check.From(1, 100), DefaultMaxAttempts)
	s.codes = check.Codes(errs, "Codes", c.Codes, codes.Unavailable, codes.ResourceExhausted)
	check.Default(errs, "BufferBytes", &c.BufferBytes, check.From(1, 64<<20), DefaultBufferBytes)
	s.max, s.buffer, s.backoff = c.MaxAttempts, c.BufferBytes, c.Backoff.withDefaults(errs.In("Backoff"))
	repeat.CheckBudget(errs, c.Budget, c.Budget, shared)
	return s
}

// An Attempt is what a [Policy] judges.
type Attempt struct {
	Method string
	Kind   interceptor.Kind
	N      int   // how many attempts this layer has made of the call, this one included
	Err    error // nil if the attempt succeeded; the policy may replace it, see Policy
	Reply  any   // of a unary attempt that succeeded; not to be modified
	// Request is that of a unary call. The policy may replace it, but not modify it:
	// it is the caller's. Further attempts send what it is replaced by.
	Request any
}

// A Policy decides whether an attempt is repeated, in place of Config.Codes. It
// is asked after each attempt of a unary call, successful ones included, and
// after each failure of a stream that can still be repeated; it is not asked
// about refusals of layers inside, methods that may not be repeated, calls that
// are over, and when a server has said no. If it returns true all the other
// conditions hold still. If it returns false, what it has put into a.Err is the
// call's error; nil is no error for a unary call only. It is called concurrently, for
// different calls.
type Policy func(ctx context.Context, a *Attempt) bool

// An Option is what cannot be said in a Config.
type Option func(*options)

type options struct {
	errs       *check.Errors
	name       string
	budget     *budget.Budget
	shared     bool // WithBudget was used.
	idempotent func(method string) bool
	policy     Policy
}

// WithName names the layer in refusals, metrics and the stack's String. The
// default is "retry"; it must not be empty.
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
// idempotent come on top. f is called concurrently, and once or more for each call.
func WithIdempotent(f func(method string) bool) Option {
	return func(o *options) {
		o.errs.NotNil(f == nil, "WithIdempotent", "a function")
		o.idempotent = f
	}
}

// WithPolicy lets p decide instead of Config.Codes.
func WithPolicy(p Policy) Option {
	return func(o *options) {
		o.errs.NotNil(p == nil, "WithPolicy", "a function")
		o.policy = p
	}
}

// A Layer repeats calls; see the package's documentation. It is an
// [interceptor.Layer].
type Layer struct {
	// Set by New and not changed.
	name       string
	exhausted  *interceptor.Refusal
	cancelled  *interceptor.Refusal
	budget     *budget.Budget
	shared     bool // The budget was given.
	idempotent func(method string) bool
	policy     Policy

	set atomic.Pointer[settings]
	// mu serialises Update; the budget's own mutex is locked under it.
	mu sync.Mutex
}

// New returns a layer. An error is a [*interceptor.ConfigError], or several joined.
func New(c Config, opts ...Option) (*Layer, error) {
	errs := check.Of("retry")
	o := options{errs: errs, name: "retry"}
	for _, opt := range opts {
		opt(&o)
	}
	errs.Name(o.name)
	s := c.settings(errs, o.shared)
	if err := errs.Err(); err != nil {
		return nil, err
	}
	l := &Layer{name: o.name, budget: o.budget, shared: o.shared, idempotent: o.idempotent, policy: o.policy}
	if !l.shared {
		var err error
		if l.budget, err = budget.New(c.Budget); err != nil {
			return nil, err
		}
	}
	l.exhausted = interceptor.Refuse(l.name, interceptor.ReasonBudget, "the budget for further attempts is spent")
	l.cancelled = interceptor.Refuse(l.name, interceptor.ReasonCancelled, "the caller gave up before the next attempt")
	l.set.Store(s)
	return l, nil
}

// Update changes the configuration while calls run: attempts that fail from now
// on are judged by the new one. The budget keeps its balance. On an error nothing
// has changed.
func (l *Layer) Update(c Config) error {
	errs := check.Of("retry")
	s := c.settings(errs, l.shared)
	if err := errs.Err(); err != nil {
		return err
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if !l.shared {
		if err := l.budget.Update(c.Budget); err != nil {
			return err
		}
	}
	l.set.Store(s)
	return nil
}

// Config returns the configuration as it was given to New or Update.
func (l *Layer) Config() Config {
	c := l.set.Load().given
	c.Codes = slices.Clone(c.Codes)
	return c
}

// Budget returns the budget that the layer spends.
func (l *Layer) Budget() *budget.Budget { return l.budget }

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

// WrapCall returns the call path that repeats.
func (l *Layer) WrapCall(next interceptor.Next, inner interceptor.Gate) interceptor.Next {
	return func(ctx context.Context, c *interceptor.Call) error {
		if c.Balanced() {
			ctx, _ = attempt.WithTried(ctx)
		}
		if c.Kind() != interceptor.Unary {
			return l.open(ctx, c, next, inner)
		}
		origin := c.Origin()
		c.KeepTrailer()
		err := next(ctx, c)
		if err == nil && l.policy == nil {
			return nil
		}
		return l.repeat(ctx, c, origin, next, inner, err)
	}
}

// repeat goes on with a unary call after its first attempt.
func (l *Layer) repeat(ctx context.Context, c *interceptor.Call, origin interceptor.Origin, next interceptor.Next, inner interceptor.Gate, err error) error {
	s := series{layer: l, call: c, origin: origin, next: next, inner: inner, made: 1, request: c.Request()}
	last := c
	for {
		f, ferr, again := s.step(ctx, last.Reply(), err, last.Trailer())
		if !again {
			err = ferr
			break
		}
		last, err = f, ferr
	}
	if last != c {
		c.Adopt(last)
	}
	return err
}

// series is a call that is being repeated.
type series struct {
	layer   *Layer
	call    *interceptor.Call
	origin  interceptor.Origin
	next    interceptor.Next
	inner   interceptor.Gate
	made    int // Attempts made.
	delays  delays
	request any // What further attempts of a unary call send.
}

// step judges an attempt that ended with err, and repeats it if it should be: f
// is the further attempt, and err how it ended; for a stream, whether it could be
// opened. If again is false, err is the call's.
func (s *series) step(ctx context.Context, reply any, last error, trailer metadata.MD) (f *interceptor.Call, err error, again bool) {
	set := s.layer.set.Load()
	delay, verdict, ok := s.judge(ctx, set, reply, last, trailer)
	if !ok {
		return nil, verdict, false
	}
	now := interceptor.Now()
	if t, ok := ctx.Deadline(); ok && now.Add(delay) >= interceptor.InstantOf(t) {
		return nil, last, false
	}
	b, o := s.layer.budget, s.call.Observer()
	if !b.Withdraw(now) {
		o.Budget(s.layer.name, b.Balance())
		if last == nil {
			return nil, nil, false
		}
		return nil, s.layer.exhausted.Because(last, true), false
	}
	o.Budget(s.layer.name, b.Balance())
	sent := false
	defer func() {
		if !sent {
			b.Refund(now)
			o.Budget(s.layer.name, b.Balance())
		}
	}()
	if delay > 0 && interceptor.Forever.Sleep(ctx, now.Add(delay)) != nil {
		if last == nil || ctx.Err() != context.Canceled {
			return nil, last, false
		}
		return nil, s.layer.cancelled.Because(last, true), false
	}
	f = s.origin.Fork()
	if s.inner.Admit(ctx, f, interceptor.None) != nil {
		return nil, last, false // The stack has told the observer.
	}
	s.made++
	if f.Kind() == interceptor.Unary {
		f.SetRequest(s.request)
		f.KeepTrailer()
	}
	sent = true
	err = s.next(repeat.WithPrevious(ctx, f.Attempt()), f)
	if r, ok := interceptor.AsRefusal(err); ok && r.NotSent() {
		sent = false
		return nil, last, false
	}
	return f, err, true
}

// judge decides whether an attempt should be repeated, and after which delay. If
// not, err is the call's.
func (s *series) judge(ctx context.Context, set *settings, reply any, last error, trailer metadata.MD) (delay time.Duration, err error, ok bool) {
	if ctx.Err() != nil || s.made >= set.max && (last != nil && s.layer.policy == nil) {
		return 0, last, false
	}
	if r, ok := interceptor.AsRefusal(last); ok && (r.NotSent() || r.Reason != interceptor.ReasonDeadline) {
		return 0, last, false
	}
	var wish repeat.Wish
	if last != nil {
		if wish = repeat.WishOf(last, trailer); wish.Stop {
			return 0, last, false
		}
	}
	if !s.layer.mayRepeat(set, s.call.Method()) {
		return 0, last, false
	}
	if p := s.layer.policy; p != nil {
		a := &Attempt{Method: s.call.Method(), Kind: s.call.Kind(), N: s.made, Err: last, Request: s.request}
		if last == nil {
			a.Reply = reply
		}
		again := p(ctx, a)
		s.request = a.Request
		if !again {
			if a.Err == nil && s.call.Kind() != interceptor.Unary {
				a.Err = last
			}
			return 0, a.Err, false
		}
		if s.made >= set.max {
			return 0, last, false
		}
	} else if !set.repeats(last, wish) {
		return 0, last, false
	}
	if wish.Exact {
		s.delays.reset()
		return wish.After, nil, true
	}
	return max(s.delays.next(&set.backoff), wish.After), nil, true
}

// repeats reports whether an error is one to repeat by its code.
func (set *settings) repeats(err error, wish repeat.Wish) bool {
	if _, deadline := interceptor.AsRefusal(err); deadline {
		return true // Of an attempt, cut short by a layer inside; see judge.
	}
	code := status.Code(err)
	return set.codes.Has(code) && (code != codes.ResourceExhausted || wish.Asked)
}

// mayRepeat reports whether the method may be repeated.
func (l *Layer) mayRepeat(set *settings, method string) bool {
	return repeat.May(set.declared, l.idempotent, method)
}

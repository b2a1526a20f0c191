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
	"github.com/belfry-go/belfry/internal/further"
	"github.com/belfry-go/belfry/internal/replay"
)

const (
	// DefaultMaxAttempts is the first attempt and two retries.
	DefaultMaxAttempts = 3
	// DefaultBufferBytes is also gRPC's own limit for what is kept of a stream.
	DefaultBufferBytes = 256 << 10
	// DefaultTotalBufferBytes is enough for 64 streams that use DefaultBufferBytes.
	DefaultTotalBufferBytes = 16 << 20
	// DefaultMaxServerDelay is longer than a short overload lasts, and shorter than
	// callers and limits can afford to wait.
	DefaultMaxServerDelay = 10 * time.Second
)

// Config says what is repeated, how often and when. The zero value is the default.
type Config struct {
	// MaxAttempts bounds the attempts of a call, including the first. From 1, which
	// repeats nothing, to 100; zero means 3. Attempts that were not sent because there
	// was no connection are counted separately, up to the same number. An attempt that a
	// layer inside refused does not count.
	MaxAttempts int
	// Codes are the status codes to repeat. Nil means UNAVAILABLE and
	// RESOURCE_EXHAUSTED; the latter is repeated only if the server says when to come
	// back. If it is empty and not nil, only an attempt that a deadline inside cut short
	// is repeated.
	Codes []codes.Code
	// DeclaredOnly repeats only methods that are declared idempotent in their
	// .proto file, and those of [WithIdempotent].
	DeclaredOnly bool
	// BufferBytes is how many bytes of sent messages are kept for each stream so that it
	// can be repeated, encoded and with the 5 bytes that gRPC adds to each. A stream that
	// sends more is no longer repeated. A call can lower it by
	// grpc.MaxRetryRPCBufferSize. From 1 to 64 MiB; zero means 256 KiB.
	BufferBytes int
	// TotalBufferBytes is how many bytes the streams of the layer keep together. A stream
	// that sends more when they are used up is no longer repeated. From 1 to 1 GiB; zero
	// means 16 MiB.
	TotalBufferBytes int
	// Backoff is how long to wait before each retry.
	Backoff Backoff
	// MaxServerDelay is the longest delay that a server may ask for, by RetryInfo or
	// pushback. If it asks for more, the call ends at once with its error. Otherwise a
	// call without a deadline would wait as long as the server likes, and hold the
	// permits of layers outside. Negative is an error; zero means 10 s, or Backoff.Max
	// if that is longer.
	MaxServerDelay time.Duration
	// Budget bounds the retries of all calls together. It must be the zero value
	// if [WithBudget] is used.
	Budget budget.Config
}

// settings is a valid Config. It is immutable.
type settings struct {
	given    Config
	max      int
	codes    codeset.Set
	declared bool
	buffer   int
	total    int
	backoff  Backoff
	longest  time.Duration // That a server may ask for.
}

// settings checks c.
func (c Config) settings(errs *check.Errors, o *further.Options) *settings {
	c.Codes = slices.Clone(c.Codes) // The caller may change its own.
	s := &settings{given: c, declared: c.DeclaredOnly}
	check.Default(errs, "MaxAttempts", &c.MaxAttempts, check.From(1, 100), DefaultMaxAttempts)
	s.codes = check.Codes(errs, "Codes", c.Codes, codes.Unavailable, codes.ResourceExhausted)
	check.Default(errs, "BufferBytes", &c.BufferBytes, check.From(1, 64<<20), DefaultBufferBytes)
	check.Default(errs, "TotalBufferBytes", &c.TotalBufferBytes, check.From(1, 1<<30), DefaultTotalBufferBytes)
	s.total = c.TotalBufferBytes
	s.max, s.buffer, s.backoff = c.MaxAttempts, c.BufferBytes, c.Backoff.withDefaults(errs.In("Backoff"))
	check.DefaultText(errs, "MaxServerDelay", &c.MaxServerDelay, check.Positive, max(DefaultMaxServerDelay, s.backoff.Max), "10s, or Backoff.Max if that is longer")
	s.longest = c.MaxServerDelay
	o.CheckBudget(errs, c.Budget, c.Budget)
	return s
}

// An Attempt is what a [Policy] judges.
type Attempt struct {
	Method string
	Kind   interceptor.Kind
	N      int   // how many attempts this layer has made of the call, this one included
	Err    error // nil if the attempt succeeded; the policy may replace it, see [Policy]
	Reply  any   // of a unary attempt that succeeded; not to be modified
	// Request is that of a unary call. The policy may replace it for further attempts,
	// but must not modify it, because it belongs to the caller.
	Request any
}

// A Policy decides whether an attempt is repeated, instead of Config.Codes. It is asked
// after each attempt of a unary call, even if that succeeded, and after each failure of a
// stream that can still be repeated. It is not asked about refusals of layers inside,
// methods that may not be repeated, calls that are over, or if the server asked not to
// repeat. If it returns true, all other conditions still apply. If it returns false,
// a.Err is the call's error; setting it to nil makes only a unary call succeed. It is
// called concurrently, for different calls.
type Policy func(ctx context.Context, a *Attempt) bool

// An Option sets what is not plain data.
type Option func(*options)

type options struct {
	further.Options
	errs   *check.Errors
	policy Policy
}

// WithName names the layer in refusals, metrics and the stack's String. The
// default is "retry"; it must not be empty.
func WithName(name string) Option { return func(o *options) { o.Name = name } }

// WithBudget makes the layer spend b, which it may share with other layers and
// stacks. By default it has a budget of its own.
func WithBudget(b *budget.Budget) Option {
	return func(o *options) { o.SetBudget(o.errs, b) }
}

// WithIdempotent restricts the layer to the methods, such as "/pkg.Service/Get", for
// which f returns true, and with Config.DeclaredOnly to those that are declared
// idempotent as well. An attempt that was not sent is repeated whatever f returns. f is
// called concurrently, once or more for each call.
func WithIdempotent(f func(method string) bool) Option {
	return func(o *options) { o.SetIdempotent(o.errs, f) }
}

// WithPolicy lets p decide instead of Config.Codes.
func WithPolicy(p Policy) Option {
	return func(o *options) {
		o.errs.NotNil(p == nil, "WithPolicy", "a function")
		o.policy = p
	}
}

// A Layer repeats calls that failed.
type Layer struct {
	// Set by New and not changed.
	maker  *further.Maker
	policy Policy

	kept replay.Total // What streams keep.

	set atomic.Pointer[settings]
	// mu serialises Update. The budget's mutex is locked under it.
	mu sync.Mutex
}

// New returns a layer. An error is a [*interceptor.ConfigError], or several joined.
func New(c Config, opts ...Option) (*Layer, error) {
	o := options{errs: check.Of("retry")}
	o.Name = "retry"
	for _, opt := range opts {
		opt(&o)
	}
	o.errs.Name(o.Name)
	s := c.settings(o.errs, &o.Options)
	if err := o.errs.Err(); err != nil {
		return nil, err
	}
	maker, err := further.NewMaker(o.Options, c.Budget)
	if err != nil {
		return nil, err
	}
	l := &Layer{maker: maker, policy: o.policy}
	l.set.Store(s)
	return l, nil
}

// NewLayer returns a layer of c, as [New] does.
func (c Config) NewLayer() (interceptor.Layer, error) { return New(c) }

// NewLayer returns l itself.
func (l *Layer) NewLayer() (interceptor.Layer, error) { return l, nil }

// Update changes the configuration while calls run. Attempts that fail later are judged
// by the new one. The budget keeps its balance. After an error nothing has changed.
func (l *Layer) Update(c Config) error {
	errs := check.Of("retry")
	s := c.settings(errs, &l.maker.Options)
	if err := errs.Err(); err != nil {
		return err
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if err := l.maker.Update(c.Budget); err != nil {
		return err
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
func (l *Layer) Budget() *budget.Budget { return l.maker.Budget }

// String returns the layer's name.
func (l *Layer) String() string { return l.maker.Name }

// Traits says that the layer retries.
func (*Layer) Traits() interceptor.Traits { return interceptor.Retries }

// WrapGate returns a gate that counts calls for the budget.
func (l *Layer) WrapGate(inner interceptor.Gate) interceptor.Gate { return l.maker.Gate(inner) }

// WrapCall returns the call path that repeats.
func (l *Layer) WrapCall(next interceptor.Next, again interceptor.Again) interceptor.Next {
	return func(ctx context.Context, c *interceptor.Call) error {
		in := c.Internals()
		if in.Balanced() {
			ctx, _ = attempt.WithTried(ctx)
		}
		if c.Kind() != interceptor.Unary {
			return l.open(ctx, c, next, again)
		}
		origin := c.Origin()
		in.WantTrailer()
		err := next(ctx, c)
		if err == nil && l.policy == nil {
			return nil
		}
		return l.repeat(ctx, l.maker.Of(c, origin, again), next, err)
	}
}

// repeat continues a unary call after its first attempt.
func (l *Layer) repeat(ctx context.Context, of further.Call, next interceptor.Next, err error) error {
	s := &series{Call: of, layer: l, next: next, request: of.Request()}
	first := s.first(ctx, err)
	last := &first
	for {
		again, err := s.step(ctx, last)
		if again == nil {
			if last.Call != of.Call {
				of.Adopt(last.Call)
			}
			return err
		}
		last = again
	}
}

// series is a call with its attempts.
type series struct {
	further.Call
	layer  *Layer
	next   interceptor.Next
	made   int // Attempts that were sent,
	unsent int // and that were not.
	delays delays
	// request is what further attempts of a unary call send.
	request any
}

// failure is an attempt that has ended: a failure, or a success that a policy judges.
type failure struct {
	further.Attempt
	trailer metadata.MD
}

// first counts the first attempt, which ended with err. For a stream err says whether it
// could be opened.
func (s *series) first(ctx context.Context, err error) failure {
	c := s.Call.Call
	sent := c.Internals().Outcome(ctx, err).Sent()
	return s.count(further.Attempt{Call: c, Err: err, Sent: sent})
}

func (s *series) count(a further.Attempt) failure {
	if a.Sent {
		s.made++
	} else {
		s.unsent++
	}
	return failure{a, a.Call.Internals().Trailer()}
}

// step judges an attempt and repeats it if that is right. again is the further attempt,
// which for a stream may be open. If again is nil, err is the call's error.
func (s *series) step(ctx context.Context, last *failure) (again *failure, err error) {
	v := s.judge(ctx, last)
	if !v.repeat {
		return nil, v.err
	}
	if t, ok := ctx.Deadline(); ok && interceptor.Now().Add(v.after) >= interceptor.InstantOf(t) {
		return nil, last.Err
	}
	a, refused := s.Make(ctx, further.Plan{Delay: v.after, Unsent: s.unsent, Run: s.run})
	if refused != nil {
		return nil, s.Refused(ctx, refused, last.Err)
	}
	f := s.count(a)
	return &f, nil
}

// run carries out a further attempt.
func (s *series) run(ctx context.Context, a *interceptor.Call) error {
	if a.Kind() == interceptor.Unary {
		a.SetRequest(s.request)
	}
	return s.next(ctx, a)
}

// A verdict says what follows an attempt.
type verdict struct {
	repeat bool
	after  time.Duration // How long to wait before it is repeated.
	err    error         // The call's error if it is not repeated.
}

// judge decides whether an attempt is repeated.
func (s *series) judge(ctx context.Context, last *failure) verdict {
	l, set, stop := s.layer, s.layer.set.Load(), verdict{err: last.Err}
	spent := s.made >= set.max || s.unsent >= set.max
	if ctx.Err() != nil || spent && last.Err != nil && l.policy == nil {
		return stop
	}
	if r, ok := interceptor.AsRefusal(last.Err); ok && (r.NotSent() || r.Reason != interceptor.ReasonDeadline) {
		return stop
	}
	var wish attempt.Wish
	if last.Err != nil {
		if wish = attempt.WishOf(last.Err, last.trailer); wish.Stop || wish.After > set.longest {
			return stop
		}
	}
	if last.Sent && !s.Maker.May(set.declared, s.Method()) {
		return stop
	}
	if l.policy != nil {
		if again, err := s.ask(ctx, last); !again {
			return verdict{err: err}
		}
	} else if !set.repeats(last.Err, wish) {
		return stop
	}
	switch {
	case spent:
		return stop
	case wish.Exact:
		s.delays.reset()
		return verdict{repeat: true, after: wish.After}
	}
	return verdict{repeat: true, after: max(s.delays.next(&set.backoff), wish.After)}
}

// ask asks the policy about an attempt. If that is not repeated, err is the call's error.
func (s *series) ask(ctx context.Context, last *failure) (again bool, err error) {
	a := &Attempt{Method: s.Method(), Kind: s.Kind(), N: s.made + s.unsent, Err: last.Err, Request: s.request}
	if last.Err == nil {
		a.Reply = last.Call.Reply()
	}
	again = s.layer.policy(ctx, a)
	s.request = a.Request
	if a.Err == nil && s.Kind() != interceptor.Unary {
		a.Err = last.Err
	}
	return again, a.Err
}

// repeats reports whether an attempt that failed with err is repeated.
func (set *settings) repeats(err error, wish attempt.Wish) bool {
	if _, deadline := interceptor.AsRefusal(err); deadline {
		return true // A layer inside cut the attempt short, see judge.
	}
	code := status.Code(err)
	return set.codes.Has(code) && (code != codes.ResourceExhausted || wish.Asked)
}

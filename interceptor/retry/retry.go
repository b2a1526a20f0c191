// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package retry

import (
	"cmp"
	"context"
	"fmt"
	"iter"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"google.golang.org/grpc"
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
	// MaxAttempts bounds the attempts of a call, including the first, unless the call
	// says otherwise (attempts.MaxRetry). From 1, which repeats nothing, to 100; zero
	// means 3. Attempts that were not sent because there was no connection are counted
	// separately, up to the same number. An attempt that a layer inside refused does not
	// count.
	MaxAttempts int
	// Codes are the status codes to repeat. Nil means UNAVAILABLE, and RESOURCE_EXHAUSTED
	// if the server says when to come back; in a list it means all RESOURCE_EXHAUSTED. If
	// the list is empty and not nil, only an attempt that a deadline inside cut short is
	// repeated.
	Codes []codes.Code
	// Methods names methods that may be carried out more than once, beside those that are
	// declared idempotent: "/pkg.Service/Method", or "/pkg.Service/" for all methods of a
	// service. The package documentation has the other ways to say so.
	Methods []string
	// AllMethods says that every method may be carried out more than once, writes
	// included. Then Methods must be empty.
	AllMethods bool
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
	// pushback, or a policy by Decision.After. If it asks for more, the call ends at once
	// with its error. Otherwise a call without a deadline would wait as long as the
	// server likes, and hold the permits of layers outside. Negative is an error; zero
	// means 10 s, or Backoff.Max if that is longer.
	MaxServerDelay time.Duration
	// Budget bounds the retries of all calls together. It must be the zero value
	// if [WithBudget] is used.
	Budget budget.Config
}

// settings is a valid Config. It is immutable.
type settings struct {
	given   Config
	max     int
	codes   codeset.Set
	methods further.Methods
	buffer  int
	total   int
	backoff Backoff
	longest time.Duration // That a server may ask for.
}

// settings checks c.
func (c Config) settings(errs *check.Errors, o *further.Options) *settings {
	c.Codes, c.Methods = slices.Clone(c.Codes), slices.Clone(c.Methods) // The caller may change its own.
	s := &settings{given: c, methods: further.CheckMethods(errs, c.AllMethods, c.Methods)}
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
	Method  string
	Kind    interceptor.Kind
	N       int           // how many attempts this layer has made of the call, this one included
	Elapsed time.Duration // since the call was admitted
	Err     error         // nil if the attempt succeeded; the policy may replace it, see [Policy]
	// Outcome is what became of the attempt. If there was no connection it is NotConnected,
	// and NotSent if the client could not send the request, for example because it is too
	// large. In neither case the server knows of it (Outcome.Sent).
	Outcome interceptor.Outcome
	// Header and Trailer are what the server sent. Both are empty if it did not answer: the
	// attempt was not sent, or the connection or the stream was reset first.
	Header, Trailer metadata.MD
	Reply           any // of a unary attempt that succeeded; not to be modified
	// Request is that of a unary call. The policy may replace it for further attempts,
	// but must not modify it, because it belongs to the caller.
	Request any
	// Default is what the layer would do without the policy, by Config.Codes and by what
	// the server says about when to come back.
	Default Decision
}

// A Decision says whether an attempt is repeated, when, and on which grounds. The zero
// Decision does not repeat it.
type Decision struct {
	Repeat bool
	// After is the least time to wait. The wait is the back-off, or After and up to half as
	// much again so that clients do not come back together, whichever is longer. If it is
	// more than Config.MaxServerDelay, or reaches beyond the call's deadline, the call ends
	// at once with its error.
	After time.Duration
	// Exact replaces back-off and jitter by After, which may be zero.
	Exact bool
	// Safe says that the attempt may be repeated whatever its method, for example because
	// the server has refused the stream and so not carried it out.
	Safe bool
	// Reason is for observers and reports, which count by it, so there should be few. Empty
	// means the name of the status code.
	Reason string
}

// A Policy decides whether an attempt is repeated. It is asked after each attempt of a
// unary call, even if that succeeded, and after each failure of a stream that can still be
// repeated. It is not asked about refusals of layers inside, calls that are over, or if the
// server asked not to repeat. A decision to repeat is subject to the number of attempts,
// the budget, the method and the call's deadline. The server's pushback is obeyed, and its
// RetryInfo is the least to wait unless Exact is set. If no further attempt is made, by
// decision or because there may be none, a.Err is the call's error; setting it to nil makes
// only a unary call succeed. A policy is called concurrently, for different calls.
type Policy func(ctx context.Context, a *Attempt) Decision

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

// WithIdempotent adds the methods, such as "/pkg.Service/Get", for which f returns true,
// to those that Config.Methods names and those that are declared idempotent. f is called
// concurrently, at most once for each attempt.
func WithIdempotent(f func(method string) bool) Option {
	return func(o *options) { o.SetIdempotent(o.errs, f) }
}

// WithPolicy lets p decide. What Config.Codes says is p's default.
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
	check.Options(o.errs, &o, opts)
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
	c.Codes, c.Methods = slices.Clone(c.Codes), slices.Clone(c.Methods)
	return c
}

// Readings yields the balance of the budget.
func (l *Layer) Readings() iter.Seq[interceptor.Reading] { return l.maker.Readings() }

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
		in.MayRepeat()
		if c.Kind() != interceptor.Unary {
			return l.open(ctx, c, next, again)
		}
		origin := c.Origin()
		in.WantTrailer()
		header := l.wantHeader(c)
		err := next(ctx, c)
		if err == nil && l.policy == nil {
			return nil
		}
		return l.repeat(ctx, further.Call{Call: c, Maker: l.maker, Origin: origin, Again: again}, next, header, err)
	}
}

// wantHeader asks for the header of a unary attempt, if the layer has a policy.
func (l *Layer) wantHeader(c *interceptor.Call) *metadata.MD {
	if l.policy == nil {
		return nil
	}
	header := new(metadata.MD)
	c.AddOptions(grpc.Header(header))
	return header
}

// repeat continues a unary call after its first attempt.
func (l *Layer) repeat(ctx context.Context, of further.Call, next interceptor.Next, header *metadata.MD, err error) error {
	s := &series{Call: of, layer: l, next: next, request: of.Request(), header: header}
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
	// Of a unary call: what further attempts send, and where the header of the current
	// attempt is, nil if nobody wants it.
	request any
	header  *metadata.MD
}

// failure is an attempt that has ended: a failure, or a success that a policy judges.
type failure struct {
	further.Attempt
	header, trailer metadata.MD // header is set only if there is a policy.
}

// first counts the first attempt, which ended with err. For a stream err says whether it
// could be opened.
func (s *series) first(ctx context.Context, err error) failure {
	c := s.Call.Call
	return s.count(further.Attempt{Call: c, Err: err, Outcome: c.Internals().Outcome(ctx, err)})
}

func (s *series) count(a further.Attempt) failure {
	if a.Outcome.Sent() {
		s.made++
	} else {
		s.unsent++
	}
	f := failure{Attempt: a, trailer: a.Call.Internals().Trailer()}
	if s.header != nil {
		f.header = *s.header
	}
	return f
}

// step judges an attempt and repeats it if that is right. again is the further attempt,
// which for a stream may be open. If again is nil, err is the call's error.
func (s *series) step(ctx context.Context, last *failure) (again *failure, err error) {
	v := s.judge(ctx, last)
	if !v.repeat {
		return nil, v.err
	}
	if t, ok := ctx.Deadline(); ok && interceptor.Now().Add(v.after) >= interceptor.InstantOf(t) {
		return nil, notRepeated(last.Err, "the call's deadline passes before the delay of %v", v.after)
	}
	a, refused := s.Make(ctx, further.Plan{Delay: v.after, After: last.Err, Reason: v.reason, Run: s.run})
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
		s.header = s.layer.wantHeader(a)
	}
	return s.next(ctx, a)
}

// A verdict says what follows an attempt.
type verdict struct {
	repeat bool
	after  time.Duration // How long to wait before it is repeated,
	reason string        // and why it is.
	err    error         // The call's error if it is not repeated.
}

// attempts returns the most attempts of a call.
func (set *settings) attempts(c *interceptor.Call) int {
	return cmp.Or(c.Internals().PerCall().MaxRetry, set.max)
}

// judge decides whether an attempt is repeated.
func (s *series) judge(ctx context.Context, last *failure) verdict {
	l, set, stop := s.layer, s.layer.set.Load(), verdict{err: last.Err}
	most := set.attempts(s.Call.Call)
	spent := s.made >= most || s.unsent >= most
	if ctx.Err() != nil || spent && l.policy == nil {
		return stop
	}
	if r, ok := interceptor.AsRefusal(last.Err); ok && (r.NotSent() || r.Reason != interceptor.ReasonDeadline) {
		return stop
	}
	var wish attempt.Wish
	if last.Err != nil {
		wish = attempt.WishOf(last.Err, last.trailer)
		switch {
		case wish.Stop:
			return stop
		case wish.After > set.longest:
			if !spent && set.decide(last, wish).Repeat {
				stop.err = tooLong(last.Err, wish.After, set)
			}
			return stop
		}
	}
	d := set.decide(last, wish)
	if l.policy != nil {
		d = s.ask(ctx, last, d)
		stop.err = last.Err
		switch {
		case wish.Exact:
			d.After, d.Exact = wish.After, true
		case !d.Exact:
			d.After = max(d.After, wish.After)
		}
	}
	if d.Reason == "" {
		d.Reason = status.Code(last.Err).String()
	}
	switch {
	case !d.Repeat || spent:
		return stop
	case d.After > set.longest:
		return verdict{err: tooLong(last.Err, d.After, set)}
	case last.Outcome.Sent() && !d.Safe && !s.Maker.May(&set.methods, s.Call.Call):
		return verdict{err: s.NotIdempotent(last.Err)}
	case d.Exact:
		s.delays.reset()
		return verdict{repeat: true, after: d.After, reason: d.Reason}
	}
	return verdict{repeat: true, after: s.delays.atLeast(&set.backoff, d.After), reason: d.Reason}
}

func tooLong(err error, delay time.Duration, set *settings) error {
	return notRepeated(err, "the delay that is asked for, %v, is more than MaxServerDelay, %v", delay, set.longest)
}

// notRepeated returns err, of an attempt that is not repeated, with the reason in its text.
// Nil stays nil.
func notRepeated(err error, format string, args ...any) error {
	if err == nil {
		return nil
	}
	return &unrepeated{err, fmt.Sprintf(format, args...)}
}

// unrepeated is an error with a reason. It has the status of the attempt.
type unrepeated struct {
	err error
	why string
}

func (e *unrepeated) Error() string              { return fmt.Sprintf("%v (not repeated: %s)", e.err, e.why) }
func (e *unrepeated) Unwrap() error              { return e.err }
func (e *unrepeated) GRPCStatus() *status.Status { return status.Convert(e.err) }

// ask asks the policy about an attempt, whose error it may replace.
func (s *series) ask(ctx context.Context, last *failure, def Decision) Decision {
	a := &Attempt{
		Method: s.Method(), Kind: s.Kind(), N: s.made + s.unsent, Outcome: last.Outcome,
		Elapsed: interceptor.Now().Sub(s.Internals().AdmittedAt()),
		Err:     last.Err, Header: last.header, Trailer: last.trailer, Request: s.request, Default: def,
	}
	if last.Err == nil {
		a.Reply = last.Call.Reply()
	}
	d := s.layer.policy(ctx, a)
	s.request = a.Request
	if a.Err != nil || s.Kind() == interceptor.Unary {
		last.Err = a.Err
	}
	return d
}

// decide returns what happens without a policy.
func (set *settings) decide(last *failure, wish attempt.Wish) Decision {
	code := status.Code(last.Err)
	d := Decision{After: wish.After, Exact: wish.Exact, Reason: code.String()}
	if _, deadline := interceptor.AsRefusal(last.Err); deadline {
		d.Repeat = true // A layer inside cut the attempt short, see judge.
		return d
	}
	d.Repeat = set.codes.Has(code) && (code != codes.ResourceExhausted || set.given.Codes != nil || wish.Asked)
	if d.Repeat && !attempt.ServerSpoke(last.trailer) && (attempt.IsSendError(last.Err) || attempt.IsReceiveError(last.Err)) {
		d.Repeat = false // A message that is too large will be too large again.
	}
	return d
}

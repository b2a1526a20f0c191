// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package hedge

import (
	"cmp"
	"context"
	"iter"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"github.com/belfry-go/belfry/interceptor"
	"github.com/belfry-go/belfry/interceptor/budget"
	"github.com/belfry-go/belfry/internal/check"
	"github.com/belfry-go/belfry/internal/codeset"
	"github.com/belfry-go/belfry/internal/further"
	"github.com/belfry-go/belfry/internal/keyed"
	"github.com/belfry-go/belfry/internal/quantile"
	"github.com/belfry-go/belfry/internal/replay"
)

// Defaults of [Config].
const (
	DefaultMaxExtraLoad  = 0.05
	DefaultMaxAttempts   = 2
	DefaultMinDelay      = time.Millisecond
	DefaultMinDataPoints = 10
	DefaultWindow        = time.Minute
	DefaultBufferBytes   = 256 << 10
	// DefaultTotalBufferBytes is enough for 64 streams that use DefaultBufferBytes.
	DefaultTotalBufferBytes = 16 << 20
	// DefaultMaxServerDelay is more than a call can gain from an extra attempt.
	DefaultMaxServerDelay = 10 * time.Second
	// DefaultMinPerSecond is the reserve of the layer's own budget: one extra attempt a
	// second, so that a client with few calls can hedge some, and one with many can
	// hedge those that a stall catches at once.
	DefaultMinPerSecond = 1

	// None as Config.Delay makes extra attempts at once.
	None = check.None

	// Parts of MaxExtraLoad: what the percentile uses, and the lower percentile, and what
	// the budget has besides MinPerSecond and its reserve of ten seconds.
	steady   = 0.8
	bimodal  = 1.2
	budgeted = 0.95
)

// Config says when extra attempts are made, and how many. The zero value is the default:
// a second attempt for the slowest 4 % of calls, for at most 4.75 % of them plus one a
// second.
type Config struct {
	// MaxExtraLoad is the share of calls that may get an extra attempt. It sets the
	// budget to 0.95 times this share, beside its MinPerSecond, and the delay to the
	// latency that four fifths of this share exceed. The last fifth is in reserve for a
	// server that stalls: a percentile that uses the whole budget in steady state would
	// leave nothing for that. If calls are either fast or slow, it is twice the latency
	// that six fifths of the share exceed, if that is less: so a share of slow calls up
	// to about MaxExtraLoad is hedged. At least 0.000001 and less than 1; zero means
	// 0.05. Delay or Percentile replace its effect on the delay, and Budget that on the
	// budget.
	MaxExtraLoad float64
	// Delay is how long to wait before each extra attempt. None (-1) makes it at once.
	// Zero means a percentile of the recent latencies of the method; any other negative
	// value is an error.
	Delay time.Duration
	// Percentile is that percentile, more than 0 and less than 1: 0.95 hedges the slowest
	// 5 % of calls. Zero means 1 - 0.8·MaxExtraLoad. It must be zero if Delay is set.
	Percentile float64
	// MinDelay is the least delay that a percentile may ask for. Zero means 1 ms;
	// negative is an error.
	MinDelay time.Duration
	// MinDataPoints is how many latencies of a method must be known before a percentile of
	// them is used. Until then its calls are not hedged. Zero means 10; negative is an
	// error.
	MinDataPoints int
	// Window is how long latencies are remembered. 1 s to 1 h; zero means one minute.
	Window time.Duration
	// MaxAttempts bounds the attempts of a call, including the first, unless the call
	// says otherwise (attempts.MaxHedge). From 1, which hedges nothing, to 10; zero means
	// 2. An extra attempt that a layer inside refused does not count.
	MaxAttempts int
	// NonFatal are the codes of failures after which the next attempt is made at once
	// and not after the delay; attempts that run continue. Nil means UNAVAILABLE. Any other
	// status that a server answers with ends the call, and the attempts that still run are
	// cancelled.
	NonFatal []codes.Code
	// Methods names methods that may be carried out more than once, beside those that are
	// declared idempotent: "/pkg.Service/Method", or "/pkg.Service/" for all methods of a
	// service. The package documentation has the other ways to say so.
	Methods []string
	// AllMethods says that every method may be carried out more than once, writes
	// included. Then Methods must be empty.
	AllMethods bool
	// MaxServerDelay is the longest delay before the next attempt that a server may ask
	// for when it fails one, by RetryInfo or pushback. If it asks for more, no further
	// attempt is made. Negative is an error; zero means 10 s.
	MaxServerDelay time.Duration
	// BufferBytes is how many bytes of sent messages are kept for each stream so that it
	// can be hedged, encoded and with the 5 bytes that gRPC adds to each. A stream that
	// sends more before its first response is not hedged. A call can lower it by
	// grpc.MaxRetryRPCBufferSize. From 1 to 64 MiB; zero means 256 KiB.
	BufferBytes int
	// TotalBufferBytes is how many bytes the streams of the layer keep together. A stream
	// that sends more when they are used up is not hedged. From 1 to 1 GiB; zero means
	// 16 MiB.
	TotalBufferBytes int
	// Budget bounds the extra attempts of all calls together. Its Ratio defaults to
	// 0.95·MaxExtraLoad and its MinPerSecond to 1. It must be the zero value if [WithBudget]
	// is used.
	Budget budget.Config
}

// settings is a valid Config. It is immutable.
type settings struct {
	given      Config
	isFixed    bool
	fixed      time.Duration
	percentile float64
	lower      float64 // The delay is at most twice this percentile; 0 if there is none.
	least      time.Duration
	points     int
	window     time.Duration
	max        int
	nonFatal   codeset.Set
	methods    further.Methods
	longest    time.Duration // That a server may ask for.
	buffer     int
	total      int
	budget     budget.Config
}

// settings checks c.
func (c Config) settings(errs *check.Errors, o *further.Options) *settings {
	c.NonFatal, c.Methods = slices.Clone(c.NonFatal), slices.Clone(c.Methods) // The caller may change its own.
	given := c
	// A budget counts in millionths.
	check.Default(errs, "MaxExtraLoad", &c.MaxExtraLoad, check.Below(1e-6, 1), DefaultMaxExtraLoad)
	check.ZeroOrNone(errs, "Delay", c.Delay, check.Positive, "a percentile", "at once")
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
	check.Default(errs, "MaxServerDelay", &c.MaxServerDelay, check.Positive, DefaultMaxServerDelay)
	check.Default(errs, "BufferBytes", &c.BufferBytes, check.From(1, 64<<20), DefaultBufferBytes)
	check.Default(errs, "TotalBufferBytes", &c.TotalBufferBytes, check.From(1, 1<<30), DefaultTotalBufferBytes)
	if c.Budget.Ratio == 0 {
		c.Budget.Ratio = budgeted * c.MaxExtraLoad
	}
	if c.Budget.MinPerSecond == 0 {
		c.Budget.MinPerSecond = DefaultMinPerSecond
	}
	o.CheckBudget(errs, given.Budget, c.Budget)
	lower := 0.0
	if given.Percentile == 0 {
		lower = 1 - bimodal*c.MaxExtraLoad
	}
	return &settings{
		given: given, lower: lower, isFixed: c.Delay != 0, fixed: max(c.Delay, 0), percentile: c.Percentile, least: c.MinDelay, points: c.MinDataPoints, window: c.Window,
		max: c.MaxAttempts, nonFatal: nonFatal, methods: further.CheckMethods(errs, c.AllMethods, c.Methods), longest: c.MaxServerDelay, buffer: c.BufferBytes, total: c.TotalBufferBytes, budget: c.Budget,
	}
}

// An Option sets what is not plain data.
type Option func(*options)

type options struct {
	further.Options
	errs   *check.Errors
	policy Policy
}

// An Attempt is what a [Policy] judges.
type Attempt struct {
	Method string
	N      int // How many attempts the call has made up to this one: 1 for the first.
	// Reply is the reply of a unary attempt, or the first message of a stream. It is nil
	// if the attempt failed, or the stream ended without a message. It must not be changed
	// or kept.
	Reply   any
	Err     error       // Nil if the attempt succeeded.
	Trailer metadata.MD // Nil for a stream that has sent a message, and goes on.
}

// A Policy judges how an attempt ended, before Config.NonFatal does. It is asked once for
// each attempt that was sent, unless the call is decided already. ctx is that of the call.
// It is called concurrently, also for attempts of one call.
type Policy func(ctx context.Context, a *Attempt) Verdict

// A Verdict says what the end of an attempt means for its call.
type Verdict uint8

const (
	// ByCode leaves the decision to Config.NonFatal: a success is an Answer.
	ByCode Verdict = iota
	// Answer ends the call with this attempt, even if it failed. The others are cancelled.
	Answer
	// Wait lets the other attempts continue, and further ones be made after their delay.
	// If none of them is an Answer, the call ends with the last that ended.
	Wait
	// Hedge is Wait, and the next attempt is made at once. It is not made if the server
	// forbids it by a pushback, and made later if the server asks for a delay.
	Hedge
)

// WithPolicy lets p judge attempts, for example to hedge a reply that is incomplete, or
// to take a failure for the answer that it is.
func WithPolicy(p Policy) Option {
	return func(o *options) {
		o.errs.NotNil(p == nil, "WithPolicy", "a function")
		o.policy = p
	}
}

// WithName names the layer in metrics and the stack's String. The
// default is "hedge"; it must not be empty.
func WithName(name string) Option { return func(o *options) { o.Name = name } }

// WithBudget makes the layer spend b, which it may share with other layers and
// stacks. By default it has a budget of its own.
func WithBudget(b *budget.Budget) Option {
	return func(o *options) { o.SetBudget(o.errs, b) }
}

// WithIdempotent adds the methods, such as "/pkg.Service/Get", for which f returns true,
// to those that Config.Methods names and those that are declared idempotent. f is called
// concurrently, at most once for each call.
func WithIdempotent(f func(method string) bool) Option {
	return func(o *options) { o.SetIdempotent(o.errs, f) }
}

// A Layer hedges calls that take long.
type Layer struct {
	// Set by New and not changed.
	maker  *further.Maker
	policy Policy // Nil if there is none.
	// seen has the latencies of each method that was called lately, of unary calls and of
	// streams apart.
	seen [2]*quantile.Methods
	odds *keyed.Map[*odds] // Of each method of which extra attempts were due lately.

	kept replay.Total // What streams keep.
	set  atomic.Pointer[settings]
	// mu serialises Update; the mutexes of the budget, of seen and of its windows are
	// locked under it.
	mu sync.Mutex
}

// New returns a layer that knows no latencies yet. An error is a
// [*interceptor.ConfigError], or several joined.
func New(c Config, opts ...Option) (*Layer, error) {
	o := options{errs: check.Of("hedge")}
	o.Name = "hedge"
	check.Options(o.errs, &o, opts)
	o.errs.Name(o.Name)
	s := c.settings(o.errs, &o.Options)
	if err := o.errs.Err(); err != nil {
		return nil, err
	}
	maker, err := further.NewMaker(o.Options, s.budget)
	if err != nil {
		return nil, err
	}
	l := &Layer{maker: maker, policy: o.policy, odds: newOdds()}
	l.set.Store(s)
	for i := range l.seen {
		l.seen[i] = quantile.NewMethods(s.window)
	}
	return l, nil
}

// NewLayer returns a layer of c, as [New] does.
func (c Config) NewLayer() (interceptor.Layer, error) { return New(c) }

// NewLayer returns l itself.
func (l *Layer) NewLayer() (interceptor.Layer, error) { return l, nil }

// Update changes the configuration for new calls. Latencies are kept, and the budget
// keeps its balance. After an error nothing has changed.
func (l *Layer) Update(c Config) error {
	errs := check.Of("hedge")
	s := c.settings(errs, &l.maker.Options)
	if err := errs.Err(); err != nil {
		return err
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if err := l.maker.Update(s.budget); err != nil {
		return err
	}
	l.set.Store(s)
	for _, seen := range l.seen {
		seen.SetWindow(s.window)
	}
	return nil
}

// Config returns the configuration as it was given to New or Update.
func (l *Layer) Config() Config {
	c := l.set.Load().given
	c.NonFatal, c.Methods = slices.Clone(c.NonFatal), slices.Clone(c.Methods)
	return c
}

// Budget returns the budget that the layer spends.
func (l *Layer) Budget() *budget.Budget { return l.maker.Budget }

// Readings yields the balance of the budget, and for each method that is known well enough
// what Delay returns.
func (l *Layer) Readings() iter.Seq[interceptor.Reading] {
	return func(yield func(interceptor.Reading) bool) {
		for r := range l.maker.Readings() {
			if !yield(r) {
				return
			}
		}
		delay := func(method string, d time.Duration) bool {
			return yield(interceptor.Reading{
				Layer: l.maker.Name, Key: method, ByMethod: method != "",
				What: interceptor.ReadingDelay, Value: d.Seconds(), Text: d.String(),
			})
		}
		set, now := l.set.Load(), interceptor.Now()
		if set.isFixed {
			delay("", set.fixed)
			return
		}
		for _, seen := range l.seen {
			for method, w := range seen.All() {
				if d, ok := set.percentileOf(w, now); ok && !delay(method, d) {
					return
				}
			}
		}
	}
}

// Delay returns how long a call of the method that starts now would wait before an extra
// attempt. ok is false while too few latencies of the method are known, and its calls are
// not hedged.
func (l *Layer) Delay(method string) (d time.Duration, ok bool) {
	set, now := l.set.Load(), interceptor.Now()
	if set.isFixed {
		return set.fixed, true
	}
	for _, seen := range l.seen {
		if w, known := seen.Peek(method); known {
			return set.percentileOf(w, now)
		}
	}
	return 0, false
}

func (set *settings) percentileOf(w *quantile.Window, now interceptor.Instant) (d time.Duration, ok bool) {
	d, n := w.QuantileAt(now, set.percentile)
	if set.lower > 0 {
		low, _ := w.QuantileAt(now, set.lower)
		d = min(d, 2*low)
	}
	return max(d, set.least), n >= set.points
}

// plan returns what is known of a call. ok is false if it is too little to hedge the call.
func (l *Layer) plan(set *settings, c *interceptor.Call, now interceptor.Instant) (p plan, ok bool) {
	if set.isFixed {
		return plan{delay: set.fixed}, true
	}
	seen := l.seen[0]
	if c.Kind() != interceptor.Unary {
		seen = l.seen[1]
	}
	p.seen = seen.Get(c.Method(), now)
	p.delay, ok = set.percentileOf(p.seen, now)
	return p, ok
}

// mayHedge reports whether a call may be hedged.
func (l *Layer) mayHedge(set *settings, c *interceptor.Call) bool {
	return set.attempts(c) > 1 && l.maker.May(&set.methods, c)
}

// attempts returns the most attempts of a call.
func (set *settings) attempts(c *interceptor.Call) int {
	return cmp.Or(c.Internals().PerCall().MaxHedge, set.max)
}

// String returns the layer's name.
func (l *Layer) String() string { return l.maker.Name }

// Traits says that the layer hedges.
func (*Layer) Traits() interceptor.Traits { return interceptor.Hedges }

// WrapGate returns a gate that counts calls for the budget.
func (l *Layer) WrapGate(inner interceptor.Gate) interceptor.Gate { return l.maker.Gate(inner) }

// WrapCall returns the call path that hedges.
func (l *Layer) WrapCall(next interceptor.Next, again interceptor.Again) interceptor.Next {
	return func(ctx context.Context, c *interceptor.Call) error {
		set, now := l.set.Load(), c.Internals().AdmittedAt()
		if !l.mayHedge(set, c) {
			if set.attempts(c) > 1 && c.Internals().Observed() {
				return l.watch(ctx, c, set, now, next)
			}
			return next(ctx, c)
		}
		p, known := l.plan(set, c, now)
		if !known {
			return p.measure(ctx, c, now, next)
		}
		c.Internals().MayRepeat()
		if c.Kind() != interceptor.Unary {
			s := new(stream)
			s.race.setUp()
			s.race.init(l, set, p, ctx, c, next, again)
			s.race.stream = s
			return s.open()
		}
		r := races.Get().(*race)
		r.init(l, set, p, ctx, c, next, again)
		return r.unary(now)
	}
}

// watch passes on a call that may not be hedged, and tells the observer if it would have
// been.
func (l *Layer) watch(ctx context.Context, c *interceptor.Call, set *settings, start interceptor.Instant, next interceptor.Next) error {
	p, known := l.plan(set, c, start)
	err := p.measure(ctx, c, start, next)
	if known && interceptor.Now().Sub(start) > p.delay {
		_ = l.maker.Forbidden(c)
	}
	return err
}

// measure passes on a call that is not hedged, and measures it.
func (p *plan) measure(ctx context.Context, c *interceptor.Call, start interceptor.Instant, next interceptor.Next) error {
	err := next(ctx, c)
	switch {
	case c.Kind() == interceptor.Unary:
		p.record(start, interceptor.Now(), err)
	case err == nil:
		c.SetStream(&measured{ClientStream: c.Stream(), plan: *p})
	}
	return err
}

// plan is what is known of a call before its first attempt.
type plan struct {
	seen  *quantile.Window // The latencies of the method; nil if the delay is fixed.
	delay time.Duration
}

// record records the latency of an attempt that was answered with err.
func (p *plan) record(start, end interceptor.Instant, err error) {
	if p.seen != nil && answered(err) {
		p.seen.RecordAt(end, end.Sub(start))
	}
}

// answered reports whether err is an answer of the server that took what an answer
// takes: it says something about the request. Other failures may come sooner or later.
func answered(err error) bool {
	if err == nil {
		return true
	}
	switch status.Code(err) {
	case codes.InvalidArgument, codes.NotFound, codes.AlreadyExists, codes.PermissionDenied,
		codes.FailedPrecondition, codes.Aborted, codes.OutOfRange:
		_, refused := interceptor.AsRefusal(err)
		return !refused
	}
	return false
}

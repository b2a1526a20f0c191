// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package stackconfig

import (
	"context"
	"encoding/json"
	"fmt"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/belfry-go/belfry/interceptor"
	"github.com/belfry-go/belfry/interceptor/breaker"
	"github.com/belfry-go/belfry/interceptor/budget"
	"github.com/belfry-go/belfry/interceptor/buffer"
	"github.com/belfry-go/belfry/interceptor/concurrency"
	"github.com/belfry-go/belfry/interceptor/failfast"
	"github.com/belfry-go/belfry/interceptor/hedge"
	"github.com/belfry-go/belfry/interceptor/loadshed"
	"github.com/belfry-go/belfry/interceptor/ratelimit"
	"github.com/belfry-go/belfry/interceptor/retry"
	"github.com/belfry-go/belfry/interceptor/throttle"
	"github.com/belfry-go/belfry/interceptor/timeout"
	"github.com/belfry-go/belfry/internal/check"
	configv1 "github.com/belfry-go/belfry/proto/belfry/config/v1"
)

// A definition is a layer's config, ready to make the layer or to change one.
type definition struct {
	kind   string // The JSON name of the field that holds it.
	fixed  fixed
	make   func() (interceptor.Layer, error)
	update func(interceptor.Layer) error
}

// fixed is what Update cannot change. A layer takes over the state of another only
// if it is the same.
type fixed struct {
	algorithm                       ratelimit.Algorithm
	key, cost, priority             string
	budget, idempotent, retryPolicy string
}

// updatable is a layer whose package has a config type C.
type updatable[C any] interface {
	interceptor.Layer
	Update(C) error
}

func define[C any, L updatable[C], O any](c C, make func(C, ...O) (L, error), options []O, fixed fixed) *definition {
	return &definition{
		fixed: fixed,
		make: func() (interceptor.Layer, error) {
			l, err := make(c, options...)
			if err != nil {
				return nil, err
			}
			return l, nil
		},
		update: func(l interceptor.Layer) error { return l.(L).Update(c) },
	}
}

// keyFunc says what calls are told apart by.
type keyFunc = func(ctx context.Context, c *interceptor.Call) string

// source is one layer's message on the way to a definition. The first error is
// kept, and later values do not matter.
type source struct {
	opts    *options
	budgets map[string]*budget.Budget
	name    string // Of the layer; empty for its package's default.
	path    string // Of the message.
	err     error
}

func (s *source) fail(field, format string, args ...any) {
	if s.err == nil {
		s.err = wrong(join(s.path, field), format, args...)
	}
}

func (s *source) duration(field string, d *durationpb.Duration) time.Duration {
	if d == nil {
		return 0
	}
	if err := d.CheckValid(); err != nil {
		s.fail(field, "%v, must be a valid duration: %w", d, err)
		return 0
	}
	v := d.AsDuration()
	if !proto.Equal(durationpb.New(v), d) {
		s.fail(field, "%ds, must be less than 292 years", d.GetSeconds())
	}
	return v
}

// int is for counts, which are int where the program runs.
func (s *source) int(field string, v int64) int {
	if int64(int(v)) != v {
		s.fail(field, "%d, must be a number of 32 bits on this machine", v)
	}
	return int(v)
}

// codes parses names of codes. None are nil, which is the default everywhere.
func (s *source) codes(field string, names []string) []codes.Code {
	var cs []codes.Code
	for i, name := range names {
		var c codes.Code
		quoted, err := json.Marshal(name)
		if err == nil {
			err = c.UnmarshalJSON(quoted)
		}
		if err != nil || c == codes.OK {
			s.fail(fmt.Sprintf("%s[%d]", field, i), `%q, must be the name of a status code other than OK, such as "UNAVAILABLE"`, name)
		}
		cs = append(cs, c)
	}
	return cs
}

// function looks up what the program supplies under a name.
func function[F any](s *source, field, name string, from map[string]F, option string) F {
	f, ok := from[name]
	if !ok {
		s.fail(field, "%q, must be a name that the program gave to %s", name, option)
	}
	return f
}

// key is what a layer's oneof of the same name says: a function, or method is
// true, or neither. keyed is the same in words.
func (s *source) key(m interface {
	GetPerMethod() bool
	GetPerMetadata() string
	GetKeyFunc() string
}, isMetadata, isFunc bool) (method bool, f keyFunc, keyed string) {
	switch {
	case isFunc:
		return false, function(s, "keyFunc", m.GetKeyFunc(), s.opts.keys, "WithKeyFunc"), "func " + m.GetKeyFunc()
	case isMetadata:
		key := m.GetPerMetadata()
		if key == "" {
			s.fail("perMetadata", `"", must be the key of a metadata entry`)
		}
		return false, func(ctx context.Context, _ *interceptor.Call) string {
			md, _ := metadata.FromOutgoingContext(ctx)
			if v := md.Get(key); len(v) > 0 {
				return v[0]
			}
			return ""
		}, "metadata " + key
	case m.GetPerMethod():
		return true, nil, "method"
	}
	return false, nil, ""
}

// named adds the option that names a layer if the config does.
func named[O any](s *source, withName func(string) O, opts ...O) []O {
	if s.name != "" {
		opts = append(opts, withName(s.name))
	}
	return opts
}

// define returns the definition of the layer in l, which is of a kind that is
// made from data.
func (s *source) define(l *configv1.Layer) (*definition, error) {
	var d *definition
	switch k := l.GetKind().(type) {
	case *configv1.Layer_Timeout:
		d = s.timeout(k.Timeout)
	case *configv1.Layer_RateLimit:
		d = s.rateLimit(k.RateLimit)
	case *configv1.Layer_Concurrency:
		d = s.concurrency(k.Concurrency)
	case *configv1.Layer_Buffer:
		c := buffer.Config{Size: s.int("size", k.Buffer.GetSize()), MaxWait: s.duration("maxWait", k.Buffer.GetMaxWait())}
		d = define(c, buffer.New, named(s, buffer.WithName), fixed{})
	case *configv1.Layer_LoadShed:
		d = define(loadshed.Config{}, loadshed.New, named(s, loadshed.WithName), fixed{})
	case *configv1.Layer_FailFast:
		c := failfast.Config{After: s.duration("after", k.FailFast.GetAfter())}
		d = define(c, failfast.New, named(s, failfast.WithName), fixed{})
	case *configv1.Layer_Throttle:
		d = s.throttle(k.Throttle)
	case *configv1.Layer_Breaker:
		d = s.breaker(k.Breaker)
	case *configv1.Layer_Retry:
		d = s.retry(k.Retry)
	case *configv1.Layer_Hedge:
		d = s.hedge(k.Hedge)
	default:
		return nil, wrong(s.path, "no kind, must be exactly one of %s", fieldNames(l.ProtoReflect().Descriptor()))
	}
	if s.err != nil {
		return nil, s.err
	}
	return d, nil
}

// kindOf returns the field of the kind that is set in l; nil if none is.
func kindOf(l *configv1.Layer) protoreflect.FieldDescriptor {
	m := l.ProtoReflect()
	return m.WhichOneof(m.Descriptor().Oneofs().ByName("kind"))
}

func (s *source) timeout(m *configv1.Timeout) *definition {
	c := timeout.Config{
		Timeout:       s.duration("call", m.GetCall()),
		Lifetime:      s.duration("lifetime", m.GetLifetime()),
		FirstResponse: s.duration("firstResponse", m.GetFirstResponse()),
		Message:       s.duration("message", m.GetMessage()),
		Idle:          s.duration("idle", m.GetIdle()),
	}
	if a := m.GetAdaptive(); a != nil {
		c.Adaptive = &timeout.Adaptive{
			Percentile: a.GetPercentile(),
			Multiple:   a.GetMultiple(),
			Min:        s.duration("adaptive.min", a.GetMin()),
			Window:     s.duration("adaptive.window", a.GetWindow()),
			MinSamples: s.int("adaptive.minSamples", a.GetMinSamples()),
		}
	}
	return define(c, timeout.New, named(s, timeout.WithName), fixed{})
}

func (s *source) rateLimit(m *configv1.RateLimit) *definition {
	c := ratelimit.Config{
		Limit:     s.int("limit", m.GetLimit()),
		Per:       s.duration("per", m.GetPer()),
		Burst:     s.int("burst", m.GetBurst()),
		Algorithm: ratelimit.Smooth,
		MaxKeys:   s.int("maxKeys", m.GetMaxKeys()),
	}
	switch a := m.GetAlgorithm(); a {
	case configv1.RateLimit_ALGORITHM_UNSPECIFIED, configv1.RateLimit_ALGORITHM_SMOOTH:
	case configv1.RateLimit_ALGORITHM_WINDOW:
		c.Algorithm = ratelimit.Window
	default:
		s.badEnum("algorithm", a)
	}
	_, isMetadata := m.GetKey().(*configv1.RateLimit_PerMetadata)
	_, isFunc := m.GetKey().(*configv1.RateLimit_KeyFunc)
	method, key, keyed := s.key(m, isMetadata, isFunc)
	opts := named(s, ratelimit.WithName)
	if method {
		c.KeyBy = ratelimit.KeyMethod
	}
	if key != nil {
		opts = append(opts, ratelimit.WithKey(key))
	}
	return define(c, ratelimit.New, opts, fixed{algorithm: c.Algorithm, key: keyed})
}

func (s *source) badEnum(field string, v protoreflect.Enum) {
	s.fail(field, "%d, must be one of %s", v.Number(), enumNames(v.Descriptor()))
}

func (s *source) concurrency(m *configv1.Concurrency) *definition {
	c := concurrency.Config{
		Limit:         m.GetLimit(),
		MaxWaiters:    s.int("maxWaiters", m.GetMaxWaiters()),
		MaxWait:       s.duration("maxWait", m.GetMaxWait()),
		CoDelTarget:   s.duration("codelTarget", m.GetCodelTarget()),
		CoDelInterval: s.duration("codelInterval", m.GetCodelInterval()),
		DropCodes:     s.codes("dropCodes", m.GetDropCodes()),
		SampleStreams: m.GetSampleStreams(),
	}
	switch b := m.GetBound().(type) {
	case *configv1.Concurrency_Aimd:
		a := b.Aimd
		c.AIMD = &concurrency.AIMDConfig{
			Initial: a.GetInitial(), Min: a.GetMin(), Max: a.GetMax(),
			BackoffRatio: a.GetBackoffRatio(),
			Increase:     a.GetIncrease(),
			Timeout:      s.duration("aimd.timeout", a.GetTimeout()),
		}
	case *configv1.Concurrency_Gradient2:
		g := b.Gradient2
		c.Gradient2 = &concurrency.Gradient2Config{
			Initial: g.GetInitial(), Min: g.GetMin(), Max: g.GetMax(),
			QueueSize:     g.GetQueueSize(),
			Smoothing:     g.GetSmoothing(),
			Tolerance:     g.GetTolerance(),
			LongWindow:    s.int("gradient2.longWindow", g.GetLongWindow()),
			BackoffRatio:  g.GetBackoffRatio(),
			Window:        s.duration("gradient2.window", g.GetWindow()),
			WindowSamples: s.int("gradient2.windowSamples", g.GetWindowSamples()),
		}
	case *configv1.Concurrency_Vegas:
		v := b.Vegas
		c.Vegas = &concurrency.VegasConfig{
			Initial: v.GetInitial(), Min: v.GetMin(), Max: v.GetMax(),
			Smoothing:     v.GetSmoothing(),
			ProbeWindows:  s.int("vegas.probeWindows", v.GetProbeWindows()),
			Window:        s.duration("vegas.window", v.GetWindow()),
			WindowSamples: s.int("vegas.windowSamples", v.GetWindowSamples()),
		}
	}
	switch d := m.GetDiscipline(); d {
	case configv1.Concurrency_DISCIPLINE_UNSPECIFIED, configv1.Concurrency_DISCIPLINE_FIFO:
		c.Discipline = concurrency.FIFO
	case configv1.Concurrency_DISCIPLINE_LIFO:
		c.Discipline = concurrency.LIFO
	case configv1.Concurrency_DISCIPLINE_CODEL:
		c.Discipline = concurrency.CoDel
	default:
		s.badEnum("discipline", d)
	}
	opts := named(s, concurrency.WithName)
	if name := m.GetCostFunc(); name != "" {
		opts = append(opts, concurrency.WithCost(function(s, "costFunc", name, s.opts.costs, "WithCostFunc")))
	}
	var priority string
	switch p := m.GetPriority().(type) {
	case *configv1.Concurrency_PriorityMetadata:
		if p.PriorityMetadata == "" {
			s.fail("priorityMetadata", `"", must be the key of a metadata entry`)
		}
		priority = "metadata " + p.PriorityMetadata
		opts = append(opts, concurrency.WithPriority(concurrency.MetadataPriority(p.PriorityMetadata)))
	case *configv1.Concurrency_PriorityFunc:
		priority = "func " + p.PriorityFunc
		opts = append(opts, concurrency.WithPriority(function(s, "priorityFunc", p.PriorityFunc, s.opts.priorities, "WithPriorityFunc")))
	}
	return define(c, concurrency.New, opts, fixed{cost: m.GetCostFunc(), priority: priority})
}

func (s *source) throttle(m *configv1.Throttle) *definition {
	return define(throttle.Config{
		K:           m.GetK(),
		Window:      s.duration("window", m.GetWindow()),
		MaxRefused:  m.GetMaxRefused(),
		MinRequests: s.int("minRequests", m.GetMinRequests()),
		RejectCodes: s.codes("rejectCodes", m.GetRejectCodes()),
		PerMethod:   m.GetPerMethod(),
	}, throttle.New, named(s, throttle.WithName), fixed{})
}

func (s *source) breaker(m *configv1.Breaker) *definition {
	c := breaker.Config{
		ConsecutiveFailures: s.int("consecutiveFailures", m.GetConsecutiveFailures()),
		FailureRatio:        m.GetFailureRatio(),
		SlowCallRatio:       m.GetSlowCallRatio(),
		SlowCall:            s.duration("slowCall", m.GetSlowCall()),
		Window:              s.duration("window", m.GetWindow()),
		MinCalls:            s.int("minCalls", m.GetMinCalls()),
		OpenFor:             s.duration("openFor", m.GetOpenFor()),
		OpenGrowth:          m.GetOpenGrowth(),
		MaxOpenFor:          s.duration("maxOpenFor", m.GetMaxOpenFor()),
		Jitter:              s.orNone("jitter", m.Jitter),
		Probes:              s.int("probes", m.GetProbes()),
		FailureCodes:        s.codes("failureCodes", m.GetFailureCodes()),
		MaxKeys:             s.int("maxKeys", m.GetMaxKeys()),
		KeyIdle:             s.duration("keyIdle", m.GetKeyIdle()),
	}
	_, isMetadata := m.GetKey().(*configv1.Breaker_PerMetadata)
	_, isFunc := m.GetKey().(*configv1.Breaker_KeyFunc)
	method, key, keyed := s.key(m, isMetadata, isFunc)
	opts := named(s, breaker.WithName)
	c.PerMethod = method
	if key != nil {
		opts = append(opts, breaker.WithKey(key))
	}
	if f := s.opts.breakerChange; f != nil {
		name := s.name
		if name == "" {
			name = "breaker"
		}
		opts = append(opts, breaker.WithOnStateChange(func(c breaker.Change) { f(name, c) }))
	}
	return define(c, breaker.New, opts, fixed{key: keyed})
}

func (s *source) budget(m *configv1.Budget) (budget.Config, error) {
	if m == nil {
		m = &configv1.Budget{}
	}
	c := budget.Config{
		TTL:          s.duration("ttl", m.GetTtl()),
		Ratio:        s.orNone("ratio", m.Ratio),
		MinPerSecond: s.orNone("minPerSecond", m.MinPerSecond),
	}
	return c, s.err
}

// orNone is a value that can be unset: unset is the default, and 0 is none. In a
// Config 0 is the default, and None is none.
func (s *source) orNone(field string, v *float64) float64 {
	switch {
	case v == nil:
		return 0
	case *v == 0:
		return check.None
	case *v < 0:
		s.fail(field, "%v, must not be negative", *v)
	}
	return *v
}

// spends returns the budget that a layer names, or the one for all.
func (s *source) spends(name string) *budget.Budget {
	b := s.budgets[name]
	if b == nil {
		s.fail("budget", "%q, must be the name of a budget in budgets", name)
	}
	return b
}

func (s *source) retry(m *configv1.Retry) *definition {
	b := m.GetBackoff()
	c := retry.Config{
		MaxAttempts:  s.int("maxAttempts", m.GetMaxAttempts()),
		Codes:        s.codes("codes", m.GetCodes()),
		DeclaredOnly: m.GetDeclaredOnly(),
		BufferBytes:  s.int("bufferBytes", m.GetBufferBytes()),
		Backoff: retry.Backoff{
			Initial:    s.duration("backoff.initial", b.GetInitial()),
			Max:        s.duration("backoff.max", b.GetMax()),
			Multiplier: b.GetMultiplier(),
		},
	}
	switch j := b.GetJitter(); j {
	case configv1.Backoff_JITTER_UNSPECIFIED, configv1.Backoff_JITTER_FULL:
		c.Backoff.Jitter = retry.FullJitter
	case configv1.Backoff_JITTER_EQUAL:
		c.Backoff.Jitter = retry.EqualJitter
	case configv1.Backoff_JITTER_DECORRELATED:
		c.Backoff.Jitter = retry.DecorrelatedJitter
	case configv1.Backoff_JITTER_NONE:
		c.Backoff.Jitter = retry.NoJitter
	default:
		s.badEnum("backoff.jitter", j)
	}
	opts := named(s, retry.WithName, retry.WithBudget(s.spends(m.GetBudget())))
	if name := m.GetIdempotentFunc(); name != "" {
		opts = append(opts, retry.WithIdempotent(function(s, "idempotentFunc", name, s.opts.idempotent, "WithIdempotentFunc")))
	}
	if name := m.GetPolicy(); name != "" {
		opts = append(opts, retry.WithPolicy(function(s, "policy", name, s.opts.policies, "WithRetryPolicy")))
	}
	return define(c, retry.New, opts, fixed{budget: m.GetBudget(), idempotent: m.GetIdempotentFunc(), retryPolicy: m.GetPolicy()})
}

func (s *source) hedge(m *configv1.Hedge) *definition {
	c := hedge.Config{
		MaxExtraLoad:  m.GetMaxExtraLoad(),
		Delay:         s.duration("delay", m.GetDelay()),
		Percentile:    m.GetPercentile(),
		MinDelay:      s.duration("minDelay", m.GetMinDelay()),
		MinDataPoints: s.int("minDataPoints", m.GetMinDataPoints()),
		Window:        s.duration("window", m.GetWindow()),
		MaxAttempts:   s.int("maxAttempts", m.GetMaxAttempts()),
		NonFatal:      s.codes("nonFatal", m.GetNonFatal()),
		DeclaredOnly:  m.GetDeclaredOnly(),
		BufferBytes:   s.int("bufferBytes", m.GetBufferBytes()),
	}
	opts := named(s, hedge.WithName)
	if name := m.GetBudget(); name != "" {
		opts = append(opts, hedge.WithBudget(s.spends(name)))
	}
	if name := m.GetIdempotentFunc(); name != "" {
		opts = append(opts, hedge.WithIdempotent(function(s, "idempotentFunc", name, s.opts.idempotent, "WithIdempotentFunc")))
	}
	return define(c, hedge.New, opts, fixed{budget: m.GetBudget(), idempotent: m.GetIdempotentFunc()})
}

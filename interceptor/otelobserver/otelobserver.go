// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package otelobserver

import (
	"errors"
	"strings"
	"sync"
	"sync/atomic"
	"time"
	"weak"

	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/metric"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/belfry-go/belfry/interceptor"
	"github.com/belfry-go/belfry/internal/check"
	"github.com/belfry-go/belfry/internal/isnil"
)

// scopeName is the name of the instrumentation scope.
const scopeName = "github.com/belfry-go/belfry/interceptor"

// Observer is an [interceptor.Observer]. It is safe for concurrent use and may
// serve any number of stacks. It lasts as long as its MeterProvider, so make one for each
// of those.
type Observer struct {
	interceptor.NopObserver

	call, attempt, wait, retryDelay metric.Float64Histogram
	started, refused, retries       metric.Int64Counter
	hedges, hedgesWon               metric.Int64Counter
	inFlight                        metric.Int64UpDownCounter
	gauges                          gauges
	methods, targets, stacks        names

	// sets has the attributes of each combination that has occurred. Their number is
	// bounded as those of methods, targets, stacks, layers and reasons are.
	sets sync.Map // of key to *option
}

// MaxMethods is how many method names, and as many targets, stacks and keys of limits, an
// Observer reports. Further ones are "other", because each is kept for ever.
const MaxMethods = 1000

// other is reported for methods that generated code does not call, as gRPC does.
const other = "other"

// names are the first MaxMethods names of their kind.
type names struct {
	known sync.Map // of string to the string that is reported
	n     atomic.Int64
}

// reported returns what is reported for a name: the name, or other.
func (ns *names) reported(name string) string { return ns.as(name, func() string { return name }) }

// as is reported for a name that is reported as something else.
func (ns *names) as(name string, what func() string) string {
	if name == other {
		return other
	}
	if v, ok := ns.known.Load(name); ok {
		return v.(string)
	}
	if ns.n.Load() >= MaxMethods {
		return other
	}
	if ns.n.Add(1) > MaxMethods {
		ns.n.Add(-1)
		return other
	}
	v, twice := ns.known.LoadOrStore(name, what())
	if twice {
		ns.n.Add(-1)
	}
	return v.(string)
}

// knows reports whether the name is reported as itself.
func (ns *names) knows(name string) bool {
	_, ok := ns.known.Load(name)
	return ok
}

// key is one combination of attribute values.
type key struct {
	instrument                         instrument
	stack, target, method, layer, kind string
	detail                             string
	code                               codes.Code
}

type instrument uint8

const (
	ofStack instrument = iota
	ofCall
	ofAttempt
	ofStart
	ofLayer
	ofReason
)

// option is a combination's attributes as the option that instruments take, in
// the slices that they take it in, so that recording allocates none.
type option struct {
	add    []metric.AddOption
	record []metric.RecordOption
}

// An Option configures an Observer.
type Option func(*options)

type options struct {
	errs      *check.Errors
	endpoints int
}

// WithEndpoints reports up to n endpoints one by one: those that the policy belfry.p2c has now,
// in the order of channels and endpoints. Each costs five time series. From 1 to 100,000; by
// default they are reported by state only.
func WithEndpoints(n int) Option {
	return func(o *options) {
		o.errs.Require(n >= 1 && n <= 100_000, "WithEndpoints", n, "must be from 1 to 100000")
		o.endpoints = n
	}
}

// latencies are the boundaries of gRFC A66.
var latencies = metric.WithExplicitBucketBoundaries(0, 0.00001, 0.00005, 0.0001, 0.0003, 0.0006, 0.0008, 0.001, 0.002,
	0.003, 0.004, 0.005, 0.006, 0.008, 0.01, 0.013, 0.016, 0.02, 0.025, 0.03, 0.04, 0.05, 0.065, 0.08, 0.1, 0.13, 0.16,
	0.2, 0.25, 0.3, 0.4, 0.5, 0.65, 0.8, 1, 2, 5, 10, 20, 50, 100)

// New returns an Observer whose instruments are made by p. It fails if p cannot
// make them. A wrong option is an [*interceptor.ConfigError].
func New(p metric.MeterProvider, opts ...Option) (*Observer, error) {
	set := options{errs: check.Of("otelobserver")}
	check.Options(set.errs, &set, opts)
	set.errs.NotNil(isnil.Value(p), "p", "a MeterProvider")
	if err := set.errs.Err(); err != nil {
		return nil, err
	}
	m := p.Meter(scopeName)
	o := new(Observer)
	var errs []error
	counter := func(to *metric.Int64Counter, name, unit, description string) {
		c, err := m.Int64Counter(name, metric.WithUnit(unit), metric.WithDescription(description))
		*to = c
		errs = append(errs, err)
	}
	histogram := func(to *metric.Float64Histogram, name, description string) {
		h, err := m.Float64Histogram(name, metric.WithUnit("s"), metric.WithDescription(description), latencies)
		*to = h
		errs = append(errs, err)
	}
	histogram(&o.call, "belfry.call.duration", "Time that calls took, all waiting included.")
	histogram(&o.attempt, "belfry.attempt.duration", "Time that attempts took from where they were handed to the connection.")
	histogram(&o.wait, "belfry.wait", "Time waited for admission.")
	histogram(&o.retryDelay, "belfry.call.retry_delay", "Back-off before attempts of retries.")
	counter(&o.started, "belfry.attempt.started", "{attempt}", "Attempts handed to the connection.")
	counter(&o.refused, "belfry.refused", "{attempt}", "Calls and further attempts refused, by layer and reason.")
	counter(&o.retries, "belfry.call.retries", "{attempt}", "Attempts of retries, by reason.")
	counter(&o.hedges, "belfry.call.hedges", "{attempt}", "Attempts of hedges, by reason.")
	counter(&o.hedgesWon, "belfry.call.hedges_won", "{call}", "Calls whose result is an extra attempt's.")
	var err error
	o.inFlight, err = m.Int64UpDownCounter("belfry.in_flight", metric.WithUnit("{call}"),
		metric.WithDescription("Calls in the stack, waiting ones included."))
	errs = append(errs, err, o.gauges.init(m, o, set.endpoints))
	if err := errors.Join(errs...); err != nil {
		return nil, err
	}
	return o, nil
}

// key returns the key of a call.
func (o *Observer) key(i instrument, c interceptor.Observed) key {
	k := key{instrument: i, stack: o.stacks.reported(c.Stack), method: other}
	if c.Static {
		k.method = o.methods.as(c.Method, func() string { return strings.TrimPrefix(c.Method, "/") })
	}
	if c.Conn != nil {
		k.target = o.targets.as(c.Conn.Target(), c.Conn.CanonicalTarget)
	}
	return k
}

// with returns the attributes of k.
func (o *Observer) with(k key) *option {
	if v, ok := o.sets.Load(k); ok {
		return v.(*option)
	}
	kvs := []attribute.KeyValue{attribute.String("belfry.stack", k.stack)}
	put := func(name, value string) { kvs = append(kvs, attribute.String(name, value)) }
	if k.instrument != ofStack {
		put("grpc.method", k.method)
		if k.target != "" { // The connection is not gRPC's own.
			put("grpc.target", k.target)
		}
	}
	switch k.instrument {
	case ofCall:
		put("belfry.kind", k.kind)
		put("belfry.outcome", k.detail)
		put("grpc.status", statusNames[min(int(k.code), len(statusNames)-1)])
	case ofAttempt:
		put("belfry.attempt", k.kind)
		put("belfry.outcome", k.detail)
		put("grpc.status", statusNames[min(int(k.code), len(statusNames)-1)])
	case ofStart:
		put("belfry.attempt", k.kind)
	case ofLayer:
		put("belfry.layer", k.layer)
	case ofReason:
		put("belfry.layer", k.layer)
		put("belfry.reason", k.detail)
	}
	set := metric.WithAttributeSet(attribute.NewSet(kvs...))
	v, _ := o.sets.LoadOrStore(k, &option{add: []metric.AddOption{set}, record: []metric.RecordOption{set}})
	return v.(*option)
}

// statusNames are the names of the status codes as A66 has them. The last is for codes that
// gRPC does not know.
var statusNames = [...]string{
	"OK", "CANCELLED", "UNKNOWN", "INVALID_ARGUMENT", "DEADLINE_EXCEEDED", "NOT_FOUND", "ALREADY_EXISTS",
	"PERMISSION_DENIED", "RESOURCE_EXHAUSTED", "FAILED_PRECONDITION", "ABORTED", "OUT_OF_RANGE", "UNIMPLEMENTED",
	"INTERNAL", "UNAVAILABLE", "DATA_LOSS", "UNAUTHENTICATED", other,
}

// codeOf returns the code of err. There are as many as statusNames has.
func codeOf(err error) codes.Code { return min(status.Code(err), codes.Code(len(statusNames)-1)) }

func which(attempt int) string {
	if attempt == 0 {
		return "first"
	}
	return "further"
}

// layerKey returns the key of what a layer does with a call, for a reason if it has one.
func (o *Observer) layerKey(c interceptor.Observed, layer string) key {
	k := o.key(ofLayer, c)
	k.layer = layer
	return k
}

func (o *Observer) reasonKey(c interceptor.Observed, layer, reason string) key {
	k := o.key(ofReason, c)
	k.layer, k.detail = layer, reason
	return k
}

// InFlight adds to belfry.in_flight.
func (o *Observer) InFlight(c interceptor.Observed, delta int) {
	o.inFlight.Add(c.Context, int64(delta), o.with(key{stack: o.stacks.reported(c.Stack)}).add...)
}

// Waited records in belfry.wait.
func (o *Observer) Waited(c interceptor.Observed, layer string, d time.Duration) {
	o.wait.Record(c.Context, d.Seconds(), o.with(o.layerKey(c, layer)).record...)
	if s, ok := spanOf(c.Context); ok {
		s.event("belfry.waited", attribute.String("belfry.layer", layer), attribute.Float64("belfry.seconds", d.Seconds()))
	}
}

// Refused adds to belfry.refused.
func (o *Observer) Refused(c interceptor.Observed, r *interceptor.Refusal) {
	o.refused.Add(c.Context, 1, o.with(o.reasonKey(c, r.Layer, string(r.Reason))).add...)
	if s, ok := spanOf(c.Context); ok {
		s.event("belfry.refused", attribute.String("belfry.layer", r.Layer), attribute.String("belfry.reason", string(r.Reason)))
	}
}

// Attempt adds to belfry.attempt.started.
func (o *Observer) Attempt(c interceptor.Observed) {
	k := o.key(ofStart, c)
	k.kind = which(c.Attempt)
	o.started.Add(c.Context, 1, o.with(k).add...)
}

// AttemptEnded records in belfry.attempt.duration.
func (o *Observer) AttemptEnded(c interceptor.Observed, e interceptor.ObservedEnd) {
	k := o.key(ofAttempt, c)
	k.kind, k.detail, k.code = which(c.Attempt), e.Outcome.String(), codeOf(e.Err)
	o.attempt.Record(c.Context, e.Took.Seconds(), o.with(k).record...)
	if s, ok := spanOf(c.Context); ok && e.Peer != nil {
		s.eventAt(time.Now().Add(-e.Took), "belfry.picked", attribute.String("belfry.endpoint", e.Peer.String()),
			attribute.Int("belfry.attempt", c.Attempt), attribute.String("grpc.status", statusNames[k.code]))
	}
}

// Ended records in belfry.call.duration.
func (o *Observer) Ended(c interceptor.Observed, e interceptor.ObservedEnd) {
	k := o.key(ofCall, c)
	k.kind, k.detail, k.code = c.Kind.String(), e.Outcome.String(), codeOf(e.Err)
	o.call.Record(c.Context, e.Took.Seconds(), o.with(k).record...)
}

// Further adds to belfry.call.retries or belfry.call.hedges.
func (o *Observer) Further(c interceptor.Observed, layer string, f interceptor.FurtherAttempt) {
	counter, event := o.retries, "belfry.retried"
	if f.Hedge {
		counter, event = o.hedges, "belfry.hedged"
	} else {
		o.retryDelay.Record(c.Context, f.Delay.Seconds(), o.with(o.layerKey(c, layer)).record...)
	}
	counter.Add(c.Context, 1, o.with(o.reasonKey(c, layer, f.Reason)).add...)
	if s, ok := spanOf(c.Context); ok {
		s.event(event, attribute.String("belfry.layer", layer), attribute.String("belfry.reason", f.Reason),
			attribute.Int("belfry.attempt", f.Attempt), attribute.Float64("belfry.delay", f.Delay.Seconds()))
	}
}

// HedgeWon adds to belfry.call.hedges_won.
func (o *Observer) HedgeWon(c interceptor.Observed, layer string) {
	o.hedgesWon.Add(c.Context, 1, o.with(o.layerKey(c, layer)).add...)
}

// Observes reports the limits and other figures of a stack as long as the stack is in use.
func (o *Observer) Observes(s *interceptor.Stack) { o.gauges.stacks.Store(weak.Make(s), struct{}{}) }

var _ interceptor.Observer = (*Observer)(nil)

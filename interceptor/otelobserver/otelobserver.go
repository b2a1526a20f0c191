// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package otelobserver

import (
	"context"
	"errors"
	"io"
	"sync"
	"sync/atomic"
	"time"
	"weak"

	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/metric"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/belfry-go/belfry/interceptor"
)

// scopeName is the name of the instrumentation scope.
const scopeName = "github.com/belfry-go/belfry/interceptor"

// Observer is an [interceptor.Observer]. It is safe for concurrent use and may
// serve any number of stacks, whose numbers it adds up.
type Observer struct {
	interceptor.NopObserver

	calls, admitted, refused, attempts, further, hedgesFired, hedgesWon metric.Int64Counter
	inFlight                                                            metric.Int64UpDownCounter
	wait                                                                metric.Float64Histogram
	budget                                                              metric.Float64Gauge
	limits                                                              limitGauges

	methods names // those that are reported
	// sets has the attributes of each combination that has occurred. Their number
	// is bounded as that of methods, layers and reasons is.
	sets sync.Map // of key to *option
}

// MaxMethods is how many method names, and as many keys of limits, an Observer reports.
// Calls of further ones have the method "other", because a program that passes calls on
// may be sent any number of names, and each is kept for ever.
const MaxMethods = 1000

// other is reported for methods beyond MaxMethods, as gRPC does for unknown ones.
const other = "other"

// names are the first MaxMethods names of their kind.
type names struct {
	known sync.Map // of string to struct{}
	n     atomic.Int64
}

// reported returns what is reported for a name: the name, or other.
func (ns *names) reported(name string) string {
	if name == other {
		return other
	}
	if _, ok := ns.known.Load(name); ok {
		return name
	}
	if ns.n.Load() >= MaxMethods {
		return other
	}
	if ns.n.Add(1) > MaxMethods {
		ns.n.Add(-1)
		return other
	}
	if _, twice := ns.known.LoadOrStore(name, struct{}{}); twice {
		ns.n.Add(-1)
	}
	return name
}

// key is one combination of attribute values.
type key struct {
	instrument                  instrument
	method, layer, kind, detail string
	code                        codes.Code
}

type instrument uint8

const (
	calls instrument = iota
	admitted
	refused
	attempts
	further
	layered // method and layer
	gauge   // layer alone
)

// option is a combination's attributes as the option that instruments take, in
// the slices that they take it in, so that recording allocates none.
type option struct {
	add    []metric.AddOption
	record []metric.RecordOption
}

// New returns an Observer whose instruments are made by p. It fails if p cannot
// make them.
func New(p metric.MeterProvider) (*Observer, error) {
	if p == nil {
		return nil, &interceptor.ConfigError{Layer: "otelobserver", Field: "p", Rule: "must be a MeterProvider"}
	}
	m := p.Meter(scopeName)
	o := new(Observer)
	var errs []error
	counter := func(to *metric.Int64Counter, name, unit, description string) {
		c, err := m.Int64Counter(name, metric.WithUnit(unit), metric.WithDescription(description))
		*to = c
		errs = append(errs, err)
	}
	counter(&o.calls, "belfry.calls", "{call}", "Calls that were admitted and have ended.")
	counter(&o.admitted, "belfry.admitted", "{attempt}", "Calls and further attempts that passed the gates.")
	counter(&o.refused, "belfry.refused", "{attempt}", "Calls and further attempts refused, by layer and reason.")
	counter(&o.attempts, "belfry.attempts", "{attempt}", "Attempts handed to the connection.")
	counter(&o.further, "belfry.further_attempts", "{attempt}", "Attempts of retries and hedges, by layer and reason.")
	counter(&o.hedgesFired, "belfry.hedges.fired", "{attempt}", "Extra attempts of hedges.")
	counter(&o.hedgesWon, "belfry.hedges.won", "{call}", "Calls whose result is an extra attempt's.")
	var err error
	o.inFlight, err = m.Int64UpDownCounter("belfry.in_flight", metric.WithUnit("{call}"),
		metric.WithDescription("Calls in the stack, waiting ones included."))
	errs = append(errs, err)
	o.wait, err = m.Float64Histogram("belfry.wait", metric.WithUnit("s"),
		metric.WithDescription("Time waited for admission."),
		metric.WithExplicitBucketBoundaries(0.0001, 0.0005, 0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1, 5, 10))
	errs = append(errs, err)
	o.budget, err = m.Float64Gauge("belfry.budget.balance", metric.WithUnit("{attempt}"),
		metric.WithDescription("Further attempts that the budget allows now."))
	errs = append(errs, err)
	errs = append(errs, o.limits.init(m, &o.methods))
	if err := errors.Join(errs...); err != nil {
		return nil, err
	}
	return o, nil
}

// with returns the attributes of k.
func (o *Observer) with(k key) *option {
	if v, ok := o.sets.Load(k); ok {
		return v.(*option)
	}
	if k.method != "" {
		if m := o.methods.reported(k.method); m != k.method {
			k.method = m
			return o.with(k)
		}
	}
	var kvs []attribute.KeyValue
	if k.method != "" {
		kvs = append(kvs, attribute.String("rpc.method", k.method))
	}
	if k.layer != "" {
		kvs = append(kvs, attribute.String("belfry.layer", k.layer))
	}
	switch k.instrument {
	case calls:
		kvs = append(kvs, attribute.String("belfry.kind", k.kind),
			attribute.String("belfry.outcome", k.detail), attribute.String("rpc.grpc.status", k.code.String()))
	case admitted:
		kvs = append(kvs, attribute.String("belfry.kind", k.kind), attribute.String("belfry.attempt", k.detail))
	case attempts:
		kvs = append(kvs, attribute.String("belfry.attempt", k.detail))
	case refused, further:
		kvs = append(kvs, attribute.String("belfry.reason", k.detail))
	}
	set := metric.WithAttributeSet(attribute.NewSet(kvs...))
	v, _ := o.sets.LoadOrStore(k, &option{add: []metric.AddOption{set}, record: []metric.RecordOption{set}})
	return v.(*option)
}

func which(attempt int) string {
	if attempt == 0 {
		return "first"
	}
	return "further"
}

// Admitted adds to belfry.admitted.
func (o *Observer) Admitted(method string, kind interceptor.Kind, attempt int) {
	k := key{instrument: admitted, method: method, kind: kind.String(), detail: which(attempt)}
	o.admitted.Add(context.Background(), 1, o.with(k).add...)
}

// Refused adds to belfry.refused.
func (o *Observer) Refused(method, layer string, reason interceptor.Reason) {
	k := key{instrument: refused, method: method, layer: layer, detail: string(reason)}
	o.refused.Add(context.Background(), 1, o.with(k).add...)
}

// Waited records in belfry.wait.
func (o *Observer) Waited(method, layer string, d time.Duration) {
	o.wait.Record(context.Background(), d.Seconds(), o.with(key{instrument: layered, method: method, layer: layer}).record...)
}

// Attempt adds to belfry.attempts.
func (o *Observer) Attempt(method string, attempt int) {
	o.attempts.Add(context.Background(), 1, o.with(key{instrument: attempts, method: method, detail: which(attempt)}).add...)
}

// Ended adds to belfry.calls.
func (o *Observer) Ended(method string, kind interceptor.Kind, out interceptor.Outcome, err error) {
	if err == io.EOF {
		err = nil
	}
	k := key{instrument: calls, method: method, kind: kind.String(), detail: out.String(), code: status.Code(err)}
	o.calls.Add(context.Background(), 1, o.with(k).add...)
}

// InFlight adds to belfry.in_flight.
func (o *Observer) InFlight(delta int) { o.inFlight.Add(context.Background(), int64(delta)) }

// Further adds to belfry.further_attempts.
func (o *Observer) Further(_ context.Context, method, layer string, f interceptor.FurtherAttempt) {
	k := key{instrument: further, method: method, layer: layer, detail: f.Reason}
	o.further.Add(context.Background(), 1, o.with(k).add...)
}

// HedgeFired adds to belfry.hedges.fired.
func (o *Observer) HedgeFired(_ context.Context, method, layer string) {
	o.hedgesFired.Add(context.Background(), 1, o.with(key{instrument: layered, method: method, layer: layer}).add...)
}

// HedgeWon adds to belfry.hedges.won.
func (o *Observer) HedgeWon(_ context.Context, method, layer string) {
	o.hedgesWon.Add(context.Background(), 1, o.with(key{instrument: layered, method: method, layer: layer}).add...)
}

// Budget records belfry.budget.balance.
func (o *Observer) Budget(layer string, balance float64) {
	o.budget.Record(context.Background(), balance, o.with(key{instrument: gauge, layer: layer}).record...)
}

// Observes reports the limits of a stack as long as the stack is in use.
func (o *Observer) Observes(s *interceptor.Stack) { o.limits.stacks.Store(weak.Make(s), struct{}{}) }

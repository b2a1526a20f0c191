// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package otelobserver

import (
	"context"
	"errors"
	"strings"
	"sync"
	"time"
	"weak"

	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/metric"

	"github.com/belfry-go/belfry/balancer/p2c"
	"github.com/belfry-go/belfry/interceptor"
	"github.com/belfry-go/belfry/resolver/discover"
)

// gauges report what the layers of all stacks, and the policies, are doing when the metrics
// are collected.
type gauges struct {
	observer  *Observer
	stacks    sync.Map // of weak.Pointer[interceptor.Stack] to struct{}
	keys      names
	endpoints int // how many are reported one by one

	limit, inUse, waiting, circuits, layerWaiting, byState, sourceFailing, endpointInFlight, aside metric.Int64ObservableGauge
	baseline, latency, last, lower, refusing, budget, failing, delay, reading                      metric.Float64ObservableGauge
	endpointLatency, share                                                                         metric.Float64ObservableGauge
	failures                                                                                       metric.Int64ObservableCounter
}

func (g *gauges) init(m metric.Meter, o *Observer, endpoints int) error {
	g.observer, g.endpoints = o, endpoints
	var errs []error
	var all []metric.Observable
	count := func(to *metric.Int64ObservableGauge, name, unit, description string) {
		i, err := m.Int64ObservableGauge(name, metric.WithUnit(unit), metric.WithDescription(description))
		*to, all = i, append(all, i)
		errs = append(errs, err)
	}
	number := func(to *metric.Float64ObservableGauge, name, unit, description string) {
		i, err := m.Float64ObservableGauge(name, metric.WithUnit(unit), metric.WithDescription(description))
		*to, all = i, append(all, i)
		errs = append(errs, err)
	}
	count(&g.limit, "belfry.limit", "{call}", "Calls that may run at a time.")
	count(&g.inUse, "belfry.limit.in_use", "{call}", "Permits of the limit that calls hold.")
	count(&g.waiting, "belfry.limit.waiting", "{call}", "Calls that wait for a permit.")
	number(&g.baseline, "belfry.limit.baseline", "s", "Latency that the limit's algorithm compares with.")
	number(&g.latency, "belfry.limit.latency", "s", "Mean latency of calls now, for the limit's algorithm.")
	number(&g.last, "belfry.limit.last_sample", "s", "Latency of the last call that the limit's algorithm learnt from.")
	number(&g.lower, "belfry.limit.lowered", "1", "1 for the reason why the limit went down the last time.")
	count(&g.circuits, "belfry.circuits", "{circuit}", "Circuits of breakers, by state.")
	number(&g.refusing, "belfry.throttle.probability", "1", "Probability with which a throttle refuses a call.")
	number(&g.budget, "belfry.budget.balance", "{attempt}", "Further attempts that the budget allows now.")
	count(&g.layerWaiting, "belfry.layer.waiting", "{call}", "Calls that wait in a buffer, rate limit or fail-fast.")
	number(&g.failing, "belfry.failfast.failing", "1", "1 while a fail-fast refuses without waiting.")
	number(&g.delay, "belfry.hedge.delay", "s", "Time before an extra attempt.")
	number(&g.reading, "belfry.reading", "1", "What a third-party layer reads.")
	count(&g.byState, "belfry.endpoints", "{endpoint}", "Endpoints, by state.")
	count(&g.sourceFailing, "belfry.source.failing", "{channel}", "Channels whose source of endpoints fails.")
	if endpoints > 0 {
		count(&g.endpointInFlight, "belfry.endpoint.in_flight", "{call}", "Attempts in flight and open streams of an endpoint.")
		number(&g.endpointLatency, "belfry.endpoint.latency", "s", "How long a call takes at an endpoint that finds nothing else in flight.")
		number(&g.share, "belfry.endpoint.share", "1", "Part of the policy's picks that an endpoint got.")
		count(&g.aside, "belfry.endpoint.aside", "1", "1 while an endpoint gets no calls though it has a connection.")
		var err error
		g.failures, err = m.Int64ObservableCounter("belfry.endpoint.failures", metric.WithUnit("{attempt}"), metric.WithDescription("Attempts that failed at an endpoint."))
		all, errs = append(all, g.failures), append(errs, err)
	}
	if err := errors.Join(errs...); err != nil {
		return err
	}
	_, err := m.RegisterCallback(g.observe, all...)
	return err
}

func (g *gauges) observe(_ context.Context, o metric.Observer) error {
	var stacks []*interceptor.Stack
	g.stacks.Range(func(p, _ any) bool {
		if s := p.(weak.Pointer[interceptor.Stack]).Value(); s != nil {
			stacks = append(stacks, s)
		} else {
			g.stacks.Delete(p)
		}
		return true
	})
	byName := map[string][]*interceptor.Stack{}
	for _, s := range stacks {
		name := g.observer.stacks.reported(s.Name())
		byName[name] = append(byName[name], s)
	}
	g.observeLimits(o, byName)
	g.observeReadings(o, byName)
	g.observeEndpoints(o)
	g.observeSources(o)
	return nil
}

// limitKey says whose limit it is, as it is reported.
type limitKey struct {
	stack, layer, key string
	byMethod          bool
}

func (k limitKey) attributes(more ...attribute.KeyValue) metric.ObserveOption {
	kvs := append(more, attribute.String("belfry.stack", k.stack), attribute.String("belfry.layer", k.layer))
	switch {
	case k.byMethod:
		kvs = append(kvs, attribute.String("grpc.method", k.key))
	case k.key != "":
		kvs = append(kvs, attribute.String("belfry.key", k.key))
	}
	return metric.WithAttributeSet(attribute.NewSet(kvs...))
}

// limitSum is what is reported of limits with the same stack, layer and key.
type limitSum struct {
	limit, inUse, waiting   int64
	learns                  bool // An algorithm learns.
	baseline, latency, last time.Duration
	lowered                 map[string]bool // The reasons.
}

// observeLimits reports limits. That of a layer that is in stacks of several names is
// reported for each name, and once for stacks of one name.
func (g *gauges) observeLimits(o metric.Observer, byName map[string][]*interceptor.Stack) {
	sums := map[limitKey]*limitSum{}
	for name, stacks := range byName {
		for l := range interceptor.Limits(stacks...) {
			k := limitKey{name, l.Layer, l.Key, l.ByMethod}
			switch {
			case l.ByMethod:
				k.key = g.method(l.Key)
			case l.Key != "":
				k.key = g.keys.reported(l.Key)
			}
			s := sums[k]
			if s == nil {
				s = &limitSum{lowered: map[string]bool{}}
				sums[k] = s
			}
			s.add(l)
		}
	}
	for k, s := range sums {
		attrs := k.attributes()
		o.ObserveInt64(g.limit, s.limit, attrs)
		o.ObserveInt64(g.inUse, s.inUse, attrs)
		o.ObserveInt64(g.waiting, s.waiting, attrs)
		if s.learns {
			o.ObserveFloat64(g.last, s.last.Seconds(), attrs)
		}
		if s.baseline > 0 {
			o.ObserveFloat64(g.baseline, s.baseline.Seconds(), attrs)
			o.ObserveFloat64(g.latency, s.latency.Seconds(), attrs)
		}
		for reason := range s.lowered {
			o.ObserveFloat64(g.lower, 1, k.attributes(attribute.String("belfry.reason", reason)))
		}
	}
}

// method returns what is reported for the method of a limit: a name that calls of generated
// code have had.
func (g *gauges) method(name string) string {
	if methods := &g.observer.methods; methods.knows(name) {
		return strings.TrimPrefix(name, "/")
	}
	return other
}

func (s *limitSum) add(l interceptor.LimitState) {
	s.limit += l.Limit
	s.inUse += l.InUse
	s.waiting += int64(l.Waiting)
	s.baseline, s.latency = max(s.baseline, l.Baseline), max(s.latency, l.Latency)
	if l.Last.Start != 0 {
		s.learns, s.last = true, max(s.last, l.Last.RTT)
	}
	if l.Lowered != "" {
		s.lowered[l.Lowered] = true
	}
}

// readingKey says whose figure it is, as it is reported.
type readingKey struct {
	stack, layer, text string
	what               interceptor.ReadingKind
}

func (g *gauges) observeReadings(o metric.Observer, byName map[string][]*interceptor.Stack) {
	figures := map[readingKey]float64{}
	for name, stacks := range byName {
		for r := range interceptor.Readings(stacks...) {
			k := readingKey{stack: name, layer: r.Layer, what: r.What}
			if r.What == interceptor.ReadingCircuit {
				for _, k.text = range []string{"closed", "half-open", "open"} {
					figures[k] += 0 // A state that no circuit has is 0, not unknown.
				}
				k.text = r.Text
			}
			figure, known := figures[k]
			switch {
			case r.What == interceptor.ReadingCircuit:
				figure++
			case r.What == interceptor.ReadingWaiting:
				figure += r.Value
			case !known:
				figure = r.Value
			case r.What == interceptor.ReadingBudget:
				figure = min(figure, r.Value)
			default:
				figure = max(figure, r.Value)
			}
			figures[k] = figure
		}
	}
	for k, v := range figures {
		kvs := []attribute.KeyValue{attribute.String("belfry.stack", k.stack), attribute.String("belfry.layer", k.layer)}
		with := func(more ...attribute.KeyValue) metric.ObserveOption {
			return metric.WithAttributeSet(attribute.NewSet(append(kvs[:len(kvs):len(kvs)], more...)...))
		}
		switch k.what {
		case interceptor.ReadingCircuit:
			o.ObserveInt64(g.circuits, int64(v), with(attribute.String("belfry.state", k.text)))
		case interceptor.ReadingWaiting:
			o.ObserveInt64(g.layerWaiting, int64(v), with())
		case interceptor.ReadingRefusing:
			o.ObserveFloat64(g.refusing, v, with())
		case interceptor.ReadingFailing:
			o.ObserveFloat64(g.failing, v, with())
		case interceptor.ReadingBudget:
			o.ObserveFloat64(g.budget, v, with())
		case interceptor.ReadingDelay:
			o.ObserveFloat64(g.delay, v, with())
		default:
			o.ObserveFloat64(g.reading, v, with(attribute.String("belfry.reading", string(k.what))))
		}
	}
}

// observeEndpoints reports the endpoints of all policies.
func (g *gauges) observeEndpoints(o metric.Observer) {
	type group struct{ target, locality, state string }
	groups := map[group]int64{}
	left := g.endpoints
	for _, s := range p2c.Snapshots() {
		target := g.observer.targets.as(s.Target, func() string { return s.CanonicalTarget })
		for i := range s.Endpoints {
			e := &s.Endpoints[i]
			groups[group{target, s.Locality, e.Condition()}]++
			if left == 0 || len(e.Addresses) == 0 {
				continue
			}
			left--
			attrs := metric.WithAttributeSet(attribute.NewSet(
				attribute.String("grpc.target", target), attribute.String("grpc.lb.locality", s.Locality),
				attribute.String("belfry.endpoint", e.Addresses[0])))
			o.ObserveInt64(g.endpointInFlight, int64(e.InFlight+e.Streams), attrs)
			o.ObserveFloat64(g.share, e.Share, attrs)
			o.ObserveInt64(g.failures, int64(e.Failures), attrs)
			if e.Samples > 0 {
				o.ObserveFloat64(g.endpointLatency, e.Latency.Seconds(), attrs)
			}
			aside := int64(0)
			if !e.AsideUntil.IsZero() {
				aside = 1
			}
			o.ObserveInt64(g.aside, aside, attrs)
		}
	}
	for k, n := range groups {
		o.ObserveInt64(g.byState, n, metric.WithAttributeSet(attribute.NewSet(
			attribute.String("grpc.target", k.target), attribute.String("grpc.lb.locality", k.locality), attribute.String("belfry.state", k.state))))
	}
}

// observeSources reports how many channels of a target have a source that fails.
func (g *gauges) observeSources(o metric.Observer) {
	failing := map[string]int64{}
	for _, s := range discover.Sources() {
		target := g.observer.targets.reported(s.Target)
		if failing[target] += 0; s.Err != nil {
			failing[target]++
		}
	}
	for target, n := range failing {
		o.ObserveInt64(g.sourceFailing, n, metric.WithAttributeSet(attribute.NewSet(attribute.String("grpc.target", target))))
	}
}

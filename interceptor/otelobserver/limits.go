// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package otelobserver

import (
	"context"
	"errors"
	"sync"
	"time"
	"weak"

	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/metric"

	"github.com/belfry-go/belfry/interceptor"
)

// limitGauges report the limits of all stacks when the metrics are collected.
type limitGauges struct {
	stacks        sync.Map // of weak.Pointer[interceptor.Stack] to struct{}
	methods, keys *names

	limit, inUse, waiting          metric.Int64ObservableGauge
	baseline, latency, last, lower metric.Float64ObservableGauge
}

func (g *limitGauges) init(m metric.Meter, methods *names) error {
	g.methods, g.keys = methods, new(names)
	var errs []error
	calls := func(to *metric.Int64ObservableGauge, name, description string) {
		i, err := m.Int64ObservableGauge(name, metric.WithUnit("{call}"), metric.WithDescription(description))
		*to = i
		errs = append(errs, err)
	}
	number := func(to *metric.Float64ObservableGauge, name, unit, description string) {
		i, err := m.Float64ObservableGauge(name, metric.WithUnit(unit), metric.WithDescription(description))
		*to = i
		errs = append(errs, err)
	}
	calls(&g.limit, "belfry.limit", "Calls that may run at a time.")
	calls(&g.inUse, "belfry.limit.in_use", "Permits of the limit that calls hold.")
	calls(&g.waiting, "belfry.limit.waiting", "Calls that wait for a permit.")
	number(&g.baseline, "belfry.limit.baseline", "s", "Latency that the limit's algorithm compares with.")
	number(&g.latency, "belfry.limit.latency", "s", "Mean latency of calls now, for the limit's algorithm.")
	number(&g.last, "belfry.limit.last_sample", "s", "Latency of the last call that the limit's algorithm learnt from.")
	number(&g.lower, "belfry.limit.lowered", "1", "1 for the reason why the limit went down the last time.")
	if err := errors.Join(errs...); err != nil {
		return err
	}
	_, err := m.RegisterCallback(g.observe, g.limit, g.inUse, g.waiting, g.baseline, g.latency, g.last, g.lower)
	return err
}

// limitKey says whose limit it is, as it is reported.
type limitKey struct {
	layer, key string
	byMethod   bool
}

func (k limitKey) attributes(more ...attribute.KeyValue) metric.ObserveOption {
	kvs := append(more, attribute.String("belfry.layer", k.layer))
	switch {
	case k.byMethod:
		kvs = append(kvs, attribute.String("rpc.method", k.key))
	case k.key != "":
		kvs = append(kvs, attribute.String("belfry.key", k.key))
	}
	return metric.WithAttributeSet(attribute.NewSet(kvs...))
}

// limitSum is what is reported of limits with the same layer and key.
type limitSum struct {
	limit, inUse, waiting   int64
	learns                  bool // An algorithm learns.
	baseline, latency, last time.Duration
	lowered                 map[string]bool // The reasons.
}

func (g *limitGauges) observe(_ context.Context, o metric.Observer) error {
	var stacks []*interceptor.Stack
	g.stacks.Range(func(p, _ any) bool {
		if s := p.(weak.Pointer[interceptor.Stack]).Value(); s != nil {
			stacks = append(stacks, s)
		} else {
			g.stacks.Delete(p)
		}
		return true
	})
	sums := map[limitKey]*limitSum{}
	for l := range interceptor.Limits(stacks...) {
		k := limitKey{l.Layer, l.Key, l.ByMethod}
		switch {
		case l.ByMethod:
			k.key = g.methods.reported(l.Key)
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
	return nil
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

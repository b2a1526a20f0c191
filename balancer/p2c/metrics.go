// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package p2c

import (
	"google.golang.org/grpc/connectivity"
	estats "google.golang.org/grpc/experimental/stats"
	"google.golang.org/grpc/resolver"

	"google.golang.org/grpc/balancer/weightedtarget"

	"github.com/belfry-go/belfry/load"
)

// The metrics of the policy, in gRPC's registry of instruments. They are off
// until a stats plugin, such as gRPC's OpenTelemetry plugin, enables them.
var (
	picksMetric = estats.RegisterInt64Count(estats.MetricDescriptor{
		Name:           "belfry.lb.p2c.picks",
		Description:    "EXPERIMENTAL. Number of picks, each of one attempt.",
		Unit:           "{pick}",
		Labels:         []string{"grpc.target"},
		OptionalLabels: []string{"grpc.lb.locality"},
	})
	triedPicksMetric = estats.RegisterInt64Count(estats.MetricDescriptor{
		Name:           "belfry.lb.p2c.tried_picks",
		Description:    "EXPERIMENTAL. Number of picks of an endpoint to which the same call had been sent before, because no other was READY or had room, or the others were much busier.",
		Unit:           "{pick}",
		Labels:         []string{"grpc.target"},
		OptionalLabels: []string{"grpc.lb.locality"},
	})
	awayPicksMetric = estats.RegisterInt64Count(estats.MetricDescriptor{
		Name:           "belfry.lb.p2c.away_picks",
		Description:    "EXPERIMENTAL. Number of picks of an endpoint outside the caller's zone, while the zone is preferred.",
		Unit:           "{pick}",
		Labels:         []string{"grpc.target"},
		OptionalLabels: []string{"grpc.lb.locality"},
	})
	fullPicksMetric = estats.RegisterInt64Count(estats.MetricDescriptor{
		Name:           "belfry.lb.p2c.full_picks",
		Description:    "EXPERIMENTAL. Number of picks that found every endpoint at its limit, by result: waited, or refused.",
		Unit:           "{pick}",
		Labels:         []string{"grpc.target", "belfry.lb.p2c.result"},
		OptionalLabels: []string{"grpc.lb.locality"},
	})
	endpointsMetric = estats.RegisterInt64UpDownCount(estats.MetricDescriptor{
		Name:           "belfry.lb.p2c.endpoints",
		Description:    "EXPERIMENTAL. Number of endpoints, by connectivity state.",
		Unit:           "{endpoint}",
		Labels:         []string{"grpc.target", "belfry.lb.p2c.endpoint_state"},
		OptionalLabels: []string{"grpc.lb.locality"},
	})
	conditionsMetric = estats.RegisterInt64UpDownCount(estats.MetricDescriptor{
		Name:           "belfry.lb.p2c.endpoint_conditions",
		Description:    "EXPERIMENTAL. Number of endpoints that get no calls or less than their share, by condition: aside (put aside by failure accrual), draining, ejected (with useEjected only), or slow_start.",
		Unit:           "{endpoint}",
		Labels:         []string{"grpc.target", "belfry.lb.p2c.condition"},
		OptionalLabels: []string{"grpc.lb.locality"},
	})
	putAsideMetric = estats.RegisterInt64Count(estats.MetricDescriptor{
		Name:           "belfry.lb.p2c.put_aside",
		Description:    "EXPERIMENTAL. Number of times that an endpoint was put aside, by reason: failures, success_rate or slow.",
		Unit:           "{endpoint}",
		Labels:         []string{"grpc.target", "belfry.lb.p2c.reason"},
		OptionalLabels: []string{"grpc.lb.locality"},
	})
	panicsMetric = estats.RegisterInt64UpDownCount(estats.MetricDescriptor{
		Name:           "belfry.lb.p2c.panics",
		Description:    "EXPERIMENTAL. 1 while so many endpoints are put aside that all are used, else 0.",
		Unit:           "{policy}",
		Labels:         []string{"grpc.target"},
		OptionalLabels: []string{"grpc.lb.locality"},
	})
	addedConnectionsMetric = estats.RegisterInt64UpDownCount(estats.MetricDescriptor{
		Name:           "belfry.lb.p2c.added_connections",
		Description:    "EXPERIMENTAL. Number of connections besides the first of each endpoint.",
		Unit:           "{connection}",
		Labels:         []string{"grpc.target"},
		OptionalLabels: []string{"grpc.lb.locality"},
	})
	droppedSamplesMetric = estats.RegisterInt64Count(estats.MetricDescriptor{
		Name:           "belfry.lb.p2c.dropped_samples",
		Description:    "EXPERIMENTAL. Number of attempts whose latency is not known, by reason: cancelled (by the caller), or not_sent.",
		Unit:           "{sample}",
		Labels:         []string{"grpc.target", "belfry.lb.p2c.reason"},
		OptionalLabels: []string{"grpc.lb.locality"},
	})
)

// metrics records the metrics of one channel, or of one locality of it. The slices of
// labels are made once, so that recording in a pick allocates nothing.
type metrics struct {
	recorder estats.MetricsRecorder
	locality string
	target   []string
	waited   []string
	refused  []string
	states   map[connectivity.State][]string
	dropped  map[load.Outcome][]string
}

func newMetrics(recorder estats.MetricsRecorder, target string, state resolver.State) *metrics {
	locality := weightedtarget.LocalityFromResolverState(state)
	m := &metrics{
		recorder: recorder,
		locality: locality,
		target:   []string{target, locality},
		waited:   []string{target, "waited", locality},
		refused:  []string{target, "refused", locality},
		states:   make(map[connectivity.State][]string),
		dropped:  make(map[load.Outcome][]string),
	}
	for _, s := range countedStates {
		m.states[s] = []string{target, s.String(), locality}
	}
	for _, o := range []load.Outcome{load.Cancelled, load.NotSent} {
		m.dropped[o] = []string{target, o.String(), locality}
	}
	return m
}

func (m *metrics) picked() { picksMetric.Record(m.recorder, 1, m.target...) }

func (m *metrics) pickedTried() { triedPicksMetric.Record(m.recorder, 1, m.target...) }

func (m *metrics) pickedAway() { awayPicksMetric.Record(m.recorder, 1, m.target...) }

// full records a pick that found every endpoint full.
func (m *metrics) full(refused bool) {
	labels := m.waited
	if refused {
		labels = m.refused
	}
	fullPicksMetric.Record(m.recorder, 1, labels...)
}

// moved records that an endpoint went from one state to another. SHUTDOWN is the state
// of an endpoint before it is listed and after it is removed.
func (m *metrics) moved(from, to connectivity.State) {
	if from == to {
		return
	}
	if from != connectivity.Shutdown {
		endpointsMetric.Record(m.recorder, -1, m.states[from]...)
	}
	if to != connectivity.Shutdown {
		endpointsMetric.Record(m.recorder, 1, m.states[to]...)
	}
}

// condition records that n more endpoints are in a condition, unless that is absent or well.
func (m *metrics) condition(c condition, n int64) {
	if name := conditionNames[c]; name != "" {
		conditionsMetric.Record(m.recorder, n, m.target[0], name, m.locality)
	}
}

// ramping records that the share of n more endpoints rises.
func (m *metrics) ramping(n int64) {
	conditionsMetric.Record(m.recorder, n, m.target[0], "slow_start", m.locality)
}

// putAside records that an endpoint was put aside.
func (m *metrics) putAside(reason string) {
	putAsideMetric.Record(m.recorder, 1, m.target[0], reason, m.locality)
}

// panicked records that n more policies use endpoints that are put aside.
func (m *metrics) panicked(n int64) { panicsMetric.Record(m.recorder, n, m.target...) }

// connected records that endpoints have n more connections besides their first.
func (m *metrics) connected(n int64) { addedConnectionsMetric.Record(m.recorder, n, m.target...) }

// sampleDropped records an attempt whose latency is not known.
func (m *metrics) sampleDropped(o load.Outcome) {
	droppedSamplesMetric.Record(m.recorder, 1, m.dropped[o]...)
}

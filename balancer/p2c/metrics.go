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

// The metrics of the policy, in grpc's registry of instruments. They are off
// until a stats plugin, such as grpc's OpenTelemetry plugin, enables them.
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
		Description:    "EXPERIMENTAL. Number of picks of an endpoint to which the same call had been sent before, because no other was READY.",
		Unit:           "{pick}",
		Labels:         []string{"grpc.target"},
		OptionalLabels: []string{"grpc.lb.locality"},
	})
	awayPicksMetric = estats.RegisterInt64Count(estats.MetricDescriptor{
		Name:           "belfry.lb.p2c.away_picks",
		Description:    "EXPERIMENTAL. Number of picks of an endpoint outside the caller's zone, while that is preferred.",
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
	droppedSamplesMetric = estats.RegisterInt64Count(estats.MetricDescriptor{
		Name:           "belfry.lb.p2c.dropped_samples",
		Description:    "EXPERIMENTAL. Number of attempts whose latency is not known, by reason: cancelled by the caller, or never sent.",
		Unit:           "{sample}",
		Labels:         []string{"grpc.target", "belfry.lb.p2c.reason"},
		OptionalLabels: []string{"grpc.lb.locality"},
	})
)

// metrics records for one channel, or one locality of it. The slices of labels
// are made once, so that recording on the pick path allocates nothing.
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

// moved records that an endpoint went from one state to another. SHUTDOWN is
// before its beginning and after its end.
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

// sampleDropped records an attempt whose latency does not count.
func (m *metrics) sampleDropped(o load.Outcome) {
	droppedSamplesMetric.Record(m.recorder, 1, m.dropped[o]...)
}

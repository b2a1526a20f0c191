// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package load

import (
	"cmp"
	"math"
	"strings"
	"sync/atomic"
	"time"
)

// ReportsConfig says how [ExpectedLatency] uses the reports of servers. Where a server has
// many clients, each of them has few attempts in flight there, which say little about how
// busy the server is. The zero value is no reports. [DefaultReportsConfig] returns the
// defaults of its fields.
//
// A metric of a report is named as in gRFC A114: cpu_utilization, mem_utilization,
// application_utilization, rps_fractional, eps, or "named_metrics." followed by the name of
// one of the server's own metrics.
type ReportsConfig struct {
	// InFlight is the name of the metric that has the number of requests at the server when
	// it sent the report. The request that the report answers does not count. Default
	// "named_metrics.belfry.in_flight", which package orca sends.
	InFlight string
	// QueueExponent replaces that of [ExpectedLatencyConfig]. Default 0.7, from 0 to 1.
	QueueExponent float64
	// KeepSamples replaces that of [ExpectedLatencyConfig] where all requests of the servers
	// are from other clients. If a part of them is, the number kept lies between the two.
	// With the queues known, a change of latencies is a change of how fast servers are, so
	// fewer samples are better. Default 6, from 1 to 1e6.
	KeepSamples float64
	// Expiry is for how long reports count after the last report of any server. Default
	// 10 s, must be above 0.
	Expiry time.Duration
	// Blackout is for how long after its first report a server counts as the average of
	// the servers that report, because a new server does not have its usual load yet.
	// Default 0, at least 0.
	Blackout time.Duration
}

// DefaultReportsConfig returns the defaults, for servers that use package orca.
func DefaultReportsConfig() ReportsConfig {
	return ReportsConfig{InFlight: "named_metrics.belfry.in_flight", QueueExponent: 0.7, KeepSamples: 6, Expiry: 10 * time.Second}
}

func (c ReportsConfig) validate() error {
	if c == (ReportsConfig{}) {
		return nil
	}
	err := cmp.Or(
		checkRange("reports.queueExponent", c.QueueExponent, 0, 1),
		checkRange("reports.keepSamples", c.KeepSamples, 1, 1e6),
		checkDuration("reports.expiry", c.Expiry),
	)
	switch {
	case err != nil:
		return err
	case !(&Report{}).knows(c.InFlight):
		return &ConfigError{"reports.inFlight", c.InFlight, "cpu_utilization, mem_utilization, application_utilization, rps_fractional, eps, or named_metrics. and a name"}
	case c.Blackout < 0:
		return &ConfigError{"reports.blackout", c.Blackout, "at least 0s"}
	}
	return nil
}

const named = "named_metrics."

func (*Report) knows(name string) bool {
	switch name {
	case "cpu_utilization", "mem_utilization", "application_utilization", "rps_fractional", "eps":
		return true
	}
	return strings.HasPrefix(name, named) && len(name) > len(named)
}

// Value returns the number of a metric, by its name as in [ReportsConfig]. It reports false
// if the server did not send the metric. A standard metric that is 0 counts as not sent.
func (r *Report) Value(name string) (v float64, ok bool) {
	switch name {
	case "cpu_utilization":
		v = r.CPU
	case "mem_utilization":
		v = r.Memory
	case "application_utilization":
		v = r.Application
	case "rps_fractional":
		v = r.QPS
	case "eps":
		v = r.EPS
	default:
		v, ok = r.Named[strings.TrimPrefix(name, named)]
		return v, ok
	}
	return v, v != 0
}

// word packs a number, as a float32, and its tick into one word, so that they change
// together.
func word(v float64, tick uint32) uint64 {
	return uint64(math.Float32bits(float32(v)))<<32 | uint64(tick)
}

func unword(w uint64) (v float64, tick uint32) {
	return float64(math.Float32frombits(uint32(w >> 32))), uint32(w)
}

// reporting is what a channel knows of the reports of all its servers.
type reporting struct {
	// mean is the moving mean of the requests per weight that a server has from other
	// clients, and the tick when it was last written. It is 0 before the first report.
	mean atomic.Uint64
}

// others returns the mean number of requests per weight that a server has from other
// clients. ok is false if there was no report, or none within the expiry.
func (r *reporting) others(p *expectedParams, tick uint32) (mean float64, ok bool) {
	w := r.mean.Load()
	if w == 0 {
		return 0, false
	}
	mean, last := unword(w)
	return mean, since32(tick, last) <= p.expiry
}

// others returns an estimate of the number of requests per weight that the server has from
// other clients. It is the number that the server reported last, which approaches the mean of
// all servers as time passes, see reportHalf. It is 0 without reports.
func (m *expectedMeter) others(p *expectedParams, now Instant) float64 {
	if p.inFlight == "" {
		return 0
	}
	e := m.metric
	tick := uint32(uint64(now) >> tickBits)
	mean, ok := e.reporting.others(p, tick)
	if !ok {
		return 0
	}
	w := m.reported.Load()
	if w == 0 {
		return mean
	}
	if since32(tick, m.reporting.Load()) < p.blackout {
		return mean
	}
	own, last := unword(w)
	latency := math.Float64frombits(e.undivided[usual].Load()) / (1 << tickBits)
	if latency <= 0 {
		return mean
	}
	return mean + (own-mean)*expNeg(since32(tick, last)/(reportHalf*latency))
}

// keep returns 1 - 1/KeepSamples: that of ReportsConfig if all requests of the servers are
// from other clients, that of ExpectedLatencyConfig if none is, and in proportion between.
func (e *ExpectedLatency) keep(p *expectedParams, now Instant) float64 {
	if p.inFlight == "" {
		return p.keep
	}
	others, ok := e.reporting.others(p, uint32(uint64(now)>>tickBits))
	if !ok || others <= 0 {
		return p.keep
	}
	_, own := fleetMeans(e.queue.means.Load())
	return p.keep + (p.reportsKeep-p.keep)*others/(others+own)
}

// reportHalf is the part of a latency in which the distance of a reported number to the mean
// falls to 1/e.
const reportHalf = 0.5

// report is told of a report of the server. own is the number of attempts of this client that
// are in flight there.
func (m *expectedMeter) report(p *expectedParams, now Instant, r *Report, own int) {
	if r == nil || p.inFlight == "" {
		return
	}
	v, ok := r.Value(p.inFlight)
	if !ok || !(v >= 0 && v <= math.MaxInt32) {
		return
	}
	tick := uint32(uint64(now) >> tickBits)
	if tick == 0 {
		tick = 1
	}
	if w := m.reported.Load(); w == 0 || since32(tick, uint32(w)) > p.expiry {
		m.reporting.Store(tick)
	}
	others := max(v-float64(own), 0)
	if w := math.Float32frombits(m.weight.Load()); w > 0 {
		others /= float64(w)
	}
	m.reported.Store(word(others, tick))

	e := m.metric
	mean, last := unword(e.reporting.mean.Load())
	switch {
	case e.reporting.mean.Load() == 0 || since32(tick, last) > p.expiry:
		mean = others
	case tick == last: // one report in a tick is enough
		return
	default:
		mean += (others - mean) / fleetWindow
	}
	e.reporting.mean.Store(word(mean, tick))
}

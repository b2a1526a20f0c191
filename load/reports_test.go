// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package load

import (
	"math"
	"testing"
	"time"
)

func TestReports(t *testing.T) {
	c := DefaultExpectedLatencyConfig()
	c.Reports = DefaultReportsConfig()
	c.Reports.Blackout = time.Second
	metric, err := NewExpectedLatency(c)
	if err != nil {
		t.Fatal(err)
	}
	a, b, silent := metric.NewMeter(Endpoint{}), metric.NewMeter(Endpoint{}), metric.NewMeter(Endpoint{})
	queue := func(m Meter, at time.Duration) float64 {
		return m.Load(Query{Now: Instant(at), InFlight: 1, Weight: 1}).Queue
	}
	check := func(what string, got, want float64) {
		t.Helper()
		if math.Abs(got-want) > 0.05 {
			t.Errorf("%s: queue is %v, want %v", what, got, want)
		}
	}
	// call makes a call of 1 s that ends with a report, while one other call is in flight.
	call := func(m Meter, end time.Duration, requests float64) {
		ticket := m.Start(&Attempt{Query: Query{Now: Instant(end - time.Second), Weight: 1}})
		m.Finish(&Sample{Now: Instant(end), Ticket: ticket, Report: &Report{Named: map[string]float64{"belfry.in_flight": requests}}, InFlight: 1})
	}
	check("without reports", queue(a, time.Hour), 1)

	start := time.Hour
	call(a, start, 9)
	check("the first report is the mean", queue(silent, start), 1+8)
	call(b, start+time.Second, 109)
	mean := 8 + 100.0/fleetWindow
	check("in its blackout", queue(b, start+time.Second), 1+mean)
	call(b, start+3*time.Second, 109)
	mean += (108 - mean) / fleetWindow
	check("just after a report", queue(b, start+3*time.Second), 1+108)
	check("half a latency later", queue(b, start+3500*time.Millisecond), 1+mean+(108-mean)/math.E)
	check("long after, as one that never reported", queue(b, start+12*time.Second), 1+mean)
	check("when reports have stopped", queue(b, start+14*time.Second), 1)
	check("the silent one then", queue(silent, start+14*time.Second), 1)

	b.Report(OutOfBand{Now: Instant(start + 20*time.Second), Report: &Report{Named: map[string]float64{"belfry.in_flight": 5}}, InFlight: 2})
	check("out of band", queue(silent, start+20*time.Second), 1+3)
	a.Finish(&Sample{Now: Instant(start + 20*time.Second), Ticket: a.Start(&Attempt{Query: Query{Now: Instant(start), Weight: 1}}), Report: &Report{Named: map[string]float64{"belfry.in_flight": math.NaN()}}})
	check("a report that is not a number", queue(silent, start+20*time.Second), 1+3)
}

// If all servers are equally busy, one of three times the weight has three times the requests.
func TestReportsCountPerWeight(t *testing.T) {
	c := DefaultExpectedLatencyConfig()
	c.Reports = DefaultReportsConfig()
	metric := must(NewExpectedLatency(c))
	light, heavy := metric.NewMeter(Endpoint{}), metric.NewMeter(Endpoint{})
	queue := func(m Meter, weight float64, now time.Duration) float64 {
		return m.Load(Query{Now: Instant(now), Weight: weight}).Queue
	}
	now := time.Hour
	for range 100 {
		for _, e := range []struct {
			meter            Meter
			weight, requests float64
		}{{light, 0.5, 2}, {heavy, 1.5, 6}} {
			ticket := e.meter.Start(&Attempt{Query: Query{Now: Instant(now), Weight: e.weight}})
			now += time.Second
			e.meter.Finish(&Sample{Now: Instant(now), Ticket: ticket, Report: &Report{Named: map[string]float64{"belfry.in_flight": e.requests}}})
		}
	}
	for _, after := range []time.Duration{0, time.Second / 2, 5 * time.Second} {
		if l, h := queue(light, 0.5, now+after), queue(heavy, 1.5, now+after); math.Abs(l-4) > 0.05 || math.Abs(h-4) > 0.05 {
			t.Errorf("%v after the last report the queues are %.2f and %.2f, want 4 each", after, l, h)
		}
	}
}

// One client alone learns nothing from reports, so its estimates keep as many samples as without.
func TestReportsOfOthersAloneShortenTheMemory(t *testing.T) {
	// samples returns how many samples an endpoint keeps of a hundred, each of which was sent
	// while one other attempt of this client was in flight.
	samples := func(c ExpectedLatencyConfig, requests float64) float64 {
		m := must(NewExpectedLatency(c)).NewMeter(Endpoint{})
		now := Instant(time.Hour)
		for range 100 {
			q := Query{Now: now, InFlight: 1, Weight: 1}
			ticket := m.Start(&Attempt{Query: q})
			now += Instant(time.Millisecond)
			m.Finish(&Sample{Now: now, Ticket: ticket, Report: &Report{Named: map[string]float64{"belfry.in_flight": requests}}, InFlight: 1})
		}
		return m.Inspect(Query{Now: now, Weight: 1}).Samples
	}
	without := DefaultExpectedLatencyConfig()
	without.ForgetRounds = 1e6
	with := without
	with.Reports = DefaultReportsConfig()
	kept := func(c ExpectedLatencyConfig) float64 { return c.KeepSamples * (1 - math.Pow(1-1/c.KeepSamples, 100)) }
	all := with
	all.KeepSamples = with.Reports.KeepSamples
	half := with
	half.KeepSamples = 2 / (1/without.KeepSamples + 1/all.KeepSamples)
	for _, test := range []struct {
		name     string
		config   ExpectedLatencyConfig
		requests float64
		want     ExpectedLatencyConfig
	}{
		{"without reports", without, 1000, without},
		{"nothing from others", with, 1, without},
		{"as much from others", with, 2, half},
		{"nearly all from others", with, 1000, all},
	} {
		if got, want := samples(test.config, test.requests), kept(test.want); math.Abs(got-want) > want/50 {
			t.Errorf("%s: %.2f samples count, want %.2f", test.name, got, want)
		}
	}
}

func TestReportValue(t *testing.T) {
	r := &Report{CPU: 1, Memory: 2, Application: 3, QPS: 4, EPS: 5, Named: map[string]float64{"x": 6, "zero": 0}}
	for name, want := range map[string]float64{
		"cpu_utilization": 1, "mem_utilization": 2, "application_utilization": 3, "rps_fractional": 4, "eps": 5,
		"named_metrics.x": 6, "named_metrics.zero": 0,
	} {
		if got, ok := r.Value(name); got != want || !ok {
			t.Errorf("%s is %v, %v, want %v", name, got, ok, want)
		}
	}
	for _, name := range []string{"named_metrics.y", "y", ""} {
		if got, ok := r.Value(name); ok {
			t.Errorf("%q is %v, want none", name, got)
		}
	}
}

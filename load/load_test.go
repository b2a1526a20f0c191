// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package load

import (
	"errors"
	"math"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/belfry-go/belfry/internal/test/race"
)

func TestConstantIsTheSameForEverWhateverHappens(t *testing.T) {
	for _, want := range []float64{0, 1, 2.5, math.MaxFloat64} {
		c, err := NewConstant(want)
		if err != nil {
			t.Fatal(err)
		}
		m := newMeter(c)
		check := func(when string) {
			t.Helper()
			if got := m.Load(sec); got != want {
				t.Errorf("%s: load is %v, want %v", when, got, want)
			}
		}
		check("at first")
		ticket := m.Start(0)
		check("with one attempt in flight")
		m.Respond(sec, ticket)
		m.Finish(sec, Sample{Ticket: ticket, Outcome: Failed, Responded: true})
		check("after a failure")
		m.Close()
		check("after Close")
	}
}

func TestPendingRequestsCountsAttemptsFromStartToFinish(t *testing.T) {
	m := newMeter(NewPendingRequests())
	check := func(when string, want float64) {
		t.Helper()
		if got := m.Load(0); got != want {
			t.Errorf("%s: load is %v, want %v", when, got, want)
		}
	}
	check("at first", 0)
	a := m.Start(0)
	check("one in flight", 1)
	b := m.Start(0)
	check("two in flight", 2)
	m.Finish(0, Sample{Ticket: a})
	check("one ended", 1)
	m.Finish(0, Sample{Ticket: b})
	check("both ended", 0)
}

// A stream that was answered waits for nothing, so it says nothing of how busy the
// server is.
func TestPendingRequestsCountsAStreamUntilItsFirstResponse(t *testing.T) {
	m := newMeter(NewPendingRequests())
	a, b := m.Start(0), m.Start(0)
	m.Respond(ms, a)
	if got := m.Load(ms); got != 1 {
		t.Errorf("one of two streams has a response: load is %v, want 1", got)
	}
	m.Respond(ms, b)
	if got := m.Load(ms); got != 0 {
		t.Errorf("both streams have a response: load is %v, want 0", got)
	}
}

func TestPendingRequestsIsBlindToOutcomes(t *testing.T) {
	for _, o := range []Outcome{Completed, Failed, Cancelled, NotSent, Expired} {
		m := newMeter(NewPendingRequests())
		run(m, 0, time.Second, o)
		if got := m.Load(sec); got != 0 {
			t.Errorf("load after an attempt that was %v is %v, want 0", o, got)
		}
	}
}

func TestLoadIsFiniteAndNeverNegative(t *testing.T) {
	forEachMetric(t, func(t *testing.T, metric Metric) {
		r := newRand(t)
		m := newMeter(metric)
		var now Instant
		var flying []Ticket
		for i := range 20_000 {
			now += interval(r, time.Nanosecond, time.Hour)
			if r.IntN(10) == 0 {
				now += interval(r, time.Hour, 1000*time.Hour)
			}
			switch k := r.IntN(3); {
			case k == 0 || len(flying) == 0:
				flying = append(flying, m.Start(now))
			case k == 1:
				j := r.IntN(len(flying))
				m.Finish(now, Sample{Ticket: flying[j], Outcome: Outcome(r.IntN(4))})
				flying[j] = flying[len(flying)-1]
				flying = flying[:len(flying)-1]
			}
			// A clock that goes back a little, as two cores' readings may.
			if l := m.Load(now - Instant(r.IntN(1000))); !(l >= 0 && l <= math.MaxFloat64) {
				t.Fatalf("operation %d at %v: load is %v, want a finite number of at least 0", i, time.Duration(now), l)
			}
		}
	})
}

func TestMetersOfAMetricAreIndependentInPending(t *testing.T) {
	forEachMetric(t, func(t *testing.T, metric Metric) {
		if _, ok := metric.(*Constant); ok {
			t.Skip("a constant depends on nothing")
		}
		a, b := newMeter(metric), newMeter(metric)
		before := b.Load(0)
		a.Start(0)
		a.Start(0)
		if got := b.Load(0); got != before {
			t.Errorf("load of an idle endpoint went from %v to %v when another got attempts", before, got)
		}
		if la, lb := a.Load(0), b.Load(0); !(la > lb) {
			t.Errorf("load with two attempts in flight is %v, want above that of an idle endpoint, %v", la, lb)
		}
	})
}

// The count of attempts in flight is exact whatever the interleaving: at rest
// the meters are as if nothing were in flight. There is no false failure.
func TestAtRestNothingIsInFlightAfterAnyInterleaving(t *testing.T) {
	forEachMetric(t, func(t *testing.T, metric Metric) {
		const meters, goroutines, rounds = 3, 8, 3000
		ms := make([]*counted, meters)
		for i := range ms {
			ms[i] = newMeter(metric)
		}
		r := newRand(t)
		var wg sync.WaitGroup
		for range goroutines {
			seed := r.Uint64()
			wg.Go(func() {
				now := Instant(seed % 1000)
				var flying []flight
				for range rounds {
					now += Instant(seed>>20%2_000_000) + 1
					seed = seed*6364136223846793005 + 1442695040888963407
					switch k := seed >> 60; {
					case k < 6 || len(flying) == 0:
						m := ms[seed>>40%meters]
						flying = append(flying, flight{meter: m, ticket: m.Start(now)})
					case k < 8:
						f := &flying[seed>>30%uint64(len(flying))]
						if !f.responded {
							f.responded = true
							f.meter.Respond(now, f.ticket)
						}
					case k < 14:
						j := int(seed >> 30 % uint64(len(flying)))
						flying[j].finish(now, Outcome(seed>>50%4))
						flying[j] = flying[len(flying)-1]
						flying = flying[:len(flying)-1]
					default:
						if l := ms[0].Load(now); !(l >= 0 && l <= math.MaxFloat64) {
							t.Errorf("load is %v, want a finite number of at least 0", l)
						}
					}
				}
				for i := range flying {
					flying[i].finish(now, Outcome(i%4))
				}
			})
		}
		wg.Wait()
		for i, m := range ms {
			e, ok := m.Meter.(*expectedMeter)
			if !ok {
				continue
			}
			for kind := range e.ages {
				if got := e.ages[kind].total(); got != 0 {
					t.Errorf("meter %d: weight and number in flight are %#x at rest, want 0", i, got)
				}
			}
			// What a race may have left in the sums of ages must not show.
			p := e.metric.params.Load()
			prior := p.prior * (1 + p.spreadPrior*e.metric.v(p))
			now := 100 * sec
			s, n := floats32(e.mean.Load())
			f := expNeg(e.metric.unheard(p.rate, now, e.heard.Load()))
			near(t, "load at rest, with no age", m.Load(now), (s*f+prior*e.metric.g())/(n*f+prior), 1e-9)
		}
	})
}

// flight is an attempt in flight.
type flight struct {
	meter     *counted
	ticket    Ticket
	responded bool
}

func (f *flight) finish(now Instant, o Outcome) {
	f.meter.Finish(now, Sample{Ticket: f.ticket, Outcome: o, Responded: f.responded})
}

func TestFinishAfterCloseIsHarmless(t *testing.T) {
	forEachMetric(t, func(t *testing.T, metric Metric) {
		m, other := newMeter(metric), newMeter(metric)
		run(other, 0, 10*time.Millisecond, Completed)
		tickets := []Ticket{m.Start(0), m.Start(0), m.Start(0)}
		m.Respond(ms, tickets[1])
		m.Close()
		m.Finish(20*ms, Sample{Ticket: tickets[0]})
		m.Finish(20*ms, Sample{Ticket: tickets[1], Responded: true, Outcome: Cancelled})
		m.Finish(20*ms, Sample{Ticket: tickets[2], Outcome: Failed})
		if l := m.Load(30 * ms); !(l >= 0 && l <= math.MaxFloat64) {
			t.Errorf("load after Close is %v, want finite and at least 0", l)
		}
	})
}

// Every combination of Respond and outcome: what it leaves in flight, and
// whether it counts as a sample.
func TestWhatAnAttemptLeavesBehind(t *testing.T) {
	for _, test := range []struct {
		name       string
		respond    bool
		outcome    Outcome
		wantCounts int // latencies
	}{
		{"completed", false, Completed, 1},
		{"failed", false, Failed, 1},
		{"cancelled", false, Cancelled, 0},
		{"not sent", false, NotSent, 0},
		{"responded and completed", true, Completed, 1},
		{"responded and failed", true, Failed, 2},
		{"responded and cancelled", true, Cancelled, 1},
	} {
		t.Run(test.name, func(t *testing.T) {
			e := must(NewExpectedLatency(DefaultExpectedLatencyConfig()))
			m := newMeter(e)
			waiting := m.Meter.(*expectedMeter).ages[usual].total
			ticket := m.Start(0)
			if test.respond {
				m.Respond(10*ms, ticket)
				if got := waiting(); got != 0 {
					t.Errorf("the age still counts after the first response, with weight %d", got)
				}
			}
			m.Finish(20*ms, Sample{Ticket: ticket, Outcome: test.outcome, Responded: test.respond})
			if got := waiting(); got != 0 {
				t.Errorf("the age still counts at the end, with weight %d", got)
			}
			if got := int(e.samples.Load()); got != test.wantCounts {
				t.Errorf("%d latencies counted, want %d", got, test.wantCounts)
			}
		})
	}
}

func must[T any](v T, err error) T {
	if err != nil {
		panic(err)
	}
	return v
}

func TestLatencyOfAStreamIsTheTimeToItsFirstResponse(t *testing.T) {
	for _, metric := range []Metric{
		must(NewPeakEWMA(PeakEWMAConfig{Decay: time.Second, DefaultRTT: time.Nanosecond, FailurePenalty: 10})),
		must(NewExpectedLatency(DefaultExpectedLatencyConfig())),
	} {
		m := newMeter(metric)
		ticket := m.Start(0)
		m.Respond(10*ms, ticket)
		near(t, "load of an open stream", m.Load(10*ms), 10e6, 1e-3)
		m.Finish(10*ms, Sample{Ticket: ticket, Responded: true})
		near(t, "load after its end", m.Load(10*ms), 10e6, 1e-3)
	}
}

// A stream that breaks in its second hour was answered within 10 ms. Its end counts like
// any other failure, and not as a latency of two hours.
func TestAStreamThatFailsLateIsNotChargedItsWholeLife(t *testing.T) {
	for _, metric := range []Metric{
		must(NewPeakEWMA(PeakEWMAConfig{Decay: 10 * time.Second, DefaultRTT: 1, FailurePenalty: 10})),
		must(NewExpectedLatency(DefaultExpectedLatencyConfig())),
	} {
		m := newMeter(metric)
		ticket := m.Start(0)
		m.Respond(10*ms, ticket)
		end := 2 * Instant(time.Hour)
		m.Finish(end, Sample{Ticket: ticket, Outcome: Failed, Responded: true})
		if got, limit := m.Load(end), 10*10e6*1.01; got > limit {
			t.Errorf("%T: load is %v, want at most %v, ten times the mean latency", metric, time.Duration(got), time.Duration(limit))
		}
	}
}

func TestGivenUpEarlyIsNeitherPraiseNorBlame(t *testing.T) {
	for i, cancelledAfter := range []time.Duration{time.Nanosecond, 9 * time.Millisecond, time.Nanosecond, 9 * time.Millisecond} {
		outcome := []Outcome{Cancelled, Cancelled, Expired, Expired}[i]
		forEachMetric(t, func(t *testing.T, metric Metric) {
			m, same := newMeter(metric), newMeter(metric)
			for _, m := range []*counted{m, same} {
				m.Load(0)
				run(m, 0, 10*time.Millisecond, Completed)
			}
			run(m, 10*ms, cancelledAfter, outcome)
			now := 10*ms + Instant(cancelledAfter)
			near(t, "load after an attempt was "+outcome.String(), m.Load(now), same.Load(now), 1e-9)
		})
	}
}

// Where calls are hedged all attempts to a slow endpoint are cancelled.
func TestCancelledAgainAndAgainIsSlow(t *testing.T) {
	peak := newMeter(must(NewPeakEWMA(DefaultPeakEWMAConfig())))
	pending := newMeter(NewPendingRequests())
	for _, m := range []*counted{peak, pending} {
		m.Load(0)
	}
	for range 200 { // until the first estimate has no weight
		run(peak, 0, time.Millisecond, Completed)
		peak.Load(Instant(1000 * time.Second))
	}
	now := Instant(1000 * time.Second)
	for i := range 4 {
		for _, m := range []*counted{peak, pending} {
			run(m, now, 12*time.Millisecond, Cancelled)
		}
		now += 12 * ms
		near(t, "load of peakEwma", peak.Load(now), float64(12*(i+1))*1e6, 0.01)
	}
	shunned := 0
	for pending.Load(now) == 1 {
		shunned++
	}
	if shunned != 64 || pending.Load(now) != 0 {
		t.Errorf("after four cancelled attempts pendingRequests counted one more %d times, want 64", shunned)
	}
	for range 2 {
		run(pending, now, 12*time.Millisecond, Cancelled)
	}
	if got := pending.Load(now); got != 1 {
		t.Errorf("load of pendingRequests after two more = %v, want 1", got)
	}
	for _, m := range []*counted{peak, pending} {
		run(m, now, time.Millisecond, Completed)
		run(m, now+ms, 2*time.Millisecond, Cancelled)
	}
	if got := pending.Load(now); got != 0 {
		t.Errorf("load of pendingRequests after an answer = %v, want 0", got)
	}
	if got := peak.Load(now + 3*ms); got > 48.1e6 {
		t.Errorf("load of peakEwma after an answer and a cancelled attempt of 2ms = %v, want what it was", time.Duration(got))
	}
}

func TestNotSentUndoesTheStart(t *testing.T) {
	forEachMetric(t, func(t *testing.T, metric Metric) {
		m := newMeter(metric)
		m.Load(0)
		run(m, 0, 10*time.Millisecond, Completed)
		before := m.Load(10 * ms)
		run(m, 10*ms, 0, NotSent)
		if got := m.Load(10 * ms); got != before {
			t.Errorf("load is %v after an attempt that was not sent, %v before it", got, before)
		}
	})
}

// An endpoint that fails at once looks fast to Tower's metric, and gets most calls. Here
// it costs more than a busy one that answers.
func TestFailingAtOnceNeverLooksFast(t *testing.T) {
	for _, busy := range []int{0, 1, 10, 100} {
		for _, metric := range []Metric{
			must(NewPeakEWMA(PeakEWMAConfig{Decay: 10 * time.Second, DefaultRTT: 1, FailurePenalty: 10})),
			must(NewExpectedLatency(DefaultExpectedLatencyConfig())),
		} {
			healthy, failing := newMeter(metric), newMeter(metric)
			var flying []Ticket
			var now Instant
			for range busy {
				flying = append(flying, healthy.Start(now))
			}
			// Each attempt to the healthy endpoint is sent beside the others, and
			// takes 20 ms.
			for i := range 400 {
				healthy.Load(now)
				failing.Load(now)
				flying = append(flying, healthy.Start(now))
				now += 20 * ms / Instant(busy+1)
				healthy.Finish(now, Sample{Ticket: flying[0]})
				flying = flying[1:]
				run(failing, now, time.Microsecond, Failed)
				if i < 300 {
					continue // its first samples may be at the prior
				}
				if h, f := healthy.Load(now), failing.Load(now); !(f > h) {
					t.Fatalf("%T, %d in flight, call %d: load of the endpoint that fails at once is %v, want above that of the healthy one, %v",
						metric, busy, i, time.Duration(f), time.Duration(h))
				}
			}
		}
	}
}

// The latency that a failure counts as follows from what endpoints cost. If it counted in
// these costs, each failure would make the next one count as more.
func TestChargesForFailuresDoNotFeedOnThemselves(t *testing.T) {
	for _, metric := range []Metric{
		must(NewPeakEWMA(PeakEWMAConfig{Decay: 10 * time.Second, DefaultRTT: 1, FailurePenalty: 10})),
		must(NewExpectedLatency(DefaultExpectedLatencyConfig())),
	} {
		m := newMeter(metric)
		var now Instant
		for range 300 {
			run(m, now, 10*time.Millisecond, Completed)
			now += 10 * ms
			run(m, now, time.Microsecond, Failed)
			now += ms
		}
		if got, limit := m.Load(now), 10*10e6*1.1; got > limit {
			t.Errorf("%T: load after 300 failures among latencies of 10ms is %v, want at most %v", metric, time.Duration(got), time.Duration(limit))
		}
	}
}

func TestDeadlineExceededCountsAtLeastTheTimeWaited(t *testing.T) {
	for _, metric := range []Metric{
		must(NewPeakEWMA(DefaultPeakEWMAConfig())),
		must(NewExpectedLatency(DefaultExpectedLatencyConfig())),
	} {
		m, other := newMeter(metric), newMeter(metric)
		for i := range Instant(100) {
			run(other, i*ms, time.Millisecond, Completed)
			run(m, i*ms, time.Millisecond, Completed)
		}
		before := m.Load(100 * ms)
		// ExpectedLatency counts one attempt up to 20 times the mean.
		run(m, 100*ms, 15*time.Millisecond, Failed)
		if got, least := m.Load(115*ms), before+float64(15*ms)/40; got < least {
			t.Errorf("%T: load after 15ms without an answer is %v, want at least %v", metric, time.Duration(got), time.Duration(least))
		}
	}
}

func TestBadParametersAreErrorsThatNameFieldValueAndRule(t *testing.T) {
	peak := func(f func(*PeakEWMAConfig)) func() error {
		return func() error {
			c := DefaultPeakEWMAConfig()
			f(&c)
			_, err := NewPeakEWMA(c)
			return err
		}
	}
	expected := func(f func(*ExpectedLatencyConfig)) func() error {
		return func() error {
			c := DefaultExpectedLatencyConfig()
			f(&c)
			_, err := NewExpectedLatency(c)
			return err
		}
	}
	type test struct {
		field, value, rule string
		make               func() error
	}
	var tests []test
	add := func(field, value, rule string, make func() error) {
		tests = append(tests, test{field, value, rule, make})
	}
	for value, v := range map[string]float64{"-1": -1, "NaN": math.NaN(), "+Inf": math.Inf(1), "-Inf": math.Inf(-1)} {
		add("load", value, "finite and at least 0", func() error { _, err := NewConstant(v); return err })
	}
	for value, v := range map[string]time.Duration{"0s": 0, "-1s": -time.Second} {
		add("decay", value, "above 0s", peak(func(c *PeakEWMAConfig) { c.Decay = v }))
		add("defaultRtt", value, "above 0s", peak(func(c *PeakEWMAConfig) { c.DefaultRTT = v }))
		add("firstFailure", value, "above 0s", expected(func(c *ExpectedLatencyConfig) { c.FirstFailure = v }))
		add("forgetAfter", value, "above 0s", expected(func(c *ExpectedLatencyConfig) { c.ForgetAfter = v }))
	}
	nan := map[string]float64{"NaN": math.NaN(), "+Inf": math.Inf(1), "-Inf": math.Inf(-1), "-1": -1}
	with := func(value string, v float64) map[string]float64 {
		m := map[string]float64{value: v}
		for value, v := range nan {
			m[value] = v
		}
		return m
	}
	for value, v := range with("0.99", 0.99) {
		add("failurePenalty", value, "between 1 and 1e+06", peak(func(c *PeakEWMAConfig) { c.FailurePenalty = v }))
		add("failurePenalty", value, "between 1 and 1e+06", expected(func(c *ExpectedLatencyConfig) { c.FailurePenalty = v }))
		add("ageLimit", value, "between 1 and 1e+06", expected(func(c *ExpectedLatencyConfig) { c.AgeLimit = v }))
		add("sampleLimit", value, "between 1 and 1e+06", expected(func(c *ExpectedLatencyConfig) { c.SampleLimit = v }))
		add("slowMethod", value, "between 1 and 1e+06", expected(func(c *ExpectedLatencyConfig) { c.SlowMethod = v }))
		add("keepSamples", value, "between 1 and 1e+06", expected(func(c *ExpectedLatencyConfig) { c.KeepSamples = v }))
	}
	for value, v := range with("1.01", 1.01) {
		add("queueExponent", value, "between 0 and 1", expected(func(c *ExpectedLatencyConfig) { c.QueueExponent = v }))
	}
	for value, v := range with("101", 101) {
		add("spreadPrior", value, "between 0 and 100", expected(func(c *ExpectedLatencyConfig) { c.SpreadPrior = v }))
		add("minSpread", value, "between 0 and 100", expected(func(c *ExpectedLatencyConfig) { c.MinSpread = v }))
	}
	for value, v := range map[string]int{"-1": -1, "10001": 10001} {
		add("maxMethods", value, "between 0 and 10000", expected(func(c *ExpectedLatencyConfig) { c.MaxMethods = v }))
	}
	for value, v := range with("0", 0) {
		add("priorSamples", value, "above 0 and at most 1000", expected(func(c *ExpectedLatencyConfig) { c.PriorSamples = v }))
		add("forgetRounds", value, "above 0 and at most 1e+06", expected(func(c *ExpectedLatencyConfig) { c.ForgetRounds = v }))
	}
	add("priorSamples", "1001", "above 0 and at most 1000", expected(func(c *ExpectedLatencyConfig) { c.PriorSamples = 1001 }))
	for _, test := range tests {
		t.Run(test.field+"="+test.value, func(t *testing.T) {
			err := test.make()
			if err == nil {
				t.Fatal("got no error")
			}
			for _, want := range []string{"load: " + test.field + ": ", test.value, "must be " + test.rule} {
				if !strings.Contains(err.Error(), want) {
					t.Errorf("error is %q, want it to contain %q", err, want)
				}
			}
			if e := (*ConfigError)(nil); !errors.As(err, &e) || e.Field != test.field {
				t.Errorf("error is %#v, want a *ConfigError of field %q", err, test.field)
			}
		})
	}
}

func TestBoundsOfParametersAreAllowed(t *testing.T) {
	for _, c := range []PeakEWMAConfig{
		{Decay: 1, DefaultRTT: 1, FailurePenalty: 1},
		{Decay: math.MaxInt64, DefaultRTT: math.MaxInt64, FailurePenalty: 1e6},
	} {
		if _, err := NewPeakEWMA(c); err != nil {
			t.Errorf("%+v: %v", c, err)
		}
	}
	for _, c := range []ExpectedLatencyConfig{
		{PriorSamples: 1e-9, QueueExponent: 0, KeepSamples: 1, ForgetRounds: 1e-9, ForgetAfter: 1, FailurePenalty: 1, FirstFailure: 1, SampleLimit: 1, AgeLimit: 1, SlowMethod: 1},
		{PriorSamples: 1000, QueueExponent: 1, KeepSamples: 1e6, ForgetRounds: 1e6, ForgetAfter: math.MaxInt64, FailurePenalty: 1e6,
			FirstFailure: math.MaxInt64, SampleLimit: 1e6, AgeLimit: 1e6, StreamAgeLimit: 1e6, SlowMethod: 1e6, SpreadPrior: 100, MinSpread: 100, MaxMethods: 10_000},
	} {
		e, err := NewExpectedLatency(c)
		if err != nil {
			t.Errorf("%+v: %v", c, err)
			continue
		}
		m := newMeter(e)
		for i := range Instant(1000) {
			run(m, i*ms, time.Duration(i), Outcome(i%4))
			if l := m.Load((i + 2) * ms); !(l >= 0 && l <= math.MaxFloat64) {
				t.Fatalf("%+v: load is %v, want finite and at least 0", c, l)
			}
		}
	}
}

func TestReconfigureWithABadValueChangesNothing(t *testing.T) {
	p := must(NewPeakEWMA(DefaultPeakEWMAConfig()))
	peak := p.params.Load()
	if err := p.Reconfigure(PeakEWMAConfig{}); err == nil {
		t.Error("PeakEWMA.Reconfigure of a zero config: got no error")
	}
	if got := p.params.Load(); got != peak {
		t.Errorf("parameters are %+v, want %+v as before", *got, *peak)
	}
	e := must(NewExpectedLatency(DefaultExpectedLatencyConfig()))
	before := e.params.Load()
	if err := e.Reconfigure(ExpectedLatencyConfig{}); err == nil {
		t.Error("ExpectedLatency.Reconfigure of a zero config: got no error")
	}
	if e.params.Load() != before {
		t.Error("parameters were replaced by those of a bad config")
	}
}

func TestOutcomesHaveNames(t *testing.T) {
	for o, want := range map[Outcome]string{
		Completed: "completed", Failed: "failed", Cancelled: "cancelled", NotSent: "not_sent", Expired: "expired", 9: "outcome(9)",
	} {
		if got := o.String(); got != want {
			t.Errorf("Outcome(%d).String() is %q, want %q", uint8(o), got, want)
		}
	}
}

func TestHotPathAllocatesNothing(t *testing.T) {
	if race.Enabled {
		t.Skip("the race detector allocates")
	}
	forEachMetric(t, func(t *testing.T, metric Metric) {
		m := newMeter(metric)
		var now Instant
		var sum float64
		got := testing.AllocsPerRun(1000, func() {
			now += 100_000
			sum += m.Load(now)
			a, b := m.Start(now), m.Start(now)
			m.Respond(now+5000, a)
			m.Finish(now+9000, Sample{Ticket: a, Responded: true, Outcome: Failed})
			m.Finish(now+9000, Sample{Ticket: b})
		})
		if got != 0 {
			t.Errorf("Load, Start, Respond and Finish: %v allocations, want 0", got)
		}
	})
}

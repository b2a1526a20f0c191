// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package load

import (
	"fmt"
	"math"
	"math/rand/v2"
	"slices"
	"testing"
	"time"
)

// reference is the formula of ExpectedLatency as it stands in its comment: with a list
// of the attempts in flight, exact powers and exponentials, and no generations.
type reference struct {
	c         ExpectedLatencyConfig
	endpoints []*referenceEndpoint
	mean      float64 // G
	undivided float64 // the mean of the latencies as they are
	queue     float64 // the mean of the attempts in flight when those latencies began
	covered   float64 // samples that the means cover, at most 200
	samples   int
}

type referenceEndpoint struct {
	s, n     float64
	heard    Instant
	heardAt  int // samples of the channel when it was heard last
	attempts map[int]*referenceAttempt
}

type referenceAttempt struct {
	started   Instant
	pending   int
	responded bool
}

func newReference(c ExpectedLatencyConfig, endpoints int) *reference {
	r := &reference{c: c}
	for range endpoints {
		r.endpoints = append(r.endpoints, &referenceEndpoint{attempts: make(map[int]*referenceAttempt)})
	}
	return r
}

// inFlight returns the number of attempts that have no response yet.
func (e *referenceEndpoint) inFlight() int {
	n := 0
	for _, a := range e.attempts {
		if !a.responded {
			n++
		}
	}
	return n
}

func (r *reference) weight(a *referenceAttempt) float64 {
	return math.Pow(float64(a.pending)+1, -r.c.QueueExponent)
}

func (r *reference) forgetting(e *referenceEndpoint, now Instant) float64 {
	rounds := float64(r.samples-e.heardAt) / (r.c.ForgetRounds * float64(len(r.endpoints)))
	return math.Exp(-float64(now-e.heard)/float64(r.c.ForgetAfter) - rounds)
}

// cost returns the cost with the sum of ages multiplied by agesTimes, and by how much it
// changes if each age changes by a microsecond.
func (r *reference) cost(e *referenceEndpoint, now Instant, agesTimes float64) (cost, rounding float64) {
	limit := math.Inf(1)
	if r.mean > 0 {
		limit = r.c.AgeLimit * r.undivided
	}
	var ages, weights float64
	for _, a := range e.attempts {
		if !a.responded {
			weights += r.weight(a)
			ages += r.weight(a) * min(float64(now-a.started), limit)
		}
	}
	f := r.forgetting(e, now)
	queue, number := float64(e.inFlight()+1), e.n*f+r.c.PriorSamples
	l := (e.s*f + ages*agesTimes + r.c.PriorSamples*max(r.mean, 1)) / number
	return l * queue, 1100 * weights / number * queue
}

func (r *reference) sample(e *referenceEndpoint, now Instant, latency float64) {
	f := r.forgetting(e, now) * (1 - 1/r.c.KeepSamples)
	e.s, e.n = e.s*f+latency, e.n*f+1
	r.samples++
	e.heard, e.heardAt = now, r.samples
}

func (r *reference) completed(e *referenceEndpoint, now Instant, a *referenceAttempt) {
	whole := max(float64(now-a.started), 1)
	latency := whole * r.weight(a)
	r.covered = min(r.covered+1, 200)
	r.undivided += (whole - r.undivided) / r.covered
	r.mean += (latency - r.mean) / r.covered
	r.queue += (float64(a.pending) - r.queue) / r.covered
	r.sample(e, now, r.bounded(latency))
}

// bounded returns a latency up to the limit of one sample.
func (r *reference) bounded(latency float64) float64 {
	return min(latency, r.c.SampleLimit*r.mean)
}

func (r *reference) finish(e *referenceEndpoint, now Instant, id int, o Outcome) {
	a := e.attempts[id]
	delete(e.attempts, id)
	switch {
	case o == Failed:
		// What the average endpoint costs, with the ages of what is in flight there.
		average := r.mean * (r.queue + 1) * (1 + r.queue/2/(r.c.KeepSamples+1))
		latency := r.c.FailurePenalty * average
		if !a.responded {
			latency = max(latency, r.bounded(max(float64(now-a.started), 1)*r.weight(a)))
		}
		r.sample(e, now, latency)
	case o == Completed && !a.responded:
		r.completed(e, now, a)
	case o == Cancelled && !a.responded:
		if age, expected := r.cancelled(e, now, a); age > expected {
			r.sample(e, now, age)
		}
	}
}

// cancelled returns the age of an attempt that is cancelled now, and what it has to
// exceed to count.
func (r *reference) cancelled(e *referenceEndpoint, now Instant, a *referenceAttempt) (age, expected float64) {
	f := r.forgetting(e, now)
	age = r.bounded(min(max(float64(now-a.started), 1), r.c.AgeLimit*r.undivided) * r.weight(a))
	return age, (e.s*f + r.c.PriorSamples*r.mean) / (e.n*f + r.c.PriorSamples)
}

// compare makes the same random attempts to five endpoints with a metric and with the
// reference. It checks, within 2 %, that each cost is between that of the reference and
// that of the reference with ages multiplied by agesAtMost. attempt returns how long the
// next attempt takes and how it ends. respond is whether some attempts have a first
// response before their end.
func compare(t *testing.T, r *rand.Rand, c ExpectedLatencyConfig, attempt func() (Instant, Outcome), respond bool, agesAtMost float64) {
	t.Helper()
	const endpoints = 5
	metric, err := NewExpectedLatency(c)
	if err != nil {
		t.Fatal(err)
	}
	want := newReference(c, endpoints)
	meters := make([]*counted, endpoints)
	now := interval(r, time.Second, time.Hour)
	for i, e := range want.endpoints {
		meters[i] = newMeter(metric)
		run(meters[i], now, 10*time.Millisecond, Completed)
		want.completed(e, now+10*ms, &referenceAttempt{started: now})
	}
	now += 10 * ms

	type planned struct {
		flight
		endpoint, id int
		end          Instant
		outcome      Outcome
	}
	var flying []*planned
	for step := range 3000 {
		now += interval(r, 50*time.Microsecond, 20*time.Millisecond)
		for i := 0; i < len(flying); {
			f := flying[i]
			if f.end > now {
				i++
				continue
			}
			e := want.endpoints[f.endpoint]
			if f.outcome == Cancelled {
				// Whether a cancelled attempt counts must not depend on rounding.
				if age, expected := want.cancelled(e, f.end, e.attempts[f.id]); relative(age, expected) < 0.05 {
					f.outcome = NotSent
				}
			}
			f.finish(f.end, f.outcome)
			want.finish(e, f.end, f.id, f.outcome)
			flying[i] = flying[len(flying)-1]
			flying = flying[:len(flying)-1]
		}
		i := r.IntN(endpoints)
		e := want.endpoints[i]
		switch k := r.IntN(10); {
		case k < 6 && len(e.attempts) < 60:
			e.attempts[step] = &referenceAttempt{started: now, pending: e.inFlight()}
			takes, outcome := attempt()
			flying = append(flying, &planned{flight{meter: meters[i], ticket: meters[i].Start(now)}, i, step, now + takes, outcome})
		case k == 6 && respond && len(flying) > 0:
			f := flying[r.IntN(len(flying))]
			if e := want.endpoints[f.endpoint]; !f.responded {
				a := e.attempts[f.id]
				f.responded, a.responded = true, true
				f.meter.Respond(now, f.ticket)
				want.completed(e, now, a)
			}
		default:
			got := meters[i].Load(now)
			least, rounding := want.cost(e, now, 1)
			most, _ := want.cost(e, now, agesAtMost)
			if got < least*0.98-rounding || got > most*1.02+rounding {
				t.Fatalf("step %d: cost of endpoint %d with %d in flight: got %v, want %v to %v within 2 %%", step, i, len(e.attempts), got, least, most)
			}
		}
	}
}

// The cost is the formula's within 2 %, and a microsecond for each attempt in
// flight. Weights are rounded to 1/4096: at most 0.8 % with 60 attempts in flight
// and theta 1. The mean of the attempts in flight has a mantissa of 16 bits, which
// over a window of 200 samples costs at most 0.6 % of a penalty. exp is within
// 0.02 %, times are within a millisecond of the second or more that ForgetAfter
// is here, and ages count in units of 1024 ns. These are bounds, not chances: no
// false failure is expected.
func TestExpectedLatencyIsTheFormula(t *testing.T) {
	r := newRand(t)
	for range 20 {
		// A variance is not in the reference.
		c := ExpectedLatencyConfig{
			PriorSamples:   float64(interval(r, 1, 100)) / 10,
			QueueExponent:  r.Float64(),
			KeepSamples:    float64(interval(r, 10, 10_000)) / 10,
			ForgetRounds:   float64(interval(r, 10, 10_000)) / 10,
			ForgetAfter:    time.Duration(interval(r, time.Second, time.Hour)),
			FailurePenalty: float64(interval(r, 10, 1000)) / 10,
			AgeLimit:       1e6, // no age in this test is as old
			FirstFailure:   time.Second,
			SampleLimit:    float64(interval(r, 10, 1000)) / 10,
			SlowMethod:     64,
		}
		compare(t, r, c, func() (Instant, Outcome) {
			o := Completed
			if r.IntN(2) == 0 {
				o = Outcome(r.IntN(4))
			}
			return interval(r, 100*time.Microsecond, 2*time.Second), o
		}, true, 1)
	}
}

// known returns a metric of n endpoints, the first of which has one sample: 10 ms.
func known(t *testing.T, n int, change func(*ExpectedLatencyConfig)) (*ExpectedLatency, []*counted) {
	t.Helper()
	c := DefaultExpectedLatencyConfig()
	c.SpreadPrior, c.SampleLimit = 0, 1e6 // they have tests of their own
	change(&c)
	e, err := NewExpectedLatency(c)
	if err != nil {
		t.Fatal(err)
	}
	meters := make([]*counted, n)
	for i := range meters {
		meters[i] = newMeter(e)
	}
	run(meters[0], 0, 10*time.Millisecond, Completed)
	return e, meters
}

func TestExpectedLatencyOfANewcomerIsTheAverages(t *testing.T) {
	e, m := known(t, 2, func(*ExpectedLatencyConfig) {})
	near(t, "cost of an endpoint without a sample", m[1].Load(10*ms), 10e6, 1e-6)
	near(t, "cost of one that has just come", newMeter(e).Load(10*ms), 10e6, 1e-6)
}

func TestExpectedLatencyBeforeAnySampleIsThePending(t *testing.T) {
	e := must(NewExpectedLatency(DefaultExpectedLatencyConfig()))
	a, b := newMeter(e), newMeter(e)
	if la, lb := a.Load(0), b.Load(0); la != lb {
		t.Errorf("costs of two endpoints of which nothing is known are %v and %v, want them equal", la, lb)
	}
	a.Start(0)
	if la, lb := a.Load(0), b.Load(0); !(la > lb) {
		t.Errorf("cost of the endpoint with an attempt in flight is %v, want above the other's, %v", la, lb)
	}
}

func TestPriorSamplesWeighTheAverageAgainstTheOwn(t *testing.T) {
	for _, n0 := range []float64{0.5, 1, 10} {
		_, m := known(t, 2, func(c *ExpectedLatencyConfig) { c.PriorSamples, c.ForgetRounds = n0, 1e6 })
		run(m[1], 10*ms, 30*time.Millisecond, Completed)
		// Own 10 ms, average 20 ms.
		near(t, "cost", m[0].Load(40*ms), (10e6+n0*20e6)/(1+n0), 0.002)
	}
}

func TestQueueExponentDividesALatencyByTheQueueItWasSentInto(t *testing.T) {
	for _, theta := range []float64{0, 0.5, 1} {
		e := must(NewExpectedLatency(func() ExpectedLatencyConfig {
			c := DefaultExpectedLatencyConfig()
			c.QueueExponent = theta
			return c
		}()))
		m := newMeter(e)
		var ts []Ticket
		for range 4 {
			ts = append(ts, m.Start(0))
		}
		for _, ticket := range ts[:3] {
			m.Finish(0, Sample{Ticket: ticket, Outcome: Cancelled})
		}
		m.Finish(40*ms, Sample{Ticket: ts[3]})
		near(t, "cost after 40ms in a queue of 4", m.Load(40*ms), 40e6/math.Pow(4, theta), 0.002)
	}
}

func TestKeepSamplesForgetsOldSamples(t *testing.T) {
	for _, keep := range []float64{1, 2, 32} {
		_, m := known(t, 1, func(c *ExpectedLatencyConfig) { c.KeepSamples, c.PriorSamples = keep, 1e-9 })
		ticket := m[0].Start(10 * ms)
		m[0].Finish(10*ms+20*ms, Sample{Ticket: ticket})
		f := 1 - 1/keep
		near(t, "cost after 10ms and 20ms", m[0].Load(30*ms), (10e6*f+20e6)/(f+1), 0.05)
	}
}

func TestTheSpreadIsThatOfOneEndpoint(t *testing.T) {
	c := DefaultExpectedLatencyConfig()
	c.MinSpread = 0.01
	e := must(NewExpectedLatency(c))
	latencies := func(times ...time.Duration) float64 {
		m := []*counted{newMeter(e), newMeter(e)}
		now := Instant(0)
		for range 200 {
			for i, meter := range m {
				ticket := meter.Start(now)
				now += Instant(times[i])
				meter.Finish(now, Sample{Ticket: ticket})
				times[i], times[i+2] = times[i+2], times[i]
			}
		}
		return m[0].Meter.Load(m[0].query(now)).Error
	}
	const kept = 30 // samples; half forgotten ones count as half
	if got, most := latencies(time.Millisecond, 20*time.Millisecond, time.Millisecond, 20*time.Millisecond), 0.03; got > most {
		t.Errorf("of two endpoints whose latencies do not vary the error is %.3f, want at most %v", got, most)
	}
	// Half of the latencies are 4 times the others: their variance is 0.36 times the square
	// of their mean.
	near(t, "error of an endpoint whose latencies vary", latencies(time.Millisecond, 20*time.Millisecond, 4*time.Millisecond, 80*time.Millisecond), math.Sqrt(0.36/kept), 0.15)
}

func TestForgetAfterDriftsBackToTheAverageByTheClock(t *testing.T) {
	for _, tau := range []time.Duration{time.Second, time.Minute} {
		_, m := known(t, 2, func(c *ExpectedLatencyConfig) { c.ForgetAfter, c.ForgetRounds = tau, 1e6 })
		run(m[1], 10*ms, 30*time.Millisecond, Completed)
		f := math.Exp(-2)
		near(t, "cost after two tau", m[0].Load(40*ms+2*Instant(tau)), (10e6*f+20e6)/(f+1), 0.005)
	}
}

func TestForgetRoundsDriftsBackToTheAverageByTheSamplesOfOthers(t *testing.T) {
	for _, rounds := range []float64{1, 8} {
		const n = 4
		_, m := known(t, n, func(c *ExpectedLatencyConfig) { c.ForgetAfter, c.ForgetRounds = math.MaxInt64, rounds })
		for i := range Instant(rounds) * n {
			run(m[1], 10*ms+i*ms, 30*time.Millisecond, Completed)
		}
		k := rounds * n
		g, f := (10e6+k*30e6)/(k+1), math.Exp(-1)
		near(t, "cost after as many rounds", m[0].Load(40*ms), (10e6*f+g)/(f+1), 0.005)
	}
}

func TestAClosedEndpointDoesNotCountInARound(t *testing.T) {
	_, m := known(t, 4, func(c *ExpectedLatencyConfig) { c.ForgetAfter, c.ForgetRounds = math.MaxInt64, 1 })
	m[2].Close()
	m[3].Close()
	run(m[1], 10*ms, 30*time.Millisecond, Completed)
	run(m[1], 10*ms, 30*time.Millisecond, Completed)
	g, f := 70e6/3, math.Exp(-1)
	near(t, "cost after a round of two endpoints", m[0].Load(40*ms), (10e6*f+g)/(f+1), 0.005)
}

func TestFailurePenaltyIsAMultipleOfTheAverageCost(t *testing.T) {
	for _, penalty := range []float64{1, 10} {
		_, m := known(t, 2, func(c *ExpectedLatencyConfig) { c.FailurePenalty = penalty })
		run(m[1], 10*ms, time.Microsecond, Failed)
		near(t, "cost after a failure within 1us", m[1].Load(10*ms), (penalty*10e6+10e6)/2, 0.005)
		run(m[1], 10*ms, time.Second, Failed)
		if got := m[1].Load(10*ms + sec); !(got > 300e6) {
			t.Errorf("cost after a failure that took 1s is %v, want it to have counted as at least 1s", time.Duration(got))
		}
	}
}

func TestAgeLimitBoundsWhatSilenceCosts(t *testing.T) {
	for _, limit := range []float64{1, 20} {
		_, m := known(t, 2, func(c *ExpectedLatencyConfig) { c.AgeLimit = limit })
		m[1].Start(10 * ms)
		var last float64
		for age := ms; age <= Instant(time.Hour); age *= 2 {
			got := m[1].Load(10*ms + age)
			near(t, "cost at "+time.Duration(age).String(), got, 2*(10e6+min(float64(age), limit*10e6)), 0.005)
			if got < last*0.999 {
				t.Errorf("cost at %v is %v, below that before, %v", time.Duration(age), got, last)
			}
			last = got
		}
	}
}

// After the window of 200 samples only every eighth sample counts in the mean that
// bounds ages. After 1600 samples of another latency, 200 of them taken for eight each,
// the older one weighs less than a thousandth.
func TestAgeLimitFollowsTheLatencies(t *testing.T) {
	_, m := known(t, 2, func(c *ExpectedLatencyConfig) { c.AgeLimit = 20 })
	now := 10 * ms
	for _, latency := range []time.Duration{100 * time.Millisecond, time.Millisecond} {
		for range 1600 {
			run(m[0], now, latency, Completed)
			now += Instant(latency)
		}
		ticket := m[1].Start(now)
		now += Instant(time.Hour)
		near(t, "cost of an hour of silence", m[1].Load(now), 2*21*float64(latency), 0.05)
		m[1].Finish(now, Sample{Ticket: ticket, Outcome: NotSent})
	}
}

// The loser of a hedge makes a server that stalls cost more, also after it has ended.
func TestAnAttemptCancelledLateCountsAsALatencyOfItsAge(t *testing.T) {
	_, m := known(t, 2, func(*ExpectedLatencyConfig) {})
	run(m[1], 10*ms, 50*time.Millisecond, Cancelled)
	near(t, "cost after 50ms of silence", m[1].Load(60*ms), (50e6+10e6)/2, 0.005)
	run(m[1], 60*ms, 20*time.Millisecond, Cancelled)
	near(t, "cost after 20ms of silence, less than expected", m[1].Load(80*ms), (50e6+10e6)/2, 0.005)
	run(m[1], 80*ms, time.Hour, Cancelled)
	if got := m[1].Load(80*ms + Instant(time.Hour)); !(got < 20*10e6) {
		t.Errorf("cost after an hour of silence is %v, want it bounded by the age limit", time.Duration(got))
	}
}

func TestBeforeAnySampleAnAttemptCancelledLateCountsAsNothing(t *testing.T) {
	e := must(NewExpectedLatency(DefaultExpectedLatencyConfig()))
	a, b := newMeter(e), newMeter(e)
	run(a, 0, time.Second, Cancelled)
	if la, lb := a.Load(sec), b.Load(sec); la != lb {
		t.Errorf("costs are %v and %v, want them equal", la, lb)
	}
}

// A black hole needs no timeout to be found out.
func TestAnEndpointThatAnswersNothingCostsMoreByTheMoment(t *testing.T) {
	_, m := known(t, 2, func(*ExpectedLatencyConfig) {})
	m[1].Start(10 * ms)
	healthy := m[0].Load(10 * ms)
	if got := m[1].Load(10*ms + 50*ms); got < 10*healthy {
		t.Errorf("cost of silence for five latencies is %v, want at least ten times the healthy %v", time.Duration(got), time.Duration(healthy))
	}
}

func TestExpectedLatencyKeepsWhatItKnowsWhenReconfigured(t *testing.T) {
	e, m := known(t, 1, func(c *ExpectedLatencyConfig) { c.PriorSamples = 1e-9 })
	m[0].Start(10 * ms)
	before := m[0].Load(10 * ms)
	c := DefaultExpectedLatencyConfig()
	c.KeepSamples, c.FailurePenalty = 2, 3
	if err := e.Reconfigure(c); err != nil {
		t.Fatal(err)
	}
	near(t, "cost after a new config", m[0].Load(10*ms), before, 1e-6)
}

func TestManyAttemptsInFlightAreWeighedAndForgottenExactly(t *testing.T) {
	_, m := known(t, 1, func(*ExpectedLatencyConfig) {})
	var flying []Ticket
	for range 5000 { // beyond the table of weights
		flying = append(flying, m[0].Start(10*ms))
	}
	var ages float64
	for q := range flying {
		ages += 10e6 / math.Sqrt(float64(q)+1)
	}
	near(t, "cost of 5000 attempts, each 10ms old", m[0].Load(20*ms), (10e6+ages+10e6)/2*5001, 0.02)
	for _, ticket := range flying {
		m[0].Finish(20*ms, Sample{Ticket: ticket, Outcome: Cancelled})
	}
	near(t, "cost when they are gone", m[0].Load(20*ms), 10e6, 0.002)
}

func TestExpNegIsWithinTwoTenthsOfAPermille(t *testing.T) {
	for x := 0.0; x < 690; x += 0.0137 {
		if got, want := expNeg(x), math.Exp(-x); relative(got, want) > 2e-4 {
			t.Fatalf("expNeg(%v) is %v, want %v within 0.02 %%", x, got, want)
		}
	}
	for _, x := range []float64{1e4, 1e300, math.Inf(1), math.NaN()} {
		if got := expNeg(x); got != 0 {
			t.Errorf("expNeg(%v) is %v, want 0", x, got)
		}
	}
}

func TestExpectedLatency(t *testing.T) {
	attempt := func(m *counted, method string, now Instant, class Class) Ticket {
		a := Attempt{Query: m.query(now), Method: method}
		a.Class = class
		return m.start(a)
	}
	call := func(m *counted, method string, start, took Instant) {
		m.Finish(start+took, Sample{Ticket: attempt(m, method, start, m.of.Class(method, false))})
	}
	t.Run("a_slow_method_does_not_make_its_endpoint_dear", func(t *testing.T) {
		e := must(NewExpectedLatency(DefaultExpectedLatencyConfig()))
		a, b := newMeter(e), newMeter(e)
		now := sec
		for range 50 {
			for _, m := range []*counted{a, b} {
				call(m, "/x/Get", now, ms)
				now += 10 * ms
			}
		}
		for range 2 { // The first says how the method compares to others.
			call(a, "/x/Export", now, 10*sec)
			now += 10 * sec
		}
		near(t, "cost after a call of a method that takes 10s", a.Load(now), b.Load(now), 0.1)
		young, old := now+5*sec, now+50*sec // The mean is 10 s.
		free, freeLater := a.Load(young), a.Load(old)
		export := attempt(a, "/x/Export", now, e.Class("/x/Export", false))
		near(t, "cost of a Get with an Export in flight for half its mean", a.Load(young), free, 1e-6)
		if got := a.Load(old); got < 1.05*freeLater {
			t.Errorf("cost of a Get with an Export in flight for five times its mean is %v, want more than %v, that of one without", got, freeLater)
		}
		near(t, "cost of the next Get with one in flight", a.Load(now+100*ms), b.Load(now+100*ms), 0.1)
		q := a.query(now + 100*ms)
		if q.Class = e.Class("/x/Export", false); q.Class != slowClass {
			t.Fatalf("class of a method that takes 10,000 times as long is %d, want %d", q.Class, slowClass)
		}
		near(t, "cost of the next Export", a.Meter.Load(q).Cost, 2*a.Load(now+100*ms), 0.1)
		a.Finish(now+10*sec, Sample{Ticket: export})
	})
	t.Run("one_sample_is_bounded", func(t *testing.T) {
		_, m := known(t, 2, func(c *ExpectedLatencyConfig) { c.SampleLimit = 20 })
		run(m[1], 10*ms, time.Hour, Completed)
		// The mean of both endpoints includes the hour.
		if got, limit := m[1].Load(10*ms+Instant(time.Hour)), 20.0*float64(time.Hour); got > limit {
			t.Errorf("cost is %v, want at most %v", time.Duration(got), time.Duration(limit))
		}
		run(m[1], 10*ms, time.Hour, Failed)
	})
	t.Run("before_the_first_success_a_failure_counts_as_a_second", func(t *testing.T) {
		e := must(NewExpectedLatency(DefaultExpectedLatencyConfig()))
		a, b := newMeter(e), newMeter(e)
		run(a, 0, time.Microsecond, Failed)
		if got := a.Load(ms); got < 0.3e9 || got < 1000*b.Load(ms) {
			t.Errorf("cost after a failure is %v and that of an unknown endpoint %v, want about half a second and nothing", time.Duration(got), b.Load(ms))
		}
	})
	t.Run("an_old_silent_attempt_counts_until_the_endpoint_is_heard_of", func(t *testing.T) {
		_, m := known(t, 2, func(*ExpectedLatencyConfig) {})
		m[1].Start(10 * ms) // never ends
		now := 10*ms + sec
		if got := m[1].Load(now); got < 20*10e6 {
			t.Errorf("cost of a second of silence is %v, want at least %v", time.Duration(got), 20*10*time.Millisecond)
		}
		for range 2 { // the attempt of the first answer may have been sent at the same time
			run(m[1], now, 10*time.Millisecond, Completed)
			now += sec
		}
		near(t, "cost after other attempts were answered", m[1].Load(now), m[0].Load(now), 0.1)
	})
	t.Run("a_silent_stream_counts_as_one_mean_and_then_not", func(t *testing.T) {
		_, m := known(t, 2, func(*ExpectedLatencyConfig) {})
		for _, meter := range m {
			ticket := meter.start(Attempt{Query: meter.query(10 * ms), Method: "/test/Call", Stream: true})
			meter.Respond(20*ms, ticket)
			meter.Finish(20*ms, Sample{Ticket: ticket, Responded: true})
		}
		m[1].start(Attempt{Query: m[1].query(20 * ms), Method: "/test/Call", Stream: true})
		now := 20*ms + 100*ms
		if got, most := m[1].Load(now), 2*2*10e6; got > most {
			t.Errorf("cost after 100ms is %v, want at most %v", time.Duration(got), time.Duration(most))
		}
		now += sec
		near(t, "cost after a second", m[1].Load(now), m[0].Load(now), 0.1)
	})
	t.Run("the_error_falls_with_the_samples_and_rises_with_the_spread", func(t *testing.T) {
		errorAfter := func(samples int, spread Instant) float64 {
			e := must(NewExpectedLatency(DefaultExpectedLatencyConfig()))
			m := newMeter(e)
			for i := range Instant(samples) {
				latency := 10 * ms
				if i%10 == 0 {
					latency += spread
				}
				run(m, i*sec, time.Duration(latency), Completed)
			}
			return m.Meter.Load(m.query(Instant(samples) * sec)).Error
		}
		few, many, wide := errorAfter(2, 0), errorAfter(100, 0), errorAfter(100, sec)
		if !(many < few && many < wide) || few > 1 {
			t.Errorf("error after 2 samples is %v, after 100 %v, with one in ten 100 times as long %v", few, many, wide)
		}
	})
	t.Run("methods_beyond_the_table_share_a_mean", func(t *testing.T) {
		e := must(NewExpectedLatency(func() ExpectedLatencyConfig {
			c := DefaultExpectedLatencyConfig()
			c.MaxMethods = 6
			return c
		}()))
		m := newMeter(e)
		for i := range Instant(20) {
			call(m, fmt.Sprint("/x/", i), i*sec, 10*ms)
		}
		if got := len(e.methods.Load().all); got != 7 {
			t.Errorf("the table has %d means, want 6 and one for the others", got)
		}
		near(t, "cost", m.Load(20*sec), 10e6, 0.1)
	})
}

// Sums of ages are never too small, and too large by at most a third: half of a
// group at one and a half limits, half of it at half a limit.
func TestAges(t *testing.T) {
	const never = -Instant(time.Hour)
	t.Run("are_bounded_by_generation", func(t *testing.T) {
		r := newRand(t)
		const limit = float64(100 * ms)
		type flying struct {
			started, end Instant
			epoch        uint32
		}
		var a ages
		var list []flying
		now := Instant(time.Hour)
		for range 5000 {
			now += interval(r, 100*time.Microsecond, 20*time.Millisecond)
			list = slices.DeleteFunc(list, func(f flying) bool {
				if f.end > now {
					return false
				}
				a.remove(f.epoch, weightOne, f.started)
				return true
			})
			list = append(list, flying{now, now + interval(r, time.Millisecond, time.Second), a.add(weightOne, now, limit)})
			var want float64
			for _, f := range list {
				want += min(float64(now-f.started), limit)
			}
			slack := 1100*float64(len(list)) + limit*1e-3
			sum, weight, _, left := a.sum(now, never, limit, limit, true)
			if sum < want-slack || sum > want*4/3+slack || weight != float64(len(list)) || left != 0 {
				t.Fatalf("sum is %v with weight %v and %d left out, want %v to %v, %d and 0", sum, weight, left, want, want*4/3, len(list))
			}
		}
		for _, f := range list {
			a.remove(f.epoch, weightOne, f.started)
		}
		if got := a.total(); got != 0 {
			t.Errorf("total is %d at rest, want 0", got)
		}
	})
	t.Run("of_old_attempts_count_if_nothing_was_heard_since", func(t *testing.T) {
		var a ages
		limit := float64(10 * ms)
		a.add(weightOne, sec, limit)
		for _, c := range []struct {
			heard     Instant
			sign      bool
			sum       float64
			old, left int
		}{
			{never, true, limit, 1, 0},
			{sec + 5*ms, true, limit, 1, 0}, // it may have been sent after that
			{sec + 15*ms, true, 0, 1, 1},
			{never, false, 0, 1, 1},
		} {
			sum, _, old, left := a.sum(2*sec, c.heard, limit, limit, c.sign)
			if math.Abs(sum-c.sum) > 2000 || old != c.old || left != c.left {
				t.Errorf("heard at %v, sign %t: got %v, %d old and %d left out, want %v, %d and %d",
					time.Duration(c.heard), c.sign, sum, old, left, c.sum, c.old, c.left)
			}
		}
	})
}

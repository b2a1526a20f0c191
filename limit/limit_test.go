// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package limit_test

import (
	"testing"
	"time"

	"github.com/belfry-go/belfry/limit"
)

const ms = time.Millisecond

// feed gives a limit one round of samples after the other: as many as it allows,
// or inFlight if that is not zero, all started and ended together.
type feed struct {
	limit.Algorithm
	now limit.Instant
}

func newFeed(l limit.Algorithm) *feed { return &feed{l, limit.Instant(time.Hour)} }

func (f *feed) round(n int64, rtt time.Duration, dropped int64) {
	if n == 0 {
		n = f.Limit()
	}
	for i := range n {
		s := limit.Sample{Start: f.now, RTT: rtt, InFlight: n}
		if i < dropped {
			s.Result = limit.Dropped
		}
		f.OnSample(s)
	}
	f.now += limit.Instant(rtt + 1)
}

// queueing is a server that works on n calls at a time, base each.
func queueing(n int64, base time.Duration) func(inFlight int64) time.Duration {
	return func(inFlight int64) time.Duration {
		return max(base, base*time.Duration(inFlight)/time.Duration(n))
	}
}

func check(t *testing.T, what string, got, lo, hi int64) {
	t.Helper()
	if got < lo || got > hi {
		t.Errorf("%s: limit %d, want %d to %d", what, got, lo, hi)
	}
}

func must[T any](t testing.TB) func(T, error) T {
	return func(v T, err error) T {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
}

func TestAIMD(t *testing.T) {
	f := newFeed(must[*limit.AIMD](t)(limit.NewAIMD(limit.AIMDConfig{Initial: 30, Max: 40})))
	for i := range int64(5) {
		f.round(0, 10*ms, 0)
		// A round of L samples adds 1/L each, to a limit that grows meanwhile.
		check(t, "after a round of successes", f.Limit(), 30+i, 31+i)
	}
	for range 20 {
		f.round(0, 10*ms, 0)
	}
	check(t, "at the upper bound", f.Limit(), 40, 40)
	f.round(0, 10*ms, 40)
	check(t, "after 40 drops of one round", f.Limit(), 36, 36) // Netflix's ratio, 0.9.
	f.round(0, 10*ms, 1)
	check(t, "after a drop of the next round", f.Limit(), 32, 33)
	for range 100 {
		f.round(0, 10*ms, 1)
	}
	check(t, "a drop in every round, where +1 and -10% balance", f.Limit(), 8, 11)
}

func TestAIMDIdleClient(t *testing.T) {
	f := newFeed(must[*limit.AIMD](t)(limit.NewAIMD(limit.AIMDConfig{Initial: 30})))
	for range 100 {
		f.round(14, 10*ms, 0)
	}
	check(t, "a client that uses 14 of 30", f.Limit(), 30, 30)
	for range 3 {
		f.round(15, 10*ms, 0)
	}
	check(t, "a client that uses half", f.Limit(), 31, 31)
}

func TestAIMDTimeout(t *testing.T) {
	f := newFeed(must[*limit.AIMD](t)(limit.NewAIMD(limit.AIMDConfig{Initial: 30, Timeout: 50 * ms})))
	f.round(0, 51*ms, 0)
	check(t, "successes over the timeout", f.Limit(), 27, 27)
	if got := f.Algorithm.(limit.Explainer).Explain(); got != (limit.State{Lowered: "latency"}) {
		t.Errorf("the algorithm thinks %+v, want only that the latency lowered the limit", got)
	}
	f.round(0, 50*ms, 0)
	check(t, "successes at the timeout", f.Limit(), 27, 28)
	f.OnSample(limit.Sample{Start: f.now, RTT: 49 * ms, InFlight: 28, Result: limit.GivenUp})
	check(t, "a call given up before the timeout", f.Limit(), 27, 28)
	f.OnSample(limit.Sample{Start: f.now, RTT: 51 * ms, InFlight: 28, Result: limit.GivenUp})
	check(t, "a call given up after the timeout", f.Limit(), 25, 25)
}

func TestGradient2Formula(t *testing.T) {
	// As published: it acts on each sample.
	g := must[*limit.Gradient2](t)(limit.NewGradient2(limit.Gradient2Config{Initial: 50, Window: 1, WindowSamples: 1}))
	at := limit.Instant(time.Hour)
	want := 50.0
	sample := func(what string, rtt time.Duration) {
		t.Helper()
		at += limit.Instant(time.Second)
		g.OnSample(limit.Sample{Start: at, RTT: rtt, InFlight: g.Limit()})
		check(t, what, g.Limit(), int64(want), int64(want))
	}
	for range 10 {
		want = 0.8*want + 0.2*(want+4)
		sample("no queueing: gradient 1", 10*ms)
	}
	long := 10 + 2.0/601*(40-10)
	want = 0.8*want + 0.2*(0.5*want+4)
	sample("1.5·10.1/40 is below the least gradient, 0.5", 40*ms)
	long += 2.0 / 601 * (20 - long)
	want = 0.8*want + 0.2*(1.5*long/20*want+4)
	sample("1.5·10.13/20: gradient 0.76", 20*ms)
	long += 2.0 / 601 * (4 - long)
	want += 0.8
	sample("faster than ever", 4*ms)
	long *= 0.95 // For it was more than twice as long.
	long += 2.0 / 601 * (20 - long)
	want = 0.8*want + 0.2*(1.5*long/20*want+4)
	sample("1.5·9.63/20: gradient 0.72", 20*ms)
}

func TestGradient2(t *testing.T) {
	cfg := limit.Gradient2Config{Min: 1, Max: 1000, Window: 10 * ms}
	newG := func() *feed { return newFeed(must[*limit.Gradient2](t)(limit.NewGradient2(cfg))) }

	f := newG()
	for range 200 {
		f.round(0, 10*ms, 0)
	}
	up := f.Limit()
	check(t, "200 rounds without queueing", up, 80, 200)

	// Four times the long-term latency: gradient 0.5, at first.
	for range 10 {
		f.round(0, 40*ms, 0)
	}
	check(t, "ten slow rounds", f.Limit(), up/4, up*3/4)

	f = newG()
	for range 200 {
		f.round(9, 10*ms, 0)
	}
	check(t, "a client that uses 9 of 20", f.Limit(), 20, 20)

	f = newG()
	f.round(0, 10*ms, 20)
	check(t, "a round of drops", f.Limit(), 18, 18)

	// A server of 40 workers, 10 ms each: what is in flight settles where the round
	// trip is about Tolerance times the long-term one, so not below the workers
	// and not at the upper bound.
	f = newG()
	rtt := queueing(40, 10*ms)
	for range 300 {
		f.round(0, rtt(f.Limit()), 0)
	}
	check(t, "a server of 40 workers", f.Limit(), 40, 200)
}

func TestVegas(t *testing.T) {
	f := newFeed(must[*limit.Vegas](t)(limit.NewVegas(limit.VegasConfig{Window: 10 * ms})))
	rtt := queueing(60, 10*ms)
	for range 200 {
		f.round(0, rtt(f.Limit()), 0)
	}
	// With log10(limit) = 1, three to six calls queue.
	check(t, "a server of 60 workers", f.Limit(), 62, 67)

	rtt = queueing(30, 10*ms) // The server loses half its workers.
	for range 100 {
		f.round(0, rtt(f.Limit()), 0)
	}
	check(t, "the server at half its speed", f.Limit(), 32, 37)

	rtt = queueing(1_000_000, 10*ms)
	for range 1000 {
		f.round(0, rtt(f.Limit()), 0)
	}
	check(t, "no queueing at all", f.Limit(), 1000, 1000)
	f.round(0, 10*ms, 1000)
	check(t, "drops", f.Limit(), 997, 997) // By log10(1000), once.
}

func TestVegasProbe(t *testing.T) {
	f := newFeed(must[*limit.Vegas](t)(limit.NewVegas(limit.VegasConfig{Window: 10 * ms, ProbeWindows: 50})))
	for range 60 {
		f.round(10, 10*ms, 0)
	}
	check(t, "a client that uses 10 of 20, at first", f.Limit(), 21, 26)
	before := f.Limit()
	for range 45 { // The path has become longer; so far that looks like a queue.
		f.round(before, 30*ms, 0)
	}
	if got := f.Limit(); got >= before {
		t.Errorf("limit %d after the round trip became longer, want less than %d", got, before)
	}
	low := f.Limit()
	for range 200 {
		f.round(0, 30*ms, 0)
	}
	if got := f.Limit(); got <= low {
		t.Errorf("limit %d after the new round trip was found to be the best, want more than %d", got, low)
	}
}

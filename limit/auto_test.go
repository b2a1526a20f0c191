// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package limit_test

import (
	"testing"
	"time"

	"github.com/belfry-go/belfry/limit"
)

// autoFeed gives an Auto rounds of calls, as many as it allows, that start together.
type autoFeed struct {
	*limit.Auto
	now limit.Instant
}

func newAutoFeed(t *testing.T, cfg limit.AutoConfig) *autoFeed {
	t.Helper()
	f := &autoFeed{Auto: must[*limit.Auto](t)(limit.NewAuto(cfg)), now: limit.Instant(time.Hour)}
	// The wall clock is at a multiple of 30 s when now is.
	f.SetWallClock(func(at limit.Instant) time.Time { return time.Unix(0, int64(at)) })
	return f
}

// round ends n calls, or as many as the limit allows if n is 0, after rtt.
func (f *autoFeed) round(n int64, rtt time.Duration, result limit.Result, limited bool) {
	if n == 0 {
		n = f.Limit()
	}
	samples := make([]limit.Sample, n)
	for i := range samples {
		samples[i] = limit.Sample{Start: f.now, RTT: rtt, InFlight: n, Limited: limited, Result: result, Mark: f.OnStart()}
	}
	for _, s := range samples {
		f.OnSample(s)
	}
	f.now += limit.Instant(rtt + 1)
}

// until feeds rounds until a time after the first call.
func (f *autoFeed) until(after, rtt time.Duration, limited bool) {
	for f.now < limit.Instant(time.Hour+after) {
		f.round(0, rtt, limit.Succeeded, limited)
	}
}

func TestAuto(t *testing.T) {
	t.Run("grows_only_while_the_limit_holds_calls_back", func(t *testing.T) {
		f := newAutoFeed(t, limit.AutoConfig{})
		f.until(2*time.Second, 10*ms, false)
		check(t, "no call was refused", f.Limit(), 20, 20)
		f.until(3*time.Second, 10*ms, true)
		check(t, "calls were refused for a second", f.Limit(), 100, 20*100)
	})
	t.Run("shrinks_when_latency_rises", func(t *testing.T) {
		f := newAutoFeed(t, limit.AutoConfig{})
		f.until(time.Second, 10*ms, false)
		f.until(5*time.Second, 30*ms, true)
		check(t, "four seconds of three times the latency", f.Limit(), 1, 12)
	})
	t.Run("drops", func(t *testing.T) {
		f := newAutoFeed(t, limit.AutoConfig{})
		f.until(time.Second, 10*ms, false)
		f.round(20, 10*ms, limit.Dropped, true)
		check(t, "20 drops of calls that ran together", f.Limit(), 18, 18)
		f.round(1, 10*ms, limit.Dropped, true)
		check(t, "a drop of a later call", f.Limit(), 16, 16)
	})
	t.Run("an_outage_counts_as_one_drop", func(t *testing.T) {
		f := newAutoFeed(t, limit.AutoConfig{})
		f.until(time.Second, 10*ms, false)
		for range 10 { // Of a second each, so that one drop of each counts.
			f.round(0, time.Second, limit.Dropped, true)
		}
		check(t, "during an outage of ten seconds", f.Limit(), 6, 8)
		f.until(11300*ms, 10*ms, true)
		check(t, "0.3 s after it", f.Limit(), 18, 22)
		for range 10 {
			f.round(0, time.Second, limit.Dropped, true)
		}
		f.until(23*time.Second, 100*ms, true)
		check(t, "when the server is slower after an outage", f.Limit(), 1, 10)
	})
	t.Run("calls_given_up", func(t *testing.T) {
		f := newAutoFeed(t, limit.AutoConfig{})
		f.until(time.Second, 10*ms, false)
		for range 100 {
			f.round(20, 5*ms, limit.GivenUp, true)
		}
		check(t, "sooner than the usual latency", f.Limit(), 20, 20)
		for range 20 {
			f.round(20, 100*ms, limit.GivenUp, true)
		}
		check(t, "after ten times the usual latency", f.Limit(), 1, 16)
		if got := f.Explain().Latency; got > 20*ms {
			t.Errorf("latency %v after calls that were given up, want 10 to 20 ms: nobody knows how long they would have taken", got)
		}
	})
	t.Run("bounds", func(t *testing.T) {
		f := newAutoFeed(t, limit.AutoConfig{Initial: 30, Min: 25, Max: 40})
		f.until(2*time.Second, 10*ms, true)
		check(t, "without a queue", f.Limit(), 40, 40)
		for at := 2 * time.Second; at < 22*time.Second; at += 100 * ms {
			f.until(at, 50*ms, true)
			check(t, "with a queue, and in a drain", f.Limit(), 25, 40)
		}
	})
}

func TestAutoDrain(t *testing.T) {
	// drains feeds an overload for a minute and returns when the limit was lowered.
	drains := func(t *testing.T, cfg limit.AutoConfig, latency func(int64) time.Duration) (began []time.Duration, f *autoFeed) {
		f = newAutoFeed(t, cfg)
		before := f.Limit()
		for f.now < limit.Instant(time.Hour+65*time.Second) {
			f.round(0, latency(f.Limit()), limit.Succeeded, true)
			if n := f.Limit(); n < before*2/3 {
				began = append(began, time.Duration(f.now)-time.Hour)
			}
			before = f.Limit()
		}
		return began, f
	}
	t.Run("at_multiples_of_twenty_seconds", func(t *testing.T) {
		began, f := drains(t, limit.AutoConfig{}, queueing(20, 10*ms))
		if len(began) != 5 {
			t.Fatalf("drains at %v, want 5", began)
		}
		for i, want := range []time.Duration{5, 10, 20, 40, 60} {
			if late := began[i] - want*time.Second; late < 0 || late > 100*ms {
				t.Errorf("drain %d at %v, want %v s", i, began[i], int64(want))
			}
		}
		check(t, "after a minute of overload", f.Limit(), 22, 40)
	})
	t.Run("less_often_where_calls_take_longer", func(t *testing.T) {
		began, _ := drains(t, limit.AutoConfig{}, queueing(20, 100*ms))
		// When it is known how long calls take, the next is at a multiple of 80 s.
		if len(began) == 0 || began[len(began)-1] > 21*time.Second {
			t.Errorf("drains at %v, want them within 20 s", began)
		}
	})
	t.Run("none", func(t *testing.T) {
		if began, _ := drains(t, limit.AutoConfig{NoDrains: true}, queueing(20, 10*ms)); len(began) > 0 {
			t.Errorf("drains at %v, want none", began)
		}
	})
	t.Run("not_without_a_queue", func(t *testing.T) {
		f := newAutoFeed(t, limit.AutoConfig{})
		for at := time.Second; at < 45*time.Second; at += 10 * ms {
			f.until(at, 10*ms, false)
			check(t, "a server without a queue", f.Limit(), 20, 20)
		}
	})
	t.Run("measures_a_server_that_has_become_slower", func(t *testing.T) {
		f := newAutoFeed(t, limit.AutoConfig{})
		for _, p := range []struct {
			until   time.Duration
			service time.Duration
		}{
			// Chance explains the small changes: base moves a part of the way.
			{15 * time.Second, 10 * ms}, {30 * time.Second, 10100 * time.Microsecond}, {41 * time.Second, 10050 * time.Microsecond},
			{48 * time.Second, 20 * ms},
		} {
			for f.now < limit.Instant(time.Hour+p.until) {
				f.round(0, queueing(20, p.service)(f.Limit()), limit.Succeeded, true)
			}
		}
		if got := f.Explain().Baseline; got < 19*ms || got > 21*ms {
			t.Errorf("baseline %v seven seconds after the work took 20 ms, want that", got)
		}
		check(t, "seven seconds after the work took twice as long", f.Limit(), 22, 40)
	})
	t.Run("the_baseline_stays_within_what_was_measured", func(t *testing.T) {
		f := newAutoFeed(t, limit.AutoConfig{Initial: 500})
		for second := time.Second; second < 45*time.Second; second += time.Second {
			rtt := 10*ms + ms*(second/time.Second/20%2) // A cohort is of thousands of calls, and base stands for 240.
			f.until(second, rtt, false)
			if got := f.Explain().Baseline; got > 0 && (got < 10*ms-1 || got > 11*ms+1) {
				t.Fatalf("baseline %v after %v, want 10 to 11 ms", got, second)
			}
		}
	})
	t.Run("waits_for_the_slow_calls_of_a_cohort", func(t *testing.T) {
		f := newAutoFeed(t, limit.AutoConfig{})
		// The first calls are the first cohort. One of four takes 250 ms, the others 10.
		var slow []limit.Sample
		for range 15 {
			for i := range 20 {
				s := limit.Sample{Start: f.now, RTT: 10 * ms, InFlight: 20, Limited: true, Mark: f.OnStart()}
				if i%4 == 0 {
					s.RTT = 250 * ms
					slow = append(slow, s)
				} else {
					f.OnSample(s)
				}
			}
			f.now += limit.Instant(10*ms + 1)
			check(t, "while calls of the cohort run", f.Limit(), 20, 20)
		}
		for _, s := range slow {
			f.OnSample(s)
		}
		f.now += limit.Instant(250 * ms)
		// Their mean is 70 ms: calls of 70 ms meet no queue, and the limit grows.
		f.until(time.Second, 70*ms, true)
		check(t, "calls that take as long as the cohort's mean", f.Limit(), 21, 20*10)
	})
}

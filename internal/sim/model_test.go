// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package sim

import (
	"fmt"
	"math"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"time"
)

// The tests of this package have fixed seeds and simulated time, so they either
// always pass or always fail. The tolerances are for what a run of that length
// can know; they are some five times the standard error.

func exponentialLaw(r *rand.Rand) float64 { return r.ExpFloat64() }

// checkNear reports an error unless got is within a share of want.
func checkNear(t *testing.T, what string, got, want, tolerance float64) {
	t.Helper()
	if math.Abs(got/want-1) > tolerance {
		t.Errorf("%s is %.4g, want %.4g within %.0f %%", what, got, want, 100*tolerance)
	}
}

// A run depends on nothing but its seed.
func TestRunIsDetermined(t *testing.T) {
	for _, name := range []string{"speeds 1:2:4", "2 of 20 replaced by cold ones", "processor sharing, antagonists"} {
		for _, p := range []Policy{policy(t, "oracle"), policy(t, "default"), policy(t, "peakEwma")} {
			t.Run(name+"/"+p.Name, func(t *testing.T) {
				t.Parallel()
				s := scenario(t, name)
				// Until servers have been replaced, for the first time after 10 s.
				s.Load, s.WarmUp, s.Period = 0.05, 10*time.Second, 0
				first := mustRun(t, s, p, Options{Calls: 1000, Seed: 7})
				again := mustRun(t, s, p, Options{Calls: 1000, Seed: 7})
				if !slices.Equal(first.latencies, again.latencies) {
					t.Error("two runs from one seed differ")
				}
				other := mustRun(t, s, p, Options{Calls: 1000, Seed: 8})
				if slices.Equal(first.latencies, other.latencies) {
					t.Error("runs from two seeds are the same")
				}
			})
		}
	}
}

func TestPoliciesMeetTheSameCalls(t *testing.T) {
	s := base()
	s.Servers, s.Clients, s.WarmUp = 1, 3, 0
	want := mustRun(t, s, policy(t, "oracle"), Options{Calls: 5000, Seed: 3})
	for _, p := range Policies() {
		got := mustRun(t, s, p, Options{Calls: 5000, Seed: 3})
		if !slices.Equal(got.latencies, want.latencies) {
			t.Errorf("%s: latencies at the only server differ from the oracle's", p.Name)
		}
	}
}

// With random choice each of n servers is a queue of its own, M/M/c. Its mean
// waiting time is Erlang's C over c*mu - lambda.
func TestRandomChoiceWaitsAsErlangSays(t *testing.T) {
	const load = 0.7
	for _, workers := range []int{1, 4} {
		t.Run(fmt.Sprint(workers), func(t *testing.T) {
			t.Parallel()
			s := base()
			s.Servers, s.Workers, s.Load = 5, workers, load
			s.WarmUp, s.Deadline = 2*time.Second, 0
			s.law = exponentialLaw
			r := mustRun(t, s, policy(t, "random"), Options{Calls: 60_000, Seed: 1})

			c := float64(workers)
			offered := load * c
			blocked := 1.0 // Erlang's B, by its recursion
			for k := 1.0; k <= c; k++ {
				blocked = offered * blocked / (k + offered*blocked)
			}
			waits := blocked / (1 - load*(1-blocked))
			mean := s.Mean.Seconds()
			want := 2*s.transit().Seconds() + mean + waits*mean/(c*(1-load))
			checkNear(t, "mean latency in seconds", r.Mean().Seconds(), want, 0.05)
		})
	}
}

// The mean under processor sharing with one worker is mean/(1-load), whatever
// the law of the work.
func TestProcessorSharingHasTheMeanOfItsClosedForm(t *testing.T) {
	for name, law := range map[string]func(*rand.Rand) float64{"lognormal": lognormal, "exponential": exponentialLaw, "uniform": uniform} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := base()
			s.Servers, s.Workers, s.Sharing, s.Load = 3, 1, true, 0.7
			s.WarmUp, s.Deadline = 2*time.Second, 0
			s.law = law
			r := mustRun(t, s, policy(t, "random"), Options{Calls: 40_000, Seed: 1})
			want := 2*s.transit().Seconds() + s.Mean.Seconds()/(1-s.Load)
			checkNear(t, "mean latency in seconds", r.Mean().Seconds(), want, 0.05)
		})
	}
}

func TestLittlesLawHoldsInAClosedLoop(t *testing.T) {
	for _, workers := range []int{0, 4} {
		for _, name := range []string{"oracle", "default", "random"} {
			s := base()
			s.Workers, s.InFlight, s.WarmUp, s.Deadline = workers, 200, 200*time.Millisecond, 0
			r := mustRun(t, s, policy(t, name), Options{Calls: 10_000, Seed: 1})
			if r.Calls != 10_000 {
				t.Errorf("measured %d calls, want 10000", r.Calls)
			}
			inFlight := float64(r.Calls) / r.Elapsed.Seconds() * r.Mean().Seconds()
			checkNear(t, fmt.Sprintf("%s, %d workers: throughput times latency", name, workers), inFlight, 200, 0.03)
		}
	}
}

// Servers with nothing else to do take as long as the work is.
func TestLatencyOfIdleServersIsThatOfTheLaw(t *testing.T) {
	s := base()
	s.Load, s.WarmUp = 0.05, 0
	r := mustRun(t, s, policy(t, "oracle"), Options{Calls: 50_000, Seed: 1})
	for _, c := range []struct{ p, z float64 }{{0.5, 0}, {0.9, 1.2816}, {0.99, 2.3263}} {
		want := 2*s.transit().Seconds() + s.Mean.Seconds()*math.Exp(0.6*c.z-0.18)
		checkNear(t, fmt.Sprintf("percentile %v in seconds", c.p), r.Percentile(c.p).Seconds(), want, 0.02)
	}
	checkNear(t, "calls per second", float64(r.Calls)/r.Elapsed.Seconds(), 0.05*20*4/0.010, 0.02)
}

// A server at a quarter of the speed takes four times as long, one that stops
// for a second goes on where it was, whichever way its calls are served.
func TestCallsGoOnAtTheNewSpeed(t *testing.T) {
	for _, sharing := range []bool{false, true} {
		s := base()
		s.Servers, s.Clients, s.Workers, s.Sharing = 1, 1, 1, sharing
		s.InFlight, s.WarmUp, s.Deadline = 1, 0, 0
		s.Network, s.Jitter = 0, 0
		s.Mean = 100 * time.Millisecond
		s.law = func(*rand.Rand) float64 { return 1 }
		s.faults = func(c *cluster) {
			c.after(140*time.Millisecond, func() { c.servers[0].setSpeed(0.25) })
			c.after(180*time.Millisecond, func() { c.servers[0].stop(true) })
			c.after(1180*time.Millisecond, func() { c.servers[0].stop(false) })
			c.after(1380*time.Millisecond, func() { c.servers[0].setSpeed(1) })
		}
		r := mustRun(t, s, policy(t, "oracle"), Options{Calls: 2, Seed: 1})
		// 40 ms at speed 1, 40 ms at 1/4 for 10 more, the stop, 200 ms for the last 50.
		want := []int64{100e6, 40e6 + 40e6 + 1000e6 + 200e6}
		if !slices.Equal(r.latencies, want) {
			t.Errorf("sharing %t: latencies are %d, want %d", sharing, r.latencies, want)
		}
	}
}

func TestDeadlinesEndCallsThatGetNoAnswer(t *testing.T) {
	s := base()
	s.WarmUp, s.Servers = 0, 2
	s.faults = func(c *cluster) {
		for _, srv := range c.servers {
			srv.behaviour = silent
		}
	}
	r := mustRun(t, s, policy(t, "default"), Options{Calls: 500, Seed: 1})
	if r.Calls < 400 || r.Expired != r.Calls || r.Failed != 0 {
		t.Errorf("%d of %d calls expired and %d failed, want some 500, all of them, and 0", r.Expired, r.Calls, r.Failed)
	}
	if least := r.Percentile(0); least != s.Deadline {
		t.Errorf("the shortest latency is %v, want the deadline %v", least, s.Deadline)
	}
	s.Deadline, s.InFlight = 0, 10
	if _, err := Run(s, policy(t, "default"), Options{Calls: 500, Seed: 1}); err == nil || !strings.Contains(err.Error(), "deadline") {
		t.Errorf("without a deadline the error is %v, want one that asks for it", err)
	}
}

// Bad scenarios are errors that name the field.
func TestBadScenarios(t *testing.T) {
	for field, spoil := range map[string]func(*Scenario){
		"Clients":  func(s *Scenario) { s.Clients = 0 },
		"Servers":  func(s *Scenario) { s.Servers = -1 },
		"Workers":  func(s *Scenario) { s.Workers = -1 },
		"Mean":     func(s *Scenario) { s.Mean = 0 },
		"Calls":    func(s *Scenario) { s.Calls = -1 },
		"InFlight": func(s *Scenario) { s.InFlight = -1 },
		"Load":     func(s *Scenario) { s.Load = math.NaN() },
		"Network":  func(s *Scenario) { s.Network = -1 },
		"Jitter":   func(s *Scenario) { s.Jitter = -1 },
		"WarmUp":   func(s *Scenario) { s.WarmUp = -1 },
		"Deadline": func(s *Scenario) { s.Deadline = -1 },
		"Speeds":   func(s *Scenario) { s.Speeds = []float64{1, 0} },
	} {
		s := base()
		spoil(&s)
		if _, err := Run(s, policy(t, "oracle"), Options{Calls: 1}); err == nil || !strings.Contains(err.Error(), "Scenario."+field) {
			t.Errorf("error is %v, want one that names %s", err, field)
		}
	}
	if _, err := Run(base(), policy(t, "oracle"), Options{}); err == nil || !strings.Contains(err.Error(), "Options.Calls") {
		t.Errorf("error is %v, want one that names Options.Calls", err)
	}
	if _, err := Run(base(), Policy{Name: "x", Balancer: "no such"}, Options{Calls: 1}); err == nil || !strings.Contains(err.Error(), "no such") {
		t.Errorf("error is %v, want one that names the policy", err)
	}
	if _, err := Run(base(), Policy{Name: "x", Balancer: "belfry.p2c", Config: `{"choiceCount":1}`}, Options{Calls: 1}); err == nil || !strings.Contains(err.Error(), "choiceCount") {
		t.Errorf("error is %v, want that of the policy's config", err)
	}
}

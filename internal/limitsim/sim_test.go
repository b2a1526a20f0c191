// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package limitsim

import (
	"fmt"
	"math"
	"slices"
	"testing"
	"time"
)

// The model agrees with queueing theory where that has a formula.
func TestModel(t *testing.T) {
	within := func(what string, got, want, part float64) {
		t.Helper()
		if math.Abs(got-want) > part*want {
			t.Errorf("%s: %.3f, want %.3f", what, got, want)
		}
	}
	run := func(sc Scenario, limit int64) Result {
		sc.WarmUp, sc.Length = 5*time.Second, 100*time.Second
		r, err := Row{Scenario: sc, Ideal: limit}.Run("ideal", 1)
		if err != nil {
			t.Fatal(err)
		}
		return r[0]
	}
	// Erlang C of 4 workers at 0.8: P(wait) 0.5964, so a mean wait of 0.5964/(4×0.2).
	within("M/M/4 at 0.8: latency", run(Scenario{Workers: 4, Load: 0.8}, 10_000).Latency, 1+0.5964/0.8, 0.04)
	// Processor sharing of one core: 1/(1-load) whatever the law.
	for name, law := range map[string]Law{"exponential": Exponential, "constant": Constant, "lognormal": Lognormal} {
		within("one shared core at 0.5, "+name+": latency", run(Scenario{Workers: 1, Shared: true, Load: 0.5, Law: law}, 10_000).Latency, 2, 0.12)
	}
	// Erlang B of 4 workers at 1: 0.3107 refused.
	r := run(Scenario{Workers: 4, Load: 1}, 4)
	within("4 workers, limit 4: refused", r.Refused, 0.3107, 0.02)
	within("4 workers, limit 4: latency", r.Latency, 1, 0.02)
	within("4 workers, a queue of 1, which refuses: rejected", run(Scenario{Workers: 4, Load: 1, Queue: 1}, 10_000).Rejected, 0.2371, 0.06)
	// A closed loop of ten callers keeps four workers busy, and each waits 10/4.
	r = run(Scenario{Workers: 4, Callers: 10}, 10)
	within("ten callers: goodput", r.Goodput, 1, 0.02)
	within("ten callers: latency", r.Latency, 2.5, 0.02)
	if r := run(Scenario{Workers: 1, Load: 3}, 10_000); r.Late < 0.5 {
		t.Errorf("three times the capacity without a limit: late %.2f, want most", r.Late)
	}
}

func TestRunDependsOnTheSeed(t *testing.T) {
	sc := Scenario{Workers: 4, Clients: 3, Load: 1.2, Length: 10 * time.Second, ClockError: time.Second}
	var got []string
	for _, seed := range []uint64{1, 1, 2} {
		r, err := Row{Scenario: sc}.Run("auto", seed)
		if err != nil {
			t.Fatal(err)
		}
		got = append(got, fmt.Sprint(r))
	}
	if got[0] != got[1] || got[0] == got[2] {
		t.Errorf("seeds 1, 1, 2: %q", got)
	}
}

// Auto keeps what the table demands, here for a shorter time. Runs depend on nothing but
// their seeds, so none fails by chance.
func TestAuto(t *testing.T) {
	names := []string{
		"20 workers, 0.5 x", "20 workers, 1.2 x", "20 clients, 20 workers, 1.2 x",
		"workers halve at 1.2 x, 10 s later", "refuses at a queue of 20, 1.2 x",
	}
	for _, row := range Rows() {
		i := slices.Index(names, row.Name)
		if i < 0 {
			continue
		}
		names = slices.Delete(names, i, i+1)
		t.Run(row.Name, func(t *testing.T) {
			row.Length, row.Again, row.Phases = 20*time.Second, 0, 0
			// A short run is less equal, and its load is not exact.
			row.MinGoodput -= 0.01
			row.MinJain -= 0.03
			if row.MaxLatency > 0 {
				row.MaxLatency += 0.2
			}
			if row.MaxRefused > 0 {
				row.MaxRefused += 0.001
			}
			r, err := row.Run("auto", 1)
			if err != nil {
				t.Fatal(err)
			}
			if broken := row.Broken(r[0]); len(broken) > 0 {
				t.Errorf("%v: %+v", broken, r[0])
			}
		})
	}
	if len(names) > 0 {
		t.Errorf("no rows %q", names)
	}
}

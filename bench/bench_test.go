// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/belfry-go/belfry/internal/test/leaktest"
)

// What go-zero's packages start when they are initialized runs as long as the program.
func TestMain(m *testing.M) { leaktest.Main(m, goleak.IgnoreCurrent()) }

// tiny is a plan whose figures mean nothing.
func tiny() plan {
	return plan{
		quick: true, repeats: 1, seed: 1,
		sizes: []int{3, 12}, buildMost: time.Minute,
		callsTime: 20 * time.Millisecond, inFlight: 4,
		clusterRepeats: 1, warmUp: 20 * time.Millisecond, measured: 50 * time.Millisecond, rate: 0.1,
		scenarios: []scenario{{name: "all at once", clients: 2, load: 0.5, speeds: []float64{0.5}, down: []int{1}, stalls: true}},
	}
}

// TestSections makes each section once, with charts.
func TestSections(t *testing.T) {
	for _, key := range keys {
		t.Run(key, func(t *testing.T) {
			p, err := tiny().run(t.Context(), []string{key}, func(string) {})
			if err != nil {
				t.Fatal(err)
			}
			p.command = "go run ."
			dir := t.TempDir()
			if err := p.save(dir); err != nil {
				t.Fatal(err)
			}
			text, err := os.ReadFile(filepath.Join(dir, "RESULTS.md"))
			if err != nil {
				t.Fatal(err)
			}
			for _, s := range p.sections {
				if !strings.Contains(string(text), "## "+s.title+"\n") {
					t.Errorf("the page has no section %q", s.title)
				}
				if _, err := os.Stat(filepath.Join(dir, "charts", s.chart)); err != nil {
					t.Errorf("chart of %q: %v", s.title, err)
				}
				for _, g := range s.groups {
					for _, r := range g.rows {
						if !r.measured() && r.note == "" {
							t.Errorf("%s, %s, %s: no figures and no reason", s.title, g.name, r.name)
						}
						if r.measured() && len(r.values) != len(g.metrics) {
							t.Errorf("%s, %s, %s: %d figures, want %d", s.title, g.name, r.name, len(r.values), len(g.metrics))
						}
					}
				}
			}
		})
	}
}

func TestFlags(t *testing.T) {
	for _, c := range []struct{ args, want string }{
		{"-only nothing", `-only has "nothing", must be of pick, interceptors, calls, cluster`},
		{"now", `unexpected argument "now"`},
	} {
		if err := run(t.Context(), strings.Fields(c.args), &strings.Builder{}); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: got error %v, want %q", c.args, err, c.want)
		}
	}
}

// TestPlans checks that medians are figures of one repeat.
func TestPlans(t *testing.T) {
	for name, p := range map[string]plan{"full": full(), "quick": quick()} {
		if p.repeats%2 == 0 || p.clusterRepeats%2 == 0 {
			t.Errorf("%s: %d repeats, %d of the cluster, want odd numbers", name, p.repeats, p.clusterRepeats)
		}
	}
}

// TestOracle checks that the oracle knows the servers.
func TestOracle(t *testing.T) {
	l := newLedger(4, 2)
	l.set(0, func(e *entry) { e.down = true })
	l.set(1, func(e *entry) { e.speed = 0.5 })
	places := []place{{server: 0}, {server: 1}, {server: 2}, {server: 3}}
	got := make([]int, 4)
	for range 6 {
		got[l.choose(places).server]++
	}
	// Two each for the workers of the two that are fast and up. One more there costs 1.5,
	// and then 2, as the first at the one that is slow.
	if got[0] != 0 || got[1] != 0 || got[2] != 3 || got[3] != 3 {
		t.Errorf("calls by server: got %v, want [0 0 3 3]", got)
	}
}

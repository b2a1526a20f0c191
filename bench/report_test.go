// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"math"
	"slices"
	"strings"
	"testing"
	"time"
)

// rowOf is a row of one metric, or of a p50 and a p99 for each repeat.
func rowOf(name string, r role, values ...[]float64) *row {
	return &row{name: name, role: r, values: values, busy: math.NaN()}
}

var lower = []metric{{name: "ns", digits: 3, judged: true}}

func oneGroup(metrics []metric, rows ...*row) []*section {
	return []*section{{key: "x", title: "Section", about: "About it.", groups: []*group{{name: "rows", metrics: metrics, rows: rows}}}}
}

func TestRatio(t *testing.T) {
	t.Run("is taken within a repeat", func(t *testing.T) {
		a := rowOf("a", peer, []float64{1, 20, 300})
		b := rowOf("b", base, []float64{2, 40, 300}) // The medians are in ratio 0.5 too, the means are not.
		if got := a.ratio(0, b); got != 0.5 {
			t.Errorf("got %v, want 0.5", got)
		}
	})
	t.Run("of what was not measured is not known", func(t *testing.T) {
		if got := (&row{}).ratio(0, rowOf("b", base, []float64{1})); !math.IsNaN(got) {
			t.Errorf("got %v, want NaN", got)
		}
	})
	t.Run("of two zeros is 1", func(t *testing.T) {
		if got := rowOf("a", peer, []float64{0}).ratio(0, rowOf("b", base, []float64{0})); got != 1 {
			t.Errorf("got %v, want 1", got)
		}
	})
}

func TestWins(t *testing.T) {
	names := func(all []win) (s []string) {
		for _, w := range all {
			s = append(s, w.peer.name)
		}
		return s
	}
	t.Run("are of peers that are better by more than the margin", func(t *testing.T) {
		s := oneGroup(lower,
			rowOf("base", base, []float64{100}), rowOf("ours", ours, []float64{1}), rowOf("oracle", bound, []float64{1}),
			rowOf("close", peer, []float64{96}), rowOf("better", peer, []float64{94}), rowOf("worse", peer, []float64{101}),
			rowOf("proxy", neighbour, []float64{50}), &row{name: "missing"})
		if got, want := names(wins(s)), []string{"better", "proxy"}; !slices.Equal(got, want) {
			t.Errorf("got %q, want %q", got, want)
		}
	})
	t.Run("may be higher figures", func(t *testing.T) {
		s := oneGroup([]metric{{name: "calls/s", higher: true, judged: true}},
			rowOf("base", base, []float64{100}), rowOf("more", peer, []float64{110}), rowOf("fewer", peer, []float64{90}))
		if got, want := names(wins(s)), []string{"more"}; !slices.Equal(got, want) {
			t.Errorf("got %q, want %q", got, want)
		}
	})
	t.Run("are not of metrics that are not judged", func(t *testing.T) {
		s := oneGroup([]metric{{name: "bytes"}}, rowOf("base", base, []float64{100}), rowOf("better", peer, []float64{1}))
		if got := names(wins(s)); len(got) > 0 {
			t.Errorf("got %q, want none", got)
		}
	})
}

func TestReason(t *testing.T) {
	tail := []metric{{name: "p50, ms", judged: true}, {name: "p99, ms", judged: true}}
	less := func(r *row, text string) *row {
		r.less = text
		return r
	}
	busy := func(r *row, share float64) *row {
		r.busy = share
		return r
	}
	like := less(rowOf("peer", peer, []float64{50}), "It does less.")
	like.like = "kin"
	for _, c := range []struct {
		name    string
		metrics []metric
		rows    []*row // base and peer first
		want    string
	}{
		{"repeats that do not agree", lower, []*row{
			rowOf("base", base, []float64{100, 100, 100}), less(rowOf("peer", peer, []float64{50, 50, 101}), "It does less.")},
			"in 1 of 3 repeats it was the other way round"},
		{"less work", lower, []*row{rowOf("base", base, []float64{100}), less(rowOf("peer", peer, []float64{50}), "It does less.")},
			"It does less."},
		{"less work, and one of belfry's of its kind", lower, []*row{rowOf("base", base, []float64{100}), like, rowOf("kin", ours, []float64{40})},
			"It does less. belfry's policy of its kind, `kin`, is ahead of it: 0.80 in ratio to it."},
		{"busy processors", tail, []*row{
			busy(rowOf("base", base, []float64{10}, []float64{20}), 0.97), busy(rowOf("peer", peer, []float64{5}, []float64{90}), 0.3)},
			"The processors were the bound (97 % busy under base, 30 % under this one)"},
		{"a proxy", tail, []*row{rowOf("base", base, []float64{10}, []float64{20}), rowOf("peer", neighbour, []float64{5}, []float64{90})},
			"All calls go through it"},
		{"the median for the tail", tail, []*row{rowOf("base", base, []float64{10}, []float64{20}), rowOf("peer", peer, []float64{5}, []float64{90})},
			"its p99 is 4.50 times the default's"},
		{"as good as the oracle", tail, []*row{
			rowOf("base", base, []float64{10}, []float64{20}), rowOf("peer", peer, []float64{5}, []float64{15}), rowOf("oracle", bound, []float64{10}, []float64{20})},
			"within 5 % of the oracle"},
		{"one repeat", lower, []*row{rowOf("base", base, []float64{100}), rowOf("peer", peer, []float64{50})},
			"One repeat alone was made, which may be noise. " + noReason},
		{"none", lower, []*row{rowOf("base", base, []float64{100, 100, 100}), rowOf("peer", peer, []float64{50, 50, 50})}, noReason},
	} {
		t.Run(c.name, func(t *testing.T) {
			all := wins(oneGroup(c.metrics, c.rows...))
			if len(all) == 0 {
				t.Fatal("no win, want one")
			}
			if got := all[0].why(); !strings.Contains(got, c.want) {
				t.Errorf("got %q, want it to contain %q", got, c.want)
			}
		})
	}
}

func TestClaims(t *testing.T) {
	clusterMetrics := []metric{{name: "p50, ms", judged: true}, {name: "p99, ms", judged: true}}
	callMetrics := []metric{{name: "calls/s", higher: true, judged: true}, {name: "allocations", judged: true}}
	of := func(key string, metrics []metric, rows ...*row) []*section {
		s := oneGroup(metrics, rows...)
		s[0].key = key
		return s
	}
	for _, c := range []struct {
		name     string
		sections []*section
		tried    int
		missed   []string
	}{
		{"interceptors", of("interceptors", lower,
			rowOf("belfry", base, []float64{10}), rowOf("failsafe-go a", peer, []float64{11}), rowOf("failsafe-go b", peer, []float64{9}), rowOf("other", peer, []float64{1})),
			2, []string{"rows: failsafe-go b, ns 0.90. One repeat"}},
		{"throughput", of("calls", callMetrics,
			rowOf(rrName, peer, []float64{100}, []float64{130}), rowOf("p2c", base, []float64{120}, []float64{138}), rowOf("hedge", ours, []float64{94}, []float64{175})),
			2, []string{"hedge: 0.94 times the calls of round_robin. The processors are the bound, so a call that costs more is made less often. Allocations: 175, bare 130."}},
		{"tail", of("cluster", clusterMetrics,
			rowOf("default", base, []float64{10}, []float64{20}), rowOf("close", peer, []float64{9}, []float64{19.5}),
			rowOf("better", peer, []float64{10}, []float64{15}), rowOf("better too", ours, []float64{10}, []float64{16}), rowOf("oracle", bound, []float64{5}, []float64{8}), rowOf("proxy", neighbour, []float64{5}, []float64{8})),
			1, []string{"rows, p99 in ratio to the default's: better 0.75, better too 0.80. One repeat"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			all := claims(c.sections)
			if len(all) != 1 {
				t.Fatalf("%d claims, want 1", len(all))
			}
			if all[0].failed != 1 {
				t.Errorf("failed in %d places, want 1", all[0].failed)
			}
			if all[0].tried != c.tried || len(all[0].missed) != len(c.missed) {
				t.Fatalf("looked at %d, missed %q; want %d, %q", all[0].tried, all[0].missed, c.tried, c.missed)
			}
			for i, want := range c.missed {
				if !strings.Contains(all[0].missed[i], want) {
					t.Errorf("missed %q, want it to contain %q", all[0].missed[i], want)
				}
			}
		})
	}
}

func TestPage(t *testing.T) {
	rows := []*row{
		rowOf("belfry", base, []float64{100, 110, 90}),
		rowOf("other", peer, []float64{50, 1234567, 45}),
		{name: "slow", note: "took too long", busy: math.NaN()},
	}
	rows[0].busy = 0.95
	p := page{
		command: "go run . -quick",
		plan:    quick(),
		when:    time.Date(2026, 1, 2, 3, 4, 0, 0, time.UTC),
		elapsed: 119 * time.Second,
		machine: machine{cpu: "a CPU", cores: 2, kernel: "6.1", system: "linux/amd64", goes: "go1.26", load: "0.1",
			modules: []module{{"google.golang.org/grpc", "v1.84.0"}, {"example.com/z", "v1.2.3"}}},
		missing:  []string{"haproxy is missing."},
		sections: oneGroup(lower, rows...),
	}
	var b strings.Builder
	if err := p.write(&b); err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{
		"go run . -quick   # took 1m59s, 2026-01-02 03:04 UTC\n",
		"| machine | a CPU, 2 processors, linux/amd64, kernel 6.1 |\n",
		"| google.golang.org/grpc | v1.84.0 |\n",
		"| example.com/z | v1.2.3 |\n",
		"**This is a quick run**",
		"- haproxy is missing.\n",
		"| Section | rows | other | ns 0.50 | Within the noise: in 1 of 3 repeats it was the other way round. |\n",
		"| | ns | ratio |\n| --- | ---: | ---: |\n| **belfry** (CPU-bound) | 100 | 1.00 |\n| other | 50 | 0.50 |\n| slow | – | – |\n",
		"- slow: took too long.\n",
	} {
		if !strings.Contains(b.String(), want) {
			t.Errorf("the page does not contain %q:\n%s", want, b.String())
		}
	}
}

func TestFormatValue(t *testing.T) {
	for _, c := range []struct {
		v      float64
		digits int
		want   string
	}{
		{0, 3, "0"}, {0.001, 3, "0"}, {0.1234, 3, "0.12"}, {1.5, 2, "1.5"}, {13.02, 3, "13"}, {17, 2, "17"},
		{123.4, 3, "123"}, {1234.5, 3, "1,234"}, {1234567, 3, "1,234,567"}, {math.NaN(), 3, "–"},
	} {
		if got := formatValue(c.v, c.digits); got != c.want {
			t.Errorf("formatValue(%v, %d): got %q, want %q", c.v, c.digits, got, c.want)
		}
	}
}

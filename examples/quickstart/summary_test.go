// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"errors"
	"slices"
	"strings"
	"testing"
	"time"
)

// upTo returns 1, 2, … n times unit.
func upTo(n int, unit time.Duration) []time.Duration {
	var ls []time.Duration
	for i := range n {
		ls = append(ls, time.Duration(i+1)*unit)
	}
	return ls
}

// runOf returns a complete run of one call per latency on two endpoints, three
// quarters of the calls on the first.
func runOf(name string, round int, latencies []time.Duration) *run {
	n := len(latencies)
	return &run{policy: policy{name: name, config: "{}"}, round: round, latencies: latencies, served: []int{3 * n / 4, n - 3*n/4}, elapsed: time.Second, complete: true}
}

// Summary is the median of the runs.
func TestSummaryIsMedian(t *testing.T) {
	runs := []*run{
		runOf("a", 0, upTo(100, time.Millisecond)),
		runOf("b", 0, upTo(100, time.Second)),
		runOf("a", 1, upTo(100, 5*time.Millisecond)),
		runOf("a", 2, upTo(100, 2*time.Millisecond)),
	}
	runs[2].errors, runs[2].example = 4, errors.New("lost")
	ss := summarize(runs)
	if len(ss) != 2 || ss[0].policy.name != "a" || ss[1].policy.name != "b" {
		t.Fatalf("got summaries %+v, want of a and b", ss)
	}
	a := ss[0]
	if a.runs != 3 || a.p99 != 198*time.Millisecond || a.mean != 101*time.Millisecond || a.rate != 100 {
		t.Errorf("a: got %d runs, p99 %v, mean %v, %v calls/s; want 3, 198ms, 101ms, 100", a.runs, a.p99, a.mean, a.rate)
	}
	if a.answered != 300 || a.errors != 4 || a.example == nil {
		t.Errorf("a: got %d answered, %d errors, example %v; want 300, 4 and one", a.answered, a.errors, a.example)
	}
	if want := []float64{0.75, 0.25}; !slices.Equal(a.share, want) {
		t.Errorf("a: share is %v, want %v", a.share, want)
	}
}

// Interrupted run counts only if there is no complete one.
func TestSummaryOfInterruptedRuns(t *testing.T) {
	cut := runOf("a", 1, upTo(100, time.Second))
	cut.complete = false
	if s := summarize([]*run{runOf("a", 0, upTo(100, time.Millisecond)), cut})[0]; s.runs != 1 || !s.complete || s.p50 != 50*time.Millisecond {
		t.Errorf("beside a complete run: got %d runs, complete %v, p50 %v; want 1, true, 50ms", s.runs, s.complete, s.p50)
	}
	if s := summarize([]*run{cut})[0]; s.runs != 1 || s.complete || s.p50 != 50*time.Second {
		t.Errorf("alone: got %d runs, complete %v, p50 %v; want 1, false, 50s", s.runs, s.complete, s.p50)
	}
	if ss := summarize([]*run{{policy: policy{name: "a"}}}); len(ss) != 0 {
		t.Errorf("a run without a call: got %d summaries, want 0", len(ss))
	}
}

// Ratios compare runs of one round.
func TestRatiosOfOneRound(t *testing.T) {
	runs := []*run{
		runOf("peakEwma", 0, upTo(100, 4*time.Millisecond)), runOf("default", 0, upTo(100, time.Millisecond)),
		runOf("peakEwma", 1, upTo(100, 40*time.Millisecond)), runOf("default", 1, upTo(100, 10*time.Millisecond)),
	}
	if got, want := ratios(runs), "p99 in ratio: default / peakEwma 0.25"; got != want {
		t.Errorf("got %q, want %q", got, want)
	}
	runs[1].complete, runs[3].complete = false, false
	if got := ratios(runs); got != "" {
		t.Errorf("of interrupted runs: got %q, want nothing", got)
	}
}

// Tables are aligned and notes say what they do not.
func TestTablesAndNotes(t *testing.T) {
	w := workload{maxima: []time.Duration{time.Millisecond, 500 * time.Millisecond}, calls: 100, inFlight: 10, seed: 1}
	slow := runOf("least_request_experimental", 0, upTo(100, 1500*time.Microsecond))
	slow.busy = 0.95
	failed := runOf("broken", 0, nil)
	failed.served, failed.errors, failed.example = []int{100, 0}, 100, errors.New("no luck")
	var out strings.Builder
	if err := writeResults(&out, w, 1, []*run{slow, failed}); err != nil {
		t.Fatal(err)
	}
	want := `2 endpoints, 100 calls per policy, 10 in flight, seed 1.
Latencies in ms, as the client sees them:

policy                      calls/s  mean   p50  p90  p99  p99.9  errors
least_request_experimental      100  75.8  75.0  135  148    150       0
broken                          100     -     -    -    -      -     100

Shares of the calls in %, by the endpoints' maximum latencies:

policy                       1ms  500ms
least_request_experimental  75.0   25.0
broken                       100   0.00

broken: 100 calls failed, one of them with: no luck

The processors were the bound of least_request_experimental (95 % of their time). Client and servers share them, so these latencies include waiting for a processor, which no policy can shorten. That raises p50 most. With a smaller -in-flight they are not the bound.

One run is noise where other programs run: -count 3 shows medians.
`
	if got := out.String(); got != want {
		t.Errorf("got:\n%s\nwant:\n%s", got, want)
	}
}

// Shares fold after ten endpoints.
func TestSharesFold(t *testing.T) {
	r := runOf("a", 0, upTo(2, time.Second))
	r.served = make([]int, 25)
	r.served[24] = 2
	w := workload{maxima: make([]time.Duration, 25)}
	tables := foldedShares(w, summarize([]*run{r}))
	if len(tables) != 3 || len(tables[0].heading) != 11 || len(tables[2].heading) != 6 || tables[2].rows[0][5] != "100" {
		t.Errorf("got %v, want tables of 10, 10 and 5 endpoints, the last with all calls", tables)
	}
}

// Milliseconds have three digits.
func TestFormatMillis(t *testing.T) {
	for d, want := range map[time.Duration]string{
		0:                        "0.00",
		123 * time.Microsecond:   "0.12",
		9994 * time.Microsecond:  "9.99",
		9996 * time.Microsecond:  "10.0",
		99940 * time.Microsecond: "99.9",
		99960 * time.Microsecond: "100",
		time.Second:              "1000",
	} {
		if got := formatMillis(d); got != want {
			t.Errorf("%v is %q, want %q", d, got, want)
		}
	}
}

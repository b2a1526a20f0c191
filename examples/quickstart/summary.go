// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/belfry-go/belfry/internal/loadgen"
)

// The percentiles that are shown.
const (
	p50  = 0.5
	p90  = 0.9
	p99  = 0.99
	p999 = 0.999
)

func mean(latencies []time.Duration) time.Duration {
	if len(latencies) == 0 {
		return 0
	}
	var sum time.Duration // of 1e8 latencies of 60 s: far from overflow
	for _, l := range latencies {
		sum += l
	}
	return sum / time.Duration(len(latencies))
}

// A summary is what the table says of one policy: the medians of its runs, each
// figure for itself, and sums of what is counted.
type summary struct {
	policy   policy
	runs     int
	share    []float64 // by endpoint, of all calls of all runs; sums to 1
	rate     float64   // calls per second
	mean     time.Duration
	p50      time.Duration
	p90      time.Duration
	p99      time.Duration
	p999     time.Duration
	answered int
	errors   int
	example  error
	busy     float64 // the share of the processors' time, from 0 to 1
	complete bool    // no run was interrupted
}

// summarize returns a summary for each policy, in the order of the runs. Runs in
// which no call ended are left out, and so are interrupted ones where there are
// complete ones: their end came too early for the slow calls.
func summarize(runs []*run) []summary {
	var summaries []summary
	for _, g := range byPolicy(runs) {
		s := summary{policy: g[0].policy, runs: len(g), complete: g[0].complete}
		served, all := make([]int, len(g[0].served)), 0
		for _, r := range g {
			for i, n := range r.served {
				served[i] += n
				all += n
			}
			s.answered += len(r.latencies)
			s.errors += r.errors
			if s.example == nil {
				s.example = r.example
			}
		}
		for _, n := range served {
			s.share = append(s.share, float64(n)/float64(max(all, 1)))
		}
		s.rate = median(g, func(r *run) float64 {
			return float64(len(r.latencies)+r.errors) / max(r.elapsed.Seconds(), 1e-9)
		})
		s.busy = median(g, func(r *run) float64 { return r.busy })
		of := func(f func(l []time.Duration) time.Duration) time.Duration {
			return time.Duration(median(g, func(r *run) float64 { return float64(f(r.latencies)) }))
		}
		quantile := func(q float64) time.Duration {
			return of(func(l []time.Duration) time.Duration { return loadgen.Percentile(l, q) })
		}
		s.mean = of(mean)
		s.p50, s.p90, s.p99, s.p999 = quantile(p50), quantile(p90), quantile(p99), quantile(p999)
		summaries = append(summaries, s)
	}
	return summaries
}

// byPolicy groups the runs that a summary is made of. No group is empty, and
// either all of its runs are complete or it is a single one that is not.
func byPolicy(runs []*run) [][]*run {
	var groups [][]*run
	for _, r := range runs {
		if len(r.latencies)+r.errors == 0 {
			continue
		}
		i := slices.IndexFunc(groups, func(g []*run) bool { return g[0].policy.name == r.policy.name })
		switch {
		case i < 0:
			groups = append(groups, []*run{r})
		case r.complete:
			groups[i] = append(groups[i], r)
		}
	}
	return groups
}

func median(runs []*run, f func(*run) float64) float64 {
	values := make([]float64, len(runs))
	for i, r := range runs {
		values[i] = f(r)
	}
	return loadgen.Median(values)
}

// compared are the policies whose p99 is set in ratio.
var compared = [][2]string{
	{"default", "peakEwma"},
	{"peakEwma", "round_robin"},
	{"default", "round_robin"},
}

// ratios returns a line that compares p99, the median of the ratios of the runs
// of one round, which met the same conditions. It is empty if there is nothing
// to compare: interrupted runs are not.
func ratios(runs []*run) string {
	var parts []string
	for _, pair := range compared {
		var rs []float64
		for _, a := range runs {
			for _, b := range runs {
				if a.round != b.round || a.policy.name != pair[0] || b.policy.name != pair[1] || !a.complete || !b.complete {
					continue
				}
				if over := loadgen.Percentile(b.latencies, p99); over > 0 && len(a.latencies) > 0 {
					rs = append(rs, float64(loadgen.Percentile(a.latencies, p99))/float64(over))
				}
			}
		}
		if len(rs) == 0 {
			continue
		}
		parts = append(parts, fmt.Sprintf("%s / %s %.2f", pair[0], pair[1], loadgen.Median(rs)))
	}
	if len(parts) == 0 {
		return ""
	}
	return "p99 in ratio: " + strings.Join(parts, ", ")
}

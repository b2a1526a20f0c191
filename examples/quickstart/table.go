// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"io"
	"strings"
	"time"
	"unicode/utf8"
)

// A table is a heading and rows of as many cells. Cells but the first of each
// are numbers.
type table struct {
	heading []string
	rows    [][]string
	shares  int // the columns from this one on are shares of the calls
}

// newTable returns the table of the summaries, which are of the same cluster.
func newTable(w workload, summaries []summary) table {
	t := table{heading: []string{"policy", "calls/s", "mean", "p50", "p90", "p99", "p99.9", "errors"}}
	t.shares = len(t.heading)
	for _, m := range w.maxima {
		t.heading = append(t.heading, formatMaximum(m))
	}
	for _, s := range summaries {
		row := []string{s.policy.name, fmt.Sprintf("%.0f", s.rate)}
		if !s.complete {
			row[0] += " (interrupted)"
		}
		for _, d := range []time.Duration{s.mean, s.p50, s.p90, s.p99, s.p999} {
			if s.answered == 0 {
				row = append(row, "-")
			} else {
				row = append(row, formatMillis(d))
			}
		}
		row = append(row, fmt.Sprint(s.errors))
		for _, share := range s.share {
			row = append(row, formatShare(share))
		}
		t.rows = append(t.rows, row)
	}
	return t
}

// write writes the table as text, in columns.
func (t table) write(out io.Writer) error {
	widths := make([]int, len(t.heading))
	all := append([][]string{t.heading}, t.rows...)
	for _, row := range all {
		for i, cell := range row {
			widths[i] = max(widths[i], utf8.RuneCountInString(cell))
		}
	}
	var b strings.Builder
	for _, row := range all {
		for i, cell := range row {
			pad := strings.Repeat(" ", widths[i]-utf8.RuneCountInString(cell))
			switch {
			case i == 0:
				b.WriteString(cell + pad)
			case i <= t.shares:
				b.WriteString("  " + pad + cell)
			default: // many narrow columns that belong together
				b.WriteString(" " + pad + cell)
			}
		}
		b.WriteByte('\n')
	}
	_, err := io.WriteString(out, b.String())
	return err
}

// formatMillis returns a latency in milliseconds, without the unit, to three
// digits or a tenth of a microsecond, whichever is coarser.
func formatMillis(d time.Duration) string {
	ms := float64(d) / float64(time.Millisecond)
	switch {
	case ms >= 99.95:
		return fmt.Sprintf("%.0f", ms)
	case ms >= 9.995:
		return fmt.Sprintf("%.1f", ms)
	}
	return fmt.Sprintf("%.2f", ms)
}

// formatMaximum names an endpoint by its maximum latency.
func formatMaximum(d time.Duration) string {
	if d >= time.Minute {
		return fmt.Sprintf("%gm", d.Minutes())
	}
	return d.String()
}

// formatShare returns a share in per cent, without the sign, to three digits or a
// hundredth, whichever is coarser.
func formatShare(share float64) string {
	switch {
	case share >= 0.9995:
		return fmt.Sprintf("%.0f", 100*share)
	case share >= 0.09995:
		return fmt.Sprintf("%.1f", 100*share)
	}
	return fmt.Sprintf("%.2f", 100*share)
}

// writeResults writes what a terminal shows of the runs.
func writeResults(out io.Writer, w workload, count int, runs []*run) error {
	summaries := summarize(runs)
	var b strings.Builder
	if len(summaries) == 0 {
		b.WriteString("Interrupted before the first call had ended: nothing was measured.\n")
		_, err := io.WriteString(out, b.String())
		return err
	}
	fmt.Fprintf(&b, "%s\nLatencies in ms, as the client sees them; then each endpoint, by its maximum latency, with its share of the calls in %%.\n\n", describe(w, count))
	if err := newTable(w, summaries).write(&b); err != nil {
		return err
	}
	for _, n := range notes(w, count, summaries) {
		fmt.Fprintf(&b, "\n%s", n)
	}
	if r := ratios(runs); r != "" {
		fmt.Fprintf(&b, "\n%s", r)
	}
	b.WriteByte('\n')
	_, err := io.WriteString(out, strings.TrimRight(b.String(), "\n")+"\n")
	return err
}

// describe says in one line what was measured.
func describe(w workload, count int) string {
	var b strings.Builder
	fmt.Fprintf(&b, "%d endpoints, %d calls per policy, %d in flight", len(w.maxima), w.calls, min(w.inFlight, w.calls))
	if w.workers > 0 {
		fmt.Fprintf(&b, ", %d workers per endpoint", w.workers)
	}
	if w.addTimer {
		fmt.Fprintf(&b, ", %v added to each latency", towerTimerError)
	}
	fmt.Fprintf(&b, ", seed %d", w.seed)
	if count > 1 {
		fmt.Fprintf(&b, " and on, medians of %d runs", count)
	}
	return b.String() + "."
}

// notes says what the table does not.
func notes(w workload, count int, summaries []summary) []string {
	var ns []string
	for _, s := range summaries {
		if !s.complete {
			ns = append(ns, fmt.Sprintf("%s was interrupted after %d of %d calls.", s.policy.name, s.answered+s.errors, w.calls))
		} else if s.runs < count {
			ns = append(ns, fmt.Sprintf("%s: medians of %d runs.", s.policy.name, s.runs))
		}
		if s.example != nil {
			ns = append(ns, fmt.Sprintf("%s: %d calls failed, one of them with: %v", s.policy.name, s.errors, s.example))
		}
	}
	return ns
}

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
}

// nameOf is the first cell of a policy's row.
func nameOf(s summary) string {
	if !s.complete {
		return s.policy.name + " (interrupted)"
	}
	return s.policy.name
}

// newFigures returns the table of the latencies.
func newFigures(summaries []summary) table {
	t := table{heading: []string{"policy", "calls/s", "mean", "p50", "p90", "p99", "p99.9", "errors"}}
	for _, s := range summaries {
		row := []string{nameOf(s), fmt.Sprintf("%.0f", s.rate)}
		for _, d := range []time.Duration{s.mean, s.p50, s.p90, s.p99, s.p999} {
			if s.answered == 0 {
				row = append(row, "-")
			} else {
				row = append(row, formatMillis(d))
			}
		}
		t.rows = append(t.rows, append(row, fmt.Sprint(s.errors)))
	}
	return t
}

// newShares returns the table of the shares that the endpoints got of the calls, a
// row for each endpoint.
func newShares(w workload, summaries []summary) table {
	t := table{heading: []string{"endpoint"}}
	for _, s := range summaries {
		t.heading = append(t.heading, s.policy.name)
	}
	for i, m := range w.maxima {
		row := []string{formatMaximum(m)}
		for _, s := range summaries {
			row = append(row, formatShare(s.share[i]))
		}
		t.rows = append(t.rows, row)
	}
	return t
}

// foldedShares returns the same for a terminal: a row for each policy, and a table for
// every so many endpoints, which is as wide as the table of the latencies.
func foldedShares(w workload, summaries []summary) []table {
	const columns = 10
	var tables []table
	for from := 0; from < len(w.maxima); from += columns {
		to := min(from+columns, len(w.maxima))
		t := table{heading: []string{"policy"}}
		for _, m := range w.maxima[from:to] {
			t.heading = append(t.heading, formatMaximum(m))
		}
		for _, s := range summaries {
			row := []string{nameOf(s)}
			for _, share := range s.share[from:to] {
				row = append(row, formatShare(share))
			}
			t.rows = append(t.rows, row)
		}
		tables = append(tables, t)
	}
	return tables
}

// write writes the table as text, in columns.
func (t table) write(b *strings.Builder) {
	widths := make([]int, len(t.heading))
	all := append([][]string{t.heading}, t.rows...)
	for _, row := range all {
		for i, cell := range row {
			widths[i] = max(widths[i], utf8.RuneCountInString(cell))
		}
	}
	for _, row := range all {
		for i, cell := range row {
			pad := strings.Repeat(" ", widths[i]-utf8.RuneCountInString(cell))
			if i == 0 {
				b.WriteString(cell + pad)
			} else {
				b.WriteString("  " + pad + cell)
			}
		}
		b.WriteByte('\n')
	}
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
	fmt.Fprintf(&b, "%s\nLatencies in ms, as the client sees them:\n\n", describe(w, count))
	newFigures(summaries).write(&b)
	b.WriteString("\nShares of the calls in %, by the endpoints' maximum latencies:\n")
	for _, t := range foldedShares(w, summaries) {
		b.WriteByte('\n')
		t.write(&b)
	}
	for _, n := range notes(w, count, summaries) {
		fmt.Fprintf(&b, "\n%s\n", n)
	}
	if r := ratios(runs); r != "" {
		fmt.Fprintf(&b, "\n%s\n", r)
	}
	_, err := io.WriteString(out, b.String())
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
	var bound []string
	for _, s := range summaries {
		if s.busy >= boundBusy {
			bound = append(bound, fmt.Sprintf("%s (%.0f %% of their time)", s.policy.name, 100*s.busy))
		}
	}
	if len(bound) > 0 {
		ns = append(ns, "The processors were the bound of "+strings.Join(bound, ", ")+
			". Client and servers share them, so these latencies include waiting for a processor, which no policy can shorten. That raises p50 most. With a smaller -in-flight they are not the bound.")
	}
	if count == 1 {
		ns = append(ns, "One run is noise where other programs run: -count 3 shows medians.")
	}
	return ns
}

// boundBusy is the share of the processors' time from which on calls wait for them.
const boundBusy = 0.9

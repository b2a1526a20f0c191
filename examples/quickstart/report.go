// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package main

import (
	_ "embed"
	"fmt"
	"html/template"
	"io"
	"os"
	"runtime"
	"slices"
	"time"
)

//go:embed report.html
var reportSource string

var reportTemplate = template.Must(template.New("report").Parse(reportSource))

// report is what the template shows.
type report struct {
	Description string
	When        string
	Machine     string
	Ratios      string
	Notes       []string
	Legend      []legendEntry
	Percentiles template.HTML
	Shares      template.HTML
	Heading     []string
	Rows        [][]string
	Parameters  [][2]string
}

type legendEntry struct {
	Class string
	Name  string
}

// writeReport writes the report as one HTML page that needs nothing else: no
// network, no script.
func writeReport(out io.Writer, o *options, runs []*run, when time.Time) error {
	summaries := summarize(runs)
	w := o.workload
	t := newTable(w, summaries)
	r := report{
		Description: describe(w, o.count),
		When:        when.Format("2006-01-02 15:04:05 MST"),
		Machine:     fmt.Sprintf("%s, %s/%s, GOMAXPROCS %d", runtime.Version(), runtime.GOOS, runtime.GOARCH, runtime.GOMAXPROCS(0)),
		Ratios:      ratios(runs),
		Notes:       notes(w, o.count, summaries),
		Heading:     t.heading,
		Rows:        t.rows,
	}
	groups := byPolicy(runs)
	all := make([]series, len(summaries))
	for i, s := range summaries {
		all[i] = series{name: s.policy.name, share: s.share}
		for _, g := range groups[i] {
			all[i].latencies = append(all[i].latencies, g.latencies...)
		}
		slices.Sort(all[i].latencies)
		r.Legend = append(r.Legend, legendEntry{fmt.Sprintf("s%d", i%seriesColours), s.policy.name})
	}
	r.Percentiles = percentileChart(all)
	r.Shares = shareChart(w, all)
	for _, p := range o.policies {
		r.Parameters = append(r.Parameters, [2]string{p.name, p.config})
	}
	return reportTemplate.Execute(out, r)
}

// saveReport writes the report to a file, in place of one that is there.
func saveReport(o *options, runs []*run) (err error) {
	f, err := os.Create(o.html)
	if err != nil {
		return err
	}
	defer func() {
		if e := f.Close(); err == nil {
			err = e
		}
	}()
	return writeReport(f, o, runs, time.Now())
}

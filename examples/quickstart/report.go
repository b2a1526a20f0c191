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
	Figures     tableView
	ByEndpoint  tableView
	Policies    []policyView
}

type legendEntry struct {
	Class string
	Name  string
}

// A tableView is a table for the template.
type tableView struct {
	Heading []string
	Rows    [][]string
}

// A policyView is a policy for the template.
type policyView struct{ Name, About, Config string }

// writeReport writes the report as one HTML page that needs nothing else: no
// network, no script.
func writeReport(out io.Writer, o *options, runs []*run, when time.Time) error {
	summaries := summarize(runs)
	w := o.workload
	figures, byEndpoint := newFigures(summaries), newShares(w, summaries)
	r := report{
		Description: describe(w, o.count),
		When:        when.Format("2006-01-02 15:04:05 MST"),
		Machine:     fmt.Sprintf("%s, %s/%s, GOMAXPROCS %d", runtime.Version(), runtime.GOOS, runtime.GOARCH, runtime.GOMAXPROCS(0)),
		Ratios:      ratios(runs),
		Notes:       notes(w, o.count, summaries),
		Figures:     tableView{figures.heading, figures.rows},
		ByEndpoint:  tableView{byEndpoint.heading, byEndpoint.rows},
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
		r.Policies = append(r.Policies, policyView{p.name, p.about, p.config})
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

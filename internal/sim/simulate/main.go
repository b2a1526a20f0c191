// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

// Command simulate compares load balancing policies on simulated clusters and
// prints a Markdown table: for each policy the 99th and the 99.9th percentile of
// the latency in ms and, in parentheses, the ratio of the 99th to that of the
// first policy, which is the oracle unless asked for otherwise. Where a scenario is
// about it, also the mean latency, the least and the greatest share of the calls that
// a server got, in units of its fair share, the share of the calls that stayed in
// their zone, of all and of those from the first zone, or how long calls crowd on a
// server and whether others avoid it (see package sim).
//
//	go run ./internal/sim/simulate
//	go run ./internal/sim/simulate -scenarios 'antagonists|stops' -policies oracle,default,random -runs 5
//
// With -svg it draws the ratios too.
package main

import (
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"regexp"
	"runtime"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/belfry-go/belfry/internal/sim"
)

func main() {
	switch err := run(os.Args[1:], os.Stdout, os.Stderr); {
	case errors.Is(err, flag.ErrHelp):
	case err != nil:
		fmt.Fprintln(os.Stderr, "simulate:", err)
		os.Exit(1)
	}
}

// plan is what the flags ask for.
type plan struct {
	scenarios []sim.Scenario
	policies  []sim.Policy
	calls     int
	seed      uint64
	warmUp    time.Duration
	runs      int
	parallel  int
	svg       string // path of the chart, or empty
}

func run(args []string, out, errs io.Writer) error {
	p, err := parse(args, errs)
	if err != nil {
		return err
	}
	return p.print(out)
}

func parse(args []string, errs io.Writer) (*plan, error) {
	p := &plan{}
	names := make([]string, 0, len(sim.Policies()))
	for _, policy := range sim.Policies() {
		names = append(names, policy.Name)
	}
	fs := flag.NewFlagSet("simulate", flag.ContinueOnError)
	fs.SetOutput(errs)
	scenarios := fs.String("scenarios", "", "regular expression that the names of the scenarios match; empty for all")
	policies := fs.String("policies", "oracle,peakEwma,first,default", "policies in the order of the columns, of "+strings.Join(names, ", "))
	fs.IntVar(&p.calls, "calls", 200_000, "measured calls of each run, at least 1")
	fs.Uint64Var(&p.seed, "seed", 1, "seed of the first run; each further one has the next")
	fs.DurationVar(&p.warmUp, "warmup", 0, "simulated time before calls are measured; 0 for that of the scenario")
	fs.IntVar(&p.runs, "runs", 1, "runs of each scenario under each policy, at least 1; the table has their medians")
	fs.IntVar(&p.parallel, "parallel", runtime.GOMAXPROCS(0), "runs at the same time, at least 1")
	fs.StringVar(&p.svg, "svg", "", "`path` of a chart of the ratios, at least two policies")
	if err := fs.Parse(args); err != nil {
		return nil, err
	}
	for _, c := range []struct {
		name  string
		value int
	}{{"calls", p.calls}, {"runs", p.runs}, {"parallel", p.parallel}} {
		if c.value < 1 {
			return nil, fmt.Errorf("-%s: %d, must be at least 1", c.name, c.value)
		}
	}
	if p.warmUp < 0 {
		return nil, fmt.Errorf("-warmup: %v, must not be negative", p.warmUp)
	}
	if p.svg != "" && !strings.Contains(*policies, ",") {
		return nil, errors.New("-svg: needs at least two policies")
	}
	match, err := regexp.Compile(*scenarios)
	if err != nil {
		return nil, fmt.Errorf("-scenarios: %w", err)
	}
	var all []string
	for _, s := range sim.Scenarios() {
		all = append(all, s.Name)
		if p.warmUp > 0 {
			s.WarmUp = p.warmUp
		}
		if match.MatchString(s.Name) {
			p.scenarios = append(p.scenarios, s)
		}
	}
	if len(p.scenarios) == 0 {
		return nil, fmt.Errorf("-scenarios: %q, must match one of %q", *scenarios, all)
	}
	for name := range strings.SplitSeq(*policies, ",") {
		i := slices.Index(names, name)
		if i < 0 {
			return nil, fmt.Errorf("-policies: %q, must be one of %s", name, strings.Join(names, ", "))
		}
		p.policies = append(p.policies, sim.Policies()[i])
	}
	return p, nil
}

// cell is the runs of a scenario under a policy.
type cell struct {
	results []*sim.Result
	errs    []error
	running sync.WaitGroup
}

// print writes the rows in order, each as soon as it is there.
func (p *plan) print(out io.Writer) error {
	table := make([][]cell, len(p.scenarios))
	for i := range table {
		table[i] = make([]cell, len(p.policies))
		for j := range table[i] {
			table[i][j].results = make([]*sim.Result, p.runs)
			table[i][j].errs = make([]error, p.runs)
			table[i][j].running.Add(p.runs)
		}
	}
	// The runs take turns for the places, the upper rows first.
	work := make(chan func())
	var workers sync.WaitGroup
	for range p.parallel {
		workers.Go(func() {
			for f := range work {
				f()
			}
		})
	}
	workers.Go(func() {
		defer close(work)
		for i, s := range p.scenarios {
			for j, policy := range p.policies {
				for k := range p.runs {
					work <- func() {
						c := &table[i][j]
						defer c.running.Done()
						o := sim.Options{Calls: p.calls, Seed: p.seed + uint64(k)}
						c.results[k], c.errs[k] = sim.Run(s, policy, o)
					}
				}
			}
		}
	})
	defer workers.Wait()

	fmt.Fprint(out, "| p99 / p99.9 in ms (p99 ratio) |")
	for _, policy := range p.policies {
		fmt.Fprintf(out, " %s |", policy.Name)
	}
	fmt.Fprint(out, "\n| --- |", strings.Repeat(" --- |", len(p.policies)), "\n")
	var errs []error
	for i, s := range p.scenarios {
		fmt.Fprintf(out, "| %s |", s.Name)
		for j := range table[i] {
			table[i][j].running.Wait()
			if err := errors.Join(table[i][j].errs...); err != nil {
				errs = append(errs, err)
				fmt.Fprint(out, " error |")
				continue
			}
			fmt.Fprintf(out, " %s |", table[i][j].format(&table[i][0], s.Show))
		}
		fmt.Fprintln(out)
	}
	if err := errors.Join(errs...); err != nil || p.svg == "" {
		return err
	}
	return os.WriteFile(p.svg, []byte(p.chart(table)), 0o666)
}

// format returns the medians of the cell, with the ratio to the first of the row.
func (c *cell) format(first *cell, show sim.Show) string {
	var p99, p999, ratio, failed, mean, least, most []float64
	for _, r := range c.results {
		mean = append(mean, r.Mean().Seconds()*1e3)
		least, most = append(least, r.Least), append(most, r.Most)
		p99 = append(p99, r.Percentile(0.99).Seconds()*1e3)
		p999 = append(p999, r.Percentile(0.999).Seconds()*1e3)
		failed = append(failed, float64(r.Failed)/float64(r.Calls)*100)
	}
	if c != first && !slices.Contains(first.results, nil) {
		ratio = c.ratios(first)
	}
	s := fmt.Sprintf("%.1f / %.1f", median(p99), median(p999))
	if len(ratio) > 0 {
		s += fmt.Sprintf(" (%.2f)", median(ratio))
	}
	if show&sim.ShowMean != 0 {
		s += fmt.Sprintf(" mean %.2f", median(mean))
	}
	if show&sim.ShowShares != 0 {
		s += fmt.Sprintf(" shares %.2f to %.2f", median(least), median(most))
	}
	if show&sim.ShowHome != 0 {
		var home, first []float64
		for _, r := range c.results {
			home, first = append(home, 100*r.Home), append(first, 100*r.HomeOf[0])
		}
		s += fmt.Sprintf(" home %.1f %%, zone 0 %.1f %%", median(home), median(first))
	}
	if show&sim.ShowBeside != 0 {
		var crowd, beside []float64
		for _, r := range c.results {
			crowd, beside = append(crowd, r.Crowd), append(beside, r.Beside)
		}
		s += fmt.Sprintf(" crowd %.2f, beside %.2f", median(crowd), median(beside))
	}
	if f := median(failed); f > 0 {
		s += fmt.Sprintf(" %.2f %% failed", f)
	}
	return s
}

// median returns the lower median.
func median(v []float64) float64 {
	v = slices.Sorted(slices.Values(v))
	return v[(len(v)-1)/2]
}

// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

// Command simulate compares concurrency limits on simulated servers and prints a Markdown
// table. For each algorithm it has the goodput in % of the capacity, the mean latency of
// what was served in units of the mean work, and in parentheses the calls that limits
// refused in %, which are the mean of all seeds. A cell ends with what the row demands and
// the algorithm does not keep.
//
//	go run ./internal/limitsim/simulate
//	go run ./internal/limitsim/simulate -rows '20 workers' -algorithms ideal,auto,vegas -seeds 1
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

	"github.com/belfry-go/belfry/internal/limitsim"
)

func main() {
	switch err := run(os.Args[1:], os.Stdout, os.Stderr); {
	case errors.Is(err, flag.ErrHelp):
	case err != nil:
		fmt.Fprintln(os.Stderr, "simulate:", err)
		os.Exit(1)
	}
}

func run(args []string, out, errs io.Writer) error {
	fs := flag.NewFlagSet("simulate", flag.ContinueOnError)
	fs.SetOutput(errs)
	match := fs.String("rows", "", "regular expression that the names of the rows match; empty for all")
	names := fs.String("algorithms", "ideal,auto", "algorithms in the order of the columns, of "+strings.Join(limitsim.Algorithms(), ", "))
	seeds := fs.Int("seeds", 3, "runs of each row under each algorithm, at least 1; they have the seeds from -first")
	first := fs.Uint64("first", 1, "the first seed")
	long := fs.Bool("long", false, "the rows that take much time, too")
	parallel := fs.Int("parallel", runtime.GOMAXPROCS(0), "runs at the same time, at least 1")
	if err := fs.Parse(args); err != nil {
		return err
	}
	if *seeds < 1 || *parallel < 1 {
		return fmt.Errorf("-seeds %d and -parallel %d must be at least 1", *seeds, *parallel)
	}
	re, err := regexp.Compile(*match)
	if err != nil {
		return fmt.Errorf("-rows: %w", err)
	}
	rows := slices.DeleteFunc(limitsim.Rows(), func(r limitsim.Row) bool { return !re.MatchString(r.Name) || r.Long && !*long })
	algorithms := strings.Split(*names, ",")
	for _, a := range algorithms {
		if !slices.Contains(limitsim.Algorithms(), a) {
			return fmt.Errorf("-algorithms: %q, must be one of %s", a, strings.Join(limitsim.Algorithms(), ", "))
		}
	}

	table := make([][]cell, len(rows))
	for i := range table {
		table[i] = make([]cell, len(algorithms))
		for j := range table[i] {
			table[i][j].results = make([][]limitsim.Result, *seeds)
			table[i][j].running.Add(*seeds)
		}
	}
	go func() { // The upper rows first.
		turns := make(chan struct{}, *parallel)
		for i, row := range rows {
			for j, algorithm := range algorithms {
				for k := range *seeds {
					turns <- struct{}{}
					go func() {
						c := &table[i][j]
						defer func() { <-turns; c.running.Done() }()
						c.results[k], _ = row.Run(algorithm, *first+uint64(k)) // The names are right.
					}()
				}
			}
		}
	}()
	fmt.Fprintf(out, "| goodput / latency (refused) | %s |\n|%s\n", strings.Join(algorithms, " | "), strings.Repeat(" --- |", len(algorithms)+1))
	for i, row := range rows {
		fmt.Fprintf(out, "| %s |", row.Name)
		for j := range algorithms {
			fmt.Fprintf(out, " %s |", table[i][j].format(row, 0, row.Demands))
		}
		fmt.Fprintln(out)
		if row.Again == 0 {
			continue
		}
		fmt.Fprintf(out, "| %s, after %v minutes |", row.Name, row.Again.Minutes())
		for j := range algorithms {
			fmt.Fprintf(out, " %s |", table[i][j].format(row, 1, row.Later))
		}
		fmt.Fprintln(out)
	}
	return nil
}

// cell is the runs of a row under an algorithm.
type cell struct {
	results [][]limitsim.Result
	running sync.WaitGroup
}

// format waits for the runs and returns the means of their i-th measurements.
func (c *cell) format(row limitsim.Row, i int, d limitsim.Demands) string {
	c.running.Wait()
	var results []limitsim.Result
	for _, r := range c.results {
		results = append(results, r[i])
	}
	mean := limitsim.Mean(results)
	s := fmt.Sprintf("%.1f / %.2f (%.2f)", 100*mean.Goodput, mean.Latency, 100*mean.Refused)
	if row.Clients > 1 {
		s += fmt.Sprintf(", Jain %.3f", mean.Jain)
	}
	if mean.Rejected > 0 {
		s += fmt.Sprintf(", rejected %.2f", 100*mean.Rejected)
	}
	if mean.Late > 0.0005 {
		s += fmt.Sprintf(", late %.1f", 100*mean.Late)
	}
	if broken := d.Broken(mean); len(broken) > 0 {
		s += " **" + strings.Join(broken, ", ") + "**"
	}
	return s
}

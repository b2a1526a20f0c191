// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/belfry-go/belfry/resolver/discover"
)

// Bounds of the flags, against typing errors: beyond them the program would
// exhaust memory or ports rather than show anything.
const (
	maxEndpoints = 1000
	maxLatency   = time.Hour
	maxInFlight  = 100_000
	maxCalls     = 10_000_000
	maxCount     = 1000
	maxWorkers   = 1_000_000
)

// noReport as the value of -html asks for no report.
const noReport = "none"

// options is what the command line says.
type options struct {
	workload workload
	policies []policy
	count    int
	html     string // a path, or noReport
}

// defaultReport returns where the report goes. It is not the directory the
// program is started from, which may be a checkout. Users who share the one for
// temporary files cannot write each other's reports.
func defaultReport() string {
	name := "belfry-quickstart"
	if uid := os.Getuid(); uid >= 0 { // not on Windows, where each user has a directory
		name += fmt.Sprintf("-%d", uid)
	}
	return filepath.Join(os.TempDir(), name+".html")
}

// known are the policies that have a name, in the order in which they run.
var known = []policy{
	{"round_robin", lbConfig(`"round_robin": {}`),
		"grpc's: each endpoint in turn, whatever it takes."},
	{"least_request_experimental", lbConfig(`"least_request_experimental": {}`),
		"grpc's: of two endpoints drawn at random, the one with fewer calls in flight."},
	{"pendingRequests", lbConfig(`"belfry.p2c": {"load": {"pendingRequests": {}}}`),
		"belfry's with the metric of the one above."},
	// As in Tower's example, whose latencies the first estimate has to suit: with
	// the default of 1 s all endpoints look alike for seconds.
	{"peakEwma", lbConfig(`"belfry.p2c": {"load": {"peakEwma": {"decay": "10s", "defaultRtt": "0.030s"}}}`),
		"belfry's with Tower's metric: of two endpoints, the one with the lower recent latency times its calls in flight."},
	{"default", lbConfig(`"belfry.p2c": {}`),
		"belfry's as it is: of eight endpoints and the two best of before, the one where one more call is expected to take the least."},
}

// lbConfig returns the service config that chooses a policy.
func lbConfig(p string) string { return `{"loadBalancingConfig": [{` + p + `}]}` }

func knownNames() []string {
	var names []string
	for _, p := range known {
		names = append(names, p.name)
	}
	return names
}

const usageHead = `Quickstart starts ten gRPC servers of very different speed on loopback, calls them
through grpc-go's balancing policies and through belfry's, one after the other,
and compares the latencies that the client saw.

Usage: go run ./examples/quickstart [flags]

The cluster is that of Tower's tower-balance example, with real servers: each
call takes a random time, uniform from 0 to the maximum of the endpoint that gets
it. Calls are made in a closed loop. There is no warm-up: the first calls count,
made by policies that know nothing yet. Policies:

`

const usageTail = `
Interrupt it, and it stops at once and shows what it has measured so far.
`

// parseFlags returns what the arguments say. Help and errors are not printed: a
// wish for help is flag.ErrHelp with help on out.
func parseFlags(args []string, out io.Writer) (*options, error) {
	fs := flag.NewFlagSet("quickstart", flag.ContinueOnError)
	fs.SetOutput(io.Discard)
	var (
		maxima   = fs.String("max", "1ms,5ms,10ms,10ms,10ms,100ms,100ms,100ms,500ms,1s", "the cluster: a `list` of maximum latencies, an endpoint for each")
		workers  = fs.Int("workers", 0, "calls that each endpoint works on at a time, the others waiting in a\nFIFO queue before it; 0: all at once, without a queue")
		addTimer = fs.Bool("add-timer", false, "add 1.2ms to each latency, as the timer of Tower's runtime does, so that\np50 and mean compare with Tower's too")
		inFlight = fs.Int("in-flight", 500, "calls in flight at a time")
		calls    = fs.Int("calls", 100_000, "calls per policy in each run")
		names    = fs.String("policies", strings.Join(knownNames(), ","), "`names` of the policies to run, in this order; empty for none but those\nof -service-config")
		count    = fs.Int("count", 1, "how often to run all policies in turn; the table shows medians")
		seed     = fs.Uint64("seed", 1, "seed of the latencies, which are the same for every policy; repeated runs\n(-count) take the next ones")
		html     = fs.String("html", defaultReport(), "`path` of the report with charts, or "+noReport)
	)
	var extra []policy
	fs.Func("service-config", "one more policy, as `name=JSON` with a gRPC service config; may be given\nseveral times", func(s string) error {
		name, config, ok := strings.Cut(s, "=")
		if !ok || name == "" || strings.ContainsAny(name, "{}\n") {
			return errors.New("must be name=JSON")
		}
		extra = append(extra, policy{name, config, "Given by -service-config."})
		return nil
	})

	if err := fs.Parse(args); err != nil {
		if errors.Is(err, flag.ErrHelp) {
			printUsage(fs, out)
		}
		return nil, err
	}
	if fs.NArg() > 0 {
		return nil, fmt.Errorf("unexpected argument %q: there are only flags", fs.Arg(0))
	}

	o := &options{
		workload: workload{
			addTimer: *addTimer,
			workers:  *workers,
			inFlight: *inFlight,
			calls:    *calls,
			seed:     *seed,
		},
		count: *count,
		html:  *html,
	}
	for _, v := range []struct {
		flag          string
		value, lo, hi int
	}{
		{"workers", *workers, 0, maxWorkers},
		{"in-flight", *inFlight, 1, maxInFlight},
		{"calls", *calls, 1, maxCalls},
		{"count", *count, 1, maxCount},
	} {
		if v.value < v.lo || v.value > v.hi {
			return nil, fmt.Errorf("-%s is %d, must be from %d to %d", v.flag, v.value, v.lo, v.hi)
		}
	}
	var err error
	if o.workload.maxima, err = parseMaxima(*maxima); err != nil {
		return nil, err
	}
	if o.policies, err = choosePolicies(*names, extra); err != nil {
		return nil, err
	}
	if err := checkReport(*html); err != nil {
		return nil, err
	}
	return o, nil
}

func printUsage(fs *flag.FlagSet, out io.Writer) {
	fmt.Fprint(out, usageHead)
	for _, p := range known {
		fmt.Fprintf(out, "  %s\n      %s\n      %s\n", p.name, p.about, p.config)
	}
	fmt.Fprint(out, "\nFlags:\n\n")
	fs.SetOutput(out)
	fs.PrintDefaults()
	fmt.Fprint(out, usageTail)
}

func parseMaxima(list string) ([]time.Duration, error) {
	fields := strings.Split(list, ",")
	if len(fields) > maxEndpoints {
		return nil, fmt.Errorf("-max lists %d endpoints, must be at most %d", len(fields), maxEndpoints)
	}
	maxima := make([]time.Duration, len(fields))
	for i, f := range fields {
		d, err := time.ParseDuration(strings.TrimSpace(f))
		if err != nil {
			return nil, fmt.Errorf(`-max has %q, must be a list of durations such as "10ms,1.5s"`, f)
		}
		if d < 0 || d > maxLatency {
			return nil, fmt.Errorf("-max has %v, must be from 0 to %v", d, maxLatency)
		}
		maxima[i] = d
	}
	return maxima, nil
}

// choosePolicies returns the known policies of the list, and after them extra.
func choosePolicies(list string, extra []policy) ([]policy, error) {
	var policies []policy
	if list != "" {
		for _, name := range strings.Split(list, ",") {
			name = strings.TrimSpace(name)
			i := slices.IndexFunc(known, func(p policy) bool { return p.name == name })
			if i < 0 {
				return nil, fmt.Errorf("-policies has %q, must be of %s", name, strings.Join(knownNames(), ", "))
			}
			policies = append(policies, known[i])
		}
	}
	policies = append(policies, extra...)
	if len(policies) == 0 {
		return nil, errors.New(`-policies is "" and there is no -service-config, must name a policy`)
	}
	seen := make(map[string]bool)
	for _, p := range policies {
		if seen[p.name] {
			return nil, fmt.Errorf("policy %q is given twice, names must differ", p.name)
		}
		seen[p.name] = true
	}
	for _, p := range extra {
		if err := checkConfig(p); err != nil {
			return nil, err
		}
	}
	return policies, nil
}

// checkConfig has grpc parse the service config.
func checkConfig(p policy) error {
	source, err := discover.List()
	if err != nil {
		return err
	}
	conn, err := dial(source, p)
	if err != nil {
		return fmt.Errorf("-service-config %s: %w", p.name, err)
	}
	return conn.Close()
}

// checkReport finds out before the run, and not after it, that there is no place
// for the report.
func checkReport(path string) error {
	if path == noReport {
		return nil
	}
	if path == "" {
		return fmt.Errorf(`-html is "", must be a path or %s`, noReport)
	}
	if info, err := os.Stat(path); err == nil && info.IsDir() {
		return fmt.Errorf("-html is %s, must not be a directory", strconv.Quote(path))
	}
	if info, err := os.Stat(filepath.Dir(path)); err != nil || !info.IsDir() {
		return fmt.Errorf("-html is %s, must be in a directory that exists", strconv.Quote(path))
	}
	return nil
}

// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"context"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/belfry-go/belfry/internal/test/leaktest"
)

func TestMain(m *testing.M) { leaktest.Main(m) }

// threeServers are arguments for a run of about a second.
func threeServers(args ...string) []string {
	return append([]string{"-max", "0s,1ms,20ms", "-in-flight", "20", "-calls", "200"}, args...)
}

// Run shows a table and writes a report of it.
func TestRunWritesTableAndReport(t *testing.T) {
	path := filepath.Join(t.TempDir(), "report.html")
	var stdout, stderr, bar bytes.Buffer
	args := threeServers("-policies", "round_robin,default", "-html", path,
		"-service-config", `three=`+lbConfig(`"belfry.p2c": {"choiceCount": 3}`))
	if code := quickstart(t.Context(), args, &stdout, &stderr, &bar); code != exitOK {
		t.Fatalf("exit code is %d, want %d; stderr: %s", code, exitOK, &stderr)
	}
	out := stdout.String()
	for _, want := range []string{
		"\nround_robin ", "\ndefault ", "\nthree ",
		"p99 in ratio: default / round_robin ",
		"Report with charts: " + path + "\n",
	} {
		if !strings.Contains(out, want) {
			t.Errorf("output lacks %q:\n%s", want, out)
		}
	}
	if stderr.Len() > 0 {
		t.Errorf("stderr is %q, want nothing", &stderr)
	}
	page, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	checkPage(t, page)
}

// Run counts every call once at the client and at the servers.
func TestRunCountsEveryCallOnce(t *testing.T) {
	o, err := parseFlags(threeServers("-policies", "round_robin,peakEwma", "-count", "2", "-html", "none"), t.Output())
	if err != nil {
		t.Fatal(err)
	}
	announced := 0
	runs, err := measure(t.Context(), o.workload, o.policies, o.count, func(start) { announced++ })
	if err != nil {
		t.Fatal(err)
	}
	if len(runs) != 4 || announced != 4 {
		t.Fatalf("got %d runs and %d announcements, want 4 of each", len(runs), announced)
	}
	for i, r := range runs {
		if want := o.policies[i%2].name; r.policy.name != want || r.round != i/2 {
			t.Errorf("run %d is %s of round %d, want %s of round %d", i, r.policy.name, r.round, want, i/2)
		}
		arrived := 0
		for _, n := range r.served {
			arrived += n
		}
		if len(r.latencies) != 200 || r.errors != 0 || arrived != 200 || !r.complete {
			t.Errorf("%s: got %d latencies, %d errors (%v), %d calls at the servers, complete %v; want 200, 0, 200, true",
				r.policy.name, len(r.latencies), r.errors, r.example, arrived, r.complete)
		}
	}
	// A third each, give or take the calls before all endpoints were READY, of which a
	// busy machine may let there be many.
	even := func(r *run) bool {
		return !slices.ContainsFunc(r.served, func(n int) bool { return n < 55 || n > 80 })
	}
	for i := 0; !even(runs[0]); i++ {
		if i == 10 {
			t.Fatalf("round_robin sent %v of 200 calls to the endpoints, want about 67 to each", runs[0].served)
		}
		if runs, err = measure(t.Context(), o.workload, o.policies[:1], 1, func(start) {}); err != nil {
			t.Fatal(err)
		}
	}
}

// Interrupted run stops at once and shows what it measured.
func TestInterruptShowsWhatWasMeasured(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	path := filepath.Join(t.TempDir(), "report.html")
	// Calls one after the other, of 10 ms on average: minutes if not interrupted.
	args := []string{"-max", "20ms", "-in-flight", "1", "-calls", "10000", "-policies", "round_robin", "-html", path}
	var stdout, stderr bytes.Buffer
	interrupt := &onceWritten{
		when: func(line string) bool {
			return strings.Contains(line, "round_robin") && !strings.Contains(line, "  0 % of")
		},
		do: cancel,
	}
	if code := quickstart(ctx, args, &stdout, &stderr, interrupt); code != exitOK {
		t.Fatalf("exit code is %d, want %d; stderr: %s", code, exitOK, &stderr)
	}
	out := stdout.String()
	for _, want := range []string{"\nround_robin (interrupted) ", "round_robin was interrupted after ", "Report with charts: " + path} {
		if !strings.Contains(out, want) {
			t.Errorf("output lacks %q:\n%s", want, out)
		}
	}
	page, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	checkPage(t, page)
}

// Calls ended by an interrupt are neither latencies nor errors.
func TestInterruptedCallsDoNotCount(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	w := workload{maxima: []time.Duration{time.Hour}, inFlight: 5, calls: 100, seed: 1}
	s := start{policy: known[0], done: new(atomic.Int64)}
	// Whether the calls are on their way by then makes no difference.
	time.AfterFunc(300*time.Millisecond, cancel)
	r, err := w.run(ctx, s)
	if err != nil {
		t.Fatal(err)
	}
	if len(r.latencies) != 0 || r.errors != 0 || r.complete || s.done.Load() != 0 {
		t.Errorf("got %d latencies, %d errors (%v), complete %v, %d calls done; want none of them",
			len(r.latencies), r.errors, r.example, r.complete, s.done.Load())
	}
}

// Interrupt before the first call is said and writes no report.
func TestInterruptBeforeFirstCall(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	path := filepath.Join(t.TempDir(), "report.html")
	var stdout, stderr bytes.Buffer
	if code := quickstart(ctx, threeServers("-html", path), &stdout, &stderr, nil); code != exitOK {
		t.Errorf("exit code is %d, want %d; stderr: %s", code, exitOK, &stderr)
	}
	if want := "nothing was measured"; !strings.Contains(stdout.String(), want) {
		t.Errorf("output is %q, want it to say %q", &stdout, want)
	}
	if _, err := os.Stat(path); !os.IsNotExist(err) {
		t.Errorf("report: Stat returned %v, want that it does not exist", err)
	}
}

// Unwritable report fails after the table is shown.
func TestUnwritableReport(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "gone")
	if err := os.Mkdir(dir, 0o777); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(dir, "report.html")
	var stdout, stderr bytes.Buffer
	remove := &onceWritten{when: func(line string) bool { return strings.Contains(line, "round_robin") }, do: func() {
		if err := os.Remove(dir); err != nil {
			t.Error(err)
		}
	}}
	args := []string{"-max", "100ms", "-in-flight", "5", "-calls", "50", "-policies", "round_robin", "-html", path}
	if code := quickstart(t.Context(), args, &stdout, &stderr, remove); code != exitFailure {
		t.Errorf("exit code is %d, want %d", code, exitFailure)
	}
	if !strings.Contains(stdout.String(), "\nround_robin ") {
		t.Errorf("output lacks the table:\n%s", &stdout)
	}
	if !strings.Contains(stderr.String(), "quickstart: report: ") {
		t.Errorf("stderr is %q, want it to name the report", &stderr)
	}
}

// onceWritten is a writer that calls do once, when what is written to it calls
// for it.
type onceWritten struct {
	when func(string) bool
	do   func()
	once sync.Once
}

func (w *onceWritten) Write(p []byte) (int, error) {
	if w.when(string(p)) {
		w.once.Do(w.do)
	}
	return len(p), nil
}

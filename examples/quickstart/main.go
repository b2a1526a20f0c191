// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

// Quickstart shows what a balancing policy does to latency: it starts ten gRPC
// servers of very different speed on loopback, calls them through grpc-go's
// policies and through belfry's, one after the other, and compares the latencies
// that the client saw, as a table and as an HTML report with charts.
//
//	go run ./examples/quickstart
//	go run ./examples/quickstart -h
//
// The lines that a program needs to use belfry are in run.go, in workload.run
// and dial; the service configs are in flags.go.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"runtime/debug"
	"syscall"
)

// Exit codes. An interrupted run that shows what it measured has succeeded.
const (
	exitOK      = 0
	exitFailure = 1
	exitUsage   = 2
)

func main() {
	// The client and all servers share the processors, so what the collector takes
	// is missing in the calls. It may take memory instead: of a live heap of some
	// twenty megabytes, a few hundred.
	debug.SetGCPercent(1600)

	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	// A second interrupt ends the program whatever it does.
	context.AfterFunc(ctx, stop)

	var bar io.Writer
	if isTerminal(os.Stderr) {
		bar = os.Stderr
	}
	os.Exit(quickstart(ctx, os.Args[1:], os.Stdout, os.Stderr, bar))
}

// quickstart is the program: results go to stdout, errors to stderr, and the
// progress bar to bar, which may be nil. It stops early when ctx ends.
func quickstart(ctx context.Context, args []string, stdout, stderr, bar io.Writer) int {
	o, err := parseFlags(args, stdout)
	switch {
	case errors.Is(err, flag.ErrHelp):
		return exitOK
	case err != nil:
		fmt.Fprintf(stderr, "quickstart: %v\nquickstart -h explains the flags.\n", err)
		return exitUsage
	}

	p := newProgress(bar, o.workload)
	runs, err := measure(ctx, o.workload, o.policies, o.count, p.begin)
	p.stop()
	// What was measured before an error is shown too.
	if err == nil || len(runs) > 0 {
		err = errors.Join(err, show(o, runs, stdout))
	}
	if err != nil {
		fmt.Fprintf(stderr, "quickstart: %v\n", err)
		return exitFailure
	}
	return exitOK
}

// show writes the table and the report.
func show(o *options, runs []*run, stdout io.Writer) error {
	if err := writeResults(stdout, o.workload, o.count, runs); err != nil {
		return err
	}
	if o.html == noReport || len(summarize(runs)) == 0 {
		return nil
	}
	if err := saveReport(o, runs); err != nil {
		return fmt.Errorf("report: %w", err)
	}
	path, err := filepath.Abs(o.html)
	if err != nil {
		path = o.html
	}
	_, err = fmt.Fprintf(stdout, "\nReport with charts: %s\n", path)
	return err
}

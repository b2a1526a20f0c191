// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

// Bench sets belfry beside its peers and writes RESULTS.md, with charts:
//
//	cd bench && go run . -quick   # two minutes
//	cd bench && go run .          # half an hour
//
// It measures what a pick and the build of a policy take; what an interceptor
// takes; whole calls on loopback; and the latencies of a cluster whose servers are
// unequal, slow, stall or fail, under an open load. Run it on a machine that does
// nothing else: all rows of a table are measured in turn in each repeat, so noise
// meets them alike, but it remains noise. haproxy and nginx take part if they are
// installed.
//
// Peers run their published code, as a dependency. The module is one of its own so
// that users of belfry do not get these dependencies.
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
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/zeromicro/go-zero/core/logx"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, os.Args[1:], os.Stderr); err != nil && !errors.Is(err, flag.ErrHelp) {
		fmt.Fprintf(os.Stderr, "bench: %v\n", err)
		os.Exit(1)
	}
}

// keys are what -only may name, in the order of the page.
var keys = []string{"pick", "interceptors", "calls", "cluster"}

// run is the program.
func run(ctx context.Context, args []string, progress io.Writer) error {
	fs := flag.NewFlagSet("bench", flag.ContinueOnError)
	fs.SetOutput(progress)
	isQuick := fs.Bool("quick", false, "take two minutes instead of half an hour")
	dir := fs.String("out", ".", "`directory` of RESULTS.md and charts/")
	only := fs.String("only", strings.Join(keys, ","), "`sections` to measure; the page has no others then")
	seed := fs.Uint64("seed", 1, "seed of the arrivals and the work of calls; repeats take the next ones")
	if err := fs.Parse(args); err != nil {
		return err
	}
	if fs.NArg() > 0 {
		return fmt.Errorf("unexpected argument %q: there are only flags", fs.Arg(0))
	}
	p := full()
	if *isQuick {
		p = quick()
	}
	p.seed = *seed
	chosen := strings.Split(*only, ",")
	for _, k := range chosen {
		if !slices.Contains(keys, k) {
			return fmt.Errorf("-only has %q, must be of %s", k, strings.Join(keys, ", "))
		}
	}
	command := strings.Join(append([]string{"go run ."}, args...), " ")
	result, err := p.run(ctx, chosen, func(s string) { fmt.Fprintf(progress, "%s\n", s) })
	if err != nil {
		return err
	}
	result.command = command
	return result.save(*dir)
}

// run measures the chosen sections.
func (p plan) run(ctx context.Context, chosen []string, progress func(string)) (*page, error) {
	logx.Disable() // go-zero's, which would write to stdout
	if err := p.initBenchmarks(); err != nil {
		return nil, err
	}
	result := &page{plan: p, when: time.Now(), machine: thisMachine()}
	for _, key := range keys {
		if !slices.Contains(chosen, key) {
			continue
		}
		sections, missing, err := p.section(ctx, key, progress)
		if err != nil {
			return nil, err
		}
		result.sections = append(result.sections, sections...)
		result.missing = append(result.missing, missing...)
	}
	result.elapsed = time.Since(result.when)
	return result, nil
}

// section measures the sections of a key, and says what could not be compared.
func (p plan) section(ctx context.Context, key string, progress func(string)) (sections []*section, missing []string, err error) {
	var s *section
	switch key {
	case "pick":
		pick, build, err := pickAndBuild(ctx, p, progress)
		return []*section{pick, build}, nil, err
	case "interceptors":
		s, err = interceptors(ctx, p, progress)
	case "calls":
		s, err = wholeCalls(ctx, p, progress)
	case "cluster":
		s, missing, err = clusters(ctx, p, progress)
	}
	return []*section{s}, missing, err
}

// save writes the page and its charts.
func (p *page) save(dir string) error {
	if err := saveCharts(filepath.Join(dir, "charts"), p.sections); err != nil {
		return err
	}
	var b strings.Builder
	if err := p.write(&b); err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(dir, "RESULTS.md"), []byte(b.String()), 0o644)
}

// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

// Hotreload changes what happens to calls while they run: a client calls a gRPC
// server on loopback without a pause, while the limit, the timeout and the order of
// its layers are replaced by those of one JSON after another. One of them has a
// mistake, which changes nothing.
//
//	go run ./examples/hotreload
//
// The lines that a program needs are in run: stackconfig.Parse, NewStackFromConfig
// and Update. It takes about nine seconds; -step makes each of its steps longer or
// shorter.
package main

import (
	"context"
	"flag"
	"fmt"
	"io"
	"log"
	"maps"
	"os"
	"os/signal"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/status"

	"github.com/belfry-go/belfry/interceptor"
	"github.com/belfry-go/belfry/interceptor/stackconfig"
	"github.com/belfry-go/belfry/internal/testserver"
	testingv1 "github.com/belfry-go/belfry/proto/belfry/testing/v1"
)

// steps are the configs, as a file or a control plane would bring them. The limit
// has a name, so it is one and the same through all of them, with the calls that
// hold its permits and those that wait.
var steps = []struct{ title, config string }{
	{"ten calls at a time; the others wait", `{
		"methodConfig": [{"name": [{}], "layers": [
			{"name": "limit", "concurrency": {"limit": 10}}
		]}]}`},
	{"a tenth of a second for each call, waiting included; the queue serves the oldest call first, which is nearly out of time, so permits are wasted", `{
		"methodConfig": [{"name": [{}], "layers": [
			{"timeout": {"call": "0.1s"}},
			{"name": "limit", "concurrency": {"limit": 10}}
		]}]}`},
	{"of those that wait, the one that came last goes first, and has most of its time left", `{
		"methodConfig": [{"name": [{}], "layers": [
			{"timeout": {"call": "0.1s"}},
			{"name": "limit", "concurrency": {"limit": 10, "discipline": "DISCIPLINE_LIFO"}}
		]}]}`},
	{"a call that would have to wait is refused; five may wait", `{
		"methodConfig": [{"name": [{}], "layers": [
			{"loadShed": {}},
			{"timeout": {"call": "0.1s"}},
			{"buffer": {"size": 5}},
			{"name": "limit", "concurrency": {"limit": 10}}
		]}]}`},
	{"a limit of minus twenty, which is refused: all stays as it was", `{
		"methodConfig": [{"name": [{}], "layers": [
			{"loadShed": {}},
			{"timeout": {"call": "0.1s"}},
			{"buffer": {"size": 5}},
			{"name": "limit", "concurrency": {"limit": -20}}
		]}]}`},
	{"forty calls at a time", `{
		"methodConfig": [{"name": [{}], "layers": [
			{"loadShed": {}},
			{"timeout": {"call": "0.1s"}},
			{"buffer": {"size": 5}},
			{"name": "limit", "concurrency": {"limit": 40}}
		]}]}`},
}

func main() {
	step := flag.Duration("step", 1500*time.Millisecond, "how long each config holds")
	flag.Parse()
	if *step <= 0 || flag.NArg() > 0 {
		flag.Usage()
		os.Exit(2)
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	context.AfterFunc(ctx, stop) // A second signal ends the program whatever it does.
	if err := run(ctx, os.Stdout, *step); err != nil {
		log.Fatal(err)
	}
}

// run is the program. It returns the cause of ctx if that ends.
func run(ctx context.Context, out io.Writer, step time.Duration) error {
	server, err := testserver.Start(testserver.ServiceTime(testserver.Uniform(20*time.Millisecond, 60*time.Millisecond)))
	if err != nil {
		return err
	}
	defer server.Close()

	seen := newObserver()
	config, err := stackconfig.Parse([]byte(`{}`))
	if err != nil {
		return err
	}
	stack, err := stackconfig.NewStackFromConfig(config, stackconfig.WithObserver(seen))
	if err != nil {
		return err
	}
	conn, err := server.NewClient(stack.DialOptions()...)
	if err != nil {
		return err
	}
	defer conn.Close()

	loading, cancel := context.WithCancel(ctx)
	var wg sync.WaitGroup
	wg.Go(func() { load(loading, conn) })
	defer wg.Wait()
	defer cancel()
	for _, s := range steps {
		fmt.Fprintf(out, "%s\n", s.title)
		config, err := stackconfig.Parse([]byte(s.config))
		if err == nil {
			_, err = stack.Update(config)
		}
		if err != nil {
			fmt.Fprintf(out, "  nothing has changed: %v\n", err)
		}
		fmt.Fprintf(out, "  %v\n", stack)
		seen.take() // What happened until now.
		begin := time.Now()
		select {
		case <-time.After(step):
		case <-ctx.Done():
			return context.Cause(ctx)
		}
		fmt.Fprintf(out, "  %s; %d in flight\n", seen.take().per(time.Since(begin)), stack.InFlight())
	}
	return nil
}

// load makes 500 calls a second, which is more than ten at a time can be, until ctx
// ends.
func load(ctx context.Context, conn grpc.ClientConnInterface) {
	client := testingv1.NewTestServiceClient(conn)
	ticker := time.NewTicker(2 * time.Millisecond)
	defer ticker.Stop()
	var wg sync.WaitGroup
	defer wg.Wait()
	for {
		select {
		case <-ticker.C:
			wg.Go(func() { _, _ = client.Unary(ctx, &testingv1.UnaryRequest{}) }) // The observer sees how it ends.
		case <-ctx.Done():
			return
		}
	}
}

// observer counts how calls end.
type observer struct {
	interceptor.NopObserver
	mu     sync.Mutex // Guards counts.
	counts counts
}

type counts map[string]int

func newObserver() *observer { return &observer{counts: counts{}} }

func (o *observer) add(what string) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.counts[what]++
}

// Ended is called for each call that was admitted.
func (o *observer) Ended(_ interceptor.Observed, e interceptor.ObservedEnd) {
	if _, refused := interceptor.AsRefusal(e.Err); !refused { // Those are counted below.
		o.add(status.Code(e.Err).String())
	}
}

// Refused is called for each call that a layer refused or cut short.
func (o *observer) Refused(_ interceptor.Observed, r *interceptor.Refusal) {
	o.add(fmt.Sprintf("%s by %s", r.Reason, r.Layer))
}

// take returns the counts since it was last called.
func (o *observer) take() counts {
	o.mu.Lock()
	defer o.mu.Unlock()
	c := o.counts
	o.counts = counts{}
	return c
}

// per is the counts per second.
func (c counts) per(d time.Duration) string {
	var s []string
	for _, what := range slices.Sorted(maps.Keys(c)) {
		s = append(s, fmt.Sprintf("%.0f %s", float64(c[what])/d.Seconds(), what))
	}
	return "a second: " + strings.Join(s, ", ")
}

// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

// Hedging shows what a second attempt for the slowest calls does to the tail of
// the latency. It starts five gRPC servers on loopback, each of which stalls for
// 100 ms every two seconds, as a garbage collector or a busy machine makes them, and
// calls them through two channels at the same time: one with a hedge in its stack,
// one without.
//
//	go run ./examples/hedging
//
// The lines that a program needs are in dial. It takes ten seconds; -for makes it
// longer, and -extra lets more or fewer calls have a second attempt.
package main

import (
	"context"
	"flag"
	"fmt"
	"io"
	"log"
	"os"
	"os/signal"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"google.golang.org/grpc"

	"github.com/belfry-go/belfry/balancer/p2c"
	"github.com/belfry-go/belfry/interceptor"
	"github.com/belfry-go/belfry/interceptor/hedge"
	"github.com/belfry-go/belfry/internal/testserver"
	testingv1 "github.com/belfry-go/belfry/proto/belfry/testing/v1"
	"github.com/belfry-go/belfry/resolver/discover"
)

func main() {
	d := flag.Duration("for", 10*time.Second, "how long calls are made")
	extra := flag.Float64("extra", 0.05, "the share of calls that may have a second attempt")
	flag.Parse()
	if *d <= 0 || flag.NArg() > 0 {
		flag.Usage()
		os.Exit(2)
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	context.AfterFunc(ctx, stop) // A second signal ends the program whatever it does.
	if err := run(ctx, os.Stdout, *d, *extra); err != nil {
		log.Fatal(err)
	}
}

// dial returns a channel to the servers, balanced by belfry.p2c. With extra above
// zero that share of its calls may have a second attempt, which goes to another
// server than the first.
func dial(cluster *testserver.Cluster, extra float64) (*client, error) {
	c := new(client)
	stack, err := interceptor.NewStack(
		interceptor.Observe(c),
		interceptor.Optional(extra != 0, hedge.Config{
			MaxExtraLoad: extra,
			// The test service changes nothing, so its methods may be carried out twice.
			Methods: []string{"/belfry.testing.v1.TestService/"},
		}),
	)
	if err != nil {
		return nil, err
	}
	source, err := discover.List(cluster.Endpoints()...)
	if err != nil {
		return nil, err
	}
	opts := append(stack.DialOptions(), p2c.DialOptions()...)
	opts = append(opts, cluster.DialOptions()...) // Credentials.
	c.conn, err = grpc.NewClient("belfry:///hedging", append(opts,
		discover.WithSource(source))...)
	return c, err
}

// run is the program. It returns the cause of ctx if that ends.
func run(ctx context.Context, out io.Writer, d time.Duration, extra float64) error {
	const (
		servers   = 5
		perSecond = 500 // Calls of each client.
		stall     = 100 * time.Millisecond
		every     = 2 * time.Second
	)
	cluster, err := testserver.StartCluster(servers, func(int) []testserver.Option {
		return []testserver.Option{testserver.ServiceTime(testserver.Exponential(2 * time.Millisecond))}
	})
	if err != nil {
		return err
	}
	defer cluster.Close()
	without, err := dial(cluster, 0)
	if err != nil {
		return err
	}
	defer without.conn.Close()
	with, err := dial(cluster, extra)
	if err != nil {
		return err
	}
	defer with.conn.Close()

	fmt.Fprintf(out, "%d servers, each stalls for %v every %v\n\n", servers, stall, every)
	during, cancel := context.WithTimeout(ctx, d)
	defer cancel()
	var wg sync.WaitGroup
	for i, s := range cluster.Servers() {
		wg.Go(func() { stalls(during, s, stall, every, time.Duration(i)*every/servers) })
	}
	for _, c := range []*client{without, with} {
		wg.Go(func() { c.load(during, time.Second/perSecond) })
	}
	wg.Wait()

	fmt.Fprintf(out, "%-16s %8s %8s %8s %8s %8s %8s %8s\n", "", "calls", "errors", "p50", "p95", "p99", "p99.9", "extra")
	without.print(out, "without a hedge")
	with.print(out, "with a hedge")
	return context.Cause(ctx)
}

// stalls makes a server stall again and again until ctx ends.
func stalls(ctx context.Context, s *testserver.Server, d, every, next time.Duration) {
	for begin := time.Now(); ; next += every {
		select {
		case <-time.After(time.Until(begin.Add(next))):
			if err := s.StallFor(d); err != nil {
				log.Print(err)
			}
		case <-ctx.Done():
			return
		}
	}
}

// client is a channel, and what became of its calls.
type client struct {
	interceptor.NopObserver
	conn *grpc.ClientConn

	attempts, errors atomic.Int64
	mu               sync.Mutex // Guards latencies.
	latencies        []time.Duration
}

// Attempt is called by the stack for each attempt, the first included.
func (c *client) Attempt(interceptor.Observed) { c.attempts.Add(1) }

// load makes a call every gap, however long they take, until ctx ends.
func (c *client) load(ctx context.Context, gap time.Duration) {
	stub := testingv1.NewTestServiceClient(c.conn)
	ticker := time.NewTicker(gap)
	defer ticker.Stop()
	var wg sync.WaitGroup
	defer wg.Wait()
	for {
		wg.Go(func() {
			begin := time.Now()
			_, err := stub.Unary(context.WithoutCancel(ctx), &testingv1.UnaryRequest{})
			took := time.Since(begin)
			if err != nil {
				c.errors.Add(1)
			}
			c.mu.Lock()
			defer c.mu.Unlock()
			c.latencies = append(c.latencies, took)
		})
		select {
		case <-ticker.C:
		case <-ctx.Done():
			return
		}
	}
}

// print writes a line of the table.
func (c *client) print(out io.Writer, name string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	slices.Sort(c.latencies)
	n := len(c.latencies)
	quantile := func(q float64) time.Duration {
		return c.latencies[int(q*float64(n-1))].Round(100 * time.Microsecond)
	}
	fmt.Fprintf(out, "%-16s %8d %8d %8v %8v %8v %8v %7.1f%%\n", name, n, c.errors.Load(),
		quantile(0.5), quantile(0.95), quantile(0.99), quantile(0.999),
		100*(float64(c.attempts.Load())/float64(n)-1))
}

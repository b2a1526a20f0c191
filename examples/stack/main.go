// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

// Stack shows what each layer of a stack does when servers stall, fail, are
// overloaded and recover. It starts three gRPC servers on loopback and calls them
// through the stack and belfry.p2c, while their fortunes change.
//
//	go run ./examples/stack
//
// The lines that a program needs to use a stack are in newStack and dial. It takes
// about ten seconds; -phase makes each of its six phases longer or shorter.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"log"
	"os"
	"os/signal"
	"sync"
	"syscall"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"

	"github.com/belfry-go/belfry/balancer/p2c"
	"github.com/belfry-go/belfry/interceptor"
	"github.com/belfry-go/belfry/interceptor/breaker"
	"github.com/belfry-go/belfry/interceptor/buffer"
	"github.com/belfry-go/belfry/interceptor/concurrency"
	"github.com/belfry-go/belfry/interceptor/hedge"
	"github.com/belfry-go/belfry/interceptor/loadshed"
	"github.com/belfry-go/belfry/interceptor/retry"
	"github.com/belfry-go/belfry/interceptor/timeout"
	"github.com/belfry-go/belfry/internal/testserver"
	testingv1 "github.com/belfry-go/belfry/proto/belfry/testing/v1"
	"github.com/belfry-go/belfry/resolver/discover"
)

func main() {
	phase := flag.Duration("phase", 1500*time.Millisecond, "how long each phase takes")
	flag.Parse()
	if *phase <= 0 || flag.NArg() > 0 {
		flag.Usage()
		os.Exit(2)
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	context.AfterFunc(ctx, stop) // A second signal ends the program whatever it does.
	if err := run(ctx, os.Stdout, *phase, 300); err != nil {
		log.Fatal(err)
	}
}

// reads names what may be carried out more than once: the test service changes nothing. A
// method that its .proto file declares idempotent need not be named.
var reads = []string{"/belfry.testing.v1.TestService/"}

// newStack returns the stack, its outermost layer first.
func newStack(obs interceptor.Observer) (*interceptor.Stack, error) {
	return interceptor.NewStack(
		interceptor.Observe(obs),
		// A call that nothing inside is ready for is refused at once.
		loadshed.Config{},
		// A call has one second, with all its attempts and back-offs.
		timeout.Config{Timeout: time.Second},
		// The slowest calls, 5 % at most, get a second attempt; the first success counts.
		hedge.Config{Methods: reads},
		// What failed is repeated, as long as that is little beside the calls.
		retry.Config{Methods: reads},
		// 50 attempts may wait after all
		buffer.Config{Size: 50},
		// for one of the 20 that run at a time to end.
		concurrency.Config{Limit: 20},
		// When half of the attempts of a second fail, nothing is sent for a fifth of a
		// second, and then one attempt to find out.
		breaker.Config{Window: time.Second, OpenFor: time.Second / 5, OpenGrowth: 1},
	)
}

// dial returns a channel through the stack to the servers, balanced by belfry.p2c.
func dial(stack *interceptor.Stack, cluster *testserver.Cluster) (*grpc.ClientConn, error) {
	source, err := discover.List(cluster.Endpoints()...)
	if err != nil {
		return nil, err
	}
	opts := append(stack.DialOptions(), p2c.DialOptions()...)
	opts = append(opts, cluster.DialOptions()...) // Credentials.
	return grpc.NewClient("belfry:///stack", append(opts,
		discover.WithSource(source))...)
}

// run is the program, with usual calls a second until ten times as many come. It
// returns the cause of ctx if that ends.
func run(ctx context.Context, out io.Writer, phase time.Duration, usual int) error {
	// Each server works on four calls at a time: together they serve some 2,400 a second.
	cluster, err := testserver.StartCluster(3, func(int) []testserver.Option {
		return []testserver.Option{testserver.ServiceTime(testserver.Exponential(5 * time.Millisecond)), testserver.Workers(4)}
	})
	if err != nil {
		return err
	}
	defer cluster.Close()
	obs := newObserver()
	stack, err := newStack(obs)
	if err != nil {
		return err
	}
	conn, err := dial(stack, cluster)
	if err != nil {
		return err
	}
	defer conn.Close()
	client := testingv1.NewTestServiceClient(conn)

	fmt.Fprintln(out, stack)
	for _, p := range []struct {
		title     string
		perSecond int
		begin     func(ctx context.Context) error // What happens to the servers; ctx ends with the phase.
	}{
		{"all servers are well", usual, nil},
		{"server-0 stalls for 100ms every 300ms", usual, func(ctx context.Context) error {
			go stalls(ctx, cluster.Server(0))
			return nil
		}},
		{"server-1 fails every call", usual, func(context.Context) error { return cluster.Server(1).Fail(codes.Unavailable, 1) }},
		{"all servers fail every call", usual, func(context.Context) error {
			for _, s := range cluster.Servers() {
				if err := s.Fail(codes.Unavailable, 1); err != nil {
					return err
				}
			}
			return nil
		}},
		{"all servers are well again", usual, func(context.Context) error {
			for _, s := range cluster.Servers() {
				s.Heal()
			}
			return nil
		}},
		{"ten times as many calls", 10 * usual, nil},
	} {
		during, cancel := context.WithTimeout(ctx, phase)
		if p.begin != nil {
			if err := p.begin(during); err != nil {
				cancel()
				return err
			}
		}
		load(during, client, obs, p.perSecond)
		cancel()
		if ctx.Err() != nil {
			break
		}
		fmt.Fprintf(out, "\n%s\n%s", p.title, obs.take())
	}
	drain, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	return errors.Join(context.Cause(ctx), stack.Drain(drain))
}

// stalls makes a server stall now and then until ctx ends.
func stalls(ctx context.Context, s *testserver.Server) {
	ticker := time.NewTicker(300 * time.Millisecond)
	defer ticker.Stop()
	for {
		select {
		case <-ticker.C:
			if err := s.StallFor(100 * time.Millisecond); err != nil {
				log.Print(err)
			}
		case <-ctx.Done():
			return
		}
	}
}

// load makes calls at a steady rate, however long they take, until ctx ends, and
// waits for them.
func load(ctx context.Context, client testingv1.TestServiceClient, obs *observer, perSecond int) {
	const tick = 5 * time.Millisecond
	ticker := time.NewTicker(tick)
	defer ticker.Stop()
	var wg sync.WaitGroup
	begin := time.Now()
	for made := 0; ; {
		for due := int(time.Since(begin).Seconds() * float64(perSecond)); made < due; made++ {
			wg.Go(func() {
				begin := time.Now()
				_, err := client.Unary(context.WithoutCancel(ctx), &testingv1.UnaryRequest{})
				obs.returned(time.Since(begin), err)
			})
		}
		select {
		case <-ticker.C:
		case <-ctx.Done():
			wg.Wait()
			return
		}
	}
}

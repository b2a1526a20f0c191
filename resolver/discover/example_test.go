// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package discover_test

import (
	"context"
	"fmt"
	"iter"
	"net"
	"time"

	"github.com/belfry-go/belfry/resolver/discover"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/health"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/resolver"
)

// serve starts a gRPC server with the health service.
func serve() (addr string, stop func()) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		panic(err)
	}
	s := grpc.NewServer()
	healthpb.RegisterHealthServer(s, health.NewServer())
	done := make(chan struct{})
	go func() {
		defer close(done)
		_ = s.Serve(l) // ends with Stop
	}()
	return l.Addr().String(), func() { s.Stop(); <-done }
}

// A fixed list of endpoints, given to a channel by value.
func Example() {
	addr, stop := serve()
	defer stop()

	endpoint, err := discover.Endpoint(addr, discover.Weight(2), discover.Zone("a"))
	if err != nil {
		panic(err)
	}
	src, err := discover.List(endpoint)
	if err != nil {
		panic(err)
	}
	conn, err := grpc.NewClient("belfry:///orders", discover.WithSource(src),
		grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		panic(err)
	}
	defer conn.Close()

	reply, err := healthpb.NewHealthClient(conn).Check(context.Background(), &healthpb.HealthCheckRequest{})
	fmt.Println(reply.GetStatus(), err)
	// Output: SERVING <nil>
}

// A program that knows by itself which servers there are.
func ExampleChannel() {
	addr, stop := serve()
	defer stop()

	changes := make(chan discover.Change, 16)
	src, err := discover.Channel(changes)
	if err != nil {
		panic(err)
	}
	conn, err := grpc.NewClient("belfry:///orders", discover.WithSource(src),
		grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		panic(err)
	}
	defer conn.Close()

	changes <- discover.Insert("server-1", discover.MustEndpoint(addr))
	changes <- discover.Synced()

	reply, err := healthpb.NewHealthClient(conn).Check(context.Background(), &healthpb.HealthCheckRequest{})
	fmt.Println(reply.GetStatus(), err)
	// Output: SERVING <nil>
}

// Sources combine: a list in a registry that is asked every minute, and a
// fallback that is always there.
func ExampleMerge() {
	registry, err := discover.Poll(func(ctx context.Context) ([]resolver.Endpoint, error) {
		return []resolver.Endpoint{discover.MustEndpoint("10.0.0.1:443", discover.Key("pod-1"))}, nil
	}, time.Minute)
	if err != nil {
		panic(err)
	}
	fallback, err := discover.List(discover.MustEndpoint("10.9.9.9:443"))
	if err != nil {
		panic(err)
	}
	src, err := discover.Merge(registry, fallback)
	if err != nil {
		panic(err)
	}

	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	inserts := map[string]string{}
watch:
	for element, err := range src.Watch(ctx) {
		if err != nil {
			panic(err)
		}
		for change := range element.All() {
			switch change.Op {
			case discover.OpInsert:
				inserts[change.Key] = change.Endpoint.Addresses[0].Addr
			case discover.OpSynced:
				break watch
			}
		}
	}
	fmt.Println(inserts)
	// Output: map[0/pod-1:10.0.0.1:443 1/10.9.9.9:443:10.9.9.9:443]
}

// blinker is a source of one's own: a server that comes and goes.
type blinker struct {
	addr  string
	every time.Duration
}

func (b blinker) Watch(ctx context.Context) iter.Seq2[discover.Change, error] {
	return func(yield func(discover.Change, error) bool) {
		endpoint, err := discover.Endpoint(b.addr)
		if err != nil {
			yield(discover.Change{}, err)
			return
		}
		ticks := time.NewTicker(b.every)
		defer ticks.Stop()
		// The snapshot that a watch begins with: nothing.
		if !yield(discover.Synced(), nil) {
			return
		}
		for on := true; ; on = !on {
			select {
			case <-ctx.Done():
				return
			case <-ticks.C:
			}
			change := discover.Remove("it")
			if on {
				change = discover.Insert("it", endpoint)
			}
			if !yield(change, nil) {
				return
			}
		}
	}
}

func ExampleSource() {
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	n := 0
	for change := range (blinker{addr: "10.0.0.1:443", every: time.Millisecond}).Watch(ctx) {
		fmt.Printf("%v%q\n", change.Op, change.Key)
		if n++; n == 3 {
			break
		}
	}
	// Output:
	// Synced""
	// Insert"it"
	// Remove"it"
}

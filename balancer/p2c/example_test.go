// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package p2c_test

import (
	"context"
	"fmt"
	"log"
	"sync"
	"sync/atomic"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/resolver"
	"google.golang.org/grpc/resolver/manual"

	"github.com/belfry-go/belfry/balancer/p2c"
	"github.com/belfry-go/belfry/internal/testserver"
	testingv1 "github.com/belfry-go/belfry/proto/belfry/testing/v1"
)

// A snapshot says what the policy knows of each endpoint, and why calls go elsewhere.
func ExampleSnapshotsOf() {
	servers, err := testserver.StartCluster(2, func(i int) []testserver.Option {
		return []testserver.Option{testserver.ServiceTime(testserver.Fixed([]time.Duration{1, 100}[i] * time.Millisecond))}
	})
	if err != nil {
		log.Fatal(err)
	}
	defer servers.Close()
	discovery := manual.NewBuilderWithScheme("example")
	discovery.InitialState(resolver.State{Endpoints: servers.Endpoints()})
	conn, err := grpc.NewClient("example:///orders", append(p2c.DialOptions(),
		grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithResolvers(discovery),
	)...)
	if err != nil {
		log.Fatal(err)
	}
	defer conn.Close()

	client := testingv1.NewTestServiceClient(conn)
	var snapshot p2c.Snapshot
	for snapshot.Picks == 0 || snapshot.Endpoints[1].Samples == 0 || snapshot.Endpoints[1].PassedOver == "" {
		if _, err := client.Unary(context.Background(), &testingv1.UnaryRequest{}); err != nil {
			log.Fatal(err)
		}
		snapshot = p2c.SnapshotsOf(conn)[0]
	}
	slow := snapshot.Endpoints[1]
	fmt.Println(snapshot.Target, snapshot.State)
	fmt.Println(slow.State, slow.Latency > 10*time.Millisecond, slow.PassedOver)
	// Output:
	// example:///orders READY
	// READY true costs more
}

// DialOptions choose the policy, and let it see the true end of calls and the first
// response of streams.
func Example() {
	// Three servers, one of which is a hundred times slower than the others.
	servers, err := testserver.StartCluster(3, func(i int) []testserver.Option {
		return []testserver.Option{testserver.ServiceTime(testserver.Fixed([]time.Duration{2, 2, 200}[i] * time.Millisecond))}
	})
	if err != nil {
		log.Fatal(err)
	}
	defer servers.Close()
	discovery := manual.NewBuilderWithScheme("example")
	discovery.InitialState(resolver.State{Endpoints: servers.Endpoints()})

	conn, err := grpc.NewClient("example:///orders", append(p2c.DialOptions(),
		grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithResolvers(discovery),
	)...)
	if err != nil {
		log.Fatal(err)
	}
	defer conn.Close()

	client := testingv1.NewTestServiceClient(conn)
	const calls = 400
	var slow atomic.Int64
	var wg sync.WaitGroup
	for range 4 { // callers
		wg.Go(func() {
			for range calls / 4 {
				r, err := client.Unary(context.Background(), &testingv1.UnaryRequest{})
				if err != nil {
					log.Print(err)
					return
				}
				if r.GetObserved().GetServer() == "server-2" {
					slow.Add(1)
				}
			}
		})
	}
	wg.Wait()
	fmt.Println("the slow server got less than half a fair share:", slow.Load() < calls/3/2)
	// Output: the slow server got less than half a fair share: true
}

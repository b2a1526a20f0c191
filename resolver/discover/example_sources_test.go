// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package discover_test

import (
	"context"
	"fmt"
	"iter"
	"strings"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/resolver"

	"github.com/belfry-go/belfry/resolver/discover"
)

// firstSet prints the addresses of the first set of a source.
func firstSet(src discover.Source, err error) {
	if err != nil {
		fmt.Println(err)
		return
	}
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	for element, err := range src.Watch(ctx) {
		if err != nil {
			fmt.Println(err)
			return
		}
		for change := range element.All() {
			switch change.Op {
			case discover.OpInsert:
				fmt.Println(change.Endpoint.Addresses[0].Addr)
			case discover.OpSynced:
				return
			}
		}
	}
}

// A name in DNS is followed; an address is an endpoint by itself.
func ExampleDNS() {
	firstSet(discover.DNS("10.0.0.1:8080"))
	_, err := discover.DNS("orders.prod.svc.cluster.local") // has no port
	fmt.Println(err != nil)
	// Output:
	// 10.0.0.1:8080
	// true
}

func ExampleList() {
	firstSet(discover.List(
		discover.MustEndpoint("10.0.0.1:8080", discover.Weight(2)),
		discover.MustEndpoint("10.0.0.2:8080"),
	))
	// Output:
	// 10.0.0.1:8080
	// 10.0.0.2:8080
}

// A registry that is asked every minute.
func ExamplePoll() {
	ask := func(ctx context.Context) ([]resolver.Endpoint, error) {
		return []resolver.Endpoint{discover.MustEndpoint("10.0.0.1:8080")}, nil
	}
	firstSet(discover.Poll(ask, time.Minute))
	// Output: 10.0.0.1:8080
}

// A registry that calls with a complete set when anything changes.
func ExampleFullSets() {
	sets := make(chan []string, 1)
	sets <- []string{"10.0.0.1:8080", "10.0.0.2:8080"}
	firstSet(discover.FullSets(func(ctx context.Context) iter.Seq2[[]resolver.Endpoint, error] {
		return func(yield func([]resolver.Endpoint, error) bool) {
			for {
				select {
				case <-ctx.Done():
					return
				case addresses := <-sets:
					var set []resolver.Endpoint
					for _, a := range addresses {
						set = append(set, discover.MustEndpoint(a))
					}
					if !yield(set, nil) {
						return
					}
				}
			}
		}
	}))
	// Unordered output:
	// 10.0.0.1:8080
	// 10.0.0.2:8080
}

// A stream of changes that never says where its first set ends.
func ExampleSettle() {
	changes := make(chan discover.Change, 1)
	changes <- discover.Insert("server-1", discover.MustEndpoint("10.0.0.1:8080"))
	src, err := discover.Channel(changes)
	if err != nil {
		fmt.Println(err)
		return
	}
	firstSet(discover.Settle(src, 10*time.Millisecond))
	// Output: 10.0.0.1:8080
}

// A scheme of one channel, whose targets name the endpoints. Register does the same for
// all channels of a program.
func ExampleNewBuilder() {
	builder, err := discover.NewBuilder("fixed", func(target resolver.Target) (discover.Source, error) {
		var endpoints []resolver.Endpoint
		for address := range strings.SplitSeq(target.Endpoint(), ",") {
			ep, err := discover.Endpoint(address)
			if err != nil {
				return nil, err
			}
			endpoints = append(endpoints, ep)
		}
		return discover.List(endpoints...)
	})
	if err != nil {
		fmt.Println(err)
		return
	}
	conn, err := grpc.NewClient("fixed:///10.0.0.1:8080,10.0.0.2:8080", grpc.WithResolvers(builder),
		grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		fmt.Println(err)
		return
	}
	defer conn.Close()
	fmt.Println(conn.CanonicalTarget())
	// Output: fixed:///10.0.0.1:8080,10.0.0.2:8080
}

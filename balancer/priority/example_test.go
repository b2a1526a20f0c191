// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package priority_test

import (
	"fmt"
	"log"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	_ "github.com/belfry-go/belfry/balancer/priority" // registers belfry.priority
	"github.com/belfry-go/belfry/resolver/discover"
)

// Calls go to the first region, and to the second while more than half of the first is
// gone.
func Example() {
	src, err := discover.List(
		discover.MustEndpoint("10.0.0.1:443"),
		discover.MustEndpoint("10.0.0.2:443"),
		discover.MustEndpoint("10.1.0.1:443", discover.Group(1)),
	)
	if err != nil {
		log.Fatal(err)
	}
	conn, err := grpc.NewClient("belfry:///orders", discover.WithSource(src),
		grpc.WithDefaultServiceConfig(`{"loadBalancingConfig": [{"belfry.priority": {"minHealthy": 0.5}}]}`),
		grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		log.Fatal(err)
	}
	defer conn.Close()
	fmt.Println(conn.Target())
	// Output: belfry:///orders
}

// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package aperture_test

import (
	"fmt"
	"log"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	_ "github.com/belfry-go/belfry/balancer/aperture" // registers belfry.aperture
	"github.com/belfry-go/belfry/resolver/discover"
)

// The third of ten clients connects to its share of a hundred servers.
func Example() {
	src, err := discover.DNS("orders.prod.svc.cluster.local:8080")
	if err != nil {
		log.Fatal(err)
	}
	conn, err := grpc.NewClient("belfry:///orders", discover.WithSource(src),
		grpc.WithDefaultServiceConfig(`{"loadBalancingConfig": [{"belfry.aperture": {"ordinal": 2, "peers": 10}}]}`),
		grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		log.Fatal(err)
	}
	defer conn.Close()
	fmt.Println(conn.Target())
	// Output: belfry:///orders
}

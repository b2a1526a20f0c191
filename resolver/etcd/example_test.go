// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package etcd_test

import (
	"context"
	"fmt"
	"log"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/belfry-go/belfry/resolver/discover"
	"github.com/belfry-go/belfry/resolver/etcd"
)

// It needs an etcd on 127.0.0.1:2379, and so is only compiled.
func Example() {
	client, err := clientv3.New(clientv3.Config{
		Endpoints:            []string{"127.0.0.1:2379"},
		DialKeepAliveTime:    10 * time.Second, // finds dead connections
		DialKeepAliveTimeout: 5 * time.Second,
	})
	if err != nil {
		log.Fatal(err)
	}
	defer client.Close()
	ctx := context.Background()

	// The server.
	reg, err := etcd.Register(ctx, client, "services/orders", discover.MustEndpoint("10.0.0.1:8080", discover.Zone("a")), 0)
	if err != nil {
		log.Fatal(err)
	}
	defer func() {
		if err := reg.Leave(ctx); err != nil {
			log.Print(err)
		}
	}()

	// The client.
	src, err := etcd.New(client, "services/orders")
	if err != nil {
		log.Fatal(err)
	}
	conn, err := grpc.NewClient("belfry:///orders", discover.WithSource(src), grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		log.Fatal(err)
	}
	defer conn.Close()
	fmt.Println(conn.Target())
}

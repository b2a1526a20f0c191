// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package testserver

import (
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/resolver"
	"google.golang.org/grpc/resolver/manual"

	testingv1 "github.com/belfry-go/belfry/proto/belfry/testing/v1"
)

// Cluster servers are reached by their endpoints.
func TestClusterEndpoints(t *testing.T) {
	for name, where := range map[string][]Option{"loopback": {}, "memory": {InMemory()}} {
		t.Run(name, func(t *testing.T) {
			c := NewCluster(t, 3, func(int) []Option { return where })
			r := manual.NewBuilderWithScheme("cluster")
			r.InitialState(resolver.State{Endpoints: c.Endpoints()})
			conn, err := grpc.NewClient("cluster:///", append(c.DialOptions(),
				grpc.WithResolvers(r),
				grpc.WithDefaultServiceConfig(`{"loadBalancingConfig":[{"round_robin":{}}]}`))...)
			must(t, err)
			defer func() { must(t, conn.Close()) }()
			ctx := testContext(t)
			conn.Connect()
			for _, s := range c.Servers() {
				must(t, s.WaitConnections(ctx, 1))
			}
			client := testingv1.NewTestServiceClient(conn)
			seen := make(map[string]bool)
			for len(seen) < 3 {
				r, err := client.Unary(ctx, &testingv1.UnaryRequest{})
				must(t, err)
				seen[r.GetObserved().GetServer()] = true
			}
			for _, want := range []string{"server-0", "server-1", "server-2"} {
				if !seen[want] {
					t.Errorf("servers that answered: got %v, want %s among them", seen, want)
				}
			}
			if got, want := len(c.Addrs()), 3; got != want {
				t.Errorf("addresses: got %d, want %d", got, want)
			}
		})
	}
}

// Cluster servers have models of their own.
func TestClusterModels(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := NewCluster(t, 3, func(i int) []Option {
			return []Option{InMemory(), ServiceTime(Fixed(time.Duration(i+1) * time.Second))}
		})
		newcomer, err := c.Add(InMemory(), ServiceTime(Fixed(4*time.Second)))
		must(t, err)
		if got := c.Server(3); got != newcomer {
			t.Errorf("server 3: got %s, want the one that was added", got.Name())
		}
		for i, s := range c.Servers() {
			begin := time.Now()
			must(t, unary(t.Context(), dial(t, s), nil))
			if got, want := time.Since(begin), time.Duration(i+1)*time.Second; got != want {
				t.Errorf("call of server %d took %v, want %v", i, got, want)
			}
		}
	})
}

// Cluster servers draw different service times.
func TestClusterSeeds(t *testing.T) {
	c := NewCluster(t, 2, nil)
	if a, b := c.Server(0).seed, c.Server(1).seed; a == b {
		t.Errorf("seeds of two servers: got %d twice", a)
	}
}

// Bad cluster is an error and leaves nothing.
func TestClusterBad(t *testing.T) {
	if _, err := StartCluster(-1, nil); err == nil || !strings.Contains(err.Error(), "n is -1, must not be negative") {
		t.Errorf("StartCluster(-1): got error %v, want one that says so", err)
	}
	_, err := StartCluster(3, func(i int) []Option { return []Option{Workers(1 - i)} })
	if err == nil || !strings.Contains(err.Error(), "server 2: testserver: Workers: n is -1") {
		t.Errorf("StartCluster with a bad option: got error %v, want one that names the server and the option", err)
	}
	_, err = StartCluster(2, func(int) []Option { return []Option{InMemory(), Name("twin")} })
	if err == nil || !strings.Contains(err.Error(), `server 1: address is "twin", must be its own`) {
		t.Errorf("StartCluster with one address twice: got error %v, want one that says so", err)
	}
	empty := NewCluster(t, 0, nil)
	empty.Close()
	if _, err := empty.Add(); err == nil || !strings.Contains(err.Error(), "cluster is closed") {
		t.Errorf("Add to a closed cluster: got error %v, want one that says so", err)
	}
}

// Close of a cluster stops all servers.
func TestClusterClose(t *testing.T) {
	c := NewCluster(t, 3, nil)
	var clients []testingv1.TestServiceClient
	ctx := testContext(t)
	for _, s := range c.Servers() {
		client := dial(t, s)
		must(t, unary(ctx, client, nil))
		clients = append(clients, client)
	}
	c.Close()
	for _, client := range clients {
		wantCode(t, unary(ctx, client, nil), codes.Unavailable)
	}
}

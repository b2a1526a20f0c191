// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package testserver

import (
	"context"
	"fmt"
	"net"
	"slices"
	"sync"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/resolver"
)

// A Cluster is a number of servers that one client may call. All methods are
// safe for concurrent use.
type Cluster struct {
	mu      sync.Mutex // guards what follows; taken before any lock of a server
	servers []*Server
	byAddr  map[string]*Server
	closed  bool
}

// StartCluster starts n servers, each with the options that options returns for
// its position, from 0; options may be nil. Unless they say otherwise, server i
// is named "server-i" and seeded with i+1. Whoever starts a cluster must Close
// it.
func StartCluster(n int, options func(i int) []Option) (*Cluster, error) {
	if n < 0 {
		return nil, fmt.Errorf("testserver: StartCluster: n is %d, must not be negative", n)
	}
	c := &Cluster{byAddr: make(map[string]*Server)}
	for i := range n {
		var opts []Option
		if options != nil {
			opts = options(i)
		}
		if _, err := c.Add(opts...); err != nil {
			c.Close()
			return nil, err
		}
	}
	return c, nil
}

// Add starts one more server and returns it. Servers in memory must have
// different names.
func (c *Cluster) Add(opts ...Option) (*Server, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed {
		return nil, fmt.Errorf("testserver: Add: cluster is closed")
	}
	i := len(c.servers)
	s, err := start(config{
		name:    fmt.Sprintf("server-%d", i),
		address: "127.0.0.1:0",
		model:   Fixed(0),
		seed:    uint64(i) + 1,
	}, opts)
	if err != nil {
		return nil, fmt.Errorf("server %d: %w", i, err)
	}
	if c.byAddr[s.Addr()] != nil {
		s.Close()
		return nil, fmt.Errorf("testserver: server %d: address is %q, must be its own", i, s.Addr())
	}
	c.servers = append(c.servers, s)
	c.byAddr[s.Addr()] = s
	return s, nil
}

// Servers returns the servers in the order in which they were started, stopped
// ones included.
func (c *Cluster) Servers() []*Server {
	c.mu.Lock()
	defer c.mu.Unlock()
	return slices.Clone(c.servers)
}

// Server returns server i. It panics if there is none.
func (c *Cluster) Server(i int) *Server {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.servers[i]
}

// Addrs returns the addresses of all servers, in order.
func (c *Cluster) Addrs() []string {
	var addrs []string
	for _, s := range c.Servers() {
		addrs = append(addrs, s.Addr())
	}
	return addrs
}

// Endpoints returns all servers as endpoints, in order.
func (c *Cluster) Endpoints() []resolver.Endpoint {
	var endpoints []resolver.Endpoint
	for _, s := range c.Servers() {
		endpoints = append(endpoints, s.Endpoint())
	}
	return endpoints
}

// DialOptions returns what a client needs to reach the servers, those in memory
// and those to come included: credentials, and a dialer. How the client gets to
// know their addresses is up to its resolver.
func (c *Cluster) DialOptions() []grpc.DialOption {
	return []grpc.DialOption{
		grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(c.dial),
	}
}

// dial connects to the server with an address.
func (c *Cluster) dial(ctx context.Context, addr string) (net.Conn, error) {
	c.mu.Lock()
	s := c.byAddr[addr]
	c.mu.Unlock()
	if s == nil {
		var d net.Dialer
		return d.DialContext(ctx, "tcp", addr)
	}
	return s.DialContext(ctx)
}

// Close closes all servers. It is idempotent.
func (c *Cluster) Close() {
	c.mu.Lock()
	c.closed = true
	servers := slices.Clone(c.servers)
	c.mu.Unlock()
	var wg sync.WaitGroup
	for _, s := range servers {
		wg.Go(s.Close)
	}
	wg.Wait()
}

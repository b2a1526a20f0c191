// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

// Package lbtest drives a balancing policy without a network: a channel whose
// SubConns connect when and as the caller says. Tests, benchmarks and the
// simulation use it where the wire does not matter.
package lbtest

import (
	"encoding/json"
	"fmt"
	"sync"

	"google.golang.org/grpc/balancer"
	"google.golang.org/grpc/connectivity"
	estats "google.golang.org/grpc/experimental/stats"
	"google.golang.org/grpc/resolver"
)

// Endpoints returns n endpoints of one address each.
func Endpoints(n int) []resolver.Endpoint {
	es := make([]resolver.Endpoint, n)
	for i := range es {
		es[i].Addresses = []resolver.Address{{Addr: fmt.Sprintf("10.%d.%d.%d:443", i>>16, i>>8&255, i&255)}}
	}
	return es
}

// State returns what a resolver and a service config say to the policy of a name in gRPC's
// registry: endpoints, also as the flat list that older policies read, and a config in JSON.
func State(policy, config string, endpoints []resolver.Endpoint) (balancer.ClientConnState, error) {
	state := balancer.ClientConnState{ResolverState: resolver.State{Endpoints: endpoints}}
	for _, e := range endpoints {
		state.ResolverState.Addresses = append(state.ResolverState.Addresses, e.Addresses...)
	}
	builder := balancer.Get(policy)
	if builder == nil {
		return state, fmt.Errorf("lbtest: no policy %q is registered", policy)
	}
	parser, ok := builder.(balancer.ConfigParser)
	if !ok {
		return state, nil
	}
	parsed, err := parser.ParseConfig(json.RawMessage(config))
	state.BalancerConfig = parsed
	return state, err
}

// Start builds the policy of a name in gRPC's registry and gives it what State returned. It
// returns when all endpoints are READY. The caller closes the policy.
func Start(policy string, state balancer.ClientConnState) (*Channel, balancer.Balancer, error) {
	cc := &Channel{}
	b := balancer.Get(policy).Build(cc, balancer.BuildOptions{})
	if err := b.UpdateClientConnState(state); err != nil {
		b.Close()
		return nil, nil, err
	}
	cc.Drain()
	if s, _ := cc.State(); s.ConnectivityState != connectivity.Ready {
		b.Close()
		return nil, nil, fmt.Errorf("lbtest: the channel of %s is %v, must be READY", policy, s.ConnectivityState)
	}
	return cc, b, nil
}

// Channel is a balancer.ClientConn. A policy may call it from anywhere; what it
// asks for happens when the caller runs Drain, on the caller's goroutine, as a
// real channel runs everything on one serializer.
type Channel struct {
	balancer.ClientConn // for the methods that no policy here calls

	// Hold keeps SubConns from connecting by themselves; SubConn.SetState moves
	// them. Otherwise Connect leads through CONNECTING to READY. Set it before use.
	Hold bool
	// Recorder receives the policy's metrics. Nil records nothing.
	Recorder estats.MetricsRecorder

	// mu guards the fields below. It is never held while the policy is called.
	mu       sync.Mutex
	queue    []func()
	subConns map[string]*SubConn
	state    balancer.State
	updates  int
	resolves int
}

// NewSubConn implements balancer.ClientConn.
func (c *Channel) NewSubConn(addrs []resolver.Address, opts balancer.NewSubConnOptions) (balancer.SubConn, error) {
	sc := &SubConn{channel: c, Address: addrs[0], listener: opts.StateListener}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.subConns == nil {
		c.subConns = make(map[string]*SubConn)
	}
	c.subConns[addrs[0].Addr] = sc
	return sc, nil
}

// UpdateState implements balancer.ClientConn.
func (c *Channel) UpdateState(s balancer.State) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.state = s
	c.updates++
}

// ResolveNow implements balancer.ClientConn.
func (c *Channel) ResolveNow(resolver.ResolveNowOptions) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.resolves++
}

// Target implements balancer.ClientConn.
func (c *Channel) Target() string { return "test:///channel" }

// MetricsRecorder implements balancer.ClientConn.
func (c *Channel) MetricsRecorder() estats.MetricsRecorder {
	if c.Recorder == nil {
		return estats.UnimplementedMetricsRecorder{}
	}
	return c.Recorder
}

// State returns what the policy published last, and how often it published.
func (c *Channel) State() (s balancer.State, updates int) {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.state, c.updates
}

// SubConn returns the last SubConn that was made for the address, or nil.
func (c *Channel) SubConn(addr string) *SubConn {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.subConns[addr]
}

// forget makes SubConn return s no more.
func (c *Channel) forget(s *SubConn) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.subConns[s.Address.Addr] == s {
		delete(c.subConns, s.Address.Addr)
	}
}

// Drain runs what the policy has asked for, and what it asks for meanwhile, and
// returns when nothing is left.
func (c *Channel) Drain() {
	for {
		c.mu.Lock()
		queue := c.queue
		c.queue = nil
		c.mu.Unlock()
		if len(queue) == 0 {
			return
		}
		for _, f := range queue {
			f()
		}
	}
}

func (c *Channel) enqueue(f func()) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.queue = append(c.queue, f)
}

// SubConn is a connection of a Channel.
type SubConn struct {
	balancer.SubConn // for the methods that no policy here calls

	Address resolver.Address
	channel *Channel

	// Used on the goroutine of Drain and SetState.
	listener func(balancer.SubConnState)
	health   func(balancer.SubConnState)
	shutdown bool
}

// Connect implements balancer.SubConn.
func (s *SubConn) Connect() {
	if s.channel.Hold {
		return
	}
	s.channel.enqueue(func() {
		s.SetState(connectivity.Connecting, nil)
		s.SetState(connectivity.Ready, nil)
	})
}

// Shutdown implements balancer.SubConn.
func (s *SubConn) Shutdown() {
	s.channel.enqueue(func() {
		s.SetState(connectivity.Shutdown, nil)
		s.channel.forget(s)
	})
}

// RegisterHealthListener implements balancer.SubConn. Without a health check the
// health is READY as soon as somebody listens.
func (s *SubConn) RegisterHealthListener(f func(balancer.SubConnState)) {
	s.channel.enqueue(func() {
		s.health = f
		if f != nil && !s.shutdown {
			f(balancer.SubConnState{ConnectivityState: connectivity.Ready})
		}
	})
}

// SetState moves the SubConn and tells the policy. err is the reason for
// TRANSIENT_FAILURE.
func (s *SubConn) SetState(state connectivity.State, err error) {
	if s.shutdown {
		return
	}
	s.shutdown = state == connectivity.Shutdown
	if state != connectivity.Ready {
		s.health = nil
	}
	s.listener(balancer.SubConnState{ConnectivityState: state, ConnectionError: err})
}

// SetHealth reports the health of a READY SubConn, as an outlier detector or a
// health check does.
func (s *SubConn) SetHealth(state connectivity.State, err error) {
	if s.health != nil {
		s.health(balancer.SubConnState{ConnectivityState: state, ConnectionError: err})
	}
}

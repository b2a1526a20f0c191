// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package priority

import (
	"time"

	"google.golang.org/grpc/balancer"
	"google.golang.org/grpc/connectivity"
	"google.golang.org/grpc/resolver"

	"github.com/belfry-go/belfry/internal/childpolicy"
)

// health is what is known of an endpoint.
type health uint8

const (
	unknown health = iota // it connects
	healthy
	failed
	healths
)

// group is the endpoints of one priority and the child policy that balances among them. It
// embeds the ClientConn that it is for the child.
type group struct {
	balancer.ClientConn // the channel's; NewSubConn and UpdateState are intercepted

	policy  *policy
	number  uint32
	child   *childpolicy.Child // used only by the methods of balancer.Balancer of the policy
	started time.Time

	// Guarded by policy.mu.
	state   balancer.State // the child's last
	conns   map[*subConn]bool
	members map[string]*member // by each of their addresses
	avoided map[string]bool    // the first addresses of endpoints that the child avoids
	count   [healths]int       // endpoints
	all     int                // endpoints
	enough  bool               // as many as must be are healthy
	since   time.Time          // of enough
	had     bool               // it has had enough once
	closed  bool
}

// member is an endpoint.
type member struct {
	addr   string // the first
	health health
	conns  map[*subConn]bool
}

// setEndpointsLocked replaces the members.
func (g *group) setEndpointsLocked(endpoints []resolver.Endpoint) {
	g.members, g.count, g.all = make(map[string]*member, len(endpoints)), [healths]int{}, 0
	for _, e := range endpoints {
		if len(e.Addresses) == 0 || g.members[e.Addresses[0].Addr] != nil {
			continue // no endpoint, or one that is listed before
		}
		m := &member{addr: e.Addresses[0].Addr, conns: make(map[*subConn]bool)}
		for _, a := range e.Addresses {
			g.members[a.Addr] = m
		}
		g.count[unknown]++
		g.all++
	}
	for c := range g.conns {
		if m := g.members[c.addr]; m != nil {
			m.conns[c] = true
			g.judgeLocked(m)
		}
	}
}

// judgeLocked finds the health of a member: that of its best connection.
func (g *group) judgeLocked(m *member) {
	h := unknown
	for c := range m.conns {
		switch {
		case c.healthy():
			h = healthy
		case h == unknown && c.broken():
			h = failed
		}
	}
	if h == healthy && g.avoided[m.addr] {
		h = failed
	}
	g.count[m.health]--
	g.count[h]++
	m.health = h
}

// weighLocked finds whether the group has enough, and whether it may have soon: while its
// endpoints connect for the first time.
func (g *group) weighLocked(cfg *config, now time.Time) (soon bool) {
	least := cfg.minHealthy * float64(g.all)
	enough := g.count[healthy] > 0 && float64(g.count[healthy]) >= least
	if enough && !g.enough {
		g.since, g.had = now, true
	}
	g.enough = enough
	return !g.had && now.Before(g.started.Add(cfg.connectTimeout)) && float64(g.all-g.count[failed]) >= least
}

// share returns the part that is healthy.
func (g *group) share() float64 { return float64(g.count[healthy]) / float64(max(g.all, 1)) }

// UpdateState receives the reports of the child, from any goroutine.
func (g *group) UpdateState(s balancer.State) {
	g.policy.mu.Lock()
	defer g.policy.mu.Unlock()
	if g.closed {
		return
	}
	g.state = s
	g.policy.decideLocked(g)
}

// Avoid implements childpolicy.Watcher.
func (g *group) Avoid(addr string, avoid bool) {
	g.policy.mu.Lock()
	defer g.policy.mu.Unlock()
	delete(g.avoided, addr)
	if avoid {
		g.avoided[addr] = true
	}
	if m := g.members[addr]; m != nil && !g.closed {
		g.judgeLocked(m)
		g.policy.decideLocked(nil)
	}
}

// NewSubConn makes a connection whose health is watched.
func (g *group) NewSubConn(addrs []resolver.Address, opts balancer.NewSubConnOptions) (balancer.SubConn, error) {
	c := &subConn{group: g, addr: addrs[0].Addr, state: connectivity.Idle}
	listener := opts.StateListener
	opts.StateListener = func(s balancer.SubConnState) {
		c.note(func() { c.state, c.watched = s.ConnectivityState, false })
		if listener != nil {
			listener(s) // which may watch the health
		}
		c.judge()
	}
	var err error
	//lint:ignore SA1019 the deprecation is of several addresses
	if c.SubConn, err = g.ClientConn.NewSubConn(addrs, opts); err != nil {
		return nil, err
	}
	c.note(func() {
		g.conns[c] = true
		if m := g.members[c.addr]; m != nil {
			m.conns[c] = true
		}
	})
	return c, nil
}

// RemoveSubConn implements balancer.ClientConn, for children that still call it.
func (g *group) RemoveSubConn(sc balancer.SubConn) { sc.Shutdown() }

// UpdateAddresses implements balancer.ClientConn, for children that still call it.
func (g *group) UpdateAddresses(sc balancer.SubConn, addrs []resolver.Address) {
	if c, ok := sc.(*subConn); ok {
		sc = c.SubConn
	}
	//lint:ignore SA1019 older children do
	g.ClientConn.UpdateAddresses(sc, addrs)
}

// subConn is a connection of a child.
type subConn struct {
	balancer.SubConn

	group *group
	addr  string

	// Guarded by policy.mu.
	state   connectivity.State
	watched bool               // the child listens to the health too
	health  connectivity.State // if it does
}

func (c *subConn) healthy() bool {
	return c.state == connectivity.Ready && (!c.watched || c.health == connectivity.Ready)
}

func (c *subConn) broken() bool {
	return c.state == connectivity.TransientFailure || c.watched && c.health == connectivity.TransientFailure
}

func (c *subConn) note(f func()) {
	c.group.policy.mu.Lock()
	defer c.group.policy.mu.Unlock()
	f()
}

// judge applies what was noted.
func (c *subConn) judge() {
	g := c.group
	g.policy.mu.Lock()
	defer g.policy.mu.Unlock()
	m := g.members[c.addr]
	if c.state == connectivity.Shutdown {
		delete(g.conns, c)
		if m != nil {
			delete(m.conns, c)
		}
	}
	if m == nil || g.closed {
		return
	}
	g.judgeLocked(m)
	g.policy.decideLocked(nil)
}

// RegisterHealthListener implements balancer.SubConn.
func (c *subConn) RegisterHealthListener(f func(balancer.SubConnState)) {
	c.note(func() { c.watched, c.health = f != nil, connectivity.Connecting })
	if f == nil {
		c.SubConn.RegisterHealthListener(nil)
		return
	}
	c.SubConn.RegisterHealthListener(func(s balancer.SubConnState) {
		c.note(func() { c.health = s.ConnectivityState })
		f(s)
		c.judge()
	})
}

// picker picks with the child's picker, and returns the channel's connection.
type picker struct{ balancer.Picker }

// Pick implements balancer.Picker.
func (p picker) Pick(info balancer.PickInfo) (balancer.PickResult, error) {
	r, err := p.Picker.Pick(info)
	if c, ok := r.SubConn.(*subConn); ok {
		r.SubConn = c.SubConn
	}
	return r, err
}

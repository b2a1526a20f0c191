// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

// Package childpolicy is what policies share that have other policies as children.
package childpolicy

import (
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"

	"google.golang.org/grpc/balancer"
	"google.golang.org/grpc/balancer/base"
	"google.golang.org/grpc/connectivity"
	"google.golang.org/grpc/resolver"
	"google.golang.org/grpc/serviceconfig"
	"google.golang.org/protobuf/types/known/structpb"
)

// A Policy is a policy with its config, checked.
type Policy struct {
	Builder balancer.Builder
	Config  serviceconfig.LoadBalancingConfig // nil if the policy has none
}

// Parse returns the first policy of a list in the form of a loadBalancingConfig that is
// registered, or the policy fallback with an empty config if the list is empty. Its errors
// begin with "childPolicy".
func Parse(list []*structpb.Struct, fallback string) (Policy, error) {
	if len(list) == 0 {
		list = []*structpb.Struct{{Fields: map[string]*structpb.Value{fallback: structpb.NewStructValue(&structpb.Struct{})}}}
	}
	var unknown []string
	for i, entry := range list {
		if len(entry.GetFields()) != 1 {
			return Policy{}, fmt.Errorf("childPolicy[%d]: %d policies, must be one", i, len(entry.GetFields()))
		}
		for name, value := range entry.GetFields() {
			b := balancer.Get(name)
			if b == nil {
				unknown = append(unknown, name)
				continue
			}
			p := Policy{Builder: b}
			parser, ok := b.(balancer.ConfigParser)
			if !ok {
				return p, nil
			}
			config, err := value.MarshalJSON()
			if err == nil {
				p.Config, err = parser.ParseConfig(json.RawMessage(config))
			}
			if err != nil {
				return Policy{}, fmt.Errorf("childPolicy[%d]: %w", i, err)
			}
			return p, nil
		}
	}
	slices.Sort(unknown)
	return Policy{}, fmt.Errorf("childPolicy: %s, must name a policy that is registered: import its package", strings.Join(unknown, ", "))
}

// A Watcher is a balancer.ClientConn that wants to know which READY endpoints its child
// avoids, because they fail or are about to leave.
type Watcher interface {
	// Avoid says whether the child avoids the endpoint whose first address is addr. It is
	// called with locks of the child held, and must not call the child.
	Avoid(addr string, avoid bool)
}

// A Child is a child policy. Its methods are those of a balancer.Balancer, and must be
// called like them.
type Child struct {
	cc       balancer.ClientConn
	opts     balancer.BuildOptions
	name     string
	balancer balancer.Balancer // nil before the first update
}

// New returns a child that uses cc.
func New(cc balancer.ClientConn, opts balancer.BuildOptions) *Child {
	return &Child{cc: cc, opts: opts}
}

// Update gives the child a state. A policy of another kind replaces the one before, and
// connects again.
func (c *Child) Update(p Policy, state resolver.State) error {
	if name := p.Builder.Name(); name != c.name {
		c.Close()
		c.name, c.balancer = name, p.Builder.Build(c.cc, c.opts)
	}
	return c.balancer.UpdateClientConnState(balancer.ClientConnState{ResolverState: state, BalancerConfig: p.Config})
}

// ResolverError passes an error on. Before the first update calls fail with it.
func (c *Child) ResolverError(err error) {
	if c.balancer != nil {
		c.balancer.ResolverError(err)
		return
	}
	c.cc.UpdateState(balancer.State{
		ConnectivityState: connectivity.TransientFailure,
		Picker:            base.NewErrPicker(errors.New("name resolver error: " + err.Error())),
	})
}

// ExitIdle makes the child connect.
func (c *Child) ExitIdle() {
	if c.balancer != nil {
		c.balancer.ExitIdle()
	}
}

// Close closes the child.
func (c *Child) Close() {
	if c.balancer != nil {
		c.balancer.Close()
	}
}

// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

// Package priority is the load balancing policy belfry.priority: all calls go to one group
// of endpoints, and to the next group while too few of the first are healthy. It is for
// what xDS does with priorities: a second region, an older version, a cache's origin.
//
// Discovery numbers the groups from 0, in the order in which they are used:
//
//	src, err := discover.List(
//		discover.MustEndpoint("10.0.0.1:443"),
//		discover.MustEndpoint("10.0.0.2:443"),
//		discover.MustEndpoint("10.1.0.1:443", discover.Group(1)),
//	)
//
// and the service config chooses the policy:
//
//	import _ "github.com/belfry-go/belfry/balancer/priority"
//
//	grpc.WithDefaultServiceConfig(`{"loadBalancingConfig":[{"belfry.priority":{
//		"minHealthy": 0.7,
//		"childPolicy": [{"belfry.p2c":{}}]
//	}}]}`)
//
// The config is the message belfry.config.v1.Priority in its JSON form. Each group has a
// child policy of its own, by default belfry.p2c. All groups are connected, so that
// failover takes no time; where that makes too many connections, use belfry.aperture as the
// child. A child must connect without being called, as all policies of grpc and belfry do
// but for pick_first.
//
// Calls fail over at once when less than minHealthy of a group is healthy, and come back
// when it has had enough for returnAfter. Where a group should only take less, and not
// nothing, use the field zones of belfry.p2c, which has no such switch.
//
// What is in flight in a group stays there. Each switch is logged, and with a stats plugin,
// such as grpc's OpenTelemetry plugin, the policy records belfry.lb.priority.group, the
// number of the group in use, and belfry.lb.priority.switches. They are off until enabled
// by name.
package priority

import (
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"google.golang.org/grpc/balancer"
	"google.golang.org/grpc/balancer/base"
	"google.golang.org/grpc/connectivity"
	estats "google.golang.org/grpc/experimental/stats"
	"google.golang.org/grpc/grpclog"
	"google.golang.org/grpc/resolver"
	"google.golang.org/grpc/serviceconfig"

	"github.com/belfry-go/belfry/internal/childpolicy"
	"github.com/belfry-go/belfry/internal/place"
)

// Name is the name of the policy in a service config.
const Name = "belfry.priority"

var logger = grpclog.Component("belfry-priority")

var (
	groupMetric = estats.RegisterInt64Gauge(estats.MetricDescriptor{
		Name:        "belfry.lb.priority.group",
		Description: "EXPERIMENTAL. Number of the priority group that calls go to.",
		Unit:        "{group}",
		Labels:      []string{"grpc.target"},
	})
	switchesMetric = estats.RegisterInt64Count(estats.MetricDescriptor{
		Name:        "belfry.lb.priority.switches",
		Description: "EXPERIMENTAL. Number of times that calls went over to another priority group.",
		Unit:        "{switch}",
		Labels:      []string{"grpc.target"},
	})
)

func init() { balancer.Register(builder{}) }

type builder struct{}

func (builder) Name() string { return Name }

func (builder) ParseConfig(js json.RawMessage) (serviceconfig.LoadBalancingConfig, error) {
	return parseConfig(js)
}

func (builder) Build(cc balancer.ClientConn, opts balancer.BuildOptions) balancer.Balancer {
	return &policy{cc: cc, opts: opts, target: opts.Target.String(), recorder: cc.MetricsRecorder()}
}

// policy is the balancer of one channel.
type policy struct {
	// Immutable.
	cc       balancer.ClientConn
	opts     balancer.BuildOptions
	target   string
	recorder estats.MetricsRecorder

	// mu guards what follows and the fields of group, member and subConn that say so.
	// Children report their state from within calls to them, so no child is called with mu
	// held. Under it cc is told a state, which takes locks of cc, and switches are recorded.
	mu      sync.Mutex
	config  *config
	groups  []*group // in order; written only by the methods of balancer.Balancer
	current *group   // nil before the first decision, and without endpoints
	inhibit bool     // an update is running: what changes is decided at its end
	closed  bool
	timer   *time.Timer // for what only time changes; nil if there is nothing
}

var errNoEndpoints = errors.New("no endpoints to pick from")

// UpdateClientConnState implements balancer.Balancer.
func (b *policy) UpdateClientConnState(ccs balancer.ClientConnState) error {
	cfg, ok := ccs.BalancerConfig.(*config)
	if !ok {
		return fmt.Errorf("%s: received config of type %T, must be what the policy parsed", Name, ccs.BalancerConfig)
	}
	endpoints := make(map[uint32][]resolver.Endpoint)
	for _, e := range ccs.ResolverState.Endpoints {
		if len(e.Addresses) > 0 {
			n := place.Group(e)
			endpoints[n] = append(endpoints[n], e)
		}
	}
	gone := b.arrange(cfg, endpoints)
	var errs []error
	for _, g := range b.groups {
		state := ccs.ResolverState
		state.Endpoints, state.Addresses = endpoints[g.number], nil
		errs = append(errs, g.child.Update(cfg.child, state))
	}
	for _, g := range gone {
		g.child.Close()
	}
	b.release()
	if len(b.groups) == 0 {
		return balancer.ErrBadResolverState
	}
	return errors.Join(errs...)
}

// arrange makes the groups that are new, and returns those that are gone. Until release
// nothing is decided.
func (b *policy) arrange(cfg *config, endpoints map[uint32][]resolver.Endpoint) (gone []*group) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.inhibit, b.config = true, cfg
	known := make(map[uint32]*group)
	for _, g := range b.groups {
		known[g.number] = g
		if len(endpoints[g.number]) == 0 {
			g.closed = true
			gone = append(gone, g)
			if b.current == g {
				b.current = nil
			}
		}
	}
	b.groups = nil
	for number, es := range endpoints {
		g := known[number]
		if g == nil {
			g = b.newGroup(number)
		}
		g.setEndpointsLocked(es)
		b.groups = append(b.groups, g)
	}
	slices.SortFunc(b.groups, func(a, b *group) int { return cmp.Compare(a.number, b.number) })
	return gone
}

func (b *policy) newGroup(number uint32) *group {
	g := &group{
		ClientConn: b.cc,
		policy:     b,
		number:     number,
		started:    time.Now(),
		state:      balancer.State{ConnectivityState: connectivity.Connecting, Picker: base.NewErrPicker(balancer.ErrNoSubConnAvailable)},
		conns:      make(map[*subConn]bool),
		avoided:    make(map[string]bool),
	}
	g.child = childpolicy.New(g, b.opts)
	return g
}

// release decides on what has changed since arrange.
func (b *policy) release() {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.inhibit = false
	b.decideLocked(b.current)
}

// decideLocked chooses the group that calls go to, and tells the channel if it is another
// or if its state is what has changed.
func (b *policy) decideLocked(changed *group) {
	if b.inhibit || b.closed {
		return
	}
	if b.timer != nil {
		b.timer.Stop()
		b.timer = nil
	}
	if len(b.groups) == 0 {
		b.fail(errNoEndpoints)
		return
	}
	now := time.Now()
	chosen, again := b.chooseLocked(now)
	if !again.IsZero() {
		b.timer = time.AfterFunc(again.Sub(now), func() {
			b.mu.Lock()
			defer b.mu.Unlock()
			b.decideLocked(nil)
		})
	}
	before := b.current
	if chosen == before && changed != chosen {
		return
	}
	b.current = chosen
	if chosen != before {
		groupMetric.Record(b.recorder, int64(chosen.number), b.target)
		if before != nil {
			switchesMetric.Record(b.recorder, 1, b.target)
			logger.Warningf("%s: calls go from group %d, of which %d of %d endpoints are healthy, to group %d, of which %d of %d are",
				b.target, before.number, before.count[healthy], before.all, chosen.number, chosen.count[healthy], chosen.all)
		}
	}
	b.cc.UpdateState(balancer.State{ConnectivityState: chosen.state.ConnectivityState, Picker: picker{chosen.state.Picker}})
}

// chooseLocked returns the group that calls are to go to, and when that may be another by
// the passing of time alone, which is never if it is zero.
func (b *policy) chooseLocked(now time.Time) (chosen *group, again time.Time) {
	soon := make([]bool, len(b.groups))
	for i, g := range b.groups {
		soon[i] = g.weighLocked(b.config, now)
	}
	current := b.current
	for i, g := range b.groups {
		back := g.since.Add(b.config.returnAfter)
		switch {
		case g.enough && (g == current || current == nil || !current.enough || !now.Before(back)):
			return g, again
		case g.enough && (again.IsZero() || back.Before(again)):
			again = back
		case soon[i] && (current == nil || current == g || current.count[healthy] == 0):
			return g, g.started.Add(b.config.connectTimeout)
		}
	}
	return slices.MinFunc(b.groups, func(a, b *group) int {
		return cmp.Or(cmp.Compare(b.share(), a.share()), cmp.Compare(rank(a.state.ConnectivityState), rank(b.state.ConnectivityState)))
	}), again
}

// rank orders states from the best on.
func rank(s connectivity.State) int {
	return slices.Index([]connectivity.State{connectivity.Ready, connectivity.Connecting, connectivity.Idle, connectivity.TransientFailure}, s)
}

// fail makes calls fail with an error.
func (b *policy) fail(err error) {
	b.cc.UpdateState(balancer.State{ConnectivityState: connectivity.TransientFailure, Picker: base.NewErrPicker(err)})
}

// ResolverError implements balancer.Balancer.
func (b *policy) ResolverError(err error) {
	if len(b.groups) == 0 {
		// Not wrapped: grpc ends all calls with the status that it finds in the error of
		// a picker, those too that wait for READY.
		b.fail(fmt.Errorf("name resolver error: %v", err))
		return
	}
	for _, g := range b.groups {
		g.child.ResolverError(err)
	}
}

// UpdateSubConnState implements balancer.Balancer. It is never called: SubConns belong to
// the children, which listen to them.
func (b *policy) UpdateSubConnState(sc balancer.SubConn, s balancer.SubConnState) {
	logger.Errorf("%s: UpdateSubConnState(%v, %+v) called unexpectedly", b.target, sc, s)
}

// ExitIdle implements balancer.Balancer.
func (b *policy) ExitIdle() {
	for _, g := range b.groups {
		g.child.ExitIdle()
	}
}

// Close implements balancer.Balancer.
func (b *policy) Close() {
	b.mu.Lock()
	b.closed = true
	if b.timer != nil {
		b.timer.Stop()
	}
	b.mu.Unlock()
	for _, g := range b.groups {
		g.child.Close()
	}
}

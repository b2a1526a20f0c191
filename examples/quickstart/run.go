// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"fmt"
	"sync/atomic"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	// Registers least_request_experimental.
	_ "google.golang.org/grpc/balancer/leastrequest"

	"github.com/belfry-go/belfry"
	// Registers belfry.p2c.
	_ "github.com/belfry-go/belfry/balancer/p2c"
	"github.com/belfry-go/belfry/internal/loadgen"
	"github.com/belfry-go/belfry/internal/testserver"
	"github.com/belfry-go/belfry/resolver/discover"

	testingv1 "github.com/belfry-go/belfry/proto/belfry/testing/v1"
)

// A workload is what every policy has to do. Immutable.
type workload struct {
	maxima   []time.Duration // one endpoint each: latency is uniform in [0, maximum)
	addTimer bool            // towerTimer on top of each latency
	workers  int             // per endpoint, with a FIFO queue before them; 0: no queue
	inFlight int             // calls in flight at a time
	calls    int
	seed     uint64
}

// A policy is a service config with a name.
type policy struct {
	name   string
	config string // service config JSON
	about  string // one sentence
}

// A run is what came of one workload under one policy.
type run struct {
	policy    policy
	round     int             // from 0
	latencies []time.Duration // of the calls that were answered, ascending
	served    []int           // calls that arrived, by endpoint
	errors    int             // calls that failed, those that an interrupt ended left out
	example   error           // one of their errors
	elapsed   time.Duration
	busy      float64 // the share of the processors' time that was used, from 0 to 1
	complete  bool    // not interrupted
}

// A start is a moment at which the run of a policy begins.
type start struct {
	policy policy
	round  int
	done   *atomic.Int64 // calls that have ended so far
}

// measure does the workload once for each policy, and all of that count times,
// each time with the next seed. It returns what was measured when ctx ends,
// without an error. announce is called before each run.
func measure(ctx context.Context, w workload, policies []policy, count int, announce func(start)) ([]*run, error) {
	var runs []*run
	for round := range count {
		w := w
		w.seed += uint64(round)
		for _, p := range policies {
			if ctx.Err() != nil {
				return runs, nil
			}
			s := start{policy: p, round: round, done: new(atomic.Int64)}
			announce(s)
			r, err := w.run(ctx, s)
			if err != nil {
				return runs, fmt.Errorf("%s: %w", p.name, err)
			}
			runs = append(runs, r)
		}
	}
	return runs, nil
}

// connectTimeout bounds how long the endpoints may take to accept a connection.
// It is loopback: this is for a machine that is very busy.
const connectTimeout = 10 * time.Second

// run does the workload with a cluster and a channel of its own, so that no run
// profits from what an earlier one has learned, and with one seed every run meets
// the same latencies in the same order.
func (w workload) run(ctx context.Context, s start) (*run, error) {
	cluster, err := w.cluster()
	if err != nil {
		return nil, err
	}
	defer cluster.Close()

	// This is all that a program needs to use belfry: a source that says which
	// endpoints exist, and a service config that says how to choose among them.
	source, err := discover.List(cluster.Endpoints()...)
	if err != nil {
		return nil, err
	}
	conn, err := dial(source, s.policy)
	if err != nil {
		return nil, err
	}
	defer conn.Close()

	r := &run{policy: s.policy, round: s.round}
	if err := connect(ctx, conn, cluster); err != nil {
		if ctx.Err() != nil {
			return r, nil // interrupted before the first call
		}
		return nil, err
	}
	used, had := loadgen.Processors()
	w.load(ctx, conn, s.done, r)
	usedThen, hadThen := loadgen.Processors()
	r.busy = (usedThen - used) / max(hadThen-had, 1e-9)
	for _, server := range cluster.Servers() {
		r.served = append(r.served, int(server.Stats().Started))
	}
	return r, nil
}

// dial returns a channel to the endpoints of a source, balanced by a policy.
func dial(source discover.Source, p policy) (*grpc.ClientConn, error) {
	return grpc.NewClient("belfry:///quickstart",
		discover.WithSource(source),
		grpc.WithDefaultServiceConfig(p.config),
		grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithNoProxy()) // the servers are here
}

// streamWorkers is the number of goroutines that a server keeps for calls. It
// makes more when they are not enough, so this bounds nothing.
const streamWorkers = 128

// cluster starts the servers.
func (w workload) cluster() (*testserver.Cluster, error) {
	return testserver.StartCluster(len(w.maxima), func(i int) []testserver.Option {
		var latency testserver.Model = testserver.Uniform(0, w.maxima[i])
		if w.addTimer {
			latency = towerTimer{latency}
		}
		return []testserver.Option{
			testserver.ServiceTime(latency),
			testserver.Workers(w.workers),
			// Endpoints of one maximum draw different latencies.
			testserver.Seed(w.seed*uint64(len(w.maxima)) + uint64(i)),
			// Goroutines that stay have grown their stacks; new ones would do so in
			// every call, a tenth of all its cost.
			testserver.GRPC(grpc.NumStreamWorkers(streamWorkers)),
		}
	})
}

// towerTimerError is by how much the timers of Tower's runtime, in which its
// example spends its latency, are late on average.
const towerTimerError = 1200 * time.Microsecond

// towerTimer is a model with towerTimerError on top of each latency.
type towerTimer struct{ testserver.Model }

// Draw implements testserver.Model.
func (m towerTimer) Draw(r *testserver.Rand) time.Duration { return m.Model.Draw(r) + towerTimerError }

// connect waits until the channel is connected to all endpoints: the first calls
// would otherwise all go to the one that was the fastest to connect. A policy
// need not want them all, so the wait for the rest is short.
func connect(ctx context.Context, conn *grpc.ClientConn, cluster *testserver.Cluster) error {
	ready, cancel := context.WithTimeout(ctx, connectTimeout)
	defer cancel()
	if err := belfry.WaitReady(ready, conn); err != nil {
		return err
	}
	all, cancel := context.WithTimeout(ready, 250*time.Millisecond)
	defer cancel()
	for _, server := range cluster.Servers() {
		_ = server.WaitConnections(all, 1)
	}
	return nil
}

// load keeps w.inFlight calls in flight until w.calls have been made or ctx
// ends, in a closed loop. If ctx ends it closes conn.
func (w workload) load(ctx context.Context, conn *grpc.ClientConn, done *atomic.Int64, r *run) {
	// The calls do not carry ctx: each would enter itself with it and out again, in
	// a map under a lock that all share. Closing the channel ends them as well.
	closed := make(chan struct{})
	keep := context.AfterFunc(ctx, func() {
		defer close(closed)
		conn.Close()
	})

	client, request := testingv1.NewTestServiceClient(conn), &testingv1.UnaryRequest{}
	got := loadgen.Closed(ctx, w.inFlight, w.calls, done, func() error {
		_, err := client.Unary(context.Background(), request)
		return err
	})
	if !keep() {
		<-closed
	}

	r.latencies, r.errors, r.example, r.elapsed = got.Latencies, got.Errors, got.Example, got.Elapsed
	r.complete = len(r.latencies)+r.errors == w.calls
}

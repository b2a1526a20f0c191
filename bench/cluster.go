// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"fmt"
	"runtime"
	"slices"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"

	"github.com/belfry-go/belfry/internal/loadgen"
	"github.com/belfry-go/belfry/internal/testserver"
	testingv1 "github.com/belfry-go/belfry/proto/belfry/testing/v1"
)

// The cluster of all scenarios.
const (
	servers     = 10
	workers     = 4
	serviceTime = 20 * time.Millisecond
	deadline    = time.Second
)

// A scenario is what the cluster is like and what goes wrong.
type scenario struct {
	name, about string
	clients     int
	load        float64   // share of what the servers can do that are not down for good
	speeds      []float64 // of the servers; those beyond are 1
	down        []int     // servers that fail all calls, at once
	stalls      bool      // a server stands still for 300 ms each second
}

func scenarios() []scenario {
	return []scenario{
		{name: "equal servers", clients: 1, load: 0.7,
			about: "One client, 70 % load."},
		{name: "unequal servers", clients: 1, load: 0.7, speeds: []float64{0.25, 0.25, 0.5, 0.5},
			about: "Two servers work at a quarter of the speed of the others, two at half. 70 % load."},
		{name: "one slow", clients: 1, load: 0.7, speeds: []float64{0.1},
			about: "One server works at a tenth of the speed of the others. 70 % load."},
		{name: "one fails fast", clients: 1, load: 0.6, down: []int{0},
			about: "One server answers UNAVAILABLE at once. Nobody repeats a call. 60 % load of the others."},
		{name: "one stalls for a while", clients: 1, load: 0.6, stalls: true,
			about: "Each second one server, another each time, stands still for 300 ms. 60 % load."},
		{name: "many clients", clients: 40, load: 0.7,
			about: "Forty clients with a channel each; each knows its own calls. 70 % load."},
	}
}

// speed returns the speed of server i.
func (s scenario) speed(i int) float64 {
	if i < len(s.speeds) {
		return s.speeds[i]
	}
	return 1
}

// rate returns the calls per second.
func (s scenario) rate() float64 {
	sum := 0.0
	for i := range servers {
		if !slices.Contains(s.down, i) {
			sum += s.speed(i)
		}
	}
	return s.load * sum * workers / serviceTime.Seconds()
}

// A subject is what balances the calls in a scenario.
type subject struct {
	caller
	proxy *proxy // nil if the client does it
}

// subjects returns what is compared in the cluster, and what is missing.
func subjects() (all []subject, missing []string) {
	for _, p := range policies() {
		all = append(all, subject{caller: caller{name: p.name, role: p.role, policy: p}})
	}
	all = append(all, subject{caller: caller{name: "oracle", role: bound, policy: policy{registry: oracleName, config: `{}`}}})
	there, missing := installed()
	for _, p := range there {
		all = append(all, subject{
			caller: caller{name: p.name, role: neighbour, policy: policy{registry: "pick_first", config: `{}`}},
			proxy:  &p,
		})
	}
	return all, missing
}

var clusterMetrics = []metric{
	{name: "p50, ms", digits: 3, judged: true},
	{name: "p99, ms", digits: 3, judged: true},
	{name: "mean, ms", digits: 3},
	{name: "failed, %", digits: 2, judged: true},
	{name: "CPU, %", digits: 2},
	{name: "others, %", digits: 2},
}

// clusters measures latencies in an open loop.
func clusters(ctx context.Context, p plan, progress func(string)) (*section, []string, error) {
	s := &section{key: "cluster", title: "The cluster", chart: "cluster.svg", about: fmt.Sprintf(`
%d servers with %d workers and one queue each, on loopback. A call is work of lognormal size, %v on average (sigma 0.6). Calls arrive as a Poisson process, whether others have been answered or not, and a latency counts **from the time at which the call should have been sent**: what the client is late counts. A call has %v; one that fails counts as one that took all of it. %v pass before calls count, then %v are measured. Policies start anew in each run, with the same arrivals and the same servers.

The oracle is a policy that knows what all clients have in flight at each server, at what speed each works and which are down, at any moment, but not how much work a call is. It sends a call where it is expected to end first. Figures below its are luck. Proxies know what all clients send through them, take an extra hop, and share the processors.

`+"`weighted_round_robin`"+` gets a report of its server's load with each call. Its blackout period is 0.5 s and its weights are drawn up each 0.1 s; the defaults would need longer runs. `+"`peakEwma`"+` takes a newcomer for one of 30 ms. CPU is the share of the machine's processors that this program used, client and servers, and “others” that of all other programs, proxies among them. Where both make more than nine tenths the row is marked as CPU-bound: its figures say how long calls wait for a processor, which raises p50 most.`,
		servers, workers, serviceTime, deadline, p.warmUp, p.measured)}
	all, missing := subjects()
	for _, sc := range p.scenarios {
		g := &group{name: sc.name, about: sc.about, metrics: clusterMetrics}
		s.groups = append(s.groups, g)
		for _, x := range all {
			g.rows = append(g.rows, &row{name: x.name, role: x.role})
		}
		for repeat := range p.clusterRepeats {
			for i, x := range all {
				if ctx.Err() != nil {
					return nil, nil, ctx.Err()
				}
				progress(fmt.Sprintf("cluster: %s, %s, repeat %d", sc.name, x.name, repeat+1))
				if err := x.run(ctx, p, sc, p.seed+uint64(repeat), g.rows[i]); err != nil {
					return nil, nil, fmt.Errorf("%s, %s: %w", sc.name, x.name, err)
				}
			}
		}
		for _, r := range g.rows {
			r.busy = (r.median(g.metric("CPU, %")) + r.median(g.metric("others, %"))) / 100
		}
	}
	return s, missing, nil
}

// run adds a repeat to r.
func (x subject) run(ctx context.Context, p plan, sc scenario, seed uint64, r *row) error {
	cluster, err := testserver.StartCluster(servers, func(i int) []testserver.Option {
		return append(serverOptions(x.policy.reports),
			testserver.ServiceTime(testserver.Lognormal(serviceTime, 0.6)),
			testserver.Workers(workers),
			testserver.Seed(seed*servers+uint64(i)))
	})
	if err != nil {
		return err
	}
	defer cluster.Close()
	known := newLedger(servers, workers)
	for i, s := range cluster.Servers() {
		if err := s.SetSpeed(sc.speed(i)); err != nil {
			return err
		}
		known.set(i, func(e *entry) { e.speed = sc.speed(i) })
	}
	for _, i := range sc.down {
		if err := cluster.Server(i).Fail(codes.Unavailable, 1); err != nil {
			return err
		}
		known.set(i, func(e *entry) { e.down = true })
	}

	conns, stop, err := x.clients(ctx, cluster, known, sc.clients)
	defer stop()
	if err != nil {
		return err
	}
	clients := make([]testingv1.TestServiceClient, len(conns))
	for i, conn := range conns {
		clients[i] = testingv1.NewTestServiceClient(conn)
	}

	faults, cancel := context.WithCancel(ctx)
	var running sync.WaitGroup
	if sc.stalls {
		running.Go(func() { stall(faults, cluster.Servers(), known) })
	}
	request := &testingv1.UnaryRequest{}
	then, began := cpu(), time.Now()
	got := loadgen.Open(loadgen.Poisson(p.rate*sc.rate(), p.warmUp+p.measured, seed), p.warmUp, func(i int) error {
		ctx, cancel := context.WithTimeout(ctx, deadline)
		defer cancel()
		_, err := clients[i%len(clients)].Unary(ctx, request)
		return err
	})
	now, elapsed := cpu(), time.Since(began)
	cancel()
	running.Wait()
	if ctx.Err() != nil {
		return ctx.Err()
	}

	latencies := append(got.Latencies, slices.Repeat([]time.Duration{deadline}, got.Errors)...)
	slices.Sort(latencies)
	var sum time.Duration
	for _, l := range latencies {
		sum += l
	}
	n := max(len(latencies), 1)
	own := (now.own - then.own) / elapsed.Seconds() / float64(runtime.NumCPU())
	r.add(millis(loadgen.Percentile(latencies, 0.5)), millis(loadgen.Percentile(latencies, 0.99)), millis(sum)/float64(n),
		100*float64(got.Errors)/float64(n), 100*own, 100*max(now.busy(then)-own, 0))
	return nil
}

// clients returns channels to the cluster, or to a proxy before it, that are connected.
// stop closes what there is, and is never nil.
func (x subject) clients(ctx context.Context, cluster *testserver.Cluster, known *ledger, n int) (conns []*grpc.ClientConn, stop func(), err error) {
	var target string
	end := func() {}
	stop = func() {
		for _, conn := range conns {
			_ = conn.Close()
		}
		end()
	}
	if x.proxy != nil {
		t, e, err := x.proxy.start(ctx, cluster.Addrs())
		if err != nil {
			return nil, stop, err
		}
		target, end = t, e
	}
	endpoints := cluster.Endpoints()
	if x.policy.registry == oracleName {
		endpoints = known.mark(endpoints)
	}
	for range n {
		var conn *grpc.ClientConn
		if x.proxy != nil {
			opts, err := x.dialOptions()
			if err != nil {
				return conns, stop, err
			}
			conn, err = grpc.NewClient(target, opts...)
			if err != nil {
				return conns, stop, err
			}
		} else if conn, err = x.dial(endpoints); err != nil {
			return conns, stop, err
		}
		conns = append(conns, conn)
	}
	connections := int64(n)
	if x.proxy != nil {
		connections = 0 // proxies connect when they are called
	}
	return conns, stop, connect(ctx, conns, cluster.Servers(), connections)
}

// stall stops one server after the other, for 300 ms of each second, until ctx ends.
func stall(ctx context.Context, all []*testserver.Server, known *ledger) {
	wait := func(d time.Duration) bool {
		select {
		case <-ctx.Done():
			return false
		case <-time.After(d):
			return true
		}
	}
	if !wait(500 * time.Millisecond) {
		return
	}
	for k := 0; ; k = (k + 1) % len(all) {
		known.set(k, func(e *entry) { e.down = true })
		all[k].Stall()
		ok := wait(300 * time.Millisecond)
		all[k].Resume()
		known.set(k, func(e *entry) { e.down = false })
		if !ok || !wait(700*time.Millisecond) {
			return
		}
	}
}

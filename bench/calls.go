// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"fmt"
	"runtime"
	"time"

	ggmratelimit "github.com/grpc-ecosystem/go-grpc-middleware/v2/interceptors/ratelimit"
	ggmretry "github.com/grpc-ecosystem/go-grpc-middleware/v2/interceptors/retry"
	ggmtimeout "github.com/grpc-ecosystem/go-grpc-middleware/v2/interceptors/timeout"
	"golang.org/x/time/rate"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/resolver"
	"google.golang.org/grpc/status"

	"github.com/failsafe-go/failsafe-go/failsafegrpc"

	"github.com/belfry-go/belfry"
	"github.com/belfry-go/belfry/balancer/p2c"
	"github.com/belfry-go/belfry/interceptor"
	"github.com/belfry-go/belfry/interceptor/breaker"
	"github.com/belfry-go/belfry/interceptor/buffer"
	"github.com/belfry-go/belfry/interceptor/concurrency"
	"github.com/belfry-go/belfry/interceptor/hedge"
	"github.com/belfry-go/belfry/interceptor/loadshed"
	"github.com/belfry-go/belfry/interceptor/ratelimit"
	"github.com/belfry-go/belfry/interceptor/retry"
	"github.com/belfry-go/belfry/interceptor/timeout"
	"github.com/belfry-go/belfry/internal/loadgen"
	"github.com/belfry-go/belfry/internal/testserver"
	testingv1 "github.com/belfry-go/belfry/proto/belfry/testing/v1"
	"github.com/belfry-go/belfry/resolver/discover"
)

// A caller is a way to make whole calls.
type caller struct {
	name    string
	role    role
	less    string
	policy  policy
	method  string // what else the service config says, as a member of JSON with a comma
	layers  []interceptor.Spec
	foreign []grpc.UnaryClientInterceptor
}

// dialOptions returns the options of the caller's channel, but for where the servers are.
func (c caller) dialOptions() ([]grpc.DialOption, error) {
	var opts []grpc.DialOption
	if c.layers != nil {
		stack, err := interceptor.NewStack(c.layers...)
		if err != nil {
			return nil, err
		}
		opts = append(opts, stack.DialOptions()...)
	}
	opts = append(opts, grpc.WithChainUnaryInterceptor(c.foreign...))
	if c.policy.registry == p2c.Name {
		opts = append(opts, p2c.DialOptions()...)
	}
	return append(opts,
		grpc.WithDefaultServiceConfig(fmt.Sprintf(`{%s"loadBalancingConfig": [{%q: %s}]}`, c.method, c.policy.registry, c.policy.config)),
		grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithNoProxy()), nil
}

// dial returns a channel to endpoints, which are also published as a flat list: older
// policies read that.
func (c caller) dial(endpoints []resolver.Endpoint) (*grpc.ClientConn, error) {
	source, err := discover.List(endpoints...)
	if err != nil {
		return nil, err
	}
	opts, err := c.dialOptions()
	if err != nil {
		return nil, err
	}
	return grpc.NewClient("belfry:///bench", append(opts, discover.WithSource(source, discover.WithAddresses()))...)
}

// connectTimeout bounds how long servers and proxies may take until they can be called.
const connectTimeout = 30 * time.Second

// connect waits until the channels are connected to all servers, which have so many
// connections then. A policy need not want all servers, so the wait for that is short.
func connect(ctx context.Context, conns []*grpc.ClientConn, servers []*testserver.Server, connections int64) error {
	ready, cancel := context.WithTimeout(ctx, connectTimeout)
	defer cancel()
	for _, conn := range conns {
		if err := belfry.WaitReady(ready, conn); err != nil {
			return err
		}
	}
	all, cancel := context.WithTimeout(ready, 250*time.Millisecond)
	defer cancel()
	for _, s := range servers {
		_ = s.WaitConnections(all, connections)
	}
	return nil
}

// streamWorkers is the number of goroutines that a server keeps for calls. It makes more when
// they are not enough.
const streamWorkers = 64

// fullStack is seven layers, none of which refuses here.
func fullStack(more ...interceptor.Spec) []interceptor.Spec {
	layers := append([]interceptor.Spec{loadshed.Config{}, timeout.Config{Timeout: 10 * time.Second}}, more...)
	return append(layers,
		retry.Config{AllMethods: true},
		buffer.Config{Size: 1000},
		concurrency.Config{Limit: 1000},
		ratelimit.Config{Limit: 1e9, Burst: 1e9},
		breaker.Config{},
	)
}

// callers returns the ways to make whole calls.
func callers() []caller {
	var standard, roundRobin policy
	var all []caller
	for _, p := range policies() {
		switch p.name {
		case defaultName:
			standard = p
		case rrName:
			roundRobin = p
		}
	}
	unavailable := func(err error) bool { return status.Code(err) == codes.Unavailable }
	all = append(all,
		caller{name: defaultName, role: base, policy: standard},
		caller{name: defaultName + ", seven layers", role: ours, policy: standard, layers: fullStack()},
		caller{name: defaultName + ", seven layers and a hedge", role: ours, policy: standard, layers: fullStack(hedge.Config{AllMethods: true}),
			less: "A hedge has each call made on a goroutine of its own, with a context that it can cancel, and keeps the reply apart until it knows the winner."},
		caller{name: pickFirstName, policy: policy{registry: "pick_first", config: `{}`},
			less: "It calls one server over one connection, so more calls share a write and a read of the network. It balances nothing."},
	)
	for _, p := range policies() {
		if p.role == peer {
			all = append(all, caller{name: p.name, policy: p, less: p.pick})
		}
	}
	return append(all,
		caller{name: rrName + ", retryPolicy and timeout", policy: roundRobin, less: roundRobin.pick,
			method: `"methodConfig": [{"name": [{}], "timeout": "10s", "retryPolicy": {"maxAttempts": 3, "initialBackoff": "0.05s", "maxBackoff": "1s", "backoffMultiplier": 2, "retryableStatusCodes": ["UNAVAILABLE"]}}], `},
		caller{name: rrName + ", go-grpc-middleware: timeout, retry, rate", policy: roundRobin, less: roundRobin.pick,
			foreign: []grpc.UnaryClientInterceptor{
				ggmtimeout.UnaryClientInterceptor(10 * time.Second),
				ggmretry.UnaryClientInterceptor(ggmretry.WithMax(3), ggmretry.WithCodes(codes.Unavailable)),
				ggmratelimit.UnaryClientInterceptor(allower{rate.NewLimiter(1e9, 1e9)}),
			}},
		caller{name: rrName + ", failsafe-go: six policies", policy: roundRobin, less: roundRobin.pick,
			foreign: []grpc.UnaryClientInterceptor{failsafegrpc.NewUnaryClientInterceptor(failsafeSix()...)}},
		caller{name: goZeroName + ", its breaker", policy: policy{registry: "p2c_ewma", config: `{}`},
			less:    "It looks at two endpoints where the default looks at eight and the two best of before.",
			foreign: []grpc.UnaryClientInterceptor{zeroBreaker("bench", unavailable)}},
	)
}

var callMetrics = []metric{
	{name: "calls/s", digits: 3, higher: true, judged: true},
	{name: "CPU, µs", digits: 3, judged: true},
	{name: "allocations", digits: 3, judged: true},
	{name: "p50, ms", digits: 3},
	{name: "p99, ms", digits: 3},
}

// wholeCalls measures calls of real servers on loopback.
func wholeCalls(ctx context.Context, p plan, progress func(string)) (*section, error) {
	s := &section{key: "calls", title: "Whole calls", chart: "calls.svg", about: fmt.Sprintf(`
Unary calls of ten grpc servers in this process over loopback, %d in flight in a closed loop, each as soon as the last one has ended. Servers answer at once, so the processors, which client and servers share, are the bound of all rows: calls per second say what a call costs. CPU and allocations are the servers' too. p50 and p99 say how long a call waits for a processor, not how good a policy is.

The seven layers are load shed, timeout, retry, buffer, limit of concurrency, rate and breaker. The hedge has its defaults.`, p.inFlight)}
	g := &group{name: "ten servers", metrics: callMetrics}
	s.groups = []*group{g}
	all := callers()
	busy := make([][]float64, len(all))
	for _, c := range all {
		g.rows = append(g.rows, &row{name: c.name, role: c.role, less: c.less})
	}
	for repeat := range p.repeats {
		for i, c := range all {
			if ctx.Err() != nil {
				return nil, ctx.Err()
			}
			progress(fmt.Sprintf("whole calls: %s, repeat %d", c.name, repeat+1))
			share, err := c.measure(ctx, p, g.rows[i])
			if err != nil {
				return nil, fmt.Errorf("%s: %w", c.name, err)
			}
			busy[i] = append(busy[i], share)
		}
	}
	for i, r := range g.rows {
		r.busy = loadgen.Median(busy[i])
	}
	return s, nil
}

// measure adds a repeat to r and returns how busy the processors were.
func (c caller) measure(ctx context.Context, p plan, r *row) (busy float64, err error) {
	cluster, err := testserver.StartCluster(10, func(int) []testserver.Option {
		return serverOptions(c.policy.reports)
	})
	if err != nil {
		return 0, err
	}
	defer cluster.Close()
	conn, err := c.dial(cluster.Endpoints())
	if err != nil {
		return 0, err
	}
	defer conn.Close()
	if err := connect(ctx, []*grpc.ClientConn{conn}, cluster.Servers(), 1); err != nil {
		return 0, err
	}
	client, request := testingv1.NewTestServiceClient(conn), &testingv1.UnaryRequest{}
	load := func(d time.Duration) loadgen.Result {
		ctx, cancel := context.WithTimeout(ctx, d)
		defer cancel()
		const most = 200_000 // calls in a second, which no machine reaches so
		return loadgen.Closed(ctx, p.inFlight, int(most*d.Seconds()), nil, func() error {
			_, err := client.Unary(context.Background(), request)
			return err
		})
	}
	load(p.callsTime / 4) // pools fill, windows begin
	runtime.GC()
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	then := cpu()
	got := load(p.callsTime)
	now := cpu()
	runtime.ReadMemStats(&after)
	n := float64(max(len(got.Latencies), 1))
	if float64(got.Errors) > n/100 {
		return 0, fmt.Errorf("%d of %d calls failed: %w", got.Errors, got.Errors+len(got.Latencies), got.Example)
	}
	r.add(n/got.Elapsed.Seconds(), (now.own-then.own)*1e6/n, float64(after.Mallocs-before.Mallocs)/n,
		millis(loadgen.Percentile(got.Latencies, 0.5)), millis(loadgen.Percentile(got.Latencies, 0.99)))
	return now.busy(then), nil
}

// serverOptions are those of all servers. Reports of their load cost them something.
func serverOptions(reports bool) []testserver.Option {
	opts := []testserver.Option{testserver.GRPC(grpc.NumStreamWorkers(streamWorkers))}
	if reports {
		opts = append(opts, testserver.ReportLoad(testserver.MeasuredLoad()))
	}
	return opts
}

func millis(d time.Duration) float64 { return float64(d) / float64(time.Millisecond) }

// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"fmt"
	"math"
	"slices"

	orcapb "github.com/cncf/xds/go/xds/data/orca/v3"
	// Registers p2c_ewma.
	_ "github.com/zeromicro/go-zero/zrpc"
	// Registers selector.
	_ "github.com/go-kratos/kratos/v2/transport/grpc"
	"google.golang.org/grpc/balancer"
	// Registers least_request_experimental.
	_ "google.golang.org/grpc/balancer/leastrequest"
	"google.golang.org/grpc/balancer/roundrobin"
	"google.golang.org/grpc/balancer/weightedroundrobin"

	"github.com/belfry-go/belfry/balancer/p2c"
	"github.com/belfry-go/belfry/bench/internal/kratosp2c"
	"github.com/belfry-go/belfry/internal/test/lbtest"
)

// A policy is one that is compared, by its name in gRPC's registry.
type policy struct {
	name     string // in the page
	registry string
	config   string
	role     role
	reports  bool   // it needs the servers' load reports
	like     string // belfry's policy of its kind
	pick     string // what its pick does less than the default's
	build    string // what its build does less
}

const (
	defaultName   = "belfry.p2c"
	ewmaName      = "belfry.p2c, peakEwma"
	pendingName   = "belfry.p2c, pendingRequests"
	goZeroName    = "go-zero p2c_ewma"
	kratosName    = "kratos p2c"
	rrName        = "grpc round_robin"
	leastName     = "grpc least_request_experimental"
	wrrName       = "grpc weighted_round_robin"
	pickFirstName = "grpc pick_first"
)

// policies are compared in all sections. peakEwma has the first estimate of Tower's example.
func policies() []policy {
	return []policy{
		{name: defaultName, registry: p2c.Name, config: `{}`, role: base},
		{name: ewmaName, registry: p2c.Name, config: `{"load":{"peakEwma":{"defaultRtt":"0.03s"}}}`, role: ours},
		{name: pendingName, registry: p2c.Name, config: `{"load":{"pendingRequests":{}}}`, role: ours},
		{name: goZeroName, registry: "p2c_ewma", config: `{}`, like: ewmaName,
			pick:  "It looks at two endpoints where the default looks at eight and the two best of before.",
			build: "It keeps a flat list of connections, and forgets what it has learnt of all endpoints when one comes or goes."},
		{name: kratosName, registry: kratosp2c.Name, config: `{}`, like: ewmaName,
			pick:  "It looks at two endpoints where the default looks at eight and the two best of before.",
			build: "It keeps a flat list of connections, and forgets what it has learnt of all endpoints when one comes or goes."},
		{name: rrName, registry: roundrobin.Name, config: `{}`,
			pick:  "It reads no clock and knows nothing of its endpoints: a pick adds one to a counter, and there is nothing to do when a call ends.",
			build: "It keeps nothing for an endpoint but the connection: no meter, no key, no weight."},
		{name: leastName, registry: "least_request_experimental", config: `{"choiceCount":2}`, like: pendingName,
			pick:  "It counts the calls in flight of two endpoints and reads no clock, so it knows no latency.",
			build: "It keeps a counter for an endpoint: no meter, no key, no weight."},
		{name: wrrName, registry: weightedroundrobin.Name, config: wrrConfig, reports: true,
			pick:  "A pick steps through a schedule that a timer makes: it does not look at what is in flight.",
			build: "It keeps two figures for an endpoint, which the server's reports bring."},
	}
}

// wrrConfig makes weights count after half a second of reports, and be drawn up as often as may be.
// The defaults are 10 s and 1 s, which would need longer runs.
const wrrConfig = `{"blackoutPeriod":"0.5s","weightUpdatePeriod":"0.1s"}`

var pickMetrics = []metric{
	{name: "ns", digits: 3, judged: true},
	{name: "ns, parallel", digits: 3, judged: true},
	{name: "allocations", digits: 2, judged: true},
	{name: "bytes", digits: 3},
}

var buildMetrics = []metric{
	{name: "build, ms", digits: 3, judged: true},
	{name: "build, allocations", digits: 3, judged: true},
	{name: "change one, µs", digits: 3, judged: true},
	{name: "change one, allocations", digits: 3, judged: true},
}

// pickAndBuild measures the policies without a network.
func pickAndBuild(ctx context.Context, p plan, progress func(string)) (pick, build *section, err error) {
	pick = &section{key: "pick", title: "The pick", chart: "pick.svg", about: `
One pick and the end of its call, on one goroutine and on as many as there are processors, without a network. All endpoints are READY. ` + "`weighted_round_robin`" + ` gets a load report at the end of each call. Beside the default, with eight choices and a memory of two, stand belfry's other metrics, which look at two endpoints as the peers do.`}
	build = &section{key: "pick", title: "The build", chart: "build.svg", about: `
What it takes to give a policy N endpoints at once, until the last of them is READY and can be picked, and to replace one of them by another. Connections cost nothing here: it is the policy's own work. A row without figures would have taken too long: its time grows with the square of N.`}

	took := make(map[string]float64) // seconds for the last size, by policy
	for k, n := range p.sizes {
		name := fmt.Sprintf("%d endpoints", n)
		picks, builds := &group{name: name, metrics: pickMetrics}, &group{name: name, metrics: buildMetrics}
		pick.groups, build.groups = append(pick.groups, picks), append(build.groups, builds)
		subjects, expect := policies(), make(map[string]float64)
		for _, s := range subjects {
			pickRow := &row{name: s.name, role: s.role, like: s.like, less: s.pick, busy: math.NaN()}
			buildRow := &row{name: s.name, role: s.role, like: s.like, less: s.build, busy: math.NaN()}
			if k > 0 {
				growth := float64(n) / float64(p.sizes[k-1])
				expect[s.name] = took[s.name] * growth * growth
				if expect[s.name] > p.buildMost.Seconds() {
					pickRow.note = fmt.Sprintf("not measured: a build for %d took %.2g s", p.sizes[k-1], took[s.name])
					buildRow.note = pickRow.note
				}
			}
			picks.rows, builds.rows = append(picks.rows, pickRow), append(builds.rows, buildRow)
		}
		for repeat := range p.repeats {
			for i, s := range subjects {
				slow := expect[s.name] > slowBuild
				if picks.rows[i].note != "" || slow && p.quick && repeat > 0 {
					continue
				}
				if ctx.Err() != nil {
					return nil, nil, ctx.Err()
				}
				progress(fmt.Sprintf("pick and build: %s, %s, repeat %d", name, s.name, repeat+1))
				seconds, err := s.measure(n, slow, picks.rows[i], builds.rows[i])
				if err != nil {
					return nil, nil, fmt.Errorf("%s, %s: %w", s.name, name, err)
				}
				took[s.name] = seconds
			}
		}
	}
	return pick, build, nil
}

// slowBuild is the number of seconds from which on a build is measured once in a repeat.
const slowBuild = 0.3

// measure adds a repeat to both rows and returns how many seconds a build takes.
func (s policy) measure(n int, slow bool, picks, builds *row) (float64, error) {
	endpoints := lbtest.Endpoints(n + 1)
	changedList := slices.Clone(endpoints[:n])
	changedList[n/2] = endpoints[n]
	one, err := lbtest.State(s.registry, s.config, endpoints[:n])
	if err != nil {
		return 0, err
	}
	other, err := lbtest.State(s.registry, s.config, changedList)
	if err != nil {
		return 0, err
	}

	var failed error
	note := func(err error) {
		if err != nil && failed == nil {
			failed = err
		}
	}
	var (
		cc *lbtest.Channel
		lb balancer.Balancer
	)
	start := func() {
		if lb != nil {
			lb.Close()
		}
		cc, lb, err = lbtest.Start(s.registry, one)
		note(err)
	}
	var made cost
	if slow {
		made = measureOnce(start)
	} else {
		made = measure(start)
	}
	if failed != nil {
		return 0, failed
	}
	defer func() {
		lb.Close()
		cc.Drain()
	}()
	states := []balancer.ClientConnState{other, one}
	i := 0
	changed := measure(func() {
		note(lb.UpdateClientConnState(states[i%2]))
		cc.Drain()
		i++
	})
	builds.add(made.ns/1e6, made.allocs, changed.ns/1e3, changed.allocs)

	state, _ := cc.State()
	info := balancer.PickInfo{FullMethodName: "/belfry.testing.v1.TestService/Unary", Ctx: context.Background()}
	done := balancer.DoneInfo{BytesSent: true, BytesReceived: true}
	if s.reports {
		done.ServerLoad = &orcapb.OrcaLoadReport{ApplicationUtilization: 0.5, RpsFractional: 100}
	}
	call := func() error {
		r, err := state.Picker.Pick(info)
		if err != nil {
			return err
		}
		if r.Done != nil {
			r.Done(done)
		}
		return nil
	}
	for range 10 * n { // the first calls, of endpoints that nothing is known of
		note(call())
	}
	if failed != nil {
		return 0, failed
	}
	run := func() { _ = call() } // succeeds: nothing has changed
	serial, parallel := measure(run), measureParallel(run)
	picks.add(serial.ns, parallel.ns, serial.allocs, serial.bytes)
	return made.ns / 1e9, failed
}

// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package xdstest

import (
	"context"
	"maps"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/xds"

	"github.com/belfry-go/belfry/balancer/p2c"
	"github.com/belfry-go/belfry/examples/xds/controlplane"
	"github.com/belfry-go/belfry/internal/test/enginetest"
	"github.com/belfry-go/belfry/internal/testserver"
	testingv1 "github.com/belfry-go/belfry/proto/belfry/testing/v1"
)

// gRFC A113: xDS gives each endpoint the product of its weight and that of its locality,
// as a number of up to 2^31. The numbers of a locality are shares of it, whatever the
// other localities have.
func TestThroughXDSWeightsAreShares(t *testing.T) {
	t.Parallel()
	for name, policy := range map[string]func(controlplane.Policy) (controlplane.Policy, error){
		// The locality is drawn by its weight, and the policy has one locality.
		"below wrr_locality": controlplane.WRRLocality,
		// The policy has all endpoints, and the products are their weights.
		"without it": func(p controlplane.Policy) (controlplane.Policy, error) { return p, nil },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			servers := newServers(t, 5)
			p := startPlane(t, must(policy(must(controlplane.P2C(`{"load":{"constant":{}}}`)))), refuseNothing(t))
			if err := p.Set(locality("a", 1, 0, servers[:2]), locality("b", 999, 0, servers[2:], 1, 1, 2)); err != nil {
				t.Fatal(err)
			}
			c := dialPlane(t, p, servers)
			c.allReady()

			// Weights are drawn independently, so the bounds are 6.6 standard deviations
			// of a binomial: passed by chance in one run of 10^10.
			const n = 800
			counts := c.counts(n)
			for name, want := range map[string][2]int{"server-2": {119, 281}, "server-3": {119, 281}, "server-4": {306, 494}} {
				if got := counts[name]; got < want[0] || got > want[1] {
					t.Errorf("calls by server are %v, want %d to %d to %s", counts, want[0], want[1], name)
				}
			}
			if light := counts["server-0"] + counts["server-1"]; light > 20 { // P < 1e-18
				t.Errorf("calls by server are %v, want a thousandth to the first two", counts)
			}
			for _, s := range p2c.SnapshotsOf(c.conn) {
				weights := map[string]uint32{}
				for _, e := range s.Endpoints {
					weights[e.Addresses[0]] = e.Weight
				}
				for _, pair := range [][2]int{{0, 1}, {2, 3}} {
					if a, b := weights[servers[pair[0]].Addr()], weights[servers[pair[1]].Addr()]; a != b {
						t.Errorf("servers %v have weights %d and %d, want the same", pair, a, b)
					}
				}
			}
		})
	}
}

// While nothing tells them apart the servers of a locality have the same part of its
// calls in flight, although their weights are large and those of the other locality small.
func TestThroughXDSWeightsDoNotSkewWhatIsInFlight(t *testing.T) {
	t.Parallel()
	servers := newServers(t, 4)
	p := startPlane(t, must(controlplane.WRRLocality(must(controlplane.P2C(`{"choiceCount":4,"load":{"pendingRequests":{}}}`)))), refuseNothing(t))
	if err := p.Set(locality("a", 1, 0, servers[:2]), locality("b", 99, 0, servers[2:])); err != nil {
		t.Fatal(err)
	}
	c := dialPlane(t, p, servers)
	c.allReady()
	ctx, cancel := context.WithCancel(testContext(t))
	defer cancel()
	for _, s := range servers {
		s.Stall()
	}
	var calls sync.WaitGroup
	defer calls.Wait()
	defer cancel()
	// A pick looks at both endpoints of its locality and takes that with fewer attempts in
	// flight. Each call has arrived before the next is made, so they differ by one at most.
	for n := range int64(60) {
		calls.Go(func() { _, _ = c.client.Unary(ctx, &testingv1.UnaryRequest{}) }) // Cancelled at the end.
		for arrived := int64(0); arrived <= n; {
			arrived = 0
			for _, s := range servers {
				arrived += s.Stats().InFlight
			}
			if ctx.Err() != nil {
				t.Fatal("a call does not arrive")
			}
			time.Sleep(100 * time.Microsecond)
		}
	}
	for _, pair := range [][]*testserver.Server{servers[:2], servers[2:]} {
		if a, b := pair[0].Stats().InFlight, pair[1].Stats().InFlight; max(a-b, b-a) > 1 {
			t.Errorf("%s has %d calls in flight and %s %d, want one more at most", pair[0].Name(), a, pair[1].Name(), b)
		}
	}
}

// EDS replaces the endpoints, their localities and weights again and again while calls run.
// No call fails, and in the end the policies have what the control plane has.
func TestThroughXDSChurnUnderLoad(t *testing.T) {
	t.Parallel()
	const updates = 1000
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	random := rand.New(rand.NewPCG(seed, 0))

	servers := newServers(t, 8)
	p := startPlane(t, must(controlplane.WRRLocality(must(controlplane.P2C(`{}`)))), refuseNothing(t))
	if err := p.Set(locality("a", 1, 0, servers)); err != nil {
		t.Fatal(err)
	}
	c := dialPlane(t, p, servers)
	c.allReady()
	ctx := testContext(t)
	loading, stop := context.WithCancel(ctx)
	var calls sync.WaitGroup
	defer calls.Wait()
	defer stop()
	for range 4 {
		calls.Go(func() {
			for loading.Err() == nil {
				if _, err := c.client.Unary(ctx, &testingv1.UnaryRequest{}); err != nil {
					t.Errorf("call: %v", err)
					return
				}
				time.Sleep(time.Millisecond) // The load is there to be disturbed, not to fill the machine.
			}
		})
	}

	calls.Go(func() { // Policies come, go, and know again what they knew.
		for loading.Err() == nil {
			p2c.SnapshotsOf(c.conn)
			time.Sleep(time.Millisecond)
		}
	})

	var last []*testserver.Server
	for range updates {
		random.Shuffle(len(servers), func(i, j int) { servers[i], servers[j] = servers[j], servers[i] })
		last = servers[:1+random.IntN(len(servers))]
		cut := random.IntN(len(last))
		localities := []controlplane.Locality{locality("a", 1+random.Uint32N(9), 0, last[cut:], 1+random.Uint32N(9))}
		if cut > 0 {
			localities = append(localities, locality("b", 1+random.Uint32N(9), 0, last[:cut], 1+random.Uint32N(9)))
		}
		if err := p.Set(localities...); err != nil {
			t.Fatal(err)
		}
		if err := p.Wait(ctx); err != nil {
			t.Fatalf("waiting for the client to take an update: %v", err)
		}
	}
	want := map[string]bool{}
	for _, s := range last {
		want[s.Addr()] = true
	}
	got := map[string]bool{}
	defer func() {
		if t.Failed() {
			t.Logf("the policies have %v, the control plane %v", got, want)
		}
	}()
	// The client has taken the last update; the policies get it in their own time.
	c.until("the policies have what the control plane has", 1, func(map[string]int) bool {
		clear(got)
		for _, s := range p2c.SnapshotsOf(c.conn) {
			for _, e := range s.Endpoints {
				got[e.Addresses[0]] = true
			}
		}
		return maps.Equal(got, want)
	})
	stop()
	calls.Wait()
}

// While the control plane is down, slow, silent or answers nonsense, calls go on, and the
// channel catches up. Endpoints that are nonsense are refused, and those before stay. The
// flag -outage says how long each lasts.
func TestThroughXDSOutages(t *testing.T) {
	t.Parallel()
	servers := newServers(t, 3)
	refused := make(chan string, 1)
	p := startPlane(t, must(controlplane.WRRLocality(must(controlplane.P2C(`{}`)))), func(_, message string) {
		select {
		case refused <- message:
		default: // told before
		}
	})
	if err := p.Set(locality("a", 1, 0, servers[:2])); err != nil {
		t.Fatal(err)
	}
	proxy := enginetest.NewProxy(t)
	proxy.ForwardTo(p.Addr())
	builder, err := xds.NewXDSResolverWithConfigForTesting(controlplane.Bootstrap(proxy.Addr()))
	if err != nil {
		t.Fatal(err)
	}
	c := dial(t, servers, builder.Scheme(), p.service, grpc.WithResolvers(builder))
	c.counts(10)
	var made atomic.Int64
	loading, stop := context.WithCancel(testContext(t))
	var calls sync.WaitGroup
	defer calls.Wait()
	defer stop()
	for range 4 {
		calls.Go(func() {
			for loading.Err() == nil {
				if _, err := c.client.Unary(t.Context(), &testingv1.UnaryRequest{}); err != nil {
					t.Errorf("call: %v", err)
					return
				}
				made.Add(1)
				time.Sleep(time.Millisecond)
			}
		})
	}
	refusedEndpoints := enginetest.Disturbance{Name: "endpoints that are nonsense", End: func() {}, Begin: func() {
		if err := p.Set(locality("a", 1, 1, servers[:1])); err != nil { // No locality has priority 0.
			t.Error(err)
		}
		select {
		case message := <-refused:
			t.Logf("refused: %s", message)
		case <-loading.Done():
			t.Error("the client took endpoints without a first priority")
		}
	}}
	// A server that is added while the control plane is out of order gets calls afterwards.
	for n, d := range append(proxy.Disturb(p.Addr), refusedEndpoints) {
		d.Begin()
		before := made.Load()
		time.Sleep(*enginetest.Outage)
		for ; made.Load() < before+10; time.Sleep(time.Millisecond) {
			if loading.Err() != nil {
				t.Fatalf("%s: no calls meanwhile", d.Name)
			}
		}
		now := servers[n%2 : n%2+2]
		if err := p.Set(locality("a", 1, 0, now)); err != nil {
			t.Fatal(err)
		}
		d.End()
		if err := p.Wait(testContext(t)); err != nil {
			t.Fatalf("%s: waiting for the client to catch up: %v", d.Name, err)
		}
		c.until("the endpoints after "+d.Name+" get all calls", 20, func(m map[string]int) bool {
			return m[now[0].Name()]+m[now[1].Name()] == 20 && m[now[0].Name()] > 0 && m[now[1].Name()] > 0
		})
	}
}

// All calls go to the first priority that has a server, and come back to it.
func TestThroughXDSPriorities(t *testing.T) {
	t.Parallel()
	servers := newServers(t, 4)
	p := startPlane(t, must(controlplane.WRRLocality(must(controlplane.P2C(`{}`)))), refuseNothing(t))
	if err := p.Set(locality("a", 1, 0, servers[:2]), locality("b", 1, 1, servers[2:])); err != nil {
		t.Fatal(err)
	}
	quick := backoff.Config{BaseDelay: 10 * time.Millisecond, Multiplier: 1, MaxDelay: 10 * time.Millisecond}
	c := dialPlane(t, p, servers, grpc.WithConnectParams(grpc.ConnectParams{Backoff: quick, MinConnectTimeout: 20 * time.Second}))
	first := func(m map[string]int) int { return m["server-0"] + m["server-1"] }
	c.until("the first priority has all calls", 50, func(m map[string]int) bool { return first(m) == 50 })
	servers[0].Stop()
	c.until("what is left of it has all", 50, func(m map[string]int) bool { return m["server-1"] == 50 })
	servers[1].Stop()
	c.until("the second has all", 50, func(m map[string]int) bool { return m["server-2"]+m["server-3"] == 50 })
	if err := servers[0].Restart(testContext(t)); err != nil {
		t.Fatal(err)
	}
	c.until("the first has all again", 50, func(m map[string]int) bool { return first(m) == 50 })
}

// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package aperture

import (
	"context"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"strings"
	"testing"

	"google.golang.org/grpc"
	"google.golang.org/grpc/balancer"
	"google.golang.org/grpc/balancer/randomsubsetting"
	_ "google.golang.org/grpc/balancer/roundrobin" // a child
	"google.golang.org/grpc/connectivity"
	estats "google.golang.org/grpc/experimental/stats"
	"google.golang.org/grpc/resolver"
	"google.golang.org/grpc/resolver/manual"

	"github.com/belfry-go/belfry/internal/test/lbtest"
	"github.com/belfry-go/belfry/internal/test/leaktest"
	"github.com/belfry-go/belfry/internal/test/race"
	"github.com/belfry-go/belfry/internal/testserver"
	testingv1 "github.com/belfry-go/belfry/proto/belfry/testing/v1"
)

func TestMain(m *testing.M) { leaktest.Main(m) }

func endpoint(addr string) resolver.Endpoint {
	return resolver.Endpoint{Addresses: []resolver.Address{{Addr: addr}}}
}

func endpoints(n int) (es []resolver.Endpoint) {
	for i := range n {
		es = append(es, endpoint(fmt.Sprintf("10.0.%d.%d:80", i/256, i%256)))
	}
	return es
}

func hashes(es []resolver.Endpoint) (hs []uint64) {
	for _, e := range es {
		hs = append(hs, hashOf(e))
	}
	return hs
}

func newRand(t *testing.T) *rand.Rand {
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	return rand.New(rand.NewPCG(seed, 0))
}

func TestSubsets(t *testing.T) {
	t.Run("are_even_and_large_enough", func(t *testing.T) {
		r := newRand(t)
		for range 60 {
			n, s := 1+r.IntN(200), subset{peers: 1 + r.IntN(150), least: 1 + r.IntN(20)}
			hs := hashes(endpoints(n))
			clients := make(map[uint64]int)
			sizes := make(map[int]int) // of a group → the size of its smallest subset
			groups := s.groups(n)
			for s.ordinal = range s.peers {
				chosen := s.of(hs)
				for h := range chosen {
					clients[h]++
				}
				if len(chosen) < min(s.least, n) {
					t.Fatalf("%d of %d: subset of %d of %d endpoints, want at least %d", s.ordinal, s.peers, len(chosen), n, s.least)
				}
				g := s.ordinal % groups
				if least, ok := sizes[g]; !ok || len(chosen) < least {
					sizes[g] = len(chosen)
				} else if len(chosen) > least+1 {
					t.Fatalf("%d of %d: subset of %d, one in its group has %d", s.ordinal, s.peers, len(chosen), least)
				}
			}
			for _, h := range hs {
				if clients[h] != min(groups, s.peers) {
					t.Fatalf("an endpoint of %d has %d of %d clients, want one of each of %d groups", n, clients[h], s.peers, groups)
				}
			}
		}
	})
	t.Run("depend_on_neither_order_nor_repetition", func(t *testing.T) {
		r := newRand(t)
		s := subset{ordinal: 3, peers: 10, least: 12}
		es := endpoints(100)
		want := s.of(hashes(es))
		es = append(es, es[:30]...)
		r.Shuffle(len(es), func(i, j int) { es[i], es[j] = es[j], es[i] })
		got := s.of(hashes(es))
		if len(got) != len(want) {
			t.Fatalf("%d chosen, want %d", len(got), len(want))
		}
		for h := range want {
			if !got[h] {
				t.Fatal("another endpoint was chosen")
			}
		}
	})
	t.Run("change_little", func(t *testing.T) {
		// Deterministic: the addresses are given.
		all := hashes(endpoints(240))
		changes := func(before, after func() (subset, []uint64)) (sum int) {
			for i := range 100 {
				a, hs := before()
				b, hs2 := after()
				a.ordinal, b.ordinal = i, i
				was, is := a.of(hs), b.of(hs2)
				for h := range is {
					if !was[h] {
						sum++
					}
				}
			}
			return sum
		}
		s := subset{peers: 100, least: 12}
		with := func(s subset, hs []uint64) func() (subset, []uint64) {
			return func() (subset, []uint64) { return s, hs }
		}
		replaced := append([]uint64{all[100]}, all[1:100]...)
		for _, c := range []struct {
			what          string
			before, after func() (subset, []uint64)
			most          int // new connections of all clients together
		}{
			// One in each of 16 groups is the least, 12 or 13 for each of 100 clients where
			// their subsets double.
			{"an endpoint is replaced", with(s, all[:100]), with(s, replaced), 4 * 16},
			{"one is added", with(s, all[:100]), with(s, all[:101]), 4 * 16},
			{"one leaves", with(s, all[:101]), with(s, all[:100]), 4 * 16},
			{"a peer is added", with(s, all[:100]), with(subset{peers: 101, least: 12}, all[:100]), 16},
			{"the groups double", with(subset{peers: 128, least: 12}, all[:100]), with(subset{peers: 129, least: 12}, all[:100]), 1350},
		} {
			got := changes(c.before, c.after)
			t.Logf("%s: %d new connections of 100 clients", c.what, got)
			if got > c.most {
				t.Errorf("%s: %d new connections of 100 clients, want at most %d", c.what, got, c.most)
			}
		}
	})
}

// client is a policy on a channel without a network, which counts connections.
type client struct {
	lbtest.Channel
	balancer balancer.Balancer
	config   balancer.ClientConnState
	open     map[string]int // by address
	made     int
}

func (c *client) NewSubConn(addrs []resolver.Address, opts balancer.NewSubConnOptions) (balancer.SubConn, error) {
	listener := opts.StateListener
	opts.StateListener = func(s balancer.SubConnState) {
		if s.ConnectivityState == connectivity.Shutdown {
			if c.open[addrs[0].Addr]--; c.open[addrs[0].Addr] == 0 {
				delete(c.open, addrs[0].Addr)
			}
		}
		listener(s)
	}
	c.made++
	c.open[addrs[0].Addr]++
	return c.Channel.NewSubConn(addrs, opts)
}

func newClient(t *testing.T, name, config string) *client {
	t.Helper()
	c := &client{open: make(map[string]int)}
	builder := balancer.Get(name)
	cfg, err := builder.(balancer.ConfigParser).ParseConfig(json.RawMessage(config))
	if err != nil {
		t.Fatal(err)
	}
	c.config.BalancerConfig = cfg
	c.balancer = builder.Build(c, balancer.BuildOptions{})
	t.Cleanup(func() {
		c.balancer.Close()
		c.Drain()
	})
	return c
}

func (c *client) update(t *testing.T, es []resolver.Endpoint) {
	t.Helper()
	c.config.ResolverState.Endpoints = es
	if err := c.balancer.UpdateClientConnState(c.config); err != nil {
		t.Fatal(err)
	}
	c.Drain()
}

// 100 clients of 100 servers of which 20 are replaced one after the other, under either
// policy: how many clients a server has, and how many connections are made. What
// random_subsetting does differs from run to run.
func TestApertureBesideRandomSubsetting(t *testing.T) {
	if race.Enabled {
		t.Skip("it is one goroutine: the race detector finds nothing in it, and makes it 20 times as long")
	}
	figures := func(name string, config func(i int) string) (least, most int, made float64) {
		clients := make([]*client, 100)
		es := endpoints(120)
		now := es[:100:100]
		for i := range clients {
			clients[i] = newClient(t, name, config(i))
			clients[i].update(t, now)
			clients[i].made = 0
		}
		for k := range 20 {
			now = append(now[1:len(now):len(now)], es[100+k])
			for _, c := range clients {
				c.update(t, now)
			}
		}
		per := make(map[string]int)
		for _, c := range clients {
			made += float64(c.made) / 20
			for addr := range c.open {
				per[addr]++
			}
		}
		least = per[now[0].Addresses[0].Addr]
		for _, e := range now {
			n := per[e.Addresses[0].Addr]
			least, most = min(least, n), max(most, n)
		}
		return least, most, made
	}
	const child = `"childPolicy":[{"round_robin":{}}]`
	least, most, made := figures(Name, func(i int) string { return fmt.Sprintf(`{"ordinal":%d,"peers":100,%s}`, i, child) })
	t.Logf("%s: %d to %d clients of a server, %.1f connections are made when one is replaced", Name, least, most, made)
	if least != 16 || most != 16 || made > 4*16 {
		t.Errorf("%d to %d clients of a server and %.1f new connections, want 16, 16 and at most 64", least, most, made)
	}
	least, most, made = figures(randomsubsetting.Name, func(int) string { return `{"subsetSize":16,` + child + `}` })
	t.Logf("%s: %d to %d clients of a server, %.1f connections are made when one is replaced", randomsubsetting.Name, least, most, made)
}

func TestConfig(t *testing.T) {
	t.Setenv("TEST_POD", "orders-17")
	t.Setenv("TEST_PEERS", "40")
	t.Setenv("TEST_BAD", "orders")
	t.Run("is_read", func(t *testing.T) {
		for _, c := range []struct {
			config string
			want   subset
		}{
			{`{"ordinal":3,"peers":10}`, subset{3, 10, 12}},
			{`{"ordinal":0,"peers":1,"minEndpoints":1}`, subset{0, 1, 1}},
			{`{"ordinalEnv":"TEST_POD","peersEnv":"TEST_PEERS"}`, subset{17, 40, 12}},
			{`{"ordinal":3,"ordinalEnv":"TEST_POD","peers":5,"peersEnv":"TEST_PEERS"}`, subset{3, 5, 12}},
			{`{"ordinal":3,"peers":10,"future":1,"childPolicy":[{"nosuch":{}},{"round_robin":{}}]}`, subset{3, 10, 12}},
		} {
			got, err := parseConfig(json.RawMessage(c.config))
			if err != nil {
				t.Errorf("%s: %v", c.config, err)
				continue
			}
			js, err := json.Marshal(got)
			if err != nil {
				t.Fatal(err)
			}
			again, err := parseConfig(js)
			if err != nil || got.subset != c.want || again.subset != c.want || again.child.Builder.Name() != got.child.Builder.Name() {
				t.Errorf("%s: got %+v, after marshal and parse %+v, %v, want %+v", c.config, got.subset, again, err, c.want)
			}
		}
	})
	t.Run("errors_say_what_to_do", func(t *testing.T) {
		for _, c := range []struct{ config, want string }{
			{`{"peers":10}`, "belfry.aperture: ordinal: not set, must be set, or ordinalEnv"},
			{`{"ordinal":1}`, "belfry.aperture: peers: not set, must be set, or peersEnv"},
			{`{"ordinal":1,"peers":0}`, "belfry.aperture: peers: 0, must be between 1 and 1000000"},
			{`{"ordinal":1,"peers":2,"minEndpoints":0}`, "belfry.aperture: minEndpoints: 0, must be between 1 and 10000"},
			{`{"ordinal":1.5,"peers":2}`, "belfry.aperture: ordinal: 1.5, must be an integer of at least 0"},
			{`{"ordinalEnv":"TEST_BAD","peers":2}`, `belfry.aperture: ordinalEnv: the environment variable TEST_BAD is "orders", must be a number, or a name that ends in one`},
			{`{"ordinal":1,"peersEnv":"TEST_POD"}`, `belfry.aperture: peersEnv: the environment variable TEST_POD is "orders-17", must be a number`},
			{`{"ordinal":1,"peersEnv":"TEST_UNSET"}`, `belfry.aperture: peersEnv: the environment variable TEST_UNSET is "", must be a number`},
			{`{"ordinal":1,"peers":2,"childPolicy":[{"nosuch":{}}]}`, "belfry.aperture: childPolicy: nosuch, must name a policy that is registered: import its package"},
			{`{"ordinal":1,"peers":2,"childPolicy":[{"belfry.p2c":{"choiceCount":1}}]}`, "belfry.aperture: childPolicy[0]: belfry.p2c: choiceCount: 1, must be between 2 and 16"},
			{`{"ordinal":1,"peers":2,"childPolicy":[{}]}`, "belfry.aperture: childPolicy[0]: 0 policies, must be one"},
		} {
			if _, err := parseConfig(json.RawMessage(c.config)); err == nil || err.Error() != c.want {
				t.Errorf("%s: error is %v, want %s", c.config, err, c.want)
			}
		}
	})
}

func TestPolicy(t *testing.T) {
	const config = `{"ordinal":12,"peers":10,"minEndpoints":2,"childPolicy":[{"round_robin":{}}]}`
	t.Run("an_ordinal_of_peers_or_more_counts_as_its_remainder", func(t *testing.T) {
		a, b := newClient(t, Name, config), newClient(t, Name, strings.Replace(config, "12", "2", 1))
		a.update(t, endpoints(10))
		b.update(t, endpoints(10))
		if len(a.open) != 2 || fmt.Sprint(a.open) != fmt.Sprint(b.open) {
			t.Errorf("subsets %v and %v, want equal ones of 2", a.open, b.open)
		}
	})
	t.Run("endpoints_without_addresses_do_not_count", func(t *testing.T) {
		c := newClient(t, Name, config)
		c.update(t, append(make([]resolver.Endpoint, 10), endpoints(2)...))
		if len(c.open) != 2 {
			t.Errorf("%d connections, want 2", len(c.open))
		}
	})
	t.Run("another_child_takes_over", func(t *testing.T) {
		c := newClient(t, Name, config)
		c.update(t, endpoints(10))
		cfg, err := parseConfig(json.RawMessage(strings.Replace(config, "round_robin", "belfry.p2c", 1)))
		if err != nil {
			t.Fatal(err)
		}
		c.config.BalancerConfig = cfg
		c.update(t, endpoints(10))
		if s, _ := c.State(); len(c.open) != 2 || c.made != 4 || s.ConnectivityState != connectivity.Ready {
			t.Errorf("%d connections of %d, %v, want 2 of 4, READY", len(c.open), c.made, s.ConnectivityState)
		}
	})
	t.Run("without_endpoints_the_channel_fails", func(t *testing.T) {
		c := newClient(t, Name, config)
		c.balancer.ResolverError(fmt.Errorf("no such name"))
		s, _ := c.State()
		if _, err := s.Picker.Pick(balancer.PickInfo{Ctx: context.Background()}); s.ConnectivityState != connectivity.TransientFailure || !strings.Contains(err.Error(), "no such name") {
			t.Errorf("state %v, error %v, want TRANSIENT_FAILURE and the resolver's", s.ConnectivityState, err)
		}
	})
	t.Run("endpoints_are_counted_by_use", func(t *testing.T) {
		r := recorder{values: make(map[string]int64)}
		c := &client{open: make(map[string]int), Channel: lbtest.Channel{Recorder: r}}
		cfg, err := parseConfig(json.RawMessage(config))
		if err != nil {
			t.Fatal(err)
		}
		c.config.BalancerConfig = cfg
		c.balancer = builder{}.Build(c, balancer.BuildOptions{})
		c.update(t, endpoints(10))
		c.update(t, endpoints(40))
		if r.values["true"] != 4 || r.values["false"] != 36 {
			t.Errorf("counted %v, want 4 and 36", r.values)
		}
		c.balancer.Close()
		c.Drain()
		if r.values["true"] != 0 || r.values["false"] != 0 {
			t.Errorf("after Close: counted %v, want none", r.values)
		}
	})
}

type recorder struct {
	estats.UnimplementedMetricsRecorder
	values map[string]int64
}

func (r recorder) RecordInt64UpDownCount(h *estats.Int64UpDownCountHandle, v int64, labels ...string) {
	if strings.HasPrefix(h.Descriptor().Name, "belfry.lb.aperture.") {
		r.values[labels[1]] += v
	}
}

// Real servers: two clients share six of them.
func TestWire(t *testing.T) {
	c := testserver.NewCluster(t, 6, nil)
	seen := make(map[string]int)
	for i := range 2 {
		r := manual.NewBuilderWithScheme("belfrytest")
		r.InitialState(resolver.State{Endpoints: c.Endpoints()})
		conn, err := grpc.NewClient("belfrytest:///orders", append(c.DialOptions(), grpc.WithResolvers(r),
			grpc.WithDefaultServiceConfig(fmt.Sprintf(`{"loadBalancingConfig":[{"belfry.aperture":{"ordinal":%d,"peers":2,"minEndpoints":3,"childPolicy":[{"round_robin":{}}]}}]}`, i)))...)
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		mine := make(map[string]bool)
		for len(mine) < 3 {
			reply, err := testingv1.NewTestServiceClient(conn).Unary(t.Context(), &testingv1.UnaryRequest{}, grpc.WaitForReady(true))
			if err != nil {
				t.Fatal(err)
			}
			name := reply.GetObserved().GetServer()
			if !mine[name] {
				mine[name] = true
				seen[name]++
			}
		}
	}
	if len(seen) != 6 {
		t.Errorf("the clients called %v, want each of six servers from one client", seen)
	}
	for _, s := range c.Servers() {
		if got := s.Stats().Connections; got != 1 {
			t.Errorf("%s has %d connections, want 1", s.Name(), got)
		}
	}
}

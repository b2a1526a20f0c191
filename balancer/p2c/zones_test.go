// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package p2c

import (
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"net/url"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc/balancer"
	"google.golang.org/grpc/resolver"

	"github.com/belfry-go/belfry/internal/place"
)

// in returns an endpoint in a zone.
func in(zone, addr string) resolver.Endpoint { return place.SetZone(one(addr), zone) }

// threeZones is n endpoints in each of the zones a, b and c.
func threeZones(n int) (es []resolver.Endpoint) {
	for _, zone := range []string{"a", "b", "c"} {
		for i := range n {
			es = append(es, in(zone, fmt.Sprintf("%s%d", zone, i)))
		}
	}
	return es
}

// home returns the part of the calls that went to addresses that begin with a.
func home(counts map[string]int) float64 {
	home, all := 0, 0
	for addr, n := range counts {
		all += n
		if strings.HasPrefix(addr, "a") {
			home += n
		}
	}
	return float64(home) / float64(all)
}

func TestZones(t *testing.T) {
	t.Run("home_gets_the_calls", func(t *testing.T) {
		for _, config := range []string{
			`{"exploreEvery":0,"zones":{"home":"a"}}`,
			`{"exploreEvery":0,"choiceCount":16,"zones":{"home":"a"}}`, // no room for draws from home
			`{"exploreEvery":0,"zones":{"home":"a"},"load":{"pendingRequests":{}}}`,
			`{"exploreEvery":0,"zones":{"home":"a"},"load":{"peakEwma":{}}}`,
			`{"zones":{"home":"a"},"load":{"constant":{}}}`,
			`{"zones":{"home":"a"},"load":{"constant":{"load":0}}}`,
		} {
			for _, weigh := range []bool{false, true} {
				bubble(t, func(t *testing.T, w *world) {
					es := threeZones(5)
					if weigh {
						for i, e := range es {
							es[i] = place.SetZone(weighted(e.Addresses[0].Addr, uint32(1+i%2)), place.Zone(e))
						}
					}
					w.start(config, es...)
					if got := home(w.counts(300)); got != 1 {
						t.Errorf("%s, weights %t: %.3f of the calls stayed at home, want all", config, weigh, got)
					}
				})
			}
		}
	})
	t.Run("without_the_setting_zones_do_not_count", func(t *testing.T) {
		bubble(t, func(t *testing.T, w *world) {
			w.start(pendingConfig, threeZones(5)...)
			// A third, with a standard error of 0.027: false in one of 1e9 runs.
			if got := home(w.counts(300)); got > 0.5 {
				t.Errorf("%.3f of the calls went to zone a, want a third", got)
			}
		})
	})
	t.Run("calls_spill_over_when_home_is_busy", func(t *testing.T) {
		bubble(t, func(t *testing.T, w *world) {
			w.start(`{"choiceCount":8,"exploreEvery":0,"zones":{"home":"a","awayCost":3},"load":{"pendingRequests":{}}}`, threeZones(2)...)
			// One away that has n in flight counts for 3*(n+1).
			for _, c := range []struct{ picks, home, away int }{{8, 4, 0}, {4, 4, 1}, {6, 7, 1}, {4, 7, 2}} {
				for range c.picks {
					w.mustPick()
				}
				for _, addr := range []string{"a0", "a1", "b0", "b1", "c0", "c1"} {
					want := c.away
					if addr[0] == 'a' {
						want = c.home
					}
					if got := w.inFlight(addr); got != want {
						t.Fatalf("%s has %d in flight, want %d with %d at home", addr, got, want, c.home)
					}
				}
			}
		})
	})
	t.Run("a_further_attempt_leaves_a_zone_of_one", func(t *testing.T) {
		bubble(t, func(t *testing.T, w *world) {
			w.start(`{"zones":{"home":"a"}}`, in("a", "a"), in("b", "b"))
			for range 100 {
				addr, done, err := w.pickWith(tried(w.endpoint("a")))
				if err != nil {
					t.Fatal(err)
				}
				done(success)
				if addr != "b" {
					t.Fatalf("a call that tried a went to %s, want b", addr)
				}
			}
		})
	})
	t.Run("a_further_attempt_stays_where_there_are_others", func(t *testing.T) {
		bubble(t, func(t *testing.T, w *world) {
			w.start(`{"exploreEvery":0,"zones":{"home":"a"}}`, threeZones(20)...)
			for range 100 {
				addr, done, err := w.pickWith(tried(w.endpoint("a0")))
				if err != nil {
					t.Fatal(err)
				}
				done(success)
				if addr == "a0" || addr[0] != 'a' {
					t.Fatalf("a call that tried a0 went to %s, want another in zone a", addr)
				}
			}
		})
	})
	t.Run("now_and_then_a_call_learns_what_other_zones_are_like", func(t *testing.T) {
		bubble(t, func(t *testing.T, w *world) {
			w.start(`{"zones":{"home":"a"}}`, threeZones(1)...)
			got := make(map[string]int)
			const n = 10_000
			for range n {
				addr, done := w.mustPick()
				time.Sleep(time.Millisecond)
				done(success)
				got[addr[:1]]++
			}
			// 50 picks explore, and an endpoint that was never heard of comes first. That a zone
			// gets none of these picks happens in 1 of 1e14 runs.
			if got["b"] == 0 || got["c"] == 0 || got["a"] < n-10 {
				t.Errorf("calls by zone are %v, want one or two to each away", got)
			}
		})
	})

	t.Run("all_zones_count_alike_while_home_lacks_endpoints", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			r := &fakeRecorder{values: make(map[string]int64)}
			w := newWorld(t)
			w.cc.Recorder = r
			w.p.opts.Target = resolver.Target{URL: url.URL{Scheme: "test", Path: "/orders"}}
			w.start(`{"zones":{"home":"a","minReady":0.6},"load":{"constant":{}}}`, threeZones(5)...)
			w.lose("a0")
			w.lose("a1")
			if got := home(w.counts(300)); got != 1 || !w.p.snapshot().PrefersHome {
				t.Errorf("with 3 of 5 READY %.3f of the calls stayed at home, want all", got)
			}
			r.want(t, "no pick away", map[string]int64{"picks": 300, "away_picks": 0})
			w.lose("a2")
			// 2 of 12, with a standard error of 0.022: false in one of 1e9 runs.
			if got := home(w.counts(300)); got > 0.35 || w.p.snapshot().PrefersHome {
				t.Errorf("with 2 of 5 READY %.3f of the calls stayed at home, want a sixth", got)
			}
			r.want(t, "zones do not count", map[string]int64{"picks": 600, "away_picks": 0})
			w.ready("a2")
			if got := home(w.counts(300)); got != 1 {
				t.Errorf("with 3 of 5 READY again %.3f of the calls stayed at home, want all", got)
			}
			for _, a := range []string{"a0", "a1", "a2", "a3", "a4"} {
				w.endpoint(a).busy(1000)
			}
			w.b.Close()
			w.settle()
		})
	})
	t.Run("those_put_aside_are_not_well", func(t *testing.T) {
		for _, maxAside := range []float64{0.5, 0.1} { // without panic, and with
			bubble(t, func(t *testing.T, w *world) {
				w.start(fmt.Sprintf(`{"failureAccrual":{"failures":2,"maxAside":%v},"zones":{"home":"a"},"load":{"constant":{}}}`, maxAside), threeZones(5)...)
				for _, e := range threeZones(5) { // One that only fails would be avoided.
					w.endpoint(e.Addresses[0].Addr).candidate.meter.Load().note(everAnswered)
				}
				for i := 0; i < 1000 && w.p.snapshot().PrefersHome; i++ {
					addr, done := w.mustPick()
					if addr < "a3" {
						done(balancer.DoneInfo{BytesSent: true, Err: statusError("UNAVAILABLE")})
					} else {
						done(success)
					}
				}
				if s := w.p.snapshot(); s.PrefersHome {
					t.Errorf("maxAside %v: home is preferred while three of its five endpoints fail", maxAside)
				}
				time.Sleep(time.Hour)
				w.settle()
				for i := 0; i < 1000 && !w.p.snapshot().PrefersHome; i++ {
					_, done := w.mustPick()
					done(success)
				}
				if s := w.p.snapshot(); !s.PrefersHome {
					t.Errorf("maxAside %v: home is not preferred after its endpoints are well again", maxAside)
				}
			})
		}
	})
	t.Run("picks_away_are_counted", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			r := &fakeRecorder{values: make(map[string]int64)}
			w := newWorld(t)
			w.cc.Recorder = r
			w.p.opts.Target = resolver.Target{URL: url.URL{Scheme: "test", Path: "/orders"}}
			w.start(`{"zones":{"home":"a"},"load":{"pendingRequests":{}}}`, threeZones(1)...)
			w.endpoint("a0").busy(1000)
			w.counts(10)
			r.want(t, "home is busy", map[string]int64{"picks": 10, "away_picks": 10})
			w.endpoint("a0").busy(-1000)
			w.b.Close()
			w.settle()
		})
	})
	t.Run("where_home_is_not_known_zones_do_not_count", func(t *testing.T) {
		for _, config := range []string{`{"zones":{},"load":{"constant":{}}}`, `{"zones":{"home":"nowhere"},"load":{"constant":{}}}`} {
			bubble(t, func(t *testing.T, w *world) {
				w.start(config, threeZones(5)...)
				if got := home(w.counts(300)); got > 0.5 {
					t.Errorf("%s: %.3f of the calls went to zone a, want a third", config, got)
				}
			})
		}
	})
	t.Run("home_is_in_the_config_the_environment_or_discovery", func(t *testing.T) {
		t.Setenv("TEST_ZONE", "b")
		for _, c := range []struct{ config, want string }{
			{`{"zones":{"home":"a","homeEnv":"TEST_ZONE"}}`, "a"},
			{`{"zones":{"homeEnv":"TEST_ZONE"}}`, "b"},
			{`{"zones":{"homeEnv":"TEST_ZONE_UNSET"}}`, "c"},
			{`{"zones":{}}`, "c"},
			{`{}`, ""},
		} {
			bubble(t, func(t *testing.T, w *world) {
				state := place.SetHome(resolver.State{Endpoints: threeZones(1)}, "c")
				err := w.b.UpdateClientConnState(balancer.ClientConnState{ResolverState: state, BalancerConfig: must(parseConfig(json.RawMessage(c.config)))})
				if err != nil {
					t.Fatal(err)
				}
				w.settle()
				for _, a := range []string{"a0", "b0", "c0"} {
					w.ready(a)
				}
				s := w.p.snapshot()
				if s.Home != c.want || s.PrefersHome != (c.want != "") {
					t.Errorf("%s: home is %q, preferred %t, want %q", c.config, s.Home, s.PrefersHome, c.want)
				}
				for i, zone := range []string{"a", "b", "c"} {
					e := s.Endpoints[i]
					if away := c.want != "" && zone != c.want; e.Zone != zone || (e.PassedOver == Away) != away {
						t.Errorf("%s: endpoint in %q is in %q and passed over because %q, want away %t", c.config, zone, e.Zone, e.PassedOver, away)
					}
				}
			})
		}
	})
	t.Run("updates_move_endpoints_and_home", func(t *testing.T) {
		bubble(t, func(t *testing.T, w *world) {
			const config = `{"zones":{"home":"a"},"load":{"constant":{}}}`
			w.start(config, in("a", "x"), in("b", "y"))
			for i, c := range []struct {
				config string
				es     []resolver.Endpoint
				want   string
			}{
				{config, []resolver.Endpoint{in("b", "x"), in("a", "y")}, "y"},
				{`{"zones":{"home":"b"},"load":{"constant":{}}}`, []resolver.Endpoint{in("b", "x"), in("a", "y")}, "x"},
				{`{"load":{"constant":{}}}`, []resolver.Endpoint{in("b", "x"), in("a", "y")}, ""},
				{config, []resolver.Endpoint{in("b", "x"), in("a", "y")}, "y"},
				{config, []resolver.Endpoint{in("b", "x"), one("y")}, ""},
				{config, []resolver.Endpoint{in("b", "x"), in("a", "z")}, "z"},
				{config, []resolver.Endpoint{in("b", "x")}, "x"},
			} {
				w.start(c.config, c.es...)
				counts := w.counts(60)
				if c.want == "" && len(counts) != 2 || c.want != "" && counts[c.want] != 60 {
					t.Errorf("step %d: calls went to %v, want %q (empty for both)", i, counts, c.want)
				}
			}
		})
	})
}

func TestZonesConfigRejects(t *testing.T) {
	for _, c := range []struct{ config, want string }{
		{`{"zones":{"awayCost":0.9}}`, "belfry.p2c: zones.awayCost: 0.9, must be between 1 and 1000"},
		{`{"zones":{"awayCost":"NaN"}}`, "belfry.p2c: zones.awayCost: NaN, must be between 1 and 1000"},
		{`{"zones":{"minReady":-0.1}}`, "belfry.p2c: zones.minReady: -0.1, must be between 0 and 1"},
		{`{"zones":{"minReady":1.1}}`, "belfry.p2c: zones.minReady: 1.1, must be between 0 and 1"},
		{`{"zones":{"homeDraws":9}}`, "belfry.p2c: zones.homeDraws: 9, must be between 0 and 8, so that it is at most 16 with the choiceCount of 8"},
		{`{"choiceCount":16,"zones":{"homeDraws":1}}`, "belfry.p2c: zones.homeDraws: 1, must be between 0 and 0, so that it is at most 16 with the choiceCount of 16"},
	} {
		if _, err := parseConfig(json.RawMessage(c.config)); err == nil || err.Error() != c.want {
			t.Errorf("%s: error is %v, want %s", c.config, err, c.want)
		}
	}
}

// The READY set equals a model: which endpoints are in it and at home, and the sums of weights.
func TestReadySetAtHome(t *testing.T) {
	r := newRand(t)
	var s readySet
	in, home, weights := make(map[*candidate]bool), make(map[*candidate]bool), make(map[*candidate]uint32)
	var all []*candidate
	for range 40 {
		c := &candidate{}
		c.slot.Store(notReady)
		c.weight.Store(1)
		all, weights[c] = append(all, c), 1
	}
	for step := range 20_000 {
		c := all[r.IntN(len(all))]
		switch r.IntN(3) {
		case 0:
			if in[c] {
				s.remove(c)
				delete(home, c)
			} else {
				s.add(c)
			}
			in[c] = !in[c]
		case 1:
			to := r.IntN(2) == 0
			s.settle(c, to)
			if in[c] {
				home[c] = to
			}
		case 2:
			weights[c] = 1 + r.Uint32N(3)
			s.reweigh(c, weights[c])
		}
		size, atHome := 0, 0
		sum := make([]int64, 2)
		for _, c := range all {
			i := int(c.slot.Load())
			if in[c] != (i != notReady) {
				t.Fatalf("step %d: slot is %d of one whose being in the set is %t", step, i, in[c])
			}
			if !in[c] {
				continue
			}
			size++
			sum[0] += int64(weights[c])
			if home[c] {
				atHome++
				sum[1] += int64(weights[c])
			}
			if got := s.seats.Load().slots[i].Load(); got != c || home[c] != (i < s.atHome) {
				t.Fatalf("step %d: slot %d has %p, want %p; %d at home, and it is %t", step, i, got, c, s.atHome, home[c])
			}
		}
		if size != int(s.size.Load()) || atHome != s.atHome {
			t.Fatalf("step %d: %d in the set and %d at home, want %d and %d", step, s.size.Load(), s.atHome, size, atHome)
		}
		if size == 0 {
			continue
		}
		tree := int64(0)
		for k := atHome; k > 0; k -= k & -k {
			tree += s.seats.Load().tree[k].Load()
		}
		if total := s.seats.Load().total.Load(); total != sum[0] || tree != sum[1] {
			t.Fatalf("step %d: weights are %d and %d at home, want %d and %d", step, total, tree, sum[0], sum[1])
		}
		rnd := random(r.Uint64())
		if atHome > 0 {
			if k := s.view().drawOf(&rnd, atHome); k < 0 || k >= atHome {
				t.Fatalf("step %d: drew slot %d of %d at home", step, k, atHome)
			}
		}
	}
}

// someZone adds a random zone, or none.
func someZone(r *rand.Rand, e resolver.Endpoint) resolver.Endpoint {
	if zone := []string{"", "a", "b"}[r.IntN(3)]; zone != "" {
		return place.SetZone(e, zone)
	}
	return e
}

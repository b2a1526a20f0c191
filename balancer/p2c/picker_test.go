// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package p2c

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/balancer"
	"google.golang.org/grpc/balancer/base"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/connectivity"
	"google.golang.org/grpc/experimental/balancer/weight"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/resolver"
	"google.golang.org/grpc/status"

	"github.com/belfry-go/belfry/internal/attempt"
	"github.com/belfry-go/belfry/internal/simenv"
	"github.com/belfry-go/belfry/internal/test/lbtest"
	"github.com/belfry-go/belfry/internal/test/race"
	"github.com/belfry-go/belfry/load"
)

// chiSquareLimit returns the value that a chi-square statistic of k degrees of
// freedom exceeds with a probability of about 1e-9: Wilson and Hilferty's
// approximation with a normal quantile of 6.
func chiSquareLimit(k int) float64 {
	v := 2 / (9 * float64(k))
	return float64(k) * math.Pow(1-v+6*math.Sqrt(v), 3)
}

// checkUniform fails the test if the counts, which must be of equal expectation,
// differ by more than chance does in one of 1e9 runs.
func checkUniform(t *testing.T, what string, counts map[string]int, categories int) {
	t.Helper()
	n := 0
	for _, c := range counts {
		n += c
	}
	want := float64(n) / float64(categories)
	chi := want * float64(categories-len(counts)) // categories without a count
	for _, c := range counts {
		chi += (float64(c) - want) * (float64(c) - want) / want
	}
	if limit := chiSquareLimit(categories - 1); chi > limit {
		t.Errorf("%s: chi-square is %.1f, want at most %.1f; %v", what, chi, limit, counts)
	}
}

// Endpoints of equal load get equal shares, whatever their order. With a fair
// coin each of these checks fails falsely in one of 1e9 runs.
func TestEqualLoadsGetEqualShares(t *testing.T) {
	for _, config := range []string{
		constantConfig,
		pendingConfig,
		`{"choiceCount":3,"memory":0,"load":{"constant":{}}}`,
		`{"choiceCount":8,"memory":0,"load":{"constant":{}}}`,
		`{"choiceCount":16,"load":{"pendingRequests":{}}}`,
	} {
		for _, n := range []int{2, 3, 5, 10} {
			bubble(t, func(t *testing.T, w *world) {
				w.start(config, endpoints(n)...)
				checkUniform(t, fmt.Sprintf("%s, %d endpoints", config, n), w.counts(20_000), n)
			})
		}
	}
}

// With two endpoints a pick looks at both, and always takes the one with less load.
func TestOfTwoTheLessLoadedIsPicked(t *testing.T) {
	for _, config := range []string{pendingConfig, `{"load":{"peakEwma":{}}}`, `{}`} {
		bubble(t, func(t *testing.T, w *world) {
			w.start(config, some("a", "b")...)
			for i := range 50 {
				first, done1 := w.mustPick()
				second, done2 := w.mustPick()
				if first == second {
					t.Fatalf("%s, round %d: %s got both of two calls", config, i, first)
				}
				time.Sleep(time.Millisecond) // virtual
				done1(success)
				done2(success)
			}
		})
	}
}

// With d distinct choices the d-1 busiest endpoints are never picked. There is no false
// failure.
func TestChoicesAreDistinct(t *testing.T) {
	for _, choices := range []int{2, 3, 8} {
		bubble(t, func(t *testing.T, w *world) {
			const n = 10
			w.start(fmt.Sprintf(`{"choiceCount":%d,"load":{"pendingRequests":{}}}`, choices), endpoints(n)...)
			// choices-1 endpoints are busier than the rest.
			busy := make(map[string]bool)
			for i := range choices - 1 {
				a := w.list[i].Addresses[0].Addr
				busy[a] = true
				for range 100 {
					w.endpoint(a).busy(1)
				}
			}
			for range 2000 {
				a, done := w.mustPick()
				if busy[a] {
					t.Fatalf("%d choices of %d: picked %s, one of the %d busy ones", choices, n, a, choices-1)
				}
				done(success)
			}
		})
	}
}

func TestMoreChoicesThanEndpointsLooksAtAll(t *testing.T) {
	bubble(t, func(t *testing.T, w *world) {
		w.start(`{"choiceCount":16,"load":{"pendingRequests":{}}}`, endpoints(5)...)
		for i := range 50 { // always the least loaded: never more than one apart
			_, _ = w.mustPick()
			for _, e := range w.list {
				if got, least := w.load(e.Addresses[0].Addr), float64((i+1)/5); got < least || got > least+1 {
					t.Fatalf("after %d picks %v has %v in flight, want %v or one more", i+1, e.Addresses[0].Addr, got, least)
				}
			}
		}
	})
}

// Every set of d of n indexes is equally likely: with all loads different, the
// endpoint of rank r (0 the least loaded) is picked with a probability of
// C(n-1-r, d-1)/C(n, d). Fails falsely in one of 1e9 runs.
func TestSamplesAreUniform(t *testing.T) {
	binomial := func(n, k int) float64 {
		r := 1.0
		for i := range k {
			r *= float64(n-i) / float64(i+1)
		}
		return r
	}
	const picks = 50_000
	for _, test := range []struct{ n, d int }{{5, 2}, {10, 2}, {10, 3}, {10, 8}, {20, 4}} {
		bubble(t, func(t *testing.T, w *world) {
			r := newRand(t)
			w.startIn(&simenv.Env{Now: func() int64 { return 0 }, Uint64: r.Uint64},
				fmt.Sprintf(`{"choiceCount":%d,"memory":0,"load":{"pendingRequests":{}}}`, test.d), endpoints(test.n)...)
			rank := make(map[string]int)
			for i, e := range w.list {
				a := e.Addresses[0].Addr
				rank[a] = i
				for range i * 10 {
					w.endpoint(a).busy(1)
				}
			}
			got := make([]int, test.n)
			for range picks {
				a, done := w.mustPick()
				done(success)
				got[rank[a]]++
			}
			var chi float64
			for r, c := range got {
				want := picks * binomial(test.n-1-r, test.d-1) / binomial(test.n, test.d)
				if want == 0 {
					if c > 0 {
						t.Errorf("%d of %d: rank %d was picked %d times, want never", test.d, test.n, r, c)
					}
					continue
				}
				chi += (float64(c) - want) * (float64(c) - want) / want
			}
			if limit := chiSquareLimit(test.n - test.d); chi > limit {
				t.Errorf("%d of %d: chi-square is %.1f, want at most %.1f; picks by rank %v", test.d, test.n, chi, limit, got)
			}
		})
	}
}

// startIn is start with a clock and a random source of the test's.
func (w *world) startIn(e *simenv.Env, config string, es ...resolver.Endpoint) {
	w.t.Helper()
	c := must(parseConfig(json.RawMessage(config)))
	w.list = es
	err := w.b.UpdateClientConnState(balancer.ClientConnState{
		ResolverState:  simenv.Set(resolver.State{Endpoints: es}, e),
		BalancerConfig: c,
	})
	if err != nil {
		w.t.Fatal(err)
	}
	w.settle()
	for _, e := range es {
		w.ready(e.Addresses[0].Addr)
	}
}

func TestPicksRepeatFromASeed(t *testing.T) {
	var runs [2]string
	for i := range runs {
		bubble(t, func(t *testing.T, w *world) {
			var state uint64
			w.startIn(&simenv.Env{Now: func() int64 { return 0 }, Uint64: func() uint64 { state++; return state * 0x9e3779b97f4a7c15 }},
				constantConfig, endpoints(10)...)
			for range 100 {
				a, done := w.mustPick()
				done(success)
				runs[i] += a + " "
			}
		})
	}
	if runs[0] != runs[1] {
		t.Errorf("two runs from one seed differ:\n%s\n%s", runs[0], runs[1])
	}
}

// One of 100 endpoints is idle. Two choices find it in 2 % of picks. With memory a pick
// finds it once, and the next ones remember it.
func TestMemoryKeepsTheBestOfTheLastPick(t *testing.T) {
	for _, memory := range []int{0, 1, 2, 8} {
		bubble(t, func(t *testing.T, w *world) {
			const picks = 2000
			w.start(fmt.Sprintf(`{"choiceCount":2,"memory":%d,"load":{"pendingRequests":{}}}`, memory), endpoints(100)...)
			idle := w.list[42].Addresses[0].Addr
			for i, e := range w.list {
				if i != 42 {
					w.endpoint(e.Addresses[0].Addr).busy(1)
				}
			}
			got := w.counts(picks)[idle]
			// Without memory 40 of 2000 are expected, and 100 is ten standard
			// deviations away; with it, the first 1000 picks do not find it with a
			// probability of 2e-9.
			if memory == 0 && got > 100 {
				t.Errorf("without memory the idle endpoint got %d of %d calls, want some 40", got, picks)
			}
			if memory > 0 && got < picks/2 {
				t.Errorf("with memory %d the idle endpoint got %d of %d calls, want most", memory, got, picks)
			}
		})
	}
}

func TestMemoryIsCarriedOverToANewConfig(t *testing.T) {
	bubble(t, func(t *testing.T, w *world) {
		config := func(choices, memory int) string {
			return fmt.Sprintf(`{"choiceCount":%d,"memory":%d,"load":{"pendingRequests":{}}}`, choices, memory)
		}
		w.start(config(2, 2), endpoints(100)...)
		idle := w.list[42].Addresses[0].Addr
		for i, e := range w.list {
			if i != 42 {
				w.endpoint(e.Addresses[0].Addr).busy(1)
			}
		}
		for { // until it is found; 10,000 picks miss it with a probability of 1e-88
			if a, done := w.mustPick(); a == idle {
				done(success)
				break
			} else {
				done(success)
			}
		}
		for _, next := range []string{config(3, 2), config(2, 1), config(2, 8), config(2, 8)} {
			w.start(next, w.list...)
			if a, done := w.mustPick(); a != idle {
				t.Errorf("%s: first pick got %s, want the remembered %s", next, a, idle)
			} else {
				done(success)
			}
		}
	})
}

func TestMemoryFollowsAnEndpointThatChanges(t *testing.T) {
	const config = `{"choiceCount":2,"memory":1,"load":{"pendingRequests":{}}}`
	for name, change := range map[string]func(w *world, i int){
		"weight": func(w *world, i int) {
			w.list[i] = weighted(w.list[i].Addresses[0].Addr, 2)
			w.start(config, w.list...)
		},
		"report": func(w *world, i int) {
			ep := w.endpoint(w.list[i].Addresses[0].Addr)
			ep.UpdateState(*ep.reported.Load())
		},
	} {
		bubble(t, func(t *testing.T, w *world) {
			w.start(config, endpoints(100)...)
			idle := w.list[42].Addresses[0].Addr
			for i, e := range w.list {
				if i != 42 {
					w.endpoint(e.Addresses[0].Addr).busy(1)
				}
			}
			for { // until it is found; 10,000 picks miss it with a probability of 1e-88
				a, done := w.mustPick()
				done(success)
				if a == idle {
					break
				}
			}
			change(w, 42)
			if a, _ := w.mustPick(); a != idle {
				t.Errorf("after a new %s the next pick got %s, want the remembered %s", name, a, idle)
			}
		})
	}
}

func TestMemoryForgetsWhatLeftReady(t *testing.T) {
	for _, leave := range []struct {
		name string
		do   func(w *world, addr string)
	}{
		{"lost", func(w *world, a string) { w.lose(a) }},
		{"ejected", func(w *world, a string) { w.sick(a) }},
		{"removed", func(w *world, a string) {
			var rest []resolver.Endpoint
			for _, e := range w.list {
				if e.Addresses[0].Addr != a {
					rest = append(rest, e)
				}
			}
			w.start(`{"choiceCount":2,"memory":8,"load":{"pendingRequests":{}}}`, rest...)
		}},
	} {
		bubble(t, func(t *testing.T, w *world) {
			w.start(`{"choiceCount":2,"memory":8,"load":{"pendingRequests":{}}}`, endpoints(20)...)
			w.counts(100)
			s, _ := w.cc.State()
			p := s.Picker.(*picker)
			for range 10 {
				c := p.remembered[0].Load()
				if c == nil {
					t.Fatal("nothing is remembered after 100 picks")
				}
				a := c.addrForTest(w)
				leave.do(w, a)
				s, _ := w.cc.State()
				p = s.Picker.(*picker)
				for i := range p.remembered {
					if p.remembered[i].Load() == c {
						t.Errorf("%s: %s is still remembered, which keeps its endpoint in memory", leave.name, a)
					}
				}
				// A pick that started before writes it back.
				p.remembered[0].Store(c)
				if got := w.counts(200)[a]; got != 0 {
					t.Fatalf("%s: %s got %d calls", leave.name, a, got)
				}
			}
		})
	}
}

// addrForTest returns the address of an endpoint of one address.
func (c *candidate) addrForTest(w *world) string {
	for e, ep := range w.p.endpoints.All() {
		if ep.candidate == c {
			return e.Addresses[0].Addr
		}
	}
	return ""
}

func weighted(addr string, w uint32) resolver.Endpoint {
	return weight.Set(one(addr), weight.EndpointInfo{Weight: w})
}

// What is in flight is in proportion to the weights, and of equal loads each
// endpoint is picked in proportion to its weight. Fails falsely in one of 1e9 runs.
func TestWeightsAreShares(t *testing.T) {
	bubble(t, func(t *testing.T, w *world) {
		w.start(`{"choiceCount":3,"load":{"pendingRequests":{}}}`, weighted("a", 1), weighted("b", 2), weighted("c", 5))
		for range 800 {
			w.mustPick()
		}
		for a, weight := range map[string]float64{"a": 1, "b": 2, "c": 5} {
			if got, want := float64(w.inFlight(a)), 800*weight/8; math.Abs(got-want) > weight+1 {
				t.Errorf("%s of weight %v has %v of 800 attempts in flight, want %v", a, weight, got, want)
			}
		}
	})
	for _, config := range []string{pendingConfig, constantConfig, `{}`, `{"load":{"peakEwma":{}}}`} {
		bubble(t, func(t *testing.T, w *world) {
			w.start(config, weighted("a", 1), weighted("b", 3), weighted("c", 4))
			const n = 20_000
			counts := w.counts(n)
			for a, share := range map[string]float64{"a": 1. / 8, "b": 3. / 8, "c": 4. / 8} {
				// By a metric that measures, idle endpoints are not quite equal.
				sigma, slack := math.Sqrt(n*share*(1-share)), 0.0
				if config != pendingConfig && config != constantConfig {
					slack = 0.3 * n * share
				}
				if got := counts[a]; math.Abs(float64(got)-n*share) > 6*sigma+slack {
					t.Errorf("%s: %s got %d of %d calls, want %.0f within %.0f", config, a, got, n, n*share, 6*sigma+slack)
				}
			}
		})
	}
}

func TestANewWeightHoldsAtOnceAndZeroCountsAsOne(t *testing.T) {
	bubble(t, func(t *testing.T, w *world) {
		w.start(pendingConfig, weighted("a", 4), one("b"))
		for range 50 {
			w.mustPick()
		}
		if a, b := w.inFlight("a"), w.inFlight("b"); a < 37 || a > 43 || a+b != 50 {
			t.Errorf("attempts in flight are %v and %v, want 40 and 10", a, b)
		}
		w.start(pendingConfig, weighted("a", 0), weighted("b", 1))
		if a, b := w.load("a"), w.load("b"); a != float64(w.inFlight("a")) || b != float64(w.inFlight("b")) {
			t.Errorf("loads without weights are %v and %v, want the attempts in flight", a, b)
		}
		for range 25 {
			if a, _ := w.mustPick(); a != "b" {
				t.Fatalf("picked %s, want b, which has less in flight", a)
			}
		}
	})
}

func TestATriedEndpointIsPassedOverWhileAnotherIsReady(t *testing.T) {
	for _, config := range []string{pendingConfig, `{}`, `{"choiceCount":2,"memory":2}`, constantConfig} {
		for _, n := range []int{2, 3, 30} {
			bubble(t, func(t *testing.T, w *world) {
				w.start(config, endpoints(n)...)
				// All but the last have been tried, as many as are remembered; the last
				// is busier.
				var before []*endpoint
				for _, e := range w.list[:min(n-1, 8)] {
					before = append(before, w.endpoint(e.Addresses[0].Addr))
				}
				last := w.endpoint(w.list[n-1].Addresses[0].Addr)
				for range 8 {
					last.busy(1)
				}
				for range 100 {
					a, done, err := w.pickWith(tried(before...))
					if err != nil {
						t.Fatal(err)
					}
					for _, ep := range before {
						if w.endpoint(a) == ep {
							t.Fatalf("%s, %d endpoints: picked %s, which was tried before", config, n, a)
						}
					}
					done(success)
				}
			})
		}
	}
}

// A tried endpoint costs more, but may be picked.
func TestATriedEndpointIsPickedWhereTheOthersAreMuchBusier(t *testing.T) {
	for _, config := range []string{pendingConfig, `{}`, `{"load":{"peakEwma":{}}}`} {
		for _, n := range []int{2, 3} {
			for busy := range 3 {
				bubble(t, func(t *testing.T, w *world) {
					w.start(config, endpoints(n)...)
					first := w.list[0].Addresses[0].Addr
					for i, e := range w.list {
						ep, flying := w.endpoint(e.Addresses[0].Addr), busy
						if i > 0 {
							flying = 15 * (busy + 1)
						}
						for range flying {
							ep.busy(1)
						}
					}
					for range 20 {
						a, done, err := w.pickWith(tried(w.endpoint(first)))
						if err != nil || a != first {
							t.Fatalf("%s, %d endpoints: picked %q, %v; want %s, which was tried and is 15 times less busy", config, n, a, err, first)
						}
						done(balancer.DoneInfo{})
						// A call goes back only once.
						a, done, err = w.pickWith(tried(w.endpoint(first), w.endpoint(first)))
						if err != nil || a == first {
							t.Fatalf("%s, %d endpoints: picked %q, %v; want another than %s, which was tried twice", config, n, a, err, first)
						}
						done(balancer.DoneInfo{})
					}
				})
			}
		}
	}
}

func TestATriedEndpointIsPickedWhenNoOtherIsReady(t *testing.T) {
	bubble(t, func(t *testing.T, w *world) {
		w.start(`{}`, some("a", "b")...)
		w.lose("b")
		a, done, err := w.pickWith(tried(w.endpoint("a")))
		if err != nil || a != "a" {
			t.Fatalf("pick of a call that tried the only READY endpoint: got %q, %v, want a", a, err)
		}
		done(success)
	})
}

func TestAPickAddsToWhatTheCallTriedAndNotSentTakesItBack(t *testing.T) {
	bubble(t, func(t *testing.T, w *world) {
		w.start(`{}`, some("a", "b")...)
		var tried attempt.Tried
		ctx := &attempt.Context{Context: context.Background(), Info: attempt.Info{Method: "/s/m", Tried: &tried}}
		first, done, err := w.pickWith(ctx)
		if err != nil {
			t.Fatal(err)
		}
		if !tried.Has(w.endpoint(first).candidate.id()) {
			t.Error("the picked endpoint does not count as tried")
		}
		second, _, err := w.pickWith(ctx)
		if err != nil {
			t.Fatal(err)
		}
		if second == first {
			t.Errorf("both attempts went to %s", first)
		}
		done(balancer.DoneInfo{}) // the connection was not READY any more
		if tried.Has(w.endpoint(first).candidate.id()) {
			t.Error("an endpoint to which nothing was sent counts as tried")
		}
	})
}

// fakeChild is a child's picker with a Done and metadata.
type fakeChild struct {
	result balancer.PickResult
	err    error
}

func (c fakeChild) Pick(balancer.PickInfo) (balancer.PickResult, error) { return c.result, c.err }

func TestTheChildsDoneIsChainedAndItsMetadataKept(t *testing.T) {
	bubble(t, func(t *testing.T, w *world) {
		w.start(pendingConfig, some("a")...)
		var got []balancer.DoneInfo
		md := metadata.Pairs("k", "v")
		sc := &lbtest.SubConn{}
		w.endpoint("a").UpdateState(balancer.State{ConnectivityState: connectivity.Ready, Picker: fakeChild{result: balancer.PickResult{
			SubConn: sc, Metadata: md, Done: func(info balancer.DoneInfo) { got = append(got, info) },
		}}})
		s, _ := w.cc.State()
		r, err := s.Picker.Pick(balancer.PickInfo{Ctx: context.Background()})
		if err != nil {
			t.Fatal(err)
		}
		if r.SubConn != sc || fmt.Sprint(r.Metadata) != fmt.Sprint(md) {
			t.Errorf("SubConn and metadata are %v, %v, want the child's", r.SubConn, r.Metadata)
		}
		info := balancer.DoneInfo{Err: errors.New("x"), BytesSent: true, ServerLoad: "report"}
		r.Done(info)
		if len(got) != 1 || got[0].Err != info.Err || got[0].ServerLoad != "report" {
			t.Errorf("the child's Done got %v, want %v once", got, info)
		}
		if got := w.p.totalLoad(); got != 0 {
			t.Errorf("%v attempts in flight after Done, want 0", got)
		}
	})
}

func TestAChildsErrorIsReturnedUntouchedAndNothingIsCounted(t *testing.T) {
	bubble(t, func(t *testing.T, w *world) {
		w.start(pendingConfig, some("a")...)
		for _, want := range []error{balancer.ErrNoSubConnAvailable, errors.New("broken")} {
			w.endpoint("a").UpdateState(balancer.State{ConnectivityState: connectivity.Ready, Picker: base.NewErrPicker(want)})
			if _, _, err := w.pick(); err != want {
				t.Errorf("error of a pick is %v, want the child's %v itself", err, want)
			}
			if got := w.p.totalLoad(); got != 0 {
				t.Errorf("%v attempts in flight after a pick that failed, want 0", got)
			}
		}
	})
}

func TestAPickThatWasNotReadyIsUndone(t *testing.T) {
	for _, config := range []string{pendingConfig, `{}`, `{"load":{"peakEwma":{}}}`} {
		bubble(t, func(t *testing.T, w *world) {
			w.start(config, some("a", "b")...)
			for range 10 {
				_, done := w.mustPick()
				time.Sleep(time.Millisecond)
				done(success)
			}
			before := w.load("a") + w.load("b")
			for range 100 {
				_, done := w.mustPick()
				done(balancer.DoneInfo{})
			}
			if got := w.load("a") + w.load("b"); math.Abs(got-before) > 1e-9*before {
				t.Errorf("%s: load is %v after attempts that were not sent, want %v as before", config, got, before)
			}
		})
	}
}

func TestPickAndDoneAllocateNothing(t *testing.T) {
	if race.Enabled {
		t.Skip("the race detector allocates, and sync.Pool forgets at random under it")
	}
	for _, s := range subjects {
		_, lb := s.start(t, 100)
		defer lb.Close()
	}
	for _, s := range subjects {
		t.Run(s.name, func(t *testing.T) {
			cc, lb := s.start(t, 100)
			defer lb.Close()
			state, _ := cc.State()
			info := balancer.PickInfo{Ctx: context.Background()}
			got := testing.AllocsPerRun(2000, func() {
				r, err := state.Picker.Pick(info)
				if err != nil {
					t.Fatal(err)
				}
				r.Done(success)
			})
			if got != 0 {
				t.Errorf("%v allocations, want 0", got)
			}
		})
	}
}

// Many goroutines pick while one, as grpc's serializer, updates the resolver
// state and the config and moves connections. One endpoint is always READY, so no
// pick may fail; and at rest nothing is in flight.
func TestPicksRaceWithEverything(t *testing.T) {
	for _, load := range []string{`"load":{"pendingRequests":{}}`, `"load":{"peakEwma":{}}`, `"choiceCount":2,"memory":2,"load":{"pendingRequests":{}}`, `"choiceCount":2,"load":{"expectedLatency":{}}`, `"zones":{"home":"a"}`} {
		t.Run(load, func(t *testing.T) {
			r := newRand(t)
			w := newWorld(t)
			w.cc.Hold = false
			drain := func() {
				for range 3 {
					w.cc.Drain()
				}
			}
			o, recorder := newObserver(t)
			config := func() string {
				if r.IntN(3) == 0 {
					return fmt.Sprintf(`{%s,"failureCodes":["ABORTED"],%s}`, recorder, load)
				}
				return fmt.Sprintf(`{%s,%s}`, recorder, load)
			}
			if err := w.update(config(), some("always", "b", "c", "d")...); err != nil {
				t.Fatal(err)
			}
			drain()
			w.wantState("at first", connectivity.Ready)

			stop := make(chan struct{})
			var picks, waits atomic.Int64
			var wg sync.WaitGroup
			for i := range 4 {
				wg.Go(func() {
					var flying []func(balancer.DoneInfo)
					for n := 0; ; n++ {
						select {
						case <-stop:
							for _, done := range flying {
								done(success)
							}
							return
						default:
						}
						ctx := context.Background()
						if i == 0 {
							ctx = &attempt.Context{Context: ctx, Info: attempt.Info{Method: "/s/m", Tried: &attempt.Tried{}}}
						}
						switch _, done, err := w.pickWith(ctx); err {
						case nil:
							picks.Add(1)
							flying = append(flying, done)
						case balancer.ErrNoSubConnAvailable:
							waits.Add(1)
						default:
							t.Errorf("a pick failed while an endpoint is READY: %v", err)
							return
						}
						if len(flying) > n%20 {
							flying[0]([]balancer.DoneInfo{success, {}, {BytesSent: true, Err: errors.New("x")}, {Err: context.Canceled}}[n%4])
							flying = flying[1:]
						}
					}
				})
			}
			for picks.Load() == 0 && !t.Failed() {
				runtime.Gosched()
			}
			for range 1500 {
				switch r.IntN(4) {
				case 0:
					es := []resolver.Endpoint{someZone(r, weighted("always", uint32(r.IntN(3))))}
					for _, a := range []string{"b", "c", "d", "e"} {
						if r.IntN(2) == 0 {
							es = append(es, someZone(r, weighted(a, uint32(r.IntN(3)))))
						}
					}
					if err := w.update(config(), es...); err != nil {
						t.Error(err)
					}
				case 1:
					for _, a := range []string{"b", "c", "d"} {
						if sc := w.cc.SubConn(a); sc != nil {
							sc.SetHealth(connectivity.TransientFailure, errors.New("ejected"))
						}
					}
				case 2:
					for _, a := range []string{"b", "c", "d"} {
						if sc := w.cc.SubConn(a); sc != nil {
							sc.SetHealth(connectivity.Ready, nil)
						}
					}
				case 3:
					if sc := w.cc.SubConn([]string{"b", "c", "d"}[r.IntN(3)]); sc != nil && !w.cc.isShutdown(sc.Address.Addr) {
						sc.SetState(connectivity.Idle, nil)
					}
				}
				drain()
			}
			close(stop)
			wg.Wait()
			o.mu.Lock()
			started, ended := o.started, len(o.finished)
			o.mu.Unlock()
			if started != ended || int64(started) != picks.Load() {
				t.Errorf("%d picks, %d starts, %d finishes, want them equal", picks.Load(), started, ended)
			}
			if load == `"load":{"pendingRequests":{}}` {
				if got := w.p.totalLoad(); got != 0 {
					t.Errorf("%v attempts in flight at rest, want 0", got)
				}
			}
			t.Logf("%d picks, %d of them had to wait", picks.Load(), waits.Load())
			w.b.Close()
			drain()
			waitForReconnects(w.p)
		})
	}
}

// waitForReconnects returns when no child of a closed policy is being called: a
// goroutine that reconnects takes the lock of its endpoint.
func waitForReconnects(p *policy) {
	for _, ep := range p.endpoints.All() {
		ep.childMu.Lock()
		_ = ep.closed
		ep.childMu.Unlock()
	}
}

// Tower's stress test: random operations against a model of which endpoints are
// READY. A pick succeeds if and only if one is, and goes to one that is. If these have only
// failed, it may wait.
func TestStressAgainstAModel(t *testing.T) {
	for _, config := range []string{pendingConfig, `{"choiceCount":2,"memory":3,"load":{"pendingRequests":{}}}`, `{"choiceCount":16,"load":{"pendingRequests":{}}}`} {
		bubble(t, func(t *testing.T, w *world) {
			r := newRand(t)
			type model struct{ state connectivity.State }
			const connecting, ready, failed, ejected = connectivity.Connecting, connectivity.Ready, connectivity.TransientFailure, connectivity.Shutdown
			eps := make(map[string]*model)
			apply := func() {
				var es []resolver.Endpoint
				for a := range eps {
					es = append(es, one(a))
				}
				if err := w.update(config, es...); (err != nil) != (len(es) == 0) {
					t.Fatalf("update with %d endpoints: %v", len(es), err)
				}
				w.settle()
			}
			apply()
			var flying []func(balancer.DoneInfo)
			next := 0
			some := func() string {
				for a := range eps { // random order
					return a
				}
				return ""
			}
			rounds := 6000
			if race.Enabled {
				rounds = 2000
			}
			for round := range rounds {
				switch k := r.IntN(10); {
				case k == 0 && len(eps) < 12:
					next++
					eps[fmt.Sprintf("e%d", next)] = &model{connecting}
					apply()
				case k == 1 && len(eps) > 0 && r.IntN(2) == 0:
					delete(eps, some())
					apply()
				case k <= 4 && len(eps) > 0:
					a := some()
					switch e := eps[a]; e.state {
					case connecting:
						if r.IntN(3) > 0 {
							w.ready(a)
							e.state = ready
						} else {
							w.fail(a)
							e.state = failed
						}
					case failed:
						w.move(a, connectivity.Idle)
						w.ready(a)
						e.state = ready
					case ejected:
						w.healthy(a)
						e.state = ready
					case ready:
						if r.IntN(2) == 0 {
							w.sick(a)
							e.state = ejected
						} else {
							w.lose(a)
							e.state = connecting
						}
					}
				case k == 5 && len(flying) > 0:
					i := r.IntN(len(flying))
					flying[i]([]balancer.DoneInfo{success, {}, {Err: context.Canceled}, {BytesSent: true, Err: errors.New("doom")}}[r.IntN(4)])
					flying[i] = flying[len(flying)-1]
					flying = flying[:len(flying)-1]
				default:
					n := 0
					for _, e := range eps {
						if e.state == ready {
							n++
						}
					}
					a, done, err := w.pick()
					switch {
					case err == balancer.ErrNoSubConnAvailable && w.inGrace():
					case err != nil && n > 0:
						t.Fatalf("round %d: pick failed with %d endpoints READY: %v", round, n, err)
					case err == nil && n == 0:
						t.Fatalf("round %d: picked %s, but no endpoint is READY", round, a)
					case err == nil && (eps[a] == nil || eps[a].state != ready):
						t.Fatalf("round %d: picked %s, which is not READY", round, a)
					case err == nil:
						flying = append(flying, done)
					}
				}
			}
			for _, done := range flying {
				done(success)
			}
			if got := w.p.totalLoad(); got != 0 {
				t.Errorf("%v attempts in flight at rest, want 0", got)
			}
		})
	}
}

func TestOutcomesOfDoneInfo(t *testing.T) {
	cancelled, cancel := context.WithCancel(context.Background())
	cancel()
	cutShort, cut := context.WithCancelCause(context.Background())
	cut(statusError("DEADLINE_EXCEEDED"))
	overdue, cancelOverdue := context.WithDeadlineCause(context.Background(), time.Now().Add(-time.Second), statusError("DEADLINE_EXCEEDED"))
	defer cancelOverdue()
	past, cancelPast := context.WithDeadline(context.Background(), time.Now().Add(-time.Second))
	defer cancelPast()
	later, cancelLater := context.WithTimeout(context.Background(), time.Hour)
	defer cancelLater()
	bg := context.Background()
	large := status.Error(codes.ResourceExhausted, "trying to send message larger than max (5 vs. 4)")
	answer := status.Error(codes.ResourceExhausted, "grpc: received message larger than max (5 vs. 4)")
	spoken := metadata.Pairs("content-type", "application/grpc")
	for _, test := range []struct {
		name string
		ctx  context.Context
		info balancer.DoneInfo
		want load.Outcome
	}{
		{"answered", bg, success, load.Completed},
		{"the zero DoneInfo: not READY any more", bg, balancer.DoneInfo{}, load.NotSent},
		{"no stream could be made", bg, balancer.DoneInfo{Err: statusError("UNAVAILABLE")}, load.NotSent},
		{"the deadline passed while waiting for a stream", bg, balancer.DoneInfo{Err: statusError("DEADLINE_EXCEEDED")}, load.Failed},
		{"cancelled while waiting for a stream", cancelled, balancer.DoneInfo{Err: statusError("CANCELLED")}, load.Cancelled},
		{"cancelled by the caller", cancelled, balancer.DoneInfo{BytesSent: true, Err: statusError("CANCELLED")}, load.Cancelled},
		{"cancelled by the server", bg, balancer.DoneInfo{BytesSent: true, Err: statusError("CANCELLED")}, load.Failed},
		{"cut short by a layer's deadline", cutShort, balancer.DoneInfo{BytesSent: true, Err: statusError("CANCELLED")}, load.Failed},
		{"a layer's deadline", overdue, balancer.DoneInfo{BytesSent: true, Err: statusError("DEADLINE_EXCEEDED")}, load.Failed},
		{"a request that the client could not send", bg, balancer.DoneInfo{BytesSent: true, Err: large}, load.NotSent},
		{"an answer that the client could not take", bg, balancer.DoneInfo{BytesSent: true, Err: answer}, load.Completed},
		{"a server that says what the client says", bg, balancer.DoneInfo{BytesSent: true, Err: large, Trailer: spoken}, load.Failed},
		{"an answer that is an error", bg, balancer.DoneInfo{BytesSent: true, Err: statusError("NOT_FOUND")}, load.Completed},
		{"unavailable", bg, balancer.DoneInfo{BytesSent: true, Err: statusError("UNAVAILABLE")}, load.Failed},
		{"unimplemented", bg, balancer.DoneInfo{BytesSent: true, Err: statusError("UNIMPLEMENTED")}, load.Failed},
		{"the server's own deadline", bg, balancer.DoneInfo{BytesSent: true, Err: statusError("DEADLINE_EXCEEDED")}, load.Failed},
		{"the server's own deadline, long before the call's", later, balancer.DoneInfo{BytesSent: true, Err: statusError("DEADLINE_EXCEEDED")}, load.Failed},
		{"the call's deadline", past, balancer.DoneInfo{BytesSent: true, Err: statusError("DEADLINE_EXCEEDED")}, load.Expired},
	} {
		bubble(t, func(t *testing.T, w *world) {
			o, recorder := newObserver(t)
			w.start("{"+recorder+"}", some("a")...)
			_, done, err := w.pickWith(test.ctx)
			if err != nil {
				t.Fatal(err)
			}
			done(test.info)
			if got := o.ended(); len(got) != 1 || got[0] != test.want {
				t.Errorf("%s: outcomes are %v, want [%v]", test.name, got, test.want)
			}
		})
	}
}

func TestADeadlineWhileWaitingForAStreamIsAFailureIfDeadlinesAre(t *testing.T) {
	bubble(t, func(t *testing.T, w *world) {
		o, recorder := newObserver(t)
		w.start(`{"failureCodes":["UNAVAILABLE"],`+recorder+"}", some("a")...)
		_, done, err := w.pickWith(context.Background())
		if err != nil {
			t.Fatal(err)
		}
		done(balancer.DoneInfo{Err: statusError("DEADLINE_EXCEEDED")})
		if got := o.ended(); len(got) != 1 || got[0] != load.Completed {
			t.Errorf("outcomes are %v, want [completed]", got)
		}
	})
}

// If gRPC reports the end of an attempt without an error, and then makes another attempt, it
// has retried the first one.
func TestAnAttemptThatIsFollowedByAnotherHasFailed(t *testing.T) {
	bubble(t, func(t *testing.T, w *world) {
		o, recorder := newObserver(t)
		w.start("{"+recorder+"}", some("a", "b")...)
		track := newTracker(t.Context(), "/s/m", nil)
		ctx := &track.attempt
		var addrs [2]string
		for i := range addrs {
			addr, done, err := w.pickWith(ctx)
			if err != nil {
				t.Fatal(err)
			}
			done(success)
			addrs[i] = addr
		}
		if addrs[0] == addrs[1] {
			t.Errorf("both attempts went to %s", addrs[0])
		}
		if got := o.ended(); len(got) != 1 || got[0] != load.Failed {
			t.Errorf("outcomes before the call has ended are %v, want [failed]", got)
		}
		track.end(nil)
		if got := o.ended(); len(got) != 2 || got[1] != load.Completed {
			t.Errorf("outcomes are %v, want [failed completed]", got)
		}
	})
}

// DialOptions above an interceptor that hedges: one call has several attempts at the same
// time.
func TestAttemptsSideBySideLeaveNothingInFlight(t *testing.T) {
	for _, ends := range [][]int{{0, 1}, {1, 0}} {
		bubble(t, func(t *testing.T, w *world) {
			w.start(pendingConfig, some("a", "b")...)
			track := newTracker(t.Context(), "/s/m", nil)
			ctx := &track.attempt
			var dones [2]func(balancer.DoneInfo)
			for i := range dones {
				var err error
				if _, dones[i], err = w.pickWith(ctx); err != nil {
					t.Fatal(err)
				}
			}
			for _, i := range ends {
				dones[i](success)
			}
			track.end(nil)
			if got := w.p.totalLoad(); got != 0 {
				t.Errorf("%v attempts in flight after attempts ended in the order %v, and the call, want 0", got, ends)
			}
		})
	}
}

// DialOptions below a layer that repeats calls.
func TestWhatAnOuterLayerTriedIsPassedOverToo(t *testing.T) {
	ctx := new(attempt.Series).Context(t.Context(), "/s/m", "")
	err := new(interceptors).unary(ctx, "/s/m", nil, nil, nil, func(inner context.Context, _ string, _, _ any, _ *grpc.ClientConn, _ ...grpc.CallOption) error {
		if got := attempt.FromContext(inner, "/s/m", "", 0).Tried; got != ctx.Info.Tried {
			t.Errorf("the endpoints tried are %p, want the outer layer's %p", got, ctx.Info.Tried)
		}
		return io.EOF
	})
	if err != io.EOF {
		t.Error(err)
	}
}

// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package p2c

import (
	"container/heap"
	"context"
	"encoding/json"
	"fmt"
	"math"
	"math/rand/v2"
	"slices"
	"testing"
	"time"

	"google.golang.org/grpc/balancer"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/resolver"
	"google.golang.org/grpc/status"

	"github.com/belfry-go/belfry/internal/simenv"
	"github.com/belfry-go/belfry/internal/test/lbtest"
	"github.com/belfry-go/belfry/internal/test/race"
)

// bench runs the policy in virtual time, on one goroutine and with one seed, so that every
// run is the same.
type bench struct {
	t      *testing.T
	cc     lbtest.Channel
	b      balancer.Balancer
	random *rand.Rand
	now    time.Duration
	events events
	index  map[string]int // of an endpoint by its address
}

type event struct {
	at time.Duration
	n  int
	do func()
}

type events []event

func (e events) Len() int { return len(e) }
func (e events) Less(i, j int) bool {
	return e[i].at < e[j].at || e[i].at == e[j].at && e[i].n < e[j].n
}
func (e events) Swap(i, j int) { e[i], e[j] = e[j], e[i] }
func (e *events) Push(x any)   { *e = append(*e, x.(event)) }
func (e *events) Pop() any {
	last := (*e)[len(*e)-1]
	*e = (*e)[:len(*e)-1]
	return last
}

func newBench(t *testing.T, config string, es ...resolver.Endpoint) *bench {
	t.Helper()
	if race.Enabled {
		t.Skip("a run is one goroutine: the race detector finds nothing in it, and makes it 20 times as long")
	}
	w := &bench{t: t, random: rand.New(rand.NewPCG(1, 2)), index: make(map[string]int)}
	w.b = builder{}.Build(&w.cc, balancer.BuildOptions{})
	t.Cleanup(func() {
		w.b.Close()
		w.cc.Drain()
	})
	state := simenv.Set(resolver.State{Endpoints: es}, &simenv.Env{Now: func() int64 { return int64(w.now) }, Uint64: w.random.Uint64})
	for i, e := range es {
		w.index[e.Addresses[0].Addr] = i
	}
	err := w.b.UpdateClientConnState(balancer.ClientConnState{ResolverState: state, BalancerConfig: must(parseConfig(json.RawMessage(config)))})
	if err != nil {
		t.Fatal(err)
	}
	w.cc.Drain()
	return w
}

// after schedules f.
func (w *bench) after(d time.Duration, f func()) {
	heap.Push(&w.events, event{w.now + d, len(w.events), f})
}

// run lets time pass.
func (w *bench) run(d time.Duration) {
	end := w.now + d
	for len(w.events) > 0 && w.events[0].at <= end {
		e := heap.Pop(&w.events).(event)
		w.now = e.at
		e.do()
	}
	w.now = end
}

func (w *bench) pick(method string) (int, func(balancer.DoneInfo)) {
	return w.pickWith(balancer.PickInfo{Ctx: context.Background(), FullMethodName: method})
}

func (w *bench) pickWith(info balancer.PickInfo) (int, func(balancer.DoneInfo)) {
	w.t.Helper()
	s, _ := w.cc.State()
	r, err := s.Picker.Pick(info)
	if err != nil {
		w.t.Fatal(err)
	}
	return w.index[r.SubConn.(*lbtest.SubConn).Address.Addr], r.Done
}

// open opens a stream, which the returned function answers.
func (w *bench) open() (int, func()) {
	track := newTracker(context.Background(), "/s/Watch", nil)
	track.stream = true
	i, _ := w.pickWith(balancer.PickInfo{Ctx: &track.attempt, FullMethodName: "/s/Watch"})
	return i, func() { track.current.Load().respond() }
}

// around returns a lognormal time of a mean.
func (w *bench) around(mean time.Duration) time.Duration {
	return time.Duration(float64(mean) * math.Exp(0.6*w.random.NormFloat64()-0.18))
}

// callers makes n callers call one after the other, and returns how many calls each
// endpoint gets until there were enough.
func (w *bench) callers(n, calls int, mean time.Duration) []float64 {
	counts := make([]float64, len(w.index))
	var call func()
	call = func() {
		if calls--; calls < 0 {
			return
		}
		i, done := w.pick("/s/Get")
		counts[i]++
		w.after(w.around(mean), func() { done(success); call() })
	}
	for range n {
		call()
	}
	for calls >= 0 {
		w.run(time.Second)
	}
	return counts
}

// endpoint returns the endpoint i of a list of endpoints(n).
func (b *policy) endpoint(i int) *endpoint {
	ep, _ := b.endpoints.Get(endpoints(i + 1)[i])
	return ep
}

func weights(ws ...uint32) []resolver.Endpoint {
	var es []resolver.Endpoint
	for i, w := range ws {
		es = append(es, weighted(fmt.Sprint("server-", i), w))
	}
	return es
}

var measuring = []string{`{}`, `{"choiceCount":2,"memory":0}`, `{"load":{"peakEwma":{}}}`, pendingConfig}

func TestAtRest(t *testing.T) {
	t.Run("equal_endpoints_get_equal_shares", func(t *testing.T) {
		// The first latency of an endpoint may be so long that the endpoint gets none of the next
		// hundred calls, so one run is not enough.
		const runs, most = 20, 2
		for _, config := range []string{`{}`, `{"choiceCount":2,"memory":0}`, pendingConfig} {
			uneven := 0
			for seed := range uint64(runs) {
				w := newBench(t, config, endpoints(10)...)
				w.random = rand.New(rand.NewPCG(seed, 1))
				counts := w.callers(1, 1000, 10*time.Millisecond)
				if lo, hi := slices.Min(counts), slices.Max(counts); lo < 50 || hi > 200 {
					t.Logf("%s: the endpoints got %v of 1000 calls", config, counts)
					uneven++
				}
			}
			if uneven > most {
				t.Errorf("%s: in %d of %d runs an endpoint got less than 50 or more than 200 of 1000 calls, want in %d at most", config, uneven, runs, most)
			}
		}
	})
	t.Run("pauses_make_no_difference_where_calls_are_short", func(t *testing.T) {
		w := newBench(t, `{}`, endpoints(10)...)
		counts := make([]int, 10)
		for range 1000 {
			i, done := w.pick("/s/Get")
			counts[i]++
			w.now += w.around(100 * time.Microsecond)
			if w.random.IntN(100) == 0 {
				w.now += 2 * time.Millisecond
			}
			done(success)
		}
		if lo, hi := slices.Min(counts), slices.Max(counts); lo < 50 || hi > 200 {
			t.Errorf("the endpoints got %v of 1000 calls, want 50 to 200 each", counts)
		}
	})
	t.Run("is_not_while_a_few_of_many_are_busy", func(t *testing.T) {
		w := newBench(t, `{}`, endpoints(100)...)
		fast, calls := 0, 10_000
		var call func()
		call = func() {
			if calls--; calls < 0 {
				return
			}
			i, done := w.pick("/s/Get")
			took := w.around(10 * time.Millisecond)
			if i < 50 {
				fast++
			} else {
				took = took * 8 / 5
			}
			w.after(took, func() { done(success); call() })
		}
		for range 4 {
			call()
		}
		w.run(time.Hour)
		if fast < 9400 {
			t.Errorf("the faster half got %d of 10000 calls, want at least 9400", fast)
		}
	})
	t.Run("the_fast_one_is_found", func(t *testing.T) {
		var total int
		for seed := range 20 {
			w := newBench(t, `{}`, endpoints(10)...)
			w.random = rand.New(rand.NewPCG(uint64(seed), 3))
			for n := 1; ; n++ {
				i, done := w.pick("/s/Get")
				took := w.around(30 * time.Millisecond)
				if i == 7 {
					total += n
					break
				}
				w.now += took
				done(success)
			}
		}
		if total > 25*20 {
			t.Errorf("it was found after %v calls on average, want at most 25", float64(total)/20)
		}
	})
	t.Run("one_that_was_slow_is_tried_again", func(t *testing.T) {
		w := newBench(t, `{}`, endpoints(10)...)
		w.callers(1, 1000, 10*time.Millisecond)
		i, done := w.pick("/s/Get")
		w.now += 10 * time.Second
		done(success)
		for n := 1; ; n++ {
			w.now += time.Second
			k, done := w.pick("/s/Get")
			w.now += 10 * time.Millisecond
			done(success)
			if k == i {
				break
			}
			if n == 1000 {
				t.Fatalf("after %d calls it was not tried again", n)
			}
		}
	})
}

func TestColdStart(t *testing.T) {
	for _, config := range append(slices.Clone(measuring), constantConfig) {
		t.Run(config, func(t *testing.T) {
			w := newBench(t, config, endpoints(10)...)
			failed, calls := 0, 0
			for range 400 {
				calls++
				i, done := w.pick("/s/Get")
				if i == 3 {
					failed++
					w.after(500*time.Microsecond, func() {
						done(balancer.DoneInfo{BytesSent: true, BytesReceived: true, Err: status.Error(codes.Unavailable, "x")})
					})
				} else {
					w.after(500*time.Millisecond, func() { done(success) })
				}
				w.run(time.Millisecond)
			}
			if failed > calls/10 {
				t.Errorf("an endpoint that fails at once got %d of %d calls before the others had answered, want at most its share", failed, calls)
			}
		})
	}
}

// The next pick knows what a failure or a first answer has changed.
func TestHealthIsKnownAtOnce(t *testing.T) {
	failed := balancer.DoneInfo{BytesSent: true, BytesReceived: true, Err: status.Error(codes.Unavailable, "x")}
	for _, config := range []string{pendingConfig, constantConfig} {
		w := newBench(t, config, endpoints(2)...)
		// picks makes n calls, and returns how many went to the first endpoint. These end as given.
		picks := func(n int, with balancer.DoneInfo) (got int) {
			for range n {
				i, done := w.pick("/s/Get")
				if i == 0 {
					got++
					done(with)
					continue
				}
				done(success)
			}
			return got
		}
		for picks(1, failed) == 0 {
		}
		if n := picks(20, failed); n > 3 {
			t.Errorf("%s: an endpoint that has only failed got %d of the next 20 calls", config, n)
		}
		for picks(1, success) == 0 {
		}
		if n := picks(40, success); n == 0 {
			t.Errorf("%s: an endpoint that was answered got none of the next 40 calls", config)
		}
	}
}

func TestWeights(t *testing.T) {
	t.Run("are_shares", func(t *testing.T) {
		for _, config := range measuring {
			for _, callers := range []int{1, 4, 16, 64} {
				counts := newBench(t, config, weights(1, 2)...).callers(callers, 20_000, 10*time.Millisecond)
				share := counts[0] / 20_000
				lo, hi := 0.30, 0.37
				if config != `{}` && config != pendingConfig {
					lo, hi = 0.24, 0.44 // their costs of an idle endpoint are less exact
				}
				if share < lo || share > hi {
					t.Errorf("%s, %d callers: weight 1 beside 2 got %.3f of the calls, want %.2f to %.2f", config, callers, share, lo, hi)
				}
			}
		}
	})
	t.Run("let_a_canary_have_its_part", func(t *testing.T) {
		for callers, hi := range map[int]float64{1: 0.015, 2: 0.015, 4: 0.015, 8: 0.025, 32: 0.03, 500: 0.03} {
			counts := newBench(t, `{}`, weights(1, 10, 10, 10, 10, 10, 10, 10, 10, 10)...).callers(callers, 20_000, 10*time.Millisecond)
			if share := counts[0] / 20_000; share < 0.005 || share > hi {
				t.Errorf("%d callers: weight 1 beside nine of 10 got %.4f of the calls, want 0.005 to %.3f", callers, share, hi)
			}
		}
	})
	t.Run("do_not_keep_calls_from_a_fast_one", func(t *testing.T) {
		// It is in 28 % of the draws, and is picked for a third of the calls at which it is idle.
		w := newBench(t, `{}`, weights(1, 10, 10, 10)...)
		w.callers(4, 2000, 10*time.Millisecond)
		calls, light := 4000, 0
		var call func()
		call = func() {
			if calls--; calls < 0 {
				return
			}
			i, done := w.pick("/s/Get")
			took := w.around(10 * time.Millisecond)
			if i == 0 {
				light++
				took /= 100
			}
			w.after(took, func() { done(success); call() })
		}
		for range 4 {
			call()
		}
		w.run(time.Hour)
		if light < 400 {
			t.Errorf("one of weight 1 beside three of 10 that is a hundred times faster got %d of 4000 calls, want at least 400", light)
		}
	})
}

func TestStreams(t *testing.T) {
	const servers = 10
	for _, config := range append(slices.Clone(measuring), constantConfig) {
		t.Run("are_even "+config, func(t *testing.T) {
			w := newBench(t, config, endpoints(servers)...)
			open := make([]float64, servers)
			for range 2000 {
				i, answer := w.open()
				open[i]++
				w.after(w.around(10*time.Millisecond), answer)
				w.run(time.Millisecond)
			}
			// constant, and the other metrics with two choices, look at two endpoints.
			if most := slices.Max(open); most > 220 {
				t.Errorf("of 2000 streams the endpoints have %v, want at most 220", open)
			}
		})
		t.Run("do_not_count_against_calls "+config, func(t *testing.T) {
			w := newBench(t, config, endpoints(4)...)
			for range 300 {
				_, answer := w.open()
				w.run(time.Millisecond)
				answer()
			}
			// A server that was restarted has no streams.
			w.b.(*policy).endpoint(0).candidate.tally.add(-75 * oneStream)
			counts := w.callers(8, 8000, 5*time.Millisecond)
			if counts[0] < 1600 || counts[0] > 2400 {
				t.Errorf("of 8000 calls the endpoint without streams got %v, want a quarter: %v", counts[0], counts)
			}
		})
	}
	t.Run("that_say_nothing_do_not_starve_their_endpoint", func(t *testing.T) {
		for _, callers := range []int{1, 5, 20} {
			w := newBench(t, `{}`, endpoints(servers)...)
			w.callers(callers, 2000, 10*time.Millisecond)
			silent := make(map[int]bool)
			for len(silent) < 3 {
				i, _ := w.open()
				silent[i] = true
			}
			w.run(5 * time.Second)
			counts := w.callers(callers, 10_000, 10*time.Millisecond)
			var got float64
			for i := range silent {
				got += counts[i]
			}
			if got < 1500 { // with few callers one endpoint may get few calls by chance
				t.Errorf("%d callers: the three endpoints with silent streams got %v of 10000 calls, want at least half their share", callers, got)
			}
		}
	})
}

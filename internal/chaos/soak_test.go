// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package chaos

import (
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"math/rand/v2"
	"runtime"
	"slices"
	"testing"
	"time"

	"go.opentelemetry.io/otel/sdk/metric"
	"google.golang.org/grpc/balancer"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/connectivity"
	"google.golang.org/grpc/resolver"
	"google.golang.org/grpc/status"

	"github.com/belfry-go/belfry/balancer/p2c"
	"github.com/belfry-go/belfry/debug"
	"github.com/belfry-go/belfry/interceptor"
	"github.com/belfry-go/belfry/interceptor/breaker"
	"github.com/belfry-go/belfry/interceptor/concurrency"
	"github.com/belfry-go/belfry/interceptor/hedge"
	"github.com/belfry-go/belfry/interceptor/loadshed"
	"github.com/belfry-go/belfry/interceptor/otelobserver"
	"github.com/belfry-go/belfry/interceptor/ratelimit"
	"github.com/belfry-go/belfry/interceptor/retry"
	"github.com/belfry-go/belfry/interceptor/throttle"
	"github.com/belfry-go/belfry/interceptor/timeout"
	"github.com/belfry-go/belfry/internal/place"
	"github.com/belfry-go/belfry/internal/simenv"
	"github.com/belfry-go/belfry/internal/test/calltest"
	"github.com/belfry-go/belfry/internal/test/lbtest"
	"github.com/belfry-go/belfry/internal/test/race"
	"github.com/belfry-go/belfry/limit"
)

var soakCalls = flag.Int("soak.calls", soakDefault(), "calls of the soak tests; the one with real servers makes a hundredth")

func soakDefault() int {
	if race.Enabled { // Twenty times slower.
		return 20_000
	}
	return 100_000
}

// heap returns the bytes that are in use after a collection.
func heap() int64 {
	runtime.GC()
	runtime.GC() // what pools had in the first
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return int64(m.HeapAlloc)
}

// flat checks that the heap does not grow by more than 5 %, by the least of the readings of
// each half: how much the policy holds depends on what drains and starts at the time. Of a
// small heap what the runtime and the test keep is a larger part: up to slack is allowed.
func flat(t *testing.T, readings []int64, slack int64) {
	t.Helper()
	t.Logf("heap after each tenth of the calls: %v KiB", kib(readings))
	half := len(readings) / 2
	first, last := slices.Min(readings[:half]), slices.Min(readings[half:])
	if last > first+max(first/20, slack) {
		t.Errorf("the heap grew from %d to %d KiB", first>>10, last>>10)
	}
}

func kib(bytes []int64) (k []int64) {
	for _, b := range bytes {
		k = append(k, b>>10)
	}
	return k
}

// timers run functions at times of a virtual clock, for one goroutine.
type timers struct {
	now     int64
	pending []*timer
}

type timer struct {
	at int64
	f  func()
}

func (s *timers) after(d time.Duration, f func()) (stop func()) {
	e := &timer{s.now + int64(d), f}
	s.pending = append(s.pending, e)
	return func() { s.pending = slices.DeleteFunc(s.pending, func(o *timer) bool { return o == e }) }
}

// pass lets time pass.
func (s *timers) pass(d time.Duration) {
	end := s.now + int64(d)
	for {
		next := -1
		for i, e := range s.pending {
			if e.at <= end && (next < 0 || e.at < s.pending[next].at) {
				next = i
			}
		}
		if next < 0 {
			s.now = end
			return
		}
		e := s.pending[next]
		s.pending = slices.Delete(s.pending, next, next+1)
		s.now = max(s.now, e.at)
		e.f()
	}
}

// The policy alone, with endpoints that come under ever new addresses, drain, fail and go, and
// methods of ever new names: of 100,000 calls some 10,000 and 50,000.
func TestSoakPolicy(t *testing.T) {
	const (
		endpoints = 100
		turnover  = 250 // calls between two changes
		inFlight  = 100
	)
	r := rand.New(rand.NewPCG(1, 2))
	clock := &timers{now: 1}
	env := &simenv.Env{Now: func() int64 { return clock.now }, Uint64: r.Uint64, AfterFunc: clock.after}
	channel := &lbtest.Channel{}
	builder := balancer.Get(p2c.Name)
	cfg, err := builder.(balancer.ConfigParser).ParseConfig(json.RawMessage(`{"slowStart":{},"zones":{"home":"a"}}`))
	if err != nil {
		t.Fatal(err)
	}
	b := builder.Build(channel, balancer.BuildOptions{})
	type server struct {
		addr     string
		draining bool
	}
	var list []*server
	made := 0
	update := func() {
		state := simenv.Set(resolver.State{}, env)
		for i, s := range list {
			e := resolver.Endpoint{Addresses: []resolver.Address{{Addr: s.addr}}}
			state.Endpoints = append(state.Endpoints, place.SetDraining(place.SetZone(e, string("abc"[i%3])), s.draining))
		}
		if err := b.UpdateClientConnState(balancer.ClientConnState{ResolverState: state, BalancerConfig: cfg}); err != nil {
			t.Fatal(err)
		}
		channel.Drain()
	}
	add := func() {
		made++
		list = append(list, &server{addr: fmt.Sprintf("10.%d.%d.%d:443", made>>16, made>>8&255, made&255)})
	}
	for range endpoints {
		add()
	}
	update()
	failing := make(map[string]float64)
	type call struct {
		addr string
		done func(balancer.DoneInfo)
	}
	open := make([]call, 0, inFlight)
	end := func(c call) {
		info := balancer.DoneInfo{BytesSent: true, BytesReceived: true}
		if p := failing[c.addr]; p > 0 && r.Float64() < p {
			info.Err = status.Error(codes.Unavailable, "down")
		}
		if c.done(info); r.IntN(100) == 0 {
			channel.Drain()
		}
	}
	var readings []int64
	for n := range *soakCalls {
		if n%turnover == 0 {
			switch i := r.IntN(len(list)); r.IntN(4) {
			case 0, 1: // Half of them drain, and those that drained are replaced.
				list = slices.DeleteFunc(list, func(s *server) bool {
					if s.draining {
						delete(failing, s.addr)
					}
					return s.draining
				})
				for _, s := range list[:endpoints/2] {
					s.draining = true
				}
				for len(list) < endpoints {
					add()
				}
				update()
			case 2:
				failing[list[i].addr] = r.Float64()
			case 3: // It loses its connection.
				if sc := channel.SubConn(list[i].addr); sc != nil {
					sc.SetState(connectivity.Idle, nil)
					channel.Drain()
				}
				clear(failing)
			}
		}
		state, _ := channel.State()
		result, err := state.Picker.Pick(balancer.PickInfo{FullMethodName: fmt.Sprintf("/soak.S/M%d", n/2+r.IntN(1000)), Ctx: context.Background()})
		if err != nil {
			t.Fatalf("call %d: %v", n, err)
		}
		c := call{result.SubConn.(*lbtest.SubConn).Address.Addr, result.Done}
		if len(open) < inFlight {
			open = append(open, c)
		} else {
			i := r.IntN(inFlight)
			open[i], c = c, open[i]
			end(c)
		}
		clock.pass(100 * time.Microsecond)
		if (n+1)%max(*soakCalls/10, 1) == 0 {
			readings = append(readings, heap())
		}
	}
	for _, c := range open {
		end(c)
	}
	b.Close()
	channel.Drain()
	clock.pass(2 * time.Second) // in which ticks end that see that it is closed
	t.Logf("%d endpoints came and went", made-len(list))
	flat(t, readings, 512<<10)
	if n := len(clock.pending); n != 0 {
		t.Errorf("%d timers are left", n)
	}
}

// Layers that tell methods apart, and those who watch them, under ever new names of methods.
func TestSoakStack(t *testing.T) {
	observer, err := otelobserver.New(metric.NewMeterProvider(metric.WithReader(metric.NewManualReader())))
	if err != nil {
		t.Fatal(err)
	}
	page := debug.New()
	byMethod := interceptor.KeyBy{Method: true}
	stack, err := interceptor.NewStack(
		interceptor.Observe(observer, page),
		timeout.Config{Timeout: time.Second},
		loadshed.Config{},
		concurrency.Config{Auto: &limit.AutoConfig{}, KeyBy: byMethod, MaxKeys: 500},
		ratelimit.Config{Limit: 1000, KeyBy: byMethod, MaxKeys: 500},
		breaker.Config{KeyBy: byMethod, MaxKeys: 500},
		throttle.Config{KeyBy: byMethod, MaxKeys: 500},
		retry.Config{},
		hedge.Config{},
	)
	if err != nil {
		t.Fatal(err)
	}
	down := status.Error(codes.Unavailable, "down")
	n := 0
	conn := stack.Wrap(calltest.Server(func(context.Context) error {
		if n++; n%7 == 0 {
			return down
		}
		return nil
	}))
	names := max(*soakCalls/2, 10)
	var readings []int64
	for i := range names {
		_ = conn.Invoke(context.Background(), fmt.Sprintf("/soak.S/M%d", i), nil, nil)
		if (i+1)%(names/10) == 0 {
			readings = append(readings, heap())
		}
	}
	flat(t, readings[2:], 512<<10) // at first it fills up to MaxKeys
	runtime.KeepAlive(stack)
}

// Everything, with real servers of which some are listed, draining, failing, silent or down.
func TestSoakServers(t *testing.T) {
	rounds := max(*soakCalls/100/100, 10) // of some 100 calls
	run(t, setup{stack: retries}, func(w *world) {
		all := w.cluster.Servers()
		half := len(all) / 2
		r := rand.New(rand.NewPCG(3, 4))
		var readings []int64
		for round := range rounds {
			set := w.cluster.Endpoints()
			r.Shuffle(len(set), func(i, j int) { set[i], set[j] = set[j], set[i] })
			for i := range half / 2 {
				set[i] = place.SetDraining(set[i], true)
			}
			w.source.put(set[:half+r.IntN(half+1)])
			victim := all[r.IntN(len(all))]
			stopped := false
			switch r.IntN(4) {
			case 0:
				fail(t, 1, victim)
			case 1:
				victim.HalfOpen()
			case 2:
				victim.CloseConnections()
			case 3:
				victim.Stop()
				stopped = true
			}
			w.load = load / 4
			w.serve("soak", time.Duration(float64(100*mean())/(w.load*servers)))
			w.calls.Wait()
			victim.Heal()
			if stopped {
				if err := victim.Restart(context.Background()); err != nil {
					t.Fatal(err)
				}
			}
			if (round+1)%max(rounds/10, 1) == 0 {
				w.source.put(w.cluster.Endpoints())
				w.ready()
				readings = append(readings, heap())
			}
		}
		flat(t, readings, 2<<20)
	})
}

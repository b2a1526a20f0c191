// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package chaos

import (
	"context"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/connectivity"
	"google.golang.org/grpc/keepalive"

	"github.com/belfry-go/belfry/interceptor"
	"github.com/belfry-go/belfry/interceptor/retry"
	"github.com/belfry-go/belfry/interceptor/timeout"
	"github.com/belfry-go/belfry/internal/testserver"
)

// calm is the 99th percentile that calls have at 70 % of the capacity, and rough the one that
// they may have while something goes wrong.
const (
	calm  = 40 * time.Millisecond
	rough = 80 * time.Millisecond
)

var retries = []interceptor.Spec{retry.Config{AllMethods: true}}

// fail makes servers fail all calls at once.
func fail(t *testing.T, part float64, servers ...*testserver.Server) {
	t.Helper()
	for _, s := range servers {
		if err := s.Fail(codes.Unavailable, part); err != nil {
			t.Fatal(err)
		}
	}
}

func TestRollout(t *testing.T) {
	t.Run("of_all_servers_fails_no_call", func(t *testing.T) {
		run(t, setup{}, func(w *world) {
			before := w.serve("before", time.Second)
			over := make(chan struct{})
			w.calls.Go(func() {
				defer close(over)
				for i := range servers {
					old, fresh := w.cluster.Server(i), w.add()
					set := w.source.list()
					w.source.put(append(set[1:len(set):len(set)], fresh.Endpoint()))
					time.Sleep(100 * time.Millisecond)
					if err := old.GracefulStop(context.Background()); err != nil {
						w.t.Error(err)
					}
				}
			})
			during := w.serve("during", 1500*time.Millisecond)
			<-over
			after := w.serve("after", time.Second)
			before.want(0, calm)
			during.want(0, rough)
			after.want(0, calm)
		})
	})
	t.Run("half_of_the_servers_removed_at_once", func(t *testing.T) {
		run(t, setup{load: load / 2}, func(w *world) {
			before := w.serve("before", time.Second)
			w.source.put(w.cluster.Endpoints()[servers/2:])
			gone := w.cluster.Servers()[:servers/2]
			during := w.serve("during", 200*time.Millisecond)
			for _, s := range gone {
				if err := s.GracefulStop(context.Background()); err != nil {
					w.t.Error(err)
				}
			}
			after := w.serve("after", time.Second)
			before.want(0, calm)
			during.want(0, rough)
			after.want(0, calm)
		})
	})
	t.Run("a_fifth_of_the_servers_is_cold", func(t *testing.T) {
		run(t, setup{policy: `{"slowStart":{"window":"2s"}}`}, func(w *world) {
			before := w.serve("before", time.Second)
			set := w.source.list()[2:]
			var cold []*testserver.Server
			for range 2 {
				s := w.add()
				if err := s.SetSpeed(0.2); err != nil {
					w.t.Fatal(err)
				}
				cold, set = append(cold, s), append(set[:len(set):len(set)], s.Endpoint())
			}
			w.source.put(set)
			during := w.serve("during", time.Second)
			for _, s := range cold {
				if err := s.SetSpeed(1); err != nil {
					w.t.Fatal(err)
				}
			}
			after := w.serve("after", time.Second)
			before.want(0, calm)
			during.want(0, 2*rough)
			after.want(0, calm)
		})
	})
	t.Run("with_the_registry_down_throughout", func(t *testing.T) {
		run(t, setup{stack: retries}, func(w *world) {
			w.source.change(func() { w.source.down = true })
			before := w.serve("before", time.Second)
			w.cluster.Server(0).Stop()
			during := w.serve("during", time.Second)
			if err := w.cluster.Server(0).Restart(context.Background()); err != nil {
				w.t.Fatal(err)
			}
			w.ready() // gRPC connects again by itself
			after := w.serve("after", time.Second)
			before.want(0, calm)
			during.want(0, rough)
			after.want(0, calm)
		})
	})
}

func TestCrash(t *testing.T) {
	run(t, setup{stack: retries}, func(w *world) {
		before := w.serve("before", time.Second)
		w.cluster.Server(0).Stop()
		during := w.serve("during", time.Second)
		before.want(0, calm)
		during.want(0, rough)
	})
}

// A server that no packet reaches, and one whose connections are half-open. Callers wait for
// half a second, by a deadline of their own or one of their stack. After the first second the
// server gets one call a second at most.
func TestSilence(t *testing.T) {
	const patience = 500 * time.Millisecond
	for name, silence := range map[string]func(*testserver.Server){
		"dropped_packets": (*testserver.Server).DropPackets,
		"half_open":       (*testserver.Server).HalfOpen,
	} {
		for name, s := range map[string]setup{
			name + "/own_deadlines": {timeout: patience},
			name + "/timeout_layer": {stack: []interceptor.Spec{timeout.Config{Timeout: patience}}},
			name + "/attempts_repeated": {stack: []interceptor.Spec{
				retry.Config{AllMethods: true, Codes: []codes.Code{codes.Unavailable, codes.DeadlineExceeded}}, timeout.Config{Timeout: patience},
			}},
		} {
			t.Run(name, func(t *testing.T) {
				s.load = load / 2 // so that no call takes as long for another reason
				repeats := func(failed int) int {
					if len(s.stack) == 2 {
						return 0
					}
					return failed
				}
				run(t, s, func(w *world) {
					victim := w.cluster.Server(0)
					before := w.serve("before", time.Second)
					silence(victim)
					n0, inFlight := w.sent(victim)
					first := w.serve("first second", time.Second)
					n1, _ := w.sent(victim)
					during := w.serve("during", 4*time.Second)
					n2, _ := w.sent(victim)
					victim.Heal()
					t.Logf("%d in flight, %d sent in a second, %d in 4 more", inFlight, n1-n0, n2-n1)
					if n2-n1 > 4 {
						t.Errorf("%d calls to the server in 4 s, want at most 4", n2-n1)
					}
					before.want(repeats(inFlight), time.Minute)
					first.want(repeats(n1-n0), time.Minute)
					during.want(repeats(n2-n1), calm)
				})
			})
		}
		// gRPC pings every 10 s at most. On a new connection the half-open server is well.
		t.Run(name+"/keepalive", func(t *testing.T) {
			run(t, setup{
				timeout: patience, load: load / 5,
				dial:   []grpc.DialOption{grpc.WithKeepaliveParams(keepalive.ClientParameters{Time: 10 * time.Second, Timeout: time.Second, PermitWithoutStream: true})},
				server: []testserver.Option{testserver.GRPC(grpc.KeepaliveEnforcementPolicy(keepalive.EnforcementPolicy{MinTime: time.Second, PermitWithoutStream: true}))},
			}, func(w *world) {
				victim := w.cluster.Server(0)
				silence(victim)
				n0, _ := w.sent(victim)
				first := w.serve("first second", time.Second)
				n1, _ := w.sent(victim)
				during := w.serve("during", 8*time.Second)
				n2, _ := w.sent(victim)
				ping := w.serve("ping", 3*time.Second)
				n3, _ := w.sent(victim)
				for _, e := range endpointsOf(w.conns[0]) {
					if e.Addresses[0] == victim.Addr() && (e.State == connectivity.Ready) != (name == "half_open") {
						t.Errorf("the server is %v after the ping", e.State)
					}
				}
				after := w.serve("after the ping", time.Second)
				victim.Heal()
				if n2-n1 > 8 {
					t.Errorf("%d calls to the server in 8 s, want at most 8", n2-n1)
				}
				first.want(n1-n0, time.Minute)
				during.want(n2-n1, calm)
				ping.want(n3-n2, calm)
				after.want(0, calm)
			})
		})
	}
}

func TestSlowness(t *testing.T) {
	t.Run("of_one_server_20_times_slower", func(t *testing.T) {
		run(t, setup{}, func(w *world) {
			victim := w.cluster.Server(0)
			before := w.serve("before", time.Second)
			if err := victim.SetSpeed(1. / 20); err != nil {
				w.t.Fatal(err)
			}
			n0, _ := w.sent(victim)
			during := w.serve("during", 3*time.Second)
			n1, _ := w.sent(victim)
			if err := victim.SetSpeed(1); err != nil {
				w.t.Fatal(err)
			}
			after := w.serve("after", time.Second)
			before.want(0, calm)
			during.want(0, 2*rough)
			after.want(0, calm)
			// A tenth is an equal share.
			share := float64(n1-n0) / float64(len(during.took))
			if t.Logf("the slow server got %.3f of the calls", share); share > 0.04 {
				t.Errorf("the slow server got %.3f of the calls, want at most 0.04", share)
			}
		})
	})
	t.Run("stalls_of_100_ms", func(t *testing.T) {
		run(t, setup{}, func(w *world) {
			before := w.serve("before", time.Second)
			w.calls.Go(func() {
				for i := range 2 * servers {
					if err := w.cluster.Server(i % servers).StallFor(100 * time.Millisecond); err != nil {
						w.t.Error(err)
					}
					time.Sleep(100 * time.Millisecond)
				}
			})
			during := w.serve("during", 2*time.Second)
			after := w.serve("after", time.Second)
			before.want(0, calm)
			during.want(0, 2*rough)
			after.want(0, calm)
		})
	})
}

func TestFailure(t *testing.T) {
	for name, s := range map[string]struct {
		setup
		failed int
		calm   time.Duration
	}{
		"of_one_server_for_3_s":              {setup{}, 6, calm},
		"of_one_server_for_3_s_with_retries": {setup{stack: retries}, 0, calm},
		// These know less of the servers.
		"of_one_server_for_20_clients":              {setup{clients: 20}, 20 * 6, 2 * calm},
		"of_one_server_for_20_clients_with_retries": {setup{clients: 20, stack: retries}, 0, 2 * calm},
	} {
		t.Run(name, func(t *testing.T) {
			run(t, s.setup, func(w *world) {
				before := w.serve("before", time.Second)
				fail(t, 1, w.cluster.Server(0))
				during := w.serve("during", 3*time.Second)
				w.cluster.Server(0).Heal()
				after := w.serve("after", time.Second)
				before.want(0, s.calm)
				during.want(s.failed, rough)
				after.want(0, s.calm)
			})
		})
	}
	// The server fails the same of its calls each time.
	t.Run("of_half_the_calls_of_one_server", func(t *testing.T) {
		run(t, setup{}, func(w *world) {
			victim := w.cluster.Server(0)
			before := w.serve("before", time.Second)
			fail(t, 0.5, victim)
			n0, _ := w.sent(victim)
			during := w.serve("during", 3*time.Second)
			if n1, _ := w.sent(victim); n1-n0 > 20 {
				t.Errorf("%d calls to the server that fails half of them, want at most 20", n1-n0)
			}
			before.want(0, calm)
			during.want(20, rough)
		})
	})
	t.Run("of_all_servers_for_5_s", func(t *testing.T) {
		run(t, setup{}, func(w *world) {
			before := w.serve("before", time.Second)
			fail(t, 1, w.cluster.Servers()...)
			w.serve("during", 5*time.Second)
			for _, s := range w.cluster.Servers() {
				s.Heal()
			}
			w.serve("the second after", time.Second)
			after := w.serve("after", time.Second)
			before.want(0, calm)
			after.want(0, calm)
		})
	})
}

func TestConnections(t *testing.T) {
	t.Run("GOAWAY_storm", func(t *testing.T) {
		run(t, setup{}, func(w *world) {
			before := w.serve("before", time.Second)
			w.calls.Go(func() {
				for range 10 {
					for _, s := range w.cluster.Servers() {
						if err := s.GoAway(); err != nil {
							w.t.Error(err)
						}
					}
					time.Sleep(100 * time.Millisecond)
				}
			})
			during := w.serve("during", time.Second)
			after := w.serve("after", time.Second)
			before.want(0, calm)
			during.want(0, rough)
			after.want(0, calm)
		})
	})
	t.Run("MAX_CONCURRENT_STREAMS_of_3", func(t *testing.T) {
		run(t, setup{server: []testserver.Option{testserver.GRPC(grpc.MaxConcurrentStreams(3))}}, func(w *world) {
			w.serve("with one connection", 2*time.Second).want(0, calm)
			w.cluster.Server(0).Stall()
			during := w.serve("one server stalls", time.Second)
			w.cluster.Server(0).Resume()
			during.want(0, 2*time.Second)
			w.serve("after", time.Second).want(0, calm)
		})
	})
}

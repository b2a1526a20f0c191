// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package priority

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/balancer"
	_ "google.golang.org/grpc/balancer/roundrobin" // a child
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/connectivity"
	estats "google.golang.org/grpc/experimental/stats"
	"google.golang.org/grpc/resolver"
	"google.golang.org/grpc/resolver/manual"
	"google.golang.org/grpc/status"

	"github.com/belfry-go/belfry/internal/place"
	"github.com/belfry-go/belfry/internal/test/lbtest"
	"github.com/belfry-go/belfry/internal/test/leaktest"
	"github.com/belfry-go/belfry/internal/testserver"
	testingv1 "github.com/belfry-go/belfry/proto/belfry/testing/v1"
)

func TestMain(m *testing.M) { leaktest.Main(m) }

// world is the policy on a channel without a network, in virtual time.
type world struct {
	t      *testing.T
	cc     lbtest.Channel
	b      *policy
	config string
	r      *recorder
	// draining is the endpoints that discovery calls so at the next update.
	draining map[string]bool
}

func bubble(t *testing.T, config string, f func(t *testing.T, w *world)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		w := &world{t: t, config: config, r: &recorder{values: make(map[string]int64)}}
		w.cc.Hold = true
		w.cc.Recorder = w.r
		w.b = builder{}.Build(&w.cc, balancer.BuildOptions{}).(*policy)
		f(t, w)
		w.b.Close()
		w.settle()
	})
}

type recorder struct {
	estats.UnimplementedMetricsRecorder
	mu     sync.Mutex // guards values
	values map[string]int64
}

func (r *recorder) value(name string) int64 {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.values[name]
}

func (r *recorder) RecordInt64Count(h *estats.Int64CountHandle, v int64, labels ...string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.values[h.Descriptor().Name] += v
}

func (r *recorder) RecordInt64Gauge(h *estats.Int64GaugeHandle, v int64, labels ...string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.values[h.Descriptor().Name] = v
}

func (w *world) settle() {
	for range 3 {
		synctest.Wait()
		w.cc.Drain()
	}
}

// update lists endpoints, each as its name, which begins with the number of its group.
func (w *world) update(names ...string) error {
	w.t.Helper()
	cfg, err := parseConfig(json.RawMessage(w.config))
	if err != nil {
		w.t.Fatal(err)
	}
	var es []resolver.Endpoint
	for _, name := range names {
		e := resolver.Endpoint{Addresses: []resolver.Address{{Addr: name}}}
		e = place.SetDraining(e, w.draining[name])
		es = append(es, place.SetGroup(e, uint32(name[0]-'0')))
	}
	err = w.b.UpdateClientConnState(balancer.ClientConnState{ResolverState: resolver.State{Endpoints: es}, BalancerConfig: cfg})
	w.settle()
	return err
}

func (w *world) move(state connectivity.State, names ...string) {
	w.t.Helper()
	for _, name := range names {
		sc := w.cc.SubConn(name)
		if sc == nil {
			w.t.Fatalf("no connection to %s", name)
		}
		if state == connectivity.Ready || state == connectivity.TransientFailure {
			sc.SetState(connectivity.Connecting, nil)
		}
		var err error
		if state == connectivity.TransientFailure {
			err = errors.New("cannot reach " + name)
		}
		sc.SetState(state, err)
		w.settle()
	}
}

func (w *world) ready(names ...string) { w.t.Helper(); w.move(connectivity.Ready, names...) }
func (w *world) lose(names ...string)  { w.t.Helper(); w.move(connectivity.Idle, names...) }
func (w *world) fail(names ...string)  { w.t.Helper(); w.move(connectivity.TransientFailure, names...) }

// want checks where calls go: to the group of a number, to nobody because they wait ("-"),
// or to nobody because they fail ("!").
func (w *world) want(when, want string) {
	w.t.Helper()
	s, _ := w.cc.State()
	for range 20 {
		r, err := s.Picker.Pick(balancer.PickInfo{FullMethodName: "/s/m", Ctx: context.Background()})
		got := "!"
		switch {
		case err == balancer.ErrNoSubConnAvailable:
			got = "-"
		case err == nil:
			got = r.SubConn.(*lbtest.SubConn).Address.Addr[:1]
			if r.Done != nil {
				r.Done(balancer.DoneInfo{BytesSent: true, BytesReceived: true})
			}
		}
		if got != want {
			w.t.Fatalf("%s: a call goes to group %s (%v), want %s", when, got, err, want)
		}
	}
}

const (
	robin = `{"childPolicy":[{"round_robin":{}}]}`
	plain = `{}`
)

func TestFailover(t *testing.T) {
	for _, config := range []string{robin, plain} {
		t.Run("goes_on_with_too_few_and_comes_back/"+config, func(t *testing.T) {
			bubble(t, config, func(t *testing.T, w *world) {
				if err := w.update("0a", "0b", "0c", "0d", "1a", "1b"); err != nil {
					t.Fatal(err)
				}
				w.want("at first", "-")
				w.ready("1a", "1b")
				w.want("while the first group connects", "-")
				w.ready("0a", "0b", "0c", "0d")
				w.want("all READY", "0")
				w.lose("0a", "0b")
				w.want("half of the first group READY", "0")
				w.lose("0c")
				w.want("a quarter of the first group READY", "1")
				w.ready("0a")
				w.want("half of it READY again", "1")
				time.Sleep(defaultReturnAfter - 1)
				w.want("shortly before returnAfter", "1")
				w.lose("0a")
				w.ready("0a")
				time.Sleep(time.Nanosecond)
				w.settle()
				w.want("it has had too few meanwhile", "1")
				time.Sleep(defaultReturnAfter)
				w.settle()
				w.want("after returnAfter", "0")
				if g, n := w.r.value("belfry.lb.priority.group"), w.r.value("belfry.lb.priority.switches"); g != 0 || n != 2 {
					t.Errorf("metrics say group %d after %d switches, want 0 and 2", g, n)
				}
			})
		})
		t.Run("is_at_once_back_where_the_later_group_fails/"+config, func(t *testing.T) {
			bubble(t, config, func(t *testing.T, w *world) {
				w.update("0a", "0b", "1a", "1b")
				w.ready("0a", "0b", "1a", "1b")
				w.lose("0a", "0b")
				w.want("the first group lost", "1")
				w.ready("0a")
				w.want("the first group READY again", "1")
				w.lose("1a", "1b")
				w.want("the second group lost", "0")
			})
		})
		t.Run("without_enough_the_greatest_part_gets_the_calls/"+config, func(t *testing.T) {
			bubble(t, strings.Replace(config, "{", `{"minHealthy":0.9,`, 1), func(t *testing.T, w *world) {
				if config == plain {
					w.config = `{"minHealthy":0.9}`
				}
				w.update("0a", "0b", "0c", "1a", "1b", "2a", "2b", "2c")
				w.ready("0a", "0b", "0c", "1a", "1b", "2a", "2b", "2c")
				w.lose("1a", "2a")
				w.lose("0a", "0b")
				w.want("parts of 1/3, 1/2 and 2/3", "2")
				w.lose("2b")
				w.want("parts of 1/3, 1/2 and 1/3", "1")
				w.lose("1b")
				w.want("parts of 1/3, 0 and 1/3", "0")
				w.lose("0c", "2c")
				w.want("none", "-")
				w.ready("1a")
				w.want("one", "1")
			})
		})
		t.Run("does_not_wait_for_a_group_that_cannot_be_reached/"+config, func(t *testing.T) {
			bubble(t, config, func(t *testing.T, w *world) {
				w.update("0a", "0b", "0c", "1a")
				w.ready("1a", "0a")
				w.want("one of three READY, the others connecting", "0")
				w.fail("0b")
				w.want("one of three failed", "0")
				w.fail("0c")
				w.want("two of three failed", "1")
			})
		})
		t.Run("waits_for_the_first_connections_for_a_time/"+config, func(t *testing.T) {
			bubble(t, config, func(t *testing.T, w *world) {
				w.update("0a", "1a")
				w.ready("1a")
				time.Sleep(defaultConnectTimeout - 1)
				w.want("shortly before connectTimeout", "-")
				time.Sleep(time.Nanosecond)
				w.settle()
				w.want("after connectTimeout", "1")
			})
		})
		t.Run("all_failed_is_not_for_ever/"+config, func(t *testing.T) {
			bubble(t, config, func(t *testing.T, w *world) {
				w.update("0a", "1a")
				w.fail("0a", "1a")
				w.want("all failed", "!")
				w.ready("1a")
				w.want("the second group READY", "1")
				w.ready("0a")
				time.Sleep(defaultReturnAfter)
				w.settle()
				w.want("the first too", "0")
			})
		})
		t.Run("follows_the_resolver/"+config, func(t *testing.T) {
			bubble(t, config, func(t *testing.T, w *world) {
				w.update("1a", "3a")
				w.ready("1a", "3a")
				w.want("groups 1 and 3", "1")
				w.update("3a")
				w.want("group 3 alone", "3")
				w.update("0a", "3a")
				w.want("a new group that connects", "3")
				w.ready("0a")
				w.want("it is READY", "3")
				time.Sleep(defaultReturnAfter)
				w.settle()
				w.want("after returnAfter", "0")
				w.update("3a")
				if err := w.update(); err != balancer.ErrBadResolverState {
					t.Errorf("an update without endpoints returned %v, want ErrBadResolverState", err)
				}
				w.want("no endpoints", "!")
				w.update("0b")
				w.ready("0b")
				w.want("another endpoint", "0")
			})
		})
	}
	t.Run("counts_the_ejected_as_unhealthy", func(t *testing.T) {
		bubble(t, plain, func(t *testing.T, w *world) {
			w.update("0a", "0b", "0c", "1a")
			w.ready("0a", "0b", "0c", "1a")
			for i, name := range []string{"0a", "0b"} {
				w.cc.SubConn(name).SetHealth(connectivity.TransientFailure, errors.New("ejected"))
				w.settle()
				w.want(fmt.Sprintf("%d of 3 ejected", i+1), fmt.Sprint(i))
			}
			w.cc.SubConn("0a").SetHealth(connectivity.Ready, nil)
			time.Sleep(defaultReturnAfter)
			w.settle()
			w.want("one is back", "0")
		})
	})
	t.Run("counts_those_that_the_child_avoids_as_unhealthy", func(t *testing.T) {
		bubble(t, `{"childPolicy":[{"belfry.p2c":{"failureAccrual":{"failures":2},"load":{"constant":{}}}}]}`, func(t *testing.T, w *world) {
			w.update("0a", "0b", "0c", "1a")
			w.ready("0a", "0b", "0c", "1a")
			// 0c is always well, and the others of its group fail after 100 calls: then all
			// have answered once, but for one of 1e17 runs.
			for i := range 300 {
				s, _ := w.cc.State()
				r, err := s.Picker.Pick(balancer.PickInfo{FullMethodName: "/s/m", Ctx: t.Context()})
				if err != nil {
					t.Fatal(err)
				}
				addr := r.SubConn.(*lbtest.SubConn).Address.Addr
				if addr == "1a" {
					break
				}
				info := balancer.DoneInfo{BytesSent: true, BytesReceived: true}
				if i >= 100 && addr != "0c" {
					info = balancer.DoneInfo{BytesSent: true, Err: status.Error(codes.Unavailable, "broken")}
				}
				r.Done(info)
				if i == 299 {
					t.Fatal("no failover while two of three endpoints fail")
				}
			}
			w.want("two of three are put aside", "1")
		})
	})
	t.Run("draining_endpoints_do_not_count", func(t *testing.T) {
		bubble(t, plain, func(t *testing.T, w *world) {
			w.update("0a", "0b", "0c", "1a")
			w.ready("0a", "0b", "0c", "1a")
			w.draining = map[string]bool{"0a": true, "0b": true}
			w.update("0a", "0b", "0c", "1a")
			w.want("two of three leave", "1")
			w.draining = nil
			w.update("0a", "0b", "0c", "1a")
			time.Sleep(defaultReturnAfter)
			w.settle()
			w.want("they stay after all", "0")
		})
	})
	t.Run("an_error_of_the_resolver_is_reported", func(t *testing.T) {
		bubble(t, robin, func(t *testing.T, w *world) {
			w.b.ResolverError(errors.New("no such name"))
			s, _ := w.cc.State()
			if _, err := s.Picker.Pick(balancer.PickInfo{Ctx: t.Context()}); err == nil || !strings.Contains(err.Error(), "no such name") {
				t.Errorf("error is %v, want the resolver's", err)
			}
			w.update("0a")
			w.ready("0a")
			w.b.ResolverError(errors.New("no such name"))
			w.want("with endpoints", "0")
		})
	})
}

func TestConfig(t *testing.T) {
	c, err := parseConfig(json.RawMessage(`{"minHealthy":0.7,"returnAfter":"0s","connectTimeout":"2.5s","future":1,"childPolicy":[{"nosuch":{}},{"round_robin":{}}]}`))
	if err != nil {
		t.Fatal(err)
	}
	js, err := json.Marshal(c)
	if err != nil {
		t.Fatal(err)
	}
	again, err := parseConfig(js)
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []*config{c, again} {
		if c.minHealthy != 0.7 || c.returnAfter != 0 || c.connectTimeout != 2500*time.Millisecond || c.child.Builder.Name() != "round_robin" {
			t.Errorf("got %+v", c)
		}
	}
	for _, c := range []struct{ config, want string }{
		{`{"minHealthy":0}`, "belfry.priority: minHealthy: 0, must be above 0 and at most 1"},
		{`{"minHealthy":"NaN"}`, "belfry.priority: minHealthy: NaN, must be above 0 and at most 1"},
		{`{"returnAfter":"-1s"}`, "belfry.priority: returnAfter: -1s, must be at least 0s"},
		{`{"connectTimeout":"-1s"}`, "belfry.priority: connectTimeout: -1s, must be at least 0s"},
		{`{"connectTimeout":1}`, `belfry.priority: connectTimeout: 1, must be a duration in seconds, such as "1.5s"`},
		{`{"childPolicy":[{"nosuch":{}}]}`, "belfry.priority: childPolicy: nosuch, must name a policy that is registered: import its package"},
	} {
		if _, err := parseConfig(json.RawMessage(c.config)); err == nil || err.Error() != c.want {
			t.Errorf("%s: error is %v, want %s", c.config, err, c.want)
		}
	}
}

// Real servers: the only one of the first group stops, and comes back.
func TestWire(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := testserver.NewCluster(t, 3, func(int) []testserver.Option { return []testserver.Option{testserver.InMemory()} })
		es := c.Endpoints()
		es[1], es[2] = place.SetGroup(es[1], 7), place.SetGroup(es[2], 7)
		r := manual.NewBuilderWithScheme("belfrytest")
		r.InitialState(resolver.State{Endpoints: es})
		conn, err := grpc.NewClient("belfrytest:///orders", append(c.DialOptions(), grpc.WithResolvers(r),
			grpc.WithDefaultServiceConfig(`{"loadBalancingConfig":[{"belfry.priority":{}}]}`))...)
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		call := func() string {
			reply, err := testingv1.NewTestServiceClient(conn).Unary(t.Context(), &testingv1.UnaryRequest{}, grpc.WaitForReady(true))
			if err != nil {
				t.Fatal(err)
			}
			return reply.GetObserved().GetServer()
		}
		for range 20 {
			if got := call(); got != "server-0" {
				t.Fatalf("%s answered, want server-0", got)
			}
		}
		c.Server(0).Stop()
		synctest.Wait()
		for range 20 {
			if got := call(); got == "server-0" {
				t.Fatal("server-0 answered, which has stopped")
			}
		}
		if err := c.Server(0).Restart(t.Context()); err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Minute) // for gRPC's backoff, and returnAfter
		synctest.Wait()
		for range 20 {
			if got := call(); got != "server-0" {
				t.Fatalf("%s answered, want server-0 again", got)
			}
		}
	})
}

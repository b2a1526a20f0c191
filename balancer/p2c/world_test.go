// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package p2c

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"sync"
	"testing"
	"testing/synctest"

	"google.golang.org/grpc/balancer"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/connectivity"
	"google.golang.org/grpc/resolver"
	"google.golang.org/grpc/status"

	"github.com/belfry-go/belfry/internal/attempt"
	"github.com/belfry-go/belfry/internal/test/lbtest"
	"github.com/belfry-go/belfry/load"
)

// world is the policy on a channel without a network, whose SubConns go where
// the test says. Unless it races on purpose, a test runs in a synctest bubble,
// so that settle knows when nothing happens any more.
type world struct {
	t    *testing.T
	cc   *channel
	b    balancer.Balancer
	p    *policy
	list []resolver.Endpoint // of the last update
}

// channel is a channel that notes which SubConns are shut down.
type channel struct {
	lbtest.Channel
	shutdown sync.Map // address → true
	first    string   // the address of the first SubConn
}

func (c *channel) NewSubConn(addrs []resolver.Address, opts balancer.NewSubConnOptions) (balancer.SubConn, error) {
	listener := opts.StateListener
	opts.StateListener = func(s balancer.SubConnState) {
		if s.ConnectivityState == connectivity.Shutdown {
			c.shutdown.Store(addrs[0].Addr, true)
		}
		listener(s)
	}
	if c.first == "" {
		c.first = addrs[0].Addr
	}
	c.shutdown.Delete(addrs[0].Addr)
	return c.Channel.NewSubConn(addrs, opts)
}

// isShutdown reports whether the last SubConn of an address is shut down.
func (c *channel) isShutdown(addr string) bool {
	_, ok := c.shutdown.Load(addr)
	return ok
}

func newWorld(t *testing.T) *world {
	t.Helper()
	w := &world{t: t, cc: &channel{Channel: lbtest.Channel{Hold: true}}}
	w.b = builder{}.Build(w.cc, balancer.BuildOptions{})
	w.p = w.b.(*policy)
	return w
}

// bubble runs f in a synctest bubble with a new world, which it closes.
func bubble(t *testing.T, f func(t *testing.T, w *world)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		f(t, w)
		w.b.Close()
		w.settle()
	})
}

// settle runs what the policy has asked for until nothing is left.
func (w *world) settle() {
	for range 3 {
		synctest.Wait()
		w.cc.Drain()
	}
}

// one returns an endpoint of the given addresses.
func one(addrs ...string) resolver.Endpoint {
	var e resolver.Endpoint
	for _, a := range addrs {
		e.Addresses = append(e.Addresses, resolver.Address{Addr: a})
	}
	return e
}

// some returns endpoints of one address each.
func some(addrs ...string) []resolver.Endpoint {
	var es []resolver.Endpoint
	for _, a := range addrs {
		es = append(es, one(a))
	}
	return es
}

// update hands the policy a resolver state and a config.
func (w *world) update(config string, es ...resolver.Endpoint) error {
	w.t.Helper()
	c, err := observedBuilder{}.ParseConfig(json.RawMessage(config))
	if err != nil {
		w.t.Fatal(err)
	}
	w.list = es
	err = w.b.UpdateClientConnState(balancer.ClientConnState{
		ResolverState:  resolver.State{Endpoints: es},
		BalancerConfig: c,
	})
	return err
}

// start is update and settle, and brings all endpoints to READY.
func (w *world) start(config string, es ...resolver.Endpoint) {
	w.t.Helper()
	if err := w.update(config, es...); err != nil {
		w.t.Fatal(err)
	}
	w.settle()
	for _, e := range es {
		if ep, ok := w.p.endpoints.Get(e); ok && ep.reported.Load().ConnectivityState != connectivity.Ready {
			w.ready(e.Addresses[0].Addr)
		}
	}
}

func (w *world) subConn(addr string) *lbtest.SubConn {
	w.t.Helper()
	sc := w.cc.SubConn(addr)
	if sc == nil {
		w.t.Fatalf("no SubConn was made for %s", addr)
	}
	return sc
}

// move leads the SubConn of an address through states.
func (w *world) move(addr string, states ...connectivity.State) {
	w.t.Helper()
	for _, s := range states {
		var err error
		if s == connectivity.TransientFailure {
			err = fmt.Errorf("cannot reach %s", addr)
		}
		w.subConn(addr).SetState(s, err)
		w.settle()
	}
}

func (w *world) ready(addr string) { w.move(addr, connectivity.Connecting, connectivity.Ready) }

// fail moves an endpoint that is connecting to TRANSIENT_FAILURE.
func (w *world) fail(addr string) {
	w.move(addr, connectivity.Connecting, connectivity.TransientFailure)
}

// lose breaks the connection of a READY endpoint.
func (w *world) lose(addr string) { w.move(addr, connectivity.Idle) }

// sick reports the health of a READY endpoint as bad, as an outlier detector
// does.
func (w *world) sick(addr string) {
	w.subConn(addr).SetHealth(connectivity.TransientFailure, errors.New("ejected"))
	w.settle()
}

func (w *world) healthy(addr string) {
	w.subConn(addr).SetHealth(connectivity.Ready, nil)
	w.settle()
}

// state returns the state of the channel.
func (w *world) state() connectivity.State {
	s, _ := w.cc.State()
	return s.ConnectivityState
}

func (w *world) updates() int {
	_, n := w.cc.State()
	return n
}

func (w *world) wantState(when string, want connectivity.State) {
	w.t.Helper()
	if got := w.state(); got != want {
		w.t.Fatalf("%s: state of the channel is %v, want %v", when, got, want)
	}
}

// pick makes one pick and returns the address.
func (w *world) pick() (addr string, done func(balancer.DoneInfo), err error) {
	return w.pickWith(context.Background())
}

func (w *world) pickWith(ctx context.Context) (addr string, done func(balancer.DoneInfo), err error) {
	s, _ := w.cc.State()
	r, err := s.Picker.Pick(balancer.PickInfo{FullMethodName: "/s/m", Ctx: ctx})
	if err != nil {
		return "", nil, err
	}
	return r.SubConn.(*lbtest.SubConn).Address.Addr, r.Done, nil
}

// mustPick is pick of a channel that is READY.
func (w *world) mustPick() (addr string, done func(balancer.DoneInfo)) {
	w.t.Helper()
	addr, done, err := w.pick()
	if err != nil {
		w.t.Fatalf("pick: %v", err)
	}
	return addr, done
}

// success is how a call ends that was answered.
var success = balancer.DoneInfo{BytesSent: true, BytesReceived: true}

// counts makes n calls, one after the other, and returns how many each address
// got.
func (w *world) counts(n int) map[string]int {
	w.t.Helper()
	m := make(map[string]int)
	for range n {
		addr, done := w.mustPick()
		m[addr]++
		done(success)
	}
	return m
}

// endpoint returns the policy's endpoint.
func (w *world) endpoint(addrs ...string) *endpoint {
	w.t.Helper()
	ep, ok := w.p.endpoints.Get(one(addrs...))
	if !ok {
		w.t.Fatalf("the policy has no endpoint %v", addrs)
	}
	return ep
}

// load returns the load of an endpoint now.
func (w *world) load(addrs ...string) float64 {
	w.t.Helper()
	return w.endpoint(addrs...).load()
}

// load returns what the meter of the endpoint says now.
func (ep *endpoint) load() float64 {
	ep.policy.mu.Lock()
	defer ep.policy.mu.Unlock()
	c := ep.candidate
	return c.meter.Load().Load(c.query(ep.policy.picker, load.Instant(ep.policy.now()), 0)).Cost
}

// inFlight returns the number of attempts in flight to an endpoint.
func (w *world) inFlight(addr string) int {
	attempts, _ := w.endpoint(addr).candidate.tally.read()
	return attempts
}

// busy makes the endpoint look as if n attempts more were in flight.
func (ep *endpoint) busy(n int) {
	ep.candidate.tally.add(int64(n) * oneAttempt)
	ep.candidate.changed()
}

// inFlight returns the number of attempts in flight and of open streams to all
// endpoints of the policy.
func (b *policy) inFlight() (attempts, streams int) {
	if all := b.all.Load(); all != nil {
		for _, ep := range *all {
			a, s := ep.candidate.tally.read()
			attempts, streams = attempts+a, streams+s
		}
	}
	return attempts, streams
}

// totalLoad returns the sum of both.
func (b *policy) totalLoad() int {
	attempts, streams := b.inFlight()
	return attempts + streams
}

// tried returns a context whose call has been sent to the endpoints before.
func tried(eps ...*endpoint) context.Context {
	var t attempt.Tried
	for _, ep := range eps {
		t.Add(ep.candidate.id())
	}
	return &attempt.Context{Context: context.Background(), Info: attempt.Info{Method: "/s/m", Tried: &t}}
}

func keys(m map[string]int) []string {
	var ks []string
	for k := range m {
		ks = append(ks, k)
	}
	slices.Sort(ks)
	return ks
}

const (
	pendingConfig  = `{"load":{"pendingRequests":{}}}`
	constantConfig = `{"load":{"constant":{}}}`
)

// statusError returns an error with the status code of a name.
func statusError(name string) error {
	var c codes.Code
	if err := c.UnmarshalJSON([]byte(`"` + name + `"`)); err != nil {
		panic(err)
	}
	return status.Error(c, "as the test wants")
}

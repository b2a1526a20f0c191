// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package p2c

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc/balancer"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/connectivity"
	"google.golang.org/grpc/experimental/balancer/weight"
	"google.golang.org/grpc/resolver"
	"google.golang.org/grpc/status"

	"github.com/belfry-go/belfry/internal/place"
	"github.com/belfry-go/belfry/internal/simenv"
)

// FuzzPolicy plays random histories of picks, their ends, connections, ejections, lists,
// attributes and configs to the policy, and compares it with a model of which endpoints may
// be picked and how many attempts each has in flight. At the end each endpoint must get a call.
// The policy draws from a generator that the history seeds, so a history plays the same again.
func FuzzPolicy(f *testing.F) {
	f.Add([]byte{1, 1, 1, 1, 2, 2, 2, 2})                                     // calls that succeed
	f.Add([]byte{0, 0, 1, 3, 1, 3, 1, 3, 1, 3, 1, 3, 1, 3, 12, 1, 1, 1})      // calls that fail
	f.Add([]byte{6, 22, 38, 54, 1, 1, 7, 23, 1, 1, 1})                        // all ejected, two let in
	f.Add([]byte{9, 25, 41, 57, 1, 1, 9, 1, 8, 1, 8, 1, 2, 2})                // draining, removed
	f.Add([]byte{1, 1, 4, 20, 36, 52, 1, 2, 5, 1, 10, 1, 26, 1, 42, 1, 8, 5}) // connections, configs
	f.Add([]byte{106})                                                        // two of another zone
	r := rand.New(rand.NewPCG(1, 2))
	for range 20 {
		ops := make([]byte, 120)
		for i := range ops {
			ops[i] = byte(r.Uint32())
		}
		f.Add(ops)
	}
	f.Fuzz(func(t *testing.T, ops []byte) {
		ops = ops[:min(len(ops), 300)]
		bubble(t, func(t *testing.T, w *world) { newHistory(w, ops).play(ops) })
	})
}

// fuzzConfigs are what a history changes between. The second column is whether all endpoints
// may be full.
var fuzzConfigs = []struct {
	js    string
	limit bool
}{
	{`{}`, false},
	{`{"choiceCount":2,"memory":0,"failureAccrual":{"failures":2,"baseTime":"1s","useEjected":true}}`, false},
	{`{"load":{"peakEwma":{}},"failureAccrual":{"failures":0,"successRate":0}}`, false},
	{`{"load":{"pendingRequests":{}},"slowStart":{"window":"10s"},"failureAccrual":{"failures":1}}`, false},
	{`{"load":{"constant":{}},"failureAccrual":{"failures":3,"useEjected":true},"slowStart":{}}`, false},
	{`{"endpointLimit":{"fixed":2,"maxWaiting":0},"failureAccrual":{"failures":2,"maxAside":0.2}}`, true},
	{`{"zones":{"home":"a"},"failureAccrual":{"failures":2}}`, false},
}

// history is what the policy was told, and the model of what its picks may do.
type history struct {
	*world
	random *rand.Rand
	began  time.Time
	config int
	listed []*entry // in order
	open   []openPick
	flying map[*endpoint]int // attempts in flight
}

// An entry is an endpoint of the list.
type entry struct {
	addr, zone  string
	weight      uint32
	draining    bool
	up, ejected bool
}

type openPick struct {
	ep   *endpoint
	done func(balancer.DoneInfo)
}

func newHistory(w *world, ops []byte) *history {
	seed := uint64(len(ops))
	for _, op := range ops {
		seed = seed*31 + uint64(op)
	}
	m := &history{world: w, random: rand.New(rand.NewPCG(seed, 0)), began: time.Now(), flying: make(map[*endpoint]int)}
	for i := range 4 {
		m.insert(i)
	}
	m.publish()
	for _, l := range m.listed {
		m.connect(l)
	}
	return m
}

// insert adds an endpoint to the list, unless it is there.
func (m *history) insert(i int) {
	addr := fmt.Sprint("e", i)
	for _, l := range m.listed {
		if l.addr == addr {
			return
		}
	}
	m.listed = append(m.listed, &entry{addr: addr, zone: string("ab"[i%2]), weight: 1})
}

// publish hands the list and the config to the policy.
func (m *history) publish() {
	m.t.Helper()
	cfg, err := builder{}.ParseConfig(json.RawMessage(fuzzConfigs[m.config].js))
	if err != nil {
		m.t.Fatal(err)
	}
	state := simenv.Set(resolver.State{}, &simenv.Env{
		Now: func() int64 { return int64(time.Since(m.began)) + 1 }, Uint64: m.random.Uint64,
	})
	for _, l := range m.listed {
		e := place.SetZone(weight.Set(one(l.addr), weight.EndpointInfo{Weight: l.weight}), l.zone)
		state.Endpoints = append(state.Endpoints, place.SetDraining(e, l.draining))
	}
	if err := m.b.UpdateClientConnState(balancer.ClientConnState{ResolverState: state, BalancerConfig: cfg}); err != nil && len(m.listed) > 0 {
		m.t.Fatal(err)
	}
	m.settle()
}

func (m *history) connect(l *entry) {
	if !l.up {
		m.ready(l.addr)
		l.up = true
	}
}

func (m *history) play(ops []byte) {
	for i, op := range ops {
		m.step(int(op&15), int(op>>4))
		if problem := m.wrong(); problem != "" {
			m.t.Fatalf("after operation %d of %v, %d: %s", i, ops, op, problem)
		}
	}
	m.finish()
}

// step does one operation.
func (m *history) step(op, arg int) {
	var l *entry
	if len(m.listed) > 0 {
		l = m.listed[arg%len(m.listed)]
	}
	switch op {
	case 0, 1, 11, 13:
		m.makePick(arg)
	case 2, 3, 14:
		if len(m.open) > 0 {
			i := arg % len(m.open)
			p := m.open[i]
			m.open = append(m.open[:i:i], m.open[i+1:]...)
			m.flying[p.ep]--
			p.done([]balancer.DoneInfo{
				success, failureDone, refusedDone, {Err: status.Error(codes.Canceled, "by the caller"), BytesSent: true}, {Err: errDown},
			}[map[int]int{2: 0, 3: 1, 14: 2 + arg%3}[op]])
		}
	case 4:
		if l != nil && l.up {
			m.lose(l.addr)
			l.up, l.ejected = false, false
		}
	case 5:
		if l != nil {
			m.connect(l)
		}
	case 6:
		if l != nil && l.up && !l.ejected {
			m.sick(l.addr)
			l.ejected = true
		}
	case 7:
		if l != nil && l.ejected {
			m.healthy(l.addr)
			l.ejected = false
		}
	case 8:
		if n := arg % 8; arg < 8 && len(m.listed) > 1 {
			n %= len(m.listed)
			m.listed = append(m.listed[:n:n], m.listed[n+1:]...)
		} else {
			m.insert(n)
		}
		m.publish()
	case 9:
		if l != nil {
			l.draining = !l.draining
			m.publish()
		}
	case 10:
		m.config = arg % len(fuzzConfigs)
		m.publish()
	case 12:
		time.Sleep(time.Duration(arg*arg) * 100 * time.Millisecond)
	case 15:
		if l != nil {
			l.weight = uint32(1 + arg)
			m.publish()
		}
	}
	m.settle()
}

// groups returns the connected endpoints by what they are in.
func (m *history) groups() (g [conditions][]string) {
	for _, l := range m.listed {
		switch {
		case !l.up:
		case l.ejected:
			g[ejected] = append(g[ejected], l.addr)
		case l.draining:
			g[drains] = append(g[drains], l.addr)
		case m.endpoint(l.addr).isAside():
			g[aside] = append(g[aside], l.addr)
		default:
			g[well] = append(g[well], l.addr)
		}
	}
	return g
}

// mayGet returns the endpoints that a call may go to, and those that one may try.
func (m *history) mayGet() (may, try map[string]bool) {
	g := m.groups()
	may, try = make(map[string]bool), make(map[string]bool)
	add := func(c condition) {
		for _, addr := range g[c] {
			may[addr] = true
		}
	}
	cfg := m.p.picker.config.accrual
	add(well)
	if n := len(g[aside]); cfg != nil && (len(g[well]) == 0 || float64(n) > cfg.maxAside*float64(n+len(g[well]))) {
		add(aside)
	}
	if len(g[well])+len(g[aside]) == 0 {
		if add(drains); len(g[drains]) == 0 && cfg != nil && cfg.useEjected {
			add(ejected)
		}
	}
	for _, addr := range g[aside] {
		if a := m.endpoint(addr).accrual(); a != nil && m.p.now() >= a.until {
			try[addr] = true
		}
	}
	return may, try
}

func (m *history) makePick(arg int) {
	m.t.Helper()
	ctx := context.Background()
	if arg%4 == 3 && len(m.listed) > 0 {
		ctx = tried(m.endpoint(m.listed[arg%len(m.listed)].addr))
	}
	may, try := m.mayGet()
	addr, done, err := m.pickWith(ctx)
	switch {
	case errors.Is(err, balancer.ErrNoSubConnAvailable) && m.state() == connectivity.Connecting: // all that is READY has failed
		return
	case err != nil && len(may) > 0 && !fuzzConfigs[m.config].limit:
		m.t.Fatalf("the pick failed: %v, want one of %v", err, may)
	case err != nil:
		return
	case !may[addr] && !try[addr]:
		m.t.Fatalf("picked %s, want one of %v, or of %v to try it", addr, may, try)
	}
	ep := m.endpoint(addr)
	m.flying[ep]++
	m.open = append(m.open, openPick{ep, done})
}

// wrong says in what the policy differs from the model.
func (m *history) wrong() string {
	for ep, want := range m.flying {
		if got, _ := ep.candidate.tally.read(); got != want {
			return fmt.Sprintf("%s has %d attempts in flight, want %d", ep.addr, got, want)
		}
	}
	return ""
}

// finish ends what is in flight, makes all endpoints well, and waits until each has a call.
func (m *history) finish() {
	m.t.Helper()
	for _, p := range m.open {
		m.flying[p.ep]--
		p.done(success)
	}
	m.open = nil
	if len(m.listed) == 0 {
		m.insert(0)
	}
	for _, l := range m.listed {
		l.draining = false
	}
	m.publish()
	for _, l := range m.listed {
		if l.ejected {
			m.healthy(l.addr)
			l.ejected = false
		}
		m.connect(l)
	}
	if problem := m.wrong(); problem != "" {
		m.t.Fatalf("at rest: %s", problem)
	}
	time.Sleep(2 * time.Minute)
	synctest.Wait()
	got := make(map[string]int)
	// An endpoint that has only failed gets a call if a pick explores, which one in 200 does,
	// and draws it, as one of two at least. That none of 25 times as many picks does so happens
	// in 1 of 1e10 histories.
	var all uint32
	least := m.listed[0].weight
	for _, l := range m.listed {
		all += l.weight
		least = min(least, l.weight)
	}
	for n := uint32(0); n < 25*200*all/(2*least) && len(got) < len(m.listed); n++ {
		addr, done := m.mustPick()
		time.Sleep(20 * time.Millisecond)
		done(success)
		got[addr]++
	}
	if len(got) < len(m.listed) {
		var listed []string
		for _, l := range m.listed {
			listed = append(listed, fmt.Sprintf("%s of weight %d", l.addr, l.weight))
		}
		m.t.Errorf("calls by endpoint are %v, want all of %v, with %s", got, listed, fuzzConfigs[m.config].js)
	}
}

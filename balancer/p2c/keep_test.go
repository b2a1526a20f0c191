// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package p2c

import (
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/channelz"
	"google.golang.org/grpc/connectivity"
	"google.golang.org/grpc/resolver"
)

func TestIdle(t *testing.T) {
	// idle waits until the channel has gone idle.
	idle := func(t *testing.T, w *wire) {
		t.Helper()
		ctx := testContext(t)
		for s := w.conn.GetState(); s != connectivity.Idle; s = w.conn.GetState() {
			if !w.conn.WaitForStateChange(ctx, s) {
				t.Fatalf("the channel is %v, want IDLE", s)
			}
		}
	}

	t.Run("meters are those of the same addresses and metric", func(t *testing.T) {
		w := newWire(t, newServers(t, 3), wireConfig{policy: `"load":{"peakEwma":{}}`, opts: []grpc.DialOption{grpc.WithIdleTimeout(20 * time.Millisecond)}})
		meters := func() map[string]*measure {
			t.Helper()
			if _, err := w.call(testContext(t), nil, grpc.WaitForReady(true)); err != nil {
				t.Fatal(err)
			}
			policies := policiesOf(w.target)
			p := policies[len(policies)-1]
			p.mu.Lock()
			defer p.mu.Unlock()
			m := make(map[string]*measure)
			for _, ep := range *p.all.Load() {
				m[ep.addr] = ep.candidate.meter.Load()
			}
			return m
		}
		first := meters()
		idle(t, w)
		w.r.InitialState(resolver.State{Endpoints: w.endpoints(w.servers[:2]...)})
		second := meters()
		if len(policiesOf(w.target)) != 2 || len(second) != 2 {
			t.Fatalf("%d policies and %d endpoints, want 2 and 2", len(policiesOf(w.target)), len(second))
		}
		for a, m := range second {
			if m != first[a] {
				t.Errorf("the meter of %s is another after the channel was idle", a)
			}
		}
	})
}

// Meters are kept for ten minutes. They do not keep a closed channel in memory.
func TestKeptMetersHoldNoEndpoint(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		w.p.opts.ChannelzParent = struct{ channelz.Identifier }{}
		w.warm(accruing(``), ten()...)
		w.serve(1000, failing("a"))
		_, late := w.mustPick()
		meters := make(map[string]*measure)
		for _, ep := range w.p.endpoints.All() {
			meters[ep.addr] = ep.candidate.meter.Load()
		}
		w.b.Close()
		w.settle()
		late(failureDone)
		for addr, m := range meters {
			if a := m.accrual.Load(); m.ep.Load() != nil || a.ep != nil || a.aside.Load() != (addr == "a") {
				t.Errorf("what is kept of %s holds the endpoint or does not know that it is aside", addr)
			}
		}
	})
}

func TestKeeper(t *testing.T) {
	parcelOf := func(closed time.Time, n int) *parcel {
		p := &parcel{closed: closed, meters: make(map[string]*measure)}
		for _, e := range endpoints(n) {
			p.meters[addressKey(e)] = new(measure)
		}
		return p
	}
	now := time.Now()
	var k keeper
	k.keep(parcelOf(now.Add(-keepFor), 3))
	k.keep(parcelOf(now.Add(-time.Second), 3))
	newest := parcelOf(now, 2)
	k.keep(newest)
	if len(k.parcels) != 2 {
		t.Errorf("%d parcels, want 2: one is too old", len(k.parcels))
	}
	if p := k.take(nil, some("elsewhere:1")); p != nil {
		t.Errorf("took %v for an address that is in none", p)
	}
	if p := k.take(nil, endpoints(2)); p == nil || len(p.meters) != 3 {
		t.Errorf("took %v, want the older of two that know both addresses", p)
	}
	large := parcelOf(now, keepMost-1)
	k.keep(large)
	if len(k.parcels) != 1 || k.parcels[0] != large {
		t.Errorf("%d parcels are left, want only the last: with the others it is too much", len(k.parcels))
	}
}

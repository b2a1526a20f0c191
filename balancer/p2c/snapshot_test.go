// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package p2c

import (
	"errors"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/balancer"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/connectivity"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/resolver"
	"google.golang.org/grpc/resolver/manual"
	"google.golang.org/grpc/status"

	testingv1 "github.com/belfry-go/belfry/proto/belfry/testing/v1"
)

func TestSnapshot(t *testing.T) {
	of := func(s Snapshot, addr string) EndpointSnapshot {
		t.Helper()
		for _, e := range s.Endpoints {
			if e.Addresses[0] == addr {
				return e
			}
		}
		t.Fatalf("no endpoint %s in %+v", addr, s)
		return EndpointSnapshot{}
	}

	t.Run("says what is known of each endpoint", func(t *testing.T) {
		bubble(t, func(t *testing.T, w *world) {
			w.start(pendingConfig, weighted("a", 3), one("b", "b2"), one("c"), one("d"))
			w.lose("c")
			w.fail("c")
			_, done := w.mustPick()
			_, _ = w.mustPick()
			time.Sleep(time.Second)
			done(balancer.DoneInfo{BytesSent: true, Err: status.Error(codes.Unavailable, "overloaded")})

			s := w.p.snapshot()
			if s.Target != w.p.target || s.State != connectivity.Ready || s.Picks != 2 {
				t.Errorf("snapshot of %s in %v with %d picks, want %s, READY, 2", s.Target, s.State, s.Picks, w.p.target)
			}
			var names []string
			inFlight, picks, failures, share := 0, uint64(0), uint64(0), 0.0
			for _, e := range s.Endpoints {
				names = append(names, strings.Join(e.Addresses, "+"))
				inFlight += e.InFlight
				picks += e.Picks
				failures += e.Failures
				share += e.Share
				if (e.Failures > 0) != (status.Code(e.LastFailure) == codes.Unavailable) || (e.Failures > 0) != e.FailedAt.Equal(time.Now()) {
					t.Errorf("%v: %d failures, the last %v at %v", e.Addresses, e.Failures, e.LastFailure, e.FailedAt)
				}
			}
			if want := []string{"a", "b+b2", "c", "d"}; !slices.Equal(names, want) {
				t.Errorf("endpoints %v, want %v", names, want)
			}
			if inFlight != 1 || picks != 2 || failures != 1 || share < 0.999 || share > 1.001 {
				t.Errorf("%d in flight, %d picks, %d failures, shares %v, want 1, 2, 1, 1", inFlight, picks, failures, share)
			}
			if e := of(s, "a"); e.Weight != 3 || e.State != connectivity.Ready {
				t.Errorf("a: weight %d in %v, want 3 and READY", e.Weight, e.State)
			}
			if e := of(s, "c"); e.State != connectivity.TransientFailure || e.Err == nil || !strings.Contains(e.Err.Error(), "cannot reach c") || e.PassedOver != NotReady {
				t.Errorf("c is %v, %v, %q", e.State, e.Err, e.PassedOver)
			}
		})
	})

	t.Run("says why an endpoint is passed over", func(t *testing.T) {
		bubble(t, func(t *testing.T, w *world) {
			w.start(`{"load":{"peakEwma":{"decay":"1000s","defaultRtt":"0.01s"}}}`, some("a", "b", "c", "d")...)
			// a answers in 10 ms, b in 1 s, c fails, d has a call in flight.
			latency := map[string]time.Duration{"a": 10 * time.Millisecond, "b": time.Second}
			seen := make(map[string]bool)
			for len(seen) < 4 {
				addr, done := w.mustPick()
				if seen[addr] {
					done(balancer.DoneInfo{})
					continue
				}
				seen[addr] = true
				switch addr {
				case "a", "b":
					time.Sleep(latency[addr])
					done(success)
				case "c":
					done(balancer.DoneInfo{BytesSent: true, Err: errors.New("no")})
				}
			}
			s := w.p.snapshot()
			for addr, want := range map[string]PassedOver{"a": "", "b": CostsMore, "c": OnlyFailed, "d": CostsMore} {
				if e := of(s, addr); e.PassedOver != want {
					t.Errorf("%s is passed over because %q, want %q: %+v", addr, e.PassedOver, want, e)
				}
			}
			if e := of(s, "a"); e.Latency < 9*time.Millisecond || e.Latency > 11*time.Millisecond {
				t.Errorf("a: latency %v, want 10ms", e.Latency)
			}
		})
	})

	t.Run("counts shares since the snapshot before", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			w := newWorld(t)
			w.start(constantConfig, some("a")...)
			w.counts(10)
			_ = w.p.snapshot()
			time.Sleep(shareAfter)
			w.start(constantConfig, some("b")...)
			w.start(constantConfig, some("a", "b")...)
			_ = w.p.snapshot()
			time.Sleep(shareAfter)
			if s := w.p.snapshot(); of(s, "a").Share != 0 {
				t.Errorf("share %v of no picks, want 0", of(s, "a").Share)
			}
			w.counts(1000)
			s := w.p.snapshot()
			if got := of(s, "a").Share + of(s, "b").Share; got < 0.999 || got > 1.001 {
				t.Errorf("the shares add up to %v, want 1", got)
			}
			w.b.Close()
			w.settle()
		})
	})

	t.Run("is found by channel while the policy lives", func(t *testing.T) {
		servers := newServers(t, 2)
		r := manual.NewBuilderWithScheme("belfrytest")
		r.InitialState(resolver.State{Endpoints: []resolver.Endpoint{servers[0].Endpoint(), servers[1].Endpoint()}})
		const target = "belfrytest:///snapshots"
		var conns []*grpc.ClientConn
		for range 2 {
			conn, err := grpc.NewClient(target, append(DialOptions(), grpc.WithResolvers(r), grpc.WithTransportCredentials(insecure.NewCredentials()))...)
			if err != nil {
				t.Fatal(err)
			}
			defer conn.Close()
			conns = append(conns, conn)
		}
		if got := SnapshotsOf(conns[0]); len(got) != 0 {
			t.Errorf("%d snapshots before the first call, want none", len(got))
		}
		for i, conn := range conns {
			for range i + 1 {
				if _, err := testingv1.NewTestServiceClient(conn).Unary(testContext(t), &testingv1.UnaryRequest{}, grpc.WaitForReady(true)); err != nil {
					t.Fatal(err)
				}
			}
		}
		for i, conn := range conns {
			if got := SnapshotsOf(conn); len(got) != 1 || got[0].Target != target || !strings.HasPrefix(got[0].Channel, "Channel #") || got[0].Picks != uint64(i+1) || len(got[0].Endpoints) != 2 {
				t.Errorf("channel %d: %+v, want one snapshot with %d picks", i, got, i+1)
			}
		}
		conns[0].Close()
		found := 0
		for _, s := range Snapshots() {
			if s.Target == target {
				found++
			}
		}
		if found != 1 || len(SnapshotsOf(conns[0])) != 0 {
			t.Errorf("%d snapshots after one of two channels was closed, want 1", found)
		}
	})

	t.Run("of many endpoints costs a few allocations", func(t *testing.T) {
		_, lb := subjects[0].start(t, 1000)
		defer lb.Close()
		if n := testing.AllocsPerRun(5, func() { lb.(*policy).snapshot() }); n > 20 {
			t.Errorf("%v allocations, want at most 20", n)
		}
	})
}

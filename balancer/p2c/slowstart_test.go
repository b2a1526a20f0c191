// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package p2c

import (
	"math"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc/balancer"
	"google.golang.org/grpc/connectivity"
)

// Shares are of 4,000 picks, with a standard deviation of at most 0.5 % of them; the bounds
// are six of those at least, so that a share misses them in less than 1 of 1e8 runs.
func TestSlowStart(t *testing.T) {
	const (
		config = `,"exploreEvery":0,"slowStart":{"window":"60s"}}`
		random = `{"load":{"constant":{}}` + config
	)
	share := func(w *world, addr string, callers int) float64 {
		t.Helper()
		const n = 4000
		var open []func(balancer.DoneInfo)
		got := 0
		for range n {
			a, done := w.mustPick()
			if a == addr {
				got++
			}
			if open = append(open, done); len(open) == callers {
				open[0](success)
				open = open[1:]
			}
		}
		for _, done := range open {
			done(success)
		}
		return float64(got) / n
	}
	want := func(t *testing.T, when string, got, want, within float64) {
		t.Helper()
		if math.Abs(got-want) > within {
			t.Errorf("%s: share is %.3f, want %.3f", when, got, want)
		}
	}
	wait := func(d time.Duration) {
		time.Sleep(d)
		synctest.Wait()
	}

	t.Run("a newcomer's share rises over the window", func(t *testing.T) {
		bubble(t, func(t *testing.T, w *world) {
			r := w.record()
			w.warm(random, ten()[:9]...)
			if w.p.ready.unequal.Load() {
				t.Error("weights differ among the endpoints of the first list")
			}
			w.start(random, some(ten()...)...)
			if got := r.values["endpoint_conditions slow_start"]; got != 1 {
				t.Errorf("metrics are %v, want one endpoint in slow_start", r.values)
			}
			want(t, "at first", share(w, "j", 1), 0.1/9.1, 0.011)
			wait(30 * time.Second)
			want(t, "after half of the window", share(w, "j", 1), 0.5/9.5, 0.025)
			if e := w.of("j"); math.Abs(e.ShareAllowed-0.5) > 0.02 || e.Weight != 1 {
				t.Errorf("the snapshot has a part of %v and weight %d, want 0.5 and 1", e.ShareAllowed, e.Weight)
			}
			wait(31 * time.Second)
			want(t, "after the window", share(w, "j", 1), 0.1, 0.03)
			if w.p.ready.unequal.Load() || len(w.p.ramps.endpoints) != 0 {
				t.Error("weights differ after the window")
			}
			if got := r.values["endpoint_conditions slow_start"]; got != 0 {
				t.Errorf("metrics are %v, want no endpoint in slow_start", r.values)
			}
		})
	})

	// Attempts in flight count per weight. So a new endpoint gets no more than its share if it
	// looks idle, and no less if it looks slow.
	for _, metric := range []string{`"expectedLatency":{}`, `"pendingRequests":{}`} {
		for _, callers := range []int{1, 100} {
			t.Run("is neither flooded nor forgotten: "+metric, func(t *testing.T) {
				bubble(t, func(t *testing.T, w *world) {
					c := `{"load":{` + metric + `}` + config
					w.start(c, some(ten()[:9]...)...)
					share(w, "j", callers)
					time.Sleep(10 * time.Millisecond)
					w.start(c, some(ten()...)...)
					if got := share(w, "j", callers); got < 0.002 || got > 0.03 {
						t.Errorf("%d callers: share at first is %.4f, want about 0.011", callers, got)
					}
					wait(30 * time.Second)
					if got := share(w, "j", callers); got < 0.02 || got > 0.09 {
						t.Errorf("%d callers: share after half of the window is %.4f, want about 0.053", callers, got)
					}
				})
			})
		}
	}

	t.Run("keeps weights", func(t *testing.T) {
		bubble(t, func(t *testing.T, w *world) {
			w.start(random, weighted("a", 1), weighted("b", 3))
			want(t, "of the first list", share(w, "b", 1), 0.75, 0.05)
			w.start(random, weighted("a", 1), weighted("b", 3), weighted("c", 4))
			want(t, "at first", share(w, "c", 1), 0.4/4.4, 0.03)
			wait(61 * time.Second)
			want(t, "after the window", share(w, "c", 1), 0.5, 0.05)
			w.start(random, weighted("a", 1<<30), weighted("b", 1<<30), weighted("c", 1<<31))
			want(t, "with great weights", share(w, "c", 1), 0.5, 0.05)
		})
	})

	t.Run("one that could not be reached starts slowly, one whose connection is renewed does not", func(t *testing.T) {
		bubble(t, func(t *testing.T, w *world) {
			w.warm(random, ten()...)
			w.lose("a")
			w.ready("a")
			want(t, "renewed", share(w, "a", 1), 0.1, 0.03)
			w.lose("a")
			w.fail("a")
			w.move("a", connectivity.Idle)
			w.ready("a")
			want(t, "reached again", share(w, "a", 1), 0.1/9.1, 0.011)
			wait(61 * time.Second)
			w.sick("b")
			w.healthy("b")
			want(t, "let in again", share(w, "b", 1), 0.1/9.1, 0.011)
		})
	})

	t.Run("one that was put aside starts slowly", func(t *testing.T) {
		bubble(t, func(t *testing.T, w *world) {
			w.warm(`{"load":{"constant":{}},"failureAccrual":{}`+config, ten()...)
			w.serve(1000, failing("a"))
			wait(5 * time.Second)
			w.counts(1)
			want(t, "back", share(w, "a", 1), 0.1/9.1, 0.011)
		})
	})

	t.Run("works at one call a minute", func(t *testing.T) {
		bubble(t, func(t *testing.T, w *world) {
			c := `{"load":{"constant":{}},"slowStart":{"window":"3600s"}}`
			w.warm(c, "a", "b")
			w.start(c, some("a", "b", "c")...)
			got := 0
			for range 600 {
				got += w.counts(1)["c"]
				wait(time.Minute)
			}
			// Mean 190, standard deviation 11.
			if got < 120 || got > 260 {
				t.Errorf("the newcomer got %d of 600 calls, want about 190", got)
			}
		})
	})

	t.Run("a config without it gives the share at once", func(t *testing.T) {
		bubble(t, func(t *testing.T, w *world) {
			w.warm(random, ten()[:9]...)
			w.start(random, some(ten()...)...)
			w.start(`{"load":{"constant":{}},"exploreEvery":0}`, some(ten()...)...)
			want(t, "without", share(w, "j", 1), 0.1, 0.03)
			if w.p.ready.unequal.Load() {
				t.Error("weights differ")
			}
		})
	})
}

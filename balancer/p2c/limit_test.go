// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package p2c

import (
	"context"
	"encoding/json"
	"fmt"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc/balancer"
	"google.golang.org/grpc/codes"
	estats "google.golang.org/grpc/experimental/stats"
	"google.golang.org/grpc/status"
)

const (
	limitedTo1    = `{"endpointLimit":{"fixed":1},"load":{"pendingRequests":{}}}`
	limitedTo2    = `{"endpointLimit":{"fixed":2},"load":{"pendingRequests":{}}}`
	limitedByAuto = `{"endpointLimit":{"auto":{"initial":2}},"load":{"pendingRequests":{}}}`
)

// picked is the end of a pick that may have waited.
type picked struct {
	addr string
	done func(balancer.DoneInfo)
	err  error
}

// waiting starts a pick on a goroutine and returns when that is over or waits.
func (w *world) waiting(ctx context.Context) <-chan picked {
	end := make(chan picked, 1)
	go func() {
		addr, done, err := w.pickWith(ctx)
		end <- picked{addr, done, err}
	}()
	synctest.Wait()
	return end
}

// wantWaiting fails the test unless so many picks wait.
func (w *world) wantWaiting(when string, want int, ends ...<-chan picked) {
	w.t.Helper()
	synctest.Wait()
	n := 0
	for _, end := range ends {
		if len(end) == 0 {
			n++
		}
	}
	if got := int(w.p.queue.waiting.Load()); n != want || got != want {
		w.t.Fatalf("%s: %d picks wait, and the queue says %d; want %d", when, n, got, want)
	}
}

func TestLimit(t *testing.T) {
	bg := context.Background()
	t.Run("full_endpoints_are_passed_over", func(t *testing.T) {
		for _, config := range []string{
			limitedTo2,
			`{"endpointLimit":{"fixed":2}}`, // The default metric looks at all.
			`{"endpointLimit":{"fixed":2},"load":{"constant":{}}}`,
		} {
			bubble(t, func(t *testing.T, w *world) {
				w.start(config, endpoints(20)...)
				counts := map[string]int{}
				for range 40 {
					addr, _ := w.mustPick()
					counts[addr]++
				}
				for addr, n := range counts {
					if n != 2 {
						t.Errorf("%s: %d of 40 picks for %s, want 2 for each of 20", config, n, addr)
					}
				}
			})
		}
	})
	t.Run("first_come_first_served", func(t *testing.T) {
		bubble(t, func(t *testing.T, w *world) {
			w.start(limitedTo1, some("a", "b")...)
			first, done1 := w.mustPick()
			second, done2 := w.mustPick()
			c, d, e := w.waiting(bg), w.waiting(bg), w.waiting(bg)
			w.wantWaiting("both are full", 3, c, d, e)
			done2(success)
			w.wantWaiting("one attempt has ended", 2, c, d, e)
			if got := <-c; got.err != nil || got.addr != second {
				t.Errorf("the first that waited got %+v, want %s", got, second)
			}
			done1(success)
			if got := <-d; got.err != nil || got.addr != first {
				t.Errorf("the second that waited got %+v, want %s", got, first)
			}
			late := w.waiting(bg)
			w.wantWaiting("another call came", 2, e, late)
		})
	})
	t.Run("too_many_wait", func(t *testing.T) {
		bubble(t, func(t *testing.T, w *world) {
			w.start(`{"endpointLimit":{"fixed":1,"maxWaiting":1}}`, some("a")...)
			w.mustPick()
			end := w.waiting(bg)
			if _, _, err := w.pick(); status.Code(err) != codes.Unavailable || !strings.Contains(err.Error(), "endpointLimit") {
				t.Errorf("the second call that would wait: %v, want UNAVAILABLE and the name of the setting", err)
			}
			w.wantWaiting("after the refusal", 1, end)
		})
	})
	t.Run("context_ends", func(t *testing.T) {
		bubble(t, func(t *testing.T, w *world) {
			w.start(limitedTo1, some("a")...)
			_, done := w.mustPick()
			ctx, cancel := context.WithCancel(bg)
			gone, next := w.waiting(ctx), w.waiting(bg)
			cancel()
			if got := <-gone; got.err != balancer.ErrNoSubConnAvailable {
				t.Errorf("got %+v, want the error that lets gRPC end the call", got)
			}
			w.wantWaiting("one has gone", 1, next)
			done(success)
			if got := <-next; got.err != nil {
				t.Errorf("the one that stayed: %v", got.err)
			}
		})
	})
	t.Run("attempt_that_is_not_sent", func(t *testing.T) {
		bubble(t, func(t *testing.T, w *world) {
			w.start(limitedTo1, some("a")...)
			for range 3 {
				_, done := w.mustPick()
				done(balancer.DoneInfo{})
			}
			if got := w.p.totalLoad(); got != 0 {
				t.Errorf("%d attempts in flight, want none", got)
			}
		})
	})
	t.Run("endpoint_becomes_ready", func(t *testing.T) {
		bubble(t, func(t *testing.T, w *world) {
			if err := w.update(limitedTo1, some("a", "b")...); err != nil {
				t.Fatal(err)
			}
			w.settle()
			w.ready("a")
			w.mustPick()
			c, d := w.waiting(bg), w.waiting(bg)
			w.ready("b")
			w.wantWaiting("b is ready", 1, c, d)
			if got := <-c; got.addr != "b" {
				t.Errorf("got %+v, want b", got)
			}
		})
	})
	t.Run("last_endpoint_leaves", func(t *testing.T) {
		bubble(t, func(t *testing.T, w *world) {
			w.start(limitedTo1, some("a")...)
			w.mustPick()
			end := w.waiting(bg)
			w.lose("a")
			if got := <-end; got.err != balancer.ErrNoSubConnAvailable {
				t.Errorf("got %+v, want the error that lets gRPC ask the next picker", got)
			}
			w.wantWaiting("a is gone", 0)
		})
	})
	t.Run("weight_changes_meanwhile", func(t *testing.T) {
		bubble(t, func(t *testing.T, w *world) {
			w.start(limitedTo1, weighted("a", 1))
			_, done := w.mustPick()
			end := w.waiting(bg)
			w.start(limitedTo1, weighted("a", 7))
			w.wantWaiting("the weight has changed", 1, end)
			done(success)
			if got := <-end; got.err != nil || got.addr != "a" {
				t.Errorf("got %+v, want a", got)
			}
		})
	})
	t.Run("config_changes", func(t *testing.T) {
		for _, config := range []string{limitedTo2, pendingConfig, limitedByAuto, `{"endpointLimit":{"fixed":2}}`} {
			bubble(t, func(t *testing.T, w *world) {
				w.start(limitedTo1, some("a")...)
				_, done := w.mustPick()
				end := w.waiting(bg)
				w.start(config, some("a")...)
				if got := <-end; got.err != balancer.ErrNoSubConnAvailable {
					t.Fatalf("%s: got %+v, want the error that lets gRPC ask the next picker", config, got)
				}
				if _, _, err := w.pick(); err != nil {
					t.Errorf("%s: a pick by the next picker: %v", config, err)
				}
				w.start(limitedTo1, some("a")...)
				again := w.waiting(bg)
				done(success)
				w.wantWaiting("two were in flight, and one has ended", 1, again)
			})
		}
	})
	t.Run("the_policy_is_closed", func(t *testing.T) {
		bubble(t, func(t *testing.T, w *world) {
			w.start(limitedTo1, some("a")...)
			w.mustPick()
			end := w.waiting(bg)
			w.b.Close()
			if got := <-end; got.err != balancer.ErrNoSubConnAvailable {
				t.Errorf("got %+v, want the error that lets gRPC end the call", got)
			}
			if _, _, err := w.pick(); err != balancer.ErrNoSubConnAvailable {
				t.Errorf("a late pick: %v, want the same", err)
			}
			w.b = newWorld(t).b // bubble closes it.
		})
	})
	t.Run("a_tried_endpoint_only_if_no_other_has_room", func(t *testing.T) {
		bubble(t, func(t *testing.T, w *world) {
			w.start(limitedTo2, some("a", "b", "c")...)
			ctx := func() context.Context { return tried(w.endpoint("a")) }
			for range 2 {
				w.endpoint("b").busy(1)
			}
			for _, want := range []string{"c", "c", "a", "a"} {
				if addr, _, err := w.pickWith(ctx()); err != nil || addr != want {
					t.Errorf("got %s, %v; want %s", addr, err, want)
				}
			}
		})
	})
}

// An algorithm finds the limit of each endpoint. It lowers that of a slow endpoint only.
func TestLimitAuto(t *testing.T) {
	bubble(t, func(t *testing.T, w *world) {
		w.start(`{"endpointLimit":{"auto":{"initial":10}},"load":{"constant":{}}}`, some("fast", "slow")...)
		most := func(addr string) int64 { return w.endpoint(addr).candidate.meter.Load().room.most.Load() }
		takes := map[string]time.Duration{"fast": 10 * time.Millisecond, "slow": 10 * time.Millisecond}
		run := func(d time.Duration) {
			var wg sync.WaitGroup
			for start := time.Now(); time.Since(start) < d; time.Sleep(time.Millisecond) {
				wg.Go(func() {
					addr, done, err := w.pick()
					if err != nil {
						t.Error(err)
						return
					}
					time.Sleep(takes[addr])
					done(success)
				})
			}
			wg.Wait()
		}
		run(2 * time.Second)
		if f, s := most("fast"), most("slow"); f < 10 || s < 10 {
			t.Fatalf("limits %d and %d of endpoints without a queue, want at least 10", f, s)
		}
		takes["slow"] = 100 * time.Millisecond
		run(3 * time.Second)
		if f, s := most("fast"), most("slow"); f < 10 || s >= 10 {
			t.Errorf("limits %d of the fast endpoint and %d of the slow one, want at least 10 and less than 10", f, s)
		}
		if err := w.update(`{"endpointLimit":{"auto":{"max":5}},"load":{"constant":{}}}`, w.list...); err != nil {
			t.Fatal(err)
		}
		if f := most("fast"); f != 5 {
			t.Errorf("limit %d after the bound was lowered to 5", f)
		}
	})
}

// In any order of picks, ends, cancellations, new weights and new metrics an endpoint has at
// most its limit in flight, and at the end no call waits. A lost wake-up would leave a call
// waiting.
func TestLimitRandom(t *testing.T) {
	rng := newRand(t)
	for range 10 {
		bubble(t, func(t *testing.T, w *world) {
			w.cc.Hold = false
			most := 1 + rng.IntN(3)
			config := func(load string) string {
				return fmt.Sprintf(`{"endpointLimit":{"fixed":%d},"choiceCount":2,"load":{%q:{}}}`, most, load)
			}
			w.start(config("constant"), some("a", "b", "c")...)
			eps := []*endpoint{w.endpoint("a"), w.endpoint("b"), w.endpoint("c")}
			over := make(chan struct{})
			var callers, changer sync.WaitGroup
			for range 12 {
				ctx, cancel := context.WithCancel(context.Background())
				stop := rng.IntN(200)
				callers.Go(func() {
					defer cancel()
					for i := range 150 {
						if i == stop {
							time.AfterFunc(time.Microsecond, cancel)
						}
						_, done, err := w.pickWith(ctx)
						if err == balancer.ErrNoSubConnAvailable && ctx.Err() == nil {
							continue
						}
						if err != nil {
							return
						}
						for _, ep := range eps {
							if attempts, streams := ep.candidate.tally.read(); attempts+streams > most {
								t.Errorf("%d in flight to %s, want at most %d", attempts+streams, ep.addr, most)
							}
						}
						if i%3 == 0 {
							time.Sleep(time.Microsecond)
						}
						done(success)
					}
				})
			}
			weights := []uint32{uint32(rng.IntN(5)), uint32(rng.IntN(5)), uint32(rng.IntN(5))}
			changer.Go(func() {
				for i := 0; ; i++ {
					select {
					case <-over:
						return
					case <-time.After(time.Microsecond):
					}
					load := []string{"constant", "pendingRequests"}[i/2%2]
					if err := w.update(config(load), weighted("a", weights[i%3]), weighted("b", weights[(i+1)%3]), weighted("c", 1)); err != nil {
						t.Error(err)
					}
				}
			})
			callers.Wait()
			close(over)
			changer.Wait()
			if n, waiting := w.p.totalLoad(), w.p.queue.waiting.Load(); n != 0 || waiting != 0 {
				t.Errorf("at rest %d attempts are in flight and %d wait", n, waiting)
			}
		})
	}
}

// A snapshot shows the limits, who is full and how many wait.
func TestLimitSnapshot(t *testing.T) {
	bubble(t, func(t *testing.T, w *world) {
		w.start(limitedTo1, some("a")...)
		_, done := w.mustPick()
		end := w.waiting(context.Background())
		s := w.p.snapshot()
		if e := s.Endpoints[0]; s.Waiting != 1 || e.Limit != 1 || e.PassedOver != Full {
			t.Errorf("snapshot %+v, want one call waiting, and an endpoint that is full with a limit of 1", s)
		}
		done(success)
		got := <-end
		got.done(success)
		w.start(limitedByAuto, some("a")...)
		for range 100 {
			_, done := w.mustPick()
			time.Sleep(10 * time.Millisecond)
			done(success)
		}
		// The first calls are the algorithm's first cohort, of at least 40.
		if e := w.p.snapshot().Endpoints[0]; e.Limit != 2 || e.Algorithm.Baseline != 10*time.Millisecond || e.PassedOver != "" {
			t.Errorf("endpoint %+v, want a limit of 2, and a baseline of 10ms", e)
		}
		w.start(pendingConfig, some("a")...)
		if e := w.p.snapshot().Endpoints[0]; e.Limit != 0 {
			t.Errorf("limit %d without one, want 0", e.Limit)
		}
	})
}

// Picks that find all endpoints full are counted by what became of them.
func TestLimitMetrics(t *testing.T) {
	bubble(t, func(t *testing.T, w *world) {
		r := &fullPicks{n: map[string]int64{}}
		w.start(`{"endpointLimit":{"fixed":1,"maxWaiting":1}}`, some("a")...)
		w.p.metrics.recorder = r
		_, done := w.mustPick()
		end := w.waiting(context.Background())
		w.pick()
		done(success)
		<-end
		if r.n["waited"] != 1 || r.n["refused"] != 1 {
			t.Errorf("full picks by result: %v, want one of each", r.n)
		}
	})
}

// fullPicks records the metric of full picks by result.
type fullPicks struct {
	estats.UnimplementedMetricsRecorder
	mu sync.Mutex // guards n
	n  map[string]int64
}

func (r *fullPicks) RecordInt64Count(h *estats.Int64CountHandle, incr int64, labels ...string) {
	if h == fullPicksMetric {
		r.mu.Lock()
		defer r.mu.Unlock()
		r.n[labels[1]] += incr
	}
}

func TestLimitConfig(t *testing.T) {
	for _, test := range []struct{ js, want string }{
		{`{"endpointLimit":{"fixed":0}}`, "belfry.p2c: endpointLimit.fixed: 0, must be between 1 and 2147483647"},
		{`{"endpointLimit":{"fixed":4294967295}}`, "endpointLimit.fixed: 4294967295, must be"},
		{`{"endpointLimit":{"auto":{"min":-1}}}`, "endpointLimit.auto.min: -1, must be from 1"},
		{`{"endpointLimit":{"auto":{"min":5,"max":4}}}`, "endpointLimit.auto.max: 4, must be from Min, 5"},
	} {
		if _, err := parseConfig(json.RawMessage(test.js)); err == nil || !strings.Contains(err.Error(), test.want) {
			t.Errorf("%s: %v, want an error with %q", test.js, err, test.want)
		}
	}
	for js, want := range map[string]*limitConfig{
		`{}`:                                 nil,
		`{"endpointLimit":{}}`:               {maxWaiting: 1000},
		`{"endpointLimit":{"maxWaiting":0}}`: {},
		`{"endpointLimit":{"fixed":7}}`:      {fixed: 7, maxWaiting: 1000},
	} {
		c, err := parseConfig(json.RawMessage(js))
		if err != nil || (c.limit == nil) != (want == nil) || want != nil && *c.limit != *want {
			t.Errorf("%s: %+v, %v; want %+v", js, c, err, want)
		}
	}
}

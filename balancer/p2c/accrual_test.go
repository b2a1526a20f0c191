// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package p2c

import (
	"context"
	"errors"
	"fmt"
	"net/url"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc/balancer"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/connectivity"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/resolver"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/durationpb"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
)

// accruing returns a config by which each endpoint gets an equal share at random.
func accruing(fields string) string {
	if fields != "" {
		fields = "," + fields
	}
	fields = `"useEjected":true` + fields
	return `{"load":{"constant":{}},"exploreEvery":0,"failureAccrual":{` + fields + `}}`
}

var (
	errDown     = status.Error(codes.Unavailable, "down")
	errTooMuch  = status.Error(codes.ResourceExhausted, "too much")
	failureDone = balancer.DoneInfo{BytesSent: true, BytesReceived: true, Err: errDown}
	refusedDone = balancer.DoneInfo{BytesSent: true, BytesReceived: true, Err: errTooMuch}
)

// serve makes n calls, one after the other, each of which ends as end says for its
// address, and returns how many each address got.
func (w *world) serve(n int, end func(addr string) balancer.DoneInfo) map[string]int {
	w.t.Helper()
	m := make(map[string]int)
	for range n {
		addr, done := w.mustPick()
		m[addr]++
		done(end(addr))
	}
	return m
}

// warm is start, and makes calls until each endpoint has answered, because one that has only
// failed is passed over in any case. That one of ten gets none happens in 1 of 1e21 runs.
func (w *world) warm(config string, addrs ...string) {
	w.t.Helper()
	w.start(config, some(addrs...)...)
	w.counts(500)
}

// record makes the channel record its metrics. Call it before start.
func (w *world) record() *fakeRecorder {
	r := &fakeRecorder{values: make(map[string]int64)}
	w.cc.Recorder = r
	w.p.opts.Target = resolver.Target{URL: url.URL{Scheme: "test", Path: "/orders"}}
	return r
}

// failing ends the calls of some addresses with a failure.
func failing(addrs ...string) func(string) balancer.DoneInfo {
	return func(addr string) balancer.DoneInfo {
		for _, a := range addrs {
			if a == addr {
				return failureDone
			}
		}
		return success
	}
}

// of returns the snapshot of an endpoint.
func (w *world) of(addr string) EndpointSnapshot {
	w.t.Helper()
	for _, e := range w.p.snapshot().Endpoints {
		if e.Addresses[0] == addr {
			return e
		}
	}
	w.t.Fatalf("no endpoint %s", addr)
	return EndpointSnapshot{}
}

// wantAside checks that an endpoint is put aside for a time between two bounds.
func (w *world) wantAside(addr string, least, most time.Duration) {
	w.t.Helper()
	e := w.of(addr)
	if e.PassedOver != Aside {
		w.t.Fatalf("%s is passed over for %q, want %q", addr, e.PassedOver, Aside)
	}
	if d := time.Until(e.AsideUntil); d < least || d > most {
		w.t.Errorf("%s is aside for %v, want %v to %v", addr, d, least, most)
	}
}

func ten() []string {
	var addrs []string
	for i := range 10 {
		addrs = append(addrs, string(rune('a'+i)))
	}
	return addrs
}

func TestAccrual(t *testing.T) {
	run := func(name, config string, addrs []string, f func(t *testing.T, w *world)) {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(t *testing.T, w *world) {
				w.warm(config, addrs...)
				f(t, w)
			})
		})
	}

	run("puts aside after five failures in a row and tries again with one call", accruing(``), ten(), func(t *testing.T, w *world) {
		if got := w.serve(1000, failing("a"))["a"]; got != 5 {
			t.Errorf("%d calls failed, want 5", got)
		}
		w.wantAside("a", 3*time.Second, 4500*time.Millisecond)
		for i, most := range []time.Duration{9, 18, 36, 72, 90, 90} {
			time.Sleep(time.Until(w.of("a").AsideUntil))
			synctest.Wait()
			if got := w.serve(100, failing("a"))["a"]; got != 1 {
				t.Errorf("%d calls tried the endpoint the %d. time, want 1", got, i+1)
			}
			w.wantAside("a", most*time.Second/3*2, most*time.Second)
		}
		time.Sleep(time.Until(w.of("a").AsideUntil))
		synctest.Wait()
		if addr, done := w.mustPick(); addr != "a" {
			t.Errorf("the next call went to %s, want a, whose time aside has passed", addr)
		} else {
			done(success)
		}
		// Of 1,000 picks a gets a tenth; fewer than 40 in 1 of 1e12 runs.
		if got := w.counts(1000)["a"]; got < 40 {
			t.Errorf("%d of 1000 calls went to the endpoint that is back, want about 100", got)
		}
	})

	run("an answer ends the row", accruing(`"successRate":0`), ten(), func(t *testing.T, w *world) {
		n := 0
		got := w.serve(2000, func(addr string) balancer.DoneInfo {
			if addr == "a" {
				if n++; n%5 != 0 {
					return failureDone
				}
			}
			return success
		})
		if w.of("a").PassedOver == Aside || got["a"] < 100 {
			t.Errorf("after %d calls of which four in a row fail the endpoint is aside", got["a"])
		}
	})

	run("an answer of a call that was sent before does not end the row", accruing(``), list("a", "b", "c"), func(t *testing.T, w *world) {
		var old []func(balancer.DoneInfo)
		for len(old) < 20 {
			addr, done := w.mustPick()
			if addr != "a" {
				done(success)
				continue
			}
			old = append(old, done)
		}
		failed := 0
		for w.of("a").PassedOver != Aside && failed < 20 {
			addr, done := w.mustPick()
			if addr != "a" {
				done(success)
				continue
			}
			failed++
			done(failureDone)
			old[failed](success)
		}
		if failed != 5 {
			t.Errorf("%d calls failed, want 5", failed)
		}
		for _, done := range append(old[:1], old[failed+1:]...) {
			done(success)
		}
		w.wantAside("a", 3*time.Second, 5*time.Second)
	})

	run("one that fails half its calls is aside within 20 of them", accruing(``), ten(), func(t *testing.T, w *world) {
		n := 0
		w.serve(2000, func(addr string) balancer.DoneInfo {
			if addr == "a" {
				if n++; n%2 == 1 {
					return failureDone
				}
			}
			return success
		})
		if w.of("a").PassedOver != Aside || n > 20 {
			t.Errorf("after %d calls it is passed over for %q, want %q within 20", n, w.of("a").PassedOver, Aside)
		}
	})

	run("failures that are far apart are no rate", accruing(``), list("a", "b", "c"), func(t *testing.T, w *world) {
		for range 50 {
			w.serve(1, failing("a", "b", "c"))
			w.serve(40, failing())
			time.Sleep(11 * time.Second)
		}
		for _, a := range list("a", "b", "c") {
			if w.of(a).PassedOver == Aside {
				t.Errorf("%s is aside", a)
			}
		}
	})

	run("refusals for rate count for the rate and not for the row", accruing(`"minAttempts":15`), ten(), func(t *testing.T, w *world) {
		refusing := func(addr string) balancer.DoneInfo {
			if addr == "a" {
				return refusedDone
			}
			return success
		}
		if got := w.serve(2000, refusing)["a"]; got != 15 {
			t.Errorf("%d calls were refused, want 15", got)
		}
		time.Sleep(time.Until(w.of("a").AsideUntil))
		synctest.Wait()
		if got := w.serve(200, refusing)["a"]; got != 1 {
			t.Errorf("%d calls were refused while aside, want 1", got)
		}
		w.wantAside("a", 6*time.Second, 9*time.Second)
	})

	for _, test := range []struct {
		name string
		done balancer.DoneInfo
	}{
		{"pushback", balancer.DoneInfo{BytesSent: true, Err: errDown, Trailer: metadata.Pairs("grpc-retry-pushback-ms", "20000")}},
		{"RetryInfo", balancer.DoneInfo{BytesSent: true, Err: must(status.New(codes.Unavailable, "").WithDetails(&errdetails.RetryInfo{RetryDelay: durationpb.New(20 * time.Second)})).Err()}},
	} {
		run("a server's "+test.name+" sets the time", accruing(``), ten(), func(t *testing.T, w *world) {
			n := 0
			w.serve(1000, func(addr string) balancer.DoneInfo {
				if addr != "a" {
					return success
				}
				if n++; n < 5 { // a server that sends a pushback gets fewer calls in any case
					return failureDone
				}
				return test.done
			})
			w.wantAside("a", 20*time.Second, 30*time.Second)
		})
	}

	run("a call does not try an endpoint that failed it", accruing(``), ten(), func(t *testing.T, w *world) {
		w.serve(1000, failing("a"))
		time.Sleep(5 * time.Second)
		synctest.Wait()
		addr, done, err := w.pickWith(tried(w.endpoint("a")))
		if err != nil || addr == "a" {
			t.Fatalf("the call that a has failed was sent to %q (%v)", addr, err)
		}
		done(success)
		if addr, _ := w.mustPick(); addr != "a" {
			t.Errorf("the next call went to %s, want a", addr)
		}
	})

	run("another call tries where the first has no result", accruing(``), ten(), func(t *testing.T, w *world) {
		w.serve(1000, failing("a"))
		time.Sleep(5 * time.Second)
		synctest.Wait()
		addr, hung := w.mustPick()
		if addr != "a" || w.counts(100)["a"] != 0 {
			t.Fatal("want one call to try the endpoint")
		}
		time.Sleep(3 * time.Second)
		synctest.Wait()
		addr, done := w.mustPick()
		if addr != "a" {
			t.Fatalf("the call went to %s, want a", addr)
		}
		done(success)
		if w.of("a").PassedOver == Aside {
			t.Error("the endpoint is aside, and has answered")
		}
		hung(failureDone)
		if w.of("a").PassedOver == Aside {
			t.Error("the endpoint is aside for a call that was sent before it was back")
		}
	})

	run("an endpoint with a new connection is tried at once", accruing(``), ten(), func(t *testing.T, w *world) {
		w.serve(1000, failing("a"))
		w.lose("a")
		w.ready("a")
		if got := w.serve(100, failing("a"))["a"]; got != 1 {
			t.Errorf("%d calls tried the endpoint, want 1", got)
		}
	})

	run("works at one call a minute", accruing(`"maxTime":"600s"`), ten(), func(t *testing.T, w *world) {
		// Calls try it after 1, 1, 1, 1, 2, 3, ... and in the end every 10 to 15 minutes. If it
		// were not aside, a tenth of all calls would go to it: some 145 in a day.
		failed := w.serve(100, failing("a"))["a"]
		for range 24 * 60 {
			time.Sleep(time.Minute)
			synctest.Wait()
			failed += w.serve(1, failing("a"))["a"]
		}
		if failed < 90 || failed > 160 {
			t.Errorf("%d of a day's %d calls failed, want one every 10 to 15 minutes", failed, 24*60)
		}
		for range 16 {
			time.Sleep(time.Minute)
			synctest.Wait()
			w.serve(1, failing())
		}
		if p := w.of("a").PassedOver; p == Aside {
			t.Errorf("after 16 calls the endpoint, which is well, is passed over for %q", p)
		}
	})

	run("a change of the metric keeps what is aside, a config without accrual does not", accruing(``), ten(), func(t *testing.T, w *world) {
		w.serve(1000, failing("a"))
		w.start(`{"load":{"peakEwma":{}},"failureAccrual":{}}`, w.list...)
		w.wantAside("a", 3*time.Second, 5*time.Second)
		w.start(`{"load":{"constant":{}},"failureAccrual":{"failures":0,"successRate":0}}`, w.list...)
		if got := w.counts(1000)["a"]; got < 40 {
			t.Errorf("%d of 1000 calls went to the endpoint, want about 100", got)
		}
		if _, done := w.mustPick(); done != nil {
			done(failureDone)
		}
		time.Sleep(time.Minute)
	})

	run("a call that waits for room tries it", `{"load":{"constant":{}},"endpointLimit":{"fixed":1},"failureAccrual":{}}`, list("a", "b", "c"), func(t *testing.T, w *world) {
		w.serve(100, failing("a"))
		var held []func(balancer.DoneInfo)
		for range 2 {
			_, done := w.mustPick()
			held = append(held, done)
		}
		var wg sync.WaitGroup
		wg.Go(func() {
			_, done, err := w.pick()
			if err != nil {
				t.Errorf("the call that waits: %v", err)
				return
			}
			done(success)
		})
		synctest.Wait()
		time.Sleep(5 * time.Second)
		synctest.Wait()
		addr, done := w.mustPick()
		if addr != "a" {
			t.Errorf("the call went to %s, want a", addr)
		}
		done(success)
		wg.Wait() // It gets the room of a.
		for _, done := range held {
			done(success)
		}
	})

	run("says so once for each change", accruing(``), ten(), func(t *testing.T, w *world) {
		put, back := len(logs.with("endpoint a is put aside", "5 attempts in a row failed", "down")), len(logs.with("endpoint a is back"))
		w.serve(1000, failing("a"))
		time.Sleep(5 * time.Second)
		synctest.Wait()
		w.serve(100, failing())
		if put, back := len(logs.with("endpoint a is put aside", "5 attempts in a row failed", "down"))-put, len(logs.with("endpoint a is back"))-back; put != 1 || back != 1 {
			t.Errorf("logged %d times that it is put aside and %d times that it is back, want once", put, back)
		}
	})

	for name, away := range map[string]struct{ begin, end func(w *world) }{
		"drains": {
			func(w *world) { w.start(accruing(``), drainingEndpoint("a", true), one("b"), one("c")) },
			func(w *world) { w.start(accruing(``), one("a"), one("b"), one("c")) },
		},
		"is ejected": {func(w *world) { w.sick("a") }, func(w *world) { w.healthy("a") }},
	} {
		run("one whose time passes while it "+name+" is tried after it", accruing(``), list("a", "b", "c"), func(t *testing.T, w *world) {
			w.serve(100, failing("a"))
			away.begin(w)
			time.Sleep(time.Minute)
			synctest.Wait()
			away.end(w)
			if addr, done := w.mustPick(); addr != "a" {
				t.Errorf("the next call went to %s, want a, whose time aside has passed", addr)
			} else {
				done(success)
			}
		})
	}

	limited := func(n int) string {
		return fmt.Sprintf(`{"endpointLimit":{"fixed":%d},"load":{"constant":{}},"failureAccrual":{"failures":1}}`, n)
	}
	run("one whose time passes while it has no room is tried later", limited(2), list("a", "b"), func(t *testing.T, w *world) {
		var ends []func(balancer.DoneInfo)
		for len(ends) < 2 {
			addr, done := w.mustPick()
			if addr == "a" {
				ends = append(ends, done)
			} else {
				done(success)
			}
		}
		ends[0](failureDone)
		w.start(limited(1), one("a"), one("b"))
		time.Sleep(time.Minute)
		synctest.Wait()
		if got := w.counts(100); got["a"] != 0 {
			t.Fatalf("calls by endpoint are %v, want none to a, which has no room", got)
		}
		ends[1](success)
		time.Sleep(time.Minute)
		synctest.Wait()
		if addr, done := w.mustPick(); addr != "a" {
			t.Errorf("the next call went to %s, want a, which has room again", addr)
		} else {
			done(success)
		}
	})

	run("an idle channel remembers it", accruing(``), ten(), func(t *testing.T, w *world) {
		w.serve(1000, failing("a"))
		ep := w.endpoint("a")
		w.p.mu.Lock()
		old := ep.accrual()
		old.ep = w.endpoint("b") // as of another policy
		ep.accrueLocked(w.p.picker.config.accrual)
		w.p.seatLocked(ep)
		old.stopLocked()
		w.p.mu.Unlock()
		if got := w.serve(1000, failing("a"))["a"]; got != 1 {
			t.Errorf("%d calls failed, want 1", got)
		}
	})
}

func list(addrs ...string) []string { return addrs }

func TestPanic(t *testing.T) {
	t.Run("more than half aside are all used and come back at once", func(t *testing.T) {
		bubble(t, func(t *testing.T, w *world) {
			r := w.record()
			all := ten()
			w.warm(accruing(``), all...)
			w.serve(1000, failing(all[:5]...))
			if s := w.p.snapshot(); s.Panic {
				t.Error("panic with five of ten aside")
			}
			if got := w.serve(1000, failing(all[:5]...)); len(got) != 5 {
				t.Errorf("calls by endpoint are %v, want five endpoints", got)
			}
			w.serve(1000, failing(all...))
			if s := w.p.snapshot(); !s.Panic {
				t.Error("no panic with all failing")
			}
			if got := w.serve(1000, failing(all...)); len(got) != 10 {
				t.Errorf("calls by endpoint are %v, want all ten", got)
			}
			time.Sleep(5 * time.Second)
			synctest.Wait()
			w.serve(1000, failing(all...))
			if got := w.serve(200, failing()); len(got) != 10 {
				t.Errorf("calls by endpoint are %v, want all ten at once", got)
			}
			s := w.p.snapshot()
			for _, e := range s.Endpoints {
				if s.Panic || e.PassedOver == Aside {
					t.Errorf("after 200 answers %s is passed over for %q; panic %v", e.Addresses[0], e.PassedOver, s.Panic)
				}
			}
			if r.values["panics"] != 0 || r.values["endpoint_conditions aside"] != 0 {
				t.Errorf("metrics are %v, want neither a panic nor an endpoint aside", r.values)
			}
		})
	})
	t.Run("the last is used whatever the bound", func(t *testing.T) {
		bubble(t, func(t *testing.T, w *world) {
			w.warm(accruing(`"maxAside":1`), "a", "b", "c")
			if got := w.serve(100, failing("a", "b", "c")); len(got) != 3 {
				t.Errorf("calls by endpoint are %v, want all three", got)
			}
			if s := w.p.snapshot(); !s.Panic {
				t.Error("no panic with all aside")
			}
			// Two are aside again as soon as one is well.
			w.serve(100, failing("a", "b"))
			if got := w.serve(100, failing("a", "b")); got["c"] < 98 {
				t.Errorf("calls by endpoint are %v, want nearly all to c", got)
			}
		})
	})
	t.Run("a connection that is lost counts", func(t *testing.T) {
		bubble(t, func(t *testing.T, w *world) {
			w.warm(accruing(``), "a", "b", "c", "d")
			w.serve(200, failing("a", "b"))
			if w.p.snapshot().Panic {
				t.Error("panic with two of four aside")
			}
			w.lose("c")
			if !w.p.snapshot().Panic {
				t.Error("no panic with two of three aside")
			}
			w.ready("c")
			if w.p.snapshot().Panic {
				t.Error("panic with two of four aside")
			}
		})
	})
	t.Run("what a parent has ejected is used if nothing is left", func(t *testing.T) {
		bubble(t, func(t *testing.T, w *world) {
			w.warm(accruing(``), "a", "b")
			w.sick("a")
			if got := w.counts(50); len(got) != 1 || got["b"] != 50 {
				t.Errorf("calls by endpoint are %v, want 50 to b", got)
			}
			w.sick("b")
			w.wantState("all are ejected", connectivity.Ready)
			if got := w.counts(50); len(got) != 2 {
				t.Errorf("calls by endpoint are %v, want both", got)
			}
			if e := w.of("a"); e.State != connectivity.TransientFailure || e.PassedOver == NotReady {
				t.Errorf("the ejected endpoint is %v and passed over for %q, want TRANSIENT_FAILURE and in use", e.State, e.PassedOver)
			}
			w.healthy("b")
			if got := w.counts(50); got["b"] != 50 {
				t.Errorf("calls by endpoint are %v, want 50 to b", got)
			}
			w.sick("b")
			w.lose("b")
			w.lose("a")
			w.wantState("no connection is left", connectivity.Connecting)
			w.fail("b")
			w.fail("a")
			w.wantState("no connection is left", connectivity.TransientFailure)
		})
	})
	t.Run("the endpoint that is put aside and then ejected is tried when it is let in", func(t *testing.T) {
		bubble(t, func(t *testing.T, w *world) {
			w.warm(accruing(``), ten()...)
			w.serve(1000, failing("a"))
			w.sick("a")
			time.Sleep(10 * time.Second)
			if got := w.serve(1000, failing("a"))["a"]; got != 0 {
				t.Errorf("%d calls went to the ejected endpoint, want 0", got)
			}
			w.healthy("a")
			if got := w.serve(100, failing("a"))["a"]; got != 1 {
				t.Errorf("%d calls tried the endpoint, want 1", got)
			}
		})
	})
}

func TestSlow(t *testing.T) {
	bubble(t, func(t *testing.T, w *world) {
		w.start(`{"exploreEvery":2,"exploreAfter":"0.01s","failureAccrual":{"slow":10}}`, some("a", "b", "c", "d")...)
		serve := func(n int, slow time.Duration, info balancer.DoneInfo) (got int) {
			for range n {
				ctx, cancel := context.WithCancel(context.Background())
				addr, done, err := w.pickWith(ctx)
				if err != nil {
					t.Fatal(err)
				}
				d, end := 10*time.Millisecond, success
				if addr == "a" {
					d, end = slow, info
					got++
				}
				time.Sleep(d)
				cancel()
				done(end)
			}
			return got
		}
		serve(1000, 50*time.Millisecond, success)
		if p := w.of("a").PassedOver; p == Aside {
			t.Fatal("an endpoint that is five times as slow is put aside")
		}
		cancelled := balancer.DoneInfo{BytesSent: true, Err: status.Error(codes.Canceled, "by the caller")}
		if got := serve(200, 500*time.Millisecond, cancelled); got != 5 {
			t.Errorf("%d calls went to one that is 50 times as slow, want 5", got)
		}
		w.wantAside("a", -time.Hour, 5*time.Second)
		serve(300, 500*time.Millisecond, success)
		if p := w.of("a").PassedOver; p != Aside {
			t.Errorf("after a call that tried it and was slow it is passed over for %q, want %q", p, Aside)
		}
		time.Sleep(time.Until(w.of("a").AsideUntil))
		synctest.Wait()
		if got := serve(100, 10*time.Millisecond, success); got == 0 || w.of("a").PassedOver == Aside {
			t.Errorf("%d calls tried the endpoint, now fast, and it is passed over for %q", got, w.of("a").PassedOver)
		}
	})
}

// In any order of changes, the READY set has the endpoints that the rules give.
func TestSeatingHoldsThroughRandomChanges(t *testing.T) {
	r := newRand(t)
	bubble(t, func(t *testing.T, w *world) {
		addrs := ten()[:6]
		list := some(addrs...)
		w.start(accruing(``), list...)
		var open []func(balancer.DoneInfo)
		broken := make(map[string]bool)
		for step := range 3000 {
			addr := addrs[r.IntN(len(addrs))]
			ep, listed := w.p.endpoints.Get(one(addr))
			switch r.IntN(14) {
			case 0:
				broken[addr] = !broken[addr]
			case 1:
				if listed && ep.reported.Load().ConnectivityState == connectivity.Ready {
					w.lose(addr)
				}
			case 2:
				if listed && ep.reported.Load().ConnectivityState == connectivity.Ready {
					w.sick(addr)
				}
			case 3, 4:
				if listed && ep.ejectedFrom != nil {
					w.healthy(addr)
				} else if listed && ep.reported.Load().ConnectivityState != connectivity.Ready {
					w.ready(addr)
				}
			case 5:
				for i := range list {
					if list[i].Addresses[0].Addr == addr {
						list[i] = drainingEndpoint(addr, r.IntN(2) == 0)
					}
				}
				w.start(accruing(``), list...)
			case 6:
				if len(list) > 2 && r.IntN(4) == 0 {
					list = list[1:]
				} else if len(list) <= 2 || r.IntN(4) == 0 {
					list = some(addrs...)
				}
				w.start(accruing(``), list...)
			case 7:
				config := accruing(``)
				if r.IntN(8) == 0 {
					config = `{"load":{"constant":{}},"failureAccrual":{"failures":0,"successRate":0}}`
				}
				w.start(config, list...)
			case 8:
				time.Sleep(time.Duration(r.IntN(5)) * time.Second)
			default:
				for range 10 {
					addr, done, err := w.pick()
					switch {
					case errors.Is(err, balancer.ErrNoSubConnAvailable) || w.state() != connectivity.Ready:
						continue
					case err != nil:
						t.Fatalf("step %d: pick: %v", step, err)
					}
					if ep := w.endpoint(addr); ep.ejectedFrom != nil && w.p.count[connectivity.Ready] > 0 {
						t.Fatalf("step %d: picked %s, which is ejected", step, addr)
					}
					if r.IntN(5) == 0 {
						open = append(open, done)
						continue
					}
					done(failing(keysOf(broken)...)(addr))
				}
				for len(open) > 20 {
					open[0](success)
					open = open[1:]
				}
			}
			synctest.Wait()
			if problem := w.p.misseated(); problem != "" {
				t.Fatalf("step %d: %s", step, problem)
			}
		}
		for _, done := range open {
			done(success)
		}
		if n := w.p.totalLoad(); n != 0 {
			t.Errorf("%d attempts in flight at rest, want 0", n)
		}
	})
}

func keysOf(m map[string]bool) (ks []string) {
	for k, v := range m {
		if v {
			ks = append(ks, k)
		}
	}
	return ks
}

// misseated says what is wrong with the READY set, from the conditions of all endpoints.
func (b *policy) misseated() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	var count [conditions]int
	for _, ep := range b.endpoints.All() {
		if c := ep.conditionLocked(); c != ep.condition {
			return fmt.Sprintf("%s is in condition %d, noted as %d", ep.addr, c, ep.condition)
		}
		count[ep.condition]++
	}
	for c := well; c < conditions; c++ {
		if count[c] != b.seating.count[c] {
			return fmt.Sprintf("%d endpoints in condition %d, noted as %d", count[c], c, b.seating.count[c])
		}
	}
	if got, want := len(b.seating.others), count[aside]+count[drains]+count[ejected]; got != want {
		return fmt.Sprintf("%d others, want %d", got, want)
	}
	panics := count[aside] > 0 && (count[well] == 0 || count[aside] > count[well]+count[aside]-count[aside])
	seated := map[condition]bool{
		well: true, aside: panics, drains: count[well]+count[aside] == 0, ejected: count[well]+count[aside]+count[drains] == 0,
	}
	size := 0
	for _, ep := range b.endpoints.All() {
		sits := ep.candidate.slot.Load() != notReady
		if sits != seated[ep.condition] {
			return fmt.Sprintf("%s in condition %d takes part: %v; of %v", ep.addr, ep.condition, sits, count)
		}
		if sits {
			size++
		}
	}
	if n := int(b.ready.size.Load()); n != size {
		return fmt.Sprintf("%d endpoints in the READY set, want %d", n, size)
	}
	return ""
}

// Attempts end on many goroutines while endpoints are put aside and come back.
func TestAccrualUnderConcurrency(t *testing.T) {
	w := newWorld(t)
	defer w.b.Close()
	w.cc.Hold = false
	if err := w.update(accruing(`"baseTime":"0.001s","maxTime":"0.002s"`), some(ten()...)...); err != nil {
		t.Fatal(err)
	}
	w.cc.Drain()
	var wg sync.WaitGroup
	for g := range 8 {
		wg.Go(func() {
			for i := range 5000 {
				s, _ := w.cc.State()
				r, err := s.Picker.Pick(balancer.PickInfo{FullMethodName: "/s/m", Ctx: context.Background()})
				if err != nil {
					t.Errorf("pick: %v", err)
					return
				}
				if i/1000%2 == g%2 && i%3 != 0 {
					r.Done(failureDone)
				} else {
					r.Done(success)
				}
			}
		})
	}
	wg.Wait()
	if n := w.p.totalLoad(); n != 0 {
		t.Errorf("%d attempts in flight at rest, want 0", n)
	}
	if problem := w.p.misseated(); problem != "" {
		t.Error(problem)
	}
}

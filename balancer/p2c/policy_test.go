// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package p2c

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"math"
	"net/url"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc/balancer"
	"google.golang.org/grpc/balancer/base"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/connectivity"
	"google.golang.org/grpc/experimental/balancer/weight"
	estats "google.golang.org/grpc/experimental/stats"
	"google.golang.org/grpc/resolver"
	"google.golang.org/grpc/status"

	"github.com/belfry-go/belfry/internal/test/lbtest"
	"github.com/belfry-go/belfry/load"
)

func TestOneEndpointGetsEveryCall(t *testing.T) {
	for _, config := range []string{`{}`, pendingConfig, constantConfig, `{"load":{"peakEwma":{}}}`} {
		bubble(t, func(t *testing.T, w *world) {
			w.start(config, some("a")...)
			if got := w.counts(20); got["a"] != 20 {
				t.Errorf("%s: calls by endpoint are %v, want a:20", config, got)
			}
		})
	}
}

func TestNoEndpointsIsTransientFailureAndABadResolverState(t *testing.T) {
	bubble(t, func(t *testing.T, w *world) {
		if err := w.update(`{}`); !errors.Is(err, balancer.ErrBadResolverState) {
			t.Errorf("error of an update without endpoints is %v, want ErrBadResolverState", err)
		}
		w.wantState("no endpoints", connectivity.TransientFailure)
		if _, _, err := w.pick(); err == nil || !strings.Contains(err.Error(), "no children to pick from") {
			t.Errorf("error of a pick is %v, want \"no children to pick from\"", err)
		}
	})
}

func TestEmptyUpdateAfterAGoodOneClosesTheEndpoints(t *testing.T) {
	bubble(t, func(t *testing.T, w *world) {
		w.start(`{}`, some("a", "b")...)
		if err := w.update(`{}`); !errors.Is(err, balancer.ErrBadResolverState) {
			t.Errorf("error is %v, want ErrBadResolverState", err)
		}
		w.settle()
		w.wantState("the endpoints are gone", connectivity.TransientFailure)
		if _, _, err := w.pick(); err == nil || !strings.Contains(err.Error(), "no children to pick from") {
			t.Errorf("error of a pick is %v, want \"no children to pick from\"", err)
		}
		w.start(`{}`, some("a")...)
		w.wantState("an endpoint is there again", connectivity.Ready)
	})
}

// The child of such an endpoint would stay CONNECTING, and calls would wait.
func TestEndpointsWithoutAddressesAreLeftOut(t *testing.T) {
	bubble(t, func(t *testing.T, w *world) {
		if err := w.update(`{}`, one(), one()); !errors.Is(err, balancer.ErrBadResolverState) {
			t.Errorf("error of an update whose endpoints have no addresses is %v, want ErrBadResolverState", err)
		}
		w.wantState("no addresses", connectivity.TransientFailure)
		if err := w.update(`{}`, one(), one("a")); err != nil {
			t.Errorf("error of an update one of whose endpoints has no address: %v", err)
		}
		w.settle()
		w.fail("a")
		w.wantState("the endpoint that has an address failed", connectivity.TransientFailure)
		w.move("a", connectivity.Idle)
		w.ready("a")
		w.wantState("it is READY", connectivity.Ready)
		if got := w.counts(5); got["a"] != 5 {
			t.Errorf("calls by endpoint are %v, want a:5", got)
		}
	})
}

func TestWhileAllConnectCallsWait(t *testing.T) {
	bubble(t, func(t *testing.T, w *world) {
		if err := w.update(`{}`, some("a", "b")...); err != nil {
			t.Fatal(err)
		}
		w.settle()
		w.wantState("at first", connectivity.Connecting)
		if _, _, err := w.pick(); err != balancer.ErrNoSubConnAvailable {
			t.Errorf("error of a pick is %v, want ErrNoSubConnAvailable itself", err)
		}
		w.fail("a")
		w.wantState("one has failed and one connects", connectivity.Connecting)
		if _, _, err := w.pick(); err != balancer.ErrNoSubConnAvailable {
			t.Errorf("error of a pick is %v, want ErrNoSubConnAvailable itself", err)
		}
	})
}

func TestAllEndpointsConnectEagerly(t *testing.T) {
	bubble(t, func(t *testing.T, w *world) {
		w.cc.Hold = false // Connect connects
		if err := w.update(`{}`, some("a", "b", "c")...); err != nil {
			t.Fatal(err)
		}
		w.settle()
		w.wantState("without a call", connectivity.Ready)
		if got := w.p.count[connectivity.Ready]; got != 3 {
			t.Errorf("%d endpoints are READY, want 3", got)
		}
		w.subConn("b").SetState(connectivity.Idle, nil)
		w.settle()
		if got := w.p.count[connectivity.Ready]; got != 3 {
			t.Errorf("%d endpoints are READY after one lost its connection, want 3: it connects again by itself", got)
		}
	})
}

// Tower's tests single_endpoint and two_endpoints_with_equal_load, but an endpoint that
// fails stays in use.
func TestOnlyReadyEndpointsGetCalls(t *testing.T) {
	for _, config := range []string{`{}`, pendingConfig, constantConfig, `{"load":{"peakEwma":{}}}`, `{"choiceCount":2,"memory":2}`} {
		bubble(t, func(t *testing.T, w *world) {
			want := func(when string, addrs ...string) {
				t.Helper()
				if got := keys(w.counts(200)); fmt.Sprint(got) != fmt.Sprint(addrs) {
					t.Errorf("%s, %s: endpoints that got calls are %v, want %v", config, when, got, addrs)
				}
			}
			if err := w.update(config, some("a", "b", "c")...); err != nil {
				t.Fatal(err)
			}
			w.settle()
			w.ready("a")
			want("only a is READY", "a")
			w.ready("b")
			w.ready("c")
			want("all are READY", "a", "b", "c")
			w.lose("a")
			want("a has lost its connection", "b", "c")
			w.fail("a")
			want("a cannot be reached", "b", "c")
			w.sick("b")
			want("b is ejected", "c")
			w.healthy("b")
			want("b is back", "b", "c")
			w.move("a", connectivity.Idle)
			w.ready("a")
			want("a is back", "a", "b", "c")
		})
	}
}

func TestTransientFailureIsStickyAndSaysWhy(t *testing.T) {
	bubble(t, func(t *testing.T, w *world) {
		if err := w.update(`{}`, some("a", "b")...); err != nil {
			t.Fatal(err)
		}
		w.settle()
		w.fail("a")
		w.fail("b")
		w.wantState("both have failed", connectivity.TransientFailure)
		errorsSeen := make(map[string]int)
		for range 10 {
			_, _, err := w.pick()
			if err == nil {
				t.Fatal("a pick succeeded")
			}
			for _, a := range []string{"a", "b"} {
				if strings.Contains(err.Error(), "cannot reach "+a) {
					errorsSeen[a]++
				}
			}
		}
		if errorsSeen["a"] != 5 || errorsSeen["b"] != 5 {
			t.Errorf("errors of ten picks by the endpoint they name are %v, want 5 of each", errorsSeen)
		}
		w.move("a", connectivity.Idle)
		w.wantState("one waits to connect again", connectivity.TransientFailure)
		w.move("a", connectivity.Connecting)
		w.wantState("one connects again", connectivity.TransientFailure)
		w.move("a", connectivity.Ready)
		w.wantState("one is READY again", connectivity.Ready)
	})
}

func TestResolverErrorBeforeAnyUpdateFailsCallsWithIt(t *testing.T) {
	bubble(t, func(t *testing.T, w *world) {
		w.b.ResolverError(errors.New("no such name"))
		w.wantState("after the error", connectivity.TransientFailure)
		if _, _, err := w.pick(); err == nil || !strings.Contains(err.Error(), "no such name") {
			t.Errorf("error of a pick is %v, want it to contain the resolver's", err)
		}
		w.start(`{}`, some("a")...)
		w.wantState("after a good update", connectivity.Ready)
	})
}

func TestResolverErrorAfterAGoodUpdateChangesNothing(t *testing.T) {
	bubble(t, func(t *testing.T, w *world) {
		w.start(`{}`, some("a", "b")...)
		w.b.ResolverError(errors.New("no such name"))
		w.settle()
		w.wantState("after the error", connectivity.Ready)
		if got := keys(w.counts(100)); len(got) != 2 {
			t.Errorf("endpoints that got calls are %v, want a and b", got)
		}
	})
}

func TestResolverErrorReachesChildrenThatHaveFailed(t *testing.T) {
	bubble(t, func(t *testing.T, w *world) {
		if err := w.update(`{}`, some("a")...); err != nil {
			t.Fatal(err)
		}
		w.settle()
		w.fail("a")
		w.b.ResolverError(errors.New("no such name"))
		w.settle()
		if _, _, err := w.pick(); err == nil || !strings.Contains(err.Error(), "no such name") {
			t.Errorf("error of a pick is %v, want it to contain the resolver's", err)
		}
	})
}

func TestResolverErrorAfterAnEmptyUpdateIsWhatCallsFailWith(t *testing.T) {
	bubble(t, func(t *testing.T, w *world) {
		if err := w.update(`{}`); err == nil {
			t.Fatal("got no error for an empty update")
		}
		w.b.ResolverError(errors.New("no such name"))
		if _, _, err := w.pick(); err == nil || !strings.Contains(err.Error(), "no such name") {
			t.Errorf("error of a pick is %v, want it to contain the resolver's", err)
		}
	})
}

// A source of endpoints may itself be a gRPC client. If the status of its error were that of
// a call, it would end calls that wait for an endpoint.
func TestAResolverErrorIsNoStatusOfACall(t *testing.T) {
	denied := fmt.Errorf("watching: %w", status.Error(codes.PermissionDenied, "token has expired"))
	for _, before := range []string{"nothing", "an empty update", "an endpoint that failed"} {
		bubble(t, func(t *testing.T, w *world) {
			switch before {
			case "an empty update":
				if err := w.update(`{}`); err == nil {
					t.Fatal("got no error for an empty update")
				}
			case "an endpoint that failed":
				if err := w.update(`{}`, some("a")...); err != nil {
					t.Fatal(err)
				}
				w.settle()
				w.fail("a")
			}
			w.b.ResolverError(denied)
			w.settle()
			_, _, err := w.pick()
			if err == nil || !strings.Contains(err.Error(), "token has expired") {
				t.Errorf("after %s: error of a pick is %v, want it to contain the resolver's", before, err)
			}
			if s, ok := status.FromError(err); ok {
				t.Errorf("after %s: error of a pick has the status %v, want none", before, s)
			}
		})
	}
}

func TestExitIdleIsForwardedAndHarmless(t *testing.T) {
	bubble(t, func(t *testing.T, w *world) {
		exits := 0
		w.p.children = countingExits{w.p.children, &exits}
		w.b.ExitIdle() // before any update
		w.start(`{}`, some("a", "b")...)
		before := exits
		w.b.ExitIdle()
		w.settle()
		if got := exits - before; got != 2 {
			t.Errorf("%d children were told to leave IDLE, want both", got)
		}
		w.wantState("after ExitIdle", connectivity.Ready)
	})
}

// countingExits counts how often its children are told to leave IDLE.
type countingExits struct {
	balancer.Builder
	exits *int
}

func (c countingExits) Build(cc balancer.ClientConn, opts balancer.BuildOptions) balancer.Balancer {
	return countingChild{c.Builder.Build(cc, opts), c.exits}
}

type countingChild struct {
	balancer.Balancer
	exits *int
}

func (c countingChild) ExitIdle() {
	*c.exits++
	c.Balancer.ExitIdle()
}

func TestCloseShutsConnectionsDownAndPublishesNoMore(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		w.start(pendingConfig, some("a", "b")...)
		_, done := w.mustPick()
		before := w.updates()
		eps := *w.p.all.Load()
		w.b.Close()
		w.settle()
		if got := w.updates(); got != before {
			t.Errorf("published %d times after Close, want none", got-before)
		}
		for _, a := range []string{"a", "b"} {
			if !w.cc.isShutdown(a) {
				t.Errorf("the connection to %s is not shut down", a)
			}
		}
		done(success)
		for _, ep := range eps {
			if got := ep.load(); got != 0 {
				t.Errorf("%v attempts in flight after Done, want 0", got)
			}
		}
	})
}

func TestARemovedEndpointIsShutDownAndGetsNoCalls(t *testing.T) {
	bubble(t, func(t *testing.T, w *world) {
		w.start(`{}`, some("a", "b", "c")...)
		w.start(`{}`, some("a", "c")...)
		if !w.cc.isShutdown("b") {
			t.Error("the connection to b is not shut down")
		}
		if got := keys(w.counts(200)); fmt.Sprint(got) != "[a c]" {
			t.Errorf("endpoints that got calls are %v, want [a c]", got)
		}
	})
}

func TestALateReportOfARemovedEndpointIsIgnored(t *testing.T) {
	bubble(t, func(t *testing.T, w *world) {
		w.start(`{}`, some("a")...)
		removed := w.endpoint("a")
		last := *removed.reported.Load()
		if err := w.update(`{}`, some("b")...); err != nil {
			t.Fatal(err)
		}
		w.settle()
		before := w.updates()
		removed.UpdateState(last) // READY
		w.wantState("b connects", connectivity.Connecting)
		if got := w.updates() - before; got != 0 {
			t.Errorf("the channel was told %d times, want none", got)
		}
		w.ready("b")
		if got := w.counts(50); got["b"] != 50 {
			t.Errorf("calls by endpoint are %v, want b:50", got)
		}
	})
}

// Tower's issue 856: after a removal a pick by index gets another endpoint.
func TestAPickerFromBeforeARemovalPicksOnlyWhatIsReady(t *testing.T) {
	bubble(t, func(t *testing.T, w *world) {
		w.start(pendingConfig, some("a", "b", "c")...)
		old, _ := w.cc.State()
		w.start(pendingConfig, some("a", "c")...)
		for range 200 {
			r, err := old.Picker.Pick(balancer.PickInfo{Ctx: context.Background()})
			if err != nil {
				t.Fatalf("pick by the old picker: %v", err)
			}
			if got := r.SubConn.(*lbtest.SubConn).Address.Addr; got == "b" {
				t.Fatal("the old picker picked the endpoint that was removed")
			}
			r.Done(success)
		}
	})
}

func TestIdentityOfAnEndpointIsTheSetOfItsAddresses(t *testing.T) {
	bubble(t, func(t *testing.T, w *world) {
		w.start(pendingConfig, one("a", "b"), one("c"))
		ep := w.endpoint("a", "b")
		w.start(pendingConfig, one("c"), one("b", "a"))
		if w.endpoint("a", "b") != ep {
			t.Error("another order of addresses made a new endpoint")
		}
		w.start(pendingConfig, one("c", "a"), one("b"))
		if got, ok := w.p.endpoints.Get(one("a", "b")); ok {
			t.Errorf("endpoint %v is still there after its addresses moved", got)
		}
		if w.endpoint("a", "c") == ep || w.endpoint("b") == ep {
			t.Error("an endpoint with other addresses is the old one")
		}
	})
}

func TestTwoEndpointsWithOneAddressAreOne(t *testing.T) {
	bubble(t, func(t *testing.T, w *world) {
		w.start(pendingConfig, one("a"), one("a"), one("b"))
		if got := w.p.endpoints.Len(); got != 2 {
			t.Fatalf("%d endpoints, want 2", got)
		}
		if got := w.p.count[connectivity.Ready]; got != 2 {
			t.Errorf("%d endpoints READY, want 2", got)
		}
		w.start(pendingConfig, one("a"), one("b"))
		if w.cc.isShutdown("a") {
			t.Error("a is shut down although one of its two entries is left")
		}
	})
}

// The meter of an endpoint keeps what it knows as long as the resolver lists the endpoint.
func TestMetersSurviveWhatDoesNotRemoveTheEndpoint(t *testing.T) {
	for _, test := range []struct {
		name string
		do   func(w *world, config string)
	}{
		{"an identical resolver update", func(w *world, config string) { w.start(config, some("a", "b")...) }},
		{"an update with another endpoint", func(w *world, config string) { w.start(config, some("b", "x", "a")...) }},
		{"new attributes", func(w *world, config string) {
			w.start(config, weight.Set(one("a"), weight.EndpointInfo{Weight: 1}), one("b"))
		}},
		{"another choiceCount and memory", func(w *world, config string) {
			w.start(strings.Replace(config, "{", `{"choiceCount":5,"memory":1,`, 1), some("a", "b")...)
		}},
		{"other failure codes", func(w *world, config string) {
			w.start(strings.Replace(config, "{", `{"failureCodes":["ABORTED"],`, 1), some("a", "b")...)
		}},
		{"a reconnect", func(w *world, config string) {
			w.lose("a")
			w.ready("a")
		}},
		{"an ejection", func(w *world, config string) {
			w.sick("a")
			w.healthy("a")
		}},
		{"a resolver error", func(w *world, config string) { w.b.ResolverError(errors.New("no such name")) }},
	} {
		for _, config := range []string{pendingConfig, `{"load":{"peakEwma":{}}}`, `{"load":{"expectedLatency":{}}}`} {
			bubble(t, func(t *testing.T, w *world) {
				w.start(config, some("a", "b")...)
				var dones []func(balancer.DoneInfo)
				for range 8 {
					_, done := w.mustPick()
					dones = append(dones, done)
				}
				time.Sleep(10 * time.Millisecond) // virtual
				dones[0](success)
				before := map[string]float64{"a": w.load("a"), "b": w.load("b")}
				test.do(w, config)
				for _, a := range []string{"a", "b"} {
					// A reading lets the estimate of peakEwma be written again, rounded.
					if got := w.load(a); math.Abs(got-before[a]) > 1e-9*before[a] {
						t.Errorf("%s after %s: load of %s is %v, want %v as before", config, test.name, a, got, before[a])
					}
				}
				for _, done := range dones[1:] {
					done(success)
				}
				if strings.Contains(config, "pending") {
					if got := w.p.totalLoad(); got != 0 {
						t.Errorf("after %s: %v attempts in flight at rest, want 0", test.name, got)
					}
				}
			})
		}
	}
}

func TestMetersSurviveNewParametersOfTheirMetric(t *testing.T) {
	bubble(t, func(t *testing.T, w *world) {
		w.start(`{"load":{"peakEwma":{}}}`, some("a")...)
		_, done := w.mustPick()
		time.Sleep(3 * time.Second)
		done(success)
		w.load("a")
		w.start(`{"load":{"peakEwma":{"decay":"1s","defaultRtt":"2s"}}}`, some("a", "b")...)
		if got := w.load("a"); got != 3e9 {
			t.Errorf("load of a is %v, want 3e9 as before", got)
		}
		if got := w.load("b"); got != 2e9 {
			t.Errorf("load of the newcomer is %v, want the new default of 2e9", got)
		}
		time.Sleep(time.Second)
		if got := w.load("a"); got > 1.2e9 || got < 1e9 {
			t.Errorf("load of a after 1s is %v, want 3e9/e: the new decay of 1s holds", got)
		}
	})
}

func TestAChangeOfTheMetricKeepsWhatIsInFlight(t *testing.T) {
	bubble(t, func(t *testing.T, w *world) {
		w.start(pendingConfig, some("a", "b")...)
		var dones []func(balancer.DoneInfo)
		for range 4 {
			_, done := w.mustPick()
			dones = append(dones, done)
		}
		old, _ := w.cc.State()
		w.start(constantConfig, some("a", "b")...)
		w.start(pendingConfig, some("a", "b")...)
		if got := w.p.totalLoad(); got != 4 {
			t.Errorf("%v attempts in flight on new meters, want the 4 from before", got)
		}
		for _, done := range dones {
			done(success)
		}
		if got := w.p.totalLoad(); got != 0 {
			t.Errorf("%v attempts in flight after attempts on the old meters ended, want 0", got)
		}
		if got := keys(w.counts(100)); len(got) != 2 {
			t.Errorf("endpoints that got calls are %v, want both", got)
		}
		// A pick that was under way with the old picker.
		if r, err := old.Picker.Pick(balancer.PickInfo{Ctx: context.Background()}); err == nil {
			r.Done(success)
		}
		if got := w.p.totalLoad(); got != 0 {
			t.Errorf("%v attempts in flight at rest, want 0", got)
		}
	})
}

func TestDoneAfterItsEndpointWasRemoved(t *testing.T) {
	bubble(t, func(t *testing.T, w *world) {
		w.start(pendingConfig, some("a")...)
		ep := w.endpoint("a")
		_, done := w.mustPick()
		w.start(pendingConfig, some("b")...)
		if got := ep.load(); got != 1 {
			t.Errorf("%v attempts in flight to the removed endpoint, want 1", got)
		}
		done(success)
		if got := ep.load(); got != 0 {
			t.Errorf("%v attempts in flight to the removed endpoint after Done, want 0", got)
		}
		// An endpoint with the same address is a new one.
		w.start(pendingConfig, some("a", "b")...)
		if w.endpoint("a") == ep {
			t.Error("an endpoint that was removed and came back is the old one")
		}
	})
}

// A metric that counts its endpoints, as expectedLatency does, must not count those that
// are gone.
func TestEveryMeterIsClosedWhenItsEndpointOrItsMetricIsGone(t *testing.T) {
	bubble(t, func(t *testing.T, w *world) {
		var m openMeters
		want := func(when string, open int) {
			t.Helper()
			if m.open != open {
				t.Errorf("%s: %d meters are open, want %d", when, m.open, open)
			}
		}
		start := func(config metricConfig, es ...resolver.Endpoint) {
			t.Helper()
			c := must(parseConfig([]byte(`{}`)))
			c.metric = config
			err := w.b.UpdateClientConnState(balancer.ClientConnState{ResolverState: resolver.State{Endpoints: es}, BalancerConfig: c})
			if err != nil {
				t.Fatal(err)
			}
			w.settle()
		}
		start(&m, some("a", "b", "c")...)
		want("three endpoints", 3)
		w.ready("a")
		w.lose("a")
		want("one has lost its connection", 3)
		start(&m, some("a", "d")...)
		want("two are gone and one has come", 2)
		start(pendingRequests{}, some("a", "d")...)
		want("another metric", 0)
		start(&m, some("a", "d")...)
		want("the metric again", 2)
		w.b.Close()
		want("the channel is closed", 0)
		w.b = builder{}.Build(w.cc, balancer.BuildOptions{}) // so that bubble has a policy to close
	})
}

// openMeters is a metric that counts its meters.
type openMeters struct {
	load.MetricBase
	open int
}

func (m *openMeters) build() (load.Metric, error) { return m, nil }
func (m *openMeters) adopt(old load.Metric) bool  { return old == m }

func (m *openMeters) NewMeter(e load.Endpoint) load.Meter {
	m.open++
	return countedMeter{load.NewPendingRequests().NewMeter(e), m}
}

type countedMeter struct {
	load.Meter
	metric *openMeters
}

func (m countedMeter) Close() { m.metric.open-- }

// Channels that start at once must not all connect to the same endpoint first.
// Fails falsely in one of 1e9 runs.
func TestEndpointsConnectInAnOrderThatBeginsAnywhere(t *testing.T) {
	bubble(t, func(t *testing.T, w *world) {
		first := make(map[string]int)
		es := endpoints(5)
		for range 500 {
			other := newWorld(t)
			other.start(`{}`, es...)
			first[other.cc.first]++
			other.b.Close()
			other.settle()
		}
		checkUniform(t, "which endpoint is first", first, len(es))
	})
}

// Each time that the policy publishes a picker, gRPC wakes all calls that wait.
func TestHowOftenTheChannelIsTold(t *testing.T) {
	bubble(t, func(t *testing.T, w *world) {
		const n = 50
		told := func(what string, want int, f func()) {
			t.Helper()
			before := w.updates()
			f()
			if got := w.updates() - before; got != want {
				t.Errorf("%s: told %d times, want %d", what, got, want)
			}
		}
		es := endpoints(n)
		addr := func(i int) string { return es[i].Addresses[0].Addr }
		told("the first update with 50 endpoints", 1, func() {
			if err := w.update(`{}`, es...); err != nil {
				t.Fatal(err)
			}
		})
		w.settle()
		told("50 endpoints become READY", 1, func() {
			for i := range es {
				w.ready(addr(i))
			}
		})
		told("an identical resolver update", 1, func() { w.start(`{}`, es...) })
		told("a resolver update that removes 25", 1, func() { w.start(`{}`, es[:25]...) })
		told("one loses its connection", 1, func() { w.lose(addr(0)) })
		told("it comes back", 0, func() { w.ready(addr(0)) })
		told("one is ejected", 1, func() { w.sick(addr(1)) })
		told("it comes back", 0, func() { w.healthy(addr(1)) })
	})
}

func TestTheStateOfTheChannelIsTheBestOfItsEndpoints(t *testing.T) {
	bubble(t, func(t *testing.T, w *world) {
		w.start(`{}`, some("a", "b")...)
		w.wantState("both READY", connectivity.Ready)
		w.lose("a")
		w.wantState("one connecting", connectivity.Ready)
		w.lose("b")
		w.wantState("both connecting", connectivity.Connecting)
		w.fail("a")
		w.wantState("one failed", connectivity.Connecting)
		w.fail("b")
		w.wantState("both failed", connectivity.TransientFailure)
		w.move("b", connectivity.Idle)
		w.ready("b")
		w.wantState("one is READY", connectivity.Ready)
	})
}

// The channel still uses a picker that picks an endpoint that is not READY any more. The
// call must wait for the next picker, and not fail with the endpoint's error while another
// endpoint is READY.
func TestAPickOfAnEndpointThatHasJustFailedWaits(t *testing.T) {
	bubble(t, func(t *testing.T, w *world) {
		o, recorder := newObserver(t)
		w.start(`{`+recorder+`,"load":{"pendingRequests":{}}}`, some("a", "b")...)
		busy, _ := w.mustPick()
		idle := map[string]string{"a": "b", "b": "a"}[busy]
		// The idle endpoint, which is the next to be picked, fails while the pick measures it.
		var once sync.Once
		o.onLoad = func() {
			once.Do(func() { w.subConn(idle).SetHealth(connectivity.TransientFailure, errors.New("ejected")) })
		}
		addr, _, err := w.pick()
		if err != balancer.ErrNoSubConnAvailable {
			t.Errorf("picking an endpoint that is ejected meanwhile: got %q, %v, want ErrNoSubConnAvailable", addr, err)
		}
		if addr, _ := w.mustPick(); addr != busy {
			t.Errorf("the next pick got %s, want %s", addr, busy)
		}
	})
}

// The same for an endpoint whose child reports READY again, maybe with another connection:
// the call goes to the new one.
func TestAPickUsesTheLastReportOfAnEndpoint(t *testing.T) {
	bubble(t, func(t *testing.T, w *world) {
		o, recorder := newObserver(t)
		w.start(`{`+recorder+`,"load":{"pendingRequests":{}}}`, some("a", "b")...)
		busy, _ := w.mustPick()
		idle := map[string]string{"a": "b", "b": "a"}[busy]
		var once sync.Once
		fresh := errors.New("the new picker")
		o.onLoad = func() {
			once.Do(func() {
				w.endpoint(idle).UpdateState(balancer.State{ConnectivityState: connectivity.Ready, Picker: base.NewErrPicker(fresh)})
			})
		}
		before := w.updates()
		if addr, _, err := w.pick(); err != fresh {
			t.Errorf("picking an endpoint that reports again meanwhile: got %q, %v, want what the new picker says", addr, err)
		}
		if got := w.updates() - before; got != 1 {
			t.Errorf("the channel was told %d times, want once: a call may wait for it", got)
		}
	})
}

func TestEveryMetricIsRecordedWithItsLabels(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := &fakeRecorder{values: make(map[string]int64)}
		w := newWorld(t)
		w.cc.Recorder = r
		w.p.opts.Target = resolver.Target{URL: url.URL{Scheme: "test", Path: "/orders"}}
		c, err := parseConfig([]byte(`{}`))
		if err != nil {
			t.Fatal(err)
		}
		state := resolver.State{Endpoints: some("a", "b", "c")}
		err = w.b.UpdateClientConnState(balancer.ClientConnState{BalancerConfig: c, ResolverState: state})
		if err != nil {
			t.Fatal(err)
		}
		w.settle()
		w.ready("a")
		w.ready("b")
		w.fail("c")
		r.want(t, "two READY, one failed", map[string]int64{
			"endpoints READY": 2, "endpoints TRANSIENT_FAILURE": 1, "endpoints CONNECTING": 0,
		})
		for _, a := range []string{"a", "b"} { // so that the endpoints have not only failed
			w.endpoint(a).candidate.meter.Load().note(everAnswered)
		}
		for _, info := range []balancer.DoneInfo{
			success,
			{BytesSent: true, Err: errors.New("broken")},
			{}, // not READY any more
			{BytesSent: false, Err: context.Canceled},
		} {
			_, done := w.mustPick()
			done(info)
		}
		r.want(t, "four picks", map[string]int64{"picks": 4, "tried_picks": 0, "dropped_samples not_sent": 2, "dropped_samples cancelled": 0})

		_, done, err := w.pickWith(tried(w.endpoint("a")))
		if err != nil {
			t.Fatal(err)
		}
		done(success)
		r.want(t, "an untried endpoint picked", map[string]int64{"picks": 5, "tried_picks": 0})
		_, done, err = w.pickWith(tried(w.endpoint("a"), w.endpoint("b")))
		if err != nil {
			t.Fatal(err)
		}
		done(success)
		r.want(t, "a tried endpoint picked", map[string]int64{"picks": 6, "tried_picks": 1})

		w.b.Close()
		w.settle()
		r.want(t, "after Close", map[string]int64{"endpoints READY": 0, "endpoints TRANSIENT_FAILURE": 0, "endpoints CONNECTING": 0, "endpoints IDLE": 0})
	})
}

// fakeRecorder adds up what is recorded, by name without the prefix and the
// labels but for target and locality.
type fakeRecorder struct {
	estats.UnimplementedMetricsRecorder
	values map[string]int64
}

func (r *fakeRecorder) add(d *estats.MetricDescriptor, v int64, labels []string) {
	if len(labels) != len(d.Labels)+len(d.OptionalLabels) {
		panic(fmt.Sprintf("%s: %d labels, want %d", d.Name, len(labels), len(d.Labels)+len(d.OptionalLabels)))
	}
	if d.Labels[0] != "grpc.target" || labels[0] != "test:///orders" {
		panic(fmt.Sprintf("%s: label %s is %q, want grpc.target and the channel's", d.Name, d.Labels[0], labels[0]))
	}
	name := strings.TrimPrefix(d.Name, "belfry.lb.p2c.")
	for _, l := range labels[1:len(d.Labels)] {
		name += " " + l
	}
	r.values[name] += v
}

func (r *fakeRecorder) RecordInt64Count(h *estats.Int64CountHandle, v int64, labels ...string) {
	r.add(h.Descriptor(), v, labels)
}

func (r *fakeRecorder) RecordInt64UpDownCount(h *estats.Int64UpDownCountHandle, v int64, labels ...string) {
	r.add(h.Descriptor(), v, labels)
}

func (r *fakeRecorder) want(t *testing.T, when string, want map[string]int64) {
	t.Helper()
	for name, v := range want {
		if got := r.values[name]; got != v {
			t.Errorf("%s: %s is %d, want %d (all: %v)", when, name, got, v, maps.Clone(r.values))
		}
	}
}

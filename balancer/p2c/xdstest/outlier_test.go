// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package xdstest

import (
	"fmt"
	"slices"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/resolver"
	"google.golang.org/grpc/resolver/manual"
	"google.golang.org/grpc/status"
	_ "google.golang.org/grpc/xds" // registers outlier_detection_experimental
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/belfry-go/belfry/internal/testserver"
	testingv1 "github.com/belfry-go/belfry/proto/belfry/testing/v1"
)

// ejection is how long an endpoint is ejected. Tests look at the time of the
// ejection by many calls, which take a few milliseconds of it.
const ejection = 2 * time.Second

// dialWithOutlierDetection opens a channel whose policy is below an outlier
// detection that ejects every endpoint of whose calls in 0.1 s, if they are
// volume at least, more than half failed.
func dialWithOutlierDetection(t *testing.T, servers []*testserver.Server, volume int, policy string) (*channel, *manual.Resolver) {
	t.Helper()
	r := manual.NewBuilderWithScheme("belfrytest")
	r.InitialState(resolver.State{Endpoints: endpointsOf(servers)})
	c := dial(t, servers, r.Scheme(), newTarget(t), grpc.WithResolvers(r), grpc.WithDefaultServiceConfig(fmt.Sprintf(
		`{"loadBalancingConfig":[{"outlier_detection_experimental":{
			"interval":"0.1s","baseEjectionTime":"%[1]vs","maxEjectionTime":"%[1]vs","maxEjectionPercent":100,
			"failurePercentageEjection":{"threshold":50,"enforcementPercentage":100,"minimumHosts":1,"requestVolume":%d},
			"childPolicy":[{"belfry.p2c":%s}]}}]}`, ejection.Seconds(), volume, policy)))
	return c, r
}

func TestUnderOutlierDetectionAnEjectedEndpointGetsNoCallsAndComesBack(t *testing.T) {
	t.Parallel()
	// Without failureAccrual, which on a busy machine puts the server aside before the
	// detection has its three calls in an interval.
	c, _ := dialWithOutlierDetection(t, newServers(t, 3), 3, `{"load":{"constant":{}},"failureAccrual":{"failures":0,"successRate":0}}`)
	c.allReady()
	ctx := testContext(t)
	for ejected := false; !ejected; { // Until the ejection lasts as long as the calls.
		if ctx.Err() != nil {
			t.Fatal("no ejection lasted as long as the calls")
		}
		if err := c.servers[0].Fail(codes.Unavailable, 1); err != nil {
			t.Fatal(err)
		}
		// A third of all calls goes to each. That 50 in a row miss the failing server
		// by chance happens in (2/3)^50 < 2e-9 of all runs.
		c.until("the failing server is ejected", 50, func(m map[string]int) bool { return m[""] == 0 })
		c.servers[0].Heal()
		calls, states := c.counts(50), c.endpoints()
		if ejected = states["READY"] < 3; ejected && calls["server-0"] != 0 {
			t.Errorf("calls by server are %v, want none to the ejected server-0", calls)
		}
		if ejected && (states["READY"] != 2 || states["TRANSIENT_FAILURE"] != 1) {
			t.Errorf("endpoints by state are %v, want 2 READY and the ejected one in TRANSIENT_FAILURE", states)
		}
	}
	c.allReady()
	if got := c.counts(50); len(got) != 3 {
		t.Errorf("calls by server are %v, want some to each of the three", got)
	}
}

// A pick looks at all three endpoints, and the estimates of their latencies
// hardly decay. A new meter says 1 µs, less than any call takes, so an endpoint
// with a new meter gets the next call. One that remembers a call of 1 s gets none
// while another has not been as slow.
//
// The test fails without a fault only if both the other servers take 1 s for a
// call on loopback, or if the process stands still for all of the ejection.
func TestUnderOutlierDetectionAnEjectedEndpointComesBackWithItsMeter(t *testing.T) {
	t.Parallel()
	c, r := dialWithOutlierDetection(t, newServers(t, 3), 1, `{"choiceCount":3,"load":{"peakEwma":{"decay":"1000s","defaultRtt":"0.000001s"}}}`)
	c.allReady()
	c.until("every meter has a sample", 1, func(map[string]int) bool {
		return !slices.ContainsFunc(c.servers, func(s *testserver.Server) bool { return s.Stats().Started == 0 })
	})

	// One call fails after 1 s, whoever gets it.
	var p peer.Peer
	_, err := c.client.Unary(testContext(t), &testingv1.UnaryRequest{Behaviour: &testingv1.Behaviour{
		Delay: durationpb.New(time.Second), Status: &testingv1.Status{Code: int32(codes.Unavailable)},
	}}, grpc.Peer(&p))
	if status.Code(err) != codes.Unavailable {
		t.Fatalf("the call that asks for UNAVAILABLE ended with %v", err)
	}
	i := slices.IndexFunc(c.servers, func(s *testserver.Server) bool { return s.Addr() == p.Addr.String() })
	if i < 0 {
		t.Fatalf("the failing call was answered by %v, want one of the servers", p.Addr)
	}
	slow := c.servers[i]

	c.until("the endpoint is ejected", 1, func(map[string]int) bool { return c.endpoints()["TRANSIENT_FAILURE"] == 1 })
	c.allReady()
	if got := c.counts(50); got[slow.Name()] != 0 {
		t.Errorf("after its ejection calls by server are %v, want none to %s, which was slow", got, slow.Name())
	}

	// That it could get calls, and that its meter is what kept them away: with a
	// new meter it gets the first one.
	r.UpdateState(resolver.State{Endpoints: endpointsOf(slices.Concat(c.servers[:i], c.servers[i+1:]))})
	c.until("the endpoint is gone", 1, func(map[string]int) bool { return c.endpoints()["READY"] == 2 })
	started := slow.Stats().Started
	r.UpdateState(resolver.State{Endpoints: endpointsOf(c.servers)})
	c.until("the new endpoint gets a call", 1, func(map[string]int) bool { return slow.Stats().Started > started })
}

// What outlier detection ejects is its own: the policy does not bring it back while another
// endpoint is left, and uses it when none is. So servers that are well again are used long
// before their ejection ends.
func TestUnderOutlierDetectionAllAreUsedWhenAllAreEjected(t *testing.T) {
	t.Parallel()
	c, _ := dialWithOutlierDetection(t, newServers(t, 3), 3, `{"load":{"constant":{}},"failureAccrual":{"baseTime":"0.1s","maxTime":"0.2s","useEjected":true}}`)
	c.allReady()
	ctx := testContext(t)
	for shown := false; !shown; { // Until the ejections last as long as the calls.
		if ctx.Err() != nil {
			t.Fatal("no ejection lasted as long as the calls")
		}
		for _, s := range c.servers {
			if err := s.Fail(codes.Unavailable, 1); err != nil {
				t.Fatal(err)
			}
		}
		c.until("all are ejected", 5, func(map[string]int) bool { return c.endpoints()["TRANSIENT_FAILURE"] == 3 })
		for _, s := range c.servers {
			s.Heal()
		}
		c.counts(20) // It fails the test if a call fails.
		shown = c.endpoints()["TRANSIENT_FAILURE"] == 3
	}
	c.allReady()
}

// An endpoint that fails is put aside by whoever sees it first, and is back when both let it.
func TestUnderOutlierDetectionAnEndpointThatIsPutAsideComesBack(t *testing.T) {
	t.Parallel()
	c, _ := dialWithOutlierDetection(t, newServers(t, 3), 3, `{"load":{"constant":{}},"failureAccrual":{"baseTime":"0.1s","maxTime":"0.2s","useEjected":true}}`)
	c.allReady()
	for range 2 {
		if err := c.servers[0].Fail(codes.Unavailable, 1); err != nil {
			t.Fatal(err)
		}
		c.until("the failing server gets no calls", 30, func(m map[string]int) bool { return m[""] == 0 })
		c.servers[0].Heal()
		c.until("it is back", 50, func(m map[string]int) bool { return len(m) == 3 && m[""] == 0 })
	}
}

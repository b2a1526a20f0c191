// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package xdstest

import (
	"strings"
	"testing"

	"google.golang.org/grpc"
	"google.golang.org/grpc/xds"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"

	"github.com/belfry-go/belfry/examples/xds/controlplane"
	"github.com/belfry-go/belfry/internal/testserver"
	configv1 "github.com/belfry-go/belfry/proto/belfry/config/v1"
)

// gRFC A52: the policy by name in a TypedStruct, through a control plane. Below
// wrr_locality, which is a weighted_target, each locality has a policy of its
// own.
func TestThroughXDSTheConfigArrivesAndLocalitiesShareByWeight(t *testing.T) {
	t.Parallel()
	const js = `{"choiceCount":3,"memory":0,"load":{"peakEwma":{"decay":"1.5s"}}}`
	c := dialXDS(t, newServers(t, 3), js, refuseNothing(t))
	seen := make(map[bool]bool)
	c.until("both localities answer", 1, func(m map[string]int) bool {
		for name := range m {
			if name != "" {
				seen[name == "server-0"] = true
			}
		}
		return len(seen) == 2
	})

	var want configv1.P2C
	if err := protojson.Unmarshal([]byte(js), &want); err != nil {
		t.Fatal(err)
	}
	configs := given.configs(c.target)
	if len(configs) != 2 {
		t.Fatalf("%d policies were built, want 2: one for each locality", len(configs))
	}
	for _, config := range configs {
		var got configv1.P2C
		if err := protojson.Unmarshal([]byte(config), &got); err != nil || !proto.Equal(&got, &want) {
			t.Errorf("config is %s (%v), want what the control plane sent: %s", config, err, js)
		}
	}

	// Server 0 is locality 0 of weight 1, the others locality 1 of weight 3, and
	// the locality of each call is drawn at random. The bounds are 6.6 standard
	// deviations from the mean of 150: passed by chance in one run of 10^10.
	const n = 600
	counts := c.counts(n)
	if got := counts["server-0"]; got < 80 || got > 220 {
		t.Errorf("calls by server are %v, want about a quarter of %d to server-0", counts, n)
	}
	picks := c.metric("belfry.lb.p2c.picks", "grpc.lb.locality")
	if len(picks) != 2 {
		t.Errorf("picks by locality are %v, want two localities", picks)
	}
	for label, got := range picks {
		var calls int
		switch {
		case strings.Contains(label, "region-0"):
			calls = counts["server-0"]
		case strings.Contains(label, "region-1"):
			calls = n - counts["server-0"]
		default:
			t.Errorf("a locality is labelled %q, want region-0 or region-1 in it", label)
		}
		if got < calls {
			t.Errorf("%d picks in locality %s, want one for each of its %d calls at least", got, label, calls)
		}
	}
}

func TestThroughXDSABadConfigIsRefusedAndTheControlPlaneIsToldWhy(t *testing.T) {
	t.Parallel()
	refusals := make(chan string, 1)
	c := dialXDS(t, newServers(t, 2), `{"choiceCount":1}`, func(_, message string) {
		select {
		case refusals <- message:
		default: // told before
		}
	})
	c.conn.Connect()
	select {
	case got := <-refusals:
		if want := "choiceCount: 1, must be between 2 and 16"; !strings.Contains(got, want) {
			t.Errorf("the client refused the cluster with %q, want %q in it", got, want)
		}
	case <-testContext(t).Done():
		t.Fatal("the client did not refuse a choiceCount of 1")
	}
}

// dialXDS opens a channel to the servers that learns of them, and of the policy's config,
// from a control plane. Server 0 is alone in a locality of weight 1, the others are in one
// of weight 3.
func dialXDS(t *testing.T, servers []*testserver.Server, config string, onRefusal func(typeURL, message string)) *channel {
	t.Helper()
	plane := startPlane(t, must(controlplane.WRRLocality(must(controlplane.P2C(config)))), onRefusal)
	if err := plane.Set(locality("region-0", 1, 0, servers[:1]), locality("region-1", 3, 0, servers[1:])); err != nil {
		t.Fatal(err)
	}
	return dialPlane(t, plane, servers)
}

// A plane is a control plane, and the name of its service.
type plane struct {
	*controlplane.Server
	service string
}

// startPlane starts a control plane that ends with the test.
func startPlane(t *testing.T, policy controlplane.Policy, onRefusal func(typeURL, message string)) plane {
	t.Helper()
	service := newTarget(t)
	server, err := controlplane.Start(service, policy, onRefusal)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := server.Close(); err != nil {
			t.Errorf("serving the control plane: %v", err)
		}
	})
	return plane{server, service}
}

// refuseNothing fails the test if the client refuses a resource.
func refuseNothing(t *testing.T) func(typeURL, message string) {
	return func(typeURL, message string) { t.Errorf("the client refused %s: %s", typeURL, message) }
}

// dialPlane opens a channel that learns of its servers from the control plane.
func dialPlane(t *testing.T, p plane, servers []*testserver.Server, opts ...grpc.DialOption) *channel {
	t.Helper()
	builder, err := xds.NewXDSResolverWithConfigForTesting(controlplane.Bootstrap(p.Addr()))
	if err != nil {
		t.Fatal(err)
	}
	return dial(t, servers, builder.Scheme(), p.service, append(opts, grpc.WithResolvers(builder))...)
}

// locality is a locality of the servers, which have the weights given; those without one
// have 1.
func locality(region string, weight, priority uint32, servers []*testserver.Server, weights ...uint32) controlplane.Locality {
	l := controlplane.Locality{Region: region, Weight: weight, Priority: priority}
	for i, s := range servers {
		e := controlplane.Endpoint{Addr: s.Addr()}
		if i < len(weights) {
			e.Weight = weights[i]
		}
		l.Endpoints = append(l.Endpoints, e)
	}
	return l
}

// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package xdstest

import (
	"encoding/json"
	"fmt"
	"io"
	"net"
	"slices"
	"strconv"
	"strings"
	"testing"

	xdstypev3 "github.com/cncf/xds/go/xds/type/v3"
	clusterv3 "github.com/envoyproxy/go-control-plane/envoy/config/cluster/v3"
	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	endpointv3 "github.com/envoyproxy/go-control-plane/envoy/config/endpoint/v3"
	listenerv3 "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"
	routev3 "github.com/envoyproxy/go-control-plane/envoy/config/route/v3"
	routerv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/router/v3"
	hcmv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/http_connection_manager/v3"
	wrrlocalityv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/load_balancing_policies/wrr_locality/v3"
	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"google.golang.org/grpc"
	"google.golang.org/grpc/xds"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/structpb"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/belfry-go/belfry/balancer/p2c"
	"github.com/belfry-go/belfry/internal/testserver"
	configv1 "github.com/belfry-go/belfry/proto/belfry/config/v1"
)

// gRFC A52: the policy by name in a TypedStruct, through a control plane. Below
// wrr_locality, which is a weighted_target, each locality has a policy of its
// own.
func TestThroughXDSTheConfigArrivesAndLocalitiesShareByWeight(t *testing.T) {
	t.Parallel()
	const js = `{"choiceCount":3,"memory":0,"load":{"peakEwma":{"decay":"1.5s"}}}`
	c := dialXDS(t, newServers(t, 3), js, func(typeURL, message string) {
		t.Errorf("the client refused %s: %s", typeURL, message)
	})
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

// dialXDS opens a channel to the servers that learns of them, and of the
// policy's config, from a control plane.
func dialXDS(t *testing.T, servers []*testserver.Server, config string, onRefusal func(typeURL, message string)) *channel {
	t.Helper()
	var policy map[string]any
	if err := json.Unmarshal([]byte(config), &policy); err != nil {
		t.Fatal(err)
	}
	service := newTarget(t)
	ads := startADS(t, service, servers, policy, onRefusal)
	builder, err := xds.NewXDSResolverWithConfigForTesting(fmt.Appendf(nil,
		`{"xds_servers":[{"server_uri":%q,"channel_creds":[{"type":"insecure"}],"server_features":["xds_v3"]}],"node":{"id":"test"}}`, ads))
	if err != nil {
		t.Fatal(err)
	}
	return dial(t, servers, builder.Scheme(), service, grpc.WithResolvers(builder))
}

// startADS runs a control plane that gives its clients one service, and returns
// its address. Server 0 is alone in a locality of weight 1, the others are in one
// of weight 3.
func startADS(t *testing.T, service string, servers []*testserver.Server, policy map[string]any, onRefusal func(typeURL, message string)) string {
	t.Helper()
	pack := func(m proto.Message) *anypb.Any { return must(anypb.New(m)) }
	ads := &corev3.ConfigSource{
		ResourceApiVersion:    corev3.ApiVersion_V3,
		ConfigSourceSpecifier: &corev3.ConfigSource_Ads{Ads: &corev3.AggregatedConfigSource{}},
	}
	policies := func(name string, config *anypb.Any) *clusterv3.LoadBalancingPolicy {
		return &clusterv3.LoadBalancingPolicy{Policies: []*clusterv3.LoadBalancingPolicy_Policy{{
			TypedExtensionConfig: &corev3.TypedExtensionConfig{Name: name, TypedConfig: config},
		}}}
	}
	assignment := &endpointv3.ClusterLoadAssignment{ClusterName: service}
	for i, group := range [][]*testserver.Server{servers[:1], servers[1:]} {
		locality := &endpointv3.LocalityLbEndpoints{
			Locality:            &corev3.Locality{Region: fmt.Sprintf("region-%d", i)},
			LoadBalancingWeight: wrapperspb.UInt32(uint32(1 + 2*i)),
		}
		for _, s := range group {
			host, port, err := net.SplitHostPort(s.Addr())
			if err != nil {
				t.Fatal(err)
			}
			locality.LbEndpoints = append(locality.LbEndpoints, &endpointv3.LbEndpoint{
				HealthStatus: corev3.HealthStatus_HEALTHY,
				HostIdentifier: &endpointv3.LbEndpoint_Endpoint{Endpoint: &endpointv3.Endpoint{Address: &corev3.Address{
					Address: &corev3.Address_SocketAddress{SocketAddress: &corev3.SocketAddress{
						Address:       host,
						PortSpecifier: &corev3.SocketAddress_PortValue{PortValue: uint32(must(strconv.Atoi(port)))},
					}},
				}}},
			})
		}
		assignment.Endpoints = append(assignment.Endpoints, locality)
	}
	srv := &adsServer{onRefusal: onRefusal, resources: make(map[string]*anypb.Any)}
	for _, m := range []proto.Message{
		&listenerv3.Listener{Name: service, ApiListener: &listenerv3.ApiListener{ApiListener: pack(&hcmv3.HttpConnectionManager{
			RouteSpecifier: &hcmv3.HttpConnectionManager_RouteConfig{RouteConfig: &routev3.RouteConfiguration{
				Name: service,
				VirtualHosts: []*routev3.VirtualHost{{Domains: []string{"*"}, Routes: []*routev3.Route{{
					Match:  &routev3.RouteMatch{PathSpecifier: &routev3.RouteMatch_Prefix{Prefix: ""}},
					Action: &routev3.Route_Route{Route: &routev3.RouteAction{ClusterSpecifier: &routev3.RouteAction_Cluster{Cluster: service}}},
				}}}},
			}},
			HttpFilters: []*hcmv3.HttpFilter{{Name: "router", ConfigType: &hcmv3.HttpFilter_TypedConfig{TypedConfig: pack(&routerv3.Router{})}}},
		})}},
		&clusterv3.Cluster{
			Name:                 service,
			ClusterDiscoveryType: &clusterv3.Cluster_Type{Type: clusterv3.Cluster_EDS},
			EdsClusterConfig:     &clusterv3.Cluster_EdsClusterConfig{EdsConfig: ads},
			LoadBalancingPolicy: policies("wrr_locality", pack(&wrrlocalityv3.WrrLocality{
				EndpointPickingPolicy: policies("belfry", pack(&xdstypev3.TypedStruct{
					TypeUrl: "type.googleapis.com/" + p2c.Name,
					Value:   must(structpb.NewStruct(policy)),
				})),
			})),
		},
		assignment,
	} {
		a := pack(m)
		srv.resources[a.TypeUrl] = a
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	g := grpc.NewServer()
	discoveryv3.RegisterAggregatedDiscoveryServiceServer(g, srv)
	served := make(chan error, 1)
	go func() { served <- g.Serve(l) }()
	t.Cleanup(func() {
		g.Stop()
		if err := <-served; err != nil {
			t.Errorf("serving the control plane: %v", err)
		}
	})
	return l.Addr().String()
}

// adsServer is a control plane with one resource of each type, which never
// change.
type adsServer struct {
	discoveryv3.UnimplementedAggregatedDiscoveryServiceServer
	onRefusal func(typeURL, message string) // called from the stream's goroutine
	resources map[string]*anypb.Any         // by type
}

func (s *adsServer) StreamAggregatedResources(stream discoveryv3.AggregatedDiscoveryService_StreamAggregatedResourcesServer) error {
	asked := make(map[string][]string)
	for {
		req, err := stream.Recv()
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return err
		}
		if e := req.GetErrorDetail(); e != nil {
			s.onRefusal(req.TypeUrl, e.GetMessage())
		}
		if slices.Equal(asked[req.TypeUrl], req.ResourceNames) {
			continue // an acknowledgement
		}
		asked[req.TypeUrl] = req.ResourceNames
		resource, ok := s.resources[req.TypeUrl]
		if !ok || len(req.ResourceNames) == 0 {
			continue
		}
		if err := stream.Send(&discoveryv3.DiscoveryResponse{
			VersionInfo: "1", Nonce: "1", TypeUrl: req.TypeUrl, Resources: []*anypb.Any{resource},
		}); err != nil {
			return err
		}
	}
}

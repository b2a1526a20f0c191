// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package p2c

import (
	"fmt"
	"io"
	"net"
	"slices"
	"strconv"
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
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/xds" // registers outlier_detection_experimental too
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/structpb"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/belfry-go/belfry/internal/testserver"
	"github.com/belfry-go/belfry/load"
	testingv1 "github.com/belfry-go/belfry/proto/belfry/testing/v1"
)

// meterOf returns the meter of a server's endpoint.
func (w *wire) meterOf(s *testserver.Server) load.Meter {
	w.t.Helper()
	ps := policiesOf(w.target)
	p := ps[len(ps)-1]
	// Written before the first call, and not again where no update follows.
	ep, ok := p.endpoints.Get(s.Endpoint())
	if !ok {
		w.t.Fatalf("the policy has no endpoint %s", s.Addr())
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	return ep.candidate.meter
}

func TestUnderOutlierDetectionAnEjectedEndpointGetsNoCallsAndComesBackWithItsMeter(t *testing.T) {
	t.Parallel()
	w := newWire(t, newServers(t, 3), wireConfig{policy: `"load":{"constant":{}}`, service: `{"loadBalancingConfig":[{"outlier_detection_experimental":{
		"interval":"0.1s","baseEjectionTime":"2s","maxEjectionTime":"2s","maxEjectionPercent":100,
		"failurePercentageEjection":{"threshold":50,"enforcementPercentage":100,"minimumHosts":2,"requestVolume":3},
		"childPolicy":[%s]}}]}`})
	w.allReady()
	meter := w.meterOf(w.servers[0])
	if err := w.servers[0].Fail(codes.Unavailable, 1); err != nil {
		t.Fatal(err)
	}
	w.until("the failing server is ejected", 20, func(m map[string]int) bool { return m[""] == 0 })
	w.servers[0].Heal()
	if got := w.counts(50); got["server-0"] != 0 { // long within the 2 s of the ejection
		t.Errorf("calls by server are %v, want none to the ejected server-0", got)
	}
	w.allReady()
	if got := w.meterOf(w.servers[0]); got != meter {
		t.Errorf("meter after the ejection is %p, want %p as before", got, meter)
	}
	w.wantRest(100)
}

func TestUnderRandomSubsettingOnlyTheSubsetGetsCalls(t *testing.T) {
	t.Parallel()
	w := newWire(t, newServers(t, 6), wireConfig{policy: `"memory":0,"choiceCount":2,"load":{"constant":{}}`,
		service: `{"loadBalancingConfig":[{"random_subsetting_experimental":{"subsetSize":2,"childPolicy":[%s]}}]}`})
	w.until("two servers answer", 50, func(m map[string]int) bool { return len(m) == 2 && m[""] == 0 })
	if got := w.counts(200); len(got) != 2 {
		t.Errorf("calls by server are %v, want two servers", got)
	}
	// The config went through marshal and parse on its way.
	p := policiesOf(w.target)[0]
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.picker.config.memory != 0 || p.picker.config.choices != 2 {
		t.Errorf("%d choices and memory %d, want 2 and 0", p.picker.config.choices, p.picker.config.memory)
	}
	if _, ok := p.picker.config.metric.(constant); !ok {
		t.Errorf("metric is %T, want constant", p.picker.config.metric)
	}
}

// gRFC A52: the policy by name in a TypedStruct, through a control plane. Below
// wrr_locality, which is a weighted_target, each locality has a policy of its
// own.
func TestThroughXDSTheConfigArrivesAndLocalitiesShareByWeight(t *testing.T) {
	t.Parallel()
	servers := newServers(t, 3)
	service := fmt.Sprintf("orders-%d", targets.Add(1))
	ads := startADS(t, service, servers, map[string]any{
		"choiceCount": 3.0, "memory": 0.0, "load": map[string]any{"peakEwma": map[string]any{"decay": "1.5s"}},
	})
	builder, err := xds.NewXDSResolverWithConfigForTesting(fmt.Appendf(nil,
		`{"xds_servers":[{"server_uri":%q,"channel_creds":[{"type":"insecure"}],"server_features":["xds_v3"]}],"node":{"id":"test"}}`, ads))
	if err != nil {
		t.Fatal(err)
	}
	conn, err := grpc.NewClient("xds:///"+service, append(DialOptions(),
		grpc.WithResolvers(builder), grpc.WithTransportCredentials(insecure.NewCredentials()))...)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	client := testingv1.NewTestServiceClient(conn)
	ctx := testContext(t)
	counts := make(map[string]int)
	const n = 600
	for range n {
		r, err := client.Unary(ctx, &testingv1.UnaryRequest{}, grpc.WaitForReady(true))
		if err != nil {
			t.Fatal(err)
		}
		counts[r.GetObserved().GetServer()]++
	}
	ps := policiesOf(service)
	if len(ps) != 2 {
		t.Fatalf("%d policies were built, want 2: one for each locality", len(ps))
	}
	localities := make(map[string]bool)
	for _, p := range ps {
		p.mu.Lock()
		c := p.picker.config
		p.mu.Unlock()
		if c.choices != 3 || c.memory != 0 || c.metric.(peakEWMA).Decay.String() != "1.5s" {
			t.Errorf("config is %v, want what the control plane sent", c.message)
		}
		localities[p.metrics.target[1]] = true
	}
	if len(localities) != 2 || localities[""] {
		t.Errorf("localities in the labels of metrics are %v, want two", localities)
	}
	// server-0 is locality 0 of weight 1, the others locality 1 of weight 3. Until
	// both localities are READY one may get it all, hence the wide margin.
	if got := counts["server-0"]; got < n/10 || got > n*6/10 {
		t.Errorf("calls by server are %v, want about a quarter to server-0", counts)
	}
}

// startADS runs a control plane that gives its clients one service, and returns
// its address. Server 0 is alone in a locality of weight 1, the others are in one
// of weight 3.
func startADS(t *testing.T, service string, servers []*testserver.Server, policy map[string]any) string {
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
	srv := &adsServer{t: t, resources: make(map[string]*anypb.Any)}
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
					TypeUrl: "type.googleapis.com/" + Name,
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
	t         *testing.T
	resources map[string]*anypb.Any // by type
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
			s.t.Errorf("the client refused %s: %s", req.TypeUrl, e.GetMessage())
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

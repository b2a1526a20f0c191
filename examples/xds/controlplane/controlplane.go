// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

// Package controlplane is an xDS control plane of one service, made of go-control-plane,
// for examples and tests. Its policies say how a control plane of your own asks for
// belfry.p2c.
package controlplane

import (
	"context"
	"encoding/json"
	"fmt"
	"net"
	"strconv"
	"sync"

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
	"github.com/envoyproxy/go-control-plane/pkg/cache/types"
	"github.com/envoyproxy/go-control-plane/pkg/cache/v3"
	"github.com/envoyproxy/go-control-plane/pkg/resource/v3"
	serverv3 "github.com/envoyproxy/go-control-plane/pkg/server/v3"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/structpb"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/belfry-go/belfry/balancer/p2c"
)

// node is the id of all clients.
const node = "client"

// A Policy is the load balancing policy of a cluster.
type Policy = *clusterv3.LoadBalancingPolicy

// P2C is belfry.p2c with a config, the JSON of belfry.config.v1.P2C, as a custom policy
// (gRFC A52): the name and the config in a TypedStruct.
func P2C(config string) (Policy, error) {
	value := new(structpb.Struct)
	if err := json.Unmarshal([]byte(config), value); err != nil {
		return nil, err
	}
	return policy("belfry", &xdstypev3.TypedStruct{TypeUrl: "type.googleapis.com/" + p2c.Name, Value: value})
}

// WRRLocality draws a locality for each call by the weights of the localities, and lets
// child balance inside it.
func WRRLocality(child Policy) (Policy, error) {
	return policy("wrr_locality", &wrrlocalityv3.WrrLocality{EndpointPickingPolicy: child})
}

func policy(name string, config proto.Message) (Policy, error) {
	packed, err := anypb.New(config)
	return &clusterv3.LoadBalancingPolicy{Policies: []*clusterv3.LoadBalancingPolicy_Policy{{
		TypedExtensionConfig: &corev3.TypedExtensionConfig{Name: name, TypedConfig: packed},
	}}}, err
}

// A Locality is a group of endpoints.
type Locality struct {
	Region    string
	Weight    uint32 // beside the other localities of the priority; at least 1
	Priority  uint32 // 0 is the first
	Endpoints []Endpoint
}

// An Endpoint is an address with a port.
type Endpoint struct {
	Addr   string
	Weight uint32 // inside the locality; 0 is 1
}

// A Server tells its clients of one service. Its methods may be called concurrently.
type Server struct {
	service  string
	policy   Policy
	listener net.Listener
	server   *grpc.Server
	cache    cache.SnapshotCache
	cancel   context.CancelFunc
	served   chan error

	mu       sync.Mutex    // guards what is below
	version  int           // of the last Set
	accepted int           // the last version whose endpoints a client has taken
	changed  chan struct{} // closed when accepted changes
}

// Start starts a control plane on loopback. It calls refused for each resource that a
// client refuses; the calls may overlap.
func Start(service string, policy Policy, refused func(typeURL, message string)) (*Server, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithCancel(context.Background())
	s := &Server{
		service: service, policy: policy, listener: l, server: grpc.NewServer(), cancel: cancel,
		cache:  cache.NewSnapshotCache(true, cache.IDHash{}, nil),
		served: make(chan error, 1), changed: make(chan struct{}),
	}
	callbacks := serverv3.CallbackFuncs{StreamRequestFunc: func(_ int64, r *discoveryv3.DiscoveryRequest) error {
		if e := r.GetErrorDetail(); e != nil {
			refused(r.GetTypeUrl(), e.GetMessage())
		} else if r.GetTypeUrl() == resource.EndpointType {
			s.accept(r.GetVersionInfo())
		}
		return nil
	}}
	discoveryv3.RegisterAggregatedDiscoveryServiceServer(s.server, serverv3.NewServer(ctx, s.cache, callbacks))
	go func() { s.served <- s.server.Serve(l) }()
	return s, nil
}

func (s *Server) accept(version string) {
	n, err := strconv.Atoi(version)
	if err != nil { // A first request has none.
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.accepted = n
	close(s.changed)
	s.changed = make(chan struct{})
}

// Addr returns the address that the control plane listens on.
func (s *Server) Addr() string { return s.listener.Addr().String() }

// Bootstrap returns the bootstrap config of clients, as in the file that GRPC_XDS_BOOTSTRAP
// names, which reach the control plane at addr: Addr, or that of a proxy before it.
func Bootstrap(addr string) []byte {
	return fmt.Appendf(nil, `{"xds_servers":[{"server_uri":%q,"channel_creds":[{"type":"insecure"}],"server_features":["xds_v3"]}],"node":{"id":%q}}`,
		addr, node)
}

// Close ends the control plane and its streams.
func (s *Server) Close() error {
	s.cancel()
	s.server.Stop()
	return <-s.served
}

// Set replaces the endpoints of the service.
func (s *Server) Set(localities ...Locality) error {
	resources, err := s.resources(localities)
	if err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.version++
	snapshot, err := cache.NewSnapshot(strconv.Itoa(s.version), resources)
	if err != nil {
		return err
	}
	return s.cache.SetSnapshot(context.Background(), node, snapshot)
}

// Wait waits until a client has taken the endpoints of the last Set, or ctx ends.
func (s *Server) Wait(ctx context.Context) error {
	for {
		s.mu.Lock()
		done, changed := s.accepted == s.version, s.changed
		s.mu.Unlock()
		if done {
			return nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

func (s *Server) resources(localities []Locality) (map[resource.Type][]types.Resource, error) {
	assignment := &endpointv3.ClusterLoadAssignment{ClusterName: s.service}
	for _, l := range localities {
		group := &endpointv3.LocalityLbEndpoints{
			Locality:            &corev3.Locality{Region: l.Region},
			LoadBalancingWeight: wrapperspb.UInt32(l.Weight),
			Priority:            l.Priority,
		}
		for _, e := range l.Endpoints {
			host, port, err := net.SplitHostPort(e.Addr)
			if err != nil {
				return nil, err
			}
			number, err := strconv.ParseUint(port, 10, 16)
			if err != nil {
				return nil, err
			}
			group.LbEndpoints = append(group.LbEndpoints, &endpointv3.LbEndpoint{
				LoadBalancingWeight: wrapperspb.UInt32(max(e.Weight, 1)),
				HostIdentifier: &endpointv3.LbEndpoint_Endpoint{Endpoint: &endpointv3.Endpoint{Address: &corev3.Address{
					Address: &corev3.Address_SocketAddress{SocketAddress: &corev3.SocketAddress{
						Address: host, PortSpecifier: &corev3.SocketAddress_PortValue{PortValue: uint32(number)},
					}},
				}}},
			})
		}
		assignment.Endpoints = append(assignment.Endpoints, group)
	}
	router, err := anypb.New(&routerv3.Router{})
	if err != nil {
		return nil, err
	}
	manager, err := anypb.New(&hcmv3.HttpConnectionManager{
		RouteSpecifier: &hcmv3.HttpConnectionManager_RouteConfig{RouteConfig: &routev3.RouteConfiguration{
			Name: s.service,
			VirtualHosts: []*routev3.VirtualHost{{Name: s.service, Domains: []string{"*"}, Routes: []*routev3.Route{{
				Match:  &routev3.RouteMatch{PathSpecifier: &routev3.RouteMatch_Prefix{Prefix: ""}},
				Action: &routev3.Route_Route{Route: &routev3.RouteAction{ClusterSpecifier: &routev3.RouteAction_Cluster{Cluster: s.service}}},
			}}}},
		}},
		HttpFilters: []*hcmv3.HttpFilter{{Name: "router", ConfigType: &hcmv3.HttpFilter_TypedConfig{TypedConfig: router}}},
	})
	if err != nil {
		return nil, err
	}
	return map[resource.Type][]types.Resource{
		resource.ListenerType: {&listenerv3.Listener{Name: s.service, ApiListener: &listenerv3.ApiListener{ApiListener: manager}}},
		resource.ClusterType: {&clusterv3.Cluster{
			Name:                 s.service,
			ClusterDiscoveryType: &clusterv3.Cluster_Type{Type: clusterv3.Cluster_EDS},
			EdsClusterConfig: &clusterv3.Cluster_EdsClusterConfig{EdsConfig: &corev3.ConfigSource{
				ResourceApiVersion:    corev3.ApiVersion_V3,
				ConfigSourceSpecifier: &corev3.ConfigSource_Ads{Ads: &corev3.AggregatedConfigSource{}},
			}},
			LoadBalancingPolicy: s.policy,
		}},
		resource.EndpointType: {assignment},
	}, nil
}

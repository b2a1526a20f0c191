// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

// Package kubernetes is a source of the endpoints of a Kubernetes service, which
// it follows through the API server's EndpointSlices.
//
//	cfg, err := rest.InClusterConfig()
//	if err != nil {
//		return err
//	}
//	src, err := kubernetes.New(cfg, "prod/orders:grpc")
//	if err != nil {
//		return err
//	}
//	conn, err := grpc.NewClient("belfry:///prod/orders", discover.WithSource(src), creds)
//
// To name the service in a target, "k8s:///prod/orders:grpc", register the scheme:
//
//	err := discover.Register("k8s", func(target resolver.Target) (discover.Source, error) {
//		return kubernetes.New(cfg, target.Endpoint())
//	})
//
// The program's service account needs the verbs list and watch for the resource
// endpointslices of the API group discovery.k8s.io in the service's namespace. A
// headless service needs no such right with discover.DNS, which knows no zones
// and no draining.
//
// # Endpoints
//
// The endpoints are those of all slices of the service. One that is in several
// slices, as happens while the controller moves it, counts once. A pod with an
// IPv4 and an IPv6 address is one endpoint with two addresses. The key of an
// endpoint is the name of its pod, or else its address. Its zone is that of its
// node.
//
// An endpoint that is ready is used. One that is terminating but still serving is
// draining (see discover.Draining): it gets no new calls while another endpoint
// can take them. All others are left out. What a client does with zones is up to
// its balancing policy; [Hints] follows the hints of topology aware routing
// instead.
//
// # Staleness and failures
//
// A change is seen as soon as the API server tells of it. While it cannot be
// reached the last set stays, each error is reported once until it answers, and
// client-go tries again after 0.8 s at first and after 30 s at most. A connection
// that is dead without being closed is found within 45 s.
//
// # Tests
//
// The tests run on a server of their own that speaks the protocol of the API server, and,
// where kube-apiserver and etcd are in PATH, on these: testdata/apiserver.sh builds them.
// The flag -outage=10s makes every outage that long, as it does in the tests of all
// sources.
//
// # Services
//
// A service that does not exist cannot be told from one without pods: both have no
// endpoints.
package kubernetes

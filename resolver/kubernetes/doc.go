// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

// Package kubernetes is a source of the endpoints of a Kubernetes service. It
// follows the EndpointSlices of the service in the API server.
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
// endpointslices of the API group discovery.k8s.io in the service's namespace. For
// a headless service discover.DNS needs no such permission, but it has no zones
// and no draining.
//
// # Endpoints
//
// The endpoints are those of all slices of the service. An endpoint may be in several
// slices while the controller moves it, and counts once. A pod with an IPv4 and an
// IPv6 address is one endpoint with two addresses. The key of an endpoint is the name
// of its pod, or its address if it has no pod. Its zone is that of its node.
//
// A ready endpoint is used. An endpoint that is terminating but still serving is
// draining (see discover.Draining): with the policy belfry.p2c it gets no new calls
// while another endpoint is READY. All others are left out. The balancing policy
// decides what to do with zones. [Hints] follows the hints of topology aware routing
// instead.
//
// # Staleness and failures
//
// A change is seen as soon as the API server reports it. While the API server cannot
// be reached, the last set stays, and each different error is reported once until it
// answers. client-go tries again after 0.8 s to 1.6 s at first, and after 30 s to 60 s
// at most. A connection that is dead but not closed is found within 45 s.
//
// # Tests
//
// The tests use a server that speaks the protocol of the API server. If kube-apiserver
// and etcd are in PATH, some tests use those too; testdata/apiserver.sh builds them. The
// flag -outage=10s sets the length of every outage, as in the tests of the other sources.
// By default it is 200 ms.
//
// # Services
//
// A service that does not exist looks the same as one without pods: both have no
// endpoints.
package kubernetes

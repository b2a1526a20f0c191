// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package p2c

import "google.golang.org/grpc"

// DialOptions makes a channel balance by belfry.p2c, and lets the policy see what a picker
// does not.
//
// The policy is chosen by a default service config, with the default config of the policy.
// A service config that the resolver delivers replaces it, and so does a
// [grpc.WithDefaultServiceConfig] that comes after these options, because gRPC takes the
// last one. It replaces all of it: without a loadBalancingConfig gRPC takes pick_first, so
// name the policy there too. A default service config that comes before these options is
// lost. If calls are balanced by another policy the first of them is logged as a warning.
//
// What a picker does not see is whether a call is a stream, when its first response arrives,
// and its true end. The policy works without it, but then
//
//   - the latency of a stream is its whole life, and a stream that goes on looks
//     like one that is not answered;
//   - a call that the server rejects before it has read the request may look like
//     a fast success, because grpc tells the balancer no error then;
//   - a retry by grpc's own retryPolicy may go to the endpoint that just failed.
//
// For that the options have a pair of chained interceptors. Give them to grpc.NewClient
// after other interceptors, so that they see each attempt by itself where
// another interceptor repeats calls. It costs a unary call one
// allocation, and one more of grpc's if there is another interceptor.
func DialOptions() []grpc.DialOption {
	i := &interceptors{}
	return []grpc.DialOption{
		grpc.WithDefaultServiceConfig(`{"loadBalancingConfig":[{"` + Name + `":{}}]}`),
		grpc.WithChainUnaryInterceptor(i.unary),
		grpc.WithChainStreamInterceptor(i.stream),
	}
}

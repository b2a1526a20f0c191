// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package p2c

import "google.golang.org/grpc"

// DialOptions returns what lets the policy see what a picker does not: whether a
// call is a stream, when its first response message arrives, and its true end.
// The policy works without it, but then
//
//   - the latency of a stream is its whole life, and a stream that goes on looks
//     like one that is not answered;
//   - a call that the server rejects before it has read the request may look like
//     a fast success, because grpc tells the balancer no error then;
//   - a retry by grpc's own retryPolicy may go to the endpoint that just failed.
//
// The options are a pair of chained interceptors. Give them to grpc.NewClient
// after other interceptors, so that they see each attempt by itself where
// another interceptor repeats calls. It costs a unary call one
// allocation, and one more of grpc's if there is another interceptor.
func DialOptions() []grpc.DialOption {
	return []grpc.DialOption{
		grpc.WithChainUnaryInterceptor(trackUnary),
		grpc.WithChainStreamInterceptor(trackStream),
	}
}

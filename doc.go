// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

// Package belfry is Tower for gRPC in Go: balancing, discovery and resilience
// for gRPC clients, built from gRPC's own parts.
//
// In Tower everything is a Service. gRPC-Go has the same thing already, and every
// generated stub accepts it: [google.golang.org/grpc.ClientConnInterface]. So
// belfry adds no abstraction of a call. It decorates calls with gRPC's own
// interceptors, balances inside gRPC's own balancer API, discovers through
// gRPC's own resolver API and is configured with gRPC's own service config. A
// program adopts belfry by adding dial options, and drops it by removing them.
//
// The directory docs of the module has pages on Kubernetes, on choosing layers and
// policies, on failures, on observability, and on moving from other libraries.
//
//	stub ─► layers: shed ► timeout ► limit ► retry ► …       interceptor/…      what may happen to a call
//	           │ one call, one attempt or several
//	           ▼
//	      grpc.ClientConn ─► a few endpoints, the least load  balancer/p2c       where an attempt goes
//	           ▲                      ▲
//	           │ endpoints            │ load
//	  resolver/discover             load                       which endpoints exist, how busy each one is
//
// Each part is a package of its own and works without the others. This package
// has what needs several parts, or none. [DialOptions] puts a stack of layers and
// the balancing policy into one list of options, in the right order. [WaitReady]
// makes a connection connect and waits until it can carry calls. [CallAll] makes
// a call for each of a sequence of requests, several at a time:
//
//	if err := belfry.WaitReady(ctx, conn); err != nil {
//		return err
//	}
//	for i, r := range belfry.CallAll(ctx, 16, requests, belfry.Bind(client.Unary)) {
//		if r.Err != nil {
//			return fmt.Errorf("request %d: %w", i, r.Err)
//		}
//		use(r.Response)
//	}
package belfry

// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

// Package steer sends each call to one of several connections, which a function chooses
// for the call. It is Tower's steer. Use it if calls of one stub belong to different
// servers, by tenant, by shard, by read or write.
//
//	conn, err := steer.New(func(ctx context.Context, method string, args any) int {
//		if strings.HasPrefix(method, "/orders.Orders/Get") {
//			return 1
//		}
//		return 0
//	}, primary, replica)
//	…
//	client := orders.NewOrdersClient(conn)
//
// A [Steer] is a grpc.ClientConnInterface over several connections: stubs take it as they
// take a connection, and so does the Wrap of a stack, whose layers then see the calls to
// all of them. Each connection may have its own stack.
//
// Only the chosen connection is asked for capacity, so one that is full or down does not
// delay calls to another. Tower's steer must become ready before it knows the request,
// and so waits until all of its services are ready.
//
// If the function chooses a connection that does not exist, the call is refused with
// INTERNAL and reason [ReasonNoRoute].
package steer

// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

// Package steer sends each call to one of several connections, which a function
// chooses by what the call is: Tower's steer. Use it where calls of one stub belong
// to different servers, by tenant, by shard, by read or write.
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
// A [Steer] is a grpc.ClientConnInterface over others: stubs take it as they take a
// connection, and so does the Wrap of a stack, whose layers then see the calls to
// all of them. Each of the connections may have a stack of its own.
//
// Only the chosen connection is asked for capacity. One that is full or down holds
// up no call to another; Tower's steer, which has to become ready before it knows
// the request, waits until all of them are.
package steer

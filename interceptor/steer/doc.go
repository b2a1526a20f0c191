// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

// Package steer sends each call to one of several connections, which a function chooses
// for the call. It is Tower's steer. Use it if calls of one stub belong to different
// servers, by tenant, by shard, by read or write.
//
//	conn, err := steer.New(func(ctx context.Context, method string, args any) (context.Context, string, error) {
//		if strings.HasPrefix(method, "/orders.Orders/Get") {
//			return nil, "replica", nil
//		}
//		return nil, "primary", nil
//	}, map[string]grpc.ClientConnInterface{"primary": primary, "replica": replica})
//	…
//	client := orders.NewOrdersClient(conn)
//
// A [Steer] is a grpc.ClientConnInterface over several connections: stubs take it as they
// take a connection, and so does the Wrap of a stack, whose layers then see the calls to
// all of them. Each connection may have its own stack.
//
// The function may refuse the call with an error, and change its context. If it returns a
// key without a connection, the call is refused with INTERNAL and reason [ReasonNoRoute].
//
// [Steer.Update] replaces the connections and says when the calls on the old ones have
// ended:
//
//	free, err := conn.Update(map[string]grpc.ClientConnInterface{"primary": promoted, "replica": replica})
//	…
//	<-free
//	primary.Close()
//
// Only the chosen connection is asked for capacity, so one that is full or down does not
// delay calls to another. Tower's steer must become ready before it knows the request,
// and so waits until all of its services are ready.
package steer

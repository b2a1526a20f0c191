// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

// Package maker makes connections on demand, one per key, and closes those that nobody
// uses. It is Tower's MakeService with a cache. Use it if the calls of one stub go to
// servers that are only known when the call is made, one per tenant, shard or address,
// and there are too many to be connected to all.
//
//	conn, err := maker.New(maker.Config{MaxConns: 100, IdleTimeout: 5 * time.Minute},
//		func(ctx context.Context, method string, args any) (string, error) { return tenantOf(ctx) },
//		func(ctx context.Context, tenant string) (maker.Conn, error) {
//			return grpc.NewClient("dns:///"+tenant+".example.com", dialOptions...)
//		})
//	…
//	defer conn.Close()
//	client := orders.NewOrdersClient(conn)
//
// A [Maker] is a grpc.ClientConnInterface: stubs take it as they take a connection,
// and so does the Wrap of a stack. A call whose key has no connection makes it, and calls
// with the same key wait for the same one meanwhile. If a connection cannot be made, the
// calls that waited for it fail, and the next call tries again: failures are not
// remembered. A connection lives while a call or a stream uses it, and IdleTimeout longer.
//
// There are at most MaxConns at a time. At that bound a call with a new key replaces the
// connection that has been idle for longest, which is closed in the background. If all
// are in use the call waits as long as its context, Config.MaxWait and
// interceptor.WithWait allow, and is then refused with UNAVAILABLE and reason
// CONCURRENCY.
//
// Keys that wait are served in the order in which they came, and no busy key keeps them
// out: for each of them one connection yields, the one that has been in use for longest.
// Later calls of its key wait behind the others, until it becomes unused and is replaced,
// or nobody before them waits any more. So where more keys are busy than MaxConns allows,
// they take turns, and each turn costs the making of a connection.
//
// A call waits for its connection to be made equally long, but at least 20 ms, and is
// then refused with reason NOT_READY. So a load shed in the stack in front sheds calls
// that would have to wait for another connection to become idle, or for one that takes
// long to make. Drain of the stack in front and [Maker.Close] wake the calls that wait.
//
// A connection takes no new calls after Config.MaxAge, or after [Maker.Forget] of its key,
// and is closed when those in flight have ended. [Maker.Stats] counts what there is, and
// an [Observer] is told what is made and closed, and what has waited.
//
// A Maker does not ask whether a connection is READY. A stack on the connection itself,
// which the MakeFunc gives it, does.
package maker

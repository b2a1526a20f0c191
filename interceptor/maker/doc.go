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
// are in use the call waits, first come first served, as long as its context,
// Config.MaxWait and interceptor.WithWait allow, and is then refused with UNAVAILABLE and
// reason CONCURRENCY. While keys wait, once a second the connection that was made first
// stops taking new calls, and is closed when those in flight have ended, so that busy
// keys do not keep the others out for ever.
//
// A call waits for its connection to be made equally long, but at least 20 ms, and is
// then refused with reason NOT_READY. So a load shed in the stack in front sheds calls
// that would have to wait for another connection to become idle, or for one that takes
// long to make. Drain of the stack in front and [Maker.Close] wake the calls that wait.
//
// A Maker does not ask whether a connection is READY. A stack on the connection itself,
// which the MakeFunc gives it, does.
package maker

// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

// Package maker makes connections on demand, one per key, and closes those that
// nobody uses: Tower's MakeService, with a cache. Use it where calls of one stub go
// to servers that are only known when the call is made, one per tenant, shard or
// address, and too many of them to be connected to all.
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
// and so does the Wrap of a stack. A call whose key has no connection makes it, and
// calls with the same key that come meanwhile wait for the same one. A connection
// that could not be made is an error to those that waited for it, and the next call
// tries again: failures are not remembered. A connection lives while a call or a
// stream uses it, and IdleTimeout longer.
//
// There are at most MaxConns at a time. At that bound a call with a new key takes the
// place of the connection that has been idle for longest, which is closed in the
// background. If all are in use it waits, first come first served, as long as its
// context, Config.MaxWait and interceptor.WithWait allow, and is then refused with
// UNAVAILABLE and reason CONCURRENCY. While keys wait, once in a second the connection
// that was made first takes no new calls and is closed when those in flight have ended,
// so that a busy key does not keep the others out for ever.
//
// A call waits for its connection to be made just so long, but at least 20 ms, and is
// then refused with reason NOT_READY. So a load shed in the stack in front works: it
// sheds what would wait for another connection's end, or for one whose making hangs.
// The end of the stack in front wakes what waits here, and so does [Maker.Close].
//
// A Maker does not ask whether a connection is READY. A stack on the connection itself,
// which the MakeFunc gives it, does.
package maker

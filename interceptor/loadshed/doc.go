// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

// Package loadshed refuses calls that would have to wait: a call for which the
// layers inside have no capacity now ends at once. It is Tower's load_shed. Use it
// where a caller is better served by a fast error than by a position in a queue, and
// to keep queues from building up in front of a limit.
//
//	stack, err := interceptor.NewStack(loadshed.Config{}, concurrency.Config{Limit: 10})
//
// It sheds when a layer inside is not ready (a concurrency or rate limit, a full
// buffer) or the connection is not, and only then: it never refuses capacity that is
// there. The error is that of the layer that was not ready, with its name, reason,
// code and retry-after. An error of your own gate that is neither a refusal nor has a
// gRPC status becomes UNAVAILABLE with reason SHED. A call that is shed was not sent,
// and other layers get back what they took for it.
//
// # The connection
//
// While no endpoint is READY, calls are refused with UNAVAILABLE and reason NOT_READY.
// That includes IDLE, the state of a new connection and of one that was not used for
// half an hour: the first call makes it connect and is refused. To keep the first
// calls, put a buffer inside, in which they wait for the connection, or call
// belfry.WaitReady before them.
//
// # Order
//
// It acts on what is inside it, so put it outside the limits. NewStack rejects it
// if nothing inside makes calls wait. A buffer inside it lets its calls wait:
//
//	Shed > Limit(10)               10 calls run, the next is refused
//	Shed > Buffer(100) > Limit(10) 10 calls run, 100 wait, the next is refused
//
// Without a buffer inside it also refuses calls while the connection connects: the
// first ones after grpc.NewClient, and after half an hour without calls, when gRPC
// lets a connection be IDLE. If they shall succeed, call belfry.WaitReady after
// grpc.NewClient and pass grpc.WithIdleTimeout(0).
//
// Outside a retry it refuses calls and further attempts alike, unless a buffer inside
// lets them wait.
package loadshed

// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

// Package loadshed refuses calls that would have to wait: a call for which the
// layers inside have no capacity now ends at once. It is Tower's load_shed. Use it
// where a caller is better served by a fast error than by a position in a queue, and
// to keep queues from building up in front of a limit.
//
//	stack, err := interceptor.NewStack(loadshed.Config{}, concurrency.Config{Limit: 10})
//
// It sheds whenever a layer inside is not ready (a concurrency or rate limit, a full
// buffer, a connection without a READY endpoint) and only then: capacity that is
// there is never refused, and it has no state of its own that could be wrong about it.
// The error is the one of the layer that was not ready, with its name, reason, code
// and retry-after, so that an error or a metric says what was short. An error of a
// gate of yours that is neither a refusal nor has a gRPC status becomes UNAVAILABLE
// with reason SHED. Whatever other layers have taken for a call that is shed they get
// back.
//
// # Order
//
// It acts on what is inside it, so it stands outside of the limits; NewStack rejects
// it where nothing inside can be not ready. A buffer inside it lets its calls wait:
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

// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

// Package interceptor puts layers around gRPC calls: limits, deadlines, retries,
// hedges, breakers, in an order that is the program. It is Tower's Layer and
// ServiceBuilder for gRPC, as ordinary client interceptors. Use it where a call
// may meet a server that is slow, busy or failing, which is everywhere; use the
// packages below it for the layers.
//
//	stack, err := interceptor.NewStack(
//		interceptor.Observe(obs), // layers, the outermost first
//		limit,
//	)
//	…
//	conn, err := grpc.NewClient(target, append(stack.DialOptions(), creds)...)
//
// # Two paths
//
// A layer takes part in admission, in the call, or in both. Admission runs first,
// through all gates from the outermost to the innermost; each may wait, as long
// as its [Wait] allows, or refuse. Only then the call path runs, which never
// waits for capacity. That is why a load shed can stand outside a limit: it asks
// everything inside it to be ready now, and refuses the call if it is not,
// before anything was sent and with everything given back that gates further out
// have taken ([NotSent]).
//
// What a gate takes it holds until the call is over, and a stream is over when
// it has ended, not when it was opened: a permit is held for the life of a
// stream. Streams end when they are read to their end, when their context ends
// or when the connection is closed; one of the three has to happen, as gRPC
// requires anyway.
//
// # Order
//
// The first layer sees a call first. What that means is best counted in calls.
// Let Buffer(100) be a queue of 100 places, inside which waiting is allowed
// again, Limit(10) a limit of ten calls at a time, and Shed a load shed:
//
//	Buffer(100) > Limit(10)          10 run, 100 wait, the next is refused: 110 in the stack
//	Limit(10) > Buffer(100)          10 run, none ever waits in the buffer, for at most
//	                                 ten calls reach it; the others wait at the limit, without bound
//	Shed > Limit(10)                 10 run, the next is refused
//	Limit(10) > Shed                 10 run, the others wait: there is nothing inside the shed
//	                                 that could be not ready
//	Shed > Buffer(100) > Limit(10)   as the first: the buffer waits on behalf of the shed's calls
//	Buffer(100) > Shed > Limit(10)   as Shed > Limit(10): the shed takes the buffer's waiting away
//
// Layers outside one that makes several attempts, such as a retry, see calls;
// those inside it see attempts, each with an admission of its own:
//
//	Limit(10) > Retry(3)      10 calls; a call keeps its permit while it backs off
//	Retry(3) > Limit(10)      10 attempts; while a call backs off another may run
//	Rate(100/s) > Retry(3)    100 calls a second, up to 300 attempts
//	Retry(3) > Rate(100/s)    100 attempts a second, retries among them
//	Timeout(1s) > Retry(3)    one second for the call with all its attempts and back-offs
//	Retry(3) > Timeout(1s)    one second for each attempt: over three seconds in all
//	Hedge(2) > Limit(10)      10 attempts: a hedged call holds two permits
//	Limit(10) > Hedge(2)      10 calls, up to 20 attempts
//
// A further attempt never queues: it is admitted with [None], and if it cannot
// be, the call ends with what it has. A deadline covers everything inside its
// layer, waiting included. A common order, from outside in, is: observe, shed,
// timeout, hedge, retry, breaker, buffer, rate, limit.
//
// [Stack.String] prints the order. [NewStack] rejects what cannot work.
//
// # Refusals
//
// A call that a layer refused returns a [*Refusal], which errors.As finds and
// whose gRPC status carries ErrorInfo and, where known, RetryInfo. Rate and
// quota refuse with RESOURCE_EXHAUSTED, deadlines end with DEADLINE_EXCEEDED, a
// filter says PERMISSION_DENIED unless told otherwise, and limits, queues, sheds,
// breakers and a drain refuse with UNAVAILABLE; see [Reason].
//
// # A layer of your own
//
// A limiter from elsewhere becomes a layer with [FromSemaphore], [FromPermit],
// [FromAllow] or [FromLimiter], a pair of interceptors with [Foreign]. To write
// one, implement [Layer]: embed [GateOnly] and write WrapGate, or embed
// [CallOnly] and write WrapCall. A gate serves all kinds of call alike, for it
// sees no messages.
package interceptor

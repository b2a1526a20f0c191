// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

// Package interceptor puts layers around gRPC calls: limits, deadlines, retries,
// hedges, breakers. Their order is the program. It is Tower's Layer and
// ServiceBuilder for gRPC, as ordinary client interceptors. Use it where a call
// may meet a server that is slow, busy or failing, which is everywhere; the
// packages below it are the layers.
//
//	stack, err := interceptor.NewStack(
//		loadshed.Config{}, // the outermost layer
//		timeout.Config{Timeout: time.Second},
//		retry.Config{},
//		buffer.Config{Size: 50},
//		concurrency.Config{Limit: 20},
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
// everything inside it to be ready now, and refuses the call if it is not, before
// anything was sent and with everything given back that gates further out have
// taken.
//
// What a gate takes it holds until the call is over. A stream is over when it has
// ended, not when it was opened: a permit is held for the life of a stream.
// Streams end when they are read to their end, when their context ends or when the
// connection is closed; one of the three has to happen, as gRPC requires anyway.
//
// # Order
//
// The first layer sees a call first. Use this order, and leave out what you do not
// need:
//
//	observe > shed > timeout > hedge > retry > buffer > limit > rate > breaker (or throttle)
//
// What waits stands outside, and what decides without waiting (rate, breaker,
// throttle) stands inside it, so that a decision still holds when the call is sent.
// [Stack.String] prints the order, [NewStack] rejects what cannot work, and
// [Stack.Advice] says what works but is rarely meant.
//
// The effect of an order is best counted in calls. Let Buffer(100) have 100 slots in
// which calls may wait, and let Limit(10) admit ten calls at a time:
//
//	Buffer(100) > Limit(10)          10 run, 100 wait, the next is refused: 110 in the stack
//	Buffer(100) > Limit(10) > Rate   as above, wherever the 100 wait: a buffer bounds everything
//	                                 that waits inside it
//	Limit(10) > Buffer(100) > Rate   10 calls reach the buffer; the others wait at the limit,
//	                                 without bound
//	Shed > Limit(10)                 10 run, the next is refused
//	Shed > Buffer(100) > Limit(10)   as the first: the buffer waits on behalf of the shed's calls
//	Buffer(100) > Shed > Limit(10)   as Shed > Limit(10): the shed takes the buffer's waiting away
//
// What decides belongs inside of what waits:
//
//	Limit(10) > Rate(100/s)          at most Burst + 100 t calls are sent in any time t
//	Rate(100/s) > Limit(10)          at most that many come to the limit. After a stall of 10 s the
//	                                 1000 that wait there are sent as fast as permits become free
//	Buffer > Limit(1) > Breaker(3)   three failures open the circuit, and all that wait are refused
//	                                 when their turn comes: 3 of 100 calls are sent
//	Breaker(3) > Buffer > Limit(1)   the 97 that passed the breaker before it opened are all sent
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
//	Timeout(1s) > Timeout(2s) the inner one never acts
//	Hedge(2) > Limit(10)      10 attempts: a hedged call holds two permits
//	Limit(10) > Hedge(2)      10 calls, up to 20 attempts
//	Hedge(2) > Retry(3)       up to 2 times 3 attempts: each attempt of the hedge is retried
//	Retry(3) > Hedge(2)       up to 3 times 2 attempts, each hedged after its own delay
//
// # Waiting
//
// How long a call may wait is a parameter of its admission, not a mode of the
// limiter: a load shed says [None], a fail-fast says until when, and a buffer says
// that the calls in its slots may wait after all. Nothing refuses capacity that is
// there.
//
// A retry waits with what is left of its call's wait, ahead of the first attempts
// of its priority in every queue: it carries work that is paid for already. Its
// budget bounds how many there are. If it is refused, the call ends with the
// server's last error, in which errors.As finds the [*Refusal] that says which
// layer refused the retry and why.
//
// Calls of a higher priority ([ContextWithPriority]) go ahead, and a full queue
// refuses the lowest.
//
// While no endpoint is READY, a connection is not ready, like a limit without a
// permit: a load shed refuses (NOT_READY), a fail-fast refuses after its bound, and
// a call that may wait waits, without holding permits or tokens of layers further
// in. A call that may wait, but that gRPC itself would fail at once because all
// endpoints fail and it does not wait for ready, passes and gets gRPC's error.
//
// A connection is IDLE after grpc.NewClient, and again after half an hour without
// calls (grpc.WithIdleTimeout). Then a load shed with no buffer inside refuses the
// first calls, which make it connect. Call belfry.WaitReady before the first call,
// and turn the idle timeout off with grpc.WithIdleTimeout(0), or let calls wait
// with a buffer inside the load shed.
//
// Closing the connection and [Stack.Drain] end every wait, in gates and in
// back-offs. What is on the wire goes on under Drain.
//
// # What became of a call
//
// Gates, budgets, breakers, algorithms and observers are all told the same
// [Outcome]. A call counts as sent only if gRPC made a stream for it. A call whose
// context was over, whose request was too large or whose credentials failed costs
// nothing and blames nobody. The end of the caller's patience says that the server
// took at least that long, and no more. A stream is judged by its first response.
//
// How gRPC is asked: a unary call gets the options [grpc.Peer] and [grpc.Trailer],
// which gRPC fills in only for an attempt that it made a stream for. That works
// with any balancing policy, and costs one small allocation on a connection, and
// nothing for a call of which no layer holds anything. An interceptor behind the
// stack that drops options, or that answers by itself, makes calls look unsent.
//
// # Refusals
//
// A call that a layer refused returns a [*Refusal], which errors.As finds and
// whose gRPC status carries ErrorInfo and, where known, RetryInfo. Rate and quota
// refuse with RESOURCE_EXHAUSTED, deadlines end with DEADLINE_EXCEEDED, a filter
// says PERMISSION_DENIED unless told otherwise, and limits, queues, sheds, breakers
// and a drain refuse with UNAVAILABLE; see [Reason].
//
// # A layer of your own
//
// A third-party limiter becomes a layer with [FromSemaphore], [FromPermit],
// [FromAllow] or [FromLimiter], a pair of interceptors with [Foreign]. To write
// one, implement [Layer]: embed [GateOnly] and write WrapGate, or embed
// [CallOnly] and write WrapCall. A gate serves all kinds of call alike, because it
// sees no messages. Two examples below are whole layers: a request id, and a quota
// for each tenant. Package layertest checks that a layer keeps the rules.
package interceptor

// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

// Package interceptor puts layers around gRPC calls: limits, deadlines, retries,
// hedges, breakers. Their order decides what they do together. It is Tower's Layer
// and ServiceBuilder for gRPC, as ordinary client interceptors. Use it where a call
// may meet a server that is slow, busy or failing, which is everywhere. The layers
// are the packages below this one.
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
// # Admission, then the call
//
// A layer takes part in admission, in the call path, or in both. Admission runs
// first, through all gates from the outermost to the innermost. A gate may wait, as
// long as its [Wait] allows, or refuse. The call path runs only after all gates have
// admitted the call, and never waits for capacity. So a load shed works outside a
// limit: it asks everything inside to be ready now. If something is not, the call is
// refused before anything is sent, and gates further out take back what they gave.
//
// What a gate takes it holds until the call is over. A stream is over when it has
// ended, not when it was opened: a stream holds its permit for its whole life.
// A stream ends when it is read to its end, when its context ends or when the
// connection is closed. gRPC requires one of the three anyway.
//
// # Order
//
// The first layer sees a call first. Use this order, and leave out what you do not
// need:
//
//	observe > shed > timeout > hedge > retry > buffer > limit > rate > breaker (or throttle)
//
// Layers that make calls wait come first. Layers that decide without waiting (rate,
// breaker, throttle) come inside them, so that their decision still holds when the
// call is sent. [Stack.String] prints the order.
//
// [NewStack] rejects an order that cannot work, and says what to write instead: the
// same layer value twice, a shed, fail-fast or buffer with no limit inside, or two
// observers. A call that passes the same stack twice fails with INTERNAL.
//
// [Stack.Advice] lists what is legal and rarely meant, one sentence each. NewStack
// logs it once:
//
//   - a breaker, throttle or rate outside a layer that makes calls wait,
//   - a retry outside a hedge,
//   - an inner timeout that is not shorter than an outer one.
//
// The tables below give the arithmetic.
//
// What waits: Buffer(100) has 100 slots in which calls may wait, and Limit(10) admits
// ten calls at a time.
//
//	Buffer(100) > Limit(10)          10 run, 100 wait, the next is refused: 110 in the stack
//	Buffer(100) > Limit(10) > Rate   100 wait, at the limit and the rate together: a buffer bounds
//	                                 everything that waits inside it
//	Limit(10) > Buffer(100) > Rate   10 calls reach the buffer; the others wait at the limit,
//	                                 without bound
//	Shed > Limit(10)                 10 run, the next is refused
//	Shed > Buffer(100) > Limit(10)   as the first: the buffer waits on behalf of the shed's calls
//	Buffer(100) > Shed > Limit(10)   as Shed > Limit(10): the shed takes the buffer's waiting away
//
// What decides belongs inside what waits:
//
//	Limit(10) > Rate(100/s)          at most Burst + 100 t calls are sent in any time t
//	Rate(100/s) > Limit(10)          at most that many reach the limit. After a stall of 10 s the
//	                                 1000 that wait there are sent as fast as permits become free
//	Buffer > Limit(1) > Breaker(3)   three failures open the circuit, and all that wait are refused
//	                                 when their turn comes: 3 of 100 calls are sent
//	Breaker(3) > Buffer > Limit(1)   the 97 that passed the breaker before it opened are all sent
//
// Layers outside one that makes several attempts, such as a retry, see calls;
// those inside it see attempts, each with an admission of its own:
//
//	Limit(10) > Retry(3)      10 calls; a call keeps its permit while it backs off
//	Retry(3) > Limit(10)      10 attempts; while a call backs off, another may run
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
// How long a call may wait is a parameter of its admission ([Wait]), not a mode of
// the limiter. A load shed passes [None], a fail-fast passes a moment, and a buffer
// lets the calls in its slots wait after all. No layer refuses capacity that is there,
// except that a concurrency limit keeps some for higher priorities where calls may not
// wait.
//
// A retry waits with what is left of its call's wait, ahead of the first attempts
// of its priority in every queue, because it carries work that is already paid for.
// Its budget bounds how many there are. If it is refused, the call ends with the
// server's last error, in which errors.As finds the [*Refusal] that says which
// layer refused the retry and why.
//
// The extra attempt of a hedge waits ahead of first attempts too, but only until
// another attempt answers. It is expendable: no other call is refused to make room
// for it, and any call takes its slot in a full buffer.
//
// A single call bounds its own waits with [WithWait], and its attempts with the options of
// package attempts, which also reports what happened to it.
//
// Calls of a higher priority ([ContextWithPriority]) go first, and a full queue
// refuses the lowest.
//
// # Readiness of the connection
//
// A connection with no READY endpoint is like a limit without a permit. A load shed
// refuses at once with reason NOT_READY, a fail-fast refuses after its bound, and a
// call that may wait waits, without holding permits or tokens of layers further in.
// If all endpoints fail and the call does not wait for ready, gRPC itself would fail
// it at once; a call that may wait passes and gets gRPC's error.
//
// IDLE is not READY either. A connection is IDLE after grpc.NewClient, and again
// after half an hour without calls (grpc.WithIdleTimeout), until a call makes it
// connect. Under a load shed that call is refused, unless a buffer inside lets it wait.
// Otherwise call belfry.WaitReady first, and turn the idle timeout off.
//
// The timeout that gRPC's service config has for a method bounds the whole call, with
// its waiting and all its attempts.
//
// Closing the connection and [Stack.Drain] end every wait, in gates and in
// back-offs. Drain lets attempts that are on the wire finish.
//
// # What became of a call
//
// All layers, the observer and the budgets learn the same [Outcome] of a call or
// attempt. It does not depend on the status code alone: a call was sent only if gRPC
// made a stream for it.
//
//   - A layer inside refused it, or its context ended before it was handed to the
//     connection: [NotSent]. Tokens, permits and the budget's charge are given back,
//     and limits, breakers and throttles learn nothing.
//   - gRPC refused the request before it made a stream (too large, not marshallable,
//     bad metadata, failed credentials): [NotSent], the same.
//   - There was no connection (no READY endpoint, a resolver error, connection
//     refused, the deadline passed while waiting for READY): [NotConnected].
//     Everything is given back. A breaker counts a failure and a throttle does not,
//     unless its Config says otherwise.
//   - The server answered and the client could not take the answer (too large, not
//     unmarshallable): [OK]. The server did its part.
//   - The caller cancelled, or the caller's deadline passed, after some time:
//     [Ignored]. What was taken is spent. All that is known is that the server needed
//     at least that time. An adaptive limit takes it for a drop beyond its own bound,
//     a breaker for a slow call beyond SlowCall, and the balancer's load metric for a
//     latency of at least that.
//   - The deadline of a layer passed: [Failed], with DEADLINE_EXCEEDED, even if gRPC
//     says CANCELLED.
//   - The server answered with a status: [OK] or [Failed]. Each layer judges the code.
//   - A stream of responses is judged by the first one, headers or message: that is
//     its success and its latency. A probe of a breaker that has responded does not
//     fail later.
//
// For a unary call the stack asks gRPC with the options [grpc.Peer] and
// [grpc.Trailer], which gRPC fills in only if it made a stream. That works with any
// balancing policy. It costs one small allocation on a connection, and nothing if no
// layer holds anything for the call. An interceptor inside the stack that drops
// options, or that answers by itself, makes calls look unsent.
//
// # Refusals
//
// A call that a layer refused returns a [*Refusal]. errors.As finds it, and its gRPC
// status carries ErrorInfo and, if the layer knows it, RetryInfo. Rate and quota
// refuse with RESOURCE_EXHAUSTED, deadlines end with DEADLINE_EXCEEDED, a filter
// says PERMISSION_DENIED unless told otherwise, and limits, queues, sheds, breakers
// and a drain refuse with UNAVAILABLE; see [Reason].
//
// # A layer of your own
//
// Package adapt makes layers of third-party limiters, and [Foreign] makes one of a pair
// of interceptors. To write
// your own, implement [Layer]: embed [GateOnly] and write WrapGate, or embed
// [CallOnly] and write WrapCall. A gate serves all kinds of call alike, because it
// sees no messages. A gate that waits does so with the context of [Admission.Park],
// so that Drain and ClientConn.Close reach its calls. A layer that tells calls apart
// takes a [KeyBy]. Two examples below are whole layers: a request id, and a quota
// for each tenant. Package layertest checks that a layer keeps the rules.
package interceptor

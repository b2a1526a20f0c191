// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

// Package hedge makes a second attempt of calls that take unusually long, and takes
// whichever answers first. It is Tower's hedge and Finagle's backup requests ("The Tail
// at Scale", Dean and Barroso, 2013), for gRPC calls of all four kinds. Use it for methods
// that may be carried out twice, if now and then one of several servers is slow: it makes
// a few more calls for a shorter tail. It hedges only methods that are declared
// idempotent, or that you name.
//
//	stack, err := interceptor.NewStack(
//		timeout.Config{Timeout: time.Second},
//		hedge.Config{MaxExtraLoad: 0.02, Methods: []string{"/shop.Orders/List"}},
//		buffer.Config{Size: 50},
//		concurrency.Config{Limit: 20},
//	)
//
// # When an extra attempt is made
//
// An extra attempt is made after a delay, which is a percentile of the recent
// latencies of the method, or a fixed one, or none ([None]); or at once when an attempt
// fails with one of Config.NonFatal, as in gRFC A6. Config.MaxExtraLoad sets the
// percentile and the budget together, as Finagle's. The delay starts when the call is
// admitted, so it is not spent on waiting for a connection. An extra attempt is not made
//
//   - before MinDataPoints latencies are known, unless the delay is fixed;
//   - when the call has made MaxAttempts, or the budget (package budget) of
//     MaxExtraLoad of the calls is spent. So a server that becomes slow for all calls
//     does not get twice the calls;
//   - more often than once a second, while at least three times as many calls are due for
//     one as the percentile says and hardly any of the extra attempts win: then all
//     servers are busy, and an extra attempt only adds to the load;
//   - when the layers inside refuse it; that costs nothing, and it is tried again
//     after another delay;
//   - after a server has answered with a negative grpc-retry-pushback-ms; if it asks
//     for a delay, by that or by RetryInfo, not before then, and not at all if that is
//     more than Config.MaxServerDelay (10 s by default);
//   - after the stack was told to drain;
//   - for a method that may not be carried out twice, see below.
//
// # Which methods
//
// An extra attempt carries the method out twice, mostly. So a call is hedged only if its
// method is declared idempotent in its .proto file (option idempotency_level, whose file
// is linked in if the stub is), if Config.Methods names it or its service, if
// [WithIdempotent] allows it, if the call says so (package attempts), or if
// Config.AllMethods is true. The observer is told, with reason NOT_IDEMPOTENT, of each
// unary call that would have been hedged otherwise.
//
// # At a limit
//
// An extra attempt waits for the layers inside with what is left of its call's wait, and
// at most until another attempt answers. Without waiting it would never be made while
// calls queue at a limit, because every free permit goes to one of those, and that is
// just when stalled calls hold the permits. It goes ahead of first attempts in every
// queue, but no other call is refused for it: if a buffer or a bounded queue is full the
// extra attempt is refused, and any call takes its slot in a buffer. With 40 callers, a
// limit of 20, and a server where one attempt in twenty takes 200 ms and the others
// 10 ms, p99 is 50 ms with a delay of 15 ms, and 220 ms without waiting or without
// hedging.
//
// # Who wins
//
// The first success, or the first failure that is not one of NonFatal: it is the answer
// of the server, such as NOT_FOUND, and another attempt would hardly get a better one. As
// in A6 it ends the call at once. A failure that is one of NonFatal never wins while
// another attempt runs, and neither does that of an attempt that was not sent, for
// example because its credentials failed. When all attempts have failed the caller gets
// the last failure, but a deadline, of the caller or of a layer, never replaces what a
// server has said. If an attempt that was to follow a failure was refused, the error says
// by which layer, as a retry's does ([interceptor.RefusedAgain]). [WithPolicy] decides
// otherwise, also by the reply.
//
// The others are cancelled; they are neither failures nor successes to the layers inside
// and to the balancing policy. Each attempt has its own reply, and its own results for
// Header, Trailer and Peer options; the caller gets the winner's. Further attempts carry
// grpc-previous-rpc-attempts, the number of attempts before, those in flight included, and
// the policy belfry.p2c prefers endpoints for them that the call has not tried.
//
// The call does not wait for those that have lost. gRPC ends nearly all of them at once,
// but it cannot interrupt credentials that fetch a token, or a codec. Until then such an
// attempt holds its permits, Stack.Drain waits for it, and it may read the request: a
// caller that changes a request to send it again must make a copy instead, as gRPC
// requires of SendMsg. An attempt that panics after the call has ended is logged.
//
// A hedge outside a retry makes up to as many attempts as both multiplied. A retryPolicy in
// gRPC's service config would multiply that once more, and no budget would count it.
// [interceptor.Stack.DialOptions] turns it off. Whoever gives the interceptors to a channel
// by hand, or wraps it, dials it with grpc.WithDisableRetry.
//
// # Latencies
//
// Each attempt that was answered is recorded, from when it was admitted. Answers are
// successes and INVALID_ARGUMENT, NOT_FOUND, ALREADY_EXISTS, PERMISSION_DENIED,
// FAILED_PRECONDITION, ABORTED and OUT_OF_RANGE; other failures come sooner or later than
// an answer and are not recorded. A first attempt is also recorded when another one won,
// with the time until then: otherwise the slowest calls would be missing, and the delay
// would become shorter and shorter. Each method has its own latencies, up to 1,000
// methods that were called within the window; those beyond share one window for unary
// calls and one for streams. Where more calls are slow than MaxExtraLoad there is nothing
// to gain by default: a method of which 5 % take 100 ms and the others 3 ms gets a delay
// of 6 ms, and p99 falls to 9 ms, but if 7 % are slow the delay is 100 ms. Set a fixed
// Delay or a larger MaxExtraLoad for it.
//
// # Streams
//
// A stream is hedged while its first RecvMsg waits for its first message, and its latency
// is how long that takes. What was sent is kept until then, encoded, and sent to extra
// attempts as well, as by package retry. Before that an attempt that SendMsg or Header
// finds to have failed with one of NonFatal is followed by another one. A stream is not
// hedged if it sends more than BufferBytes first, or if it cannot be opened. Header waits
// beside the race for the header of the oldest attempt that has not failed. When that comes
// it ends the race, and the stream is that attempt.
//
// # Order
//
// Hedge outside retry: an extra attempt is then repeated like the first. A timeout
// outside covers all attempts. A limit outside counts calls, a limit inside counts
// attempts. Give retry and hedge one budget to bound both together.
//
// # Cost
//
// A unary call that may be hedged runs its first attempt on a goroutine of its own, with a
// reply of its own that is copied if it wins: otherwise it could not return while gRPC
// holds that attempt. If no extra attempt is made, that costs two switches of goroutines
// and 10 allocations of 1 kB in all, where client and server make 156 for an empty call:
// half of them are for a context that can be cancelled, and for gRPC's below it.
// The first attempt of a stream, which is open by then, is received from on the caller's
// goroutine. A bidirectional stream of a message each way costs 20 allocations, where it
// has 164 without a stack and 171 in one without layers. A unary call that may not be
// hedged costs one.
//
// The figures here are counted by
//
//	go test -run='^$' -bench=Connection -benchmem ./internal/acceptance
//	go test -run='TestUnderLoad|TestBimodal' -v ./interceptor/hedge
package hedge

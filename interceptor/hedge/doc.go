// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

// Package hedge makes a second attempt of calls that take unusually long, and
// takes whichever answers first. It is Tower's hedge and Finagle's backup
// requests ("The Tail at Scale", Dean and Barroso, 2013), for gRPC calls of all
// four kinds. Use it for methods that may be carried out twice, where now and then
// one of several servers is slow: it trades a few more calls for a shorter tail.
//
//	stack, err := interceptor.NewStack(
//		timeout.Config{Timeout: time.Second},
//		hedge.Config{MaxExtraLoad: 0.02},
//		buffer.Config{Size: 50},
//		concurrency.Config{Limit: 20},
//	)
//
// # When an extra attempt is made
//
// An extra attempt is made after a delay, which is a percentile of the recent
// latencies, or a fixed one; or at once when an attempt fails with one of
// Config.NonFatal, as in gRFC A6. Config.MaxExtraLoad sets the percentile and the
// budget together, as Finagle's. It is not made
//
//   - before MinDataPoints latencies are known, unless the delay is fixed;
//   - when the call has made MaxAttempts, or the budget is spent (package budget),
//     which allows MaxExtraLoad of the calls. So a server that becomes slow
//     altogether is not sent twice the calls;
//   - when the layers inside refuse it; that costs nothing, and it is tried again
//     after another delay;
//   - after a server has answered with a negative grpc-retry-pushback-ms, and
//     before the time that it asks for, by that or by RetryInfo, which ends hedging
//     if it is more than Config.MaxServerDelay away;
//   - after the stack was told to drain;
//   - after a failure that is not one of NonFatal;
//   - for methods that Config.DeclaredOnly or [WithIdempotent] rule out. By default
//     no method is ruled out: hedge nothing that must not be done twice.
//
// # At a limit
//
// An extra attempt waits for the layers inside, with what is left of the time that
// its call may wait, and no longer than until another attempt answers. While calls
// wait at a limit every permit that becomes free goes to one of them, so an extra
// attempt that did not wait would never be made, just when stalled calls hold the
// permits. It goes ahead of first attempts in every queue, but no other call is
// refused for its sake: where the room to wait is full, in a buffer or in a queue
// with a bound, it is refused itself, and any call takes its slot in a buffer. With
// 40 callers, a limit of 20, and a server of which one attempt in twenty takes 200 ms
// and the others 10 ms, p99 is 50 ms with a delay of 15 ms, and 220 ms without
// waiting or without hedging.
//
// # Who wins
//
// The first success. A failure never beats a success that is still possible. When
// all attempts have failed the caller gets the last failure; if an attempt that was
// to follow a failure was refused, the error says by whom, as a retry's does
// ([interceptor.RefusedAgain]). The others are cancelled as soon as there is a
// winner; they are neither failures nor successes to the layers inside and to the
// balancing policy. Each attempt has its own reply, and its own results for Header,
// Trailer and Peer options; the caller gets the winner's. Further attempts carry
// grpc-previous-rpc-attempts, and the policy belfry.p2c sends them to endpoints that
// the call has not tried.
//
// # Latencies
//
// Successes are recorded, each attempt from when it was admitted, and the first one
// also when another one won, with the time it took until then: left out, the
// slowest calls would be missing, and the delay would become shorter and shorter.
// Failures are not. All calls through one layer share the latencies; where methods
// differ much, give each its own layer, with interceptor.Only.
//
// # Streams
//
// A stream is hedged while its first RecvMsg waits for its first message, and its
// latency is how long that takes. What was sent is kept until then and sent to
// extra attempts as well, so it must not be modified, as gRPC says of SendMsg
// anyway. A stream is not hedged if it sends more than BufferBytes before, if its
// Header is asked for before, or if it cannot be opened.
//
// # Order
//
// Hedge outside retry: an extra attempt is then repeated like the first. A timeout
// outside covers all attempts. A limit outside counts calls, a limit inside counts
// attempts. Give retry and hedge one budget to bound both together.
//
// # Cost
//
// The first attempt runs on the caller's goroutine, and no goroutine is started
// unless an extra attempt is made. A call that is not hedged costs one allocation,
// for the context of its first attempt, and gRPC makes a few more of it; all calls of
// a layer share one timer. One that may not be hedged costs none.
//
// When there is a winner the call waits for the other attempts to notice that they
// are cancelled, so that no goroutine outlives it and nothing reads a request that
// the caller has got back. For gRPC that is at once; a layer inside that does not
// heed its context delays the winner.
package hedge

// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

// Package retry repeats calls that failed for a reason that may have passed. It
// is Tower's retry with its budget and back-off, and gRFC A6's retry policy for
// gRPC calls of all four kinds.
//
//	stack, err := interceptor.NewStack(
//		timeout.Config{Timeout: time.Second},
//		retry.Config{MaxAttempts: 3},
//		buffer.Config{Size: 50},
//		concurrency.Config{Limit: 20},
//	)
//
// # What is repeated
//
// An attempt is repeated if its status code is one of Config.Codes, unless
//
//   - the server asks not to, with a grpc-retry-pushback-ms that is negative, or
//     asks for a delay of more than Config.MaxServerDelay;
//   - it is RESOURCE_EXHAUSTED and the server does not say when to come back, by
//     RetryInfo or pushback: a client that repeats it blindly adds load to what is
//     overloaded, or sends a message again that is too large;
//   - the call has made MaxAttempts, or Config.Budget is spent. The budget is on
//     by default, see package budget;
//   - the delay before it would end after the call's deadline: the call then
//     fails at once;
//   - a layer inside refused the attempt. That is not a server's UNAVAILABLE. A
//     deadline of a layer inside that cut an attempt short is repeated, because that
//     is what a timeout for each attempt is for;
//   - the method may not be repeated, see below.
//
// The default codes are UNAVAILABLE, with which gRPC and its servers say that
// another attempt is in order, and RESOURCE_EXHAUSTED on the above condition.
// DEADLINE_EXCEEDED and ABORTED are not among them: the first leaves no time for
// another attempt unless it is an attempt's own, and the second asks to repeat a
// whole transaction, which only the caller knows.
//
// gRPC by itself repeats, once and below all layers, an attempt that never left
// the client or that the server says it has not looked at (REFUSED_STREAM,
// GOAWAY). Such transparent retries neither count as attempts here nor touch the
// budget.
//
// # Which methods
//
// UNAVAILABLE may come after the server has done its work, as when a connection
// breaks. By default all methods are repeated nevertheless, as in gRPC.
// Config.DeclaredOnly restricts that to methods whose .proto file declares them
// idempotent (option idempotency_level), and [WithIdempotent] to those that a
// function names. What was not sent, because there was no connection, is repeated
// whatever the method, and costs the budget nothing.
//
// # Further attempts
//
// A further attempt waits for the layers inside with what is left of the time that
// its call may wait, ahead of first attempts: work has been spent on its call
// already, and the budget bounds how many there are. During a back-off a call holds
// nothing of the layers inside.
//
// The caller gets the error of the last attempt. If a further attempt was refused
// after it, by a layer inside, by the budget (reason BUDGET), or because the stack
// drains or the connection was closed, it is wrapped in an [interceptor.Refusal]
// that says so, and whose status is still the server's; the observer is told. Drain
// and ClientConn.Close end a back-off at once. If the caller cancels the call while
// it waits, it gets CANCELLED, which wraps the server's error.
//
// Each attempt has its own reply, and its own results for Header, Trailer and
// Peer options; the caller gets those of the last. Further attempts carry
// grpc-previous-rpc-attempts, and the balancing policy belfry.p2c sends them to
// endpoints that the call has not tried.
//
// # Order
//
// Layers outside see the call, layers inside see each attempt, so a timeout
// outside covers attempts and back-offs together, and one inside each attempt.
//
// # Streams
//
// A stream is repeated until it commits: when the first response message, or the
// end of a successful stream, is delivered, when the caller was given headers that
// it asked for, or when what was sent is more than Config.BufferBytes. Until then
// sent messages are kept and sent again on the next attempt, so they must not be
// modified, as gRPC says of SendMsg anyway. Headers that the server sends before
// it fails do not commit a stream, as they do in gRPC itself. No message is
// delivered twice. While no attempt is open SendMsg takes messages up to that
// limit without an error; RecvMsg is what tells of failures and repeats.
//
// # Cost
//
// A unary call whose first attempt succeeds costs no allocation, except one on a
// connection, through which the picker learns what was tried. No goroutine is
// started, except for a stream with more than 32 KiB to send again, or whose caller
// sends while that is done, and that one ends with the attempt.
package retry

// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

// Package retry repeats calls that failed for a reason that may have passed. It
// is Tower's retry with its budget and back-off, and gRFC A6's retry policy for
// gRPC calls of all four kinds.
//
//	layer, err := retry.New(retry.Config{MaxAttempts: 3})
//	…
//	stack, err := interceptor.NewStack(callTimeout, layer, attemptTimeout, limit)
//
// # What is repeated
//
// An attempt is repeated if its status code is one of Config.Codes, unless
//
//   - the server asks not to, with a grpc-retry-pushback-ms that is negative;
//   - it is RESOURCE_EXHAUSTED and the server does not say when to come back, by
//     RetryInfo or pushback: who repeats that blindly adds load to what is
//     overloaded, or sends a message again that is too large;
//   - the call has made MaxAttempts, or Config.Budget is spent. The budget is on
//     by default, see package budget;
//   - the delay before it would end after the call's deadline: the call then
//     fails at once;
//   - a layer inside refused the attempt. That is no server's UNAVAILABLE, and
//     what has no capacity now is not helped by more attempts. A deadline of a
//     layer inside that cut an attempt short is repeated, for that is what a
//     timeout for each attempt is for;
//   - the method may not be repeated, see below.
//
// The default code is UNAVAILABLE, the one with which gRPC and its servers say
// that another attempt is in order, and RESOURCE_EXHAUSTED on the above
// condition. DEADLINE_EXCEEDED and ABORTED are not among them: the first leaves no
// time for another attempt unless it is an attempt's own, and the second asks to
// repeat a whole transaction, which only the caller knows.
//
// The caller gets the last server's error. If a spent budget kept it from being
// repeated, it is wrapped in an [interceptor.Refusal] with reason BUDGET, whose
// status is the server's; if the call was cancelled while it waited, in one with
// reason CANCELLED.
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
// function names.
//
// # Order
//
// Layers outside see the call, layers inside see each attempt, so a timeout
// outside covers attempts and back-offs together, and one inside each attempt. The
// first attempt is admitted as the call is; a further one never queues: if the
// layers inside have no capacity for it at once, the call ends with the error it
// has. During a back-off a call holds nothing of the layers inside.
//
// Each attempt has its own reply, and its own results for Header, Trailer and
// Peer options; the caller gets those of the last. Further attempts carry
// grpc-previous-rpc-attempts, and the balancing policy belfry.p2c sends them to
// endpoints that the call has not tried.
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
// A unary call whose first attempt succeeds costs no allocation, but for one on a
// connection, through which the picker learns what was tried. No goroutine is
// started, but for a stream with more than 32 KiB to send again, or whose caller
// sends while that is done, and that one ends with the attempt.
package retry

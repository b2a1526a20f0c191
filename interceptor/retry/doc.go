// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

// Package retry repeats calls that failed for a reason that may have passed. It is
// Tower's retry with its budget and back-off, and gRFC A6's retry policy, for gRPC calls
// of all four kinds. Use it where a call may fail because of one server or one moment. What
// was sent is repeated only for methods that are declared idempotent, or that you name.
//
//	stack, err := interceptor.NewStack(
//		timeout.Config{Timeout: time.Second},
//		retry.Config{MaxAttempts: 3, Methods: []string{"/shop.Orders/List"}},
//		buffer.Config{Size: 50},
//		concurrency.Config{Limit: 20},
//	)
//
// # What is repeated
//
// An attempt is repeated if its status code is one of Config.Codes, unless
//
//   - the server asks not to, with a negative grpc-retry-pushback-ms, or asks for a
//     delay of more than Config.MaxServerDelay (10 s by default);
//   - it is RESOURCE_EXHAUSTED, Config.Codes is nil, and the server does not say when to
//     come back, by RetryInfo or pushback: a blind repeat adds load to an overloaded
//     server;
//   - the client itself could not send the request or take the answer, which is too
//     large or cannot be encoded;
//   - the call has made MaxAttempts, or what it says itself (package attempts), or
//     Config.Budget is spent. The budget is on by default, see package budget;
//   - the delay before it would end after the call's deadline: the call then
//     fails at once;
//   - a layer inside refused the attempt. That is not a server's UNAVAILABLE. An
//     attempt that the deadline of a layer inside cut short is repeated, because that
//     is what a timeout for each attempt is for;
//   - the method may not be repeated, see below.
//
// The default codes are UNAVAILABLE, with which gRPC and its servers invite another
// attempt, and RESOURCE_EXHAUSTED on the above condition. DEADLINE_EXCEEDED and ABORTED
// are not among them: the first leaves no time for another attempt unless it is an
// attempt's own, and the second asks to repeat a whole transaction, which only the caller
// knows.
//
// A server's pushback is the exact delay before the next attempt, as gRFC A6 has it. Its
// RetryInfo is the least: up to half as much is added at random, so that clients that were
// refused together do not come back together.
//
// A [Policy] replaces these rules. It sees status, header, trailer, reply and request, the
// number of attempts and the time, and decides whether, when and why. The examples say the
// conditions of Envoy and of failsafe-go with it.
//
// gRPC itself repeats, once and below all layers, an attempt that never left the client
// or that the server did not process (REFUSED_STREAM, GOAWAY). Such transparent retries
// neither count as attempts here nor touch the budget.
//
// # Which methods
//
// UNAVAILABLE may come after the server has done its work, for example when a connection
// breaks. So an attempt that was sent is repeated only if its method may be carried out
// more than once: if it is declared idempotent in its .proto file (option
// idempotency_level, whose file is linked in if the stub is), if Config.Methods names it
// or its service, if [WithIdempotent] allows it, if the call says so (package attempts),
// or if Config.AllMethods is true, as in gRPC's own retries. Otherwise a unary call ends
// with the server's error, in which errors.As finds a refusal with reason NOT_IDEMPOTENT,
// and the observer is told. A stream says so only if there is a policy.
//
// An attempt that was not sent, because there was no connection, is repeated whatever the
// method, and costs the budget nothing.
//
// # Further attempts
//
// A further attempt waits for the layers inside with what is left of its call's wait. It
// goes ahead of first attempts, because work was already spent on its call, and the
// budget bounds how many there are. During a back-off a call holds nothing of the layers
// inside.
//
// The caller gets the error of the last attempt, whose text says how many there were. An
// observer is told why each one is made, and a call may ask for a report
// (interceptor/attempts). If a further attempt was then refused,
// by a layer inside, by the budget (reason BUDGET), or because the stack drains or the
// connection was closed, that error is wrapped in an [interceptor.Refusal] that says so.
// Its status is still the server's, and the observer is told. Drain and ClientConn.Close
// end a back-off at once. A caller that cancels the call while it waits gets CANCELLED,
// which wraps the server's error.
//
// Each attempt has its own reply, and its own results for Header, Trailer and
// Peer options; the caller gets those of the last. Further attempts carry
// grpc-previous-rpc-attempts, the number of attempts before, and the balancing policy
// belfry.p2c prefers endpoints for them that the call has not tried.
//
// A retryPolicy in gRPC's service config would repeat each of these attempts, and no
// budget would count that. [interceptor.Stack.DialOptions] turns it off. Whoever gives the
// interceptors to a channel by hand, or wraps it, dials it with grpc.WithDisableRetry. What
// gRPC repeats because no server has seen it, it always repeats.
//
// # Order
//
// Put it inside a hedge and outside the buffer, the limits and the breaker. Layers outside
// see the call, and layers inside see each attempt: a timeout outside covers all attempts
// and back-offs together, and one inside covers each attempt.
//
// # Streams
//
// A stream is repeated until it commits: when the first response message or the
// successful end is delivered, when Header has returned headers, or when it has sent more
// than it may keep (Config.BufferBytes and Config.TotalBufferBytes). Headers that the
// server sends before it fails, and that the caller has not asked for, do not commit a
// stream; in gRPC itself they do. No message is delivered twice.
//
// What is sent before that is kept, encoded, when SendMsg returns, so the caller may use
// the message again. Further attempts send new messages, decoded by the codec of the
// call's options. A message that this codec cannot encode commits the stream:
// a grpc.PreparedMsg, and on a connection that is not gRPC's, whose own options are not
// seen, anything but a protocol buffer.
//
// RecvMsg, Header and SendMsg find out how an attempt has ended and repeat it, back-off
// included. SendMsg returns nil only if the message was sent or is kept for an attempt
// that follows, and io.EOF once none follows. It also commits the stream if it meets the
// end of an attempt that has sent headers, and the type of the response is not known:
// the code of the method is not linked in, or a call option chooses the codec. What
// Context returns lives as long as the stream.
//
// # Cost
//
// A unary call whose first attempt succeeds costs two allocations on a connection: one by
// which the picker learns what was tried, and gRPC's copy of the trailer. A bidirectional
// stream of a message each way costs ten, besides seven of any stack. A goroutine is started only for a stream with
// more than 32 KiB to send again, or whose caller sends meanwhile. It ends with the
// attempt.
//
// The allocations are counted by
//
//	go test -run='^$' -bench=Connection -benchmem ./internal/acceptance
package retry

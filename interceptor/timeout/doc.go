// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

// Package timeout gives calls a deadline, and bounds how long streams may last, be silent
// or take to deliver a message. Use it in every stack: without a deadline a call waits as
// long as a server stalls.
//
//	stack, err := interceptor.NewStack(
//		timeout.Config{Timeout: time.Second, Idle: time.Minute},
//		retry.Config{},
//	)
//
// # What it does to a call
//
// A unary call has Timeout from the moment that it reaches the layer, including the time
// it waits for admission, and the deadline goes to the server with it. An earlier deadline
// of the caller stays, and then the layer costs nothing. A response that has arrived is
// delivered even if the deadline passes meanwhile.
//
// Timeout does not apply to streams, because most are meant to last. They have their own
// bounds, each of which may be set. A response that arrives as a bound passes is not
// delivered, so that a retry can repeat the stream:
//
//	Lifetime       the whole stream, waiting for admission included; goes to the server
//	FirstResponse  until the first response message
//	Message        one RecvMsg, or one SendMsg
//	Idle           from one message, in either direction, to the next
//
// They cost a timer and a wrapper for each stream, one or two readings of the clock for
// each message, and no goroutine.
//
// # Whose deadline it was
//
// A call that a deadline cuts short ends with DEADLINE_EXCEEDED. Its error is an
// [interceptor.Refusal] with reason DEADLINE, in which errors.As finds an [Exceeded] that
// says which bound it was, or that it was the caller's deadline. For streams that is so
// only if the layer has a bound for them.
//
// The server has the same deadline, and may say DEADLINE_EXCEEDED a little earlier. If it
// does so in the last quarter of the time that this layer gave the call, it was this
// layer's deadline. Before that it is the server's own answer, which is returned as it is.
//
// # Order
//
// Outside a retry or a hedge the deadline is for the call with all its attempts and
// back-offs. Inside, each attempt has its own, so that an attempt that hangs can be given
// up in time for another. A stack may have both, the inner one shorter. Outside limits and
// queues the deadline covers the time spent in them; inside, the clock starts when they
// have admitted the call.
//
// A timeout that gRPC's own service config has for a method bounds the whole call too,
// wherever this layer is. The earlier of the two counts.
//
// # Adaptive timeouts
//
// With [Config.Adaptive] the deadline of unary calls follows the latency of their method:
// a multiple of a recent percentile, between a minimum and Timeout. A method that becomes
// slower than that gets Timeout, until its latency is known again.
package timeout

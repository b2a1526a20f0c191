// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

// Package timeout is a layer that gives calls a deadline, and streams bounds on
// how long they may last, be silent or keep one waiting for a message. Use it in
// every stack: a call without a deadline waits for a server that stalls as long as
// the server likes.
//
//	stack, err := interceptor.NewStack(
//		timeout.Config{Timeout: time.Second, Idle: time.Minute},
//		retry.Config{},
//	)
//
// # What it does to a call
//
// A unary call has Timeout from the moment that it reaches the layer, waiting for
// admission included, and the deadline goes with it to the server. It never has
// more than its caller allows: a caller's deadline that is earlier stays, and then
// the layer costs nothing. A response that has arrived is delivered even if the
// deadline has passed meanwhile.
//
// Timeout is not for streams, most of which are meant to last. They have bounds of
// their own, each of which may be set or not:
//
//	Lifetime       the whole stream, waiting for admission included; goes to the server
//	FirstResponse  until the first response message
//	Message        one RecvMsg, or one SendMsg
//	Idle           from one message, in either direction, to the next
//
// They cost a timer and a wrapper for a stream, and a reading of the clock or two for
// a message, and no goroutine.
//
// # Whose deadline it was
//
// The error of a call that is cut short has the code DEADLINE_EXCEEDED, whoever
// cuts it. It is an [interceptor.Refusal] with reason DEADLINE, in which errors.As
// finds an [Exceeded], which says which bound it was, or that it was the caller's
// deadline. A DEADLINE_EXCEEDED that the server answered before any deadline here
// had passed is left as it is. Streams say so only where the layer has a bound for
// them.
//
// # Order
//
// Outside a retry or a hedge the deadline is the call's, with all its attempts and
// back-offs. Inside, each attempt has its own, so that one that hangs can be given
// up in time for another; a stack may well have both. Outside of limits and
// queues it covers the time spent in them; inside, the clock starts when the
// call is admitted by them.
//
// A timeout that gRPC's own service config has for a method bounds the whole call too,
// wherever the layer stands; the earlier of the two counts.
//
// # Adaptive timeouts
//
// With [Config.Adaptive] the deadline of unary calls follows their latency: a
// multiple of a recent percentile, between a minimum and Timeout.
package timeout

// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

// Package throttle refuses calls at the client when the server rejects most of
// them anyway: client-side adaptive throttling as chapter 21 of "Site Reliability
// Engineering" (Beyer and others, 2016) describes it. Use it where many clients
// share a server that may be overloaded, so that the server does not spend what
// it has left on rejecting.
//
//	layer, err := throttle.New(throttle.Config{})
//	…
//	stack, err := interceptor.NewStack(timeout, retry, layer, limit)
//
// Of the calls of the last two minutes the throttle counts all (requests) and
// those that the server accepted (accepts). A new call is refused at random, with
// the probability
//
//	max(0, (requests - K×accepts) / (requests + 1))
//
// With K = 2 nothing is refused until the server rejects every second call; when
// it rejects all, nearly every call is refused, but never more than the share
// that the config states. The refused are requests too, so a client that keeps
// coming is refused the more, and the server sees at most about K times what it
// accepts.
//
// What counts as rejected is said by code: by default UNAVAILABLE,
// RESOURCE_EXHAUSTED and DEADLINE_EXCEEDED. Any other error is an answer of a
// server that works. A call counts when it ends, a stream as one call with the
// status of its end; so calls in flight and a burst at the start are not
// mistaken for rejections. A call cancelled by its caller, or not sent because a
// gate further in refused, does not count.
//
// The refusal is UNAVAILABLE with reason THROTTLED. The throttle never waits: no
// waiting helps. Inside a retry it sees attempts, which is the place for it:
// outside, a call that succeeds at its third attempt would count as accepted.
// It stands outside of a buffer and a fail-fast: these ask the layers inside once
// without waiting and, if there is no capacity, once more, and a throttle inside
// would draw twice for a call that waits, and refuse more than the stated share.
package throttle

// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

// Package throttle refuses calls at the client when the server rejects most of
// them anyway: client-side adaptive throttling as chapter 21 of "Site Reliability
// Engineering" (Beyer and others, 2016) describes it. Use it where many clients
// share a server that may be overloaded, so that the server does not spend what
// it has left on rejecting.
//
//	stack, err := interceptor.NewStack(
//		timeout.Config{Timeout: time.Second},
//		retry.Config{},
//		concurrency.Config{Limit: 20},
//		throttle.Config{},
//	)
//
// The throttle counts the calls of the last 30 seconds ([Config.Window]): all of them
// (requests) and those that the server accepted (accepts). It refuses a new call at
// random, with probability
//
//	max(0, (requests - K×accepts) / (requests + 1))
//
// With K = 2 nothing is refused until the server rejects every second call. When it
// rejects all, nearly every call is refused, but never more than [Config.MaxRefused].
// Refused calls are requests too, so a client that keeps calling is refused more often,
// and the server sees at most about K times what it accepts. The refusal is UNAVAILABLE
// with reason THROTTLED. The throttle never makes calls wait, because waiting would not
// help.
//
// # What is counted
//
// A call counts when it ends, and a stream of responses at its first response or its
// end, whichever comes first. So calls in flight and a burst at the start are not
// mistaken for rejections.
//
//   - A status of the server is a rejection or an acceptance, by its code. By default
//     UNAVAILABLE, RESOURCE_EXHAUSTED and DEADLINE_EXCEEDED are rejections. The
//     deadline of a layer, such as a timeout, counts as DEADLINE_EXCEEDED.
//   - A call for which there was no connection does not count, unless
//     [Config.CountNotConnected] is set.
//   - A call that its caller cancelled, or whose caller's deadline passed, does not
//     count, and neither does one that was not sent.
//
// # Order
//
// Put the throttle inside everything that calls wait for, where a breaker would be:
//
//	buffer > concurrency > ratelimit > throttle
//
// Then it draws once for each call, when that is about to be sent. A buffer or a
// fail-fast first asks the layers inside it without waiting, and asks again if they
// refuse. In the recommended order the limit refuses the first time, before the throttle
// is asked. In the order buffer > throttle > concurrency the throttle draws twice for a
// call that waits, and refuses more than the stated share.
//
// Put it inside a retry, where it sees attempts. Outside, a call that succeeds at its
// third attempt would count as accepted.
package throttle

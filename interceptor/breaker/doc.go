// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

// Package breaker stops calling what fails: a circuit breaker. Use it where a
// call that will fail is worse than no call, because it costs time, or because
// what fails needs quiet to recover.
//
//	stack, err := interceptor.NewStack(
//		timeout.Config{Timeout: time.Second},
//		retry.Config{},
//		concurrency.Config{Limit: 20},
//		breaker.Config{ConsecutiveFailures: 5, KeyBy: interceptor.KeyBy{Method: true}},
//	)
//
// A breaker is closed: calls pass, and their ends are judged. It trips when one of
// three signals says so: a number of failures one after the other, which tells
// soonest that a server is gone; a share of failures in a window of time, which
// also sees those that come between successes; a share of slow calls in that
// window, which sees a server that still answers, but too late. Then it is open:
// calls are refused with UNAVAILABLE and reason BREAKER_OPEN, and the RetryInfo
// says when it will be half-open. Half-open it lets a few calls pass, the probes:
// if they succeed it closes, if one fails it opens for longer.
//
// # What is judged
//
// A call is judged by its end, and a stream of responses by its first response or
// its end, whichever comes first. So a stream that has responded is a success, also
// as a probe, and it does not matter how it ends hours later.
//
//   - A status of the server is a failure or an answer, by its code. By default
//     UNKNOWN, DEADLINE_EXCEEDED, RESOURCE_EXHAUSTED, INTERNAL, UNAVAILABLE and
//     DATA_LOSS are failures. The same holds for the deadline of a layer, such as a
//     timeout.
//   - A call for which there was no connection is a failure, unless
//     [Config.IgnoreNotConnected] is set.
//   - A call that its caller cancelled, or whose caller's deadline passed, is slow if
//     it took [Config.SlowCall] by then, and otherwise says nothing.
//   - A call that was not sent says nothing: a gate inside refused it, its context had
//     ended, or gRPC could not send the request.
//
// # Order
//
// Put the breaker inside of whatever calls wait for, and directly outside of what
// it breaks:
//
//	buffer > concurrency > ratelimit > breaker
//
// Then it decides when a call is about to be sent. In the order breaker >
// concurrency, calls that it has let pass are sent later although it is open by
// then: with 100 calls behind a limit of one, and a server that fails them all, 97
// are sent after it has tripped at the third.
//
// Inside a retry it sees attempts and outside it calls. Inside is better, because
// there it sees failures that the retry makes up for, and keeps retries from a
// server that is down. There is one circuit for all calls of a Layer, or one for
// each key ([Config.KeyBy]); a refusal names the key. The breaker judges what the
// stack calls as a whole: to leave out one bad endpoint of many is the work of the
// balancer and of outlier detection.
package breaker

// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

// Package breaker stops calling what fails: a circuit breaker. Use it where a
// call that will fail is worse than no call, because it costs time, or because
// what fails needs quiet to recover.
//
//	layer, err := breaker.New(breaker.Config{
//		ConsecutiveFailures: 5,
//		FailureRatio:        0.5,
//		PerMethod:           true,
//	})
//	…
//	stack, err := interceptor.NewStack(timeout, retry, layer, limit)
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
// What is judged is the end of a call, a stream's too, by its status. By default
// UNKNOWN, DEADLINE_EXCEEDED, RESOURCE_EXHAUSTED, INTERNAL, UNAVAILABLE and
// DATA_LOSS are failures; other errors are answers of a server that works. A call
// cancelled by its caller judges nothing, nor does one that was not sent because
// a gate further in refused.
//
// There is one circuit for all calls of a Breaker, or one for each method or any
// other key. It never waits for a circuit to close: an open one refuses at once.
// Inside a retry it sees attempts and outside it calls; inside is the better
// place, for it then sees failures that the retry mends, and keeps retries from a
// server that is down. It breaks what the stack calls as a whole: to leave out
// one bad endpoint of many is the work of the balancer and of outlier detection.
package breaker

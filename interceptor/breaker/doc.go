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
// While a breaker is closed, calls pass and it judges how they end. It trips on one of
// three signals: a number of failures in a row, which is the fastest sign that a server
// is gone; a share of failures in a window of time, which also sees failures between
// successes; or a share of slow calls in that window, which sees a server that answers
// too late. Then it is open: calls are refused with UNAVAILABLE and reason BREAKER_OPEN,
// and the RetryInfo says when it will be half-open. Half-open it lets a few calls pass,
// the probes. If they succeed it closes, and if one fails it opens for longer.
//
// # What is judged
//
// A call is judged when it ends, and a stream of responses at its first response or its
// end, whichever comes first. So a stream that has responded is a success, even as a
// probe, however it ends hours later.
//
//   - A status of the server is a failure or a success, by its code. By default
//     UNKNOWN, DEADLINE_EXCEEDED, RESOURCE_EXHAUSTED, INTERNAL, UNAVAILABLE and
//     DATA_LOSS are failures. The deadline of a layer, such as a timeout, counts as
//     DEADLINE_EXCEEDED.
//   - A call for which there was no connection is a failure, unless
//     [Config.IgnoreNotConnected] is set.
//   - A call that its caller cancelled, or whose caller's deadline passed, is slow if
//     it had taken [Config.SlowCall] by then. Otherwise it does not count.
//   - A call that was not sent does not count: a gate inside refused it, its context
//     had ended, or gRPC could not send the request.
//
// # Order
//
// Put the breaker inside everything that calls wait for:
//
//	buffer > concurrency > ratelimit > breaker
//
// Then it decides when a call is about to be sent. In the order breaker > concurrency,
// calls that it has let pass are sent later even if it is open by then: with 100 calls
// behind a limit of one, and a server that fails them all, 97 are sent after it tripped
// at the third.
//
// Inside a retry it sees attempts, and outside it sees calls. Inside is better, because
// there it sees failures that the retry makes up for, and keeps retries from a server
// that is down. There is one circuit for all calls of a Layer, or one for each key
// ([Config.KeyBy]), up to [Config.MaxKeys] (10,000 by default); a refusal names the key.
// The breaker judges everything that the stack calls together. Avoiding one bad endpoint
// of many is the work of the balancer and of outlier detection.
package breaker

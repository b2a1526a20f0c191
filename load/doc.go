// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

// Package load measures how busy endpoints are.
//
// A load-balancing policy asks it one question, many times a second: which of
// these few endpoints will answer soonest? A [Metric] belongs to one channel, a
// [Meter] to one of its endpoints. The policy tells the Meter when an attempt
// starts, when it has its first response and how it ends. The Meter's Load turns
// that into one number, and the policy picks the endpoint with the least.
//
//   - [ExpectedLatency] is the default of policy belfry.p2c: how long one more
//     attempt is expected to take. It follows from the endpoint's latencies, the
//     age of its attempts in flight, and the latencies of the other endpoints.
//   - [PeakEWMA] is Tower's and Finagle's peak-sensitive moving average of the
//     latency, times the attempts in flight and one more.
//   - [PendingRequests] is the number of attempts in flight, also known as least
//     request.
//   - [Constant] is the same number always.
//
// All Metrics and Meters are safe for concurrent use. The methods that the policy
// calls for an attempt take no lock and allocate nothing, except that
// ExpectedLatency does so at the first attempt of each method. The package does not
// depend on gRPC, and it reads no clock: the owner of a Metric passes the time in,
// as an [Instant].
//
//	metric := load.NewPendingRequests()
//	meter := metric.NewMeter(load.Endpoint{Address: addr})
//	ticket := meter.Start(&load.Attempt{Query: load.Query{Now: now, Weight: 1}, Method: method})
//	// ... the attempt runs ...
//	meter.Finish(&load.Sample{Now: now, Ticket: ticket, Outcome: load.Completed})
//
// To write a metric of your own, implement [Metric] and [Meter]. [Register] gives
// it a name for the service config.
package load

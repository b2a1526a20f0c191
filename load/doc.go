// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

// Package load measures how busy endpoints are.
//
// A load-balancing policy asks it one question, many times a second: of these
// few endpoints, which will answer soonest? A [Metric] stands for one channel,
// a [Meter] for one of its endpoints. The policy tells the Meter when an attempt
// starts, when it has its first response and how it ends; Load sums that up in
// one number, and the endpoint with the least is picked.
//
//   - [ExpectedLatency] is the default of policy belfry.p2c: what one more call
//     is expected to take, from the latencies seen, the age of what is in
//     flight, and what the other endpoints need.
//   - [PeakEWMA] is Tower's and Finagle's peak-sensitive moving average of the
//     latency, times the calls in flight.
//   - [PendingRequests] is the number of calls in flight, also known as least
//     request.
//   - [Constant] is the same number for ever.
//
// All Meters are safe for concurrent use. Their methods take no lock and
// allocate nothing. The package knows nothing of gRPC, and it reads no clock:
// whoever owns a Metric passes the time in, as an [Instant].
//
//	metric := load.NewPendingRequests()
//	meter := metric.NewMeter(load.Endpoint{Address: addr})
//	ticket := meter.Start(&load.Attempt{Query: load.Query{Now: now, Weight: 1}, Method: method})
//	// ... the attempt runs ...
//	meter.Finish(&load.Sample{Now: now, Ticket: ticket, Outcome: load.Completed})
//
// A metric of one's own implements [Metric] and [Meter]; [Register] gives it a
// name for the service config.
package load

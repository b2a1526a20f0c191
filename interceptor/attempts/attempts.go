// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

// Package attempts has the options of a single call about its attempts: how many a retry
// or a hedge may make, whether they may repeat the call at all, how long each may take,
// and a report of what happened.
//
//	var r attempts.Report
//	order, err := client.Get(ctx, req, attempts.MaxHedge(1), attempts.Timeout(time.Second), attempts.Into(&r))
//
// The options count for all retries and hedges in the stacks on the call's way. A
// connection without a stack ignores them.
package attempts

import (
	"net"
	"time"

	"google.golang.org/grpc"

	"github.com/belfry-go/belfry/internal/attempt"
)

// MaxRetry replaces the MaxAttempts of retries for one call: 1 switches them off, and more
// than is configured is allowed. The budget stays as it is. Less than 1 is 1.
func MaxRetry(n int) grpc.CallOption {
	return attempt.Option{Set: func(p *attempt.PerCall) { p.MaxRetry = max(n, 1) }}
}

// MaxHedge replaces the MaxAttempts of hedges for one call: 1 switches them off, and more
// than is configured is allowed. The budget stays as it is. Less than 1 is 1.
func MaxHedge(n int) grpc.CallOption {
	return attempt.Option{Set: func(p *attempt.PerCall) { p.MaxHedge = max(n, 1) }}
}

// Idempotent says whether this call may be carried out more than once, whatever its
// method: true allows retries and hedges to repeat what was sent, for example because the
// request has an idempotency key; false forbids it, even under AllMethods.
func Idempotent(yes bool) grpc.CallOption {
	return attempt.Option{Set: func(p *attempt.PerCall) { p.Idempotent, p.Unsafe = yes, !yes }}
}

// Timeout bounds each attempt of one call, from when it is handed to the connection: a
// unary attempt until its end, a stream until its first message. An attempt that is cut
// short ends with DEADLINE_EXCEEDED and reason DEADLINE, and a retry repeats it. Zero or
// less is no bound.
func Timeout(d time.Duration) grpc.CallOption {
	return attempt.Option{Set: func(p *attempt.PerCall) { p.Timeout = d }}
}

// A Report says what happened to one call.
type Report struct {
	// Attempts are those that were handed to a connection, in the order in which they
	// were.
	Attempts []Attempt
	// HedgesFired is how many extra attempts hedges made, and HedgeWon says that the result
	// is one of theirs.
	HedgesFired int
	HedgeWon    bool
}

// An Attempt is one attempt of a call.
type Attempt struct {
	// Layer made the attempt, and Reason says why: the status code that the attempt before
	// it ended with, "SLOW" for an attempt of a hedge that follows none, or what a retry's
	// policy said. Both are empty for the first.
	Layer, Reason string
	Delay         time.Duration // the back-off before it
	Start         time.Duration // when it was handed to the connection, since the call began
	Took          time.Duration // how long it lasted, at most until the call ended
	Peer          net.Addr      // the server; nil if it got no connection, or of a stream no response
	// Err is nil if the attempt succeeded. An attempt that still ran when the call ended has
	// the call's error, or CANCELLED if the call ended with another attempt.
	Err error
}

// Into asks for a report of one call. It is written once, before the call returns or, for
// a stream, before the caller can know that it is over; it must not be read earlier. It
// replaces what is in r.
func Into(r *Report) grpc.CallOption {
	return attempt.ReportOption{Fill: func(made []attempt.Made, hedges int, won bool) {
		*r = Report{HedgesFired: hedges, HedgeWon: won}
		for _, m := range made {
			r.Attempts = append(r.Attempts, Attempt{m.Layer, m.Reason, m.Delay, m.Start, m.Took, m.Peer, m.Err})
		}
	}}
}

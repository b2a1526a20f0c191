// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package p2c

import (
	"context"
	"time"

	"google.golang.org/grpc/balancer"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/belfry-go/belfry/internal/attempt"
	"github.com/belfry-go/belfry/load"
)

// Only this file decides what the end of an attempt means for the load of its endpoint.

// classifyDone returns the outcome of an attempt that got a stream, from what gRPC reports
// of its end. An error of the client itself says nothing about the endpoint: a request that
// could not be sent was not sent, and one whose response could not be received was answered.
func classifyDone(ctx context.Context, info balancer.DoneInfo, responded bool, failures codeSet) load.Outcome {
	switch {
	case info.Err == nil || attempt.ServerSpoke(info.Trailer):
	case attempt.IsReceiveError(info.Err), attempt.IsSendError(info.Err) && responded:
		return load.Completed
	case attempt.IsSendError(info.Err):
		return load.NotSent
	}
	return classify(ctx, info.Err, failures)
}

// classify returns the outcome of an attempt that was sent. err is its true status, and ctx
// its context.
func classify(ctx context.Context, err error, failures codeSet) load.Outcome {
	if err == nil {
		return load.Completed
	}
	switch code := status.Code(err); {
	case (code == codes.Canceled || code == codes.DeadlineExceeded) && status.Code(context.Cause(ctx)) == codes.DeadlineExceeded:
		// The deadline of a layer has ended the attempt, and its status is the cause of the
		// context. Unlike a caller's deadline it is longer than an endpoint should take.
		return classify(context.Background(), context.Cause(ctx), failures)
	case code == codes.Canceled && ctx.Err() != nil:
		return load.Cancelled
	case code == codes.DeadlineExceeded && expired(ctx):
		return load.Expired
	case code == codes.Canceled:
		// The client did not cancel it, so the server, or a proxy, reset the stream.
		return load.Failed
	case failures.has(code):
		return load.Failed
	default:
		return load.Completed
	}
}

// expired reports whether the deadline of the call has passed, or passes within toldFirst. The
// server has the same deadline, and its status may arrive before the client's own clock says
// so.
func expired(ctx context.Context) bool {
	if ctx.Err() == context.DeadlineExceeded {
		return true
	}
	d, ok := ctx.Deadline()
	return ok && time.Until(d) <= toldFirst
}

const toldFirst = 10 * time.Millisecond

// classifyUnsent returns the outcome of an attempt that got no stream.
func classifyUnsent(ctx context.Context, info balancer.DoneInfo, failures codeSet) load.Outcome {
	switch {
	case info.Err == nil:
		// The zero DoneInfo: the SubConn was not READY any more, and gRPC picks again.
		return load.NotSent
	case ctx.Err() == context.Canceled:
		return load.Cancelled
	case status.Code(info.Err) == codes.DeadlineExceeded:
		// It waited for a stream until its deadline, because the connection was at
		// MAX_CONCURRENT_STREAMS. That counts like any other wait for the endpoint.
		return classify(ctx, info.Err, failures)
	default:
		return load.NotSent
	}
}

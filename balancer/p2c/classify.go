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

// This file says what the end of an attempt means for the load of its endpoint.
// It is the only place that does.

// classifyDone returns the outcome of an attempt for which a stream was made, and of
// which gRPC says how it ended. An error that the client made itself does not speak of
// the endpoint: of a request that could not be sent nothing was asked, and one whose
// answer could not be taken was answered.
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

// classify returns the outcome of an attempt that was sent and ended with err,
// which is its true status. ctx is the context of the attempt.
func classify(ctx context.Context, err error, failures codeSet) load.Outcome {
	if err == nil {
		return load.Completed
	}
	switch code := status.Code(err); {
	case (code == codes.Canceled || code == codes.DeadlineExceeded) && status.Code(context.Cause(ctx)) == codes.DeadlineExceeded:
		// A layer's deadline is the cause of the end, and says so. It is longer than what the
		// layer expects of an endpoint, which a caller's may not be.
		return classify(context.Background(), context.Cause(ctx), failures)
	case code == codes.Canceled && ctx.Err() != nil:
		return load.Cancelled
	case code == codes.DeadlineExceeded && expired(ctx):
		return load.Expired
	case code == codes.Canceled:
		// Nobody on this side gave up: the server, or a proxy, reset the stream.
		return load.Failed
	case failures.has(code):
		return load.Failed
	default:
		return load.Completed
	}
}

// expired reports whether the deadline of the call has passed, or is about to: the
// server has the same deadline, and may say so first.
func expired(ctx context.Context) bool {
	if ctx.Err() == context.DeadlineExceeded {
		return true
	}
	d, ok := ctx.Deadline()
	return ok && time.Until(d) <= toldFirst
}

const toldFirst = 10 * time.Millisecond

// classifyUnsent returns the outcome of an attempt for which no stream was made.
func classifyUnsent(ctx context.Context, info balancer.DoneInfo, failures codeSet) load.Outcome {
	switch {
	case info.Err == nil:
		// The zero DoneInfo: the SubConn was not READY any more and grpc picks
		// again.
		return load.NotSent
	case ctx.Err() == context.Canceled:
		return load.Cancelled
	case status.Code(info.Err) == codes.DeadlineExceeded:
		// It waited for a stream until its deadline passed: the connection is at
		// MAX_CONCURRENT_STREAMS, and that is a wait like any other.
		return classify(ctx, info.Err, failures)
	default:
		return load.NotSent
	}
}

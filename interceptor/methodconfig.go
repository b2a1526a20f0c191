// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package interceptor

import (
	"context"
	"time"

	"google.golang.org/grpc/codes"
)

// overdue ends calls whose timeout of gRPC's service config has passed. overdueUnsent
// ends those that were still waiting in a gate.
var (
	overdue = &Refusal{
		Layer: "service config", Reason: ReasonDeadline, Code: codes.DeadlineExceeded, Sent: true,
		Message: "the timeout of the method has passed", Err: context.DeadlineExceeded,
	}
	overdueUnsent = overdue.Because(overdue.Err, false)
)

// unsent returns err as the error of a call that was not sent.
func unsent(err error) error {
	if err == overdue {
		return overdueUnsent
	}
	return err
}

// withMethodTimeout gives a call the timeout that gRPC's own service config has for its
// method. gRPC alone would apply it to each attempt, from when that is sent. cancel is
// nil if there is nothing to cancel. The method's waitForReady is heeded by readyGate.
func (t *target) withMethodTimeout(ctx context.Context, method string) (_ context.Context, cancel context.CancelFunc) {
	if t.grpcConn == nil {
		return ctx, nil
	}
	d := t.grpcConn.GetMethodConfig(method).Timeout
	if d == nil || *d < 0 {
		return ctx, nil
	}
	deadline := time.Now().Add(*d)
	if own, ok := ctx.Deadline(); ok && !deadline.Before(own) {
		return ctx, nil
	}
	return context.WithDeadlineCause(ctx, deadline, overdue)
}

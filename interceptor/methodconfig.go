// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package interceptor

import (
	"context"
	"fmt"
	"io"
	"slices"
	"time"

	"google.golang.org/grpc/status"

	"github.com/belfry-go/belfry/internal/attempt"
)

// overdue ends calls whose timeout of gRPC's service config has passed.
var overdue = &Refusal{
	Layer: "service config", Reason: ReasonDeadline, Sent: true,
	Message: "the timeout of the method has passed", Err: context.DeadlineExceeded,
}

// withMethodConfig gives the call the timeout that gRPC's own service config has for its
// method, from the given moment or, if that is zero, from now. gRPC alone would apply it to
// each attempt, from when that is sent. The method's waitForReady is heeded by readyGate,
// and its retryPolicy is told of in Stack.Advice.
func (c *Call) withMethodConfig(ctx context.Context, since Instant) context.Context {
	if c.grpcConn == nil {
		return ctx
	}
	config := c.grpcConn.GetMethodConfig(c.method)
	if config.RetryPolicy != nil {
		c.prog.adviseRetryPolicy(&c.target, c.method)
	}
	d := config.Timeout
	if d == nil || *d < 0 {
		return ctx
	}
	if since == 0 {
		since = Now()
	}
	deadline := since.Add(*d).Time()
	if own, ok := ctx.Deadline(); ok && !deadline.Before(own) {
		return ctx
	}
	c.timeout = *d
	ctx, c.cancel = context.WithDeadlineCause(ctx, deadline, overdue)
	return ctx
}

// withLateMethodConfig is withMethodConfig for an admitted call that has waited for its
// connection: a channel does not know its service config before it has endpoints.
func (c *Call) withLateMethodConfig(ctx context.Context) context.Context {
	if c.unready == 0 || c.cancel != nil {
		return ctx
	}
	return c.withMethodConfig(ctx, c.unready)
}

// adviseRetryPolicy adds to the advice of the stack, once, that a method has a retryPolicy.
func (p *program) adviseRetryPolicy(t *target, method string) {
	if p.stack.retryPolicy.Load() != nil || !t.once && !p.repeats() {
		return
	}
	advice := fmt.Sprintf("the service config of %q has a retryPolicy for %s: ", t.grpcConn.Target(), method)
	if t.once {
		advice += "it is not used, because the stack makes the further attempts; remove it"
	} else {
		advice += "gRPC repeats each attempt of the stack by it, so a call makes up to as many as both multiplied; remove one of them, or dial with Stack.DialOptions or grpc.WithDisableRetry"
	}
	if p.stack.retryPolicy.CompareAndSwap(nil, &advice) {
		logger.Warningf("stack %v: %s", p, advice)
	}
}

// repeats reports whether a layer makes further attempts.
func (p *program) repeats() bool {
	return slices.ContainsFunc(p.layers, func(l Layer) bool { return traitsOf(l)&(Retries|Hedges) != 0 })
}

// told returns err, with which the call has ended or could not be made, as the caller gets
// it: it says if the timeout of the method has passed, and how many attempts there were. ctx
// is what withMethodConfig returned.
func (c *Call) told(ctx context.Context, err error) error {
	if err == nil || err == io.EOF {
		return err
	}
	if c.cancel != nil {
		deadline, _ := ctx.Deadline()
		if _, ok := AsRefusal(err); !ok && attempt.ToldFirst(err, c.timeout, time.Until(deadline)) {
			err = overdue.Because(err, true)
		}
	}
	if n := c.attempts.Load(); n > 0 {
		return &countedError{err, int(n) + 1}
	}
	return err
}

// countedError is the error of a call that made several attempts. It has the status of the
// last one.
type countedError struct {
	err error
	n   int
}

func (e *countedError) Error() string              { return fmt.Sprintf("%v (after %d attempts)", e.err, e.n) }
func (e *countedError) Unwrap() error              { return e.err }
func (e *countedError) GRPCStatus() *status.Status { return status.Convert(e.err) }

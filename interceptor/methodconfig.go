// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package interceptor

import (
	"context"
	"fmt"
	"io"
	"slices"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
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

// withMethodConfig gives a call the timeout that gRPC's own service config has for its
// method, from the given moment or, if that is zero, from now. gRPC alone would apply it to
// each attempt, from when that is sent. cancel is nil if there is nothing to cancel. The
// method's waitForReady is heeded by readyGate, and its retryPolicy is told of in
// Stack.Advice.
func (p *program) withMethodConfig(ctx context.Context, t *target, method string, since Instant) (_ context.Context, cancel context.CancelFunc) {
	if t.grpcConn == nil {
		return ctx, nil
	}
	config := t.grpcConn.GetMethodConfig(method)
	if config.RetryPolicy != nil {
		p.adviseRetryPolicy(t, method)
	}
	d := config.Timeout
	if d == nil || *d < 0 {
		return ctx, nil
	}
	if since == 0 {
		since = Now()
	}
	deadline := since.Add(*d).Time()
	if own, ok := ctx.Deadline(); ok && !deadline.Before(own) {
		return ctx, nil
	}
	return context.WithDeadlineCause(ctx, deadline, overdue)
}

// withLateMethodConfig is withMethodConfig for an admitted call that has waited for its
// connection: a channel does not know its service config before it has endpoints.
func (c *Call) withLateMethodConfig(ctx context.Context) context.Context {
	if c.unready != 0 && c.cancel == nil {
		ctx, c.cancel = c.prog.withMethodConfig(ctx, &c.target, c.method, c.unready)
	}
	return ctx
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

// overdueOr returns err, with which a call has ended whose deadline is its method's, or a
// refusal that says that the deadline has passed.
func overdueOr(ctx context.Context, err error) error {
	if err == nil || err == io.EOF || status.Code(err) != codes.DeadlineExceeded {
		return err
	}
	if _, ok := AsRefusal(err); ok {
		return err
	}
	if d, _ := ctx.Deadline(); time.Now().Before(d) { // It is the server's own.
		return err
	}
	return overdue.Because(err, true)
}

// overdueStream is the stream of a method with a timeout, as its caller gets it.
type overdueStream struct {
	grpc.ClientStream
	ctx context.Context
}

func (s *overdueStream) Header() (metadata.MD, error) {
	md, err := s.ClientStream.Header()
	return md, overdueOr(s.ctx, err)
}

func (s *overdueStream) SendMsg(m any) error {
	return overdueOr(s.ctx, s.ClientStream.SendMsg(m))
}

func (s *overdueStream) RecvMsg(m any) error {
	return overdueOr(s.ctx, s.ClientStream.RecvMsg(m))
}

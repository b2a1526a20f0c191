// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package interceptor

import (
	"context"
	"sync/atomic"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/connectivity"
)

var closed = &Refusal{
	Layer: "connection", Reason: ReasonClosed, Code: codes.Canceled, Message: "the connection was closed while the call waited",
	//lint:ignore SA1019 it is what gRPC returns for calls that wait in it
	Err: grpc.ErrClientConnClosing,
}

// What a call is refused with that would have to wait for a connection.
var (
	notReady   = Refuse("connection", ReasonNotReady, "no endpoint is ready")
	failing    = Refuse("connection", ReasonNotReady, "no endpoint is ready, all fail to connect")
	connecting = Refuse("connection", ReasonNotReady, "no endpoint is ready, the connection connects")
	noRoom     = Refuse("connection", ReasonNotReady, "every endpoint has as many attempts in flight as it may")
	idle       = Refuse("connection", ReasonNotReady, "no endpoint is ready, the connection was idle and connects now (see belfry.WaitReady)")
)

// wait waits until an endpoint is READY. Where gRPC itself would not wait it lets the
// call pass, so that the call fails with gRPC's own reason.
func (g *readyGate) wait(ctx context.Context, a *Admission, w Wait) error {
	conn := a.grpcConn
	if w.Remaining() == 0 {
		return refuseUnready(conn)
	}
	since := Now()
	parked, done := a.Park(ctx)
	defer done()
	until := parked
	if end, ok := w.End(); ok {
		var cancel context.CancelFunc
		until, cancel = context.WithDeadline(parked, end.Time())
		defer cancel()
	}
	waited := false
	for {
		s := conn.GetState()
		switch {
		case s == connectivity.Idle:
			conn.Connect()
		case s == connectivity.Shutdown && waited:
			a.Waited(notReady.Layer, since)
			return closed
		case s == connectivity.Ready, s == connectivity.Shutdown, s == connectivity.TransientFailure && !(*Call)(a).waitsForReady():
			if waited {
				a.unready = since
				a.Waited(notReady.Layer, since)
			}
			return nil
		}
		waited = true
		if conn.WaitForStateChange(until, s) {
			continue
		}
		a.Waited(notReady.Layer, since)
		if parked.Err() == nil {
			return notReady
		}
		if ctx.Err() == context.DeadlineExceeded { // Breakers may count a missing connection.
			return &Refusal{
				Layer: notReady.Layer, Reason: ReasonNotReady, Code: codes.DeadlineExceeded, Err: ctx.Err(),
				Message: "no endpoint became ready before the deadline",
			}
		}
		return Ended(parked, notReady.Layer)
	}
}

// refuseUnready is wait for a call that may not wait. Only a connection that is
// closed is left to gRPC, whose error says so.
func refuseUnready(conn *grpc.ClientConn) error {
	switch conn.GetState() {
	case connectivity.Ready, connectivity.Shutdown:
		return nil
	case connectivity.Idle:
		conn.Connect()
		return idle
	case connectivity.TransientFailure:
		return failing
	default:
		return connecting
	}
}

// waitsForReady reports whether gRPC lets the call wait while all endpoints fail.
func (c *Call) waitsForReady() bool {
	for i := len(c.opts) - 1; i >= 0; i-- {
		if o, ok := c.opts[i].(grpc.FailFastCallOption); ok {
			return !o.FailFast
		}
	}
	w := c.grpcConn.GetMethodConfig(c.method).WaitForReady
	return w != nil && *w
}

// roomOption is the [attempt.RoomOption] of a call.
type roomOption struct {
	grpc.EmptyCallOption
	call *Call
	none atomic.Bool // The attempt failed for want of an endpoint with room.
}

// WaitEnd returns when the call must not wait any longer.
func (o *roomOption) WaitEnd() (end time.Time, bounded bool) {
	w := o.call.wait
	if i, ok := w.End(); ok {
		end = i.Time()
	}
	return end, w != Forever
}

// NoRoom says that no endpoint has room for the attempt.
func (o *roomOption) NoRoom() { o.none.Store(true) }

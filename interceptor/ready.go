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
	waited, lazy := false, false
	method := methodWait{call: (*Call)(a), since: since, look: firstLook}
	for {
		s := conn.GetState()
		switch {
		case s == connectivity.Idle && !lazy:
			conn.Connect()
			lazy = staysIdle(until, conn)
			if waited = true; until.Err() == nil {
				continue
			}
		case s == connectivity.Shutdown && waited:
			a.Waited(notReady.Layer, since)
			return closed
		case s == connectivity.Ready, s == connectivity.Idle, s == connectivity.Shutdown, s == connectivity.TransientFailure && !(*Call)(a).waitsForReady():
			if waited {
				a.unready = since
				a.Waited(notReady.Layer, since)
			}
			return nil
		}
		waited = true
		if late := method.wait(until, s); late == nil {
			continue
		} else if until.Err() == nil {
			a.Waited(notReady.Layer, since)
			return late
		}
		a.Waited(notReady.Layer, since)
		if parked.Err() == nil {
			return notReady
		}
		if ctx.Err() == context.DeadlineExceeded { // Breakers may count a missing connection.
			return notReadyBefore("deadline", ctx.Err())
		}
		return Ended(parked, notReady.Layer)
	}
}

// idlePatience is far longer than a policy takes that connects when it is told to.
const idlePatience = 50 * time.Millisecond

// staysIdle reports whether the connection is still IDLE some time after it was told to
// connect. Its policy then connects when it picks for a call, so it must get one.
func staysIdle(ctx context.Context, conn *grpc.ClientConn) bool {
	ctx, cancel := context.WithTimeout(ctx, idlePatience)
	defer cancel()
	return !conn.WaitForStateChange(ctx, connectivity.Idle)
}

func notReadyBefore(what string, err error) *Refusal {
	return &Refusal{
		Layer: notReady.Layer, Reason: ReasonNotReady, Code: codes.DeadlineExceeded, Err: err,
		Message: "no endpoint became ready before the " + what,
	}
}

// A methodWait waits for a connection no longer than the timeout that the service config has
// for the method. A channel knows its config only once its resolver has answered, and does
// not say when that is. So it is looked up again as the state changes, and after times that
// double: a timeout that passes before it is known ends the call within as much time again.
type methodWait struct {
	call  *Call
	since Instant
	look  time.Duration // Until it is looked up again.
}

const (
	firstLook = 5 * time.Millisecond
	lastLook  = time.Second
)

// wait waits until the state s has changed, or it is time to look again. Otherwise, if ctx
// or the timeout has ended the wait, it returns the refusal of the timeout.
func (m *methodWait) wait(ctx context.Context, s connectivity.State) *Refusal {
	conn := m.call.grpcConn
	if m.call.parent != nil || m.call.cancel != nil { // The context has the timeout, if there is one.
		if conn.WaitForStateChange(ctx, s) {
			return nil
		}
		return notReady
	}
	at := Now().Add(m.look)
	d := conn.GetMethodConfig(m.call.method).Timeout
	bounded := d != nil && *d >= 0
	if bounded {
		at = m.since.Add(*d)
	}
	until, cancel := context.WithDeadline(ctx, at.Time())
	defer cancel()
	switch {
	case conn.WaitForStateChange(until, s):
		return nil
	case bounded || ctx.Err() != nil:
		return notReadyBefore("timeout of the method in the service config", context.DeadlineExceeded)
	}
	m.look = min(2*m.look, lastLook)
	return nil
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

// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package interceptor

import (
	"context"
	"sync"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/connectivity"
)

// parking holds the calls of a stack that wait, so that the end of the stack or of a
// connection reaches them.
type parking struct {
	// mu guards the fields below. What context.CancelCauseFunc locks is locked under
	// it.
	mu      sync.Mutex
	drained bool
	calls   map[*parkedCall]struct{}
	conns   map[*grpc.ClientConn]*connWatch // Of the connections that parked calls are for.
}

type parkedCall struct {
	cancel context.CancelCauseFunc
	conn   *grpc.ClientConn // nil if it is not gRPC's.
}

// connWatch watches a connection for its end while calls for it are parked.
type connWatch struct {
	calls  int
	cancel context.CancelFunc
	closed bool
}

var closed = &Refusal{
	Layer: "connection", Reason: ReasonClosed, Code: codes.Canceled, Message: "the connection was closed while the call waited",
	//lint:ignore SA1019 it is what gRPC returns for calls that wait in it
	Err: grpc.ErrClientConnClosing,
}

// add parks a call.
func (p *parking) add(ctx context.Context, conn *grpc.ClientConn) (parked context.Context, done func()) {
	parked, cancel := context.WithCancelCause(ctx)
	c := &parkedCall{cancel: cancel, conn: conn}
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.drained {
		cancel(draining)
		return parked, func() {}
	}
	if p.calls == nil {
		p.calls, p.conns = map[*parkedCall]struct{}{}, map[*grpc.ClientConn]*connWatch{}
	}
	p.calls[c] = struct{}{}
	if conn != nil && p.watchLocked(conn) {
		cancel(closed)
	}
	return parked, func() { p.remove(c) }
}

// remove ends the parking of a call.
func (p *parking) remove(c *parkedCall) {
	defer c.cancel(nil)
	p.mu.Lock()
	defer p.mu.Unlock()
	delete(p.calls, c)
	if w := p.conns[c.conn]; w != nil {
		if w.calls--; w.calls == 0 {
			w.cancel()
			delete(p.conns, c.conn)
		}
	}
}

// drain wakes all calls that wait, and keeps others from waiting later.
func (p *parking) drain() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.drained = true
	for c := range p.calls {
		c.cancel(draining)
	}
}

// watchLocked counts one more call that is parked for conn, and reports whether conn is
// known to be closed. Caller must hold p.mu.
func (p *parking) watchLocked(conn *grpc.ClientConn) (closed bool) {
	w := p.conns[conn]
	if w == nil {
		ctx, cancel := context.WithCancel(context.Background())
		w = &connWatch{cancel: cancel}
		p.conns[conn] = w
		go p.watch(ctx, conn)
	}
	w.calls++
	return w.closed
}

// watch wakes the calls for conn when that is closed. It returns when none is left.
func (p *parking) watch(ctx context.Context, conn *grpc.ClientConn) {
	for s := conn.GetState(); s != connectivity.Shutdown; s = conn.GetState() {
		if !conn.WaitForStateChange(ctx, s) {
			return
		}
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if w := p.conns[conn]; w != nil {
		w.closed = true
	}
	for c := range p.calls {
		if c.conn == conn {
			c.cancel(closed)
		}
	}
}

// What a call is refused with that would have to wait for a connection.
var (
	notReady   = Refuse("connection", ReasonNotReady, "no endpoint is ready")
	failing    = Refuse("connection", ReasonNotReady, "no endpoint is ready, all fail to connect")
	connecting = Refuse("connection", ReasonNotReady, "no endpoint is ready, the connection connects")
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

// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

// Package park holds calls that wait, so that the end of a stack or of a connection
// reaches them.
package park

import (
	"context"
	"sync"

	"google.golang.org/grpc"
	"google.golang.org/grpc/connectivity"
)

// A Lot holds the calls of a stack that wait. Its methods may be called concurrently.
type Lot struct {
	// What calls end with when the stack drains and when their connection is closed.
	draining, closed error

	// mu guards the fields below. What context.CancelCauseFunc locks is locked under
	// it.
	mu      sync.Mutex
	drained bool
	calls   map[*parkedCall]struct{}
	conns   map[*grpc.ClientConn]*connWatch // Of the connections that parked calls are for.
}

// New returns a Lot. draining and closed are the causes of the ends of the contexts.
func New(draining, closed error) *Lot {
	return &Lot{
		draining: draining, closed: closed,
		calls: map[*parkedCall]struct{}{}, conns: map[*grpc.ClientConn]*connWatch{},
	}
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

// Add parks a call for conn, which is nil if that is not gRPC's. parked ends with ctx,
// when the stack drains and when conn is closed. The call calls done when it no longer
// waits.
func (l *Lot) Add(ctx context.Context, conn *grpc.ClientConn) (parked context.Context, done func()) {
	parked, cancel := context.WithCancelCause(ctx)
	c := &parkedCall{cancel: cancel, conn: conn}
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.drained {
		cancel(l.draining)
		return parked, func() {}
	}
	l.calls[c] = struct{}{}
	if conn != nil && l.watchLocked(conn) {
		cancel(l.closed)
	}
	return parked, func() { l.remove(c) }
}

// remove ends the parking of a call.
func (l *Lot) remove(c *parkedCall) {
	defer c.cancel(nil)
	l.mu.Lock()
	defer l.mu.Unlock()
	delete(l.calls, c)
	if w := l.conns[c.conn]; w != nil {
		if w.calls--; w.calls == 0 {
			w.cancel()
			delete(l.conns, c.conn)
		}
	}
}

// Drain wakes all calls that wait, and keeps others from waiting later.
func (l *Lot) Drain() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.drained = true
	for c := range l.calls {
		c.cancel(l.draining)
	}
}

// watchLocked counts one more call that is parked for conn, and reports whether conn is
// known to be closed. Caller must hold l.mu.
func (l *Lot) watchLocked(conn *grpc.ClientConn) (closed bool) {
	w := l.conns[conn]
	if w == nil {
		ctx, cancel := context.WithCancel(context.Background())
		w = &connWatch{cancel: cancel}
		l.conns[conn] = w
		go l.watch(ctx, conn)
	}
	w.calls++
	return w.closed
}

// watch wakes the calls for conn when that is closed. It returns when none is left.
func (l *Lot) watch(ctx context.Context, conn *grpc.ClientConn) {
	for s := conn.GetState(); s != connectivity.Shutdown; s = conn.GetState() {
		if !conn.WaitForStateChange(ctx, s) {
			return
		}
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if w := l.conns[conn]; w != nil {
		w.closed = true
	}
	for c := range l.calls {
		if c.conn == conn {
			c.cancel(l.closed)
		}
	}
}

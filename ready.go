// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package belfry

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/connectivity"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/emptypb"
)

// ErrClosed is the error of [WaitReady] for a connection that was closed. It
// carries no gRPC status.
var ErrClosed = errors.New("belfry: connection is closed")

// WaitReady makes conn connect and waits until it is READY, so that the first
// call need not wait for a connection, or a program finds out at its start that
// there is none. It returns nil at once if conn is READY already.
//
// conn is a *grpc.ClientConn, or anything in front of some: what the Wrap of a
// stack returns, a Steer, a Maker. Then WaitReady makes all connections behind
// it connect and waits for each of them; those of a Maker are the ones that it
// has made, which may be none. What else carries calls can take part by either
// of two methods,
//
//	Conns() iter.Seq[grpc.ClientConnInterface] // the connections it uses
//	GetState() connectivity.State              // and Connect and WaitForStateChange, as of *grpc.ClientConn
//
// and is an error otherwise.
//
// Failed attempts to connect do not end the wait: gRPC tries again with
// backoff, and a connection that falls idle meanwhile is made to connect again.
// ctx bounds the wait; give it a deadline.
//
// It returns [ErrClosed] if a connection is or gets closed. When ctx ends first,
// the error wraps ctx.Err(), and its cause if it has one, names the last state
// seen, and why a *grpc.ClientConn was in TRANSIENT_FAILURE last: what its balancing
// policy or its resolver says. Its status code is DEADLINE_EXCEEDED or CANCELLED.
//
// To learn the reason, WaitReady makes a call that cannot leave the client, of the
// method /belfry.WaitReady/Reason, each time the connection fails. The connection's
// interceptors see it.
//
// A READY connection may lose its server at any time: WaitReady tells that
// calls can be made, not that they will succeed.
//
// It may be called for one connection from many goroutines.
func WaitReady(ctx context.Context, conn grpc.ClientConnInterface) error {
	// All connect at the same time.
	err := each(conn, func(c connectable) error {
		if c.GetState() == connectivity.Idle {
			c.Connect()
		}
		return nil
	})
	if err != nil {
		return err
	}
	return each(conn, func(c connectable) error { return waitReady(ctx, c) })
}

// connectable is a connection that has a state. *grpc.ClientConn documents the methods.
type connectable interface {
	Connect()
	GetState() connectivity.State
	WaitForStateChange(ctx context.Context, source connectivity.State) bool
}

// each calls f for each connection behind conn until there is an error.
func each(conn grpc.ClientConnInterface, f func(connectable) error) error {
	switch c := conn.(type) {
	case connectable:
		return f(c)
	case interface {
		Conns() iter.Seq[grpc.ClientConnInterface]
	}:
		for behind := range c.Conns() {
			if err := each(behind, f); err != nil {
				return err
			}
		}
		return nil
	}
	return fmt.Errorf("belfry: WaitReady: a %T has neither a state (GetState, Connect, WaitForStateChange) nor connections (Conns)", conn)
}

func waitReady(ctx context.Context, conn connectable) error {
	reason := ""
	for {
		state := conn.GetState()
		switch state {
		case connectivity.Ready:
			return nil
		case connectivity.Shutdown:
			return ErrClosed
		case connectivity.Idle:
			conn.Connect()
		case connectivity.TransientFailure:
			if cc, ok := conn.(*grpc.ClientConn); ok {
				if why := reasonOf(ctx, cc); why != "" {
					reason = ": " + why
				}
			}
		}
		if !conn.WaitForStateChange(ctx, state) {
			return newContextError(ctx, fmt.Sprintf("connection is not ready, its last state is %v%s", state, reason))
		}
	}
}

// reasonOf returns why calls of conn fail without being sent, or "" if it cannot
// tell. gRPC tells only a call, so it makes one, which its credentials keep from
// being sent if conn has become READY.
func reasonOf(ctx context.Context, conn *grpc.ClientConn) string {
	ctx, cancel := context.WithTimeout(ctx, maxReasonWait)
	defer cancel()
	err := conn.Invoke(ctx, "/belfry.WaitReady/Reason", &emptypb.Empty{}, &emptypb.Empty{}, grpc.WaitForReady(false), grpc.PerRPCCredentials(unsendable{}))
	if s := status.Convert(err); s.Code() == codes.Unavailable {
		return s.Message()
	}
	return ""
}

// maxReasonWait bounds what interceptors may do about a call for the reason.
const maxReasonWait = time.Second

// unsendable is credentials that no call can have.
type unsendable struct{}

func (unsendable) GetRequestMetadata(context.Context, ...string) (map[string]string, error) {
	return nil, status.Error(codes.FailedPrecondition, "belfry: WaitReady only asks why the connection is not ready")
}

func (unsendable) RequireTransportSecurity() bool { return false }

// contextError says what the end of a context prevented.
type contextError struct {
	what  string
	err   error // the context's Err
	cause error // the context's Cause, which may be err
}

// newContextError requires that ctx has ended.
func newContextError(ctx context.Context, what string) error {
	return &contextError{what: what, err: ctx.Err(), cause: context.Cause(ctx)}
}

func (e *contextError) Error() string {
	if e.cause == e.err {
		return fmt.Sprintf("belfry: %s: %v", e.what, e.err)
	}
	return fmt.Sprintf("belfry: %s: %v: %v", e.what, e.err, e.cause)
}

func (e *contextError) Unwrap() []error { return []error{e.err, e.cause} }

// GRPCStatus gives the error the code that a call ended by the same context has.
func (e *contextError) GRPCStatus() *status.Status {
	return status.New(status.FromContextError(e.err).Code(), e.Error())
}

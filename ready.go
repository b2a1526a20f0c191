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

// WaitReady makes conn connect and waits until it is READY. Then the first call
// need not wait for a connection, and a program that cannot connect learns so at
// its start. WaitReady returns nil at once if conn is READY already.
//
// conn is a *grpc.ClientConn, or something that uses several: what the Wrap of a
// stack returns, a steer.Steer, a maker.Maker. WaitReady then makes all these
// connections connect, and waits for each of them. A Maker may not have made any
// yet. Any other type needs one of two sets of methods, or WaitReady returns an
// error:
//
//	Conns() iter.Seq[grpc.ClientConnInterface] // the connections that it uses
//
//	Connect()                                  // as *grpc.ClientConn has them
//	GetState() connectivity.State
//	WaitForStateChange(context.Context, connectivity.State) bool
//
// Failed attempts to connect do not end the wait: gRPC tries again with
// backoff, and WaitReady makes a connection that becomes IDLE connect again. Only
// ctx bounds the wait, so give it a deadline.
//
// WaitReady returns [ErrClosed] if a connection is closed. If ctx ends first, the
// error wraps ctx.Err(), and the cause of ctx if it has one. The error names the
// last state of the connection. If a *grpc.ClientConn was in TRANSIENT_FAILURE, it
// also has the reason that the balancing policy or the resolver gave last. Its
// status code is DEADLINE_EXCEEDED or CANCELLED.
//
// To learn the reason, WaitReady makes a call of the method
// /belfry.WaitReady/Reason each time the connection fails. The call never leaves
// the client, but the connection's interceptors see it.
//
// A READY connection may lose its server at any time: after WaitReady calls can be
// made, but they may still fail.
//
// WaitReady is safe for concurrent use, also for one connection.
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

// reasonOf returns why calls of conn fail without being sent, or "" if that is not
// known. gRPC gives the reason only to a call, so reasonOf makes one. Its
// credentials keep it from being sent if conn has become READY.
func reasonOf(ctx context.Context, conn *grpc.ClientConn) string {
	ctx, cancel := context.WithTimeout(ctx, maxReasonWait)
	defer cancel()
	err := conn.Invoke(ctx, "/belfry.WaitReady/Reason", &emptypb.Empty{}, &emptypb.Empty{}, grpc.WaitForReady(false), grpc.PerRPCCredentials(unsendable{}))
	if s := status.Convert(err); s.Code() == codes.Unavailable {
		return s.Message()
	}
	return ""
}

// maxReasonWait bounds a call for the reason, which interceptors may delay or repeat.
const maxReasonWait = time.Second

// unsendable is credentials that fail, so that no call is sent with them.
type unsendable struct{}

func (unsendable) GetRequestMetadata(context.Context, ...string) (map[string]string, error) {
	return nil, status.Error(codes.FailedPrecondition, "belfry: WaitReady only asks why the connection is not ready")
}

func (unsendable) RequireTransportSecurity() bool { return false }

// contextError is the error of something that the end of a context prevented.
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

// GRPCStatus returns the status code of a call that the same context ends.
func (e *contextError) GRPCStatus() *status.Status {
	return status.New(status.FromContextError(e.err).Code(), e.Error())
}

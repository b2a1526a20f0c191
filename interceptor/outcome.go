// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package interceptor

import (
	"context"
	"errors"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/belfry-go/belfry/internal/attempt"
)

// Kind is the kind of a call.
type Kind uint8

// The four kinds of call.
const (
	Unary Kind = iota
	ClientStream
	ServerStream
	BidiStream
)

// String returns the kind's name as gRPC's documentation writes it.
func (k Kind) String() string {
	switch k {
	case Unary:
		return "unary"
	case ClientStream:
		return "client_stream"
	case ServerStream:
		return "server_stream"
	case BidiStream:
		return "bidi_stream"
	}
	return "unknown"
}

func kindOf(desc *grpc.StreamDesc) Kind {
	switch {
	case desc.ClientStreams && desc.ServerStreams:
		return BidiStream
	case desc.ClientStreams:
		return ClientStream
	default:
		return ServerStream
	}
}

// Outcome says how a call or attempt ended. It is decided once, from what gRPC did and
// not from the status code alone, and all gates, budgets, breakers, algorithms and
// observers are told the same. The package documentation has the list.
type Outcome uint8

const (
	// OK is a call that succeeded, or whose answer the client could not take (too
	// large, not unmarshallable): the server did its part. For a stream: it ended
	// with io.EOF, or with the one response of a client-streaming call.
	OK Outcome = iota
	// Failed is a call that was sent and failed: the server answered with an
	// error, the connection broke, or a deadline of a layer passed. End.Code tells
	// which.
	Failed
	// Ignored is a call that was sent and says about the server only that it took at
	// least End.Took: the caller cancelled it, the caller's deadline passed, another
	// attempt won, or the owner closed the connection.
	Ignored
	// NotSent is a call for which gRPC made no stream: a gate further in refused, a
	// layer answered by itself, the context ended first, or gRPC refused the request
	// (too large, not marshallable, bad metadata, failed credentials). Rate tokens are
	// given back, adaptive limits learn nothing, budgets are not charged.
	NotSent
	// NotConnected is like NotSent, because there was no connection: no endpoint was
	// READY, the resolver failed, the connection was refused, or the deadline passed
	// while gRPC waited for one. Breakers may count it as a failure.
	NotConnected
)

// String returns the outcome's name in lower case.
func (o Outcome) String() string {
	switch o {
	case OK:
		return "ok"
	case Failed:
		return "failed"
	case Ignored:
		return "ignored"
	case NotSent:
		return "not_sent"
	case NotConnected:
		return "not_connected"
	}
	return "unknown"
}

// Sent reports whether gRPC made a stream for the call, so that what was taken for
// it is spent. It is false for [NotSent] and [NotConnected].
func (o Outcome) Sent() bool { return o < NotSent }

// An End says how a call or attempt ended, as a gate sees it.
type End struct {
	Outcome Outcome
	// Responded says that the ticket's [Responder] was told of the first response of
	// the stream, and that this is its later end.
	Responded bool
	// Err is the error, nil if it succeeded.
	Err error

	sent Instant
}

// Code is the status code of Err. It does not build the status of a [Refusal].
func (e End) Code() codes.Code {
	if r, ok := e.Err.(*Refusal); ok && !r.Further && r.Reason != ReasonFilter {
		return r.statusCode()
	}
	return status.Code(e.Err)
}

// Took returns the time since the call, or its first attempt, was sent. It is zero if
// it was not sent, or if no gate asked for it ([Admission.Timed]). It reads the clock.
func (e End) Took() time.Duration {
	if e.sent == 0 {
		return 0
	}
	return max(Now().Sub(e.sent), 1)
}

// SentAt returns when the call, or its first attempt, was sent. It is zero where Took is.
func (e End) SentAt() Instant { return e.sent }

// errPanic is what tickets are released with when the call panicked.
var errPanic = status.Error(codes.Internal, "belfry: the call panicked")

// fateOf returns what became of an attempt that the connection ended with err. Only an
// attempt that gRPC made a stream for has a peer. Of a stream that could not be opened it
// was made by an interceptor inside, which returns how it has ended. On a connection that
// is not gRPC's own the attempt was sent, unless a stack further in says otherwise.
func (c *Call) fateOf(err error) attempt.Fate {
	switch {
	case err == nil:
		return attempt.Sent
	case c.kind == Unary && c.peer.Addr != nil:
		return attempt.FateOf(c.trailer, err)
	case c.kind != Unary && c.scope.finished.Load() && c.peer.Addr != nil:
		return attempt.Sent
	case c.grpcConn != nil:
		return attempt.FateUnsent(c.grpcConn, err)
	}
	return fateElsewhere(err)
}

// fateElsewhere is fateOf for a connection that is not gRPC's own.
func fateElsewhere(err error) attempt.Fate {
	r, ok := AsRefusal(err)
	switch {
	case !ok || r.Sent:
		return attempt.Sent
	case r.Reason == ReasonNotReady:
		return attempt.Unconnected
	}
	return 0
}

// endOfRefused returns how a call or attempt ended that was not admitted.
func endOfRefused(err error) End {
	e := End{Outcome: NotSent, Err: err}
	if r, ok := AsRefusal(err); ok && r.Reason == ReasonNotReady {
		e.Outcome = NotConnected
	}
	return e
}

// judge decides how a call ended that failed with err. ctx is the context of whoever
// asks: a hedge that its layer has cancelled is cancelled for the tickets inside that
// layer and not for those outside.
func judge(ctx context.Context, err error, f attempt.Fate) Outcome {
	refusal, refused := AsRefusal(err)
	refused = refused && refusal.NotSent()
	switch {
	case refused && f&attempt.Sent == 0 && refusal.Reason == ReasonNotReady:
		return NotConnected
	case refused && f&attempt.Sent == 0:
		return NotSent
	case f&attempt.Sent == 0 && f&attempt.Unconnected != 0:
		return NotConnected
	case f&attempt.Sent == 0:
		return NotSent
	case f&attempt.Unreadable != 0 && attempt.IsReceiveError(err):
		return OK
	case f&attempt.Unsendable != 0 && attempt.IsSendError(err):
		if f&attempt.Unasked != 0 {
			return NotSent
		}
		return Ignored
	case attempt.IsClosing(err) || abandoned(ctx, err):
		return Ignored
	case refused && f&attempt.TurnedAway != 0:
		return endOfRefused(err).Outcome
	case refused && refusal.Reason != ReasonDeadline:
		// The refusal of a further attempt, by whoever does not say what came before.
		return Ignored
	}
	return Failed
}

// abandoned reports whether the caller gave up. A server that answers CANCELLED or
// DEADLINE_EXCEEDED is not that, and neither is a layer's own deadline, whose Refusal is
// the cause of the context's end.
func abandoned(ctx context.Context, err error) bool {
	switch status.Code(err) {
	case codes.Canceled:
	case codes.DeadlineExceeded:
		attempt.AwaitDeadline(ctx)
	default:
		if !errors.Is(err, context.Canceled) && !errors.Is(err, context.DeadlineExceeded) {
			return false
		}
	}
	return ctx.Err() != nil && !cutShort(ctx)
}

// cutShort reports whether a layer has ended ctx, with its refusal as the cause.
func cutShort(ctx context.Context) bool {
	_, ok := AsRefusal(context.Cause(ctx))
	return ok
}

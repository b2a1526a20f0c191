// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package interceptor

import (
	"context"
	"errors"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/connectivity"
	"google.golang.org/grpc/metadata"
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

// fate is what became of an attempt at the connection. It is a set, because a call has
// the fates of all its attempts.
type fate uint32

const (
	sent        fate = 1 << iota // gRPC made a stream, or the connection is not gRPC's.
	unconnected                  // There was no connection.
	unreadable                   // It was answered, and the client could not take the answer.
	unsendable                   // The client could not send a message of the stream,
	unasked                      // which was the first one.
	turnedAway                   // The connection refused a stream when its first message was sent.
)

// fateOf returns what became of a unary attempt that failed with err. cc is nil if the
// connection is not gRPC's own, which counts as sent. hasPeer says that gRPC made a
// stream, and trailer is that stream's.
func fateOf(cc *grpc.ClientConn, hasPeer bool, trailer metadata.MD, err error) fate {
	switch {
	case !hasPeer && cc == nil:
		return fateElsewhere(err)
	case !hasPeer:
		return fateUnsent(cc, err)
	case attempt.ServerSpoke(trailer):
		return sent
	case attempt.IsSendError(err):
		return 0
	case attempt.IsReceiveError(err):
		return sent | unreadable
	}
	return sent
}

// fateElsewhere tells what became of an attempt that failed with err on a connection
// that is not gRPC's own. It was sent unless a stack further in says otherwise.
func fateElsewhere(err error) fate {
	r, ok := AsRefusal(err)
	switch {
	case !ok || r.Sent:
		return sent
	case r.Reason == ReasonNotReady:
		return unconnected
	}
	return 0
}

// fateUnsent returns what became of an attempt for which gRPC made no stream. If an
// endpoint is READY, a missing connection was not the cause: credentials failed, a picker
// dropped the call, or all streams of the connection were in use.
func fateUnsent(cc *grpc.ClientConn, err error) fate {
	switch status.Code(err) {
	case codes.Unavailable, codes.DeadlineExceeded:
		if cc.GetState() != connectivity.Ready {
			return unconnected
		}
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
func judge(ctx context.Context, err error, f fate) Outcome {
	refusal, refused := AsRefusal(err)
	refused = refused && refusal.NotSent()
	switch {
	case refused && f&sent == 0 && refusal.Reason == ReasonNotReady:
		return NotConnected
	case refused && f&sent == 0:
		return NotSent
	case f&sent == 0 && f&unconnected != 0:
		return NotConnected
	case f&sent == 0:
		return NotSent
	case f&unreadable != 0 && attempt.IsReceiveError(err):
		return OK
	case f&unsendable != 0 && attempt.IsSendError(err):
		if f&unasked != 0 {
			return NotSent
		}
		return Ignored
	case isClosing(err) || abandoned(ctx, err):
		return Ignored
	case refused && f&turnedAway != 0:
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
		awaitDeadline(ctx)
	default:
		if !errors.Is(err, context.Canceled) && !errors.Is(err, context.DeadlineExceeded) {
			return false
		}
	}
	return ctx.Err() != nil && !cutShort(ctx)
}

// awaitDeadline waits for ctx to end if its deadline has passed. The server has the same
// deadline, and its answer may come before the client's own timer fires. Only when ctx
// has ended does its cause say whose deadline it was.
func awaitDeadline(ctx context.Context) {
	d, ok := ctx.Deadline()
	if !ok || ctx.Err() != nil || time.Now().Before(d) {
		return
	}
	t := time.NewTimer(time.Millisecond) // In case ctx does not end at its deadline.
	defer t.Stop()
	select {
	case <-ctx.Done():
	case <-t.C:
	}
}

// cutShort reports whether a layer has ended ctx, with its refusal as the cause.
func cutShort(ctx context.Context) bool {
	_, ok := AsRefusal(context.Cause(ctx))
	return ok
}

// isClosing reports whether the owner of the connection closed it during the call. This
// deprecated variable is gRPC's only mark for that: the status is CANCELLED, but nobody
// cancelled the context.
func isClosing(err error) bool {
	//lint:ignore SA1019 the status code alone does not tell, see above
	return errors.Is(err, grpc.ErrClientConnClosing)
}

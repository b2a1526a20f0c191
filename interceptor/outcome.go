// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package interceptor

import (
	"context"
	"errors"
	"io"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
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

// Outcome is how what a ticket was taken for has ended.
type Outcome uint8

const (
	// OK is a call that succeeded. For a stream: it ended with io.EOF, or with the
	// one response of a client-streaming call.
	OK Outcome = iota
	// Failed is a call that was sent and failed: any status but OK, the deadline
	// included. The error tells which.
	Failed
	// Ignored says nothing about the server: the caller cancelled, the connection
	// was closed by its owner, or another attempt won.
	Ignored
	// NotSent is the refund: nothing was sent on behalf of the ticket, because a
	// gate further in refused, a layer answered by itself, or ctx ended first.
	// The rate token goes back, the adaptive limit learns nothing, a budget is not
	// charged.
	NotSent
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
	}
	return "unknown"
}

// errPanic is what tickets are released with when the call panicked.
var errPanic = status.Error(codes.Internal, "belfry: the call panicked")

// outcomeOf decides how a call ended. ctx is the context of the place that asks:
// a hedge that its layer has cancelled is cancelled for the tickets inside it,
// and not for those outside.
func outcomeOf(ctx context.Context, err error, sent bool) Outcome {
	if err == nil || err == io.EOF {
		return OK
	}
	if !sent {
		return NotSent
	}
	if r, ok := AsRefusal(err); ok && r.NotSent() {
		return NotSent
	}
	if cancelled(ctx, err) {
		return Ignored
	}
	return Failed
}

// cancelled tells the caller's cancellation from a server that answers CANCELLED
// and from a layer's own deadline, which has to cancel a stream's context to
// enforce itself and leaves its Refusal as the cause.
func cancelled(ctx context.Context, err error) bool {
	if !errors.Is(err, context.Canceled) && status.Code(err) != codes.Canceled {
		return false
	}
	if isClosing(err) {
		return true
	}
	if ctx.Err() != context.Canceled {
		return false
	}
	_, refused := AsRefusal(context.Cause(ctx))
	return !refused
}

// isClosing reports whether err says that the connection was closed under the
// call by its owner. gRPC has no other mark for it than this deprecated variable:
// its status is CANCELLED, but nobody has cancelled the context.
func isClosing(err error) bool {
	//lint:ignore SA1019 the status code alone does not tell, see above
	return errors.Is(err, grpc.ErrClientConnClosing)
}

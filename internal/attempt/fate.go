// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package attempt

import (
	"context"
	"errors"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/connectivity"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
)

// A Fate is what became of an attempt at the connection. It is a set, because a call has
// the fates of all its attempts.
type Fate uint32

const (
	Sent        Fate = 1 << iota // gRPC made a stream, or the connection is not gRPC's.
	Unconnected                  // There was no connection.
	Unreadable                   // It was answered, and the client could not take the answer.
	Unsendable                   // The client could not send a message of the stream,
	Unasked                      // which was the first one.
	TurnedAway                   // The connection refused a stream when its first message was sent.
)

// FateOf returns what became of a unary attempt that failed with err on a stream of
// gRPC's, whose trailer is given.
func FateOf(trailer metadata.MD, err error) Fate {
	switch {
	case ServerSpoke(trailer):
		return Sent
	case IsSendError(err):
		return 0
	case IsReceiveError(err):
		return Sent | Unreadable
	}
	return Sent
}

// FateUnsent returns what became of an attempt for which gRPC made no stream. If an
// endpoint is READY, a missing connection was not the cause: credentials failed, a picker
// dropped the call, or all streams of the connection were in use.
func FateUnsent(cc *grpc.ClientConn, err error) Fate {
	switch status.Code(err) {
	case codes.Unavailable, codes.DeadlineExceeded:
		if cc.GetState() != connectivity.Ready {
			return Unconnected
		}
	}
	return 0
}

// AwaitDeadline waits for ctx to end if its deadline has passed. The server has the same
// deadline, and its answer may come before the client's own timer fires. Only when ctx
// has ended does its cause say whose deadline it was.
func AwaitDeadline(ctx context.Context) {
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

// ToldFirst reports whether err is a server's DEADLINE_EXCEEDED about a deadline of ours.
// The server has the same deadline, and may answer before our own timer fires: servers
// keep some of their time to answer in, and their clocks run beside ours. If the answer
// comes in the last quarter of the time that was given, it is about that deadline. Before
// that it is about one of the server's own.
func ToldFirst(err error, given, left time.Duration) bool {
	return left <= given/4 && status.Code(err) == codes.DeadlineExceeded
}

// IsClosing reports whether the owner of the connection closed it during the call. This
// deprecated variable is gRPC's only mark for that: the status is CANCELLED, but nobody
// cancelled the context.
func IsClosing(err error) bool {
	//lint:ignore SA1019 the status code alone does not tell, see above
	return errors.Is(err, grpc.ErrClientConnClosing)
}

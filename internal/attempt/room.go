// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package attempt

import (
	"time"

	"google.golang.org/grpc"
)

// A RoomOption is the call option by which a stack tells a balancing policy how long a call
// may wait for an endpoint that has room for it, and the policy tells the stack that none
// had. A call without it may wait as long as its context.
type RoomOption interface {
	grpc.CallOption
	// WaitEnd returns when the call must not wait any longer; bounded is false if it may
	// wait as long as its context. A time in the past is not at all.
	WaitEnd() (end time.Time, bounded bool)
	// NoRoom says that the attempt fails for want of an endpoint with room.
	NoRoom()
}

// RoomOptionOf returns the RoomOption among opts, nil if there is none.
func RoomOptionOf(opts []grpc.CallOption) (r RoomOption) {
	for _, o := range opts {
		if o, ok := o.(RoomOption); ok {
			r = o // Of the stack that is nearest to the connection.
		}
	}
	return r
}

// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package attempt

import "google.golang.org/grpc"

// A LeaveOption is the call option by which a layer asks a balancing policy to say when the
// endpoint of a stream is about to leave.
type LeaveOption interface {
	grpc.CallOption
	// Leaves says so. It may be called more than once, from any goroutine, and does not
	// block.
	Leaves()
}

// LeaveOptionOf returns the LeaveOption among opts, nil if there is none.
func LeaveOptionOf(opts []grpc.CallOption) (l LeaveOption) {
	for _, o := range opts {
		if o, ok := o.(LeaveOption); ok {
			l = o
		}
	}
	return l
}

// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package attempt

import (
	"strconv"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
)

const pushbackKey = "grpc-retry-pushback-ms"

// A Wish is what a server says about further attempts when it fails one.
type Wish struct {
	Stop  bool          // No further attempt.
	Asked bool          // The server said when to come back.
	After time.Duration // When; never negative.
	Exact bool          // After is a pushback, which replaces a back-off; a RetryInfo is the least to wait.
}

// WishOf reads the pushback in the trailer, and if there is none the RetryInfo in
// the status of err. gRFC A6: "If the value for pushback is negative or
// unparseable, then it will be seen as the server asking the client not to retry
// at all."
func WishOf(err error, trailer metadata.MD) Wish {
	switch v := trailer[pushbackKey]; len(v) {
	case 0:
	case 1:
		ms, err := strconv.ParseInt(v[0], 10, 32) // A6 has an int32 in mind.
		if err != nil || ms < 0 {
			return Wish{Stop: true}
		}
		return Wish{Asked: true, Exact: true, After: time.Duration(ms) * time.Millisecond}
	default:
		return Wish{Stop: true}
	}
	st, ok := status.FromError(err)
	if !ok {
		return Wish{}
	}
	for _, d := range st.Proto().GetDetails() {
		info := new(errdetails.RetryInfo)
		if !d.MessageIs(info) || proto.Unmarshal(d.GetValue(), info) != nil {
			continue
		}
		return Wish{Asked: true, After: max(info.GetRetryDelay().AsDuration(), 0)}
	}
	return Wish{}
}

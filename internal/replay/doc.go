// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

// Package replay makes a stream of which a layer, retry or hedge, can make further
// attempts until it commits to one.
//
// # What is kept
//
// Until then what the caller sends is kept as bytes, encoded once, before SendMsg returns,
// so that the caller may use the message again. A further attempt sends new messages that
// are decoded from these bytes: interceptors inside, stats handlers and compressors see
// what they would see of a first attempt. The codec is that of the call's options. A
// message is not kept, and commits the stream, if that codec cannot encode it (a
// [google.golang.org/grpc.PreparedMsg]; on a connection that is not gRPC's, whose codec
// does not show in the options, anything but a protocol buffer), if it is of another type
// than the messages before it, or if a bound of bytes would be passed: that of the stream,
// [google.golang.org/grpc.MaxRetryRPCBufferSize], or that of all streams of the layer.
//
// # States
//
// A stream has a current lane, which is an attempt that is open. A lane is live when it
// was sent all that is kept. Then SendMsg sends to it directly, and otherwise leaves that
// to feed, which sends it what was kept in order. The stream is final when no attempt
// will follow; it is committed when the current lane is live too, and from then on
// methods go straight to that lane.
//
//	        RecvMsg, Header or SendMsg finds that the lane has failed, and Repeat
//	        makes another
//	           ┌────┐
//	           ▼    │
//	open ──► current ──► final ──► committed
//	                       first message or end, header, a message
//	                       that is not kept, no further attempt
//
// One goroutine at a time has the turn. RecvMsg has it while it receives. Whoever finds
// that the lane has failed takes it, finds out how, and replaces the lane. Methods other than
// RecvMsg wait for the turn only if their lane has ended: then RecvMsg returns too, so that
// no two goroutines of a caller can wait for each other.
package replay

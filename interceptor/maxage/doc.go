// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

// Package maxage ends long streams, at a place where their callers can open them again. A
// stream stays where it was opened: after a rollout, or when servers are added, the streams
// of a watch would stay on the old ones for ever. Use it for streams that are meant to
// last.
//
//	stack, err := interceptor.NewStack(
//		maxage.Config{Age: 30 * time.Minute},
//	)
//
// and around the stream, where the caller knows how to continue:
//
//	err := maxage.Reopen{}.Run(ctx, func(ctx context.Context) error {
//		stream, err := client.Watch(ctx, &pb.WatchRequest{After: last})
//		for err == nil {
//			var event *pb.Event
//			if event, err = stream.Recv(); err == nil {
//				last = handle(event)
//			}
//		}
//		return err
//	})
//
// # What it does to a stream
//
// A stream is due when it is as old as Age, give or take Jitter, so that streams that were
// opened together do not end together. It is also due when its endpoint is about to leave:
// when discovery marks it as draining, or no longer lists it. That needs the policy
// belfry.p2c with its dial options, and all streams of the endpoint are due within Drain.
//
// A stream that is due ends between two messages:
//
//   - A bidirectional stream is closed for sending: SendMsg returns io.EOF, as it does when
//     a server ends a stream. What the server still sends, for up to Grace, is delivered;
//     then RecvMsg returns [Ended]. So each request that SendMsg took has its answer.
//   - A stream of responses ends when RecvMsg is called, or waits for the server. A message
//     that has not been received by then is not delivered: the caller asks for what comes
//     after the last one that it has received.
//   - A stream of requests is left alone, because its caller ends it.
//
// The error is an [interceptor.Refusal] with reason MAX_AGE and code ABORTED, in which
// errors.As finds the [Ended]. ABORTED says that the caller is to begin again: a retry does
// not repeat it, and no endpoint is blamed. A stream that the server ends first ends as
// without the layer. Unary calls pass.
//
// Put it outside retries. It costs a timer and a wrapper for each stream.
package maxage

// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

// Package filter lets a predicate decide over calls before they are sent. It is Tower's
// filter. Use it for what a client must not send, or not without asking somebody:
// permissions, quotas kept elsewhere, requests that are known to fail. The predicate can
// also add what it found to the context or the request.
//
//	stack, err := interceptor.NewStack(filter.Predicate(
//		func(ctx context.Context, c *interceptor.Call, req any) (context.Context, error) {
//			if !allowed(ctx, c.Method()) {
//				return nil, errors.New("not for this tenant")
//			}
//			return metadata.AppendToOutgoingContext(ctx, "tenant", tenant), nil
//		}))
//
// There are two forms. A [Filter] is in the call path: its predicate may change the
// context and the request. When it runs, the layers inside have already admitted the
// call; if it rejects the call, what they took is given back. A [Gate] is in the
// admission: its predicate only decides, and runs before the layers inside are asked, so
// a rejected call has neither waited in their queues nor held their permits. In both
// forms a rejected call is not sent, and costs no limit, rate or budget anything. The
// predicate may take its time; it should return when its context ends.
//
// A predicate sees the request of a unary call. It sees a stream once, when it is opened,
// without a message. [WithMessages] adds a predicate for each message that is sent, which
// ends the stream if it rejects one.
//
// A rejection is a refusal with reason FILTER. If the predicate's error has a gRPC
// status, that is the call's status; otherwise the code is PERMISSION_DENIED, or that of
// the config. errors.Is and errors.As find the predicate's error.
//
// # Order
//
// Put it outside what it protects. Outside a retry the predicate runs once for the call,
// inside it runs for each attempt. A rejection is not retried either way.
package filter

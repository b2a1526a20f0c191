// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package retry_test

import (
	"context"
	"fmt"
	"log"
	"strconv"
	"strings"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/belfry-go/belfry/interceptor"
	"github.com/belfry-go/belfry/interceptor/retry"
)

// Envoy's conditions: retry_on connect-failure, refused-stream and reset, and
// rate_limited_retry_back_off with a header of seconds.
func ExamplePolicy() {
	envoy := func(_ context.Context, a *retry.Attempt) retry.Decision {
		if a.Err == nil {
			return retry.Decision{}
		}
		limited := a.Trailer.Get("x-ratelimit-reset")
		switch {
		case a.Outcome == interceptor.NotConnected:
			return retry.Decision{Repeat: true, Reason: "connect-failure"}
		case strings.Contains(a.Err.Error(), "REFUSED_STREAM"): // So it was not carried out.
			return retry.Decision{Repeat: true, Safe: true, Reason: "refused-stream"}
		case len(a.Header)+len(a.Trailer) == 0 && status.Code(a.Err) == codes.Unavailable:
			return retry.Decision{Repeat: true, Reason: "reset"}
		case len(limited) == 1:
			if seconds, err := strconv.Atoi(limited[0]); err == nil {
				return retry.Decision{Repeat: true, After: time.Duration(seconds) * time.Second, Reason: "rate-limited"}
			}
		}
		return a.Default
	}
	explain := func(ctx context.Context, a *retry.Attempt) retry.Decision {
		d := envoy(ctx, a)
		fmt.Printf("attempt %d: %v: %+v\n", a.N, status.Convert(a.Err).Message(), d)
		return d
	}
	layer, err := retry.New(retry.Config{MaxServerDelay: time.Second}, retry.WithPolicy(explain))
	if err != nil {
		log.Fatal(err)
	}
	stack, err := interceptor.NewStack(layer)
	if err != nil {
		log.Fatal(err)
	}
	attempts := 0
	invoker := func(_ context.Context, _ string, _, _ any, _ *grpc.ClientConn, opts ...grpc.CallOption) error {
		if attempts++; attempts == 1 {
			return status.Error(codes.Unavailable, "stream terminated by RST_STREAM with error code: REFUSED_STREAM")
		}
		for _, o := range opts {
			if t, ok := o.(grpc.TrailerCallOption); ok {
				*t.TrailerAddr = metadata.Pairs("x-ratelimit-reset", "3600")
			}
		}
		return status.Error(codes.ResourceExhausted, "come back in an hour")
	}
	err = stack.UnaryClientInterceptor()(context.Background(), "/orders.Orders/Place", nil, nil, nil, invoker)
	fmt.Println("error:", status.Code(err)) // An hour is more than MaxServerDelay.
	// Output:
	// attempt 1: stream terminated by RST_STREAM with error code: REFUSED_STREAM: {Repeat:true After:0s Exact:false Safe:true Reason:refused-stream}
	// attempt 2: come back in an hour: {Repeat:true After:1h0m0s Exact:false Safe:false Reason:rate-limited}
	// error: ResourceExhausted
}

// What failsafe-go says with HandleIf on a result and WithDelayFunc.
func ExamplePolicy_reply() {
	policy := func(_ context.Context, a *retry.Attempt) retry.Decision {
		if reply, ok := a.Reply.(*wrapperspb.StringValue); ok && reply.GetValue() == "not ready" {
			return retry.Decision{Repeat: true, After: time.Duration(a.N) * time.Millisecond, Exact: true, Reason: "not ready"}
		}
		return a.Default
	}
	layer, err := retry.New(retry.Config{Methods: []string{"/jobs.Jobs/Result"}}, retry.WithPolicy(policy))
	if err != nil {
		log.Fatal(err)
	}
	stack, err := interceptor.NewStack(layer)
	if err != nil {
		log.Fatal(err)
	}
	attempts := 0
	invoker := func(_ context.Context, _ string, _, reply any, _ *grpc.ClientConn, _ ...grpc.CallOption) error {
		if attempts++; attempts < 3 {
			reply.(*wrapperspb.StringValue).Value = "not ready"
		} else {
			reply.(*wrapperspb.StringValue).Value = "42"
		}
		return nil
	}
	reply := new(wrapperspb.StringValue)
	err = stack.UnaryClientInterceptor()(context.Background(), "/jobs.Jobs/Result", nil, reply, nil, invoker)
	fmt.Println(attempts, "attempts:", reply.GetValue(), err)
	// Output: 3 attempts: 42 <nil>
}

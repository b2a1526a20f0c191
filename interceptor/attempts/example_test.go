// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package attempts_test

import (
	"context"
	"fmt"
	"log"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/belfry-go/belfry/interceptor"
	"github.com/belfry-go/belfry/interceptor/attempts"
	"github.com/belfry-go/belfry/interceptor/retry"
)

func Example() {
	stack, err := interceptor.NewStack(retry.Config{Backoff: retry.Backoff{Initial: time.Millisecond}})
	if err != nil {
		log.Fatal(err)
	}
	// stack.DialOptions() puts it into a connection; here it is in front of a
	// server that fails once.
	n := 0
	invoker := func(context.Context, string, any, any, *grpc.ClientConn, ...grpc.CallOption) error {
		if n++; n == 1 {
			return status.Error(codes.Unavailable, "connection reset")
		}
		return nil
	}
	// Nothing declares the method idempotent, but this request has a key.
	var r attempts.Report
	err = stack.UnaryClientInterceptor()(context.Background(), "/orders.Orders/Place", nil, nil, nil, invoker,
		attempts.Idempotent(true), attempts.MaxRetry(5), attempts.Timeout(time.Second), attempts.Into(&r))
	fmt.Println("error:", err)
	for _, a := range r.Attempts {
		fmt.Printf("by %q for %q: %v\n", a.Layer, a.Reason, a.Err)
	}
	// Output:
	// error: <nil>
	// by "" for "": rpc error: code = Unavailable desc = connection reset
	// by "retry" for "Unavailable": <nil>
}

// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package retry_test

import (
	"context"
	"fmt"
	"log"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/belfry-go/belfry/interceptor"
	"github.com/belfry-go/belfry/interceptor/retry"
)

func Example() {
	layer, err := retry.New(retry.Config{
		MaxAttempts: 3,
		Methods:     []string{"/orders.Orders/Get"}, // It may be carried out twice.
	})
	if err != nil {
		log.Fatal(err)
	}
	stack, err := interceptor.NewStack(layer)
	if err != nil {
		log.Fatal(err)
	}
	// stack.DialOptions() puts it into a connection; here it is in front of a
	// server that fails twice.
	attempts := 0
	invoker := func(context.Context, string, any, any, *grpc.ClientConn, ...grpc.CallOption) error {
		attempts++
		fmt.Println("attempt", attempts)
		if attempts < 3 {
			return status.Error(codes.Unavailable, "connection reset")
		}
		return nil
	}
	err = stack.UnaryClientInterceptor()(context.Background(), "/orders.Orders/Get", nil, nil, nil, invoker)
	fmt.Println("error:", err)
	// Output:
	// attempt 1
	// attempt 2
	// attempt 3
	// error: <nil>
}

// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package hedge_test

import (
	"context"
	"fmt"
	"log"
	"sync/atomic"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/status"

	"github.com/belfry-go/belfry/interceptor"
	"github.com/belfry-go/belfry/interceptor/hedge"
)

func Example() {
	layer, err := hedge.New(hedge.Config{
		Delay:   10 * time.Millisecond,
		Methods: []string{"/orders.Orders/Get"}, // It may be carried out twice.
	})
	if err != nil {
		log.Fatal(err)
	}
	stack, err := interceptor.NewStack(layer)
	if err != nil {
		log.Fatal(err)
	}
	// stack.DialOptions() puts it into a connection; here it is in front of
	// servers of which the first has stalled.
	var attempts atomic.Int32
	invoker := func(ctx context.Context, _ string, _, _ any, _ *grpc.ClientConn, _ ...grpc.CallOption) error {
		if attempts.Add(1) == 1 {
			<-ctx.Done()
			fmt.Println("the first attempt was cancelled")
			return status.FromContextError(ctx.Err()).Err()
		}
		fmt.Println("the second attempt answers")
		return nil
	}
	err = stack.UnaryClientInterceptor()(context.Background(), "/orders.Orders/Get", nil, nil, nil, invoker)
	fmt.Println("error:", err)
	// The call does not wait for the attempt that has lost. Drain does.
	if err := stack.Drain(context.Background()); err != nil {
		log.Fatal(err)
	}
	// Unordered output:
	// the second attempt answers
	// error: <nil>
	// the first attempt was cancelled
}

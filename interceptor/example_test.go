// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package interceptor_test

import (
	"context"
	"errors"
	"fmt"
	"log"

	"golang.org/x/sync/semaphore"
	"google.golang.org/grpc"
	"google.golang.org/grpc/status"

	"github.com/belfry-go/belfry/interceptor"
	"github.com/belfry-go/belfry/interceptor/adapt"
)

// echo stands in for a connection; a *grpc.ClientConn is used in the same way, or
// takes the stack's DialOptions.
type echo struct{ grpc.ClientConnInterface }

func (echo) Invoke(_ context.Context, method string, _, _ any, _ ...grpc.CallOption) error {
	fmt.Println("called", method)
	return nil
}

func Example() {
	stack, err := interceptor.NewStack(adapt.FromSemaphore("limit", semaphore.NewWeighted(1)))
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println(stack)

	conn := stack.Wrap(echo{})
	ctx := context.Background()
	if err := conn.Invoke(ctx, "/helloworld.Greeter/SayHello", nil, nil); err != nil {
		log.Fatal(err)
	}

	if err := stack.Drain(ctx); err != nil {
		log.Fatal(err)
	}
	err = conn.Invoke(ctx, "/helloworld.Greeter/SayHello", nil, nil)
	var refusal *interceptor.Refusal
	if errors.As(err, &refusal) {
		fmt.Println(refusal.Layer, refusal.Reason, status.Code(err))
	}
	// Output:
	// [limit]
	// called /helloworld.Greeter/SayHello
	// stack DRAIN Unavailable
}

// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package ratelimit_test

import (
	"context"
	"errors"
	"fmt"
	"log"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/status"

	"github.com/belfry-go/belfry/interceptor"
	"github.com/belfry-go/belfry/interceptor/ratelimit"
)

// echo stands in for a connection; a *grpc.ClientConn is used in the same way, or
// takes the stack's DialOptions.
type echo struct{ grpc.ClientConnInterface }

func (echo) Invoke(_ context.Context, method string, _, _ any, _ ...grpc.CallOption) error {
	fmt.Println("called", method)
	return nil
}

func Example() {
	limit, err := ratelimit.New(ratelimit.Config{Limit: 2, Per: time.Minute, Burst: 2})
	if err != nil {
		log.Fatal(err)
	}
	stack, err := interceptor.NewStack(limit)
	if err != nil {
		log.Fatal(err)
	}
	conn := stack.Wrap(echo{})

	ctx, cancel := context.WithTimeout(context.Background(), time.Second)
	defer cancel()
	for range 3 {
		// A third call would have to wait for half a minute, which its deadline does
		// not allow, so it is refused at once.
		err := conn.Invoke(ctx, "/helloworld.Greeter/SayHello", nil, nil)
		var refusal *interceptor.Refusal
		if errors.As(err, &refusal) {
			fmt.Println(refusal.Layer, refusal.Reason, status.Code(err), refusal.RetryAfter > 29*time.Second)
		}
	}
	// Output:
	// called /helloworld.Greeter/SayHello
	// called /helloworld.Greeter/SayHello
	// ratelimit RATE_LIMIT ResourceExhausted true
}

// Unary calls and streams have a rate each.
func ExampleWithKey() {
	kind := func(_ context.Context, c *interceptor.Call) string {
		if c.Kind() == interceptor.Unary {
			return "unary"
		}
		return "streams"
	}
	limit, err := ratelimit.New(ratelimit.Config{Limit: 100}, ratelimit.WithKey(kind), ratelimit.WithName("by-kind"))
	if err != nil {
		log.Fatal(err)
	}
	stack, err := interceptor.NewStack(limit)
	if err != nil {
		log.Fatal(err)
	}
	if err := stack.Wrap(echo{}).Invoke(context.Background(), "/helloworld.Greeter/SayHello", nil, nil); err != nil {
		log.Fatal(err)
	}
	fmt.Println(stack, limit.Keys())
	// Output:
	// called /helloworld.Greeter/SayHello
	// [by-kind] 1
}

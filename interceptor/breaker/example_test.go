// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package breaker_test

import (
	"context"
	"fmt"
	"log"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/belfry-go/belfry/interceptor"
	"github.com/belfry-go/belfry/interceptor/breaker"
)

// down is a connection to a server that fails every call.
type down struct{ grpc.ClientConnInterface }

func (down) Invoke(context.Context, string, any, any, ...grpc.CallOption) error {
	return status.Error(codes.Unavailable, "connection refused")
}

func Example() {
	layer, err := breaker.New(
		breaker.Config{ConsecutiveFailures: 3, OpenFor: 10 * time.Second, Jitter: breaker.None},
		breaker.WithOnStateChange(func(c breaker.Change) {
			fmt.Printf("%v to %v for %v: %s\n", c.From, c.To, c.OpenFor, c.Cause)
		}))
	if err != nil {
		log.Fatal(err)
	}
	stack, err := interceptor.NewStack(layer)
	if err != nil {
		log.Fatal(err)
	}
	conn := stack.Wrap(down{})

	for range 4 {
		err := conn.Invoke(context.Background(), "/helloworld.Greeter/SayHello", nil, nil)
		fmt.Println(status.Convert(err).Message())
		if r, ok := interceptor.AsRefusal(err); ok {
			fmt.Println("try again in", r.RetryAfter)
		}
	}
	// Output:
	// connection refused
	// connection refused
	// closed to open for 10s: consecutive failures
	// connection refused
	// belfry: breaker: BREAKER_OPEN: the circuit is open
	// try again in 10s
}

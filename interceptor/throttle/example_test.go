// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package throttle_test

import (
	"context"
	"fmt"
	"log"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/belfry-go/belfry/interceptor"
	"github.com/belfry-go/belfry/interceptor/throttle"
)

// overloaded is a connection to a server that rejects every call.
type overloaded struct{ grpc.ClientConnInterface }

func (overloaded) Invoke(context.Context, string, any, any, ...grpc.CallOption) error {
	return status.Error(codes.ResourceExhausted, "overloaded")
}

func Example() {
	layer, err := throttle.New(throttle.Config{K: 2, MaxRefused: 0.9})
	if err != nil {
		log.Fatal(err)
	}
	stack, err := interceptor.NewStack(layer)
	if err != nil {
		log.Fatal(err)
	}
	conn := stack.Wrap(overloaded{})

	rejected, refused := 0, 0
	for range 10_000 {
		err := conn.Invoke(context.Background(), "/helloworld.Greeter/SayHello", nil, nil)
		if _, ok := interceptor.AsRefusal(err); ok {
			refused++ // With UNAVAILABLE, and the server knows nothing of it.
		} else {
			rejected++
		}
	}
	fmt.Println("the server had to reject less than a fifth:", rejected < 2000)
	fmt.Println("and is still being asked:", rejected > 500)
	fmt.Println(layer.Stats("").Requests, "requests,", layer.Stats("").Accepts, "accepted")
	// Output:
	// the server had to reject less than a fifth: true
	// and is still being asked: true
	// 10000 requests, 0 accepted
}

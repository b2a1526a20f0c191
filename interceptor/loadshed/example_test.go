// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package loadshed_test

import (
	"context"
	"fmt"
	"log"

	"google.golang.org/grpc"
	"google.golang.org/grpc/status"

	"github.com/belfry-go/belfry/interceptor"
	"github.com/belfry-go/belfry/interceptor/concurrency"
	"github.com/belfry-go/belfry/interceptor/loadshed"
)

// busy takes the role of a connection. While it serves a call it makes another one.
type busy struct {
	grpc.ClientConnInterface
	during func()
}

func (b *busy) Invoke(context.Context, string, any, any, ...grpc.CallOption) error {
	b.during()
	return nil
}

func Example() {
	stack, err := interceptor.NewStack(
		loadshed.Config{},
		concurrency.Config{Limit: 1},
	)
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println(stack)

	server := new(busy)
	conn := stack.Wrap(server)
	server.during = func() { // The only permit is taken; without the shed this would wait for it for ever.
		err := conn.Invoke(context.Background(), "/orders.Orders/Get", nil, nil)
		fmt.Println(status.Code(err), err)
	}
	fmt.Println(conn.Invoke(context.Background(), "/orders.Orders/Get", nil, nil))
	// Output:
	// [loadshed > concurrency]
	// Unavailable belfry: concurrency: CONCURRENCY: no permit is free (limit 1)
	// <nil>
}

// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package concurrency_test

import (
	"context"
	"fmt"
	"log"

	"google.golang.org/grpc"
	"google.golang.org/grpc/status"

	"github.com/belfry-go/belfry/interceptor"
	"github.com/belfry-go/belfry/interceptor/concurrency"
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
	limit, err := concurrency.New(concurrency.Config{Limit: 1})
	if err != nil {
		log.Fatal(err)
	}
	stack, err := interceptor.NewStack(limit)
	if err != nil {
		log.Fatal(err)
	}
	ctx := context.Background()
	server := new(busy)
	conn := stack.Wrap(server)
	server.during = func() {
		// The one permit is taken. This call does not want to wait for it.
		err := conn.Invoke(ctx, "/orders.Orders/Get", nil, nil, interceptor.WithWait(interceptor.None))
		refusal, _ := interceptor.AsRefusal(err)
		fmt.Println("during the call:", refusal.Layer, refusal.Reason, status.Code(err))
	}
	fmt.Println("the call:", conn.Invoke(ctx, "/orders.Orders/Get", nil, nil))

	if err := limit.SetLimit(100); err != nil { // While calls run.
		log.Fatal(err)
	}
	fmt.Println("limit", limit.Limit(), "in use", limit.InUse())
	// Output:
	// during the call: concurrency CONCURRENCY Unavailable
	// the call: <nil>
	// limit 100 in use 0
}

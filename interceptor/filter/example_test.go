// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package filter_test

import (
	"context"
	"errors"
	"fmt"
	"log"
	"strings"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"github.com/belfry-go/belfry/interceptor"
	"github.com/belfry-go/belfry/interceptor/filter"
)

// echo stands in for a connection.
type echo struct{ grpc.ClientConnInterface }

func (echo) Invoke(ctx context.Context, method string, _, _ any, _ ...grpc.CallOption) error {
	md, _ := metadata.FromOutgoingContext(ctx)
	fmt.Println("called", method, "for", md.Get("tenant"))
	return nil
}

func Example() {
	tenant := func(ctx context.Context, c *interceptor.Call, req any) (context.Context, error) {
		if strings.HasPrefix(c.Method(), "/admin.") {
			return nil, errors.New("not for this tenant")
		}
		return metadata.AppendToOutgoingContext(ctx, "tenant", "blue"), nil
	}
	stack, err := interceptor.NewStack(filter.Predicate(tenant))
	if err != nil {
		log.Fatal(err)
	}
	conn := stack.Wrap(echo{})

	ctx := context.Background()
	if err := conn.Invoke(ctx, "/helloworld.Greeter/SayHello", nil, nil); err != nil {
		log.Fatal(err)
	}
	err = conn.Invoke(ctx, "/admin.Users/Delete", nil, nil)
	fmt.Println(status.Code(err), err)
	// Output:
	// called /helloworld.Greeter/SayHello for [blue]
	// PermissionDenied belfry: filter: FILTER: rejected: not for this tenant
}

// A Gate decides before the call has waited for anything, and sees the request.
func ExampleNewGate() {
	gate, err := filter.NewGate(filter.Config{}, func(ctx context.Context, a *interceptor.Admission, req any) error {
		if s, ok := req.(string); ok && s == "" {
			return status.Error(codes.InvalidArgument, "the request is empty")
		}
		return nil
	})
	if err != nil {
		log.Fatal(err)
	}
	stack, err := interceptor.NewStack(gate)
	if err != nil {
		log.Fatal(err)
	}
	err = stack.Wrap(echo{}).Invoke(context.Background(), "/helloworld.Greeter/SayHello", "", nil)
	fmt.Println(status.Code(err))
	// Output: InvalidArgument
}

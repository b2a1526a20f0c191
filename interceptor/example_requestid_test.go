// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package interceptor_test

import (
	"context"
	"fmt"

	"google.golang.org/grpc"
	"google.golang.org/grpc/metadata"

	"github.com/belfry-go/belfry/interceptor"
)

// RequestID is a layer of a user: it sends an id with each call. Outside of a retry
// all attempts of a call have the same id, inside each has its own.
type RequestID struct {
	interceptor.CallOnly // It takes no part in admission.

	next func() string
}

// NewLayer makes a Spec of it, which NewStack takes.
func (l *RequestID) NewLayer() (interceptor.Layer, error) { return l, nil }

// String names it in Stack.String.
func (*RequestID) String() string { return "requestid" }

// WrapCall returns the call path, for unary calls and for streams.
func (l *RequestID) WrapCall(next interceptor.Next, _ interceptor.Again) interceptor.Next {
	return func(ctx context.Context, c *interceptor.Call) error {
		return next(metadata.AppendToOutgoingContext(ctx, "x-request-id", l.next()), c)
	}
}

// printer prints what a server would see.
type printer struct{ grpc.ClientConnInterface }

func (printer) Invoke(ctx context.Context, method string, _, _ any, _ ...grpc.CallOption) error {
	md, _ := metadata.FromOutgoingContext(ctx)
	fmt.Println(method, md.Get("x-request-id"))
	return nil
}

// A layer of one's own: a request id.
func Example_requestID() {
	n := 0
	ids := &RequestID{next: func() string { n++; return fmt.Sprint("request-", n) }}
	stack, err := interceptor.NewStack(ids)
	if err != nil {
		fmt.Println(err)
		return
	}
	conn := stack.Wrap(printer{})
	for range 2 {
		if err := conn.Invoke(context.Background(), "/helloworld.Greeter/SayHello", nil, nil); err != nil {
			fmt.Println(err)
		}
	}
	// Output:
	// /helloworld.Greeter/SayHello [request-1]
	// /helloworld.Greeter/SayHello [request-2]
}

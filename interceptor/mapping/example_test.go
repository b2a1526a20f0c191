// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package mapping_test

import (
	"context"
	"fmt"
	"log"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/belfry-go/belfry/interceptor"
	"github.com/belfry-go/belfry/interceptor/mapping"
)

// greeter stands in for a connection: it answers with a greeting, or not.
type greeter struct{ grpc.ClientConnInterface }

func (greeter) Invoke(_ context.Context, _ string, req, reply any, _ ...grpc.CallOption) error {
	name := req.(*wrapperspb.StringValue).GetValue()
	if name == "" {
		return status.Error(codes.Unknown, "no name")
	}
	reply.(*wrapperspb.StringValue).Value = "hello " + name
	return nil
}

func say(name string, specs ...interceptor.Spec) {
	stack, err := interceptor.NewStack(specs...)
	if err != nil {
		log.Fatal(err)
	}
	reply := new(wrapperspb.StringValue)
	err = stack.Wrap(greeter{}).Invoke(context.Background(), "/shop.Greeter/Greet", wrapperspb.String(name), reply)
	fmt.Println(reply.GetValue(), err)
}

func ExampleRequest() {
	say("you", mapping.Request(func(_ context.Context, _ string, m *wrapperspb.StringValue) (*wrapperspb.StringValue, error) {
		return wrapperspb.String("dear " + m.GetValue()), nil // A copy: the message is the caller's.
	}))
	// Output: hello dear you <nil>
}

func ExampleResponse() {
	say("you", mapping.Response(func(_ context.Context, _ string, m *wrapperspb.StringValue) error {
		m.Value += "!"
		return nil
	}))
	// Output: hello you! <nil>
}

func ExampleError() {
	say("", mapping.Error(func(_ context.Context, _ string, err error) error {
		if status.Code(err) == codes.Unknown {
			return status.Error(codes.InvalidArgument, status.Convert(err).Message())
		}
		return err
	}))
	// Output:  rpc error: code = InvalidArgument desc = no name
}

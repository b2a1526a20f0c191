// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package timeout_test

import (
	"context"
	"errors"
	"fmt"
	"log"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/status"

	"github.com/belfry-go/belfry/interceptor"
	"github.com/belfry-go/belfry/interceptor/timeout"
)

// stalled stands in for a connection to a server that does not answer; a
// *grpc.ClientConn is used in the same way, or takes the stack's DialOptions.
type stalled struct{ grpc.ClientConnInterface }

func (stalled) Invoke(ctx context.Context, _ string, _, _ any, _ ...grpc.CallOption) error {
	<-ctx.Done()
	return status.FromContextError(ctx.Err()).Err()
}

func Example() {
	stack, err := interceptor.NewStack(timeout.Config{Timeout: 50 * time.Millisecond, Idle: time.Minute})
	if err != nil {
		log.Fatal(err)
	}
	conn := stack.Wrap(stalled{})

	// Whose deadline was it? This one is the layer's,
	err = conn.Invoke(context.Background(), "/helloworld.Greeter/SayHello", nil, nil)
	var exceeded *timeout.Exceeded
	if errors.As(err, &exceeded) {
		fmt.Println(status.Code(err), "-", exceeded.Bound, exceeded.Limit)
	}

	// and this one the caller's own, which is earlier.
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Millisecond)
	defer cancel()
	err = conn.Invoke(ctx, "/helloworld.Greeter/SayHello", nil, nil)
	if errors.As(err, &exceeded) {
		fmt.Println(status.Code(err), "-", exceeded.Bound)
	}
	// Output:
	// DeadlineExceeded - the call's timeout has passed 50ms
	// DeadlineExceeded - the caller's deadline has passed
}

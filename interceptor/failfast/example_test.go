// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package failfast_test

import (
	"context"
	"fmt"
	"log"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/status"

	"github.com/belfry-go/belfry/interceptor"
	"github.com/belfry-go/belfry/interceptor/concurrency"
	"github.com/belfry-go/belfry/interceptor/failfast"
)

// stuck takes the role of a connection to a server that does not answer.
type stuck struct {
	grpc.ClientConnInterface
	started, answer chan struct{}
}

func (s *stuck) Invoke(context.Context, string, any, any, ...grpc.CallOption) error {
	s.started <- struct{}{}
	<-s.answer
	return nil
}

func Example() {
	fast, err := failfast.New(failfast.Config{After: 20 * time.Millisecond})
	if err != nil {
		log.Fatal(err)
	}
	stack, err := interceptor.NewStack(fast, concurrency.Config{Limit: 1})
	if err != nil {
		log.Fatal(err)
	}
	server := &stuck{started: make(chan struct{}, 2), answer: make(chan struct{})}
	conn := stack.Wrap(server)
	call := func() error { return conn.Invoke(context.Background(), "/orders.Orders/Get", nil, nil) }

	first := make(chan error)
	go func() { first <- call() }() // Holds the only permit.
	<-server.started
	err = call() // Waits for 20ms.
	fmt.Println(status.Code(err), "failing:", fast.Failing())
	err = call() // Does not wait any more.
	fmt.Println(err)

	close(server.answer)
	fmt.Println(<-first)
	fmt.Println(call(), "failing:", fast.Failing())
	// Output:
	// Unavailable failing: true
	// belfry: failfast: FAIL_FAST: no call was admitted for too long
	// <nil>
	// <nil> failing: false
}

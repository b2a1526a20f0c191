// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package buffer_test

import (
	"context"
	"fmt"
	"log"
	"runtime"

	"google.golang.org/grpc"
	"google.golang.org/grpc/status"

	"github.com/belfry-go/belfry/interceptor"
	"github.com/belfry-go/belfry/interceptor/buffer"
	"github.com/belfry-go/belfry/interceptor/concurrency"
	"github.com/belfry-go/belfry/interceptor/loadshed"
)

// slow takes the role of a connection. Its calls take until release is closed.
type slow struct {
	grpc.ClientConnInterface
	started, release chan struct{}
}

func (s *slow) Invoke(context.Context, string, any, any, ...grpc.CallOption) error {
	s.started <- struct{}{}
	<-s.release
	return nil
}

func Example() {
	queue, err := buffer.New(buffer.Config{Size: 1})
	if err != nil {
		log.Fatal(err)
	}
	stack, err := interceptor.NewStack(loadshed.Config{}, queue, concurrency.Config{Limit: 1})
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println(stack)

	server := &slow{started: make(chan struct{}, 2), release: make(chan struct{})}
	conn := stack.Wrap(server)
	ended := make(chan error)
	call := func() { ended <- conn.Invoke(context.Background(), "/orders.Orders/Get", nil, nil) }
	go call() // Runs.
	<-server.started
	go call() // Waits in the buffer.
	for queue.Waiting() == 0 {
		runtime.Gosched()
	}
	go call() // Finds it full.
	err = <-ended
	refusal, _ := interceptor.AsRefusal(err)
	fmt.Println(refusal.Layer, refusal.Reason, status.Code(err))

	close(server.release)
	fmt.Println(<-ended, <-ended)
	// Output:
	// [loadshed > buffer > concurrency]
	// buffer QUEUE_FULL Unavailable
	// <nil> <nil>
}

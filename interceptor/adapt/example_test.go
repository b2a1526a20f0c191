// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package adapt_test

import (
	"context"
	"errors"
	"fmt"
	"log"

	"golang.org/x/sync/semaphore"
	"google.golang.org/grpc"

	"github.com/belfry-go/belfry/interceptor"
	"github.com/belfry-go/belfry/interceptor/adapt"
)

// call makes a call that must not wait through a layer, in front of a server that answers at once.
func call(spec interceptor.Spec) {
	stack, err := interceptor.NewStack(spec)
	if err != nil {
		log.Fatal(err)
	}
	server := func(context.Context, string, any, any, *grpc.ClientConn, ...grpc.CallOption) error { return nil }
	fmt.Println(stack.UnaryClientInterceptor()(context.Background(), "/shop.Orders/Get", nil, nil, nil, server,
		interceptor.WithWait(interceptor.None)))
}

// A semaphore that the program uses elsewhere too.
func ExampleFromSemaphore() {
	slots := semaphore.NewWeighted(1)
	call(adapt.FromSemaphore("slots", slots))
	if !slots.TryAcquire(1) {
		log.Fatal("the call did not give its slot back")
	}
	call(adapt.FromSemaphore("slots", slots))
	// Output:
	// <nil>
	// belfry: slots: CONCURRENCY: no permit
}

// A breaker of the shape "allow, then done".
func ExampleFromAllow() {
	failures := 0
	allow := func(context.Context) (func(interceptor.Outcome, error), error) {
		if failures > 2 {
			return nil, errors.New("open")
		}
		return func(o interceptor.Outcome, err error) {
			if o == interceptor.Failed {
				failures++
			}
		}, nil
	}
	call(adapt.FromAllow("circuit", interceptor.ReasonBreakerOpen, allow))
	failures = 3
	call(adapt.FromAllow("circuit", interceptor.ReasonBreakerOpen, allow))
	// Output:
	// <nil>
	// belfry: circuit: BREAKER_OPEN: not allowed: open
}

// permit is what a limiter of one's own hands out.
type permit struct{}

func (permit) Success() { fmt.Println("one more success") }
func (permit) Drop()    { fmt.Println("overload") }
func (permit) Ignore()  {}

// A limiter that hands out permits and learns from how their calls end.
func ExampleFromPermit() {
	call(adapt.FromPermit("mine", interceptor.ReasonConcurrency, func(ctx context.Context, wait bool) (adapt.Permit, error) {
		return permit{}, nil
	}))
	// Output:
	// one more success
	// <nil>
}

// spent is a limiter of go-grpc-middleware.
type spent struct{}

func (spent) Limit(context.Context) error { return errors.New("nothing left today") }

// A rate limiter of go-grpc-middleware.
func ExampleFromLimiter() {
	call(adapt.FromLimiter("quota", spent{}))
	// Output: belfry: quota: RATE_LIMIT: over the limit: nothing left today
}

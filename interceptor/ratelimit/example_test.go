// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package ratelimit_test

import (
	"context"
	"errors"
	"fmt"
	"log"
	"time"

	"golang.org/x/time/rate"
	"google.golang.org/grpc"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"github.com/belfry-go/belfry/interceptor"
	"github.com/belfry-go/belfry/interceptor/ratelimit"
)

// echo takes the part of a connection. A *grpc.ClientConn is used in the same way, or
// takes the stack's DialOptions.
type echo struct{ grpc.ClientConnInterface }

func (echo) Invoke(_ context.Context, method string, _, _ any, _ ...grpc.CallOption) error {
	fmt.Println("called", method)
	return nil
}

func Example() {
	stack, err := interceptor.NewStack(ratelimit.Config{Limit: 2, Per: time.Minute, Burst: 2})
	if err != nil {
		log.Fatal(err)
	}
	conn := stack.Wrap(echo{})

	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	for range 3 {
		// A third call would have to wait for half a minute, which its deadline does
		// not allow, so it is refused at once.
		err := conn.Invoke(ctx, "/helloworld.Greeter/SayHello", nil, nil)
		var refusal *interceptor.Refusal
		if errors.As(err, &refusal) {
			fmt.Println(refusal.Layer, refusal.Reason, status.Code(err), refusal.RetryAfter > 20*time.Second)
		}
	}
	// Output:
	// called /helloworld.Greeter/SayHello
	// called /helloworld.Greeter/SayHello
	// ratelimit RATE_LIMIT ResourceExhausted true
}

// Each tenant has a rate of its own, and a refusal says whose was exceeded.
func ExampleConfig_keyBy() {
	stack, err := interceptor.NewStack(ratelimit.Config{
		Limit: 1, Per: time.Minute,
		KeyBy: interceptor.KeyBy{Metadata: "tenant"},
	})
	if err != nil {
		log.Fatal(err)
	}
	conn := stack.Wrap(echo{})
	for _, tenant := range []string{"a", "b", "a"} {
		ctx := metadata.AppendToOutgoingContext(context.Background(), "tenant", tenant)
		err := conn.Invoke(ctx, "/helloworld.Greeter/SayHello", nil, nil, interceptor.WithWait(interceptor.None))
		if err != nil {
			fmt.Println(status.Convert(err).Message())
		}
	}
	// Output:
	// called /helloworld.Greeter/SayHello
	// called /helloworld.Greeter/SayHello
	// belfry: ratelimit: RATE_LIMIT ("a"): more than 1 in 1m0s
}

// A limiter of golang.org/x/time/rate, which the program may use elsewhere too.
func ExampleFromRate() {
	limiter := rate.NewLimiter(rate.Every(time.Hour), 1)
	stack, err := interceptor.NewStack(ratelimit.FromRate(limiter))
	if err != nil {
		log.Fatal(err)
	}
	conn := stack.Wrap(echo{})
	for range 2 {
		err := conn.Invoke(context.Background(), "/shop.Orders/Get", nil, nil, interceptor.WithWait(interceptor.None))
		if refusal, ok := interceptor.AsRefusal(err); ok {
			fmt.Println("refused:", refusal.Reason)
		}
	}
	// Output:
	// called /shop.Orders/Get
	// refused: RATE_LIMIT
}

// store stands in for one that many processes share.
type store map[string]int

func (s store) Take(_ context.Context, key string) (ratelimit.Decision, error) {
	if s[key] == 0 {
		return ratelimit.Decision{RetryAfter: time.Minute}, nil
	}
	s[key]--
	return ratelimit.Decision{OK: true}, nil
}

func (s store) Refund(key string) { s[key]++ }

// A limiter that decides elsewhere, for each tenant.
func ExampleFromLimiter() {
	stack, err := interceptor.NewStack(
		ratelimit.FromLimiter(store{"blue": 1}, interceptor.KeyBy{Metadata: "tenant"}))
	if err != nil {
		log.Fatal(err)
	}
	conn := stack.Wrap(echo{})
	ctx := metadata.AppendToOutgoingContext(context.Background(), "tenant", "blue")
	for range 2 {
		err := conn.Invoke(ctx, "/shop.Orders/Get", nil, nil, interceptor.WithWait(interceptor.None))
		if refusal, ok := interceptor.AsRefusal(err); ok {
			fmt.Println(refusal.Key, "is refused, and may try again in", refusal.RetryAfter)
		}
	}
	// Output:
	// called /shop.Orders/Get
	// blue is refused, and may try again in 1m0s
}

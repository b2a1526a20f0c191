// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package belfry_test

import (
	"context"
	"slices"
	"testing"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/resolver"
	"google.golang.org/grpc/resolver/manual"

	"github.com/belfry-go/belfry"
	"github.com/belfry-go/belfry/interceptor"
)

type attemptLog struct {
	interceptor.NopObserver
	log *[]string
}

func (a attemptLog) InFlight(_ interceptor.Observed, delta int) {
	if delta > 0 {
		*a.log = append(*a.log, "stack")
	}
}

func TestDialOptions(t *testing.T) {
	var log []string
	stack, err := interceptor.NewStack(interceptor.Observe(attemptLog{log: &log}))
	if err != nil {
		t.Fatal(err)
	}
	telemetry := grpc.WithChainUnaryInterceptor(func(ctx context.Context, method string, req, reply any, cc *grpc.ClientConn, invoker grpc.UnaryInvoker, opts ...grpc.CallOption) error {
		log = append(log, "telemetry")
		return invoker(ctx, method, req, reply, cc, opts...)
	})
	res := manual.NewBuilderWithScheme("test")
	res.InitialState(resolver.State{})
	opts := append(belfry.DialOptions(stack, telemetry), grpc.WithTransportCredentials(insecure.NewCredentials()), grpc.WithResolvers(res))
	conn, err := grpc.NewClient("test:///x", opts...)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if err := conn.Invoke(t.Context(), "/s/m", nil, nil); err == nil {
		t.Error("a call without endpoints succeeded")
	}
	if want := []string{"telemetry", "stack"}; !slices.Equal(log, want) {
		t.Errorf("a call passes %q, want %q", log, want)
	}
	if got := len(belfry.DialOptions(nil)); got == 0 {
		t.Error("without a stack there are no options for the balancing policy")
	}
}

// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package belfry

import (
	"google.golang.org/grpc"

	"github.com/belfry-go/belfry/balancer/p2c"
	"github.com/belfry-go/belfry/interceptor"
)

// DialOptions returns the options for grpc.NewClient that put everything in its place:
// telemetry, then the layers of stack, then the balancing policy belfry.p2c with its default
// config. stack may be nil. It is safe for concurrent use.
//
// telemetry is what has to see calls and not attempts, with all that they wait: grpc's
// OpenTelemetry plugin, or another interceptor that measures or traces. Given after the
// stack, such a plugin takes each attempt for a call, and sees nothing of what calls wait.
//
//	conn, err := grpc.NewClient(target, append(belfry.DialOptions(stack, opentelemetry.DialOption(otelOptions)), creds)...)
func DialOptions(stack *interceptor.Stack, telemetry ...grpc.DialOption) []grpc.DialOption {
	opts := telemetry[:len(telemetry):len(telemetry)]
	if stack != nil {
		opts = append(opts, stack.DialOptions()...)
	}
	return append(opts, p2c.DialOptions()...)
}

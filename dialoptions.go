// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package belfry

import (
	"google.golang.org/grpc"

	"github.com/belfry-go/belfry/balancer/p2c"
	"github.com/belfry-go/belfry/interceptor"
)

// DialOptions returns the options for grpc.NewClient in the right order: telemetry, then the
// layers of stack, then the balancing policy belfry.p2c with its default config. Without a
// stack (nil) there are no layers. It is safe for concurrent use.
//
// telemetry is what measures or traces calls: grpc's OpenTelemetry plugin, or an interceptor.
// It comes before the stack: behind it, it would see each attempt as a call, and would not see
// how long calls wait in the layers.
//
//	conn, err := grpc.NewClient(target, append(belfry.DialOptions(stack, opentelemetry.DialOption(otelOptions)), creds)...)
func DialOptions(stack *interceptor.Stack, telemetry ...grpc.DialOption) []grpc.DialOption {
	opts := telemetry[:len(telemetry):len(telemetry)]
	if stack != nil {
		opts = append(opts, stack.DialOptions()...)
	}
	return append(opts, p2c.DialOptions()...)
}

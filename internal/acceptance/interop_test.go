// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package acceptance

import (
	"testing"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/resolver"

	"github.com/belfry-go/belfry/internal/test/interoptest"
	"github.com/belfry-go/belfry/resolver/discover"
)

// full is a stack with every kind of layer, none of which gets in the way.
const full = `{"loadShed": {}},
	{"timeout": {"call": "30s", "lifetime": "30s", "firstResponse": "20s", "message": "20s", "idle": "20s"}},
	{"hedge": {"allMethods": true, "delay": "10s"}},
	{"retry": {"allMethods": true}},
	{"throttle": {}},
	{"breaker": {"failureRatio": 1, "minCalls": 1000}},
	{"buffer": {"size": 100}},
	{"failFast": {}},
	{"rateLimit": {"limit": 100000}},
	{"concurrency": {"limit": 1000}}`

// gRPC's interop cases through a stack of every kind of layer over belfry.p2c, on
// three servers.
func TestInteropCasesPassThroughAFullStack(t *testing.T) {
	var endpoints []resolver.Endpoint
	for _, addr := range interoptest.Serve(t) {
		endpoints = append(endpoints, discover.MustEndpoint(addr))
	}
	conn := dial(t, newStack(t, full), endpoints, grpc.WithTransportCredentials(insecure.NewCredentials()))
	interoptest.Run(testContext(t), t, conn)
}

// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package p2c

import (
	"fmt"
	"testing"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/resolver"
	"google.golang.org/grpc/resolver/manual"

	"github.com/belfry-go/belfry/internal/test/interoptest"
)

// gRPC's interop cases through a channel with the policy and its DialOptions, over
// three servers.
func TestInteropCasesPass(t *testing.T) {
	r := manual.NewBuilderWithScheme("belfrytest")
	var es []resolver.Endpoint
	for _, addr := range interoptest.Serve(t) {
		es = append(es, one(addr))
	}
	r.InitialState(resolver.State{Endpoints: es})
	for _, config := range []string{`{}`, `{"load":{"peakEwma":{}}}`, pendingConfig} {
		t.Run(config, func(t *testing.T) {
			conn, err := grpc.NewClient(fmt.Sprintf("belfrytest:///interop-%d", targets.Add(1)), append(DialOptions(),
				grpc.WithResolvers(r), grpc.WithTransportCredentials(insecure.NewCredentials()),
				grpc.WithDefaultServiceConfig(fmt.Sprintf(`{"loadBalancingConfig":[{"belfry.p2c":%s}]}`, config)))...)
			if err != nil {
				t.Fatal(err)
			}
			defer conn.Close()
			interoptest.Run(testContext(t), t, conn)
		})
	}
}

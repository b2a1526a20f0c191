// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package acceptance

import (
	"io"
	"testing"
	"time"

	"google.golang.org/grpc"

	"github.com/belfry-go/belfry"
	"github.com/belfry-go/belfry/balancer/p2c"
	"github.com/belfry-go/belfry/interceptor"
	"github.com/belfry-go/belfry/interceptor/hedge"
	"github.com/belfry-go/belfry/interceptor/retry"
	"github.com/belfry-go/belfry/internal/test/calltest"
	"github.com/belfry-go/belfry/internal/testserver"
	testingv1 "github.com/belfry-go/belfry/proto/belfry/testing/v1"
)

// BenchmarkConnection measures what retry and hedge cost on a real connection, if the first
// attempt succeeds at once. What the server allocates, in the same process, is the same in
// all cases.
func BenchmarkConnection(b *testing.B) {
	idle := hedge.Config{Delay: time.Minute, AllMethods: true}
	repeat := retry.Config{AllMethods: true}
	weigh := append(p2c.DialOptions(), grpc.WithDefaultServiceConfig(`{"loadBalancingConfig":[{"belfry.p2c":{}}]}`))
	for _, c := range []struct {
		name   string
		layers []interceptor.Spec
		opts   []grpc.DialOption
	}{
		{name: "bare"},
		{name: "no_layers", layers: []interceptor.Spec{}},
		{name: "retry", layers: []interceptor.Spec{repeat}},
		{name: "hedge", layers: []interceptor.Spec{idle}},
		{name: "hedge_retry", layers: []interceptor.Spec{idle, repeat}},
		{name: "p2c", opts: weigh},
		{name: "retry_p2c", layers: []interceptor.Spec{repeat}, opts: weigh},
		{name: "hedge_retry_p2c", layers: []interceptor.Spec{idle, repeat}, opts: weigh},
	} {
		opts := c.opts
		if c.layers != nil {
			opts = append(calltest.Stack(b, c.layers...).DialOptions(), opts...)
		}
		conn := testserver.Dial(b, testserver.New(b), opts...)
		if err := belfry.WaitReady(testContext(b), conn); err != nil {
			b.Fatal(err)
		}
		client := testingv1.NewTestServiceClient(conn)
		b.Run(c.name+"/unary", func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				if _, err := client.Unary(b.Context(), &testingv1.UnaryRequest{}); err != nil {
					b.Fatal(err)
				}
			}
		})
		b.Run(c.name+"/bidi", func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				s, err := client.Bidi(b.Context())
				if err != nil {
					b.Fatal(err)
				}
				if err := s.Send(&testingv1.BidiRequest{}); err != nil {
					b.Fatal(err)
				}
				if _, err := s.Recv(); err != nil {
					b.Fatal(err)
				}
				s.CloseSend()
				if _, err := s.Recv(); err != io.EOF {
					b.Fatal(err)
				}
			}
		})
	}
}

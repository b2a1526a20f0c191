// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package testserver

import (
	"context"
	"net"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	testingv1 "github.com/belfry-go/belfry/proto/belfry/testing/v1"
)

// plain is the floor: a handler that does nothing on a grpc.Server with default
// options.
type plain struct {
	testingv1.UnimplementedTestServiceServer
}

func (plain) Unary(context.Context, *testingv1.UnaryRequest) (*testingv1.UnaryResponse, error) {
	return &testingv1.UnaryResponse{}, nil
}

// BenchmarkUnary keeps 500 calls in flight over ten servers on loopback.
func BenchmarkUnary(b *testing.B) {
	b.Run("grpc alone", func(b *testing.B) {
		var conns []*grpc.ClientConn
		for range 10 {
			l, err := net.Listen("tcp", "127.0.0.1:0")
			if err != nil {
				b.Fatal(err)
			}
			g := grpc.NewServer()
			testingv1.RegisterTestServiceServer(g, plain{})
			served := make(chan struct{})
			go func() {
				defer close(served)
				_ = g.Serve(l)
			}()
			b.Cleanup(func() { g.Stop(); <-served })
			conn, err := grpc.NewClient("passthrough:///"+l.Addr().String(), grpc.WithTransportCredentials(insecure.NewCredentials()))
			if err != nil {
				b.Fatal(err)
			}
			b.Cleanup(func() { _ = conn.Close() })
			conns = append(conns, conn)
		}
		inFlight(b, conns)
	})
	benchmarks := []struct {
		name string
		opts []Option
	}{
		{"no service time", nil},
		{"uniform to 10ms", []Option{ServiceTime(Uniform(0, 10*time.Millisecond))}},
		{"uniform to 10ms, 64 workers", []Option{ServiceTime(Uniform(0, 10*time.Millisecond)), Workers(64)}},
		{"uniform to 10ms, measured load", []Option{ServiceTime(Uniform(0, 10*time.Millisecond)), Workers(64), ReportLoad(MeasuredLoad())}},
	}
	for _, bm := range benchmarks {
		b.Run(bm.name, func(b *testing.B) {
			c := NewCluster(b, 10, func(int) []Option { return bm.opts })
			var conns []*grpc.ClientConn
			for _, s := range c.Servers() {
				conns = append(conns, Dial(b, s))
			}
			inFlight(b, conns)
		})
	}
}

// inFlight makes b.N calls, 500 at a time, over all channels in turn.
func inFlight(b *testing.B, conns []*grpc.ClientConn) {
	const callers = 500
	b.ReportAllocs()
	b.ResetTimer()
	var next atomic.Int64
	done := make(chan error, callers)
	for i := range callers {
		client := testingv1.NewTestServiceClient(conns[i%len(conns)])
		go func() {
			for next.Add(1) <= int64(b.N) {
				if _, err := client.Unary(context.Background(), &testingv1.UnaryRequest{}); err != nil {
					done <- err
					return
				}
			}
			done <- nil
		}()
	}
	for range callers {
		if err := <-done; err != nil {
			b.Error(err)
		}
	}
	b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "calls/s")
}

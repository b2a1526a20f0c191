// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

// Package interoptest runs gRPC's interop cases through a channel of a test.
package interoptest

import (
	"context"
	"net"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/interop"
	testgrpc "google.golang.org/grpc/interop/grpc_testing"
)

// Serve starts three of gRPC's interop servers on loopback, which stop when the test
// ends, and returns their addresses.
func Serve(t *testing.T) []string {
	t.Helper()
	var addrs []string
	for range 3 {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		srv := grpc.NewServer()
		testgrpc.RegisterTestServiceServer(srv, interop.NewTestServer())
		served := make(chan error, 1)
		go func() { served <- srv.Serve(l) }()
		t.Cleanup(func() {
			srv.Stop()
			if err := <-served; err != nil {
				t.Errorf("serving: %v", err)
			}
		})
		addrs = append(addrs, l.Addr().String())
	}
	return addrs
}

// Run makes each case a test of its own. The cases end the process with a line in the
// log when they fail, as they do in gRPC's own suites.
func Run(ctx context.Context, t *testing.T, conn *grpc.ClientConn) {
	client := testgrpc.NewTestServiceClient(conn)
	for _, c := range []struct {
		name string
		do   func(context.Context, testgrpc.TestServiceClient, ...grpc.CallOption)
	}{
		{"empty unary", interop.DoEmptyUnaryCall},
		{"large unary", interop.DoLargeUnaryCall},
		{"client streaming", interop.DoClientStreaming},
		{"server streaming", interop.DoServerStreaming},
		{"ping pong", interop.DoPingPong},
		{"empty stream", interop.DoEmptyStream},
		{"timeout on sleeping server", interop.DoTimeoutOnSleepingServer},
		{"cancel after begin", func(ctx context.Context, client testgrpc.TestServiceClient, opts ...grpc.CallOption) {
			interop.DoCancelAfterBegin(ctx, cancelledFirst{client}, opts...)
		}},
		{"cancel after first response", interop.DoCancelAfterFirstResponse},
		{"custom metadata", interop.DoCustomMetadata},
		{"status code and message", interop.DoStatusCodeAndMessage},
		{"special status message", interop.DoSpecialStatusMessage},
		{"unimplemented method", func(ctx context.Context, _ testgrpc.TestServiceClient, _ ...grpc.CallOption) {
			interop.DoUnimplementedMethod(ctx, conn)
		}},
		{"unimplemented service", func(ctx context.Context, _ testgrpc.TestServiceClient, _ ...grpc.CallOption) {
			interop.DoUnimplementedService(ctx, testgrpc.NewUnimplementedServiceClient(conn))
		}},
	} {
		t.Run(c.name, func(*testing.T) {
			for range 3 { // Some case meets each of the servers.
				c.do(ctx, client)
			}
		})
	}
	t.Run("soak", func(*testing.T) {
		interop.DoSoakTest(ctx, interop.SoakTestConfig{
			RequestSize:                      5_000,
			ResponseSize:                     10_000,
			PerIterationMaxAcceptableLatency: 10 * time.Second,
			OverallTimeout:                   20 * time.Second,
			NumWorkers:                       4,
			Iterations:                       40,
			ServerAddr:                       conn.Target(),
			ChannelForTest:                   func() (*grpc.ClientConn, func()) { return conn, func() {} },
		})
	})
}

// cancelledFirst is a client whose client stream ends with its cancellation and
// not with the answer to the half-close that CloseAndRecv sends after it. On a
// busy machine the answer may be there before gRPC has looked at the context, and
// then either may win.
type cancelledFirst struct{ testgrpc.TestServiceClient }

func (c cancelledFirst) StreamingInputCall(ctx context.Context, opts ...grpc.CallOption) (testgrpc.TestService_StreamingInputCallClient, error) {
	ended := make(chan struct{})
	s, err := c.TestServiceClient.StreamingInputCall(ctx, append(opts[:len(opts):len(opts)], grpc.OnFinish(func(error) { close(ended) }))...)
	return &cancelledFirstStream{s, ended}, err
}

type cancelledFirstStream struct {
	testgrpc.TestService_StreamingInputCallClient
	ended chan struct{}
}

func (s *cancelledFirstStream) CloseAndRecv() (*testgrpc.StreamingInputCallResponse, error) {
	<-s.ended
	return s.TestService_StreamingInputCallClient.CloseAndRecv()
}

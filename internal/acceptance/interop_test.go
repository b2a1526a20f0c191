// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package acceptance

import (
	"context"
	"net"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/interop"
	testgrpc "google.golang.org/grpc/interop/grpc_testing"
	"google.golang.org/grpc/resolver"

	"github.com/belfry-go/belfry/resolver/discover"
)

// full is a stack with every kind of layer, none of which gets in the way.
const full = `{"loadShed": {}},
	{"timeout": {"call": "30s", "lifetime": "30s", "firstResponse": "20s", "message": "20s", "idle": "20s"}},
	{"hedge": {"delay": "10s"}},
	{"retry": {}},
	{"throttle": {}},
	{"breaker": {"failureRatio": 1, "minCalls": 1000}},
	{"buffer": {"size": 100}},
	{"failFast": {}},
	{"rateLimit": {"limit": 100000}},
	{"concurrency": {"limit": 1000}}`

// gRPC's interop cases through a stack of every kind of layer over belfry.p2c, on
// three servers. The cases end the process with a line in the log when they fail,
// as they do in gRPC's own suites.
func TestInteropCasesPassThroughAFullStack(t *testing.T) {
	var endpoints []resolver.Endpoint
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
		endpoints = append(endpoints, discover.MustEndpoint(l.Addr().String()))
	}
	conn := dial(t, newStack(t, full), endpoints, grpc.WithTransportCredentials(insecure.NewCredentials()))
	client := testgrpc.NewTestServiceClient(conn)
	ctx := testContext(t)
	for _, c := range []struct {
		name string
		do   func(context.Context, testgrpc.TestServiceClient, ...grpc.CallOption)
	}{
		{"empty_unary", interop.DoEmptyUnaryCall},
		{"large_unary", interop.DoLargeUnaryCall},
		{"client_streaming", interop.DoClientStreaming},
		{"server_streaming", interop.DoServerStreaming},
		{"ping_pong", interop.DoPingPong},
		{"empty_stream", interop.DoEmptyStream},
		{"timeout_on_sleeping_server", interop.DoTimeoutOnSleepingServer},
		{"cancel_after_begin", func(ctx context.Context, client testgrpc.TestServiceClient, opts ...grpc.CallOption) {
			interop.DoCancelAfterBegin(ctx, cancelledFirst{client}, opts...)
		}},
		{"cancel_after_first_response", interop.DoCancelAfterFirstResponse},
		{"custom_metadata", interop.DoCustomMetadata},
		{"status_code_and_message", interop.DoStatusCodeAndMessage},
		{"special_status_message", interop.DoSpecialStatusMessage},
		{"unimplemented_method", func(ctx context.Context, _ testgrpc.TestServiceClient, _ ...grpc.CallOption) {
			interop.DoUnimplementedMethod(ctx, conn)
		}},
		{"unimplemented_service", func(ctx context.Context, _ testgrpc.TestServiceClient, _ ...grpc.CallOption) {
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

// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package belfry_test

import (
	"context"
	"fmt"
	"log"
	"net"
	"slices"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	"google.golang.org/grpc/test/bufconn"

	"github.com/belfry-go/belfry"
	testingv1 "github.com/belfry-go/belfry/proto/belfry/testing/v1"
)

// greeter greets everyone who gives a name.
type greeter struct {
	testingv1.UnimplementedTestServiceServer
}

func (greeter) Unary(_ context.Context, req *testingv1.UnaryRequest) (*testingv1.UnaryResponse, error) {
	if len(req.GetPayload()) == 0 {
		return nil, status.Error(codes.InvalidArgument, "no name")
	}
	return &testingv1.UnaryResponse{Payload: fmt.Appendf(nil, "hello, %s", req.GetPayload())}, nil
}

// serve starts a server and returns a connection to it that is still idle.
func serve() (conn *grpc.ClientConn, stop func()) {
	lis := bufconn.Listen(1 << 16)
	server := grpc.NewServer()
	testingv1.RegisterTestServiceServer(server, greeter{})
	served := make(chan error, 1)
	go func() { served <- server.Serve(lis) }()
	conn, err := grpc.NewClient("passthrough:///greeter",
		grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return lis.DialContext(ctx) }))
	if err != nil {
		log.Fatal(err)
	}
	return conn, func() {
		if err := conn.Close(); err != nil {
			log.Print(err)
		}
		server.Stop()
		if err := <-served; err != nil {
			log.Print(err)
		}
	}
}

func request(name string) *testingv1.UnaryRequest {
	return &testingv1.UnaryRequest{Payload: []byte(name)}
}

func Example() {
	conn, stop := serve()
	defer stop()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()

	if err := belfry.WaitReady(ctx, conn); err != nil {
		log.Fatal(err)
	}
	client := testingv1.NewTestServiceClient(conn)
	requests := slices.Values([]*testingv1.UnaryRequest{request("ringer"), request(""), request("keeper")})
	for i, r := range belfry.CallAll(ctx, 16, requests, belfry.Bind(client.Unary)) {
		if r.Err != nil {
			fmt.Println(i, status.Code(r.Err))
			continue
		}
		fmt.Println(i, string(r.Response.GetPayload()))
	}
	// Output:
	// 0 hello, ringer
	// 1 InvalidArgument
	// 2 hello, keeper
}

func ExampleWaitReady() {
	conn, stop := serve()
	defer stop()

	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	fmt.Println(conn.GetState())
	if err := belfry.WaitReady(ctx, conn); err != nil {
		log.Fatal(err)
	}
	fmt.Println(conn.GetState())
	// Output:
	// IDLE
	// READY
}

func ExampleCallAll() {
	square := func(_ context.Context, n int) (int, error) { return n * n, nil }

	naturals := func(yield func(int) bool) { // without end
		for n := 1; yield(n); n++ {
		}
	}
	for i, r := range belfry.CallAll(context.Background(), 4, naturals, square) {
		if r.Err != nil {
			log.Fatal(r.Err)
		}
		fmt.Printf("%d: %d² = %d\n", i, r.Request, r.Response)
		if r.Response > 20 {
			break
		}
	}
	// Output:
	// 0: 1² = 1
	// 1: 2² = 4
	// 2: 3² = 9
	// 3: 4² = 16
	// 4: 5² = 25
}

func ExampleCallAll_channel() {
	double := func(_ context.Context, n int) (int, error) { return 2 * n, nil }

	requests := make(chan int)
	go func() {
		requests <- 21 // No further request comes.
	}()
	for _, r := range belfry.CallAll(context.Background(), 4, requests, double) {
		fmt.Println(r.Response, r.Err)
		break // The loop does not wait for another request.
	}
	// Output:
	// 42 <nil>
}

func ExampleCallAllUnordered() {
	seen := make(chan struct{})
	call := func(_ context.Context, name string) (string, error) {
		if name == "slow" {
			<-seen // Waits until the other result has been yielded.
		}
		return "done", nil
	}
	for i, r := range belfry.CallAllUnordered(context.Background(), 2, slices.Values([]string{"slow", "quick"}), call) {
		fmt.Println(i, r.Request, r.Response, r.Err)
		if r.Request == "quick" {
			close(seen)
		}
	}
	// Output:
	// 1 quick done <nil>
	// 0 slow done <nil>
}

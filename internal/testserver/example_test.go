// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package testserver_test

import (
	"context"
	"fmt"
	"log"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/belfry-go/belfry/internal/testserver"
	testingv1 "github.com/belfry-go/belfry/proto/belfry/testing/v1"
)

func Example() {
	srv, err := testserver.Start(
		testserver.ServiceTime(testserver.Exponential(10*time.Millisecond)),
		testserver.Workers(4),
	)
	if err != nil {
		log.Fatal(err)
	}
	defer srv.Close()

	conn, err := srv.NewClient()
	if err != nil {
		log.Fatal(err)
	}
	defer conn.Close()
	client := testingv1.NewTestServiceClient(conn)

	r, err := client.Unary(context.Background(), &testingv1.UnaryRequest{Payload: []byte("hello")})
	fmt.Printf("%s from %s, error %v\n", r.GetPayload(), r.GetObserved().GetServer(), err)

	if err := srv.Fail(codes.Unavailable, 1); err != nil {
		log.Fatal(err)
	}
	_, err = client.Unary(context.Background(), &testingv1.UnaryRequest{})
	fmt.Println(status.Code(err))

	fmt.Println(srv.Stats().Started, "calls started")
	// Output:
	// hello from server, error <nil>
	// Unavailable
	// 2 calls started
}

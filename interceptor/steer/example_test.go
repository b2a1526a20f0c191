// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package steer_test

import (
	"context"
	"fmt"
	"log"
	"strings"

	"google.golang.org/grpc"

	"github.com/belfry-go/belfry/interceptor/steer"
)

// server stands in for a connection.
type server struct {
	grpc.ClientConnInterface
	name string
}

func (s server) Invoke(_ context.Context, method string, _, _ any, _ ...grpc.CallOption) error {
	fmt.Println(s.name, "got", method)
	return nil
}

func Example() {
	primary, replica := server{name: "primary"}, server{name: "replica"}
	conn, err := steer.New(func(_ context.Context, method string, _ any) (context.Context, string, error) {
		if strings.HasPrefix(method, "/orders.Orders/Get") {
			return nil, "replica", nil
		}
		return nil, "primary", nil
	}, map[string]grpc.ClientConnInterface{"primary": primary, "replica": replica})
	if err != nil {
		log.Fatal(err)
	}

	// In a program: orders.NewOrdersClient(conn).
	for _, method := range []string{"/orders.Orders/Get", "/orders.Orders/Put"} {
		if err := conn.Invoke(context.Background(), method, nil, nil); err != nil {
			log.Fatal(err)
		}
	}
	// Output:
	// replica got /orders.Orders/Get
	// primary got /orders.Orders/Put
}

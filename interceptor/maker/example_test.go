// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package maker_test

import (
	"context"
	"fmt"
	"log"
	"time"

	"google.golang.org/grpc"

	"github.com/belfry-go/belfry/interceptor/maker"
)

type tenantKey struct{}

// tenantOf says whose call it is.
func tenantOf(ctx context.Context, _ string, _ any) (string, error) {
	tenant, ok := ctx.Value(tenantKey{}).(string)
	if !ok {
		return "", fmt.Errorf("the context names no tenant")
	}
	return tenant, nil
}

// server stands in for a *grpc.ClientConn.
type server struct {
	grpc.ClientConnInterface
	tenant string
}

func (s server) Invoke(_ context.Context, method string, _, _ any, _ ...grpc.CallOption) error {
	fmt.Println(s.tenant, "got", method)
	return nil
}

func (s server) Close() error {
	fmt.Println("closed", s.tenant)
	return nil
}

func Example() {
	conn, err := maker.New(maker.Config{MaxConns: 100, IdleTimeout: 5 * time.Minute}, tenantOf,
		func(_ context.Context, tenant string) (maker.Conn, error) {
			fmt.Println("connecting to", tenant)
			// In a program: grpc.NewClient("dns:///"+tenant+".example.com", …).
			return server{tenant: tenant}, nil
		})
	if err != nil {
		log.Fatal(err)
	}

	for _, tenant := range []string{"blue", "blue", "green"} {
		ctx := context.WithValue(context.Background(), tenantKey{}, tenant)
		if err := conn.Invoke(ctx, "/orders.Orders/Get", nil, nil); err != nil {
			log.Fatal(err)
		}
	}
	if err := conn.Close(); err != nil {
		log.Fatal(err)
	}
	// Unordered output:
	// connecting to blue
	// blue got /orders.Orders/Get
	// blue got /orders.Orders/Get
	// connecting to green
	// green got /orders.Orders/Get
	// closed blue
	// closed green
}

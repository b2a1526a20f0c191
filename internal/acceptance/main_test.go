// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package acceptance

import (
	"context"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/resolver"

	"github.com/belfry-go/belfry/balancer/p2c"
	"github.com/belfry-go/belfry/interceptor/stackconfig"
	"github.com/belfry-go/belfry/internal/test/leaktest"
	"github.com/belfry-go/belfry/resolver/discover"
)

func TestMain(m *testing.M) { leaktest.Main(m) }

func testContext(t testing.TB) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Minute)
	t.Cleanup(cancel)
	return ctx
}

// newStack makes a stack whose layers hold for all methods.
func newStack(t testing.TB, layers string, opts ...stackconfig.Option) *stackconfig.Stack {
	t.Helper()
	return newStackOf(t, `{"methodConfig": [{"name": [{}], "layers": [`+layers+`]}]}`, opts...)
}

func newStackOf(t testing.TB, js string, opts ...stackconfig.Option) *stackconfig.Stack {
	t.Helper()
	config, err := stackconfig.Parse([]byte(js))
	if err != nil {
		t.Fatal(err)
	}
	s, err := stackconfig.NewStackFromConfig(config, opts...)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// dial returns a channel through a stack to endpoints balanced by belfry.p2c,
// which is closed at the end of the test, when the stack must be at rest.
func dial(t testing.TB, s *stackconfig.Stack, endpoints []resolver.Endpoint, opts ...grpc.DialOption) *grpc.ClientConn {
	t.Helper()
	source, err := discover.List(endpoints...)
	if err != nil {
		t.Fatal(err)
	}
	all := append(s.DialOptions(), p2c.DialOptions()...)
	all = append(all, discover.WithSource(source),
		grpc.WithDefaultServiceConfig(`{"loadBalancingConfig":[{"belfry.p2c":{}}]}`), grpc.WithNoProxy())
	conn, err := grpc.NewClient("belfry:///acceptance", append(all, opts...)...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := conn.Close(); err != nil {
			t.Errorf("closing the channel: %v", err)
		}
		ctx, cancel := context.WithTimeout(context.Background(), 5*time.Minute)
		defer cancel()
		if err := s.Drain(ctx); err != nil {
			t.Errorf("the stack is not at rest: %v", err)
		}
	})
	return conn
}

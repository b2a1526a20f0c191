// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package testserver

import (
	"context"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/keepalive"

	testingv1 "github.com/belfry-go/belfry/proto/belfry/testing/v1"
)

func TestDroppedPacketsArriveOnceHealed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := New(t, InMemory())
		client := dial(t, s)
		must(t, unary(t.Context(), client, nil))
		s.DropPackets()
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		wantCode(t, unary(ctx, client, nil), codes.DeadlineExceeded)
		cancel()
		done := make(chan error)
		for _, c := range []*grpc.ClientConn{Dial(t, s), Dial(t, s)} { // new connections
			c.Connect()
		}
		go func() { done <- unary(t.Context(), client, nil) }()
		synctest.Wait()
		select {
		case err := <-done:
			t.Fatalf("a call ended while packets are dropped: %v", err)
		default:
		}
		s.Heal()
		must(t, <-done)
		must(t, s.WaitConnections(t.Context(), 3))
	})
}

func TestStopEndsDroppedConnections(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := New(t, InMemory())
		client := dial(t, s)
		must(t, unary(t.Context(), client, nil))
		s.DropPackets()
		s.Stop()
		wantCode(t, unary(t.Context(), client, nil), codes.Unavailable)
	})
}

func TestHalfOpenConnectionsSwallowCalls(t *testing.T) {
	alive := grpc.WithKeepaliveParams(keepalive.ClientParameters{Time: 10 * time.Second, Timeout: time.Second})
	for name, opts := range map[string][]Option{"in memory": {InMemory()}, "TCP": nil} {
		t.Run(name, func(t *testing.T) {
			test := func(t *testing.T) {
				s := New(t, opts...)
				client := dial(t, s)
				must(t, unary(t.Context(), client, nil))
				before := s.Stats().Started
				s.HalfOpen()
				ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
				defer cancel()
				wantCode(t, unary(ctx, client, nil), codes.DeadlineExceeded)
				if n := s.Stats().Started - before; n != 0 {
					t.Errorf("%d calls reached the server, want 0", n)
				}
				must(t, unary(t.Context(), dial(t, s), nil)) // on a new connection
				must(t, s.GracefulStop(testContext(t)))
			}
			if opts == nil {
				test(t)
				return
			}
			synctest.Test(t, test)
		})
	}
	t.Run("keepalive sees it", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			s := New(t, InMemory(), GRPC(grpc.KeepaliveEnforcementPolicy(keepalive.EnforcementPolicy{MinTime: time.Second})))
			client := testingv1.NewTestServiceClient(Dial(t, s, alive))
			must(t, unary(t.Context(), client, nil))
			s.HalfOpen()
			begin := time.Now()
			wantCode(t, unary(t.Context(), client, nil), codes.Unavailable)
			if d := time.Since(begin); d > 12*time.Second {
				t.Errorf("the call failed after %v, want at most 12s", d)
			}
			must(t, unary(t.Context(), client, nil))
		})
	})
}

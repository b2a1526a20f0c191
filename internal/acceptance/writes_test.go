// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package acceptance

import (
	"context"
	"io"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/belfry-go/belfry/interceptor"
	"github.com/belfry-go/belfry/interceptor/budget"
	"github.com/belfry-go/belfry/interceptor/hedge"
	"github.com/belfry-go/belfry/interceptor/retry"
	"github.com/belfry-go/belfry/internal/test/calltest"
	"github.com/belfry-go/belfry/internal/testserver"
	testingv1 "github.com/belfry-go/belfry/proto/belfry/testing/v1"
)

// Every write is carried out, one in ten is slow enough to be hedged, and another one in
// ten is answered UNAVAILABLE after it was carried out. No call is carried out twice,
// unless AllMethods allows it.
func TestWrites(t *testing.T) {
	all := budget.Config{Ratio: 10, MinPerSecond: 1000}
	for _, tc := range []struct {
		name   string
		calls  int
		layers []interceptor.Spec
		once   bool
	}{
		{"by_default", 1000, []interceptor.Spec{
			hedge.Config{Delay: time.Millisecond, Budget: all},
			retry.Config{Backoff: retry.Backoff{Initial: time.Microsecond}, Budget: all},
		}, true},
		{"all_methods", 100, []interceptor.Spec{
			hedge.Config{Delay: time.Millisecond, AllMethods: true, Budget: all},
			retry.Config{Backoff: retry.Backoff{Initial: time.Microsecond}, AllMethods: true, Budget: all},
		}, false},
	} {
		t.Run(tc.name, func(t *testing.T) {
			var executions atomic.Int64
			srv := testserver.New(t, testserver.GRPC(grpc.ChainUnaryInterceptor(
				func(context.Context, any, *grpc.UnaryServerInfo, grpc.UnaryHandler) (any, error) {
					switch executions.Add(1) % 10 {
					case 1:
						time.Sleep(5 * time.Millisecond)
					case 2:
						return nil, status.Error(codes.Unavailable, "the answer was lost")
					}
					return new(testingv1.UnaryResponse), nil
				})))
			client := testingv1.NewTestServiceClient(calltest.Stack(t, tc.layers...).Wrap(testserver.Dial(t, srv)))
			var wg sync.WaitGroup
			for range 10 {
				wg.Go(func() {
					for range tc.calls / 10 {
						_, err := client.Unary(t.Context(), new(testingv1.UnaryRequest))
						if r, ok := interceptor.AsRefusal(err); err != nil && tc.once && (!ok || r.Reason != interceptor.ReasonNotIdempotent) {
							t.Errorf("the error is %v, want one that says why it was not repeated", err)
						}
					}
				})
			}
			wg.Wait()
			if got := executions.Load(); tc.once && got != int64(tc.calls) || got < int64(tc.calls+tc.calls/10) && !tc.once {
				t.Errorf("%d calls were carried out %d times; exactly once wanted: %v", tc.calls, got, tc.once)
			}
		})
	}
}

// A third-party interceptor inside the stack opens the stream, sends a message of its own
// and returns how the server has answered. Then the server has seen the call, and a method
// that may not be carried out twice is not repeated.
func TestWritesThatAnInterceptorHasBegun(t *testing.T) {
	var executions atomic.Int64
	srv := testserver.New(t, testserver.GRPC(grpc.ChainStreamInterceptor(
		func(_ any, s grpc.ServerStream, _ *grpc.StreamServerInfo, _ grpc.StreamHandler) error {
			executions.Add(1)
			return status.Error(codes.Unavailable, "the answer was lost")
		})))
	greets := func(ctx context.Context, desc *grpc.StreamDesc, cc *grpc.ClientConn, method string, next grpc.Streamer, opts ...grpc.CallOption) (grpc.ClientStream, error) {
		s, err := next(ctx, desc, cc, method, opts...)
		if err != nil {
			return nil, err
		}
		if err := s.SendMsg(new(testingv1.BidiRequest)); err != nil && err != io.EOF {
			return nil, err
		}
		if err := s.RecvMsg(new(testingv1.BidiResponse)); err != nil {
			return nil, err
		}
		return s, nil
	}
	stack := calltest.Stack(t, retry.Config{Backoff: retry.Backoff{Initial: time.Microsecond}})
	client := testingv1.NewTestServiceClient(testserver.Dial(t, srv, append(stack.DialOptions(), grpc.WithChainStreamInterceptor(greets))...))
	_, err := client.Bidi(testContext(t))
	if r, ok := interceptor.AsRefusal(err); !ok || r.Reason != interceptor.ReasonNotIdempotent || status.Code(err) != codes.Unavailable {
		t.Errorf("the error is %v, want UNAVAILABLE and why it was not repeated", err)
	}
	if got := executions.Load(); got != 1 {
		t.Errorf("the write was carried out %d times, want once", got)
	}
}

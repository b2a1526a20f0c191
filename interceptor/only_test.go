// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package interceptor_test

import (
	"context"
	"testing"

	"github.com/grpc-ecosystem/go-grpc-middleware/v2/interceptors"
	"github.com/grpc-ecosystem/go-grpc-middleware/v2/interceptors/selector"
	"google.golang.org/grpc"

	"github.com/belfry-go/belfry/interceptor"
	"github.com/belfry-go/belfry/internal/test/calltest"
)

var everyCall = selector.MatchFunc(func(context.Context, interceptors.CallMeta) bool { return true })

func TestOnly(t *testing.T) {
	t.Run("runs_foreign_interceptors", func(t *testing.T) {
		ran := 0
		f := interceptor.Foreign("count",
			func(ctx context.Context, m string, req, reply any, cc *grpc.ClientConn, invoker grpc.UnaryInvoker, opts ...grpc.CallOption) error {
				ran++
				return invoker(ctx, m, req, reply, cc, opts...)
			}, nil)
		s := calltest.Stack(t, interceptor.Only(everyCall, interceptor.Only(everyCall, f)))
		if err := s.Wrap(answers(nil)).Invoke(context.Background(), calltest.Method, nil, nil); err != nil || ran != 1 {
			t.Errorf("got %v, and the interceptor ran %d times, want nil and once", err, ran)
		}
	})
}

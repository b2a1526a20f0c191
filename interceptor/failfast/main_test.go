// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package failfast_test

import (
	"context"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/goleak"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/belfry-go/belfry/interceptor"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const method = "/s/m"

// server is a connection that is made of what its calls do.
type server func(ctx context.Context) error

func (s server) Invoke(ctx context.Context, _ string, _, _ any, _ ...grpc.CallOption) error {
	return s(ctx)
}

func (s server) NewStream(ctx context.Context, _ *grpc.StreamDesc, _ string, _ ...grpc.CallOption) (grpc.ClientStream, error) {
	return nil, s(ctx)
}

// takes is a server whose calls take d.
func takes(d time.Duration) server {
	return func(ctx context.Context) error {
		select {
		case <-time.After(d):
			return nil
		case <-ctx.Done():
			return status.FromContextError(ctx.Err()).Err()
		}
	}
}

func stackOf(t testing.TB, layers ...interceptor.Layer) *interceptor.Stack {
	t.Helper()
	s, err := interceptor.NewStack(layers...)
	if err != nil {
		t.Fatalf("NewStack: %v", err)
	}
	return s
}

func reason(err error) interceptor.Reason {
	if r, ok := interceptor.AsRefusal(err); ok {
		return r.Reason
	}
	return ""
}

// end is how a call ended, and how long after the first of its burst had begun.
type end struct {
	after  time.Duration
	reason interceptor.Reason
	code   codes.Code
}

func ok(after time.Duration) end { return end{after, "", codes.OK} }

func refused(after time.Duration, r interceptor.Reason) end { return end{after, r, r.Code()} }

// begin starts n calls one after the other and returns what waits for them and
// says how each ended.
func begin(c grpc.ClientConnInterface, n int, opts ...grpc.CallOption) func() []end {
	ends := make([]end, n)
	start := time.Now()
	var wg sync.WaitGroup
	for i := range n {
		wg.Go(func() {
			err := c.Invoke(context.Background(), method, nil, nil, opts...)
			ends[i] = end{time.Since(start), reason(err), status.Code(err)}
		})
		synctest.Wait()
	}
	return func() []end {
		wg.Wait()
		return ends
	}
}

// burst is begin that waits.
func burst(c grpc.ClientConnInterface, n int, opts ...grpc.CallOption) []end {
	return begin(c, n, opts...)()
}

func expect(t *testing.T, got []end, want ...end) {
	t.Helper()
	if !slices.Equal(got, want) {
		t.Errorf("calls ended as\n%v, want\n%v", got, want)
	}
}

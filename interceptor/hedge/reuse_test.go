// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package hedge_test

import (
	"context"
	"fmt"
	"math/rand/v2"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/belfry-go/belfry/interceptor/budget"
	"github.com/belfry-go/belfry/interceptor/hedge"
	"github.com/belfry-go/belfry/internal/test/calltest"
)

// echo answers a call with its request, after a time that is about the delay of the hedge,
// whether the call has ended or not.
type echo struct{ grpc.ClientConnInterface }

func (echo) Invoke(ctx context.Context, _ string, req, reply any, opts ...grpc.CallOption) error {
	time.Sleep(time.Duration(rand.IntN(400)) * time.Microsecond)
	if rand.IntN(4) == 0 && ctx.Err() != nil {
		return status.FromContextError(ctx.Err()).Err()
	}
	v := req.(*wrapperspb.StringValue).Value
	reply.(*wrapperspb.StringValue).Value = v
	for _, o := range opts {
		if t, ok := o.(grpc.TrailerCallOption); ok {
			*t.TrailerAddr = metadata.Pairs("value", v)
		}
	}
	return nil
}

// What a call used is used by the next one if no extra attempt was made, and only then: an
// attempt that is still on its way writes to no other call. Whether one is depends on the
// clock, what must hold does not.
func TestReuse(t *testing.T) {
	stack := calltest.Stack(t, hedge.Config{AllMethods: true, Delay: 200 * time.Microsecond, Budget: budget.Config{Ratio: 10, MinPerSecond: 1000}})
	conn := stack.Wrap(echo{})
	var wg sync.WaitGroup
	for i := range 16 {
		wg.Go(func() {
			for j := range 100 {
				want := fmt.Sprintf("%d/%d", i, j)
				var trailer metadata.MD
				reply := new(wrapperspb.StringValue)
				if err := conn.Invoke(context.Background(), method, wrapperspb.String(want), reply, grpc.Trailer(&trailer)); err != nil {
					t.Error(err)
				}
				if got := trailer.Get("value"); reply.Value != want || len(got) != 1 || got[0] != want {
					t.Errorf("got the reply %q and the trailer %q, want %q", reply.Value, got, want)
				}
			}
		})
	}
	wg.Wait()
	if err := stack.Drain(t.Context()); err != nil {
		t.Error(err)
	}
}

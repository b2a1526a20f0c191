// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package interceptor_test

import (
	"context"
	"fmt"
	"io"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/grpc"

	"github.com/belfry-go/belfry/interceptor"
	"github.com/belfry-go/belfry/internal/calltest"
	"github.com/belfry-go/belfry/internal/race"
)

// gateToy only passes calls on.
type gateToy struct {
	interceptor.GateOnly
	_ byte
}

func (*gateToy) WrapGate(inner interceptor.Gate) interceptor.Gate {
	return interceptor.GateFunc(func(ctx context.Context, c *interceptor.Call, w interceptor.Wait) error {
		return inner.Admit(ctx, c, w)
	})
}

func gates(n int) (ls []interceptor.Layer) {
	for range n {
		ls = append(ls, &gateToy{})
	}
	return ls
}

// countToy counts to its limit and refuses: what a limit costs that need not wait.
type countToy struct {
	interceptor.GateOnly
	max, n atomic.Int64
	full   *interceptor.Refusal
}

func newCount(n int64) *countToy {
	l := &countToy{full: interceptor.Refuse("count", interceptor.ReasonConcurrency, "")}
	l.max.Store(n)
	return l
}

func (l *countToy) WrapGate(inner interceptor.Gate) interceptor.Gate {
	return interceptor.GateFunc(func(ctx context.Context, c *interceptor.Call, w interceptor.Wait) error {
		if l.n.Add(1) > l.max.Load() {
			l.n.Add(-1)
			return l.full
		}
		c.Hold(l, 0)
		return inner.Admit(ctx, c, w)
	})
}

func (l *countToy) Release(int64, interceptor.Outcome, error) { l.n.Add(-1) }

func six() []interceptor.Layer {
	return []interceptor.Layer{&shedToy{}, &timeoutToy{d: time.Hour}, &retryToy{n: 3}, newBuffer(100), newTokens(1 << 60), newCount(10)}
}

// unaryCases are what BenchmarkUnary runs and TestAllocations counts.
func unaryCases(t testing.TB) []struct {
	name   string
	unary  grpc.UnaryClientInterceptor
	allocs float64
} {
	refusing := newTokens(0)
	type c = struct {
		name   string
		unary  grpc.UnaryClientInterceptor
		allocs float64
	}
	cs := []c{{"stack_empty", calltest.Stack(t).UnaryClientInterceptor(), 0}}
	for _, n := range []int{1, 3, 6, 10} {
		cs = append(cs, c{fmt.Sprintf("stack_of_%d_gates", n), calltest.Stack(t, gates(n)...).UnaryClientInterceptor(), 0})
	}
	return append(cs,
		c{"stack_of_limit", calltest.Stack(t, newCount(10)).UnaryClientInterceptor(), 0},
		c{"stack_of_6_layers", calltest.Stack(t, six()...).UnaryClientInterceptor(), 0},
		c{"stack_refusing", calltest.Stack(t, &shedToy{}, refusing).UnaryClientInterceptor(), 0},
	)
}

func BenchmarkUnary(b *testing.B) {
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Minute)
	defer cancel()
	opts := []grpc.CallOption{grpc.StaticMethod()} // As generated code passes.
	for _, c := range unaryCases(b) {
		b.Run(c.name, func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				c.unary(ctx, calltest.Method, nil, nil, nil, calltest.Noop, opts...)
			}
		})
	}
	b.Run("stack_of_6_layers_parallel", func(b *testing.B) {
		unary := calltest.Stack(b, six()...).UnaryClientInterceptor()
		b.ReportAllocs()
		b.RunParallel(func(pb *testing.PB) {
			for pb.Next() {
				unary(ctx, calltest.Method, nil, nil, nil, calltest.Noop, opts...)
			}
		})
	})
	// The baseline: gRPC's own way to chain, with interceptors that only pass on.
	for _, n := range []int{1, 3, 6, 10} {
		b.Run(fmt.Sprintf("grpc_chain_of_%d", n), func(b *testing.B) {
			unary := chain(n)
			b.ReportAllocs()
			for b.Loop() {
				unary(ctx, calltest.Method, nil, nil, nil, calltest.Noop, opts...)
			}
		})
	}
}

// chain composes n passing interceptors as grpc.WithChainUnaryInterceptor does,
// which makes a closure per interceptor and call.
func chain(n int) grpc.UnaryClientInterceptor {
	pass := func(ctx context.Context, m string, req, reply any, cc *grpc.ClientConn, next grpc.UnaryInvoker, opts ...grpc.CallOption) error {
		return next(ctx, m, req, reply, cc, opts...)
	}
	ics := make([]grpc.UnaryClientInterceptor, n)
	for i := range ics {
		ics[i] = pass
	}
	if n == 1 {
		return pass
	}
	return func(ctx context.Context, m string, req, reply any, cc *grpc.ClientConn, invoker grpc.UnaryInvoker, opts ...grpc.CallOption) error {
		return ics[0](ctx, m, req, reply, cc, invokerFrom(ics, 0, invoker), opts...)
	}
}

func invokerFrom(ics []grpc.UnaryClientInterceptor, cur int, last grpc.UnaryInvoker) grpc.UnaryInvoker {
	if cur == len(ics)-1 {
		return last
	}
	return func(ctx context.Context, m string, req, reply any, cc *grpc.ClientConn, opts ...grpc.CallOption) error {
		return ics[cur+1](ctx, m, req, reply, cc, invokerFrom(ics, cur+1, last), opts...)
	}
}

// streamCases are what BenchmarkStream runs and TestAllocations counts.
func streamCases(t testing.TB) []struct {
	name   string
	stream grpc.StreamClientInterceptor
	allocs float64
} {
	return []struct {
		name   string
		stream grpc.StreamClientInterceptor
		allocs float64
	}{
		{"stack_empty", calltest.Stack(t).StreamClientInterceptor(), 3},
		{"stack_of_limit", calltest.Stack(t, newCount(10)).StreamClientInterceptor(), 3},
		{"stack_of_6_gates", calltest.Stack(t, gates(6)...).StreamClientInterceptor(), 3},
		{"stack_of_6_layers", calltest.Stack(t, six()...).StreamClientInterceptor(), 20},
	}
}

// eofStream has ended.
type eofStream struct{ grpc.ClientStream }

func (eofStream) RecvMsg(any) error { return io.EOF }

func openEOF(t testing.TB, stream grpc.StreamClientInterceptor) func() {
	// A connection that is not used, but there, as gRPC passes one.
	cc := new(grpc.ClientConn)
	desc := &grpc.StreamDesc{ServerStreams: true}
	opts := []grpc.CallOption{grpc.StaticMethod()}
	streamer := func(context.Context, *grpc.StreamDesc, *grpc.ClientConn, string, ...grpc.CallOption) (grpc.ClientStream, error) {
		return eofStream{}, nil
	}
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Minute)
	t.Cleanup(cancel)
	return func() {
		s, err := stream(ctx, desc, cc, calltest.Method, streamer, opts...)
		if err != nil {
			t.Fatal(err)
		}
		if err := s.RecvMsg(nil); err != io.EOF {
			t.Fatal(err)
		}
	}
}

func BenchmarkStream(b *testing.B) {
	for _, c := range streamCases(b) {
		b.Run(c.name, func(b *testing.B) {
			open := openEOF(b, c.stream)
			b.ReportAllocs()
			for b.Loop() {
				open()
			}
		})
	}
}

func TestNoGateAllocatesAndAStreamAtMostThreeTimes(t *testing.T) {
	if race.Enabled {
		t.Skip("the race detector makes pools forget")
	}
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Minute)
	defer cancel()
	opts := []grpc.CallOption{grpc.StaticMethod()}
	for _, c := range unaryCases(t) {
		if got := testing.AllocsPerRun(1000, func() { c.unary(ctx, calltest.Method, nil, nil, nil, calltest.Noop, opts...) }); got > c.allocs {
			t.Errorf("unary, %s: %v allocations a call, want at most %v", c.name, got, c.allocs)
		}
	}
	for _, c := range streamCases(t) {
		if got := testing.AllocsPerRun(1000, openEOF(t, c.stream)); got > c.allocs {
			t.Errorf("stream, %s: %v allocations a call, want at most %v", c.name, got, c.allocs)
		}
	}
}

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

	"golang.org/x/sync/semaphore"
	"google.golang.org/grpc"
	"google.golang.org/grpc/connectivity"
	"google.golang.org/grpc/metadata"

	"github.com/belfry-go/belfry/interceptor"
	"github.com/belfry-go/belfry/interceptor/adapt"
	"github.com/belfry-go/belfry/internal/test/calltest"
	"github.com/belfry-go/belfry/internal/test/race"
	"github.com/belfry-go/belfry/internal/testserver"
	testingv1 "github.com/belfry-go/belfry/proto/belfry/testing/v1"
)

// gateToy only passes calls on.
type gateToy struct {
	interceptor.GateOnly
	_ byte
}

func (l *gateToy) NewLayer() (interceptor.Layer, error) { return l, nil }

func (*gateToy) Traits() interceptor.Traits { return 0 }

func (*gateToy) WrapGate(inner interceptor.Gate) interceptor.Gate {
	return interceptor.GateFunc(func(ctx context.Context, a *interceptor.Admission, w interceptor.Wait) error {
		return inner.Admit(ctx, a, w)
	})
}

func gates(n int) (ls []interceptor.Spec) {
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

func (l *countToy) NewLayer() (interceptor.Layer, error) { return l, nil }

func (l *countToy) WrapGate(inner interceptor.Gate) interceptor.Gate {
	return interceptor.GateFunc(func(ctx context.Context, a *interceptor.Admission, w interceptor.Wait) error {
		if l.n.Add(1) > l.max.Load() {
			l.n.Add(-1)
			return l.full
		}
		a.Hold(l, 0)
		return inner.Admit(ctx, a, w)
	})
}

func (l *countToy) Release(int64, interceptor.End) { l.n.Add(-1) }

func six() []interceptor.Spec {
	return []interceptor.Spec{&shedToy{}, &timeoutToy{d: time.Hour}, &retryToy{n: 3}, newBuffer(100), newTokens(1 << 60), newCount(10)}
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
			unary := calltest.Chain(n)
			b.ReportAllocs()
			for b.Loop() {
				unary(ctx, calltest.Method, nil, nil, nil, calltest.Noop, opts...)
			}
		})
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

// readyConn is a READY connection.
func readyConn(t testing.TB, opts ...grpc.DialOption) *grpc.ClientConn {
	cc := testserver.Dial(t, testserver.New(t, testserver.InMemory()), opts...)
	awaitState(t, cc, connectivity.Ready)
	return cc
}

// awaitState connects cc and waits until it is in a state.
func awaitState(t testing.TB, cc *grpc.ClientConn, want connectivity.State) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Minute)
	defer cancel()
	cc.Connect()
	for s := cc.GetState(); s != want; s = cc.GetState() {
		if !cc.WaitForStateChange(ctx, s) {
			t.Fatalf("the connection is %v, want %v", s, want)
		}
	}
}

// eofStream has ended.
type eofStream struct{ grpc.ClientStream }

func (eofStream) RecvMsg(any) error            { return io.EOF }
func (eofStream) Header() (metadata.MD, error) { return eofHeader, nil }

var eofHeader = metadata.Pairs("content-type", "application/grpc")

func openEOF(t testing.TB, stream grpc.StreamClientInterceptor) func() {
	cc := readyConn(t)
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

func TestAllocations(t *testing.T) {
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

// BenchmarkReady measures what it costs to ask whether an endpoint is READY: the
// same stack in front of a connection that is, and of none.
func BenchmarkReady(b *testing.B) {
	ctx := context.Background()
	unary := calltest.Stack(b, newCount(10)).UnaryClientInterceptor()
	for name, cc := range map[string]*grpc.ClientConn{"no_connection": nil, "ready": readyConn(b)} {
		b.Run(name, func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				unary(ctx, calltest.Method, nil, nil, cc, calltest.Noop)
			}
		})
		b.Run(name+"_parallel", func(b *testing.B) {
			b.ReportAllocs()
			b.RunParallel(func(pb *testing.PB) {
				for pb.Next() {
					unary(ctx, calltest.Method, nil, nil, cc, calltest.Noop)
				}
			})
		})
	}
}

// BenchmarkFate measures what it costs on a real connection to learn what became of
// a call: without a stack, with one that nobody asks, with a gate that holds a
// ticket, and with one that also asks when the call was sent.
func BenchmarkFate(b *testing.B) {
	for _, bc := range []struct {
		name  string
		stack *interceptor.Stack
	}{
		{"no_stack", nil},
		{"nobody_asks", calltest.Stack(b, &gateToy{})},
		{"ticket", calltest.Stack(b, newCount(10))},
		{"ticket_and_time", calltest.Stack(b, &timedToy{})},
	} {
		var opts []grpc.DialOption
		if bc.stack != nil {
			opts = bc.stack.DialOptions()
		}
		cc := readyConn(b, opts...)
		for _, kind := range []interceptor.Kind{interceptor.Unary, interceptor.BidiStream} {
			b.Run(bc.name+"/"+kind.String(), func(b *testing.B) {
				req, reply := new(testingv1.UnaryRequest), new(testingv1.UnaryResponse)
				b.ReportAllocs()
				for b.Loop() {
					if err := exchange(b.Context(), cc, kind, req, reply, grpc.StaticMethod()); err != nil {
						b.Fatal(err)
					}
				}
			})
		}
	}
}

// timedToy asks for all there is to know.
type timedToy struct {
	interceptor.GateOnly
	took atomic.Int64
}

func (l *timedToy) NewLayer() (interceptor.Layer, error) { return l, nil }
func (*timedToy) Traits() interceptor.Traits             { return 0 }

func (l *timedToy) WrapGate(inner interceptor.Gate) interceptor.Gate {
	return interceptor.GateFunc(func(ctx context.Context, a *interceptor.Admission, w interceptor.Wait) error {
		a.Timed()
		a.Hold(l, 0)
		return inner.Admit(ctx, a, w)
	})
}

func (l *timedToy) Release(_ int64, e interceptor.End) { l.took.Store(int64(e.Took())) }

// BenchmarkAdapted measures layers of third-party limiters that admit at once.
func BenchmarkAdapted(b *testing.B) {
	cc := readyConn(b)
	for name, spec := range map[string]interceptor.Spec{
		"semaphore": adapt.FromSemaphore("semaphore", semaphore.NewWeighted(10)),
		"limiter":   adapt.FromLimiter("limiter", limiterFunc(func(context.Context) error { return nil })),
		"permit": adapt.FromPermit("permit", interceptor.ReasonConcurrency, func(context.Context, bool) (adapt.Permit, error) {
			return ignorePermit{}, nil
		}),
		"allow": adapt.FromAllow("allow", interceptor.ReasonBreakerOpen, func(context.Context) (func(interceptor.Outcome, error), error) {
			return nil, nil
		}),
	} {
		unary := calltest.Stack(b, spec).UnaryClientInterceptor()
		b.Run(name, func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				if err := unary(b.Context(), calltest.Method, nil, nil, cc, calltest.Noop); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

type limiterFunc func(ctx context.Context) error

func (f limiterFunc) Limit(ctx context.Context) error { return f(ctx) }

type ignorePermit struct{}

func (ignorePermit) Success() {}
func (ignorePermit) Drop()    {}
func (ignorePermit) Ignore()  {}

// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package acceptance

import (
	"context"
	"io"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/metadata"

	"github.com/belfry-go/belfry"
	"github.com/belfry-go/belfry/interceptor"
	"github.com/belfry-go/belfry/interceptor/buffer"
	"github.com/belfry-go/belfry/interceptor/concurrency"
	"github.com/belfry-go/belfry/interceptor/loadshed"
	"github.com/belfry-go/belfry/interceptor/ratelimit"
	"github.com/belfry-go/belfry/interceptor/retry"
	"github.com/belfry-go/belfry/interceptor/timeout"
	"github.com/belfry-go/belfry/internal/test/calltest"
	"github.com/belfry-go/belfry/internal/test/race"
	"github.com/belfry-go/belfry/internal/testserver"
)

// six are the layers whose cost is promised: none refuses, and the timeout does not
// tighten the deadline of the calls, which end in half an hour.
func six(testing.TB) []interceptor.Spec {
	return []interceptor.Spec{
		loadshed.Config{},
		timeout.Config{Timeout: time.Hour},
		retry.Config{AllMethods: true},
		buffer.Config{Size: 100},
		ratelimit.Config{Limit: 1e9, Burst: 1e9},
		concurrency.Config{Limit: 1000},
	}
}

// gate is the one layer of a stream through a gate.
func gate(testing.TB) []interceptor.Spec {
	return []interceptor.Spec{concurrency.Config{Limit: 1000}}
}

// refusing is six with a rate that is used up.
func refusing(t testing.TB) []interceptor.Spec {
	layers := six(t)
	layers[4] = ratelimit.Config{Limit: 1, Per: 24 * time.Hour}
	return layers
}

const sixAsData = `{"methodConfig": [{"name": [{"service": "s.S"}], "layers": [
	{"loadShed": {}}, {"timeout": {"call": "3600s"}}, {"retry": {"allMethods": true}}, {"buffer": {"size": 100}},
	{"rateLimit": {"limit": 1000000000, "burst": 1000000000}}, {"concurrency": {"limit": 1000}}]}]}`

const benchMethod = "/s.S/M"

// unaryCases are what BenchmarkUnary measures and a test counts the allocations of.
func unaryCases(t testing.TB) map[string]grpc.UnaryClientInterceptor {
	return map[string]grpc.UnaryClientInterceptor{
		"shed_timeout_retry_buffer_rate_limit":           calltest.Stack(t, six(t)...).UnaryClientInterceptor(),
		"shed_timeout_retry_buffer_rate_limit_from_data": newStackOf(t, sixAsData).UnaryClientInterceptor(),
		"shed_timeout_retry_buffer_rate_limit_refusing":  calltest.Stack(t, refusing(t)...).UnaryClientInterceptor(),
	}
}

func BenchmarkUnary(b *testing.B) {
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Minute)
	defer cancel()
	opts := []grpc.CallOption{grpc.StaticMethod()} // As generated code passes.
	run := func(name string, unary grpc.UnaryClientInterceptor) {
		b.Run(name, func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				unary(ctx, benchMethod, nil, nil, nil, calltest.Noop, opts...)
			}
		})
	}
	// The baseline: gRPC's own way to chain six interceptors that only pass on.
	run("baseline_grpc_chain_of_6", calltest.Chain(6))
	for name, unary := range unaryCases(b) {
		run(name, unary)
	}
	b.Run("shed_timeout_retry_buffer_rate_limit_parallel", func(b *testing.B) {
		unary := calltest.Stack(b, six(b)...).UnaryClientInterceptor()
		b.ReportAllocs()
		b.RunParallel(func(pb *testing.PB) {
			for pb.Next() {
				unary(ctx, benchMethod, nil, nil, nil, calltest.Noop, opts...)
			}
		})
	})
	b.Run("shed_timeout_retry_buffer_rate_limit_on_a_connection", func(b *testing.B) {
		// A connection has a picker, which a retry tells where the call has been.
		conn := calltest.Stack(b, six(b)...).Wrap(nothing{})
		b.ReportAllocs()
		for b.Loop() {
			conn.Invoke(ctx, benchMethod, nil, nil, opts...)
		}
	})
}

// nothing is a connection whose calls are over at once.
type nothing struct{ grpc.ClientConnInterface }

func (nothing) Invoke(context.Context, string, any, any, ...grpc.CallOption) error { return nil }

// over is a stream that has ended.
type over struct{ grpc.ClientStream }

func (over) RecvMsg(any) error            { return io.EOF }
func (over) Header() (metadata.MD, error) { return overHeader, nil }

var overHeader = metadata.Pairs("content-type", "application/grpc")

// openAndEnd returns a function that runs a stream through a stack.
func openAndEnd(t testing.TB, layers []interceptor.Spec) func() {
	stream := calltest.Stack(t, layers...).StreamClientInterceptor()
	cc := testserver.Dial(t, testserver.New(t)) // Not used, but asked whether it is ready.
	if err := belfry.WaitReady(testContext(t), cc); err != nil {
		t.Fatal(err)
	}
	desc := &grpc.StreamDesc{ServerStreams: true}
	opts := []grpc.CallOption{grpc.StaticMethod()}
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Minute)
	t.Cleanup(cancel)
	return func() {
		s, err := stream(ctx, desc, cc, benchMethod, func(context.Context, *grpc.StreamDesc, *grpc.ClientConn, string, ...grpc.CallOption) (grpc.ClientStream, error) {
			return over{}, nil
		}, opts...)
		if err != nil {
			t.Fatal(err)
		}
		if err := s.RecvMsg(nil); err != io.EOF {
			t.Fatal(err)
		}
	}
}

func BenchmarkStream(b *testing.B) {
	for name, layers := range map[string]func(testing.TB) []interceptor.Spec{"limit": gate, "shed_timeout_retry_buffer_rate_limit": six} {
		b.Run(name, func(b *testing.B) {
			run := openAndEnd(b, layers(b))
			b.ReportAllocs()
			for b.Loop() {
				run()
			}
		})
	}
}

func TestCostOfSixLayers(t *testing.T) {
	if race.Enabled {
		t.Skip("the race detector makes pools forget")
	}
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Minute)
	defer cancel()
	opts := []grpc.CallOption{grpc.StaticMethod()}
	for name, unary := range unaryCases(t) {
		if got := testing.AllocsPerRun(1000, func() { unary(ctx, benchMethod, nil, nil, nil, calltest.Noop, opts...) }); got != 0 {
			t.Errorf("%s: %v allocations a call, want 0", name, got)
		}
	}
	if got := testing.AllocsPerRun(1000, openAndEnd(t, gate(t))); got > 3 {
		t.Errorf("a stream through a gate: %v allocations, want at most 3", got)
	}
	if got := testing.AllocsPerRun(1000, openAndEnd(t, six(t))); got > 8 {
		t.Errorf("a stream through the six layers: %v allocations, want at most 8", got)
	}
}

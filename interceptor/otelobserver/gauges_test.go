// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package otelobserver_test

import (
	"context"
	"fmt"
	"maps"
	"runtime"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	sdk "go.opentelemetry.io/otel/sdk/metric"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/belfry-go/belfry/interceptor"
	"github.com/belfry-go/belfry/interceptor/concurrency"
	"github.com/belfry-go/belfry/interceptor/otelobserver"
	"github.com/belfry-go/belfry/limit"
)

// limits returns the points of belfry.limit and what is below it.
func limits(t *testing.T, r sdk.Reader) map[string]float64 {
	all := points(t, r)
	maps.DeleteFunc(all, func(name string, _ float64) bool { return !strings.HasPrefix(name, "belfry.limit") })
	return all
}

func newObserver(t *testing.T) (*otelobserver.Observer, sdk.Reader) {
	t.Helper()
	reader := sdk.NewManualReader()
	obs, err := otelobserver.New(sdk.NewMeterProvider(sdk.WithReader(reader)))
	if err != nil {
		t.Fatal(err)
	}
	return obs, reader
}

func newStack(t *testing.T, specs ...interceptor.Spec) *interceptor.Stack {
	t.Helper()
	s, err := interceptor.NewStack(specs...)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func TestLimits(t *testing.T) {
	invoke := func(s *interceptor.Stack, method string, takes time.Duration, err error) error {
		return s.UnaryClientInterceptor()(context.Background(), method, nil, nil, nil,
			func(context.Context, string, any, any, *grpc.ClientConn, ...grpc.CallOption) error {
				time.Sleep(takes)
				return err
			}, grpc.StaticMethod())
	}
	want := func(t *testing.T, what string, got, want map[string]float64) {
		t.Helper()
		if !maps.Equal(got, want) {
			t.Errorf("%s: points %v, want %v", what, got, want)
		}
	}
	t.Run("of_a_layer_in_two_stacks", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			obs, reader := newObserver(t)
			l, err := concurrency.New(concurrency.Config{Limit: 2})
			if err != nil {
				t.Fatal(err)
			}
			stack := newStack(t, interceptor.Observe(obs), l)
			other := newStack(t, interceptor.Observe(obs), l)
			done := make(chan error, 3)
			for range 3 {
				go func() { done <- invoke(stack, "/s/m", time.Second, nil) }()
			}
			synctest.Wait()
			want(t, "while two calls run and one waits", limits(t, reader), map[string]float64{
				"belfry.limit{belfry.layer=concurrency,belfry.stack=stack}":         2,
				"belfry.limit.in_use{belfry.layer=concurrency,belfry.stack=stack}":  2,
				"belfry.limit.waiting{belfry.layer=concurrency,belfry.stack=stack}": 1,
			})
			for range 3 {
				if err := <-done; err != nil {
					t.Error(err)
				}
			}
			want(t, "after they have ended", limits(t, reader), map[string]float64{
				"belfry.limit{belfry.layer=concurrency,belfry.stack=stack}":         2,
				"belfry.limit.in_use{belfry.layer=concurrency,belfry.stack=stack}":  0,
				"belfry.limit.waiting{belfry.layer=concurrency,belfry.stack=stack}": 0,
			})
			runtime.KeepAlive(stack)
			runtime.KeepAlive(other)
		})
	})
	t.Run("of_layers_with_one_name", func(t *testing.T) {
		obs, reader := newObserver(t)
		stack := newStack(t, interceptor.Observe(obs), concurrency.Config{Limit: 5})
		other := newStack(t, interceptor.Observe(obs), concurrency.Config{Limit: 50})
		if got := limits(t, reader)["belfry.limit{belfry.layer=concurrency,belfry.stack=stack}"]; got != 55 {
			t.Errorf("limit %v, want the sum of 5 and 50", got)
		}
		runtime.KeepAlive(stack)
		runtime.KeepAlive(other)
	})
	t.Run("of_methods_and_what_the_algorithm_thinks", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			obs, reader := newObserver(t)
			stack := newStack(t, interceptor.Observe(obs), concurrency.Config{
				AIMD: &limit.AIMDConfig{}, KeyBy: interceptor.KeyBy{Method: true},
			})
			invoke(stack, "/s/a", 250*time.Millisecond, status.Error(codes.Unavailable, "overloaded"))
			invoke(stack, "/s/b", time.Second, nil)
			got := limits(t, reader)
			for name, want := range map[string]float64{
				"belfry.limit{belfry.layer=concurrency,belfry.stack=stack,grpc.method=s/a}":                               18,
				"belfry.limit{belfry.layer=concurrency,belfry.stack=stack,grpc.method=s/b}":                               20,
				"belfry.limit.last_sample{belfry.layer=concurrency,belfry.stack=stack,grpc.method=s/a}":                   0.25,
				"belfry.limit.last_sample{belfry.layer=concurrency,belfry.stack=stack,grpc.method=s/b}":                   1,
				"belfry.limit.lowered{belfry.layer=concurrency,belfry.reason=drop,belfry.stack=stack,grpc.method=s/a}":    1,
				"belfry.limit.lowered{belfry.layer=concurrency,belfry.reason=latency,belfry.stack=stack,grpc.method=s/a}": 0,
			} {
				if got[name] != want {
					t.Errorf("%s = %v, want %v", name, got[name], want)
				}
			}
			runtime.KeepAlive(stack)
		})
	})
	t.Run("of_a_stack_that_is_gone", func(t *testing.T) {
		obs, reader := newObserver(t)
		func() { runtime.KeepAlive(newStack(t, interceptor.Observe(obs), concurrency.Config{Limit: 5})) }()
		for range 10 { // What a pool keeps for reuse takes two cycles.
			runtime.GC()
		}
		want(t, "after the stack", limits(t, reader), map[string]float64{})
	})
	t.Run("of_too_many_keys", func(t *testing.T) {
		obs, reader := newObserver(t)
		stack := newStack(t, interceptor.Observe(obs), concurrency.Config{
			AIMD: &limit.AIMDConfig{}, MaxKeys: 10_000, KeyBy: interceptor.KeyBy{Method: true},
		})
		const more = 7
		for i := range otelobserver.MaxMethods + more {
			invoke(stack, fmt.Sprintf("/s/m%d", i), 0, nil)
		}
		got := limits(t, reader)
		// Each call is a sample, so there are four points for each.
		if n := len(got); n != 4*(otelobserver.MaxMethods+1) {
			t.Errorf("%d points, want four for each of %d methods and for the others", n, otelobserver.MaxMethods)
		}
		if n := got["belfry.limit{belfry.layer=concurrency,belfry.stack=stack,grpc.method=other}"]; n != 20*more {
			t.Errorf("limit %v of the other methods, want the sum of %d limits of 20", n, more)
		}
		runtime.KeepAlive(stack)
	})
}

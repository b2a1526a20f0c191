// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package concurrency_test

import (
	"context"
	"slices"
	"testing"
	"time"

	"google.golang.org/grpc"

	"github.com/belfry-go/belfry/interceptor"
	"github.com/belfry-go/belfry/interceptor/concurrency"
	"github.com/belfry-go/belfry/internal/test/calltest"
	"github.com/belfry-go/belfry/limit"
)

// admitAndRefuse are the rows of the benchmarks: a call, how to make it, and
// whether it is refused.
func admitAndRefuse(tb testing.TB) map[string]func() error {
	unary := func(layers ...interceptor.Spec) func() error {
		ic := calltest.Stack(tb, layers...).UnaryClientInterceptor()
		none := []grpc.CallOption{interceptor.WithWait(interceptor.None)}
		ctx, cancel := context.WithCancel(context.Background())
		tb.Cleanup(cancel)
		return func() error { return ic(ctx, calltest.Method, nil, nil, nil, calltest.Noop, none...) }
	}
	full := fixed(tb, 1)
	if err := full.SetLimit(0); err != nil {
		tb.Fatal(err)
	}
	return map[string]func() error{
		"empty_stack":      unary(),
		"fixed":            unary(fixed(tb, 1024)),
		"weighted":         unary(newLayer(tb, concurrency.Config{Limit: 1024}, concurrency.WithCost(func(context.Context, *interceptor.Admission) int64 { return 3 }))),
		"auto":             unary(newLayer(tb, concurrency.Config{})),
		"aimd":             unary(newLayer(tb, concurrency.Config{AIMD: &limit.AIMDConfig{}})),
		"gradient2":        unary(newLayer(tb, concurrency.Config{Gradient2: &limit.Gradient2Config{}})),
		"vegas":            unary(newLayer(tb, concurrency.Config{Vegas: &limit.VegasConfig{}})),
		"fixed_refusing":   unary(full),
		"fixed_with_queue": unary(newLayer(tb, concurrency.Config{Limit: 1024, MaxWaiters: 10, Discipline: concurrency.CoDel})),
	}
}

func TestAllocations(t *testing.T) {
	for name, call := range admitAndRefuse(t) {
		if n := testing.AllocsPerRun(1000, func() { call() }); n >= 1 {
			t.Errorf("%s: %v allocations per call, want 0", name, n)
		}
	}
}

func BenchmarkAdmit(b *testing.B) {
	for name, call := range admitAndRefuse(b) {
		b.Run(name, func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				call()
			}
		})
		b.Run(name+"/parallel", func(b *testing.B) {
			b.ReportAllocs()
			b.RunParallel(func(pb *testing.PB) {
				for pb.Next() {
					call()
				}
			})
		})
	}
}

// BenchmarkAutoBesideFixed says how many times as long a call takes under the default
// algorithm as under a fixed limit: the median of short runs that alternate, so that what
// else the machine does falls on both.
func BenchmarkAutoBesideFixed(b *testing.B) {
	calls := admitAndRefuse(b)
	fixed, auto := calls["fixed"], calls["auto"]
	took := func(call func() error) float64 {
		const n = 2000
		start := time.Now()
		for range n {
			call()
		}
		return float64(time.Since(start).Nanoseconds()) / n
	}
	var fixeds, autos, ratios []float64
	for b.Loop() {
		f, a := took(fixed), took(auto)
		fixeds, autos, ratios = append(fixeds, f), append(autos, a), append(ratios, a/f)
	}
	median := func(v []float64) float64 { slices.Sort(v); return v[len(v)/2] }
	b.ReportMetric(0, "ns/op") // The time of an iteration says nothing.
	b.ReportMetric(median(fixeds), "fixed-ns")
	b.ReportMetric(median(autos), "auto-ns")
	b.ReportMetric(median(ratios), "x")
}

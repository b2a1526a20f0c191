// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"flag"
	"math"
	"runtime"
	"testing"
	"time"
)

// A plan says how much is measured.
type plan struct {
	quick   bool
	repeats int // odd, of all but what has a number of its own
	seed    uint64

	benchTime time.Duration // of a pick, a build or an interceptor, in each repeat
	sizes     []int         // numbers of endpoints
	buildMost time.Duration // a policy that would take longer for a size is left out

	callsTime time.Duration // of whole calls, in each repeat
	inFlight  int

	scenarios      []scenario
	clusterRepeats int // odd
	warmUp         time.Duration
	measured       time.Duration // after the warm-up, in each repeat
	rate           float64       // share of the load of a scenario that is made
}

// full takes half an hour.
func full() plan {
	return plan{
		repeats: 5, seed: 1,
		benchTime: 100 * time.Millisecond, sizes: []int{10, 100, 1000, 10_000}, buildMost: 10 * time.Second,
		callsTime: 2 * time.Second, inFlight: 64,
		scenarios: scenarios(), clusterRepeats: 3, warmUp: 2 * time.Second, measured: 3500 * time.Millisecond, rate: 1,
	}
}

// quick takes two minutes.
func quick() plan {
	return plan{
		quick: true, repeats: 3, seed: 1,
		benchTime: 10 * time.Millisecond, sizes: []int{10, 100, 1000}, buildMost: 10 * time.Second,
		callsTime: 300 * time.Millisecond, inFlight: 64,
		scenarios: scenarios(), clusterRepeats: 1, warmUp: 400 * time.Millisecond, measured: 600 * time.Millisecond, rate: 1,
	}
}

// A cost is what one operation takes.
type cost struct{ ns, allocs, bytes float64 }

// initBenchmarks makes testing.Benchmark take time t, or n operations if t is 0.
func (p plan) initBenchmarks() error {
	testing.Init()
	value := p.benchTime.String()
	if p.benchTime == 0 {
		value = "3x"
	}
	return flag.Set("test.benchtime", value)
}

// measure returns what f costs, called again and again.
func measure(f func()) cost {
	return costOf(testing.Benchmark(func(b *testing.B) {
		for b.Loop() {
			f()
		}
	}))
}

// measureOnce returns what f costs, called once.
func measureOnce(f func()) cost {
	var before, after runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&before)
	began := time.Now()
	f()
	elapsed := time.Since(began)
	runtime.ReadMemStats(&after)
	return cost{float64(elapsed.Nanoseconds()), float64(after.Mallocs - before.Mallocs), float64(after.TotalAlloc - before.TotalAlloc)}
}

// measureParallel returns what f costs, called by as many goroutines as there are processors.
// With two of them half of the time of one means that they do not get in each other's way.
func measureParallel(f func()) cost {
	return costOf(testing.Benchmark(func(b *testing.B) {
		b.RunParallel(func(pb *testing.PB) {
			for pb.Next() {
				f()
			}
		})
	}))
}

// costOf leaves out what the runtime and other goroutines allocate now and then: less than
// one in two hundred operations.
func costOf(r testing.BenchmarkResult) cost {
	n := float64(max(r.N, 1))
	return cost{float64(r.T.Nanoseconds()) / n, math.Round(100*float64(r.MemAllocs)/n) / 100, math.Round(float64(r.MemBytes) / n)}
}

// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package loadgen

import (
	"context"
	"errors"
	"math"
	"slices"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/belfry-go/belfry/internal/test/leaktest"
)

func TestMain(m *testing.M) { leaktest.Main(m) }

func TestClosed(t *testing.T) {
	t.Run("keeps so many calls in flight", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			var inFlight, most, done atomic.Int64
			r := Closed(t.Context(), 3, 30, &done, func() error {
				most.Store(max(most.Load(), inFlight.Add(1)))
				time.Sleep(time.Second)
				inFlight.Add(-1)
				return nil
			})
			if most.Load() != 3 || done.Load() != 30 || len(r.Latencies) != 30 || r.Elapsed != 10*time.Second {
				t.Errorf("got %d in flight at most, %d done, %d latencies in %v; want 3, 30, 30 in 10s",
					most.Load(), done.Load(), len(r.Latencies), r.Elapsed)
			}
		})
	})
	t.Run("counts failures apart", func(t *testing.T) {
		var n atomic.Int64
		failure := errors.New("failure")
		r := Closed(t.Context(), 2, 10, nil, func() error {
			if n.Add(1)%2 == 0 {
				return failure
			}
			return nil
		})
		if len(r.Latencies) != 5 || r.Errors != 5 || r.Example != failure {
			t.Errorf("got %d answered and %d failed, such as %v; want 5 and 5, such as %v", len(r.Latencies), r.Errors, r.Example, failure)
		}
	})
	t.Run("ends with its context", func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		var n atomic.Int64
		r := Closed(ctx, 2, 1000, nil, func() error {
			if n.Add(1) == 10 {
				cancel()
			}
			return ctx.Err()
		})
		if r.Errors != 0 || len(r.Latencies) >= 10 {
			t.Errorf("got %d answered and %d failed, want fewer than 10 and none", len(r.Latencies), r.Errors)
		}
	})
}

func TestOpen(t *testing.T) {
	t.Run("counts from the time at which the call should have been made", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			began := time.Now()
			var times []time.Duration
			for i := range 10 {
				times = append(times, time.Duration(i)*time.Second)
			}
			r := Open(times, 0, func(i int) error {
				if at := time.Since(began); at != times[i] {
					t.Errorf("call %d was made at %v, want %v", i, at, times[i])
				}
				time.Sleep(time.Minute)
				return nil
			})
			if want := slices.Repeat([]time.Duration{time.Minute}, 10); !slices.Equal(r.Latencies, want) {
				t.Errorf("latencies: got %v, want ten of a minute", r.Latencies)
			}
		})
	})
	t.Run("does not count the warm-up", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			var made atomic.Int64
			r := Open([]time.Duration{0, 1, 2, 3, 4}, 3, func(i int) error {
				made.Add(1)
				if i < 4 {
					return nil
				}
				return errors.New("failure")
			})
			if made.Load() != 5 || len(r.Latencies) != 1 || r.Errors != 1 {
				t.Errorf("got %d made, %d answered, %d failed; want 5, 1, 1", made.Load(), len(r.Latencies), r.Errors)
			}
		})
	})
}

func TestPoisson(t *testing.T) {
	const seed, rate, end = 1, 1000, 100 * time.Second // determined by the seed
	times := Poisson(rate, end, seed)
	if n := float64(len(times)); math.Abs(n-100_000) > 4*math.Sqrt(100_000) {
		t.Errorf("%v calls, want about 100000", n)
	}
	if !slices.IsSorted(times) || times[len(times)-1] >= end {
		t.Errorf("the times are not ascending, or end after %v", end)
	}
	if !slices.Equal(times, Poisson(rate, end, seed)) || slices.Equal(times, Poisson(rate, end, seed+1)) {
		t.Error("the times are not determined by the seed")
	}
}

func TestPercentile(t *testing.T) {
	var hundred []time.Duration
	for i := range 100 {
		hundred = append(hundred, time.Duration(i+1))
	}
	for _, c := range []struct {
		latencies []time.Duration
		q         float64
		want      time.Duration
	}{
		{nil, 0.5, 0},
		{hundred[:1], 0.999, 1},
		{hundred[:3], 0.5, 2},
		{hundred, 0, 1},
		{hundred, 0.5, 50},
		{hundred, 0.99, 99},
		{hundred, 0.999, 100},
		{hundred, 1, 100},
	} {
		if got := Percentile(c.latencies, c.q); got != c.want {
			t.Errorf("Percentile of %d latencies, %v: got %v, want %v", len(c.latencies), c.q, got, c.want)
		}
	}
}

func TestMedian(t *testing.T) {
	for want, values := range map[float64][]float64{0: nil, 3: {3}, 2: {3, 1, 2}, 2.5: {4, 1, 2, 3}} {
		if got := Median(values); got != want {
			t.Errorf("Median(%v): got %v, want %v", values, got, want)
		}
	}
}

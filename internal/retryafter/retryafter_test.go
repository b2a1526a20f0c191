// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package retryafter

import (
	"math"
	"math/rand/v2"
	"sync"
	"testing"
	"time"
)

const (
	us = time.Microsecond
	ms = time.Millisecond
)

func TestRoundUp(t *testing.T) {
	for _, tt := range []struct{ left, want time.Duration }{
		{math.MinInt64, 100 * us}, {0, 100 * us}, {1, 100 * us}, {100 * us, 100 * us},
		{100*us + 1, 110 * us}, {110 * us, 110 * us}, {200 * us, 200 * us}, {200*us + 1, 225 * us},
		{500 * us, 500 * us}, {500*us + 1, 550 * us}, {950*us + 1, ms}, {ms, ms}, {ms + 1, 1100 * us},
		{5 * time.Second, 5 * time.Second}, {10 * time.Second, 10 * time.Second}, {30 * time.Second, 30 * time.Second},
		{time.Minute, time.Minute}, {2 * time.Minute, 120 * time.Second}, {time.Hour, 3750 * time.Second},
		{longest - 1, longest}, {longest, longest}, {math.MaxInt64, longest},
	} {
		if got := RoundUp(tt.left); got != tt.want {
			t.Errorf("RoundUp(%v) = %v, want %v", tt.left, got, tt.want)
		}
	}
	t.Run("random", func(t *testing.T) {
		seed := rand.Uint64()
		t.Logf("seed %d", seed)
		rng := rand.New(rand.NewPCG(seed, 0))
		for range 100_000 {
			left := min(max(time.Duration(rng.Uint64()>>1)>>rng.IntN(60), 1), longest)
			d, i := round(left)
			if d < left || d-left > max(left/8, unit) {
				t.Fatalf("RoundUp(%v) = %v, want at most an eighth more", left, d)
			}
			if again, j := round(d); again != d || j != i {
				t.Fatalf("RoundUp(%v) = %v, number %d, want itself and %d", d, again, j, i)
			}
			if d < longest {
				if next, j := round(d + 1); next <= d || j != i+1 {
					t.Fatalf("the time after %v, number %d, is %v, number %d, want it longer and the next number", d, i, next, j)
				}
			}
		}
	})
}

func TestCache(t *testing.T) {
	built := 0
	newCache := func(size int) *Cache[time.Duration] {
		built = 0
		return New(size, func(d time.Duration) *time.Duration { built++; return &d })
	}
	t.Run("one value for times that round to the same", func(t *testing.T) {
		c := newCache(4)
		a, b := c.Get(101*ms), c.Get(110*ms)
		if a != b || built != 1 || *a != 110*ms {
			t.Errorf("101ms and 110ms got %v and %v from %d builds, want one value, 110ms", *a, *b, built)
		}
		if d := c.Get(111 * ms); *d != 120*ms {
			t.Errorf("111ms got %v, want 120ms", *d)
		}
		if c.Get(105*ms) != a || built != 2 {
			t.Error("the value of 110ms was made again, want it kept")
		}
	})
	t.Run("holds no more than its size", func(t *testing.T) {
		c := newCache(1)
		for i := range 10 {
			left := time.Duration(i%2+1) * 100 * ms
			if got := *c.Get(left); got != left {
				t.Errorf("Get(%v) = %v, want the same", left, got)
			}
		}
		if built != 10 {
			t.Errorf("%d builds of 10 calls, want 10: there is room for one value", built)
		}
	})
	t.Run("a few slots are enough for a time that passes", func(t *testing.T) {
		c := newCache(2)
		for left := 5 * time.Second; left > 0; left -= ms {
			for jitter := range time.Duration(3) {
				c.Get(left + jitter*ms)
			}
		}
		if built > 160 { // 5 s down to 100 µs are 4.7 decades.
			t.Errorf("%d builds of 15,000 calls, want at most 160", built)
		}
	})
	t.Run("two decades of slots are enough for random times", func(t *testing.T) {
		seed := rand.Uint64()
		t.Logf("seed %d", seed)
		rng := rand.New(rand.NewPCG(seed, 0))
		c := newCache(2 * PerDecade)
		for range 100_000 {
			c.Get(time.Duration(rng.Int64N(int64(time.Second))))
		}
		if built > 2500 { // Some 2000, with a standard deviation of 45.
			t.Errorf("%d builds of 100,000 calls, want at most 2500", built)
		}
	})
	t.Run("concurrent", func(t *testing.T) {
		c := New(3, func(d time.Duration) *time.Duration { return &d })
		var wg sync.WaitGroup
		for range 4 {
			wg.Go(func() {
				for i := range 5000 {
					left := time.Duration(i%50) * ms
					if got := *c.Get(left); got != RoundUp(left) {
						t.Errorf("Get(%v) = %v, want %v", left, got, RoundUp(left))
					}
				}
			})
		}
		wg.Wait()
	})
}

func TestAllocations(t *testing.T) {
	c := New(PerDecade, func(d time.Duration) *time.Duration { return &d })
	get := func() {
		for left := 105 * ms; left < time.Second; left += 10 * ms {
			c.Get(left)
		}
	}
	get()
	if got := testing.AllocsPerRun(100, get); got != 0 {
		t.Errorf("%v allocations for values that are there, want 0", got)
	}
}

func BenchmarkGet(b *testing.B) {
	for _, left := range []time.Duration{us, 101 * ms, time.Hour} {
		b.Run(left.String(), func(b *testing.B) {
			c := New(2*PerDecade, func(d time.Duration) *time.Duration { return &d })
			b.ReportAllocs()
			for b.Loop() {
				c.Get(left)
			}
		})
	}
}

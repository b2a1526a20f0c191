// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package quantile

import (
	"math/rand/v2"
	"runtime"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/belfry-go/belfry/internal/test/leaktest"
)

func TestMain(m *testing.M) { leaktest.Main(m) }

func check(t *testing.T, w *Window, q float64, want time.Duration, wantN int) {
	t.Helper()
	d, n := w.Quantile(q)
	if d < want || float64(d) > 1.01*float64(want) || n != wantN {
		t.Errorf("Quantile(%v) = %v, %d, want %v (to 1 %%), %d", q, d, n, want, wantN)
	}
}

func TestAnEmptyWindowHasNoQuantile(t *testing.T) {
	check(t, New(time.Second), 0.5, 0, 0)
}

// Quantiles are those of the data to one percent.
func TestQuantilesOfData(t *testing.T) {
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	rng := rand.New(rand.NewPCG(seed, 0))
	w := New(time.Hour)
	var all []time.Duration
	for range 5000 {
		d := time.Duration(rng.ExpFloat64() * 1e9).Round(time.Microsecond)
		all = append(all, d)
		w.Record(d)
	}
	slices.Sort(all)
	w.SetWindow(time.Hour) // Forgets the cached answers.
	for _, q := range []float64{0.01, 0.1, 0.5, 0.9, 0.99, 0.999, 1} {
		check(t, w, q, all[max(int(q*5000+0.5)-1, 0)], 5000)
	}
}

// The ninth of ten is the ninetieth percentile.
func TestQuantileNearestRank(t *testing.T) {
	w := New(time.Minute)
	for range 8 {
		w.Record(time.Millisecond)
	}
	w.Record(10 * time.Millisecond)
	w.Record(10 * time.Millisecond)
	check(t, w, 0.8, time.Millisecond, 10)
	check(t, w, 0.9, 10*time.Millisecond, 10)
}

// Latencies out of range count as the nearest.
func TestQuantileOutOfRange(t *testing.T) {
	w := New(time.Minute)
	w.Record(-time.Second)
	check(t, w, 1, 0, 1)
	w.Record(time.Nanosecond)
	check(t, w, 1, time.Microsecond, 2)
	w.Record(1000 * time.Hour)
	check(t, w, 1, time.Hour, 3)
}

// Window forgets older latencies.
func TestQuantileForgets(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := New(10 * time.Second)
		for range 10 { // One a second.
			w.Record(time.Second)
			time.Sleep(time.Second)
		}
		check(t, w, 0.5, time.Second, 5) // At 10 s: those of seconds 5 to 9.
		w.Record(2 * time.Second)
		check(t, w, 1, 2*time.Second, 6)
		time.Sleep(5*time.Second - 1)
		check(t, w, 1, 2*time.Second, 6)
		time.Sleep(time.Nanosecond)
		check(t, w, 1, 2*time.Second, 1)
		time.Sleep(5 * time.Second)
		check(t, w, 1, 0, 0)
	})
}

func TestAPauseEmptiesTheWindow(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := New(10 * time.Second)
		w.Record(time.Second)
		check(t, w, 1, time.Second, 1)
		time.Sleep(time.Hour)
		check(t, w, 1, 0, 0)
		w.Record(3 * time.Second)
		check(t, w, 1, 3*time.Second, 1)
	})
}

func TestAChangedWindowKeepsItsData(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := New(10 * time.Second)
		w.Record(time.Second)
		time.Sleep(4 * time.Second)
		w.SetWindow(100 * time.Second)
		time.Sleep(40 * time.Second)
		check(t, w, 1, time.Second, 1)
		w.SetWindow(time.Second)
		time.Sleep(time.Second)
		check(t, w, 1, 0, 0)
	})
}

// An answer is used again while little has changed.
func TestQuantileCachesAnswer(t *testing.T) {
	w := New(time.Hour)
	for range 320 {
		w.Record(time.Millisecond)
	}
	check(t, w, 1, time.Millisecond, 320)
	for i := range 10 {
		w.Record(time.Second)
		check(t, w, 1, time.Millisecond, 321+i)
	}
	w.Record(time.Second)
	check(t, w, 1, time.Second, 331)
	check(t, w, 0.5, time.Millisecond, 331) // Another quantile is another answer.
}

// What is made costs what is used: there may be a window for each of many methods.
func TestQuantileWindowSize(t *testing.T) {
	const windows = 100
	kept := make([]*Window, windows)
	size := func(fill func(w *Window)) int64 {
		var before, after runtime.MemStats
		runtime.ReadMemStats(&before)
		for i := range kept {
			kept[i] = New(time.Minute)
			fill(kept[i])
		}
		runtime.ReadMemStats(&after)
		return int64(after.TotalAlloc-before.TotalAlloc) / windows
	}
	if got := size(func(*Window) {}); got > 1000 {
		t.Errorf("an empty window takes %d bytes, want at most 1,000", got)
	}
	if got := size(func(w *Window) {
		for i := range 1000 {
			w.Record(time.Duration(2+i/125) * time.Millisecond)
		}
	}); got > 4000 {
		t.Errorf("a window of latencies from 2 to 9 ms takes %d bytes, want at most 4,000", got)
	}
	runtime.KeepAlive(kept)
}

// Every latency is told to one percent.
func TestQuantileResolution(t *testing.T) {
	for v := uint64(0); v < uint64(time.Hour/time.Microsecond); v += 1 + v/300 {
		h := new(histogram)
		h.record(v)
		for length, o := range h.octaves {
			if o == nil {
				continue
			}
			for i, n := range o {
				if got := highestOf(length, i); n == 1 && (got < v || got > v+v/100) {
					t.Fatalf("%d µs are counted as %d", v, got)
				}
			}
		}
	}
}

// Concurrent records are all counted.
func TestQuantileConcurrentRecords(t *testing.T) {
	w := New(time.Hour)
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			for range 1000 {
				w.Record(time.Millisecond)
				w.Quantile(0.9)
			}
		})
	}
	wg.Wait()
	if _, n := w.Quantile(0.9); n != 8000 {
		t.Errorf("%d latencies in the window, want 8000", n)
	}
}

// New panics on a window that is not positive.
func TestQuantileBadWindow(t *testing.T) {
	defer func() {
		if recover() == nil {
			t.Error("New(0) did not panic")
		}
	}()
	New(0)
}

func BenchmarkRecord(b *testing.B) {
	w := New(time.Minute)
	b.ReportAllocs()
	b.RunParallel(func(pb *testing.PB) {
		for pb.Next() {
			w.Record(3 * time.Millisecond)
		}
	})
}

func BenchmarkQuantile(b *testing.B) {
	w := New(time.Minute)
	for i := range 1000 {
		w.Record(time.Duration(i) * time.Millisecond)
	}
	b.ReportAllocs()
	for b.Loop() {
		w.Quantile(0.99)
	}
}

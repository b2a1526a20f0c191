// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package rolling

import (
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

func sum(t *testing.T, w *Window, now int64, all, noted int64) {
	t.Helper()
	if a, n := w.Sum(now); a != all || n != noted {
		t.Errorf("Sum(%v) = %d, %d, want %d, %d", time.Duration(now), a, n, all, noted)
	}
}

// An event is seen for the span and then not any more.
func TestRollingSpan(t *testing.T) {
	w := New(20 * time.Second)
	start := int64(time.Hour)
	w.Add(start, true)
	w.Add(start, false)
	sum(t, w, start, 2, 1)
	sum(t, w, start+int64(19*time.Second), 2, 1)
	sum(t, w, start+int64(20*time.Second), 0, 0)
	w.Add(start+int64(20*time.Second), false) // In the same bucket, a turn later.
	sum(t, w, start+int64(20*time.Second), 1, 0)
	sum(t, w, start+int64(365*24*time.Hour), 0, 0)
}

// Sum agrees with a model over random times.
func TestRollingRandomTimes(t *testing.T) {
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	rng := rand.New(rand.NewPCG(seed, 0))
	w := New(2 * time.Second)
	width := w.width
	type event struct {
		slot  int64
		noted bool
	}
	var events []event
	now := int64(time.Hour)
	for range 20_000 {
		now += rng.Int64N(int64(30 * time.Millisecond))
		if rng.IntN(500) == 0 {
			now += rng.Int64N(int64(5 * time.Second))
		}
		noted := rng.IntN(3) == 0
		w.Add(now, noted)
		events = append(events, event{now / width, noted})
		for events[0].slot <= now/width-Buckets {
			events = events[1:]
		}
		var all, n int64
		for _, e := range events {
			all++
			if e.noted {
				n++
			}
		}
		if a, b := w.Sum(now); a != all || b != n {
			t.Fatalf("Sum(%v) = %d, %d, want %d, %d", time.Duration(now), a, b, all, n)
		}
	}
}

// An event that is a whole window late is dropped.
func TestRollingLateEvent(t *testing.T) {
	w := New(20 * time.Second)
	late := int64(time.Hour)
	now := late + int64(20*time.Second)
	w.Add(now, true)
	w.Add(late, true)
	sum(t, w, now, 1, 1)
}

// Turns are counted in 20 bits, so after half their scale an old bucket looks like
// one of the future.
func TestEventsCountAfterAnyPause(t *testing.T) {
	const span = int64(100 * time.Millisecond)
	for turns := int64(2); turns < 1<<turnBits-latest; turns += 999 {
		w := New(time.Duration(span))
		for i := range int64(Buckets) {
			w.Add(i*span/Buckets, true)
		}
		now := turns * span
		w.Add(now, true)
		sum(t, w, now, 1, 1)
	}
}

// A bucket that is full keeps its ratio.
func TestRollingFullBucketKeepsRatio(t *testing.T) {
	w := New(time.Minute)
	w.add(0, countMask-1, 7)
	w.Add(0, true)
	w.Add(0, true)
	w.Add(0, true)
	sum(t, w, 0, countMask, 8)
}

// Resized keeps what the new span reaches.
func TestRollingResized(t *testing.T) {
	w := New(20 * time.Second)
	start := int64(time.Hour)
	for i := range int64(20) {
		w.Add(start+i*int64(time.Second), i%2 == 0)
	}
	now := start + int64(19*time.Second)
	sum(t, w.Resized(now, time.Minute), now, 20, 10)
	sum(t, w.Resized(now, 20*time.Second), now, 20, 10)
	if all, _ := w.Resized(now, 10*time.Second).Sum(now); all < 10 || all > 11 {
		t.Errorf("%d events after the span was halved, want the 10 of the last ten seconds, or one more", all)
	}
}

// No event is lost by adding concurrently.
func TestRollingConcurrentAdds(t *testing.T) {
	w := New(time.Minute)
	var wg sync.WaitGroup
	for g := range 8 {
		wg.Go(func() {
			for i := range 5000 {
				w.Add(int64(time.Hour)+int64(i)*int64(time.Millisecond), g%2 == 0)
			}
		})
	}
	wg.Wait()
	sum(t, w, int64(time.Hour+5*time.Second), 40_000, 20_000)
}

// What Sum remembers of the past must not hide events that come late.
func TestSumSeesLateEvents(t *testing.T) {
	w := New(20 * time.Second)
	start := int64(time.Hour)
	w.Add(start, true)
	sum(t, w, start+int64(5*time.Second), 1, 1)
	w.Add(start+int64(2*time.Second), false)
	sum(t, w, start+int64(5*time.Second), 2, 1)
	sum(t, w, start+int64(3*time.Second), 2, 1) // A reader that is late itself.
	w.Add(start+int64(4*time.Second), true)
	sum(t, w, start+int64(5*time.Second), 3, 2)
	sum(t, w, start+int64(6*time.Second), 3, 2)
}

func TestSumSeesLateEventsOfOthers(t *testing.T) {
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	for round := range 200 {
		w := New(20 * time.Second)
		var clock atomic.Int64
		clock.Store(int64(time.Hour))
		var wg sync.WaitGroup
		for g := range 4 {
			rng := rand.New(rand.NewPCG(seed, uint64(4*round+g)))
			wg.Go(func() {
				for range 100 {
					now := clock.Add(rng.Int64N(int64(50 * time.Millisecond)))
					w.Sum(now)
					w.Add(now-rng.Int64N(int64(2*time.Second)), true)
				}
			})
		}
		wg.Wait()
		now := clock.Load()
		all, noted := w.Sum(now)
		if fresh, _ := w.Resized(now, 20*time.Second).Sum(now); all != fresh || noted != fresh {
			t.Fatalf("round %d: Sum = %d, %d, but the buckets hold %d", round, all, noted, fresh)
		}
	}
}

func BenchmarkAdd(b *testing.B) {
	w := New(time.Minute)
	for b.Loop() {
		w.Add(int64(time.Hour), true)
	}
}

func BenchmarkSum(b *testing.B) {
	w := New(time.Minute)
	for i := range int64(60) {
		w.Add(i*int64(time.Second), true)
	}
	for b.Loop() {
		w.Sum(int64(time.Minute))
	}
}

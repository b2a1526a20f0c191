// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

// Package quantile keeps the recent latencies of a layer that derives a bound
// from them: a hedge's delay, an adaptive timeout.
//
//	w := quantile.New(time.Minute)
//	w.Record(12 * time.Millisecond)
//	p99, n := w.Quantile(0.99)
package quantile

import (
	"fmt"
	"sync"
	"time"

	"github.com/HdrHistogram/hdrhistogram-go"

	"github.com/belfry-go/belfry/interceptor"
)

const (
	// lowest and highest bound what is told apart; latencies beyond count as these.
	lowest  = time.Microsecond
	highest = time.Hour
	// digits makes a quantile at most 1 % greater than the latency it stands for,
	// at 25 kB for a histogram.
	digits = 2
	// A quantile is computed again after 1/stale new data. A scan of the histogram costs
	// about a microsecond, which this spreads over many calls. With few data every new
	// one counts at once.
	stale = 32
)

// A Window holds the latencies of a window of time that ends now: all that are
// younger than half of it, and none that is older than the whole. It is safe for
// concurrent use, and recording and asking do not allocate.
type Window struct {
	// mu guards the fields below. It is held for an increment or a look at last, now
	// and then for a scan of the histogram, and once in half a window for a rotation.
	mu       sync.Mutex
	half     time.Duration           // Half the window.
	turn     interceptor.Instant     // When the halves rotate next.
	cur, old *hdrhistogram.Histogram // The current half and the one before.
	all      *hdrhistogram.Histogram // Both together, so that a quantile needs no merging.
	last     answer
}

// answer is a quantile as it was when n latencies were in.
type answer struct {
	q    float64 // 0 is no answer.
	d    time.Duration
	n    int64
	turn interceptor.Instant // When the answer expires.
}

// New returns an empty Window. It panics if window is not positive; the caller checks
// what users configure.
func New(window time.Duration) *Window {
	w := &Window{cur: histogram(), old: histogram(), all: histogram()}
	w.SetWindow(window)
	return w
}

func histogram() *hdrhistogram.Histogram {
	return hdrhistogram.New(int64(lowest/time.Microsecond), int64(highest/time.Microsecond), digits)
}

// SetWindow changes the window. A longer one keeps the latencies as if it had always been
// set, and a shorter one applies from now on.
func (w *Window) SetWindow(window time.Duration) {
	if window <= 0 {
		panic(fmt.Sprintf("latency: window %v, must be positive", window))
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	now := interceptor.Now()
	if w.half > 0 {
		w.rotateLocked(now)
	}
	half := max(window/2, 1)
	started := w.turn.Add(-w.half) // When the current half began.
	w.half, w.turn = half, max(started.Add(half), now)
	w.last = answer{}
}

// Record adds a latency, rounded up to microseconds. One that is negative counts
// as zero.
func (w *Window) Record(d time.Duration) { w.RecordAt(interceptor.Now(), d) }

// RecordAt is Record for a caller that has read the clock.
func (w *Window) RecordAt(now interceptor.Instant, d time.Duration) {
	v := int64((min(max(d, 0), highest) + time.Microsecond - 1) / time.Microsecond)
	w.mu.Lock()
	w.rotateLocked(now)
	// Neither fails, because v is within the range.
	_ = w.cur.RecordValue(v)
	_ = w.all.RecordValue(v)
	w.mu.Unlock()
}

// Quantile returns the latency that a share q of those in the window does not exceed, and
// how many there are. 0 < q <= 1. If there are none it returns 0, 0. It may lack the
// latest 1/32 of the data.
func (w *Window) Quantile(q float64) (d time.Duration, n int) {
	return w.QuantileAt(interceptor.Now(), q)
}

// QuantileAt is Quantile for a caller that has read the clock.
func (w *Window) QuantileAt(now interceptor.Instant, q float64) (d time.Duration, n int) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.rotateLocked(now)
	count := w.all.TotalCount()
	if a := &w.last; a.q != q || a.turn != w.turn || count-a.n > a.n/stale {
		*a = answer{
			q: q, n: count, turn: w.turn,
			d: time.Duration(w.all.ValueAtQuantile(q*100)) * time.Microsecond,
		}
	}
	return w.last.d, int(count)
}

// rotateLocked drops latencies that are too old. Caller must hold w.mu.
func (w *Window) rotateLocked(now interceptor.Instant) {
	if now < w.turn {
		return
	}
	w.cur, w.old = w.old, w.cur
	if now >= w.turn.Add(w.half) {
		w.old.Reset() // Nothing was recorded for more than a half.
	}
	w.cur.Reset()
	w.all.Reset()
	w.all.Merge(w.old)
	// The halves keep their rhythm, so that the time of a record says which it is in.
	w.turn = w.turn.Add(w.half * (now.Sub(w.turn)/w.half + 1))
}

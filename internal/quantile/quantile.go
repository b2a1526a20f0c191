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
	"math/bits"
	"sync"
	"time"

	"github.com/belfry-go/belfry/interceptor"
)

const (
	// highest bounds what is told apart; a longer latency counts as this.
	highest = time.Hour
	// A quantile is computed again after 1/stale new data. A scan of the histogram costs
	// up to some microseconds, which this spreads over many calls. With few data every
	// new one counts at once.
	stale = 32
)

// A histogram counts latencies in microseconds. It has an octave for the latencies of
// each length in bits, made when it is first needed: those of one method fill a few. In
// an octave the bits after the first select one of 128 counts, so that a quantile is less
// than 1 % greater than the latency it stands for. It is HdrHistogram's layout.
type histogram struct {
	octaves [33]*[1 << stepBits]uint32 // An hour has 32 bits.
	n       int64
}

const stepBits = 7

func (h *histogram) record(v uint64) {
	length := bits.Len64(v)
	o := h.octaves[length]
	if o == nil {
		o = new([1 << stepBits]uint32)
		h.octaves[length] = o
	}
	o[v<<(stepBits+1)>>length&(1<<stepBits-1)]++
	h.n++
}

// highestOf returns the highest latency in a count of the octave.
func highestOf(length, i int) uint64 {
	return ((1<<stepBits+uint64(i)+1)<<length - 1) >> (stepBits + 1)
}

// reset empties the histogram, and gives back the octaves that it did not need.
func (h *histogram) reset() {
	for i, o := range &h.octaves {
		if o != nil && *o == [1 << stepBits]uint32{} {
			h.octaves[i] = nil
		} else if o != nil {
			clear(o[:])
		}
	}
	h.n = 0
}

// A Window holds the latencies of a window of time that ends now: all that are
// younger than half of it, and none that is older than the whole. It is safe for
// concurrent use. An empty one takes 0.7 kB, and one of latencies that differ by up to
// a factor of ten 4 kB more.
type Window struct {
	// mu guards the fields below. It is held for an increment or a look at last, now
	// and then for a scan of the histograms, and once in half a window for a rotation.
	mu       sync.Mutex
	half     time.Duration       // Half the window.
	turn     interceptor.Instant // When the halves rotate next.
	cur, old *histogram          // The current half and the one before.
	last     [2]answer           // To the last two quantiles that were asked for.
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
	w := &Window{cur: new(histogram), old: new(histogram)}
	w.SetWindow(window)
	return w
}

// SetWindow changes the window. A longer one keeps the latencies as if it had always been
// set, and a shorter one applies from now on.
func (w *Window) SetWindow(window time.Duration) {
	if window <= 0 {
		panic(fmt.Sprintf("quantile: window %v, must be positive", window))
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
	w.last = [2]answer{}
}

// Record adds a latency, rounded up to microseconds. One that is negative counts
// as zero.
func (w *Window) Record(d time.Duration) { w.RecordAt(interceptor.Now(), d) }

// RecordAt is Record for a caller that has read the clock.
func (w *Window) RecordAt(now interceptor.Instant, d time.Duration) {
	v := uint64((min(max(d, 0), highest) + time.Microsecond - 1) / time.Microsecond)
	w.mu.Lock()
	w.rotateLocked(now)
	w.cur.record(v)
	w.mu.Unlock()
}

// Refresh makes the next Quantile count all that was recorded.
func (w *Window) Refresh() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.last = [2]answer{}
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
	count := w.cur.n + w.old.n
	a := &w.last[0]
	if a.q != q && w.last[1].q == q {
		a = &w.last[1]
	}
	if a.q != q {
		w.last[1] = *a
	}
	if a.q != q || a.turn != w.turn || count-a.n > a.n/stale {
		*a = answer{q: q, n: count, turn: w.turn, d: w.scanLocked(q)}
	}
	return a.d, int(count)
}

// scanLocked computes a quantile. Caller must hold w.mu.
func (w *Window) scanLocked(q float64) time.Duration {
	n := w.cur.n + w.old.n
	left := max(int64(q*float64(n)+0.5), 1)
	var none [1 << stepBits]uint32
	for length := range w.cur.octaves {
		cur, old := w.cur.octaves[length], w.old.octaves[length]
		if cur == nil && old == nil {
			continue
		}
		if cur == nil {
			cur = &none
		}
		if old == nil {
			old = &none
		}
		for i := range cur {
			left -= int64(cur[i]) + int64(old[i])
			if left <= 0 && n > 0 {
				return min(time.Duration(highestOf(length, i))*time.Microsecond, highest)
			}
		}
	}
	return 0
}

// rotateLocked drops latencies that are too old. Caller must hold w.mu.
func (w *Window) rotateLocked(now interceptor.Instant) {
	if now < w.turn {
		return
	}
	w.cur, w.old = w.old, w.cur
	if now >= w.turn.Add(w.half) {
		w.old.reset() // Nothing was recorded for more than a half.
	}
	w.cur.reset()
	// The halves keep their rhythm, so that the time of a record says which it is in.
	w.turn = w.turn.Add(w.half * (now.Sub(w.turn)/w.half + 1))
}

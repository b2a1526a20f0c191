// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package ratelimit

import (
	"math"
	"sort"
	"sync"
	"time"

	"github.com/belfry-go/belfry/interceptor"
)

// window is a sliding log of when each call of the last Per was admitted. A call is
// admitted if there are fewer than Limit. That is exact, at eight bytes a call; the usual
// pair of counters would admit more than Limit calls in some windows.
type window struct {
	// mu guards the fields below. It is held for a few comparisons, and for a copy
	// when the log grows; nothing is locked under it.
	mu    sync.Mutex
	rate  *params
	log   []interceptor.Instant // A ring. Its length is a power of two.
	first int                   // The index of the oldest.
	n     int                   // The number of entries.
}

func newWindow(p *params) *window { return &window{rate: p} }

// at returns the entry of the i-th oldest call, from 0. Caller must hold w.mu.
func (w *window) at(i int) *interceptor.Instant { return &w.log[(w.first+i)&(len(w.log)-1)] }

// expireLocked forgets the calls that have left the window. Caller must hold w.mu.
func (w *window) expireLocked(now interceptor.Instant) {
	for w.n > 0 && w.at(0).Add(w.rate.per) <= now {
		w.first, w.n = (w.first+1)&(len(w.log)-1), w.n-1
	}
}

func (w *window) take(now interceptor.Instant) (at int64, ok bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.n > 0 {
		now = max(now, *w.at(w.n - 1)) // Readings of the clock may arrive out of order.
	}
	w.expireLocked(now)
	if w.n >= w.rate.limit {
		return 0, false
	}
	if w.n == len(w.log) {
		w.growLocked()
	}
	w.n++
	*w.at(w.n - 1) = now
	return int64(now), true
}

// growLocked doubles the log. Caller must hold w.mu.
func (w *window) growLocked() {
	log := make([]interceptor.Instant, max(2*len(w.log), 8))
	for i := range w.n {
		log[i] = *w.at(i)
	}
	w.log, w.first = log, 0
}

func (w *window) next(now interceptor.Instant, ahead int) interceptor.Instant {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.expireLocked(now)
	// Calls are admitted now while there is room, then each when an older one leaves, and
	// after Limit of them when those leave.
	limit := w.rate.limit
	turn := now
	i := ahead % limit
	if room := limit - w.n; i >= room {
		// After the limit was lowered the log may hold more than it: i counts from the
		// oldest that will make room.
		turn = w.at(i - room).Add(w.rate.per)
	}
	rounds := time.Duration(ahead / limit)
	if rounds > (math.MaxInt64-time.Duration(turn))/w.rate.per {
		return never
	}
	return turn.Add(rounds * w.rate.per)
}

// refund forgets a call that was admitted at a moment, if that is still in the window. It
// is usually among the last, so the newer ones move.
func (w *window) refund(at int64) {
	t := interceptor.Instant(at)
	w.mu.Lock()
	defer w.mu.Unlock()
	i := sort.Search(w.n, func(i int) bool { return *w.at(i) > t }) - 1
	if i < 0 || *w.at(i) != t {
		return // It has left the window.
	}
	for ; i < w.n-1; i++ {
		*w.at(i) = *w.at(i + 1)
	}
	w.n--
}

func (w *window) full(now interceptor.Instant) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.expireLocked(now)
	return w.n == 0
}

func (w *window) update(now interceptor.Instant, p *params) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.expireLocked(now)
	w.rate = p
}

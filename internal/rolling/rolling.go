// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

// Package rolling counts events over a moving window of time, without locks, and how many
// of them are of note. A throttle and a breaker judge by it.
package rolling

import (
	"math"
	"sync/atomic"
	"time"
)

// Buckets is how many parts a window has. The window moves by one of them at a
// time, so what it sees of the past is between (Buckets-1)/Buckets of its span
// and all of it.
const Buckets = 20

// Each bucket is one word, so that a change of its turn and of its counts is one
// step: 20 bits for the turn of the ring it counts in, 22 bits for the events of
// note, 22 for all.
const (
	countBits = 22
	turnBits  = 64 - 2*countBits
	countMask = 1<<countBits - 1
	turnMask  = 1<<turnBits - 1
	one       = 1
	oneNoted  = 1 << countBits
	turnShift = 2 * countBits

	// latest is how many turns late an event may be and still be recognised as late.
	latest = 16
)

// A Window counts the events of the last span. Its methods may be called concurrently.
// They do not block, and only Resized allocates. A bucket stops counting at 4,194,303
// events, which leaves the ratio of its counts as it is. Times are nanoseconds since an
// arbitrary moment, never negative.
type Window struct {
	span    time.Duration
	width   int64
	buckets [Buckets]atomic.Uint64

	// past is what Sum found in the earlier buckets, so that it reads all of them only
	// once for each bucket.
	past   atomic.Pointer[past]
	newest atomic.Int64 // The latest slot that Sum has made a past for, or is making one for.
	late   atomic.Int64 // How many events came for slots before newest.
}

// past is what a Window has counted before a slot.
type past struct {
	slot, late int64
	all, noted int64
}

// New returns an empty Window. span is at least [Buckets] nanoseconds.
func New(span time.Duration) *Window {
	return &Window{span: span, width: max(int64(span)/Buckets, 1)}
}

// Span is the span that New was given.
func (w *Window) Span() time.Duration { return w.span }

// place returns the bucket of a slot of time, and its turn of the ring.
func place(slot int64) (i int64, turn uint64) {
	return slot % Buckets, uint64(slot/Buckets) & turnMask
}

// Add counts an event at now, and whether it is of note.
func (w *Window) Add(now int64, noted bool) {
	n := uint64(0)
	if noted {
		n = 1
	}
	w.add(now, 1, n)
}

func (w *Window) add(now int64, all, noted uint64) {
	slot := now / w.width
	w.addTo(slot, all, noted)
	// Either Sum sees the event in its bucket, or it is seen here that Sum may not have.
	if slot < w.newest.Load() {
		w.late.Add(1)
	}
}

func (w *Window) addTo(slot int64, all, noted uint64) {
	i, turn := place(slot)
	b := &w.buckets[i]
	for {
		old := b.Load()
		next := old
		if have := old >> turnShift; have != turn {
			// A bucket that has counted something in a later turn stays, because this event
			// is a whole window late. Turns wrap around, so a bucket that seems far ahead is
			// an old one.
			if old&(1<<turnShift-1) != 0 && (have-turn)&turnMask <= latest {
				return
			}
			next = turn << turnShift
		}
		if next&countMask+all > countMask {
			return
		}
		next += all*one + noted*oneNoted
		if b.CompareAndSwap(old, next) {
			return
		}
	}
}

// Sum returns how many events there were in the span that ends now, and how many
// of them were of note.
func (w *Window) Sum(now int64) (all, noted int64) {
	slot := now / w.width
	p := w.past.Load()
	if p == nil || p.slot != slot || p.late != w.late.Load() {
		p = w.lookBack(slot)
	}
	i, turn := place(slot)
	all, noted = w.count(i, turn)
	return all + p.all, noted + p.noted
}

// lookBack returns the past of a slot.
func (w *Window) lookBack(slot int64) *past {
	newest := w.newest.Load()
	for newest < slot && !w.newest.CompareAndSwap(newest, slot) {
		newest = w.newest.Load()
	}
	p := &past{slot: slot, late: w.late.Load()}
	now, turn := place(slot)
	for i := range int64(Buckets) {
		if i == now {
			turn-- // The rest of the ring is of the turn before.
			continue
		}
		all, noted := w.count(i, turn&turnMask)
		p.all, p.noted = p.all+all, p.noted+noted
	}
	if newest <= slot {
		w.past.Store(p)
	}
	return p
}

// count returns what a bucket has counted in a turn.
func (w *Window) count(i int64, turn uint64) (all, noted int64) {
	if v := w.buckets[i].Load(); v>>turnShift == turn {
		return int64(v & countMask), int64(v >> countBits & countMask)
	}
	return 0, 0
}

// Resized returns a Window of another span that has counted what w has, as far as
// it reaches back. Events that are added to w while it runs may be missed.
func (w *Window) Resized(now int64, span time.Duration) *Window {
	to := New(span)
	last := now / w.width
	for slot := max(last-Buckets+1, 0); slot <= last; slot++ {
		i, turn := place(slot)
		v := w.buckets[i].Load()
		if v>>turnShift != turn {
			continue
		}
		// Take the end of the old bucket as the time of all its events: they are remembered
		// a little too long, and not forgotten too early.
		end := now
		if slot < last && slot < math.MaxInt64/w.width {
			end = (slot+1)*w.width - 1
		}
		if now/to.width-end/to.width < Buckets {
			to.add(end, v&countMask, v>>countBits&countMask)
		}
	}
	return to
}

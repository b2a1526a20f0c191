// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package testserver

import (
	"math"
	"time"

	"google.golang.org/grpc/codes"
)

// A condition is what holds for a server during a stretch of time: how fast it
// works and what is wrong with it. Conditions are immutable and form a list, the
// timeline; calls read the last one without a lock, and a call that is at work
// walks along the list as conditions follow each other. That makes a change of
// speed exact for the work in progress: what counts is when a condition began,
// not when a goroutine woke up to see it.
type condition struct {
	since time.Duration // since the server's epoch

	speed     float64
	stalled   bool
	blackHole bool
	drops     bool  // the network loses all packets
	fail      fault // answered at once, before the queue
	reject    fault // answered before the request is read

	// next is the condition that follows. It is written once, before changed
	// is closed, and read only after.
	next    *condition
	changed chan struct{}
}

// A fault answers a fraction of the calls with a code.
type fault struct {
	code     codes.Code
	fraction float64 // 0 is no fault
	headers  bool    // response headers go first
}

// hits reports whether the fault takes the call that r belongs to.
func (f fault) hits(r Rand) bool { return f.fraction > 0 && r.Float64() < f.fraction }

// rate is how much work is done per unit of time.
func (c *condition) rate() float64 {
	if c.stalled {
		return 0
	}
	return c.speed
}

// following returns the condition after c, or nil while c holds.
func (c *condition) following() *condition {
	select {
	case <-c.changed:
		return c.next
	default:
		return nil
	}
}

// A moment is a point of the timeline: a time, and the condition then.
type moment struct {
	at time.Duration
	in *condition
}

// now returns the present moment.
func (s *Server) now() moment {
	// The condition is read first: it may then be a past one, which a walk
	// mends, but never one that began after the time.
	c := s.current.Load()
	return moment{s.clock(), c}
}

// clock returns the time since the server's epoch.
func (s *Server) clock() time.Duration { return time.Since(s.epoch) }

// change makes a new condition out of the current one, beginning now.
func (s *Server) change(f func(c *condition)) {
	s.conditions.Lock()
	defer s.conditions.Unlock()
	s.changeLocked(s.clock(), f)
}

// changeLocked is change for a condition that began at a given time, not before
// the current one. Caller must hold s.conditions.
func (s *Server) changeLocked(at time.Duration, f func(c *condition)) {
	old := s.current.Load()
	c := *old
	c.since = max(at, old.since)
	c.next = nil
	c.changed = make(chan struct{})
	f(&c)
	old.next = &c
	close(old.changed)
	s.current.Store(&c)
}

// work does an amount of work, given as its time at speed 1, from moment m on. It
// returns the moment at which it was done, which is when it should have been by
// the model and not when a timer fired, so that the errors of timers do not add
// up along a queue. It returns false if stop was closed first.
func (s *Server) work(m moment, amount time.Duration, stop <-chan struct{}) (moment, bool) {
	left := float64(max(0, amount))
	var timer *time.Timer
	for {
		for next := m.in.following(); next != nil; next = m.in.following() {
			// A call may hold an old condition at a time when the next one had
			// begun; nothing was done under the old one then.
			if in := float64(next.since - m.at); in > 0 {
				rate := m.in.rate()
				if rate > 0 && left <= in*rate {
					return moment{m.at + duration(left/rate), m.in}, true
				}
				left -= in * rate
				m.at = next.since
			}
			m.in = next
		}
		var expired <-chan time.Time
		if rate := m.in.rate(); rate > 0 {
			end := m.at + duration(left/rate)
			if end < m.at { // overflow
				end = math.MaxInt64
			}
			remaining := end - s.clock()
			if remaining <= 0 {
				return moment{end, m.in}, true
			}
			if timer == nil {
				timer = time.NewTimer(remaining)
				defer timer.Stop()
			} else {
				timer.Reset(remaining)
			}
			expired = timer.C
		}
		select {
		case <-expired:
		case <-m.in.changed:
		case <-stop:
			return s.now(), false
		}
	}
}

// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package hedge

import (
	"sync"
	"time"

	"github.com/belfry-go/belfry/interceptor"
)

// A clock starts extra attempts when the delays of their calls are over. It has one timer
// for all calls of a layer: nearly all calls end before their delay, and a timer for each
// would cost more than everything else here. The zero clock is ready to use.
type clock struct {
	// mu guards the fields below and those of the alarms. Nothing is locked under it.
	mu          sync.Mutex
	first, last *alarm              // In order of time.
	next        interceptor.Instant // When the timer goes off; zero if none is set.
}

// An alarm is the moment when the delay of a race is over.
type alarm struct {
	race          *race
	set           bool
	at            interceptor.Instant
	before, after *alarm
}

// set sets an alarm, which may be set already. now is the time, or a little before.
func (c *clock) set(a *alarm, now interceptor.Instant, d time.Duration) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.removeLocked(a)
	a.set, a.at = true, now.Add(d)
	// Delays hardly differ, so it belongs at or near the end.
	before, after := c.last, (*alarm)(nil)
	for before != nil && before.at > a.at {
		before, after = before.before, before
	}
	a.before, a.after = before, after
	c.linkLocked(before, a)
	c.linkLocked(a, after)
	if c.next == 0 || a.at < c.next {
		c.wakeLocked(now, a.at)
	}
}

// stop stops an alarm. It returns false if the alarm is not set, or is going off.
func (c *clock) stop(a *alarm) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	set := a.set
	c.removeLocked(a)
	return set
}

func (c *clock) removeLocked(a *alarm) {
	if a.set {
		a.set = false
		c.linkLocked(a.before, a.after)
		a.before, a.after = nil, nil
	}
}

// linkLocked makes two alarms neighbours. nil is the end of the list.
func (c *clock) linkLocked(before, after *alarm) {
	if before != nil {
		before.after = after
	} else {
		c.first = after
	}
	if after != nil {
		after.before = before
	} else {
		c.last = before
	}
}

// wakeLocked sets the timer. One that was set for later still fires, and finds nothing to
// do.
func (c *clock) wakeLocked(now, at interceptor.Instant) {
	c.next = at
	time.AfterFunc(at.Sub(now), c.ring)
}

// ring starts what is due.
func (c *clock) ring() {
	now := interceptor.Now()
	c.mu.Lock()
	defer c.mu.Unlock()
	for a := c.first; a != nil && a.at <= now; a = c.first {
		c.removeLocked(a)
		go a.race.tick()
	}
	if c.next > now {
		return
	}
	c.next = 0
	if c.first != nil {
		c.wakeLocked(now, c.first.at)
	}
}

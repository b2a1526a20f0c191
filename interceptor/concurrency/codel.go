// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package concurrency

import (
	"math"
	"time"

	"github.com/belfry-go/belfry/interceptor"
)

// codel decides, each time a call could leave the queue, whether it is refused
// instead. It is the controlled delay algorithm (Nichols and Jacobson 2012, RFC
// 8289) with calls for packets: once calls have waited longer than target for a
// whole interval the queue is a standing one, and calls in it are refused, at first one,
// then ever faster,
//
//	next = last + interval/sqrt(refused so far)
//
// until a call leaves that has waited for less than target.
type codel struct {
	target, interval time.Duration

	above    interceptor.Instant // When the delay will have been above target for an interval; 0 while it is not.
	dropping bool
	next     interceptor.Instant // When to refuse the next one.
	count    float64             // Refused since dropping began.
	last     float64             // What count was when dropping began.
}

// drop reports whether to refuse a call that has waited for sojourn, with behind others
// that wait. A queue with one call or none left is not a standing one, as one with a
// packet or less is not in RFC 8289.
func (c *codel) drop(now interceptor.Instant, sojourn time.Duration, behind int) bool {
	standing := c.standing(now, sojourn, behind)
	switch {
	case !standing:
		c.dropping = false
		return false
	case c.dropping:
		if now < c.next {
			return false
		}
		c.count++
		c.next = c.law(c.next)
		return true
	}
	c.dropping = true
	// Soon after the last time, resume with the rate that worked then.
	if since := c.count - c.last; since > 1 && now.Sub(c.next) < 16*c.interval {
		c.count = since
	} else {
		c.count = 1
	}
	c.last = c.count
	c.next = c.law(now)
	return true
}

// empty says that nobody waits, so that the next queue starts below target: RFC 8289
// resets first_above_time when the queue is empty.
func (c *codel) empty() { c.above = 0 }

func (c *codel) standing(now interceptor.Instant, sojourn time.Duration, behind int) bool {
	switch {
	case sojourn < c.target || behind <= 1:
		c.above = 0
	case c.above == 0:
		c.above = now.Add(c.interval)
	default:
		return now >= c.above
	}
	return false
}

func (c *codel) law(t interceptor.Instant) interceptor.Instant {
	return t.Add(time.Duration(float64(c.interval) / math.Sqrt(c.count)))
}

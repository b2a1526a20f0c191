// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package p2c

import (
	"time"

	"google.golang.org/grpc/connectivity"
)

// This file gives connecting endpoints a grace period, in which calls wait for them. An
// endpoint that fails at once is often the first to be READY after the channel was idle. It
// would get all calls until another endpoint is READY. So the channel stays CONNECTING, for
// maxGrace at most, while all READY endpoints have only failed and others connect.

// maxGrace is the longest grace period. Most connections take less, and a call that fails
// after it has not waited for long.
const maxGrace = 500 * time.Millisecond

// grace is the state of the grace period. policy.mu guards it.
type grace struct {
	failing int    // how many READY endpoints have only failed
	over    bool   // maxGrace has passed. Reset when a READY endpoint has not only failed.
	stop    func() // stops the timer that ends the grace period; nil if no timer is set
}

// inGraceLocked reports whether calls wait for an endpoint that connects.
func (b *policy) inGraceLocked() bool {
	ready := b.count[connectivity.Ready]
	return !b.grace.over && ready > 0 && b.grace.failing == ready &&
		b.count[connectivity.Connecting]+b.count[connectivity.Idle] > 0
}

// judgeLocked counts the endpoint if it is READY and has only failed. It is called after each
// change of the endpoint's state or of its measure.
func (ep *endpoint) judgeLocked() {
	b := ep.policy
	g := &b.grace
	if failing := ep.reported.Load().ConnectivityState == connectivity.Ready && ep.candidate.meter.Load().onlyFailed(); failing != ep.failing {
		ep.failing = failing
		if failing {
			g.failing++
		} else {
			g.failing--
		}
	}
	switch {
	case g.failing < b.count[connectivity.Ready]:
		g.over = false
		g.endLocked()
	case g.stop == nil && b.inGraceLocked():
		g.stop = b.after(maxGrace, func() {
			b.mu.Lock()
			defer b.mu.Unlock()
			if g.stop = nil; !b.closed && b.inGraceLocked() {
				g.over = true
				b.reportLocked(false)
			}
		})
	}
}

// endLocked stops the timer.
func (g *grace) endLocked() {
	if g.stop != nil {
		g.stop()
		g.stop = nil
	}
}

// judge calls judgeLocked of the endpoint, and publishes if that changed the state of the
// channel. It is called after the endpoint's first failure, and after the first answer if
// that follows a failure.
func (m *measure) judge() {
	ep := m.ep.Load()
	if ep == nil {
		return
	}
	b := ep.policy
	b.mu.Lock()
	defer b.mu.Unlock()
	if !ep.gone && ep.candidate.meter.Load() == m {
		ep.judgeLocked()
		b.reportLocked(false)
	}
}

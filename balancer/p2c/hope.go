// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package p2c

import (
	"time"

	"google.golang.org/grpc/connectivity"
)

// This file makes calls wait for a better endpoint. One that fails at once is often the first
// to be READY after the channel was idle, and would get all calls until another is. So the
// channel stays CONNECTING while the endpoints that are READY have only failed and others
// connect, for mostHope at most.

// mostHope is more than most connections take, and little for a call that fails then.
const mostHope = 500 * time.Millisecond

// hope is what the policy knows of endpoints that have only failed. policy.mu guards it.
type hope struct {
	failing int    // endpoints that are READY and have only failed
	lost    bool   // calls have waited for mostHope; until an endpoint is READY that is not failing
	stop    func() // the timer that ends it; nil if there is none
}

// hopesLocked reports whether calls wait for an endpoint that connects.
func (b *policy) hopesLocked() bool {
	ready := b.count[connectivity.Ready]
	return !b.hope.lost && ready > 0 && b.hope.failing == ready &&
		b.count[connectivity.Connecting]+b.count[connectivity.Idle] > 0
}

// judgeLocked counts the endpoint if it is READY and has only failed. It follows each change of
// its state, and of what is known of it.
func (ep *endpoint) judgeLocked() {
	b := ep.policy
	h := &b.hope
	if failing := ep.reported.Load().ConnectivityState == connectivity.Ready && ep.candidate.meter.Load().onlyFailed(); failing != ep.failing {
		ep.failing = failing
		if failing {
			h.failing++
		} else {
			h.failing--
		}
	}
	switch {
	case h.failing < b.count[connectivity.Ready]:
		h.lost = false
		h.endLocked()
	case h.stop == nil && b.hopesLocked():
		h.stop = b.after(mostHope, func() {
			b.mu.Lock()
			defer b.mu.Unlock()
			if h.stop = nil; !b.closed && b.hopesLocked() {
				h.lost = true
				b.reportLocked(false)
			}
		})
	}
}

// endLocked stops the timer.
func (h *hope) endLocked() {
	if h.stop != nil {
		h.stop()
		h.stop = nil
	}
}

// judge is told that the first attempt at an endpoint has failed, or that one was answered for
// the first time after a failure.
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

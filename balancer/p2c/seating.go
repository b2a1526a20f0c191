// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package p2c

import (
	"google.golang.org/grpc/connectivity"
)

// This file decides which endpoints are in the READY set. No other file adds endpoints to the
// set or removes them. A pick sees only the endpoints in the set, so the others cost it
// nothing.

// A condition decides whether an endpoint is in the READY set.
type condition int

const (
	absent  condition = iota // not READY
	well                     // READY, and none of the following
	aside                    // READY, and put aside: see accrual
	drains                   // READY, and discovery says that it is about to leave
	ejected                  // ejected by a parent or a health check, still connected, and the config has useEjected
	conditions
)

var conditionNames = [conditions]string{aside: "aside", drains: "draining", ejected: "ejected"}

// seating is the conditions of all endpoints, and which of them are in the READY set. policy.mu
// guards it.
type seating struct {
	count  [conditions]int  // how many endpoints are in each condition
	others []*endpoint      // the endpoints that are aside, draining or ejected
	seated [conditions]bool // whether endpoints in each condition are in the READY set
}

// decide returns seated, as it follows from count.
func (s *seating) decide(cfg *accrualConfig) (seated [conditions]bool) {
	seated[well] = true
	if n := s.count[aside]; n > 0 && cfg != nil {
		// Panic: so many are aside that their fault is likely to be a common one.
		seated[aside] = s.count[well] == 0 || float64(n) > cfg.maxAside*float64(s.count[well]+n)
	}
	seated[drains] = s.count[well]+s.count[aside] == 0
	seated[ejected] = seated[drains] && s.count[drains] == 0
	return seated
}

// conditionLocked returns the condition of the endpoint.
func (ep *endpoint) conditionLocked() condition {
	switch {
	case ep.gone:
		return absent
	case ep.ejectedFrom != nil && ep.policy.picker.config.usesEjected():
		return ejected
	case ep.reported.Load().ConnectivityState != connectivity.Ready:
		return absent
	case ep.draining:
		return drains
	case ep.isAside():
		return aside
	}
	return well
}

// seatLocked updates the condition of the endpoint, and the READY set, after a change of the
// endpoint or of the config.
func (b *policy) seatLocked(ep *endpoint) {
	s := &b.seating
	if now := ep.conditionLocked(); now != ep.condition {
		s.count[ep.condition]--
		s.count[now]++
		if ep.condition == aside {
			ep.accrual().withdrawLocked()
		}
		if ep.condition > well {
			last := s.others[len(s.others)-1]
			s.others[ep.other], last.other = last, ep.other
			s.others = s.others[:len(s.others)-1]
		}
		if now > well {
			ep.other = len(s.others)
			s.others = append(s.others, ep)
		}
		b.metrics.condition(ep.condition, -1)
		b.metrics.condition(now, 1)
		if ep.home && ep.condition == well {
			b.homesWell--
		}
		if ep.home && now == well {
			b.homesWell++
		}
		if b.watcher != nil && avoids(ep.condition) != avoids(now) {
			b.watcher.Avoid(ep.addr, avoids(now))
		}
		ep.condition = now
		if now == aside {
			ep.accrual().resumeLocked()
		}
	}
	if b.home != "" {
		defer b.weighHomeLocked()
	}
	before := s.seated
	s.seated = s.decide(b.picker.config.accrual)
	if s.seated == before {
		ep.sitLocked(s.seated[ep.condition])
		return
	}
	// Adds before it removes, so that a pick never finds the set empty.
	for _, sit := range []bool{true, false} {
		for _, other := range append(s.others[:len(s.others):len(s.others)], ep) {
			if s.seated[other.condition] == sit {
				other.sitLocked(sit)
			}
		}
	}
	if s.seated[aside] != before[aside] {
		b.panickedLocked()
	}
}

// panickedLocked records and logs that a panic has started or ended. At its end a call may try
// each endpoint that is still aside.
func (b *policy) panickedLocked() {
	s := &b.seating
	all := s.count[well] + s.count[aside]
	if s.seated[aside] {
		b.metrics.panicked(1)
		logger.Warningf("%s: panic: %d of %d endpoints are put aside, more than maxAside allows; all are used", b.opts.Target.String(), s.count[aside], all)
		return
	}
	b.metrics.panicked(-1)
	if b.closed {
		return
	}
	logger.Warningf("%s: the panic has ended: %d of %d endpoints are put aside", b.opts.Target.String(), s.count[aside], all)
	for _, ep := range s.others {
		if ep.condition == aside {
			ep.accrual().tryNowLocked()
		}
	}
}

// sitLocked adds the endpoint to the READY set, or removes it.
func (ep *endpoint) sitLocked(sit bool) {
	b, c := ep.policy, ep.candidate
	if sit && ep.condition == ejected {
		c.child.Store(ep.ejectedFrom)
	}
	switch seated := c.slot.Load() != notReady; {
	case sit && !seated:
		b.ready.add(c)
		b.ready.settle(c, ep.home)
		b.queue.admit(c)
	case !sit && seated:
		b.ready.remove(c)
		b.picker.forget(c)
	}
}

// avoids reports whether the policy itself keeps a READY endpoint in the condition from calls.
func avoids(c condition) bool { return c == aside || c == drains }

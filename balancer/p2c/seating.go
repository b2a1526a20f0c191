// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package p2c

import (
	"google.golang.org/grpc/connectivity"
)

// This file decides which endpoints take part: it is the only one that puts endpoints into
// the READY set and takes them out. A pick does not know that there are others, so that
// those who do not take part cost it nothing.

// A condition is why an endpoint takes part or does not.
type condition int

const (
	absent  condition = iota // not READY
	well                     // READY, and nothing speaks against it
	aside                    // READY, and put aside: see accrual
	drains                   // READY, and discovery says that it is about to leave
	ejected                  // taken out by a parent or a health check, and still connected
	conditions
)

var conditionNames = [conditions]string{aside: "aside", drains: "draining", ejected: "ejected"}

// seating is which endpoints take part. policy.mu guards it.
type seating struct {
	count  [conditions]int // endpoints in each
	others []*endpoint     // those that are aside, draining or ejected
	seated [conditions]bool
}

// decide says endpoints in which condition take part, from how many there are.
func (s *seating) decide(cfg *accrualConfig) (seated [conditions]bool) {
	seated[well] = true
	if n := s.count[aside]; n > 0 && cfg != nil {
		// Panic: too many for each of them to be at fault.
		seated[aside] = s.count[well] == 0 || float64(n) > cfg.maxAside*float64(s.count[well]+n)
	}
	seated[drains] = s.count[well]+s.count[aside] == 0
	seated[ejected] = seated[drains] && s.count[drains] == 0
	return seated
}

// conditionLocked returns what the endpoint is in.
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

// seatLocked does what follows for the READY set from a change of the endpoint.
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
	// First those who come, so that a pick never finds the set empty.
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

// panickedLocked does what follows when a panic has begun or ended.
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

// sitLocked puts the endpoint into the READY set or takes it out.
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

// avoids reports whether the policy avoids a READY endpoint by a decision of its own.
func avoids(c condition) bool { return c == aside || c == drains }

// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package p2c

import (
	"sync"
	"sync/atomic"

	"google.golang.org/grpc/balancer"
	"google.golang.org/grpc/balancer/base"
	"google.golang.org/grpc/connectivity"
	"google.golang.org/grpc/resolver"

	"github.com/belfry-go/belfry/load"
)

// identities is the last number that was given to a policy or an endpoint of any channel. A
// call remembers the endpoints that it tried by their numbers, maybe for longer than a channel
// exists.
var identities atomic.Uint64

// endpoint is one endpoint that the resolver lists, and the child that connects to it. It
// is the ClientConn of the child.
type endpoint struct {
	balancer.ClientConn // of the channel; endpoint has UpdateState and NewSubConn of its own

	policy *policy
	addr   string            // the first of its addresses
	child  balancer.Balancer // changes under childMu

	// connections is the child if the endpoint may have several connections, else nil. It
	// changes under childMu.
	connections *connections

	// Used only by the methods of balancer.Balancer of the policy. See listing.
	state    resolver.Endpoint // what the child got last; zero if the child must be called again
	first    resolver.Endpoint // the first of its listings, if the current update touched it
	listings int               // how many entries of the list it has
	capacity uint64            // the sum of the weights of the listings
	at       int               // the index of one of the listings in policy.list
	touched  bool              // whether the current update may change it

	// childMu serializes the calls to the child and guards closed. See policy.mu
	// for the order.
	childMu sync.Mutex
	closed  bool

	// reported is the child's last report. Never nil.
	reported atomic.Pointer[balancer.State]

	// candidate is what picks need of the endpoint. It stays when a new metric replaces the
	// meter, so what is in flight stays counted.
	candidate *candidate

	addresses []string
	address   [1]string // backs addresses where there is one
	counts    counts    // guarded by policy.countMu

	// Guarded by policy.mu.
	gone        bool            // the resolver does not list it any more; reports are ignored
	draining    bool            // discovery says that it is about to leave
	ejectedFrom *balancer.State // the child's last report before a parent or a health check ejected the endpoint; nil if it is not ejected
	condition   condition
	failing     bool   // whether policy.grace counts it
	other       int    // its index in policy.seating.others
	weight      uint32 // relative capacity, at least 1
	cold        bool   // whether a slow start begins when it is READY
	ramping     bool   // whether its share rises, since rampFrom
	rampFrom    int64  // by policy.now
	zone        string // "" if it has none
	home        bool   // whether its zone is the caller's
}

func (b *policy) newEndpoint(e resolver.Endpoint) *endpoint {
	ep := &endpoint{ClientConn: b.cc, policy: b, addr: e.Addresses[0].Addr}
	ep.addresses = ep.address[:0]
	for _, a := range e.Addresses {
		ep.addresses = append(ep.addresses, a.Addr)
	}
	ep.reported.Store(&balancer.State{
		ConnectivityState: connectivity.Connecting,
		Picker:            base.NewErrPicker(balancer.ErrNoSubConnAvailable),
	})
	b.mu.Lock()
	b.count[connectivity.Connecting]++
	ep.candidate = b.candidates.New()
	ep.candidate.slot.Store(notReady)
	ep.candidate.tally.add(tallyOffset)
	ep.candidate.weight.Store(1)
	ep.candidate.changed()
	if m := b.recallLocked(e); m != nil {
		m.ep.Store(ep)
		ep.candidate.meter.Store(m)
	} else {
		ep.measureLocked(b.picker, b.metric)
	}
	ep.candidate.meter.Load().room.leaving.set(false)
	ep.limitLocked(b.picker.config.limit)
	ep.accrueLocked(b.picker.config.accrual)
	ep.weight = 1
	ep.cold = b.all.Load() != nil
	b.mu.Unlock()
	b.metrics.moved(connectivity.Shutdown, connectivity.Connecting)
	ep.newChild(b.picker.config)
	return ep
}

// measureLocked gives the endpoint a new meter of a metric. Attempts in flight end on the
// meter on which they started.
func (ep *endpoint) measureLocked(p *picker, m load.Metric) {
	fresh := &measure{Meter: m.NewMeter(load.Endpoint{Address: ep.addr}), timeless: p.config.timeless, quiet: quietMetric(m)}
	if old := ep.candidate.meter.Load(); old != nil {
		fresh.id = old.id
		fresh.room = old.room
		fresh.accrual.Store(old.accrual.Load())
		old.Close()
	} else {
		fresh.id, fresh.room = identities.Add(1), &room{}
	}
	fresh.ep.Store(ep)
	ep.candidate.meter.Store(fresh)
	ep.candidate.changed()
	ep.judgeLocked()
}

// UpdateState is called when the state of the child changes. It may be called from any
// goroutine: pick_first leaves IDLE on the goroutine of a call.
func (ep *endpoint) UpdateState(s balancer.State) {
	b := ep.policy
	b.mu.Lock()
	if ep.gone {
		b.mu.Unlock()
		return
	}
	from := ep.moveLocked(s)
	ejected := ep.ejectedFrom != nil && from == connectivity.Ready
	// If the child was READY before, a pick may have failed because of this change, and must
	// be repeated. If the child has become READY, calls wait for it only if the state of the
	// channel changes too.
	b.reportLocked(from == connectivity.Ready)
	b.mu.Unlock()

	b.metrics.moved(from, s.ConnectivityState)
	if ejected {
		if more, ok := b.ejections.May(b.now()); ok {
			_, err := s.Picker.Pick(balancer.PickInfo{})
			logger.Warningf("%s: endpoint %s is ejected by an outlier detector or a health check: %v%s", b.opts.Target.String(), ep.addr, err, more)
		}
	}
	if s.ConnectivityState == connectivity.Idle {
		// Endpoints connect eagerly. The child holds its lock here.
		go ep.call(func() { ep.child.ExitIdle() })
	}
}

// moveLocked applies a report of the child, and returns the state before it.
func (ep *endpoint) moveLocked(s balancer.State) connectivity.State {
	b := ep.policy
	before := ep.reported.Load()
	from, to := before.ConnectivityState, s.ConnectivityState
	ep.reported.Store(&s)
	b.count[from]--
	b.count[to]++
	switch {
	case to != connectivity.TransientFailure:
		ep.ejectedFrom = nil
	case from == connectivity.Ready: // A lost connection is IDLE first.
		ep.ejectedFrom = before
	}
	ep.candidate.child.Store(&s)
	if to == connectivity.TransientFailure {
		ep.cold = true
	}
	if to == connectivity.Ready && ep.cold {
		ep.rampLocked()
	}
	if to == connectivity.Ready && from != connectivity.Ready {
		ep.accrual().dueLocked()
	}
	b.seatLocked(ep)
	ep.judgeLocked()
	return from
}

// place sets the endpoint's relative capacity and its zone.
func (ep *endpoint) place(w uint32, zone string) {
	ep.policy.mu.Lock()
	defer ep.policy.mu.Unlock()
	ep.settleLocked(zone)
	ep.weight = max(w, 1)
	ep.weighLocked()
}

// setDraining sets whether the endpoint is about to leave.
func (ep *endpoint) setDraining(drains bool) {
	b := ep.policy
	b.mu.Lock()
	defer b.mu.Unlock()
	if ep.draining == drains {
		return
	}
	ep.draining = drains
	leaving := &ep.candidate.meter.Load().room.leaving
	defer leaving.set(drains) // Leaves does not block, so mu may be held.
	b.seatLocked(ep)
	if drains {
		logger.Infof("%s: endpoint %s is draining: it gets no new calls while another is READY", b.opts.Target.String(), ep.addr)
		return
	}
	logger.Infof("%s: endpoint %s is not draining any more", b.opts.Target.String(), ep.addr)
}

// call calls the child, unless it is closed.
func (ep *endpoint) call(f func()) {
	ep.childMu.Lock()
	defer ep.childMu.Unlock()
	if !ep.closed {
		f()
	}
}

func (ep *endpoint) update(ccs balancer.ClientConnState) error {
	ep.childMu.Lock()
	defer ep.childMu.Unlock()
	return ep.child.UpdateClientConnState(ccs)
}

// close removes the endpoint from the policy and closes the child. It closes the meter
// unless keep is set.
func (ep *endpoint) close(keep bool) {
	b := ep.policy
	b.mu.Lock()
	from := ep.moveLocked(balancer.State{
		ConnectivityState: connectivity.Shutdown,
		Picker:            base.NewErrPicker(balancer.ErrNoSubConnAvailable),
	})
	ep.gone = true
	ep.endRampLocked()
	if a := ep.accrual(); a != nil {
		a.stopLocked()
	}
	ep.settleLocked("")
	m := ep.candidate.meter.Load()
	m.ep.CompareAndSwap(ep, nil)
	if !keep {
		m.Close()
	} else if a := m.accrual.Load(); a != nil && a.ep == ep {
		m.accrual.CompareAndSwap(a, a.keptLocked())
	}
	b.mu.Unlock()
	b.metrics.moved(from, connectivity.Shutdown)

	ep.childMu.Lock()
	defer ep.childMu.Unlock()
	ep.closed = true
	ep.child.Close()
}

// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package p2c

import (
	"math"

	"google.golang.org/grpc/attributes"
	"google.golang.org/grpc/balancer"
	"google.golang.org/grpc/balancer/pickfirst"
	"google.golang.org/grpc/experimental/balancer/weight"
	"google.golang.org/grpc/resolver"

	"github.com/belfry-go/belfry/internal/place"
)

// This file applies the resolver's list of endpoints. An update compares the new list with the
// old one in one pass, and works only on what differs. It does not call the children of
// endpoints that have not changed.

// A listing is an entry of the resolver's list. Entries with the same set of addresses belong
// to one endpoint, which then has the sum of their weights, and the attributes of the first.
type listing struct {
	endpoint resolver.Endpoint
	ep       *endpoint
	weight   uint32 // at least 1
}

// updateEndpoints makes, updates and closes children, so that each endpoint of the state has
// one. It returns the first error of a child.
func (b *policy) updateEndpoints(state resolver.State) error {
	d := b.diff(state.Endpoints)
	if b.attributes == nil || !equalAttributes(b.received, state.Attributes) {
		b.received, b.attributes = state.Attributes, pickfirst.EnableHealthListener(state).Attributes
		for i := range b.list {
			if l := &b.list[i]; l.ep.at == i && !l.ep.touched {
				l.ep.state, l.ep.first = resolver.Endpoint{}, l.endpoint
				d.touch(l.ep)
			}
		}
	}
	for _, ep := range b.refused {
		if !ep.touched && ep.listings > 0 {
			ep.first = b.list[ep.at].endpoint
			d.touch(ep)
		}
	}
	b.refused = nil

	b.countParts()

	var firstErr error
	// A random first endpoint keeps many clients that start together from opening their
	// first connections to the same server.
	r := b.random()
	for i := range d.touched {
		ep := d.touched[(uint64(i)+r%uint64(len(d.touched)))%uint64(len(d.touched))]
		ep.touched = false
		if ep.listings == 0 {
			continue
		}
		if err := b.updateEndpoint(ep); err != nil && firstErr == nil {
			firstErr = err
		}
	}
	for _, ep := range d.touched {
		if ep.listings == 0 {
			b.endpoints.Delete(ep.first)
			ep.candidate.meter.Load().room.leaving.set(true)
			ep.close(false)
			d.members = true
		}
	}
	if d.members || b.all.Load() == nil {
		all := make([]*endpoint, 0, b.endpoints.Len())
		for i, l := range b.list {
			if l.ep.at == i {
				all = append(all, l.ep)
			}
		}
		b.all.Store(&all)
	}
	if len(b.list) == 0 {
		return balancer.ErrBadResolverState
	}
	return firstErr
}

// updateEndpoint sets the endpoint's weight, zone and draining, and updates its child if that
// is necessary.
func (b *policy) updateEndpoint(ep *endpoint) error {
	ep.place(uint32(min(ep.capacity, math.MaxUint32)), place.Zone(ep.first))
	ep.setDraining(place.Draining(ep.first))
	if sameEndpoint(ep.state, ep.first) {
		return nil
	}
	ep.state = ep.first
	err := ep.update(balancer.ClientConnState{ResolverState: resolver.State{
		Endpoints:  []resolver.Endpoint{ep.first},
		Attributes: b.attributes,
	}})
	if err != nil {
		ep.state = resolver.Endpoint{}
		b.refused = append(b.refused, ep)
	}
	return err
}

// A difference is what an update changes.
type difference struct {
	touched []*endpoint // the endpoints that may have changed
	members bool        // whether an endpoint was added or removed
}

func (d *difference) touch(ep *endpoint) {
	if !ep.touched {
		ep.touched = true
		d.touched = append(d.touched, ep)
	}
}

// diff replaces b.list, makes the endpoints that are new, and returns what has changed.
func (b *policy) diff(endpoints []resolver.Endpoint) (d difference) {
	several := b.endpoints.Len() < len(b.list) // whether an endpoint has several listings, before or after
	moved := false
	places, ok := b.replaced(endpoints)
	var removed []listing
	if ok && !several {
		for _, i := range places {
			removed = append(removed, b.list[i])
			b.list[i] = b.newListing(endpoints[i], &d)
		}
	} else {
		removed, places = b.match(endpoints, &d)
		moved = true
	}
	for _, l := range removed {
		l.ep.listings--
		l.ep.capacity -= uint64(l.weight)
		l.ep.first = l.endpoint
		d.touch(l.ep)
	}
	for _, i := range places {
		l := &b.list[i]
		l.ep.listings++
		l.ep.capacity += uint64(l.weight)
		l.ep.at = i
		several = several || l.ep.listings > 1
		d.touch(l.ep)
	}
	if moved {
		for i := range b.list {
			b.list[i].ep.at = i
		}
	}
	for _, ep := range d.touched {
		if ep.listings > 0 {
			ep.first = b.list[ep.at].endpoint
		}
	}
	if several {
		for i := len(b.list) - 1; i >= 0; i-- {
			b.list[i].ep.first = b.list[i].endpoint
		}
		for _, l := range b.list { // Another listing may be the first now.
			if !sameEndpoint(l.ep.state, l.ep.first) {
				d.touch(l.ep)
			}
		}
	}
	return d
}

// replaced returns the indexes of the entries that differ from those of the last update. It
// reports false if more than entries in place differ: the length of the list, or the index of
// an endpoint.
func (b *policy) replaced(endpoints []resolver.Endpoint) (places []int, ok bool) {
	if len(endpoints) != len(b.list) {
		return nil, false
	}
	for i, e := range endpoints {
		if sameEndpoint(b.list[i].endpoint, e) {
			continue
		}
		if ep, known := b.endpoints.Get(e); known && ep.at != i || len(e.Addresses) == 0 {
			return nil, false
		}
		places = append(places, i)
	}
	return places, true
}

// match replaces b.list. It returns the entries that are only in the old list, and the indexes
// of those that are only in the new one. It compares each entry with the one after the last
// match in the old list. Only if these differ it looks the endpoint up, which gives its index
// in the old list, from where it continues.
func (b *policy) match(endpoints []resolver.Endpoint, d *difference) (removed []listing, added []int) {
	old, list := b.list, make([]listing, 0, len(endpoints))
	kept := make([]bool, len(old))
	next := 0
	for _, e := range endpoints {
		if len(e.Addresses) == 0 {
			continue // its child would stay CONNECTING
		}
		if next >= len(old) || kept[next] || !sameEndpoint(old[next].endpoint, e) {
			if ep, ok := b.endpoints.Get(e); ok && ep.at < len(old) && old[ep.at].ep == ep {
				next = ep.at
			}
		}
		if next < len(old) && !kept[next] && sameEndpoint(old[next].endpoint, e) {
			kept[next] = true
			list = append(list, old[next])
			next++
			continue
		}
		added = append(added, len(list))
		list = append(list, b.newListing(e, d))
		if next < len(old) && old[next].ep == list[len(list)-1].ep {
			next++ // the same endpoint, changed
		}
	}
	for i := range old {
		if !kept[i] {
			removed = append(removed, old[i])
		}
	}
	b.list = list
	return removed, added
}

func (b *policy) newListing(e resolver.Endpoint, d *difference) listing {
	ep, ok := b.endpoints.Get(e)
	if !ok {
		ep = b.newEndpoint(e)
		b.endpoints.Set(e, ep)
		d.members = true
	}
	return listing{e, ep, max(weight.FromEndpoint(e).Weight, 1)}
}

// sameEndpoint reports whether two entries are equal for a child and for the policy.
func sameEndpoint(a, b resolver.Endpoint) bool {
	if len(a.Addresses) != len(b.Addresses) || len(a.Addresses) == 0 {
		return false
	}
	return (&a.Addresses[0] == &b.Addresses[0] || sameAddresses(a.Addresses, b.Addresses)) && equalAttributes(a.Attributes, b.Attributes)
}

func sameAddresses(a, b []resolver.Address) bool {
	for i := range a {
		x, y := &a[i], &b[i]
		//lint:ignore SA1019 parents that do not know endpoints set it
		if x.Addr != y.Addr || x.ServerName != y.ServerName || !equalAttributes(x.Attributes, y.Attributes) || !equalAttributes(x.BalancerAttributes, y.BalancerAttributes) {
			return false
		}
		//lint:ignore SA1019 resolvers that are older than attributes set it
		if x.Metadata != nil || y.Metadata != nil {
			return false // its type may not be comparable
		}
	}
	return true
}

// equalAttributes reports whether attributes are equal. Values without a method Equal are
// compared with ==, which panics on maps, slices and functions. Such values count as different.
func equalAttributes(a, b *attributes.Attributes) bool { return a == b || equalValues(a, b) }

func equalValues(a, b *attributes.Attributes) (equal bool) {
	defer func() {
		if recover() != nil {
			equal = false
		}
	}()
	return a.Equal(b)
}

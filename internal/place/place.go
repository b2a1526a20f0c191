// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

// Package place says where endpoints and callers are, and which endpoints are about to leave:
// what package discover writes into attributes, and the policies read.
package place

import (
	"google.golang.org/grpc/attributes"
	"google.golang.org/grpc/resolver"
)

// Types of their own, so that no other package's attributes can be taken for these, with
// an Equal, by which attributes compare, and a String for logs.
type (
	zoneKey     struct{}
	homeKey     struct{}
	groupKey    struct{}
	drainingKey struct{}
	name        string
	group       uint32
	mark        bool
)

func (n name) Equal(o any) bool {
	other, ok := o.(name)
	return ok && other == n
}

func (n name) String() string   { return string(n) }
func (zoneKey) String() string  { return "belfry.zone" }
func (homeKey) String() string  { return "belfry.home" }
func (groupKey) String() string { return "belfry.group" }

func (drainingKey) String() string { return "belfry.draining" }

func (m mark) Equal(o any) bool {
	other, ok := o.(mark)
	return ok && other == m
}

func (m mark) String() string {
	if m {
		return "true"
	}
	return "false"
}

func (g group) Equal(o any) bool {
	other, ok := o.(group)
	return ok && other == g
}

// SetZone returns a copy of the endpoint that is in a zone, "" if that is not known.
func SetZone(e resolver.Endpoint, zone string) resolver.Endpoint {
	e.Attributes = SetAttribute(e.Attributes, zoneKey{}, name(zone))
	return e
}

// Zone returns the zone of an endpoint, "" if it has none.
func Zone(e resolver.Endpoint) string {
	n, _ := e.Attributes.Value(zoneKey{}).(name)
	return string(n)
}

// SetHome returns a copy of the state that says in which zone the caller is.
func SetHome(s resolver.State, zone string) resolver.State {
	s.Attributes = SetAttribute(s.Attributes, homeKey{}, name(zone))
	return s
}

// Home returns the zone of the caller, "" if the state does not say.
func Home(s resolver.State) string {
	n, _ := s.Attributes.Value(homeKey{}).(name)
	return string(n)
}

// SetGroup returns a copy of the endpoint that belongs to a priority group.
func SetGroup(e resolver.Endpoint, g uint32) resolver.Endpoint {
	e.Attributes = SetAttribute(e.Attributes, groupKey{}, group(g))
	return e
}

// Group returns the priority group of an endpoint, 0 if it has none.
func Group(e resolver.Endpoint) uint32 {
	g, _ := e.Attributes.Value(groupKey{}).(group)
	return uint32(g)
}

// SetDraining returns a copy of the endpoint that is about to leave, or is not.
func SetDraining(e resolver.Endpoint, drains bool) resolver.Endpoint {
	if Draining(e) != drains {
		e.Attributes = SetAttribute(e.Attributes, drainingKey{}, mark(drains))
	}
	return e
}

// Draining reports whether an endpoint is about to leave.
func Draining(e resolver.Endpoint) bool {
	m, _ := e.Attributes.Value(drainingKey{}).(mark)
	return bool(m)
}

// SetAttribute sets an attribute. It does not lengthen the chain that attributes are if it
// would say what they say already, so that an endpoint may pass through many hands.
func SetAttribute(attrs *attributes.Attributes, k any, v interface{ Equal(any) bool }) *attributes.Attributes {
	if v.Equal(attrs.Value(k)) {
		return attrs
	}
	return attrs.WithValue(k, v)
}

// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

// Package draining marks endpoints that are about to leave, so that discovery can say so to
// a balancing policy. Neither imports the other.
package draining

import "google.golang.org/grpc/resolver"

type key struct{}

func (key) String() string { return "belfry.draining" }

// mark is the value of the attribute.
type mark bool

// Equal reports whether o says the same.
func (m mark) Equal(o any) bool {
	other, ok := o.(mark)
	return ok && other == m
}

// String lets logs of the attributes show it.
func (m mark) String() string {
	if m {
		return "true"
	}
	return "false"
}

// Set returns a copy of the endpoint that is draining or not.
func Set(ep resolver.Endpoint, drains bool) resolver.Endpoint {
	if Of(ep) != drains { // else the chain of attributes would grow
		ep.Attributes = ep.Attributes.WithValue(key{}, mark(drains))
	}
	return ep
}

// Of reports whether the endpoint is draining.
func Of(ep resolver.Endpoint) bool {
	m, _ := ep.Attributes.Value(key{}).(mark)
	return bool(m)
}

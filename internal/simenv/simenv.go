// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

// Package simenv lets a simulation give a balancing policy its time and its
// random numbers.
//
// A policy runs on the monotonic clock and on math/rand/v2. A simulation that
// runs the real policy in virtual time, reproducibly from a seed, puts an [Env]
// into the attributes of the resolver state it hands to the policy.
package simenv

import (
	"time"

	"google.golang.org/grpc/attributes"
	"google.golang.org/grpc/balancer"
	"google.golang.org/grpc/orca"
	"google.golang.org/grpc/resolver"
)

// An Env is where a policy takes its time and its random numbers from. Now and Uint64
// are called on the pick path, by many goroutines unless the simulation has only one.
type Env struct {
	Now    func() int64  // monotonic nanoseconds since an origin of the simulation's choice
	Uint64 func() uint64 // uniformly distributed

	// AfterFunc calls f after d, unless stop is called before. Nil stands for
	// time.AfterFunc.
	AfterFunc func(d time.Duration, f func()) (stop func())

	// Reports takes the place of orca.RegisterOOBListener. Nil stands for that.
	Reports func(balancer.SubConn, orca.OOBListener, orca.OOBListenerOptions) (stop func())
}

type key struct{}

// Set returns a copy of state that carries e.
func Set(state resolver.State, e *Env) resolver.State {
	state.Attributes = state.Attributes.WithValue(key{}, e)
	return state
}

// From returns the Env in attrs, or nil if there is none.
func From(attrs *attributes.Attributes) *Env {
	e, _ := attrs.Value(key{}).(*Env)
	return e
}

// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package interceptor

import (
	"iter"

	"github.com/belfry-go/belfry/limit"
)

// A LimitState is what a limit does, and what its algorithm thinks, at one moment.
type LimitState struct {
	Layer    string // the name of the layer
	Key      string // whose limit it is, if the layer has one for each key; empty if not
	ByMethod bool   // Key is the full name of a method

	Limit   int64 // how many permits there are
	InUse   int64 // how many of them calls hold; more than Limit for a while after that has shrunk
	Waiting int   // how many calls wait for permits

	limit.State              // what the algorithm thinks; zero if it is no [limit.Explainer]
	Last        limit.Sample // what the algorithm learnt last; zero if it has learnt nothing. Start is an [Instant].
}

// A LimitReporter is a Layer whose limits can be read. Limits may be called at any time,
// concurrently.
type LimitReporter interface {
	Layer
	Limits() iter.Seq[LimitState]
}

// Limits yields the states of all limits of the layers of stacks. The limits of a layer
// that is in several places are yielded once.
func Limits(stacks ...*Stack) iter.Seq[LimitState] {
	return func(yield func(LimitState) bool) {
		for r := range layersOf[LimitReporter](stacks...) {
			for state := range r.Limits() {
				if !yield(state) {
					return
				}
			}
		}
	}
}

// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package interceptor

import (
	"iter"
	"slices"
)

// A Reading is one figure of how a layer is doing, at one moment.
type Reading struct {
	Layer    string      // the name of the layer
	Key      string      // whose figure it is, if the layer has one for each key; empty if not
	ByMethod bool        // Key is the full name of a method
	What     ReadingKind // what is read
	Value    float64
	Text     string // Value in words, such as "open"; empty if the number says all
}

// ReadingKind is what is read. Your own layer may use a name of its own.
type ReadingKind string

// The kinds of belfry's own layers.
const (
	ReadingWaiting  ReadingKind = "waiting"  // calls that wait in the layer
	ReadingCircuit  ReadingKind = "circuit"  // of a breaker: 0 closed, 1 half-open, 2 open
	ReadingRefusing ReadingKind = "refusing" // of a throttle: the probability, 0 to 1, that it refuses a call
	ReadingFailing  ReadingKind = "failing"  // of a fail-fast: 1 while it refuses without waiting, else 0
	ReadingBudget   ReadingKind = "budget"   // of a retry or hedge: further attempts that its budget allows now
	ReadingDelay    ReadingKind = "delay"    // of a hedge: seconds before an extra attempt
)

// A Reporter is a Layer whose figures can be read. Readings may be called at any time,
// concurrently, and must not wait for calls.
type Reporter interface {
	Layer
	Readings() iter.Seq[Reading]
}

// Readings yields the figures of the layers of stacks. Those of limits are yielded by
// [Limits]. Those of a layer that is in several places are yielded once.
func Readings(stacks ...*Stack) iter.Seq[Reading] {
	return func(yield func(Reading) bool) {
		for r := range layersOf[Reporter](stacks...) {
			for reading := range r.Readings() {
				if !yield(reading) {
					return
				}
			}
		}
	}
}

// layersOf yields the layers of stacks that are an L, each once.
func layersOf[L Layer](stacks ...*Stack) iter.Seq[L] {
	return func(yield func(L) bool) {
		var seen []Layer
		for _, s := range stacks {
			for _, l := range s.prog.Load().layers {
				l = bare(l)
				r, ok := l.(L)
				if !ok || slices.ContainsFunc(seen, func(m Layer) bool { return same(l, m) }) {
					continue
				}
				seen = append(seen, l)
				if !yield(r) {
					return
				}
			}
		}
	}
}

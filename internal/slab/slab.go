// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

// Package slab allocates small values next to each other.
//
// With ten thousand endpoints a pick spends its time on fetching what it needs of
// two of them. Allocated one by one, these values lie scattered among all else
// that an endpoint consists of, each on a memory page of its own, and then the
// translation of their addresses misses its cache too.
package slab

// chunk is the number of values allocated at once. A chunk is freed when none of
// its values is in use, so an endpoint that stays may keep the memory of as many
// that have gone, and all that they point to. It is for values that point to
// nothing that goes with the endpoint.
const chunk = 64

// A Slab hands out values of one type. The zero value is ready to use. It is not
// safe for concurrent use.
type Slab[T any] struct {
	rest []T
}

// New returns a new zero value.
func (s *Slab[T]) New() *T {
	if len(s.rest) == 0 {
		s.rest = make([]T, chunk)
	}
	v := &s.rest[0]
	s.rest = s.rest[1:]
	return v
}

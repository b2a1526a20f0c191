// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package slab

import (
	"testing"
	"unsafe"
)

// Each value is new zero and next to the one before.
func TestSlabValues(t *testing.T) {
	type line [8]uint64
	var s Slab[line]
	seen := make(map[*line]bool)
	var last *line
	apart := 0
	for range 3 * chunk {
		v := s.New()
		if seen[v] || *v != (line{}) {
			t.Fatalf("value %d is used already: %v", len(seen), *v)
		}
		if last != nil && uintptr(unsafe.Pointer(v))-uintptr(unsafe.Pointer(last)) != unsafe.Sizeof(*v) {
			apart++
		}
		v[0], last, seen[v] = 1, v, true
	}
	if apart > 2 { // between chunks
		t.Errorf("%d of %d values are not next to the one before, want at most 2", apart, len(seen))
	}
}

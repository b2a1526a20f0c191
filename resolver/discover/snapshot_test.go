// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package discover

import (
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"testing"

	"google.golang.org/grpc/resolver"
)

// TestSnapshot compares the list, which is edited in place, with one that is made from the
// whole set.
func TestSnapshot(t *testing.T) {
	t.Run("is in the order of the keys after any changes", func(t *testing.T) {
		seed := rand.Uint64()
		t.Logf("seed %d", seed)
		r := rand.New(rand.NewPCG(seed, 0))
		s, want := newSnapshot(), make(map[string]resolver.Endpoint)
		for range 200 {
			for range r.IntN(8) {
				key := fmt.Sprint(r.IntN(40))
				if r.IntN(3) == 0 {
					s.remove(key)
					delete(want, key)
					continue
				}
				ep := MustEndpoint(fmt.Sprintf("10.0.0.%d:1", r.IntN(60)), Weight(1+r.Uint32N(3)))
				s.insert(key, ep)
				want[key] = SetKey(ep, key)
			}
			if r.IntN(50) == 0 {
				s.edits = maxEdits // the list is made again
			}
			var list []resolver.Endpoint
			var ids []string
			for _, k := range slices.Sorted(maps.Keys(want)) {
				if id := addressID(want[k]); !slices.Contains(ids, id) {
					ids, list = append(ids, id), append(list, want[k])
				}
			}
			if got := s.endpoints(); !slices.EqualFunc(got, list, equalEndpoints) {
				t.Fatalf("endpoints %v, want %v", got, list)
			}
		}
	})

	t.Run("lists one change of many without looking at the others", func(t *testing.T) {
		s := newSnapshot()
		for i := range 10_000 {
			addr := fmt.Sprintf("10.0.%d.%d:1", i/256, i%256)
			s.insert(addr, MustEndpoint(addr))
		}
		s.endpoints()
		ep := MustEndpoint("10.0.1.1:1", Weight(2))
		if n := testing.AllocsPerRun(10, func() {
			s.insert("10.0.1.1:1", ep)
			s.remove("10.0.2.2:1")
			s.insert("10.0.2.2:1", ep)
			s.endpoints()
		}); n > 100 {
			t.Errorf("%v allocations, want at most 100", n)
		}
	})
}

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

// TestPublishedSet compares the set, which is edited, with one that is made from all
// entries.
func TestPublishedSet(t *testing.T) {
	t.Run("is in the order of the keys after any changes", func(t *testing.T) {
		seed := rand.Uint64()
		t.Logf("seed %d", seed)
		r := rand.New(rand.NewPCG(seed, 0))
		s, entries, dirty := newPublishedSet(), make(map[string]entry), make(map[string]struct{})
		var before []resolver.Endpoint
		for range 500 {
			for range r.IntN(8) {
				key := fmt.Sprint(r.IntN(20))
				dirty[key] = struct{}{}
				if r.IntN(3) == 0 {
					delete(entries, key)
					continue
				}
				ep := SetKey(MustEndpoint(fmt.Sprintf("10.0.0.%d:1", r.IntN(30)), Weight(1+r.Uint32N(3))), key)
				entries[key] = entry{endpoint: ep, id: addressID(ep)}
			}
			var want []resolver.Endpoint
			var ids []string
			for _, k := range slices.Sorted(maps.Keys(entries)) {
				if id := entries[k].id; !slices.Contains(ids, id) {
					ids, want = append(ids, id), append(want, entries[k].endpoint)
				}
			}
			changed, _ := s.update(dirty, entries)
			clear(dirty)
			var got []resolver.Endpoint
			for _, it := range s.items {
				got = append(got, it.endpoint)
			}
			if !slices.EqualFunc(got, want, equalEndpoints) {
				t.Fatalf("endpoints %v, want %v", got, want)
			}
			if equal := slices.EqualFunc(before, want, equalEndpoints); changed == equal {
				t.Fatalf("changed = %v from %v to %v", changed, before, want)
			}
			before = want
		}
	})

	t.Run("changes one of many without looking at the others", func(t *testing.T) {
		s, entries, dirty := newPublishedSet(), make(map[string]entry), make(map[string]struct{})
		set := func(addr string, w uint32) {
			dirty[addr], entries[addr] = struct{}{}, entry{endpoint: MustEndpoint(addr, Weight(w), Key(addr)), id: addr}
		}
		for i := range 10_000 {
			set(fmt.Sprintf("10.0.%d.%d:1", i/256, i%256), 1)
		}
		s.update(dirty, entries)
		clear(dirty)
		w := uint32(1)
		if n := testing.AllocsPerRun(10, func() {
			w++
			set("10.0.1.1:1", w)
			delete(entries, "10.0.2.2:1")
			dirty["10.0.2.2:1"] = struct{}{}
			s.update(dirty, entries)
			set("10.0.2.2:1", w)
			s.update(dirty, entries)
		}); n > 100 {
			t.Errorf("%v allocations, want at most 100", n)
		}
	})
}

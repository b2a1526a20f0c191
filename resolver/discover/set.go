// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package discover

import (
	"maps"
	"slices"
	"strings"

	"google.golang.org/grpc/resolver"
)

// A publishedSet holds endpoints as the channel sees them: in the order of the
// keys, and of several keys with the same addresses only the smallest. The cost
// of an update grows with the number of changed keys. If an endpoint comes or
// goes, the update also copies the list.
type publishedSet struct {
	items []keyedEndpoint     // as the channel sees them
	ids   map[string]string   // the addressID of each key
	keys  map[string][]string // the keys of each addressID, in order
}

type keyedEndpoint struct {
	key      string
	endpoint resolver.Endpoint
}

func equalKeyed(a, b keyedEndpoint) bool {
	return a.key == b.key && equalEndpoints(a.endpoint, b.endpoint)
}

func newPublishedSet() publishedSet {
	return publishedSet{ids: make(map[string]string), keys: make(map[string][]string)}
}

// A replacement is the old and the new endpoint of a key.
type replacement struct{ before, after resolver.Endpoint }

// update copies the dirty keys from entries. It reports whether the endpoints that
// the channel sees have changed, and which of them were replaced. An update that
// leaves no endpoints does not modify the old slice of items.
func (s *publishedSet) update(dirty map[string]struct{}, entries map[string]entry) (changed bool, replaced []replacement) {
	// before holds the keys that the channel no longer sees. after holds those
	// that it will see, with the same or another endpoint.
	before, after := make(map[string]struct{}), make(map[string]struct{})
	affected := make(map[string]struct{}) // addressIDs
	touch := func(id string) {
		if _, ok := affected[id]; !ok {
			affected[id] = struct{}{}
			if keys := s.keys[id]; len(keys) > 0 {
				before[keys[0]] = struct{}{}
			}
		}
	}
	for k := range dirty {
		old, had := s.ids[k]
		e, has := entries[k]
		if had {
			touch(old)
		}
		if has {
			touch(e.id)
		}
		if had && !(has && e.id == old) {
			s.drop(k, old)
		}
		if has && !(had && e.id == old) {
			s.add(k, e.id)
		}
	}
	for id := range affected {
		if keys := s.keys[id]; len(keys) > 0 {
			after[keys[0]] = struct{}{}
			delete(before, keys[0])
		}
	}
	if len(before)+len(after) == 0 {
		return false, nil
	}

	// Most updates replace endpoints, which is done in place.
	moved := len(before) > 0
	for k := range after {
		i, found := s.find(s.items, k)
		if !found {
			moved = true
			continue
		}
		if old, ep := s.items[i].endpoint, entries[k].endpoint; !equalEndpoints(old, ep) {
			s.items[i].endpoint = ep
			changed, replaced = true, append(replaced, replacement{old, ep})
		}
	}
	if !moved {
		return changed, replaced
	}
	touched := slices.AppendSeq(make([]string, 0, len(before)+len(after)), maps.Keys(before))
	touched = slices.AppendSeq(touched, maps.Keys(after))
	slices.Sort(touched)
	rest := s.items
	s.items = make([]keyedEndpoint, 0, len(rest)+len(after))
	for _, k := range touched {
		i, found := s.find(rest, k)
		s.items = append(s.items, rest[:i]...)
		if rest = rest[i:]; found {
			rest = rest[1:]
		}
		if _, ok := after[k]; ok {
			s.items = append(s.items, keyedEndpoint{key: k, endpoint: entries[k].endpoint})
		}
	}
	s.items = append(s.items, rest...)
	return true, replaced
}

// find returns the index of the key in items, or the index to insert it at.
func (s *publishedSet) find(items []keyedEndpoint, key string) (i int, found bool) {
	return slices.BinarySearchFunc(items, key, func(it keyedEndpoint, key string) int { return strings.Compare(it.key, key) })
}

func (s *publishedSet) add(key, id string) {
	keys := s.keys[id]
	i, _ := slices.BinarySearch(keys, key)
	s.keys[id] = slices.Insert(keys, i, key)
	s.ids[key] = id
}

func (s *publishedSet) drop(key, id string) {
	keys := s.keys[id]
	if i, ok := slices.BinarySearch(keys, key); ok {
		keys = slices.Delete(keys, i, i+1)
	}
	if s.keys[id] = keys; len(keys) == 0 {
		delete(s.keys, id)
	}
	delete(s.ids, key)
}

// hidden returns two endpoints with the same addresses and different server
// names. The channel sees only the first of them.
func (s *publishedSet) hidden(dirty map[string]struct{}, entries map[string]entry) (seen, unseen resolver.Endpoint, ok bool) {
	for k := range dirty {
		keys := s.keys[entries[k].id]
		for _, other := range keys[min(1, len(keys)):] {
			seen, unseen = entries[keys[0]].endpoint, entries[other].endpoint
			if serverNames(seen) != serverNames(unseen) {
				return seen, unseen, true
			}
		}
	}
	return seen, unseen, false
}

// serverNames returns the server name of a single address, or else a list of all
// addresses with their server names, sorted by address.
func serverNames(ep resolver.Endpoint) string {
	if len(ep.Addresses) == 1 {
		return ep.Addresses[0].ServerName
	}
	names := make([]string, len(ep.Addresses))
	for i, a := range ep.Addresses {
		names[i] = a.Addr + " " + a.ServerName
	}
	slices.Sort(names)
	return strings.Join(names, ",")
}

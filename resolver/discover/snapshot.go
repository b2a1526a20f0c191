// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package discover

import (
	"maps"
	"slices"

	"google.golang.org/grpc/resolver"
)

// An entry is an endpoint as it will be published.
type entry struct {
	endpoint resolver.Endpoint // with its key
	id       string            // addressID
}

// A snapshot is what one watch has said so far. A change to it costs what changed: the
// endpoints are kept in the order of their keys between two calls of the method of that
// name.
type snapshot struct {
	entries       map[string]entry
	ids           map[string]int // how many entries have the id
	serviceConfig string

	// keys is the keys of all entries, sorted, and list their endpoints. Both are nil
	// before they are first asked for, and after so many insertions and removals that
	// sorting is cheaper.
	keys  []string
	list  []resolver.Endpoint
	edits int // insertions and removals since they were last asked for
}

// maxEdits is how many times the list is moved for a key that comes or goes, before it is
// made again: sorting 10,000 keys takes as long as some thousand moves.
const maxEdits = 256

func newSnapshot() *snapshot {
	return &snapshot{entries: make(map[string]entry), ids: make(map[string]int)}
}

// insert adds the endpoint, or replaces the one of the key.
func (s *snapshot) insert(key string, ep resolver.Endpoint) {
	ep = SetKey(ep, key)
	id := addressID(ep)
	old, ok := s.entries[key]
	s.entries[key] = entry{endpoint: ep, id: id}
	s.ids[id]++
	switch {
	case ok:
		s.release(old.id)
		if s.keys != nil {
			s.list[s.position(key)] = ep
		}
	case s.mayEdit():
		at := s.position(key)
		s.keys = slices.Insert(s.keys, at, key)
		s.list = slices.Insert(s.list, at, ep)
	}
}

// remove removes the endpoint of the key, if there is one.
func (s *snapshot) remove(key string) {
	old, ok := s.entries[key]
	if !ok {
		return
	}
	delete(s.entries, key)
	s.release(old.id)
	if s.mayEdit() {
		at := s.position(key)
		s.keys = slices.Delete(s.keys, at, at+1)
		s.list = slices.Delete(s.list, at, at+1)
	}
}

func (s *snapshot) release(id string) {
	if s.ids[id]--; s.ids[id] == 0 {
		delete(s.ids, id)
	}
}

// mayEdit reports whether a key is to be inserted into the list or removed from it, and
// drops the list if making it again is cheaper.
func (s *snapshot) mayEdit() bool {
	if s.edits++; s.edits > maxEdits {
		s.keys, s.list = nil, nil
	}
	return s.keys != nil
}

// position returns where the key is in keys, or belongs.
func (s *snapshot) position(key string) int {
	at, _ := slices.BinarySearch(s.keys, key)
	return at
}

// endpoints returns the set as it is published: in the order of the keys, each
// set of addresses once. The result is good until the next change.
func (s *snapshot) endpoints() []resolver.Endpoint {
	if s.keys == nil {
		s.keys = slices.Sorted(maps.Keys(s.entries))
		s.list = make([]resolver.Endpoint, len(s.keys))
		for i, k := range s.keys {
			s.list[i] = s.entries[k].endpoint
		}
	}
	s.edits = 0
	if len(s.ids) == len(s.keys) {
		return s.list
	}
	unique := make([]resolver.Endpoint, 0, len(s.ids))
	seen := make(map[string]struct{}, len(s.ids))
	for i, k := range s.keys {
		id := s.entries[k].id
		if _, ok := seen[id]; !ok {
			seen[id] = struct{}{}
			unique = append(unique, s.list[i])
		}
	}
	return unique
}

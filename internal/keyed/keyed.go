// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

// Package keyed holds what a layer knows per key (a method, a tenant): a bounded
// number of values, each made when its key is first asked for. Values that their owner
// can do without are dropped to make room for new keys.
package keyed

import (
	"hash/maphash"
	"iter"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

// Others is the key of the value that keys beyond the limit share.
const Others = "(others)"

const (
	// shards is how many parts a Map has, so that a new key stops only the calls of
	// the keys in its own part.
	shards = 16

	// resolution is how exactly a Map knows when a value was last asked for, and the
	// least time between two searches of all values for room.
	resolution = 100 * time.Millisecond

	// glance is how many values of its shard a new key looks at, to drop them.
	glance = 2
)

// A Map holds a value for each key, up to a limit. Keys that find no room share
// one more value, whose key is [Others]. It is safe for concurrent use.
//
// Looking up a key that is there takes a read lock and allocates nothing.
//
// Values are dropped only when a new key arrives. Each new key looks at two others, which
// keeps about as many as are in use without a search of all. All are searched only when
// the limit is reached, at most once in 100 ms.
//
// Times are nanoseconds since an arbitrary moment, and never negative.
type Map[V any] struct {
	limit     func() int
	make      func(key string) V
	droppable func(v V, unused time.Duration, now int64) bool

	seed   maphash.Seed
	shards [shards]shard[V]
	len    atomic.Int64 // How many entries the shards have together.
	swept  atomic.Int64 // When all were last searched.

	others atomic.Pointer[Entry[V]] // Nil until it is needed. Set under mu.
	mu     sync.Mutex               // Lets one goroutine make others. No lock of a Map is taken under it.
}

type shard[V any] struct {
	// mu guards m. It also guards the pins of m's entries against growing: they grow
	// under the read lock, and entries are dropped under the write lock.
	mu sync.RWMutex
	m  map[string]*Entry[V]
	_  [32]byte // Fills a cache line, so that the locks of two shards are in two.
}

// An Entry is a value that is pinned; see [Map.Pin].
type Entry[V any] struct {
	Value V
	used  atomic.Int64 // When it was last asked for, up to resolution too early.
	pins  atomic.Int64
}

// Unpin ends what Pin began.
func (e *Entry[V]) Unpin() { e.pins.Add(-1) }

// New returns an empty Map.
//
//   - limit returns how many keys have room, at least 1. It may change. Values beyond a
//     lower limit stay until they may be dropped.
//   - make returns the value of a new key. Two goroutines never call it at once for
//     one key.
//   - droppable reports whether v may be dropped. It was last asked for unused ago, exact
//     to 100 ms.
//
// They are called with locks of the Map held: they must not block or use the Map.
func New[V any](limit func() int, make func(key string) V, droppable func(v V, unused time.Duration, now int64) bool) *Map[V] {
	m := &Map[V]{limit: limit, make: make, droppable: droppable, seed: maphash.MakeSeed()}
	for i := range m.shards {
		m.shards[i].m = map[string]*Entry[V]{}
	}
	return m
}

// Get returns the value of key, or that of [Others] if key has none and there is no room.
// The value may be dropped at any time afterwards; the next call of the same key then gets
// another one. If that matters, use [Map.Pin].
func (m *Map[V]) Get(key string, now int64) V { return m.entry(key, now, 0).Value }

// Pin is like [Map.Get], but the value is not dropped before Unpin is called on the
// Entry, once for each Pin. So droppable sees everything that was done with the value.
func (m *Map[V]) Pin(key string, now int64) *Entry[V] { return m.entry(key, now, 1) }

func (m *Map[V]) entry(key string, now, pins int64) *Entry[V] {
	s := &m.shards[maphash.String(m.seed, key)%shards]
	s.mu.RLock()
	e := s.m[key]
	if e != nil {
		e.ask(now, pins)
	}
	s.mu.RUnlock()
	if e != nil {
		return e
	}
	if e = m.add(s, key, now, pins); e == nil {
		e = m.shared()
		e.ask(now, pins)
	}
	return e
}

// ask records that the value was asked for. Caller must hold the lock of its shard.
func (e *Entry[V]) ask(now, pins int64) {
	// Written rarely, so that concurrent calls do not contend for the word.
	if now-e.used.Load() >= int64(resolution) {
		e.used.Store(now)
	}
	if pins != 0 {
		e.pins.Add(pins)
	}
}

// add makes the value of a new key. It returns nil if there is no room.
func (m *Map[V]) add(s *shard[V], key string, now, pins int64) *Entry[V] {
	if key == Others || m.full() && !m.sweep(now) {
		return nil
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	e := s.m[key]
	if e == nil {
		seen := 0
		for k, other := range s.m { // In random order.
			if seen++; seen > glance {
				break
			}
			m.dropLocked(s, k, other, now)
		}
		if m.len.Add(1) > int64(m.limit()) {
			m.len.Add(-1)
			return nil
		}
		key = strings.Clone(key) // It may be a part of a larger string.
		e = &Entry[V]{Value: m.make(key)}
		s.m[key] = e
	}
	e.ask(now, pins)
	return e
}

func (m *Map[V]) full() bool { return m.len.Load() >= int64(m.limit()) }

// sweep drops all values that may be dropped, unless that was done a moment ago. It
// reports whether there is room.
func (m *Map[V]) sweep(now int64) bool {
	last := m.swept.Load()
	if now-last < int64(resolution) || !m.swept.CompareAndSwap(last, now) {
		return false
	}
	for i := range m.shards {
		s := &m.shards[i]
		s.mu.Lock()
		for k, e := range s.m {
			m.dropLocked(s, k, e, now)
		}
		s.mu.Unlock()
	}
	return !m.full()
}

// dropLocked drops an entry if it may be. Caller must hold s.mu for writing.
func (m *Map[V]) dropLocked(s *shard[V], key string, e *Entry[V], now int64) {
	if e.pins.Load() == 0 && m.droppable(e.Value, time.Duration(now-e.used.Load()), now) {
		delete(s.m, key)
		m.len.Add(-1)
	}
}

// shared returns the entry of [Others].
func (m *Map[V]) shared() *Entry[V] {
	if e := m.others.Load(); e != nil {
		return e
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	e := m.others.Load()
	if e == nil {
		e = &Entry[V]{Value: m.make(Others)}
		m.others.Store(e)
	}
	return e
}

// Len returns how many keys have a value of their own.
func (m *Map[V]) Len() int { return int(m.len.Load()) }

// Peek returns the value of key if it has one, and does not make it.
func (m *Map[V]) Peek(key string) (V, bool) {
	s := &m.shards[maphash.String(m.seed, key)%shards]
	s.mu.RLock()
	e := s.m[key]
	s.mu.RUnlock()
	if e == nil && key == Others {
		e = m.others.Load()
	}
	if e == nil {
		var zero V
		return zero, false
	}
	return e.Value, true
}

// All returns all keys and values, including [Others] if keys share its value, in no
// order. The loop may use the Map. A value that it misses was dropped meanwhile, or made
// by a call of make that started after the loop.
func (m *Map[V]) All() iter.Seq2[string, V] {
	return func(yield func(string, V) bool) {
		for k, e := range m.entries() {
			if !yield(k, e.Value) {
				return
			}
		}
	}
}

// Pins returns how many pins there are: how many calls use a value now.
func (m *Map[V]) Pins() (n int) {
	for _, e := range m.entries() {
		n += int(e.pins.Load())
	}
	return n
}

// entries returns all entries. No lock is held while the loop runs.
func (m *Map[V]) entries() iter.Seq2[string, *Entry[V]] {
	type pair struct {
		key string
		e   *Entry[V]
	}
	return func(yield func(string, *Entry[V]) bool) {
		m.mu.Lock() // Waits for make, to see everything made before.
		others := m.others.Load()
		m.mu.Unlock()
		if others != nil && !yield(Others, others) {
			return
		}
		var pairs []pair
		for i := range m.shards {
			s := &m.shards[i]
			s.mu.RLock()
			pairs = pairs[:0]
			for k, e := range s.m {
				pairs = append(pairs, pair{k, e})
			}
			s.mu.RUnlock()
			for _, p := range pairs {
				if !yield(p.key, p.e) {
					return
				}
			}
		}
	}
}

// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

// Package keyed holds what a layer knows per key (a method, a tenant): a bounded
// number of values, made when they are first asked for and dropped when they have
// not been for a while.
package keyed

import (
	"iter"
	"sync"
	"sync/atomic"
	"time"
)

// A Map holds a value for each key. It is safe for concurrent use. Looking up a
// key that is there takes a read lock and allocates nothing.
//
// Values are dropped only when another is made, so an idle Map keeps what it
// has, which is bounded.
type Map[V any] struct {
	make func(key string) V
	keep func(v V, now int64) bool

	// mu guards the fields below. make and keep are called under it.
	mu     sync.RWMutex
	m      map[string]*entry[V]
	others V     // What keys beyond the bound share; valid if full.
	full   bool  // others was made.
	swept  int64 // When it was last looked for values that are idle.
}

type entry[V any] struct {
	used atomic.Int64 // When it was last asked for, to a sixteenth of the idle time.
	v    V
}

// Others is the key that make gets for the value shared by keys beyond the bound.
const Others = "(others)"

// New returns an empty Map. make makes the value of a key; keep says of a value
// that was not asked for in a while that it must stay nevertheless, nil that none
// must. Neither may block or use the Map.
func New[V any](make func(key string) V, keep func(v V, now int64) bool) *Map[V] {
	return &Map[V]{make: make, keep: keep, m: map[string]*entry[V]{}}
}

// Get returns the value of key. If it has to be made, values that were not asked
// for during idle are dropped first; if there are still limit or more, what is
// returned is the value that all further keys share. now is nanoseconds since any
// moment.
func (m *Map[V]) Get(key string, now int64, limit int, idle time.Duration) V {
	m.mu.RLock()
	e, ok := m.m[key]
	if !ok && m.full && len(m.m) >= limit && !m.due(now, idle) {
		v := m.others
		m.mu.RUnlock()
		return v
	}
	m.mu.RUnlock()
	if !ok {
		return m.add(key, now, limit, idle)
	}
	// Written rarely, so that concurrent calls do not fight for the word.
	if now-e.used.Load() > int64(idle)/16 {
		e.used.Store(now)
	}
	return e.v
}

// due reports whether it is time to look for idle values again: looking is as
// much work as there are values, and must not be done for each new key.
func (m *Map[V]) due(now int64, idle time.Duration) bool { return now-m.swept >= int64(idle)/4 }

func (m *Map[V]) add(key string, now int64, limit int, idle time.Duration) V {
	m.mu.Lock()
	defer m.mu.Unlock()
	if e, ok := m.m[key]; ok {
		return e.v
	}
	if m.due(now, idle) {
		m.swept = now
		for k, e := range m.m {
			if now-e.used.Load() >= int64(idle) && (m.keep == nil || !m.keep(e.v, now)) {
				delete(m.m, k)
			}
		}
	}
	if len(m.m) >= limit {
		if !m.full {
			m.others, m.full = m.make(Others), true
		}
		return m.others
	}
	e := &entry[V]{v: m.make(key)}
	e.used.Store(now)
	m.m[key] = e
	return e.v
}

// Peek returns the value of key if there is one, and does not make it.
func (m *Map[V]) Peek(key string) (V, bool) {
	m.mu.RLock()
	defer m.mu.RUnlock()
	if e, ok := m.m[key]; ok {
		return e.v, true
	}
	if m.full && key == Others {
		return m.others, true
	}
	var zero V
	return zero, false
}

// All returns the keys and values as they are when the loop begins, in no order.
func (m *Map[V]) All() iter.Seq2[string, V] {
	return func(yield func(string, V) bool) {
		m.mu.RLock()
		vs := make(map[string]V, len(m.m)+1)
		for k, e := range m.m {
			vs[k] = e.v
		}
		if m.full {
			vs[Others] = m.others
		}
		m.mu.RUnlock()
		for k, v := range vs {
			if !yield(k, v) {
				return
			}
		}
	}
}

// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package keyed

import (
	"fmt"
	"sync"
	"testing"
	"time"
)

type value struct {
	key  string
	busy bool
}

func newMap() *Map[*value] {
	return New(func(key string) *value { return &value{key: key} }, func(v *value, _ int64) bool { return v.busy })
}

const idle = time.Minute

func at(d time.Duration) int64 { return int64(time.Hour + d) }

func count(m *Map[*value]) (n int) {
	for range m.All() {
		n++
	}
	return n
}

func TestAKeyHasOneValue(t *testing.T) {
	m := newMap()
	a := m.Get("a", at(0), 10, idle)
	if a.key != "a" {
		t.Errorf("the value of a was made for %q", a.key)
	}
	if m.Get("b", at(0), 10, idle) == a {
		t.Error("a and b have one value")
	}
	if m.Get("a", at(time.Second), 10, idle) != a {
		t.Error("a has another value the second time")
	}
	if v, ok := m.Peek("a"); !ok || v != a {
		t.Errorf("Peek(a) = %v, %v, want the value of a", v, ok)
	}
	if _, ok := m.Peek("c"); ok {
		t.Error("Peek(c) found a value, want none: it was never asked for")
	}
}

func TestKeysBeyondTheBoundShareAValueUntilIdleOnesAreDropped(t *testing.T) {
	m := newMap()
	a, b := m.Get("a", at(0), 2, idle), m.Get("b", at(0), 2, idle)
	c := m.Get("c", at(0), 2, idle)
	if c.key != Others || m.Get("d", at(0), 2, idle) != c {
		t.Errorf("c and d do not share the value of %q", Others)
	}
	if m.Get("a", at(0), 2, idle) != a || m.Get("b", at(0), 2, idle) != b {
		t.Error("a or b lost its value to a key beyond the bound")
	}
	m.Get("b", at(50*time.Second), 2, idle)
	if got := m.Get("c", at(60*time.Second), 2, idle); got.key != "c" {
		t.Errorf("a was idle for its time: c has the value of %q, want one of its own", got.key)
	}
	if _, ok := m.Peek("a"); ok {
		t.Error("a is still there, want it dropped")
	}
	if v, _ := m.Peek("b"); v != b {
		t.Error("b was in use and lost its value")
	}
	if got := count(m); got != 3 {
		t.Errorf("%d values, want 3: b, c and %q", got, Others)
	}
}

func TestABusyValueIsKept(t *testing.T) {
	m := newMap()
	a := m.Get("a", at(0), 10, idle)
	a.busy = true
	m.Get("b", at(0), 10, idle)
	m.Get("c", at(time.Hour), 10, idle)
	if v, _ := m.Peek("a"); v != a {
		t.Error("a is busy and was dropped")
	}
	if _, ok := m.Peek("b"); ok {
		t.Error("b is idle and was kept")
	}
}

func TestConcurrentGetsOfOneKeyAgree(t *testing.T) {
	m := newMap()
	var wg sync.WaitGroup
	var mu sync.Mutex
	seen := map[string]map[*value]bool{}
	for g := range 8 {
		wg.Go(func() {
			for i := range 500 {
				k := fmt.Sprint((i + g) % 50)
				v := m.Get(k, at(0), 100, idle)
				mu.Lock()
				if seen[k] == nil {
					seen[k] = map[*value]bool{}
				}
				seen[k][v] = true
				mu.Unlock()
			}
		})
	}
	wg.Wait()
	for k, vs := range seen {
		if len(vs) != 1 {
			t.Errorf("key %s got %d values, want 1", k, len(vs))
		}
	}
}

func TestALookUpAllocatesNothing(t *testing.T) {
	m := newMap()
	key := fmt.Sprint("a", t.Name())
	m.Get(key, at(0), 1, idle)
	m.Get("b", at(0), 1, idle)
	now := at(0)
	if got := testing.AllocsPerRun(100, func() {
		now += int64(time.Millisecond)
		m.Get(key, now, 1, idle)
		m.Get("c", now, 1, idle)
	}); got != 0 {
		t.Errorf("%v allocations for two look-ups, want 0", got)
	}
}

func BenchmarkGet(b *testing.B) {
	m := newMap()
	m.Get("a", at(0), 10, idle)
	b.ReportAllocs()
	for b.Loop() {
		m.Get("a", at(0), 10, idle)
	}
}

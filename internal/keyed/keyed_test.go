// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package keyed

import (
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
	"unsafe"
)

// value may be dropped when it was not asked for during idle and is not busy.
type value struct {
	key  string
	busy bool
}

const idle = time.Minute

func newMap(limit int) *Map[*value] {
	return New(
		func() int { return limit },
		func(key string) *value { return &value{key: key} },
		func(v *value, unused time.Duration, _ int64) bool { return unused >= idle && !v.busy })
}

func at(d time.Duration) int64 { return int64(time.Hour + d) }

func keysOf(m *Map[*value]) []string { return slices.Sorted(maps.Keys(maps.Collect(m.All()))) }

func wantKeys(t *testing.T, m *Map[*value], want ...string) {
	t.Helper()
	if got := keysOf(m); !slices.Equal(got, want) {
		t.Errorf("keys %q, want %q", got, want)
	}
	own := slices.DeleteFunc(want, func(k string) bool { return k == Others })
	if m.Len() != len(own) {
		t.Errorf("Len() = %d, want %d", m.Len(), len(own))
	}
}

func TestGet(t *testing.T) {
	t.Run("one value for each key", func(t *testing.T) {
		m := newMap(10)
		a, b := m.Get("a", at(0)), m.Get("b", at(0))
		if a.key != "a" || b.key != "b" {
			t.Errorf("the values were made for %q and %q, want a and b", a.key, b.key)
		}
		if m.Get("a", at(time.Hour)) != a {
			t.Error("a has another value the second time")
		}
		wantKeys(t, m, "a", "b")
	})
	t.Run("the empty key", func(t *testing.T) {
		m := newMap(10)
		m.Get("", at(0))
		wantKeys(t, m, "")
	})
	t.Run("keeps a copy of the key", func(t *testing.T) {
		m := newMap(10)
		long := strings.Repeat("x", 1000)
		m.Get(long[:2], at(0))
		for k, v := range m.All() {
			if unsafe.StringData(k) == unsafe.StringData(long) || unsafe.StringData(v.key) == unsafe.StringData(long) {
				t.Error("the map or make has the caller's string, want a copy: it keeps all of it in memory")
			}
		}
	})
	t.Run("concurrent calls agree", func(t *testing.T) {
		m := newMap(100)
		var seen sync.Map
		var wg sync.WaitGroup
		for g := range 8 {
			wg.Go(func() {
				for i := range 1000 {
					k := fmt.Sprint((i + g) % 150)
					v := m.Get(k, at(0))
					if v.key == Others {
						k = Others
					}
					if first, _ := seen.LoadOrStore(k, v); first != v {
						t.Errorf("key %s has two values", k)
					}
				}
			})
		}
		wg.Wait()
		if m.Len() != 100 {
			t.Errorf("Len() = %d, want the limit, 100", m.Len())
		}
	})
}

func TestLimit(t *testing.T) {
	t.Run("keys beyond it share a value", func(t *testing.T) {
		m := newMap(2)
		a, b := m.Get("a", at(0)), m.Get("b", at(0))
		c := m.Get("c", at(0))
		if c.key != Others || m.Get("d", at(0)) != c {
			t.Errorf("c and d do not share the value of %q", Others)
		}
		if m.Get("a", at(0)) != a || m.Get("b", at(0)) != b {
			t.Error("a or b lost its value to a key beyond the limit")
		}
		wantKeys(t, m, Others, "a", "b")
	})
	t.Run("room is made of values that may be dropped", func(t *testing.T) {
		m := newMap(3)
		m.Get("unused", at(0))
		m.Get("busy", at(0)).busy = true
		m.Get("used", at(0))
		m.Get("c", at(0))
		m.Get("used", at(50*time.Second))
		if got := m.Get("c", at(60*time.Second)); got.key != "c" {
			t.Errorf("c has the value of %q, want one of its own", got.key)
		}
		wantKeys(t, m, Others, "busy", "c", "used")
	})
	t.Run("is looked at again after 100ms only", func(t *testing.T) {
		looks := 0
		m := New(func() int { return 1 }, func(key string) string { return key },
			func(string, time.Duration, int64) bool { looks++; return looks > 2 })
		m.Get("a", at(0))
		for i, want := range []struct {
			at   time.Duration
			key  string
			v    string
			look int
		}{
			{0, "b", Others, 1}, {99 * time.Millisecond, "b", Others, 1}, {100 * time.Millisecond, "c", Others, 2},
			{-time.Second, "b", Others, 2}, {200 * time.Millisecond, "b", "b", 3},
		} {
			if got := m.Get(want.key, at(want.at)); got != want.v || looks != want.look {
				t.Errorf("%d: value %q after %d looks, want %q after %d", i, got, looks, want.v, want.look)
			}
		}
	})
	t.Run("may change", func(t *testing.T) {
		limit := 1
		m := New(func() int { return limit }, func(key string) *value { return &value{key: key} },
			func(_ *value, unused time.Duration, _ int64) bool { return unused >= idle })
		m.Get("a", at(0))
		m.Get("b", at(0))
		wantKeys(t, m, Others, "a")
		limit = 2
		m.Get("b", at(0))
		wantKeys(t, m, Others, "a", "b")
		limit = 1
		m.Get("c", at(0))
		wantKeys(t, m, Others, "a", "b")
		m.Get("b", at(30*time.Second))
		m.Get("c", at(idle))
		wantKeys(t, m, Others, "b")
	})
	t.Run("may fall while a key is added", func(t *testing.T) {
		limits := []int{2, 1} // When add looks at first, and once it has the lock.
		m := New(func() (n int) { n, limits = limits[0], append(limits[1:], 1); return n },
			func(key string) *value { return &value{key: key} },
			func(*value, time.Duration, int64) bool { return false })
		m.Get("a", at(0))
		limits = []int{2, 1}
		m.Get("b", at(0))
		wantKeys(t, m, Others, "a")
	})
	t.Run("values are dropped long before it", func(t *testing.T) {
		m := newMap(1e6)
		most := 0
		for i := range 10_000 { // Ten keys a second for 1,000 s, of which 600 are in use.
			m.Get(fmt.Sprint(i), at(time.Duration(i)*100*time.Millisecond))
			most = max(most, m.Len())
		}
		if most > 2000 {
			t.Errorf("up to %d keys were kept, want some 600 and at most 2000", most)
		}
	})
	t.Run("the key Others has the shared value", func(t *testing.T) {
		m := newMap(1)
		v := m.Get(Others, at(0))
		if p, ok := m.Peek(Others); !ok || p != v {
			t.Errorf("Peek(Others) = %v, %v, want what Get returned", p, ok)
		}
		m.Get("a", at(0))
		if m.Get("b", at(0)) != v {
			t.Error("a key beyond the limit has another value")
		}
		wantKeys(t, m, Others, "a")
	})
}

func TestUnused(t *testing.T) {
	var got time.Duration
	m := New(func() int { return 1 }, func(key string) string { return key },
		func(_ string, unused time.Duration, now int64) bool { got = unused; return false })
	m.Get("a", at(0))
	m.Get("a", at(99*time.Millisecond)) // Within the resolution.
	m.Get("b", at(time.Second))
	if got != time.Second {
		t.Errorf("a was unused for %v, want 1s", got)
	}
	m.Get("a", at(1500*time.Millisecond))
	m.Get("b", at(2*time.Second))
	if got != 500*time.Millisecond {
		t.Errorf("a was unused for %v, want 500ms", got)
	}
}

func TestPeek(t *testing.T) {
	m := newMap(1)
	a := m.Get("a", at(0))
	if v, ok := m.Peek("a"); !ok || v != a {
		t.Errorf("Peek(a) = %v, %v, want the value of a", v, ok)
	}
	for _, k := range []string{"b", Others} {
		if v, ok := m.Peek(k); ok || v != nil {
			t.Errorf("Peek(%q) = %v, %v, want none: it was never asked for", k, v, ok)
		}
	}
	b := m.Get("b", at(0))
	if v, ok := m.Peek(Others); !ok || v != b {
		t.Errorf("Peek(%q) = %v, %v, want the shared value", Others, v, ok)
	}
	if _, ok := m.Peek("b"); ok {
		t.Error("Peek(b) found a value, want none: b has none of its own")
	}
}

func TestAll(t *testing.T) {
	m := newMap(20)
	for i := range 21 {
		m.Get(fmt.Sprint(i), at(0))
	}
	t.Run("stops when told", func(t *testing.T) {
		for stop := 1; stop <= 21; stop++ {
			n := 0
			for range m.All() {
				if n++; n == stop {
					break
				}
			}
			if n != stop {
				t.Errorf("%d values, want %d", n, stop)
			}
		}
	})
	t.Run("lets the loop use the map", func(t *testing.T) {
		for k := range m.All() {
			m.Peek(k)
			m.Get(k+"x", at(time.Hour))
		}
	})
}

func TestPin(t *testing.T) {
	m := newMap(1)
	a := m.Pin("a", at(0))
	m.Pin("a", at(0)).Unpin()
	m.Pin("b", at(0)) // Of Others, which is never dropped.
	if n := m.Pins(); n != 2 {
		t.Errorf("Pins() = %d, want 2", n)
	}
	if v := m.Get("b", at(time.Hour)); v.key != Others {
		t.Errorf("b has the value of %q, want that of %q: a is pinned", v.key, Others)
	}
	if m.Get("a", at(0)) != a.Value {
		t.Error("a was dropped although it is pinned")
	}
	a.Unpin()
	if v := m.Get("b", at(2*time.Hour)); v.key != "b" {
		t.Errorf("b has the value of %q, want one of its own: a is not pinned any more", v.key)
	}
}

// TestPinIsKeptConcurrently checks the promise on which a rate limit relies: droppable
// never says yes to a value that somebody has pinned.
func TestPinIsKeptConcurrently(t *testing.T) {
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	type counter struct {
		users   atomic.Int64
		dropped atomic.Bool
	}
	m := New(func() int { return 20 }, func(string) *counter { return new(counter) },
		func(c *counter, _ time.Duration, _ int64) bool {
			if n := c.users.Load(); n != 0 {
				t.Errorf("a value with %d users may be dropped", n)
			}
			c.dropped.Store(true)
			return true
		})
	var now atomic.Int64
	now.Store(at(0))
	var wg sync.WaitGroup
	for i := range 4 {
		rng := rand.New(rand.NewPCG(seed, uint64(i)))
		wg.Go(func() {
			for range 5000 {
				e := m.Pin(fmt.Sprint(rng.IntN(60)), now.Add(int64(10*time.Millisecond)))
				e.Value.users.Add(1)
				if e.Value.dropped.Load() {
					t.Error("a pinned value was dropped")
				}
				e.Value.users.Add(-1)
				e.Unpin()
				if rng.IntN(100) == 0 {
					for range m.All() {
					}
				}
			}
		})
	}
	wg.Wait()
	kept := 0
	for k := range m.All() {
		if k != Others {
			kept++
		}
	}
	if kept != m.Len() || kept > 20 {
		t.Errorf("%d keys are kept and Len() = %d, want the same and at most 20", kept, m.Len())
	}
	if n := m.Pins(); n != 0 {
		t.Errorf("Pins() = %d at rest, want 0", n)
	}
}

func TestAllocations(t *testing.T) {
	m := newMap(1)
	key := fmt.Sprint("a", t.Name())
	m.Get(key, at(0))
	m.Get("b", at(0))
	now := at(0)
	if got := testing.AllocsPerRun(100, func() {
		now += int64(30 * time.Millisecond)
		m.Get(key, now)
		m.Get("c", now)
		m.Pin(key, now).Unpin()
		m.Peek(key)
	}); got != 0 {
		t.Errorf("%v allocations for lookups, want 0", got)
	}
}

func BenchmarkMap(b *testing.B) {
	const n = 1000
	m := newMap(n)
	keys := make([]string, n)
	for i := range keys {
		keys[i] = fmt.Sprintf("/helloworld.Greeter/SayHello%d", i)
		m.Get(keys[i], at(0))
	}
	for name, op := range map[string]func(i int){
		"Get":        func(int) { m.Get("/helloworld.Greeter/SayHello7", at(0)) },
		"Get_others": func(int) { m.Get("/helloworld.Greeter/SayHellox", at(0)) },
		"Get_spread": func(i int) { m.Get(keys[i%n], at(0)) },
		"Pin":        func(int) { m.Pin("/helloworld.Greeter/SayHello7", at(0)).Unpin() },
	} {
		b.Run(name, func(b *testing.B) {
			b.ReportAllocs()
			for i := 0; b.Loop(); i++ {
				op(i)
			}
		})
		b.Run(name+"/parallel", func(b *testing.B) {
			b.ReportAllocs()
			b.RunParallel(func(pb *testing.PB) {
				for i := rand.IntN(n); pb.Next(); i++ {
					op(i)
				}
			})
		})
	}
}

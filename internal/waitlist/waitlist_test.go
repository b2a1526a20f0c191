// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package waitlist

import (
	"cmp"
	"math"
	"math/rand/v2"
	"slices"
	"sync"
	"testing"
)

// push appends a node for each name, all with rank r.
func push(l *List[string], r Rank, names ...string) (nodes []*Node[string]) {
	for _, name := range names {
		n := &Node[string]{Value: name}
		l.Push(n, r)
		nodes = append(nodes, n)
	}
	return nodes
}

func order[T any](l *List[T], lifo bool) (got []T) {
	for n := range l.All(lifo) {
		got = append(got, n.Value)
	}
	return got
}

func wantOrder(t *testing.T, l *List[string], lifo bool, want ...string) {
	t.Helper()
	if got := order(l, lifo); !slices.Equal(got, want) {
		t.Errorf("lifo %v: order %q, want %q", lifo, got, want)
	}
	if l.Len() != len(want) {
		t.Errorf("Len() = %d, want %d", l.Len(), len(want))
	}
	first, last := l.First(lifo), l.Last(lifo)
	if len(want) == 0 {
		if first != nil || last != nil {
			t.Errorf("First, Last of an empty list are %v, %v, want nil", first, last)
		}
		return
	}
	if first.Value != want[0] || last.Value != want[len(want)-1] {
		t.Errorf("First, Last are %q, %q, want %q, %q", first.Value, last.Value, want[0], want[len(want)-1])
	}
}

func TestOrder(t *testing.T) {
	t.Run("arrival", func(t *testing.T) {
		var l List[string]
		push(&l, Rank{}, "a", "b", "c")
		wantOrder(t, &l, false, "a", "b", "c")
		wantOrder(t, &l, true, "c", "b", "a")
	})
	t.Run("priority before arrival", func(t *testing.T) {
		var l List[string]
		push(&l, Rank{Priority: 1}, "mid1", "mid2")
		push(&l, Rank{Priority: math.MinInt}, "low")
		push(&l, Rank{Priority: math.MaxInt}, "high")
		wantOrder(t, &l, false, "high", "mid1", "mid2", "low")
		wantOrder(t, &l, true, "high", "mid2", "mid1", "low")
	})
	t.Run("further attempts before first ones", func(t *testing.T) {
		var l List[string]
		push(&l, Rank{}, "first1", "first2")
		push(&l, Rank{Further: true}, "retry1", "retry2")
		wantOrder(t, &l, false, "retry1", "retry2", "first1", "first2")
		wantOrder(t, &l, true, "retry2", "retry1", "first2", "first1")
	})
	t.Run("priority before further attempts", func(t *testing.T) {
		var l List[string]
		push(&l, Rank{Priority: 1, Further: true}, "retry")
		push(&l, Rank{Priority: 2}, "high")
		wantOrder(t, &l, false, "high", "retry")
		wantOrder(t, &l, true, "high", "retry")
	})
	t.Run("empty", func(t *testing.T) {
		var l List[string]
		wantOrder(t, &l, false)
		wantOrder(t, &l, true)
	})
}

func TestRemove(t *testing.T) {
	t.Run("first, middle and last", func(t *testing.T) {
		for i, want := range [][]string{{"b", "c"}, {"a", "c"}, {"a", "b"}} {
			var l List[string]
			nodes := push(&l, Rank{}, "a", "b", "c")
			if !l.Remove(nodes[i]) {
				t.Errorf("Remove(%q) = false, want true", nodes[i].Value)
			}
			wantOrder(t, &l, false, want...)
			slices.Reverse(want)
			wantOrder(t, &l, true, want...)
		}
	})
	t.Run("only once", func(t *testing.T) {
		var l List[string]
		n := push(&l, Rank{}, "a", "b")[0]
		l.Remove(n)
		if l.Remove(n) {
			t.Error("the second Remove = true, want false")
		}
		wantOrder(t, &l, false, "b")
	})
	t.Run("not of another list", func(t *testing.T) {
		var l, other List[string]
		n := push(&other, Rank{}, "a")[0]
		push(&l, Rank{}, "b")
		if l.Remove(n) || l.Remove(new(Node[string])) {
			t.Error("Remove of a node that is not in the list = true, want false")
		}
		wantOrder(t, &l, false, "b")
		wantOrder(t, &other, false, "a")
	})
	t.Run("and push again", func(t *testing.T) {
		var l List[string]
		n := push(&l, Rank{}, "a", "b")[0]
		l.Remove(n)
		l.Push(n, Rank{})
		wantOrder(t, &l, false, "b", "a")
		l.Remove(n)
		l.Push(n, Rank{Priority: 1})
		wantOrder(t, &l, false, "a", "b")
	})
}

func TestPush(t *testing.T) {
	t.Run("panics if the node is in a list", func(t *testing.T) {
		var l, other List[string]
		n := push(&l, Rank{}, "a")[0]
		for _, to := range []*List[string]{&l, &other} {
			func() {
				defer func() {
					if recover() == nil {
						t.Error("no panic, want one")
					}
				}()
				to.Push(n, Rank{})
			}()
		}
		wantOrder(t, &l, false, "a")
		wantOrder(t, &other, false)
	})
}

func TestAll(t *testing.T) {
	t.Run("may remove what it yields", func(t *testing.T) {
		for _, lifo := range []bool{false, true} {
			var l List[string]
			push(&l, Rank{Priority: 1}, "a", "b")
			push(&l, Rank{Further: true}, "c")
			push(&l, Rank{}, "d", "e")
			want, got := order(&l, lifo), []string(nil)
			for n := range l.All(lifo) {
				got = append(got, n.Value)
				l.Remove(n)
			}
			if !slices.Equal(got, want) {
				t.Errorf("lifo %v: yielded %q, want %q", lifo, got, want)
			}
			wantOrder(t, &l, lifo)
		}
	})
	t.Run("stops when told", func(t *testing.T) {
		var l List[string]
		push(&l, Rank{}, "a", "b")
		for n := range l.All(false) {
			if n.Value != "a" {
				t.Errorf("yielded %q after break, want nothing", n.Value)
			}
			break
		}
	})
}

func TestAhead(t *testing.T) {
	var l List[string]
	low := push(&l, Rank{}, "a", "b", "c")
	high := push(&l, Rank{Priority: 1}, "d")[0]
	for _, tt := range []struct {
		n    *Node[string]
		lifo bool
		want int
	}{
		{high, false, 0}, {low[0], false, 1}, {low[2], false, 3},
		{high, true, 0}, {low[0], true, 3}, {low[2], true, 1},
		{new(Node[string]), false, -1},
	} {
		if got := l.Ahead(tt.n, tt.lifo); got != tt.want {
			t.Errorf("Ahead(%q, lifo %v) = %d, want %d", tt.n.Value, tt.lifo, got, tt.want)
		}
	}
}

func TestBefore(t *testing.T) {
	var l List[string]
	push(&l, Rank{}, "a", "b", "c")
	high := push(&l, Rank{Priority: 1}, "d")[0]
	push(&l, Rank{Further: true}, "e")
	check := func(r Rank, want int) {
		t.Helper()
		if got := l.Before(r); got != want {
			t.Errorf("Before(%+v) = %d, want %d", r, got, want)
		}
	}
	check(Rank{}, 5)
	check(Rank{Further: true}, 2)
	check(Rank{Priority: 1}, 1)
	check(Rank{Priority: 1, Further: true}, 0)
	check(Rank{Priority: -1}, 5)
	l.Remove(high)
	check(Rank{}, 4)
}

// TestRandom compares a List with a slice that is sorted by the documented order.
func TestRandom(t *testing.T) {
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	rng := rand.New(rand.NewPCG(seed, 0))
	type call struct {
		rank    Rank
		arrival int
	}
	turns := func(in []*Node[call], lifo bool) []*Node[call] {
		in = slices.Clone(in)
		slices.SortFunc(in, func(a, b *Node[call]) int {
			x, y := a.Value, b.Value
			further := func(c call) int {
				if c.rank.Further {
					return 0
				}
				return 1
			}
			arrival := cmp.Compare(x.arrival, y.arrival)
			if lifo {
				arrival = -arrival
			}
			return cmp.Or(-cmp.Compare(x.rank.Priority, y.rank.Priority), cmp.Compare(further(x), further(y)), arrival)
		})
		return in
	}
	var l List[call]
	var in, out []*Node[call]
	for i := range 5000 {
		if len(in) > 0 && rng.IntN(50+len(in)) >= 50 {
			j := rng.IntN(len(in))
			n := in[j]
			in = slices.Delete(in, j, j+1)
			if !l.Remove(n) {
				t.Fatalf("step %d: Remove of a node that is in = false, want true", i)
			}
			out = append(out, n)
		} else {
			n := new(Node[call])
			if len(out) > 0 && rng.IntN(2) == 0 { // One that was in before.
				n = out[len(out)-1]
				out = out[:len(out)-1]
				if l.Remove(n) {
					t.Fatalf("step %d: Remove of a node that is not in = true, want false", i)
				}
			}
			n.Value = call{Rank{Priority: rng.IntN(9) - 4, Further: rng.IntN(2) == 0}, i}
			l.Push(n, n.Value.rank)
			in = append(in, n)
		}
		lifo := rng.IntN(2) == 0
		want := turns(in, lifo)
		if got := slices.Collect(l.All(lifo)); !slices.Equal(got, want) || l.Len() != len(want) {
			t.Fatalf("step %d, lifo %v: %d nodes, Len %d, in another order than the %d wanted", i, lifo, len(got), l.Len(), len(want))
		}
		if len(want) == 0 {
			continue
		}
		if l.First(lifo) != want[0] || l.Last(lifo) != want[len(want)-1] {
			t.Fatalf("step %d: First or Last is not the first or last of All", i)
		}
		if j := rng.IntN(len(want)); l.Ahead(want[j], lifo) != j {
			t.Fatalf("step %d: Ahead = %d, want %d", i, l.Ahead(want[j], lifo), j)
		}
	}
}

// TestOwnersMutex is for the race detector: a mutex around the methods is enough.
func TestOwnersMutex(t *testing.T) {
	var mu sync.Mutex
	var l List[int]
	var wg sync.WaitGroup
	for i := range 4 {
		wg.Go(func() {
			var n Node[int]
			for range 1000 {
				mu.Lock()
				l.Push(&n, Rank{Priority: i % 2})
				mu.Unlock()
				mu.Lock()
				l.First(false).Value++
				l.Remove(&n)
				mu.Unlock()
			}
		})
	}
	wg.Wait()
	if l.Len() != 0 {
		t.Errorf("Len() = %d, want 0", l.Len())
	}
}

func TestAllocations(t *testing.T) {
	var l List[int]
	nodes := make([]Node[int], 8)
	round := func() {
		for i := range nodes {
			l.Push(&nodes[i], Rank{Priority: i / 2, Further: i%2 == 0})
		}
		for n := range l.All(true) {
			l.Ahead(n, true)
		}
		for n := l.First(false); n != nil; n = l.First(false) {
			l.Remove(n)
		}
	}
	round()
	if got := testing.AllocsPerRun(100, round); got != 0 {
		t.Errorf("%v allocations with levels that were there before, want 0", got)
	}
}

func BenchmarkPushRemove(b *testing.B) {
	for name, ranks := range map[string]int{"one_rank": 1, "eight_ranks": 8} {
		b.Run(name, func(b *testing.B) {
			var l List[int]
			nodes := make([]Node[int], 100)
			for i := range nodes {
				l.Push(&nodes[i], Rank{Priority: i % ranks})
			}
			i := 0
			b.ReportAllocs()
			for b.Loop() {
				n := l.First(false)
				l.Remove(n)
				l.Push(n, Rank{Priority: i % ranks})
				i++
			}
		})
	}
}

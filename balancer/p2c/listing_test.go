// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package p2c

import (
	"errors"
	"maps"
	"math"
	"slices"
	"testing"

	"google.golang.org/grpc/attributes"
	"google.golang.org/grpc/balancer"
	"google.golang.org/grpc/experimental/balancer/weight"
	"google.golang.org/grpc/resolver"
)

// toldChildren is a builder of children that do nothing but note what they are told.
type toldChildren struct {
	t       *testing.T
	updates int
	live    map[string]*toldChild // by the first address
	err     error                 // what an update returns
}

type toldChild struct {
	balancer.Balancer // for the methods that no test here calls
	all               *toldChildren
	state             resolver.State
}

func (c *toldChildren) Name() string { return "told" }

func (c *toldChildren) Build(balancer.ClientConn, balancer.BuildOptions) balancer.Balancer {
	return &toldChild{all: c}
}

func (c *toldChild) UpdateClientConnState(s balancer.ClientConnState) error {
	c.state = s.ResolverState
	c.all.updates++
	c.all.live[c.state.Endpoints[0].Addresses[0].Addr] = c
	return c.all.err
}

func (c *toldChild) ResolverError(error) {}

func (c *toldChild) Close() { delete(c.all.live, c.state.Endpoints[0].Addresses[0].Addr) }

func newToldWorld(t *testing.T) (*world, *toldChildren) {
	w := newWorld(t)
	children := &toldChildren{t: t, live: make(map[string]*toldChild)}
	w.p.children = children
	return w, children
}

type tagKey struct{}

func TestUpdate(t *testing.T) {
	t.Run("leaves what a whole new list says", func(t *testing.T) {
		r := newRand(t)
		w, children := newToldWorld(t)
		defer w.b.Close()
		var list []resolver.Endpoint
		for range 500 {
			// A few entries come, go, change and move.
			for range r.IntN(4) {
				e := weighted(string(rune('a'+r.IntN(12))), r.Uint32N(3))
				e.Attributes = e.Attributes.WithValue(tagKey{}, r.IntN(2))
				at := r.IntN(len(list) + 1)
				switch {
				case at == len(list) || r.IntN(2) == 0:
					list = slices.Insert(list, at, e)
				case r.IntN(2) == 0:
					list = slices.Delete(list, at, at+1)
				default:
					list[at] = e
				}
			}
			if r.IntN(10) == 0 {
				r.Shuffle(len(list), func(i, j int) { list[i], list[j] = list[j], list[i] })
			}
			if r.IntN(50) == 0 {
				list = nil
			}
			if err := w.update(`{}`, slices.Clone(list)...); (err != nil) != (len(list) == 0) {
				t.Fatalf("%d endpoints: %v", len(list), err)
			}

			first := make(map[string]resolver.Endpoint)
			sum := make(map[string]uint32)
			for _, e := range list {
				a := e.Addresses[0].Addr
				if _, ok := first[a]; !ok {
					first[a] = e
				}
				sum[a] += max(weight.FromEndpoint(e).Weight, 1)
			}
			names := slices.Sorted(maps.Keys(first))
			if got := slices.Sorted(maps.Keys(children.live)); !slices.Equal(got, names) {
				t.Fatalf("children %v, want %v", got, names)
			}
			if got := len(*w.p.all.Load()); got != len(names) || w.p.endpoints.Len() != got {
				t.Fatalf("%d endpoints in all, %d in the map, want %d", got, w.p.endpoints.Len(), len(names))
			}
			for _, a := range names {
				if got := uint32(w.endpoint(a).candidate.weight.Load()); got != sum[a] {
					t.Fatalf("%s has weight %d, want the sum of its weights, %d: %v", a, got, sum[a], list)
				}
				if got := children.live[a].state.Endpoints[0]; !sameEndpoint(got, first[a]) {
					t.Fatalf("the child of %s has %v, want the first listing %v", a, got, first[a])
				}
			}
		}
	})

	t.Run("calls no child whose endpoint is equal", func(t *testing.T) {
		w, children := newToldWorld(t)
		defer w.b.Close()
		told := func(what string, want int, attrs *attributes.Attributes, es ...resolver.Endpoint) {
			t.Helper()
			before := children.updates
			must(0, w.b.UpdateClientConnState(balancer.ClientConnState{
				ResolverState:  resolver.State{Endpoints: es, Attributes: attrs},
				BalancerConfig: must(parseConfig([]byte(`{}`))),
			}))
			if got := children.updates - before; got != want {
				t.Errorf("%s: %d children were called, want %d", what, got, want)
			}
		}
		told("first", 4, nil, some("a", "b", "c", "d")...)
		told("equal", 0, nil, some("a", "b", "c", "d")...)
		told("other order", 0, nil, some("d", "b", "a", "c")...)
		told("one gone", 0, nil, some("d", "a", "c")...)
		told("two new", 2, nil, some("x", "d", "a", "y", "c")...)
		told("one weight", 1, nil, one("x"), one("d"), weighted("a", 2), one("y"), one("c"))
		attrs := attributes.New(tagKey{}, 1)
		told("attributes of all", 5, attrs, one("x"), one("d"), weighted("a", 2), one("y"), one("c"))
		told("equal ones", 0, attributes.New(tagKey{}, 1), one("x"), one("d"), weighted("a", 2), one("y"), one("c"))
		odd := one("x")
		odd.Attributes = attributes.New(tagKey{}, []int{1}) // it cannot be compared
		told("not comparable", 1, attrs, odd)
		told("not comparable again", 0, attrs, odd) // the same pointer
		odd.Attributes = attributes.New(tagKey{}, []int{1})
		told("not comparable, made again", 1, attrs, odd)
	})

	t.Run("calls a child again that refused", func(t *testing.T) {
		w, children := newToldWorld(t)
		defer w.b.Close()
		children.err = errors.New("refused")
		if err := w.update(`{}`, weighted("a", 7)); err != children.err {
			t.Errorf("error %v, want the child's", err)
		}
		children.err = nil
		must(0, w.update(`{}`, one("b")))
		must(0, w.update(`{}`, weighted("a", 7)))
		children.err, children.updates = errors.New("refused"), 0
		if err := w.update(`{}`, one("a")); err != children.err {
			t.Errorf("error %v, want the child's", err)
		}
		children.err = nil
		if err := w.update(`{}`, one("a")); err != nil || children.updates != 2 {
			t.Errorf("error %v after %d calls, want none and a second call", err, children.updates)
		}
		if got := w.endpoint("a").candidate.weight.Load(); got != 1 {
			t.Errorf("weight %d, want 1", got)
		}
	})

	t.Run("sums weights up to the greatest", func(t *testing.T) {
		w, _ := newToldWorld(t)
		defer w.b.Close()
		for range 20 { // the order in which children are called is random
			must(0, w.update(`{}`, weighted("a", 1), one("b"), weighted("a", 100), weighted("b", math.MaxUint32)))
			if a, b := w.endpoint("a").candidate.weight.Load(), w.endpoint("b").candidate.weight.Load(); a != 101 || b != math.MaxUint32 {
				t.Fatalf("weights %d and %d, want 101 and %d", a, b, uint32(math.MaxUint32))
			}
		}
	})

	t.Run("costs what changed", func(t *testing.T) {
		w, children := newToldWorld(t)
		defer w.b.Close()
		config := must(parseConfig([]byte(`{}`)))
		update := func(es []resolver.Endpoint) {
			must(0, w.b.UpdateClientConnState(balancer.ClientConnState{
				ResolverState: resolver.State{Endpoints: es}, BalancerConfig: config,
			}))
		}
		const n = 10_000
		lists := [][]resolver.Endpoint{endpoints(n), endpoints(n)}
		lists[1][n/2] = weighted(lists[1][n/2].Addresses[0].Addr, 2)
		update(lists[0])
		update(lists[1])
		children.updates = 0
		i := 0
		if got := testing.AllocsPerRun(10, func() { update(lists[i%2]); i++ }); got > 100 {
			t.Errorf("%v allocations for one weight of %d, want at most 100", got, n)
		}
		if children.updates != i {
			t.Errorf("%d children were called for %d changes", children.updates, i)
		}
	})
}

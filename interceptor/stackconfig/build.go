// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package stackconfig

import (
	"fmt"
	"maps"
	"reflect"
	"slices"
	"strings"

	"google.golang.org/protobuf/proto"

	"github.com/belfry-go/belfry/interceptor"
	"github.com/belfry-go/belfry/interceptor/budget"
	"github.com/belfry-go/belfry/internal/jsonfault"
	configv1 "github.com/belfry-go/belfry/proto/belfry/config/v1"
)

// built holds the layers and budgets of one config. It is immutable once it is in force;
// its layers change when the next built takes them over.
type built struct {
	config  *configv1.Stack
	routes  routes
	entries []*entry
	shared  map[string]*layer
	budgets map[string]*spending // "" is the one for all.
}

type entry struct {
	patterns []string
	layers   []*layer // References to shared and provided ones included.
	order    string   // As interceptor.Stack prints it.
}

// layer is a layer of a config, or a reference to one that the program provides.
type layer struct {
	definition        // Empty if it is provided.
	kind       string // The JSON name of the field that holds it; empty if it is provided.
	name       string
	path       string
	shared     bool // It is one of those that entries refer to.
	value      interceptor.Layer
	kept       bool // The value is that of a layer of the previous config.
}

// spending is a budget and its config.
type spending struct {
	path   string
	config budget.Config
	value  *budget.Budget
	kept   bool
}

// build makes the layers of b.config, all of them new.
func (b *built) build(opts *options) error {
	if err := b.buildBudgets(opts); err != nil {
		return err
	}
	b.shared = map[string]*layer{}
	for _, name := range slices.Sorted(maps.Keys(b.config.GetSharedLayers())) {
		m := b.config.GetSharedLayers()[name]
		path := fmt.Sprintf("sharedLayers[%q]", name)
		switch {
		case name == "":
			return wrong(path, "the name is empty, must not be")
		case m.GetName() != "":
			return wrong(path+".name", "%q, must not be set: the name is that of the shared layer", m.GetName())
		case m.GetShared() != "" || m.GetProvided() != "":
			return wrong(path, "refers to another layer, must be one")
		}
		l, err := b.newLayer(m, path, name, opts)
		if err != nil {
			return err
		}
		l.shared = true
		b.shared[name] = l
	}
	b.routes = routes{}
	for i, m := range b.config.GetMethodConfig() {
		patterns, err := b.routes.addNames(i, m.GetName())
		if err != nil {
			return err
		}
		e := &entry{patterns: patterns}
		if err := b.buildEntry(e, m, fmt.Sprintf("methodConfig[%d].layers", i), opts); err != nil {
			return err
		}
		b.entries = append(b.entries, e)
	}
	return nil
}

func (b *built) buildBudgets(opts *options) error {
	b.budgets = map[string]*spending{}
	add := func(name, path string, m *configv1.Budget) (err error) {
		src := source{opts: opts, path: path}
		s := &spending{path: path}
		src.read(m.ProtoReflect(), reflect.ValueOf(&s.config).Elem(), "")
		if src.err != nil {
			return src.err
		}
		if s.value, err = budget.New(s.config); err != nil {
			return inLayer(path, m.ProtoReflect().Descriptor(), err)
		}
		b.budgets[name] = s
		return nil
	}
	if err := add("", "budget", b.config.GetBudget()); err != nil {
		return err
	}
	for _, name := range slices.Sorted(maps.Keys(b.config.GetBudgets())) {
		path := fmt.Sprintf("budgets[%q]", name)
		if name == "" {
			return wrong(path, "the name is empty, must not be")
		}
		if err := add(name, path, b.config.GetBudgets()[name]); err != nil {
			return err
		}
	}
	return nil
}

// newLayer makes a layer of data.
func (b *built) newLayer(m *configv1.Layer, path, name string, opts *options) (*layer, error) {
	oneof := m.ProtoReflect().Descriptor().Oneofs().ByName("kind")
	fd := m.ProtoReflect().WhichOneof(oneof)
	if fd == nil {
		return nil, wrong(path, "no kind, must be exactly one of %s", jsonfault.Names(oneof.Fields()))
	}
	l := &layer{kind: fd.JSONName(), name: name, path: path}
	src := source{opts: opts, budgets: b.budgets, name: name, path: jsonfault.Join(path, l.kind)}
	l.definition = kinds[l.kind](&src, m.ProtoReflect().Get(fd).Message())
	if src.err != nil {
		return nil, src.err
	}
	var err error
	if l.value, err = l.make(); err != nil {
		return nil, inLayer(src.path, fd.Message(), err)
	}
	return l, nil
}

// buildEntry makes the layers of an entry, or finds those that it refers to.
func (b *built) buildEntry(e *entry, m *configv1.MethodConfig, path string, opts *options) error {
	type reference struct{ field, name string }
	seen := map[reference]bool{}
	for j, m := range m.GetLayers() {
		path := fmt.Sprintf("%s[%d]", path, j)
		var l *layer
		ref := reference{"name", m.GetName()}
		switch k := m.GetKind().(type) {
		case *configv1.Layer_Shared:
			l = b.shared[k.Shared]
			if l == nil {
				return wrong(path+".shared", "%q, must be the name of a layer in sharedLayers", k.Shared)
			}
			ref = reference{"shared", k.Shared}
		case *configv1.Layer_Provided:
			v, _ := opts.supplied[supply{"WithLayer", k.Provided}].(interceptor.Layer)
			if v == nil {
				return wrong(path+".provided", "%q, must be a name that the program gave to WithLayer", k.Provided)
			}
			l = &layer{path: path, value: v}
			ref = reference{"provided", k.Provided}
		default:
			var err error
			if l, err = b.newLayer(m, path, m.GetName(), opts); err != nil {
				return err
			}
		}
		if ref.field != "name" && m.GetName() != "" {
			return wrong(path+".name", "%q, must not be set: the name is that of the layer referred to", m.GetName())
		}
		if ref.name != "" && seen[ref] {
			return wrong(path+"."+ref.field, "%q, must stand once in an entry", ref.name)
		}
		seen[ref] = true
		e.layers = append(e.layers, l)
	}
	return nil
}

// takeOver gives layers and budgets of b the values of those of old. It does not change
// old.
func (b *built) takeOver(old *built) {
	for name, s := range b.budgets {
		if o := old.budgets[name]; o != nil {
			s.value, s.kept = o.value, true
		}
	}
	for name, l := range b.shared {
		l.takeOver(old.shared[name])
	}
	// An entry takes over from an entry that shares a name with it, of several from the
	// one whose shared name is first in both.
	type pair struct {
		entry, old *entry
		rank       int
	}
	var pairs []pair
	for _, e := range b.entries {
		for i, p := range e.patterns {
			if k, ok := old.routes[p]; ok {
				o := old.entries[k]
				pairs = append(pairs, pair{e, o, i + slices.Index(o.patterns, p)})
			}
		}
	}
	slices.SortStableFunc(pairs, func(a, b pair) int { return a.rank - b.rank })
	done := map[*entry]bool{}
	for _, p := range pairs {
		if !done[p.entry] && !done[p.old] && p.entry.takeOver(p.old) {
			done[p.entry], done[p.old] = true, true
		}
	}
}

// takeOver gives the layers of e the values of those of o: by name and kind, or by order
// where there are no names. It reports whether there were any.
func (e *entry) takeOver(o *entry) (any bool) {
	type identity struct {
		kind, name string
		n          int
	}
	own := func(e *entry) map[identity]*layer {
		m := map[identity]*layer{}
		for _, l := range e.layers {
			if l.kind == "" || l.shared {
				continue
			}
			id := identity{kind: l.kind, name: l.name}
			for m[id] != nil {
				id.n++
			}
			m[id] = l
		}
		return m
	}
	before := own(o)
	for id, l := range own(e) {
		if l.takeOver(before[id]) {
			any = true
		}
	}
	return any
}

// takeOver gives l the value of o if that can be updated to l's config; o may be nil.
func (l *layer) takeOver(o *layer) bool {
	if o == nil || l.kind != o.kind || !proto.Equal(l.fixed, o.fixed) {
		return false
	}
	l.value, l.kept = o.value, true
	return true
}

// lists returns the layers of each entry, and last those of calls that no entry matches,
// each with the observer if there is one. The error names the entries that cannot be
// stacks.
func (b *built) lists(observer interceptor.Layer) ([][]interceptor.Layer, error) {
	var observers []interceptor.Layer
	if observer != nil {
		observers = []interceptor.Layer{observer}
	}
	var lists [][]interceptor.Layer
	for i, e := range b.entries {
		list := slices.Clone(observers)
		var names []string
		for _, l := range e.layers {
			list = append(list, l.value)
			names = append(names, fmt.Sprint(l.value))
		}
		specs := make([]interceptor.Spec, len(list))
		for j, l := range list {
			specs[j] = l
		}
		if _, err := interceptor.NewStack(specs...); err != nil {
			return nil, &Error{Field: fmt.Sprintf("methodConfig[%d].layers", i), Err: err}
		}
		e.order = "[" + strings.Join(names, " > ") + "]"
		lists = append(lists, list)
	}
	return append(lists, observers), nil
}

// own returns the layers that are made of data.
func (b *built) own() (own []*layer) {
	for _, name := range slices.Sorted(maps.Keys(b.shared)) {
		own = append(own, b.shared[name])
	}
	for _, e := range b.entries {
		for _, l := range e.layers {
			if l.kind != "" && !l.shared {
				own = append(own, l)
			}
		}
	}
	return own
}

// apply updates the layers and budgets that were taken over. Their configs are valid,
// because build made a new layer of each.
func (b *built) apply() {
	for _, s := range b.budgets {
		if s.kept {
			report(s.path, s.value.Update(s.config))
		}
	}
	for _, l := range b.own() {
		if l.kept {
			report(l.path, l.update(l.value))
		}
	}
}

// report logs that a layer refused a config with which one can be made. That does not
// happen.
func report(path string, err error) {
	if err != nil {
		logger.Errorf("stackconfig: %s: %v", path, err)
	}
}

// retire admits the calls that wait in layers of old that are in no list any more, and
// returns the changes.
func (b *built) retire(old *built) (c Changes) {
	live := map[interceptor.Layer]bool{}
	for _, l := range b.own() {
		live[l.value] = true
		if !l.kept {
			c.Began = append(c.Began, l.path)
		}
	}
	for _, l := range old.own() {
		if live[l.value] {
			continue
		}
		c.Ended = append(c.Ended, l.path)
		if f := lift[l.kind]; f != nil {
			report(l.path, f(l.value))
		}
	}
	for _, s := range b.budgets {
		if !s.kept {
			c.Began = append(c.Began, s.path)
		}
	}
	for name, s := range old.budgets {
		if b.budgets[name] == nil {
			c.Ended = append(c.Ended, s.path)
		}
	}
	slices.Sort(c.Began)
	slices.Sort(c.Ended)
	return c
}

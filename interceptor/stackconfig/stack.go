// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package stackconfig

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"sync/atomic"

	"google.golang.org/grpc"
	"google.golang.org/protobuf/proto"

	"github.com/belfry-go/belfry/interceptor"
	"github.com/belfry-go/belfry/interceptor/breaker"
	"github.com/belfry-go/belfry/interceptor/budget"
	"github.com/belfry-go/belfry/interceptor/retry"
	"github.com/belfry-go/belfry/internal/check"
	configv1 "github.com/belfry-go/belfry/proto/belfry/config/v1"
)

// An Option supplies what is not data.
type Option func(*options)

type options struct {
	observer      interceptor.Observer
	layers        map[string]interceptor.Layer
	keys          map[string]keyFunc
	costs         map[string]func(context.Context, *interceptor.Call) int64
	priorities    map[string]func(context.Context, *interceptor.Call) int
	idempotent    map[string]func(method string) bool
	policies      map[string]retry.Policy
	breakerChange func(layer string, c breaker.Change)
	errs          *check.Errors
}

// supply enters v under a name, which may be used once.
func supply[V any](o *options, option string, to *map[string]V, name string, v V, isNil bool) {
	_, twice := (*to)[name]
	o.errs.Require(name != "", option, name, "must not be empty")
	o.errs.Require(!isNil, fmt.Sprintf("%s[%q]", option, name), nil, "must not be nil")
	o.errs.Require(!twice, option, name, "must be given once")
	if *to == nil {
		*to = map[string]V{}
	}
	(*to)[name] = v
}

// WithObserver lets o see all calls, those without layers included.
func WithObserver(o interceptor.Observer) Option {
	return func(opts *options) {
		opts.errs.NotNil(o == nil, "WithObserver", "an observer")
		opts.observer = o
	}
}

// WithLayer supplies a layer that configs refer to with {"provided": NAME}, for
// what cannot be said with data, such as a filter.
func WithLayer(name string, l interceptor.Layer) Option {
	return func(o *options) { supply(o, "WithLayer", &o.layers, name, l, l == nil) }
}

// WithKeyFunc supplies a function that rate limits and breakers refer to with
// "keyFunc". It is called for each admission, concurrently, and must not block.
func WithKeyFunc(name string, f func(ctx context.Context, c *interceptor.Call) string) Option {
	return func(o *options) { supply(o, "WithKeyFunc", &o.keys, name, f, f == nil) }
}

// WithCostFunc supplies a function that concurrency limits refer to with
// "costFunc"; see [concurrency.WithCost].
//
// [concurrency.WithCost]: https://pkg.go.dev/github.com/belfry-go/belfry/interceptor/concurrency#WithCost
func WithCostFunc(name string, f func(ctx context.Context, c *interceptor.Call) int64) Option {
	return func(o *options) { supply(o, "WithCostFunc", &o.costs, name, f, f == nil) }
}

// WithPriorityFunc supplies a function that concurrency limits refer to with
// "priorityFunc"; see [concurrency.WithPriority].
//
// [concurrency.WithPriority]: https://pkg.go.dev/github.com/belfry-go/belfry/interceptor/concurrency#WithPriority
func WithPriorityFunc(name string, f func(ctx context.Context, c *interceptor.Call) int) Option {
	return func(o *options) { supply(o, "WithPriorityFunc", &o.priorities, name, f, f == nil) }
}

// WithIdempotentFunc supplies a function that retries refer to with
// "idempotentFunc"; see [retry.WithIdempotent].
func WithIdempotentFunc(name string, f func(method string) bool) Option {
	return func(o *options) { supply(o, "WithIdempotentFunc", &o.idempotent, name, f, f == nil) }
}

// WithRetryPolicy supplies a policy that retries refer to with "policy"; see
// [retry.WithPolicy].
func WithRetryPolicy(name string, p retry.Policy) Option {
	return func(o *options) { supply(o, "WithRetryPolicy", &o.policies, name, p, p == nil) }
}

// WithBreakerChange has f called at each change of a breaker's state, with the
// name of the layer; see [breaker.WithOnStateChange].
func WithBreakerChange(f func(layer string, c breaker.Change)) Option {
	return func(o *options) {
		o.errs.NotNil(f == nil, "WithBreakerChange", "a function")
		o.breakerChange = f
	}
}

// A Stack is an [interceptor.Stack] that is made from a config and changed by
// other ones. All its methods may be called concurrently.
type Stack struct {
	stack *interceptor.Stack
	opts  options
	built atomic.Pointer[built]

	// mu serialises Update. What layers lock is locked under it.
	mu sync.Mutex
}

// built is what a config has become. It is not changed, but its layers are when
// another built takes them over.
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

type layer struct {
	*definition // Nil if the layer is provided.
	path        string
	shared      bool // It is one of those that entries refer to.
	message     *configv1.Layer
	value       interceptor.Layer
	old         *layer // The layer whose value this one has taken over; nil if none.
}

// spending is a budget and its config.
type spending struct {
	path   string
	config budget.Config
	value  *budget.Budget
	old    *spending
}

// NewStackFromConfig makes a Stack. Whatever is wrong with the config is an
// [*Error] that names the field. What is wrong with an option is an
// [*interceptor.ConfigError].
func NewStackFromConfig(config *configv1.Stack, opts ...Option) (*Stack, error) {
	s := &Stack{opts: options{errs: check.Of("stackconfig")}}
	for _, o := range opts {
		o(&s.opts)
	}
	err := s.opts.errs.Err()
	if err != nil {
		return nil, err
	}
	if s.stack, err = interceptor.NewStack(); err != nil {
		return nil, err
	}
	s.built.Store(&built{})
	if err := s.Update(config); err != nil {
		return nil, err
	}
	return s, nil
}

// Update makes the Stack one of another config while calls run. Layers keep their
// state, as belfry.config.v1.Layer in the schema says. Calls that begin from now on
// go through the new layers, calls in flight end with the layers they began with;
// but what a layer that stays is configured anew with holds for them too. On an
// error, an [*Error], nothing has changed.
func (s *Stack) Update(config *configv1.Stack) error {
	if config == nil {
		return wrong("", "the config is nil")
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	old := s.built.Load()
	b := &built{config: proto.CloneOf(config)}
	if err := b.build(old, &s.opts); err != nil {
		return err
	}
	lists, err := b.lists(&s.opts)
	if err != nil {
		return err
	}
	if err := b.apply(); err != nil {
		return err
	}
	nowhere := len(b.entries)
	choose := func(method string) int {
		if i := b.routes.choose(method); i >= 0 {
			return i
		}
		return nowhere
	}
	if err := s.stack.ReplaceByMethod(choose, lists...); err != nil {
		b.revert()
		return &Error{Err: err}
	}
	s.built.Store(b.release())
	return nil
}

// build makes the layers of b.config, and finds what they take over of old.
func (b *built) build(old *built, opts *options) error {
	if err := b.makeBudgets(old, opts); err != nil {
		return err
	}
	budgets := make(map[string]*budget.Budget, len(b.budgets))
	for name, s := range b.budgets {
		budgets[name] = s.value
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
		l, err := newLayer(m, path, name, opts, budgets)
		if err != nil {
			return err
		}
		l.shared = true
		if o := old.shared[name]; o != nil && o.same(l) {
			l.takeOver(o)
		}
		b.shared[name] = l
	}
	b.routes = routes{}
	claimed := map[*entry]bool{}
	for i, m := range b.config.GetMethodConfig() {
		patterns, err := b.routes.addNames(i, m.GetName())
		if err != nil {
			return err
		}
		e := &entry{patterns: patterns}
		if err := e.build(m, fmt.Sprintf("methodConfig[%d].layers", i), b, opts, budgets); err != nil {
			return err
		}
		for _, p := range patterns {
			k, ok := old.routes[p]
			if ok && !claimed[old.entries[k]] {
				claimed[old.entries[k]] = true
				e.takeOver(old.entries[k])
				break
			}
		}
		b.entries = append(b.entries, e)
	}
	return nil
}

func (b *built) makeBudgets(old *built, opts *options) error {
	b.budgets = map[string]*spending{}
	add := func(name, path string, m *configv1.Budget) error {
		src := source{opts: opts, path: path}
		c, err := src.budget(m)
		if err != nil {
			return err
		}
		s := &spending{path: path, config: c}
		if s.value, err = budget.New(c); err != nil {
			return inLayer(path, (*configv1.Budget)(nil).ProtoReflect().Descriptor(), err)
		}
		if s.old = old.budgets[name]; s.old != nil {
			s.value = s.old.value
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
func newLayer(m *configv1.Layer, path, name string, opts *options, budgets map[string]*budget.Budget) (*layer, error) {
	src := source{opts: opts, budgets: budgets, name: name, path: path}
	fd := kindOf(m)
	if fd != nil {
		src.path = join(path, fd.JSONName())
	}
	d, err := src.define(m)
	if err != nil {
		return nil, err
	}
	d.kind = fd.JSONName()
	l := &layer{definition: d, path: src.path, message: m}
	if l.value, err = d.make(); err != nil {
		return nil, inLayer(src.path, fd.Message(), err)
	}
	return l, nil
}

// same reports whether l, which stands in the place of o, may have its state.
func (l *layer) same(o *layer) bool { return l.kind == o.kind && l.fixed == o.fixed }

func (l *layer) takeOver(o *layer) {
	l.old, l.value = o, o.value
}

// build makes the layers of an entry.
func (e *entry) build(m *configv1.MethodConfig, path string, b *built, opts *options, budgets map[string]*budget.Budget) error {
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
			v := opts.layers[k.Provided]
			if v == nil {
				return wrong(path+".provided", "%q, must be a name that the program gave to WithLayer", k.Provided)
			}
			l = &layer{path: path, message: m, value: v}
			ref = reference{"provided", k.Provided}
		default:
			var err error
			if l, err = newLayer(m, path, m.GetName(), opts, budgets); err != nil {
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

// takeOver lets the layers of e take over the values of those of o: by name and
// kind, or where there are no names, in order.
func (e *entry) takeOver(o *entry) {
	type identity struct {
		kind, name string
		n          int
	}
	own := func(e *entry) map[identity]*layer {
		m := map[identity]*layer{}
		for _, l := range e.layers {
			if l.definition == nil || l.shared {
				continue
			}
			id := identity{kind: l.kind, name: l.message.GetName()}
			for m[id] != nil {
				id.n++
			}
			m[id] = l
		}
		return m
	}
	before := own(o)
	for id, l := range own(e) {
		if o := before[id]; o != nil && o.same(l) {
			l.takeOver(o)
		}
	}
}

// lists returns the layers of each entry, and at the end those of calls that no
// entry matches, and says which entries cannot be stacks.
func (b *built) lists(opts *options) ([][]interceptor.Layer, error) {
	var lists [][]interceptor.Layer
	for i, e := range b.entries {
		var list []interceptor.Layer
		for _, l := range e.layers {
			list = append(list, l.value)
		}
		alone, err := interceptor.NewStack(list...)
		if err != nil {
			return nil, &Error{Field: fmt.Sprintf("methodConfig[%d].layers", i), Err: err}
		}
		e.order = alone.String()
		lists = append(lists, list)
	}
	lists = append(lists, nil)
	if opts.observer != nil {
		for i := range lists {
			lists[i] = slices.Insert(lists[i], 0, interceptor.Observe(opts.observer))
		}
	}
	return lists, nil
}

// own calls f for each layer that is made of data, until it returns false.
func (b *built) own(f func(*layer) bool) {
	for _, name := range slices.Sorted(maps.Keys(b.shared)) {
		if !f(b.shared[name]) {
			return
		}
	}
	for _, e := range b.entries {
		for _, l := range e.layers {
			if l.definition != nil && !l.shared && !f(l) {
				return
			}
		}
	}
}

// apply gives the configs to the layers that were taken over. They have been found
// good already, by making a layer of each that is not used, so it is not expected
// to fail; if it does all is as it was.
func (b *built) apply() error {
	for _, s := range b.budgets {
		if s.old != nil {
			if err := s.value.Update(s.config); err != nil {
				b.revert()
				return inLayer(s.path, (*configv1.Budget)(nil).ProtoReflect().Descriptor(), err)
			}
		}
	}
	var err error
	b.own(func(l *layer) bool {
		if l.old != nil {
			if e := l.update(l.value); e != nil {
				err = inLayer(l.path, kindOf(l.message).Message(), e)
			}
		}
		return err == nil
	})
	if err != nil {
		b.revert()
	}
	return err
}

// revert gives all that was taken over its old config back.
func (b *built) revert() {
	for _, s := range b.budgets {
		if s.old != nil {
			s.value.Update(s.old.config) // It was good before.
		}
	}
	b.own(func(l *layer) bool {
		if l.old != nil {
			l.old.update(l.value)
		}
		return true
	})
}

// release forgets what was before, so that it is not kept for ever.
func (b *built) release() *built {
	for _, s := range b.budgets {
		s.old = nil
	}
	b.own(func(l *layer) bool {
		l.old = nil
		return true
	})
	return b
}

// Config returns a copy of the config that holds.
func (s *Stack) Config() *configv1.Stack { return proto.CloneOf(s.built.Load().config) }

// DialOptions returns the options for grpc.NewClient, see
// [interceptor.Stack.DialOptions].
func (s *Stack) DialOptions() []grpc.DialOption { return s.stack.DialOptions() }

// UnaryClientInterceptor returns the unary half, to place it in a chain of others.
func (s *Stack) UnaryClientInterceptor() grpc.UnaryClientInterceptor {
	return s.stack.UnaryClientInterceptor()
}

// StreamClientInterceptor returns the streaming half, to place it in a chain of
// others.
func (s *Stack) StreamClientInterceptor() grpc.StreamClientInterceptor {
	return s.stack.StreamClientInterceptor()
}

// Wrap returns conn with the stack in front, see [interceptor.Stack.Wrap].
func (s *Stack) Wrap(conn grpc.ClientConnInterface) grpc.ClientConnInterface {
	return s.stack.Wrap(conn)
}

// InFlight returns how many calls are in the stack: waiting, running, or streams
// that have not ended.
func (s *Stack) InFlight() int { return s.stack.InFlight() }

// Drain refuses new calls from now on and waits until those in flight have ended,
// see [interceptor.Stack.Drain].
func (s *Stack) Drain(ctx context.Context) error { return s.stack.Drain(ctx) }

// String prints the methods and the order of their layers, the outermost first,
// one entry a line. A shared layer is printed by its name.
func (s *Stack) String() string {
	b := s.built.Load()
	lines := make([]string, len(b.entries))
	for i, e := range b.entries {
		patterns := make([]string, len(e.patterns))
		for j, p := range e.patterns {
			patterns[j] = shown(p)
		}
		lines[i] = strings.Join(patterns, ", ") + ": " + e.order
	}
	return strings.Join(lines, "\n")
}

// Layer returns a layer of the config that holds, to look at its state: the shared
// layer of the name if there is one, and otherwise the first layer that was given
// the name in any entry; nil if there is none.
//
//	limit, ok := stack.Layer("all").(*concurrency.Layer)
func (s *Stack) Layer(name string) interceptor.Layer {
	b := s.built.Load()
	if l := b.shared[name]; l != nil {
		return l.value
	}
	for _, e := range b.entries {
		for _, l := range e.layers {
			if name != "" && l.message.GetName() == name {
				return l.value
			}
		}
	}
	return nil
}

// Budget returns a budget of the config that holds, the one for all if name is
// empty; nil if there is none of the name.
func (s *Stack) Budget(name string) *budget.Budget {
	if b := s.built.Load().budgets[name]; b != nil {
		return b.value
	}
	return nil
}

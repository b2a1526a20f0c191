// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package buffer

import (
	"context"
	"fmt"
	"math"
	"sync"
	"sync/atomic"
	"time"

	"github.com/belfry-go/belfry/interceptor"
	"github.com/belfry-go/belfry/internal/check"
	"github.com/belfry-go/belfry/internal/waitlist"
)

// Config configures a [Layer].
type Config struct {
	// Size is how many calls may wait, from 1 to 2147483647. There is no default.
	Size int
	// MaxWait is how long a call waits at most; 0 is no bound but the deadlines of
	// the call and of layers outside. It must not be negative.
	MaxWait time.Duration
}

// NewLayer returns a buffer with this configuration, as [New] does.
func (cfg Config) NewLayer() (interceptor.Layer, error) {
	l, err := New(cfg)
	if err != nil {
		return nil, err
	}
	return l, nil
}

func (cfg Config) check(errs *check.Errors) {
	check.Required(errs, "Size", cfg.Size, check.From(1, math.MaxInt32))
	check.Zero(errs, "MaxWait", cfg.MaxWait, check.Positive, "no bound")
}

// An Option sets what is not plain data.
type Option func(*options)

type options struct {
	errs     *check.Errors
	name     string
	priority interceptor.PriorityFunc
}

// WithName names the layer in refusals, metrics and the stack's String. The
// default is "buffer"; it must not be empty.
func WithName(name string) Option { return func(o *options) { o.name = name } }

// WithPriority sets how the priority of a call is found that has to wait;
// [interceptor.ContextPriority] by default. If the buffer is full, a call of a
// higher priority takes the slot of one of the lowest. Use the same function for the
// limits inside. It is called concurrently, once for each call that has to wait.
func WithPriority(priority interceptor.PriorityFunc) Option {
	return func(o *options) {
		o.errs.NotNil(priority == nil, "WithPriority", "a function")
		o.priority = priority
	}
}

// A Layer is a buffer. It is safe for concurrent use, also by several stacks,
// which share its slots. A call that need not wait, or is refused, takes no lock
// and costs no allocation.
type Layer struct {
	interceptor.GateOnly

	// Set by New and not changed.
	name     string
	priority interceptor.PriorityFunc
	evicted  *interceptor.Refusal

	settings atomic.Pointer[settings]

	// floor is what the weight of a call must exceed to get a slot: less than any
	// weight while there is a free slot, and otherwise the least among those that wait.
	// It is one word, so that a call is refused only if at one moment the buffer was
	// full of calls that do not rank lower. Set under mu.
	floor atomic.Int64

	// mu guards the list and what is in it. It is taken while gates inside hold their
	// locks, and no lock is taken under it.
	mu    sync.Mutex
	calls waitlist.List[*slot]
}

// settings are not changed.
type settings struct {
	Config
	full *interceptor.Refusal
}

// New returns a buffer. An error is a [*interceptor.ConfigError], or several joined.
func New(cfg Config, opts ...Option) (*Layer, error) {
	o := options{errs: check.Of("buffer"), name: "buffer", priority: interceptor.ContextPriority}
	for _, opt := range opts {
		opt(&o)
	}
	o.errs.Name(o.name)
	l := &Layer{name: o.name, priority: o.priority}
	l.evicted = interceptor.Refuse(l.name, interceptor.ReasonQueueFull, "evicted from the wait queue by a call that goes first")
	if err := l.update(cfg, o.errs); err != nil {
		return nil, err
	}
	return l, nil
}

// NewLayer returns the buffer itself.
func (l *Layer) NewLayer() (interceptor.Layer, error) { return l, nil }

// Update changes the configuration while calls wait. They keep their slots, also
// beyond a smaller Size, and the MaxWait they began with. On an error nothing has
// changed.
func (l *Layer) Update(cfg Config) error { return l.update(cfg, check.Of("buffer")) }

func (l *Layer) update(cfg Config, errs *check.Errors) error {
	cfg.check(errs)
	if err := errs.Err(); err != nil {
		return err
	}
	full := interceptor.Refuse(l.name, interceptor.ReasonQueueFull, fmt.Sprintf("wait queue is full (%d waiting)", cfg.Size))
	l.mu.Lock()
	defer l.mu.Unlock()
	l.settings.Store(&settings{cfg, full})
	l.setFloorLocked()
	return nil
}

// Config returns the configuration as it was given to New or Update.
func (l *Layer) Config() Config { return l.settings.Load().Config }

// Waiting returns how many slots are taken.
func (l *Layer) Waiting() int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.calls.Len()
}

// String returns the layer's name.
func (l *Layer) String() string { return l.name }

// Traits says that the buffer decides how long calls wait inside it.
func (l *Layer) Traits() interceptor.Traits { return interceptor.Governs }

// WrapGate returns the gate. A stack calls WrapGateOver instead.
func (l *Layer) WrapGate(inner interceptor.Gate) interceptor.Gate { return l.WrapGateOver(inner, 0) }

// WrapGateOver returns the gate. waits is how many of the gates inside can wait and
// pass the slot, 0 if that is not known: a call then keeps its slot until the gates
// inside have answered.
func (l *Layer) WrapGateOver(inner interceptor.Gate, waits int) interceptor.Gate {
	if waits == 0 {
		waits = math.MaxInt32
	}
	return &gate{layer: l, inner: inner, waits: int32(waits)}
}

type gate struct {
	layer *Layer
	inner interceptor.Gate
	waits int32
}

// Admit asks for capacity first and for a slot second, so that as many calls can
// pass at a time as the layers inside have capacity for, however few slots there are.
func (g *gate) Admit(ctx context.Context, a *interceptor.Admission, w interceptor.Wait) error {
	l := g.layer
	mayWait, err := a.Try(ctx, g.inner)
	switch {
	case err == nil:
		return nil
	case ctx.Err() != nil:
		return interceptor.Ended(ctx, l.name)
	case !mayWait || a.Internals().NeverWaits():
		return err
	}
	rank := waitlist.Rank{Priority: l.priority(ctx, a), Further: a.Attempt() > 0}
	if a.Internals().Expendable() { // No other call is to lose its slot for it.
		rank = waitlist.Rank{Priority: math.MinInt}
	}
	if weight(rank) <= l.floor.Load() {
		return l.settings.Load().full
	}
	return g.wait(ctx, a, w, rank)
}

// wait lets the call wait inside, in a slot.
func (g *gate) wait(ctx context.Context, a *interceptor.Admission, w interceptor.Wait, rank waitlist.Rank) error {
	l, in := g.layer, a.Internals()
	ctx, evict := context.WithCancelCause(ctx)
	defer evict(nil)
	s := &slot{layer: l, rank: rank, evict: evict}
	s.left.Store(g.waits)
	s.node.Value = s
	set, evicted, ok := l.enter(s)
	if !ok {
		return set.full
	}
	if evicted != nil {
		evicted.evict(l.evicted)
	}
	defer l.free(s)
	s.outer = in.SetSlot(s)
	defer in.SetSlot(s.outer)
	to := interceptor.Forever
	if set.MaxWait > 0 {
		to = interceptor.For(set.MaxWait)
	}
	err := g.inner.Admit(ctx, a, in.Widen(w, to))
	if err != nil && context.Cause(ctx) == error(l.evicted) {
		return l.evicted // Whatever a gate makes of it that does not ask for the cause.
	}
	return err
}

// enter gives s a slot. If all are taken it takes the one of the call that ranks
// last, if that ranks lower, and returns that to be evicted.
func (l *Layer) enter(s *slot) (set *settings, evicted *slot, ok bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	set = l.settings.Load()
	if weight(s.rank) <= l.floor.Load() {
		return set, nil, false
	}
	if l.calls.Len() >= set.Size {
		evicted = l.calls.Last(false).Value
		l.calls.Remove(&evicted.node)
	}
	l.calls.Push(&s.node, s.rank)
	l.setFloorLocked()
	return set, evicted, true
}

// free frees s, if it is taken.
func (l *Layer) free(s *slot) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.calls.Remove(&s.node) {
		l.setFloorLocked()
	}
}

func (l *Layer) setFloorLocked() {
	floor := int64(math.MinInt64)
	if l.calls.Len() >= l.settings.Load().Size {
		floor = weight(l.calls.Last(false).Value.rank)
	}
	l.floor.Store(floor)
}

// weight is a rank as a number: more is better. Priorities beyond 2^61, either way,
// count as that.
func weight(r waitlist.Rank) int64 {
	const most = 1 << 61
	w := 2 * min(max(int64(r.Priority), -most), most)
	if r.Further {
		w++
	}
	return w
}

// slot is one of the buffer's slots, taken by one call.
type slot struct {
	// Set before it is taken, outer before the gates inside are asked.
	layer *Layer
	rank  waitlist.Rank
	evict context.CancelCauseFunc
	outer interceptor.Slot // That of a buffer further out; may be nil.

	left atomic.Int32 // How many gates that can wait have not passed the call yet.
	node waitlist.Node[*slot]
}

// Pass frees the slot if the last gate that can wait has passed the call. A buffer
// further out has the same gates inside, and others.
func (s *slot) Pass() {
	if s.left.Add(-1) == 0 {
		s.layer.free(s)
	}
	if s.outer != nil {
		s.outer.Pass()
	}
}

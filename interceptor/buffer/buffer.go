// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package buffer

import (
	"context"
	"fmt"
	"iter"
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
	// MaxWait is the longest that a call waits; 0 means no bound besides the deadlines
	// of the call and of layers outside. It must not be negative.
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

// WithPriority sets the function that returns the priority of a call that has to wait;
// by default [interceptor.ContextPriority]. If the buffer is full, a call of a higher
// priority takes the slot of one of the lowest. Use the same function for the limits
// inside. It is called concurrently, once for each call that has to wait.
func WithPriority(priority interceptor.PriorityFunc) Option {
	return func(o *options) {
		o.errs.NotNil(priority == nil, "WithPriority", "a function")
		o.priority = priority
	}
}

// A Layer is a buffer. It is safe for concurrent use, also by several stacks, which
// share its slots. A call that does not have to wait, or is refused, takes no lock and
// costs no allocation.
type Layer struct {
	interceptor.GateOnly

	// Set by New and not changed.
	name     string
	priority interceptor.PriorityFunc
	evicted  *interceptor.Refusal

	settings atomic.Pointer[settings]

	// floor is the weight that a call must exceed to get a slot: less than any weight
	// while there is a free slot, else the least of those that wait. It is one word, so
	// that a call is refused only if at one moment the buffer was full of calls that do
	// not rank lower. It is set under mu.
	floor atomic.Int64

	// mu guards the list and its elements. It is taken while gates inside hold their
	// locks, and no lock is taken under it.
	mu    sync.Mutex
	calls waitlist.List[*slot]
}

// settings are immutable.
type settings struct {
	Config
	full *interceptor.Refusal
}

// New returns a buffer. An error is a [*interceptor.ConfigError], or several joined.
func New(cfg Config, opts ...Option) (*Layer, error) {
	o := options{errs: check.Of("buffer"), name: "buffer", priority: interceptor.ContextPriority}
	check.Options(o.errs, &o, opts)
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

// Update changes the configuration while calls wait. They keep their slots, even beyond
// a smaller Size, and the MaxWait that they started with. After an error nothing has
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

// Readings yields how many calls wait.
func (l *Layer) Readings() iter.Seq[interceptor.Reading] {
	return func(yield func(interceptor.Reading) bool) {
		yield(interceptor.Reading{Layer: l.name, What: interceptor.ReadingWaiting, Value: float64(l.Waiting())})
	}
}

// WrapGate returns the gate. A stack calls WrapGateOver instead.
func (l *Layer) WrapGate(inner interceptor.Gate) interceptor.Gate { return l.WrapGateOver(inner, 0) }

// WrapGateOver returns the gate. waits is how many of the gates inside can wait, each of
// which passes the slot once. It is 0 if that is not known; then a call keeps its slot
// until the gates inside have answered.
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

// Admit asks for capacity first and for a slot second, so that few slots never limit how
// many calls run at a time.
func (g *gate) Admit(ctx context.Context, a *interceptor.Admission, w interceptor.Wait) error {
	l := g.layer
	// A further attempt made inside waits in no slot of this buffer, so it may not wait.
	mayWait, err := a.Try(ctx, g.inner, interceptor.None)
	switch {
	case err == nil:
		return nil
	case ctx.Err() != nil:
		return interceptor.Ended(ctx, l.name)
	case !mayWait || a.Internals().NeverWaits():
		return err
	}
	rank := waitlist.Rank{Priority: l.priority(ctx, a), Further: a.Attempt() > 0}
	if a.Internals().Expendable() { // It must not push another call out of its slot.
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
		return l.evicted // Even if the gate inside returned another error for it.
	}
	return err
}

// enter gives s a slot. If all are taken, it takes the slot of the call that ranks last,
// provided that it ranks lower than s, and returns that one to be evicted.
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

// weight returns a rank as a number: higher goes first. Priorities beyond ±2^61 are
// clamped.
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

// Pass frees the slot when the last gate that can wait has let the call through. It also
// passes the slot of a buffer further out, which has the same gates inside.
func (s *slot) Pass() {
	if s.left.Add(-1) == 0 {
		s.layer.free(s)
	}
	if s.outer != nil {
		s.outer.Pass()
	}
}

// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package failfast

import (
	"context"
	"iter"
	"sync"
	"sync/atomic"
	"time"

	"github.com/belfry-go/belfry/interceptor"
	"github.com/belfry-go/belfry/internal/check"
)

// DefaultAfter is the default of Config.After. It is linkerd's.
const DefaultAfter = 3 * time.Second

// Config configures a [Layer]. The zero Config is the default.
type Config struct {
	// After is the longest that a call waits, and how long the layer lets calls wait
	// without admitting any before it fails all of them. 3 s if zero; it must not be
	// negative.
	After time.Duration
}

// NewLayer returns a fail-fast with this configuration, as [New] does.
func (cfg Config) NewLayer() (interceptor.Layer, error) {
	l, err := New(cfg)
	if err != nil {
		return nil, err
	}
	return l, nil
}

// after checks cfg, and returns After with its default filled in.
func (cfg Config) after(errs *check.Errors) time.Duration {
	check.Default(errs, "After", &cfg.After, check.Positive, DefaultAfter)
	return cfg.After
}

// An Option sets what is not plain data.
type Option func(*options)

type options struct{ name string }

// WithName names the layer in refusals, metrics and the stack's String. The
// default is "failfast"; it must not be empty.
func WithName(name string) Option { return func(o *options) { o.name = name } }

// A Layer fails fast. It is safe for concurrent use, also by several stacks, which
// then fail together. Only calls that wait take a mutex. A call that does not wait, or
// fails at once, costs no lock and no allocation.
type Layer struct {
	interceptor.GateOnly

	// Set by New and not changed.
	name    string
	failing *interceptor.Refusal
	tooLong *interceptor.Refusal

	// failed says that nothing was admitted for too long. It is set under mu, and reset
	// by a call that is admitted.
	failed   atomic.Bool
	after    atomic.Int64 // A time.Duration. Written with mu held.
	waiting  atomic.Int64 // len(waiters)
	admitted atomic.Int64 // The Instant when a call was last admitted while others waited.

	// mu guards the fields below and the setting of failed. No lock of belfry is taken
	// under it.
	mu      sync.Mutex
	config  Config
	waiters map[*waiter]struct{}
	since   interceptor.Instant // When the first of the waiters began to wait.
	timer   *time.Timer         // Runs while somebody waits.
}

// waiter is a call that waits. cancel ends that.
type waiter struct{ cancel context.CancelCauseFunc }

// New returns a fail-fast. An error is a [*interceptor.ConfigError], or several
// joined.
func New(cfg Config, opts ...Option) (*Layer, error) {
	o := options{name: "failfast"}
	errs := check.Of("failfast")
	check.Options(errs, &o, opts)
	errs.Name(o.name)
	after := cfg.after(errs)
	if err := errs.Err(); err != nil {
		return nil, err
	}
	l := &Layer{name: o.name, config: cfg, waiters: make(map[*waiter]struct{})}
	l.after.Store(int64(after))
	l.failing = interceptor.Refuse(l.name, interceptor.ReasonFailFast, "no call was admitted for too long")
	l.tooLong = interceptor.Refuse(l.name, interceptor.ReasonFailFast, "the call waited for too long")
	return l, nil
}

// NewLayer returns the fail-fast itself.
func (l *Layer) NewLayer() (interceptor.Layer, error) { return l, nil }

// Update changes the configuration while calls wait. Each keeps the bound that it
// started with, and the new bound decides when all of them fail together. A layer that
// fails fast does so until a call is admitted. After an error nothing has changed.
func (l *Layer) Update(cfg Config) error {
	errs := check.Of("failfast")
	after := cfg.after(errs)
	if err := errs.Err(); err != nil {
		return err
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.config = cfg
	l.after.Store(int64(after))
	if len(l.waiters) > 0 {
		l.judgeLocked(interceptor.Now())
	}
	return nil
}

// Config returns the configuration as it was given to New or Update.
func (l *Layer) Config() Config {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.config
}

// Failing reports whether the layer fails fast.
func (l *Layer) Failing() bool { return l.failed.Load() }

// Waiting returns how many calls wait.
func (l *Layer) Waiting() int { return int(l.waiting.Load()) }

// String returns the layer's name.
func (l *Layer) String() string { return l.name }

// Traits says that it decides how long calls wait inside it.
func (l *Layer) Traits() interceptor.Traits { return interceptor.Governs }

// bound is how long a call waits at most.
func (l *Layer) bound() time.Duration { return time.Duration(l.after.Load()) }

// Readings yields whether calls are refused without waiting, and how many wait.
func (l *Layer) Readings() iter.Seq[interceptor.Reading] {
	return func(yield func(interceptor.Reading) bool) {
		failing := 0.0
		if l.Failing() {
			failing = 1
		}
		_ = yield(interceptor.Reading{Layer: l.name, What: interceptor.ReadingFailing, Value: failing}) &&
			yield(interceptor.Reading{Layer: l.name, What: interceptor.ReadingWaiting, Value: float64(l.Waiting())})
	}
}

// WrapGate returns the gate.
func (l *Layer) WrapGate(inner interceptor.Gate) interceptor.Gate {
	return &gate{layer: l, inner: inner}
}

type gate struct {
	layer *Layer
	inner interceptor.Gate
}

// Admit asks the layers inside without waiting first, in every state. The state decides
// only over calls that have to wait.
func (g *gate) Admit(ctx context.Context, a *interceptor.Admission, w interceptor.Wait) error {
	l := g.layer
	later := w // The further attempts of a call that need not wait are bounded as it is.
	if w != interceptor.None {
		later = w.Narrow(a.Now().Add(l.bound()).Wait())
	}
	mayWait, err := a.Try(ctx, g.inner, later)
	switch {
	case err == nil:
		l.ready(a)
		return nil
	case ctx.Err() != nil:
		return interceptor.Ended(ctx, l.name)
	case !mayWait:
		return err
	case l.failed.Load():
		return l.failing
	case w == interceptor.None:
		return err
	}
	return g.wait(ctx, a, w)
}

// wait lets the call wait inside.
func (g *gate) wait(ctx context.Context, a *interceptor.Admission, w interceptor.Wait) error {
	l := g.layer
	parked, done := a.Park(ctx) // Also for gates inside that do not park the call.
	defer done()
	waitCtx, cancel := context.WithCancelCause(parked)
	defer cancel(nil)
	me := &waiter{cancel: cancel}
	start := interceptor.Now()
	after, err := l.enter(me, start)
	if err != nil {
		return err
	}
	defer l.leave(me)
	bound := start.Add(after)
	err = g.inner.Admit(waitCtx, a, w.Narrow(bound.Wait()))
	switch {
	case err == nil:
		l.ready(a)
		return nil
	case parked.Err() != nil:
		if _, ok := interceptor.AsRefusal(err); ok {
			return err
		}
		return interceptor.Ended(parked, l.name)
	case waitCtx.Err() != nil:
		return l.failing
	}
	if now := interceptor.Now(); now >= bound && bound.Wait() < w {
		if l.judge(now) {
			return l.failing
		}
		return l.tooLong.Because(err, false)
	}
	return err
}

// ready records that a call was admitted.
func (l *Layer) ready(a *interceptor.Admission) {
	if l.waiting.Load() > 0 {
		l.admitted.Store(int64(a.Now()))
	}
	if l.failed.Load() {
		l.failed.Store(false)
	}
}

// enter lets w wait, unless the layer fails fast.
func (l *Layer) enter(w *waiter, now interceptor.Instant) (after time.Duration, err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.failed.Load() {
		return 0, l.failing
	}
	l.waiters[w] = struct{}{}
	l.waiting.Store(int64(len(l.waiters)))
	if len(l.waiters) == 1 {
		l.since = now
		l.timer = time.AfterFunc(l.bound(), l.expire)
	}
	return l.bound(), nil
}

// leave removes w from those that wait.
func (l *Layer) leave(w *waiter) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if _, waits := l.waiters[w]; !waits {
		return
	}
	delete(l.waiters, w)
	l.waiting.Store(int64(len(l.waiters)))
	if len(l.waiters) == 0 {
		l.timer.Stop()
	}
}

// expire is called by the timer.
func (l *Layer) expire() { l.judge(interceptor.Now()) }

// judge starts failing fast, and cancels all waiters, once nothing has been admitted for
// After. It reports whether that is so.
func (l *Layer) judge(now interceptor.Instant) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.judgeLocked(now)
}

func (l *Layer) judgeLocked(now interceptor.Instant) bool {
	if l.failed.Load() {
		return true
	}
	if len(l.waiters) == 0 {
		return false // The timer fired just as the last waiter left.
	}
	end := l.endLocked()
	if now >= end {
		// A call that is admitted meanwhile either resets failed, or is seen here.
		l.failed.Store(true)
		if end = l.endLocked(); now < end {
			l.failed.Store(false)
		}
	}
	if now < end {
		l.timer.Reset(end.Sub(now))
		return false
	}
	for w := range l.waiters {
		w.cancel(l.failing)
	}
	// The waiters are on their way out. The next one to wait counts as the first.
	clear(l.waiters)
	l.waiting.Store(0)
	l.timer.Stop()
	return true
}

// endLocked returns when all waiters fail, unless a call is admitted before.
func (l *Layer) endLocked() interceptor.Instant {
	return max(l.since, interceptor.Instant(l.admitted.Load())).Add(l.bound())
}

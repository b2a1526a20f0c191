// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package interceptor

import (
	"context"
	"sync"
	"time"

	"github.com/grpc-ecosystem/go-grpc-middleware/v2/interceptors/ratelimit"

	"github.com/belfry-go/belfry/internal/isnil"
)

// Semaphore is what [FromSemaphore] makes a layer of, such as a
// *semaphore.Weighted of golang.org/x/sync.
type Semaphore interface {
	TryAcquire(n int64) bool
	Acquire(ctx context.Context, n int64) error
	Release(n int64)
}

// FromSemaphore returns a layer that takes one permit of sem for each call or
// attempt and holds it until that is over. It refuses with reason CONCURRENCY. A
// fair semaphore admits nobody out of turn while others wait; under [None] that is a
// refusal.
func FromSemaphore(name string, sem Semaphore) Spec {
	if err := checkAdapter("FromSemaphore", name, "sem", isnil.Value(sem), "a semaphore"); err != nil {
		return failed{err}
	}
	return &semLayer{name: name, sem: sem, full: Refuse(name, ReasonConcurrency, "no permit")}
}

type semLayer struct {
	GateOnly
	name string
	sem  Semaphore
	full *Refusal
}

func (l *semLayer) NewLayer() (Layer, error) { return l, nil }
func (l *semLayer) String() string           { return l.name }

// Release gives the permit back.
func (l *semLayer) Release(int64, End) { l.sem.Release(1) }

func (l *semLayer) WrapGate(inner Gate) Gate {
	return GateFunc(func(ctx context.Context, a *Admission, w Wait) error {
		if !l.sem.TryAcquire(1) {
			if err := l.wait(ctx, a, w); err != nil {
				return err
			}
		}
		a.pass()
		a.Hold(l, 0)
		return inner.Admit(ctx, a, w)
	})
}

func (l *semLayer) wait(ctx context.Context, a *Admission, w Wait) error {
	if w.Remaining() == 0 {
		return l.full
	}
	since := Now()
	parked, done := a.Park(ctx)
	defer done()
	waitCtx, cancel := w.context(parked)
	defer cancel()
	err := l.sem.Acquire(waitCtx, 1)
	held := err == nil
	defer func() {
		if held {
			l.sem.Release(1) // The observer panicked.
		}
	}()
	a.Waited(l.name, since)
	held = false
	if err == nil {
		return nil
	}
	switch {
	case parked.Err() != nil:
		return Ended(parked, l.name)
	case waitCtx.Err() != nil:
		return l.full
	}
	return refusedBy(l.full, err)
}

// bounded calls acquire with the context of a [consultation]. It says why acquire failed.
func bounded(ctx context.Context, a *Admission, w Wait, full *Refusal, acquire func(ctx context.Context, wait bool) error) error {
	within := &consultation{Context: ctx, admission: a, end: a.consultUntil(w)}
	defer within.close()
	since := Now()
	err := acquire(within, w.Remaining() > 0)
	a.Internals().Consulted(full.Layer, since)
	if err == nil {
		return nil
	}
	switch ended := within.ended(full.Layer); ended {
	case nil:
		return refusedBy(full, err)
	case ErrWaitOver:
		return full
	default:
		return ended
	}
}

// consultUntil is when third-party code must have answered that a gate asks about the
// call: when w ends and when the deadline of a layer outside passes, [Forever] if never.
// To ask is not to wait for capacity, so a w that allows no waiting does not bound it.
func (a *Admission) consultUntil(w Wait) Wait {
	w = max(w, a.later)
	if w != Forever && Instant(w) <= a.Now() {
		w = Forever
	}
	if a.bound != 0 && a.bound != never {
		w = w.Narrow(a.bound.Wait())
	}
	return w
}

// A consultation is the context of third-party code that a gate calls. It ends with the
// caller's context, at the given moment, and when the stack drains or the connection is
// closed. It makes a timer and parks the call only when its Done is first asked for: a
// limiter that answers at once rarely asks, and both cost more than most limiters.
type consultation struct {
	context.Context // The caller's.
	admission       *Admission
	end             Wait // Forever if it has none.

	mu     sync.Mutex // Guards the fields below; what Park locks is locked under it.
	parked context.Context
	within context.Context // Parked with the end; nil until Done is asked for.
	done   func()
	closed bool
}

func (c *consultation) Deadline() (time.Time, bool) {
	t, ok := c.Context.Deadline()
	if end, bounded := c.end.End(); bounded && (!ok || end < InstantOf(t)) {
		return end.Time(), true
	}
	return t, ok
}

func (c *consultation) Done() <-chan struct{} {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.within == nil && !c.closed {
		parked, leave := c.admission.Park(c.Context)
		within, cancel := c.end.context(parked)
		c.parked, c.within, c.done = parked, within, func() { cancel(); leave() }
	}
	if c.within == nil {
		return c.Context.Done()
	}
	return c.within.Done()
}

func (c *consultation) Err() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.within != nil {
		return c.within.Err()
	}
	if err := c.Context.Err(); err != nil || !c.over() {
		return err
	}
	return context.DeadlineExceeded
}

func (c *consultation) over() bool { return c.end != Forever && c.end.Remaining() == 0 }

// ended says why the third-party code ran out of time: what [Ended] says, or
// [ErrWaitOver]. It is nil if it did not.
func (c *consultation) ended(layer string) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	ctx := c.Context
	if c.parked != nil {
		ctx = c.parked
	}
	switch {
	case ctx.Err() != nil:
		return Ended(ctx, layer)
	case c.over():
		return ErrWaitOver
	}
	return nil
}

// close is called when the third-party code has answered.
func (c *consultation) close() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.closed = true
	if c.done != nil {
		c.done()
	}
}

// refusedBy returns err if it is a refusal, else full wrapping err.
func refusedBy(full *Refusal, err error) error {
	if _, ok := AsRefusal(err); ok {
		return err
	}
	return full.Because(err, false)
}

// Permit is what a limiter hands out that learns from how calls end. Exactly one of
// its methods is called, once.
type Permit interface {
	Success() // the call succeeded
	Drop()    // the call failed: the limiter may take it for a sign of overload
	Ignore()  // the call says nothing, or was never sent
}

// FromPermit returns a layer of a limiter that hands out permit objects, such as an
// adaptive limit. acquire waits until its context ends, which is when the Wait ends;
// wait is false if it must not wait at all. If it returns an error, the layer refuses
// with the given reason and wraps the error.
func FromPermit(name string, reason Reason, acquire func(ctx context.Context, wait bool) (Permit, error)) Spec {
	if err := checkAdapter("FromPermit", name, "acquire", acquire == nil, "a function"); err != nil {
		return failed{err}
	}
	return &permitLayer{name: name, acquire: acquire, full: Refuse(name, reason, "no permit")}
}

type permitLayer struct {
	GateOnly
	name    string
	acquire func(ctx context.Context, wait bool) (Permit, error)
	full    *Refusal
}

func (l *permitLayer) NewLayer() (Layer, error) { return l, nil }
func (l *permitLayer) String() string           { return l.name }

func (l *permitLayer) WrapGate(inner Gate) Gate {
	return GateFunc(func(ctx context.Context, a *Admission, w Wait) error {
		var p Permit
		err := bounded(ctx, a, w, l.full, func(ctx context.Context, wait bool) (err error) {
			p, err = l.acquire(ctx, wait)
			return err
		})
		if err != nil {
			return err
		}
		if p == nil {
			return l.full
		}
		a.pass()
		a.Hold(&permit{p}, 0)
		return inner.Admit(ctx, a, w)
	})
}

type permit struct{ p Permit }

func (p *permit) Release(_ int64, e End) {
	switch e.Outcome {
	case OK:
		p.p.Success()
	case Failed:
		p.p.Drop()
	default:
		p.p.Ignore()
	}
}

// FromAllow returns a layer of a limiter or breaker of the shape "allow, then done".
// If allow returns an error, the layer refuses with the given reason and wraps the
// error. Otherwise done is called with how the call ended; done may be nil. allow must
// not wait for capacity. If it has to ask somebody, its context ends when the call must
// not wait any longer.
//
//	spec := interceptor.FromAllow("breaker", interceptor.ReasonBreakerOpen,
//		func(context.Context) (func(interceptor.Outcome, error), error) {
//			done, err := breaker.Allow() // sony/gobreaker's TwoStepCircuitBreaker
//			return func(o interceptor.Outcome, err error) { done(err) }, err
//		})
func FromAllow(name string, reason Reason, allow func(ctx context.Context) (done func(Outcome, error), err error)) Spec {
	if err := checkAdapter("FromAllow", name, "allow", allow == nil, "a function"); err != nil {
		return failed{err}
	}
	return &allowLayer{name: name, allow: allow, refused: Refuse(name, reason, "not allowed")}
}

type allowLayer struct {
	GateOnly
	name    string
	allow   func(context.Context) (func(Outcome, error), error)
	refused *Refusal
}

func (l *allowLayer) NewLayer() (Layer, error) { return l, nil }
func (l *allowLayer) String() string           { return l.name }

// Traits says that it decides, and never waits.
func (l *allowLayer) Traits() Traits { return Decides }

func (l *allowLayer) WrapGate(inner Gate) Gate {
	return GateFunc(func(ctx context.Context, a *Admission, w Wait) error {
		var done func(Outcome, error)
		err, ended := a.Internals().Consult(ctx, l.name, w, func(ctx context.Context) (err error) {
			done, err = l.allow(ctx)
			return err
		})
		if r, ok := AsRefusal(ended); ok {
			return r
		}
		if err != nil {
			return refusedBy(l.refused, err)
		}
		if done != nil {
			a.Hold(&doneFunc{done}, 0)
		}
		return inner.Admit(ctx, a, w)
	})
}

type doneFunc struct{ f func(Outcome, error) }

func (d *doneFunc) Release(_ int64, e End) { d.f(e.Outcome, e.Err) }

// FromLimiter returns a layer of a rate limiter of go-grpc-middleware. The limiter
// decides for itself whether it waits. Its context ends with the [Wait] if that is a
// moment, such as the deadline of a layer outside; the limiter cannot see [None]. The
// layer refuses with reason RATE_LIMIT and wraps the limiter's error, so that errors.Is
// and errors.As find it. A limiter of this shape cannot take a token back.
func FromLimiter(name string, l ratelimit.Limiter) Spec {
	if err := checkAdapter("FromLimiter", name, "limiter", isnil.Value(l), "a limiter"); err != nil {
		return failed{err}
	}
	return &limiterLayer{name: name, limiter: l, refused: Refuse(name, ReasonRateLimit, "over the limit")}
}

type limiterLayer struct {
	GateOnly
	name    string
	limiter ratelimit.Limiter
	refused *Refusal
}

func (l *limiterLayer) NewLayer() (Layer, error) { return l, nil }
func (l *limiterLayer) String() string           { return l.name }

// Traits says that it is a rate: it decides, and may wait.
func (l *limiterLayer) Traits() Traits { return Waits | Decides }

func (l *limiterLayer) WrapGate(inner Gate) Gate {
	return GateFunc(func(ctx context.Context, a *Admission, w Wait) error {
		err := bounded(ctx, a, w, l.refused, func(ctx context.Context, _ bool) error { return l.limiter.Limit(ctx) })
		if err != nil {
			return err
		}
		a.pass()
		return inner.Admit(ctx, a, w)
	})
}

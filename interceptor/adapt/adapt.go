// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

// Package adapt makes layers of third-party limiters, breakers and semaphores:
//
//	stack, err := interceptor.NewStack(
//		adapt.FromSemaphore("limit", semaphore.NewWeighted(20)),
//	)
//
// The functions return no error: NewStack and NewLayer return it. For a pair of
// third-party interceptors use [interceptor.Foreign].
package adapt

import (
	"context"
	"sync"

	"github.com/grpc-ecosystem/go-grpc-middleware/v2/interceptors/ratelimit"

	"github.com/belfry-go/belfry/interceptor"
	"github.com/belfry-go/belfry/internal/check"
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
// fair semaphore admits nobody out of turn while others wait; under [interceptor.None] that is a
// refusal.
func FromSemaphore(name string, sem Semaphore) interceptor.Spec {
	if err := arguments("FromSemaphore", name, "sem", isnil.Value(sem), "a semaphore"); err != nil {
		return failed{err}
	}
	return &semLayer{name: name, sem: sem, full: interceptor.Refuse(name, interceptor.ReasonConcurrency, "no permit")}
}

type semLayer struct {
	interceptor.GateOnly
	name string
	sem  Semaphore
	full *interceptor.Refusal
}

func (l *semLayer) NewLayer() (interceptor.Layer, error) { return l, nil }
func (l *semLayer) String() string                       { return l.name }

// Release gives the permit back.
func (l *semLayer) Release(int64, interceptor.End) { l.sem.Release(1) }

func (l *semLayer) WrapGate(inner interceptor.Gate) interceptor.Gate {
	return interceptor.GateFunc(func(ctx context.Context, a *interceptor.Admission, w interceptor.Wait) error {
		if !l.sem.TryAcquire(1) {
			if err := l.wait(ctx, a, w); err != nil {
				return err
			}
		}
		a.Internals().Pass()
		a.Hold(l, 0)
		return inner.Admit(ctx, a, w)
	})
}

func (l *semLayer) wait(ctx context.Context, a *interceptor.Admission, w interceptor.Wait) error {
	if w.Remaining() == 0 {
		return l.full
	}
	since := interceptor.Now()
	parked, done := a.Park(ctx)
	defer done()
	waitCtx, cancel := withEnd(parked, w)
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
	return waitFailed(parked, waitCtx, l.full, err)
}

// bounded calls acquire with a context that ends when w does. It says why acquire
// failed.
func bounded(ctx context.Context, a *interceptor.Admission, w interceptor.Wait, full *interceptor.Refusal, acquire func(ctx context.Context, wait bool) error) error {
	lazy := &lazyPark{Context: ctx, admission: a}
	defer lazy.close()
	waitCtx, cancel := withEnd(lazy, w)
	defer cancel()
	since := interceptor.Now()
	err := acquire(waitCtx, w.Remaining() > 0)
	a.Internals().Consulted(full.Layer, since)
	if err != nil {
		return waitFailed(lazy.current(), waitCtx, full, err)
	}
	return nil
}

// withEnd returns ctx with the end of w as its deadline.
func withEnd(ctx context.Context, w interceptor.Wait) (context.Context, context.CancelFunc) {
	if end, ok := w.End(); ok {
		return context.WithDeadline(ctx, end.Time())
	}
	return ctx, func() {}
}

// lazyPark is a context that parks its call when its Done is first asked for. A
// limiter that admits at once rarely asks, and parking costs more than most limiters.
type lazyPark struct {
	context.Context // The caller's.
	admission       *interceptor.Admission

	mu     sync.Mutex // Guards the fields below; what Park locks is locked under it.
	parked context.Context
	done   func()
	closed bool
}

func (l *lazyPark) Done() <-chan struct{} {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.parked == nil && !l.closed {
		l.parked, l.done = l.admission.Park(l.Context)
	}
	return l.currentLocked().Done()
}

func (l *lazyPark) Err() error { return l.current().Err() }

// current returns the parked context if there is one, else the caller's.
func (l *lazyPark) current() context.Context {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.currentLocked()
}

func (l *lazyPark) currentLocked() context.Context {
	if l.parked != nil {
		return l.parked
	}
	return l.Context
}

// close ends the wait.
func (l *lazyPark) close() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.closed = true
	if l.done != nil {
		l.done()
	}
}

// waitFailed returns why a third-party limiter did not admit the call: the caller's
// context ended, the Wait ended, or the limiter refused.
func waitFailed(ctx, waitCtx context.Context, full *interceptor.Refusal, err error) error {
	switch {
	case ctx.Err() != nil:
		return interceptor.Ended(ctx, full.Layer)
	case waitCtx.Err() != nil:
		return full
	}
	return orRefusal(full, err)
}

// refusedBy returns err if it is a refusal, else full wrapping err.
func orRefusal(full *interceptor.Refusal, err error) error {
	if _, ok := interceptor.AsRefusal(err); ok {
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
func FromPermit(name string, reason interceptor.Reason, acquire func(ctx context.Context, wait bool) (Permit, error)) interceptor.Spec {
	if err := arguments("FromPermit", name, "acquire", acquire == nil, "a function"); err != nil {
		return failed{err}
	}
	return &permitLayer{name: name, acquire: acquire, full: interceptor.Refuse(name, reason, "no permit")}
}

type permitLayer struct {
	interceptor.GateOnly
	name    string
	acquire func(ctx context.Context, wait bool) (Permit, error)
	full    *interceptor.Refusal
}

func (l *permitLayer) NewLayer() (interceptor.Layer, error) { return l, nil }
func (l *permitLayer) String() string                       { return l.name }

func (l *permitLayer) WrapGate(inner interceptor.Gate) interceptor.Gate {
	return interceptor.GateFunc(func(ctx context.Context, a *interceptor.Admission, w interceptor.Wait) error {
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
		a.Internals().Pass()
		a.Hold(&permit{p}, 0)
		return inner.Admit(ctx, a, w)
	})
}

type permit struct{ p Permit }

func (p *permit) Release(_ int64, e interceptor.End) {
	switch e.Outcome {
	case interceptor.OK:
		p.p.Success()
	case interceptor.Failed:
		p.p.Drop()
	default:
		p.p.Ignore()
	}
}

// FromAllow returns a layer of a limiter or breaker of the shape "allow, then done".
// If allow returns an error, the layer refuses with the given reason and wraps the
// error. Otherwise done is called with how the call ended; done may be nil. allow must
// not wait.
//
//	spec := adapt.FromAllow("breaker", interceptor.ReasonBreakerOpen,
//		func(context.Context) (func(interceptor.Outcome, error), error) {
//			done, err := breaker.Allow() // sony/gobreaker's TwoStepCircuitBreaker
//			return func(o interceptor.Outcome, err error) { done(err) }, err
//		})
func FromAllow(name string, reason interceptor.Reason, allow func(ctx context.Context) (done func(interceptor.Outcome, error), err error)) interceptor.Spec {
	if err := arguments("FromAllow", name, "allow", allow == nil, "a function"); err != nil {
		return failed{err}
	}
	return &allowLayer{name: name, allow: allow, refused: interceptor.Refuse(name, reason, "not allowed")}
}

type allowLayer struct {
	interceptor.GateOnly
	name    string
	allow   func(context.Context) (func(interceptor.Outcome, error), error)
	refused *interceptor.Refusal
}

func (l *allowLayer) NewLayer() (interceptor.Layer, error) { return l, nil }
func (l *allowLayer) String() string                       { return l.name }

// Traits says that it decides, and never waits.
func (l *allowLayer) Traits() interceptor.Traits { return interceptor.Decides }

func (l *allowLayer) WrapGate(inner interceptor.Gate) interceptor.Gate {
	return interceptor.GateFunc(func(ctx context.Context, a *interceptor.Admission, w interceptor.Wait) error {
		done, err := l.allow(ctx)
		if err != nil {
			return orRefusal(l.refused, err)
		}
		if done != nil {
			a.Hold(&doneFunc{done}, 0)
		}
		return inner.Admit(ctx, a, w)
	})
}

type doneFunc struct {
	f func(interceptor.Outcome, error)
}

func (d *doneFunc) Release(_ int64, e interceptor.End) { d.f(e.Outcome, e.Err) }

// FromLimiter returns a layer of a rate limiter of go-grpc-middleware. The limiter
// decides for itself whether it waits. Its context ends with the [interceptor.Wait] if that is a
// moment, such as the deadline of a layer outside; the limiter cannot see [None]. The
// layer refuses with reason RATE_LIMIT and wraps the limiter's error, so that errors.Is
// and errors.As find it. A limiter of this shape cannot take a token back.
func FromLimiter(name string, l ratelimit.Limiter) interceptor.Spec {
	if err := arguments("FromLimiter", name, "limiter", isnil.Value(l), "a limiter"); err != nil {
		return failed{err}
	}
	return &limiterLayer{name: name, limiter: l, refused: interceptor.Refuse(name, interceptor.ReasonRateLimit, "over the limit")}
}

type limiterLayer struct {
	interceptor.GateOnly
	name    string
	limiter ratelimit.Limiter
	refused *interceptor.Refusal
}

func (l *limiterLayer) NewLayer() (interceptor.Layer, error) { return l, nil }
func (l *limiterLayer) String() string                       { return l.name }

// Traits says that it is a rate: it decides, and may wait.
func (l *limiterLayer) Traits() interceptor.Traits { return interceptor.Waits | interceptor.Decides }

func (l *limiterLayer) WrapGate(inner interceptor.Gate) interceptor.Gate {
	return interceptor.GateFunc(func(ctx context.Context, a *interceptor.Admission, w interceptor.Wait) error {
		err := bounded(ctx, a, w, l.refused, func(ctx context.Context, _ bool) error { return l.limiter.Limit(ctx) })
		if err != nil {
			return err
		}
		a.Internals().Pass()
		return inner.Admit(ctx, a, w)
	})
}

// arguments checks the arguments of an adaptor. what says what a nil parameter must be.
func arguments(function, name, parameter string, isNil bool, what string) error {
	errs := check.Of("adapt").In(function)
	errs.Require(name != "", "name", name, "must not be empty")
	errs.NotNil(isNil, parameter, what)
	return errs.Err()
}

// failed is a Spec that could not be made.
type failed struct{ err error }

func (f failed) NewLayer() (interceptor.Layer, error) { return nil, f.err }

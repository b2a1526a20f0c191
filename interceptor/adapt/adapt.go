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

	"github.com/grpc-ecosystem/go-grpc-middleware/v2/interceptors/ratelimit"

	"github.com/belfry-go/belfry/interceptor"
	"github.com/belfry-go/belfry/internal/check"
	"github.com/belfry-go/belfry/internal/isnil"
	"github.com/belfry-go/belfry/internal/layercheck"
)

// Semaphore is what [FromSemaphore] makes a layer of, such as a
// *semaphore.Weighted of golang.org/x/sync.
type Semaphore interface {
	TryAcquire(n int64) bool
	Acquire(ctx context.Context, n int64) error
	Release(n int64)
}

// FromSemaphore returns a layer that takes one permit of sem for each call or attempt and
// holds it until that is over. It refuses with reason CONCURRENCY. A fair semaphore
// admits nobody out of turn while others wait; under [interceptor.None] that is a
// refusal.
func FromSemaphore(name string, sem Semaphore) interceptor.Spec {
	if wrong := arguments("FromSemaphore", name, "sem", isnil.Value(sem), "a semaphore"); wrong != nil {
		return wrong
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
		if l.sem.TryAcquire(1) {
			a.Hold(l, 0)
		} else if err := l.wait(ctx, a, w); err != nil {
			return err
		}
		a.Internals().Pass()
		return inner.Admit(ctx, a, w)
	})
}

func (l *semLayer) wait(ctx context.Context, a *interceptor.Admission, w interceptor.Wait) error {
	if w.Remaining() == 0 {
		return l.full
	}
	return bounded(ctx, a, w, l.full, func(ctx context.Context, _ bool) error {
		err := l.sem.Acquire(ctx, 1)
		if err == nil {
			a.Hold(l, 0) // Before the observer is told, which may panic.
		}
		return err
	})
}

// bounded calls acquire with a context that ends when w does. It says why acquire failed.
func bounded(ctx context.Context, a *interceptor.Admission, w interceptor.Wait, full *interceptor.Refusal, acquire func(ctx context.Context, wait bool) error) error {
	err, ended := a.Internals().Consult(ctx, full.Layer, w, true, func(ctx context.Context) error {
		return acquire(ctx, w.Remaining() > 0)
	})
	switch {
	case err == nil:
		return nil
	case ended == interceptor.ErrWaitOver:
		return full
	case ended != nil:
		return ended
	}
	return orRefusal(full, err)
}

// orRefusal returns err if it is a refusal, else full wrapping err.
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
	if wrong := arguments("FromPermit", name, "acquire", acquire == nil, "a function"); wrong != nil {
		return wrong
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
		err := bounded(ctx, a, w, l.full, func(ctx context.Context, wait bool) error {
			p, err := l.acquire(ctx, wait)
			switch {
			case err != nil:
				return err
			case p == nil:
				return l.full
			}
			a.Hold(&permit{p}, 0) // Before the observer is told, which may panic.
			return nil
		})
		if err != nil {
			return err
		}
		a.Internals().Pass()
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
// not wait for capacity. If it has to ask somebody, its context ends when the call must
// not wait any longer.
//
//	spec := adapt.FromAllow("breaker", interceptor.ReasonBreakerOpen,
//		func(context.Context) (func(interceptor.Outcome, error), error) {
//			done, err := breaker.Allow() // sony/gobreaker's TwoStepCircuitBreaker
//			return func(o interceptor.Outcome, err error) { done(err) }, err
//		})
func FromAllow(name string, reason interceptor.Reason, allow func(ctx context.Context) (done func(interceptor.Outcome, error), err error)) interceptor.Spec {
	if wrong := arguments("FromAllow", name, "allow", allow == nil, "a function"); wrong != nil {
		return wrong
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
		err, ended := a.Internals().Consult(ctx, l.name, w, false, func(ctx context.Context) error {
			done, err := l.allow(ctx)
			if err == nil && done != nil {
				a.Hold(&doneFunc{done}, 0) // Before the observer is told, which may panic.
			}
			return err
		})
		if r, ok := interceptor.AsRefusal(ended); ok {
			return r
		}
		if err != nil {
			return orRefusal(l.refused, err)
		}
		return inner.Admit(ctx, a, w)
	})
}

type doneFunc struct {
	f func(interceptor.Outcome, error)
}

func (d *doneFunc) Release(_ int64, e interceptor.End) { d.f(e.Outcome, e.Err) }

// FromLimiter returns a layer of a rate limiter of go-grpc-middleware. The limiter
// decides for itself whether it waits. Its context ends with the [interceptor.Wait] if
// that is a moment, such as the deadline of a layer outside; the limiter cannot see
// [interceptor.None]. The layer refuses with reason RATE_LIMIT and wraps the limiter's error, so that
// errors.Is and errors.As find it. A limiter of this shape cannot take a token back.
func FromLimiter(name string, l ratelimit.Limiter) interceptor.Spec {
	if wrong := arguments("FromLimiter", name, "limiter", isnil.Value(l), "a limiter"); wrong != nil {
		return wrong
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

// arguments checks the arguments of an adaptor. what says what a nil parameter must be. It
// returns nil if nothing is wrong.
func arguments(function, name, parameter string, isNil bool, what string) interceptor.Spec {
	errs := check.Of("adapt").In(function)
	errs.Require(name != "", "name", name, "must not be empty")
	errs.NotNil(isNil, parameter, what)
	return layercheck.Spec(errs)
}

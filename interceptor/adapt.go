// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package interceptor

import (
	"context"
	"time"

	"github.com/grpc-ecosystem/go-grpc-middleware/v2/interceptors/ratelimit"
)

// Semaphore is what [FromSemaphore] makes a layer of, such as a
// *semaphore.Weighted of golang.org/x/sync.
type Semaphore interface {
	TryAcquire(n int64) bool
	Acquire(ctx context.Context, n int64) error
	Release(n int64)
}

// FromSemaphore returns a layer that takes one permit of sem for each call or
// attempt and holds it to its end. It refuses with reason CONCURRENCY. A
// semaphore that is fair refuses to try while others wait; under [None] that is
// a refusal.
func FromSemaphore(name string, sem Semaphore) (Layer, error) {
	if err := checkAdapter("FromSemaphore", name, "sem", isNil(sem), "a semaphore"); err != nil {
		return nil, err
	}
	return &semLayer{name: name, sem: sem, full: Refuse(name, ReasonConcurrency, "no permit")}, nil
}

type semLayer struct {
	GateOnly
	name string
	sem  Semaphore
	full *Refusal
}

func (l *semLayer) String() string { return l.name }

// Release gives the permit back.
func (l *semLayer) Release(int64, Outcome, error) { l.sem.Release(1) }

func (l *semLayer) WrapGate(inner Gate) Gate {
	return GateFunc(func(ctx context.Context, c *Call, w Wait) error {
		if !l.sem.TryAcquire(1) {
			if err := l.wait(ctx, c, w); err != nil {
				return err
			}
		}
		c.Hold(l, 0)
		return inner.Admit(ctx, c, w)
	})
}

func (l *semLayer) wait(ctx context.Context, c *Call, w Wait) error {
	if w.Remaining() == 0 {
		return l.full
	}
	since := Now()
	waitCtx, cancel := w.context(ctx)
	defer cancel()
	err := l.sem.Acquire(waitCtx, 1)
	c.Waited(l.name, since)
	if err == nil {
		return nil
	}
	return waitFailed(ctx, waitCtx, l.full, err)
}

// context returns ctx with w's end as its deadline, for limiters of others that
// wait as long as a context.
func (w Wait) context(ctx context.Context) (context.Context, context.CancelFunc) {
	if end, ok := w.End(); ok {
		return context.WithDeadline(ctx, end.Time())
	}
	return ctx, func() {}
}

// slow is from when on the time that a limiter of others takes is waiting, for it
// does not say whether it has waited.
const slow = time.Millisecond

// bounded calls acquire with ctx, which ends with w if w allows waiting until a
// moment, and says why it failed if it did.
func bounded(ctx context.Context, c *Call, w Wait, full *Refusal, acquire func(ctx context.Context, wait bool) error) error {
	waitCtx, wait := ctx, w.Remaining() > 0
	if wait {
		var cancel context.CancelFunc
		waitCtx, cancel = w.context(ctx)
		defer cancel()
	}
	since := Now()
	err := acquire(waitCtx, wait)
	if Now().Sub(since) >= slow {
		c.Waited(full.Layer, since) // The gates inside have to read the clock anew.
	}
	if err != nil {
		return waitFailed(ctx, waitCtx, full, err)
	}
	return nil
}

// waitFailed says why waiting for a limiter of others was in vain: the caller's
// context has ended, or the Wait has, or the limiter refused.
func waitFailed(ctx, waitCtx context.Context, full *Refusal, err error) error {
	switch {
	case ctx.Err() != nil:
		return Ended(ctx, full.Layer)
	case waitCtx.Err() != nil:
		return full
	}
	return refusedBy(full, err)
}

// refusedBy returns err if it is a refusal already, and otherwise full with err in it.
func refusedBy(full *Refusal, err error) error {
	if _, ok := AsRefusal(err); ok {
		return err
	}
	return full.Because(err, false)
}

// Permit is what a limiter gives out that learns from how calls end: exactly one
// of its methods is called, once.
type Permit interface {
	Success() // the call succeeded
	Drop()    // the call failed: the limiter may take it for a sign of overload
	Ignore()  // the call says nothing, or was never sent
}

// FromPermit returns a layer of a limiter that gives out permit objects, such as
// an adaptive limit. acquire waits as long as its context, which ends with the
// Wait; wait is false if it must not wait at all. A limiter that refuses returns
// an error, which the refusal, of the given reason, wraps.
func FromPermit(name string, reason Reason, acquire func(ctx context.Context, wait bool) (Permit, error)) (Layer, error) {
	if err := checkAdapter("FromPermit", name, "acquire", acquire == nil, "a function"); err != nil {
		return nil, err
	}
	return &permitLayer{name: name, acquire: acquire, full: Refuse(name, reason, "no permit")}, nil
}

type permitLayer struct {
	GateOnly
	name    string
	acquire func(ctx context.Context, wait bool) (Permit, error)
	full    *Refusal
}

func (l *permitLayer) String() string { return l.name }

func (l *permitLayer) WrapGate(inner Gate) Gate {
	return GateFunc(func(ctx context.Context, c *Call, w Wait) error {
		var p Permit
		err := bounded(ctx, c, w, l.full, func(ctx context.Context, wait bool) (err error) {
			p, err = l.acquire(ctx, wait)
			return err
		})
		if err != nil {
			return err
		}
		if p == nil {
			return l.full
		}
		c.Hold(&permit{p}, 0)
		return inner.Admit(ctx, c, w)
	})
}

type permit struct{ p Permit }

func (p *permit) Release(_ int64, o Outcome, _ error) {
	switch o {
	case OK:
		p.p.Success()
	case Failed:
		p.p.Drop()
	default:
		p.p.Ignore()
	}
}

// FromAllow returns a layer of a limiter or breaker of the shape "allow, then
// done": allow refuses with an error, which the refusal, of the given reason,
// wraps, or returns what is to be told how the call ended. done may be nil.
// allow must not wait.
//
//	layer, err := interceptor.FromAllow("breaker", interceptor.ReasonBreakerOpen,
//		func(context.Context) (func(interceptor.Outcome, error), error) {
//			done, err := breaker.Allow() // sony/gobreaker's TwoStepCircuitBreaker
//			return func(o interceptor.Outcome, err error) { done(err) }, err
//		})
func FromAllow(name string, reason Reason, allow func(ctx context.Context) (done func(Outcome, error), err error)) (Layer, error) {
	if err := checkAdapter("FromAllow", name, "allow", allow == nil, "a function"); err != nil {
		return nil, err
	}
	return &allowLayer{name: name, allow: allow, refused: Refuse(name, reason, "not allowed")}, nil
}

type allowLayer struct {
	GateOnly
	name    string
	allow   func(context.Context) (func(Outcome, error), error)
	refused *Refusal
}

func (l *allowLayer) String() string { return l.name }

func (l *allowLayer) WrapGate(inner Gate) Gate {
	return GateFunc(func(ctx context.Context, c *Call, w Wait) error {
		done, err := l.allow(ctx)
		if err != nil {
			return refusedBy(l.refused, err)
		}
		if done != nil {
			c.Hold(&doneFunc{done}, 0)
		}
		return inner.Admit(ctx, c, w)
	})
}

type doneFunc struct{ f func(Outcome, error) }

func (d *doneFunc) Release(_ int64, o Outcome, err error) { d.f(o, err) }

// FromLimiter returns a layer of a rate limiter of go-grpc-middleware. The
// limiter decides for itself whether it waits, but its context ends with the
// [Wait] where that is a moment, such as the deadline of a layer outside; of
// [None] it does not learn. The layer refuses with reason RATE_LIMIT and wraps the
// limiter's error, so that errors.Is and errors.As see it. A limiter of this
// shape cannot give a token back.
func FromLimiter(name string, limiter ratelimit.Limiter) (Layer, error) {
	if err := checkAdapter("FromLimiter", name, "limiter", isNil(limiter), "a limiter"); err != nil {
		return nil, err
	}
	return &limiterLayer{name: name, limiter: limiter, refused: Refuse(name, ReasonRateLimit, "over the limit")}, nil
}

type limiterLayer struct {
	GateOnly
	name    string
	limiter ratelimit.Limiter
	refused *Refusal
}

func (l *limiterLayer) String() string { return l.name }

func (l *limiterLayer) WrapGate(inner Gate) Gate {
	return GateFunc(func(ctx context.Context, c *Call, w Wait) error {
		err := bounded(ctx, c, w, l.refused, func(ctx context.Context, _ bool) error { return l.limiter.Limit(ctx) })
		if err != nil {
			return err
		}
		return inner.Admit(ctx, c, w)
	})
}

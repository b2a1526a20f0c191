// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package interceptor

import (
	"context"
	"sync"
	"time"
)

// Consult calls f, a predicate or a limiter of somebody else's, for a gate of the named
// layer. f's context ends with ctx, when w ends, and when the deadline of a layer outside
// passes; then f must return. A w that allows no waiting does not bound f, because to ask
// is not to wait for capacity. With parks, f's context also ends as that of
// [Admission.Park] does; it always does if anything bounds f.
//
// It returns f's error. If f failed when its time was over, ended says why: it is a
// [Refusal], or [ErrWaitOver].
func (i *Internals) Consult(ctx context.Context, layer string, w Wait, parks bool, f func(ctx context.Context) error) (err, ended error) {
	a := (*Admission)(i)
	since := Now()
	end := a.consultUntil(w)
	if end == Forever && !parks { // It costs nothing.
		err = f(ctx)
		i.Consulted(layer, since)
		if err != nil && ctx.Err() != nil {
			ended = Ended(ctx, layer)
		}
		return err, ended
	}
	within := &consultation{Context: ctx, admission: a, end: end}
	defer within.close()
	err = f(within)
	i.Consulted(layer, since)
	if err != nil {
		ended = within.ended(layer)
	}
	return err, ended
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
		within, cancel := parked, context.CancelFunc(func() {})
		if end, ok := c.end.End(); ok {
			within, cancel = context.WithDeadline(parked, end.Time())
		}
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

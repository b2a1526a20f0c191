// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package layertest

import (
	"context"
	"errors"
	"fmt"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sync/semaphore"

	"github.com/belfry-go/belfry/interceptor"
	"github.com/belfry-go/belfry/interceptor/adapt"
	"github.com/belfry-go/belfry/internal/test/leaktest"
)

func TestMain(m *testing.M) { leaktest.Main(m) }

// counter is a gate that counts what it has given out.
type counter struct {
	interceptor.GateOnly
	held     atomic.Int64
	outcomes [5]atomic.Int64
}

func (l *counter) NewLayer() (interceptor.Layer, error) { return l, nil }

func (l *counter) WrapGate(inner interceptor.Gate) interceptor.Gate {
	return interceptor.GateFunc(func(ctx context.Context, a *interceptor.Admission, w interceptor.Wait) error {
		l.held.Add(1)
		a.Hold(l, 7)
		return inner.Admit(ctx, a, w)
	})
}

func (l *counter) Release(token int64, e interceptor.End) {
	if token == 7 && (e.Err != nil || e.Outcome == interceptor.OK) {
		l.held.Add(-1)
	}
	l.outcomes[e.Outcome].Add(1)
}

func (l *counter) atRest() error {
	if n := l.held.Load(); n != 0 {
		return fmt.Errorf("%d tickets held, want 0", n)
	}
	return nil
}

// through is a layer in the call path, with a gate inside and one outside.
type through struct {
	outer *counter
}

func (l *through) NewLayer() (interceptor.Layer, error) { return l, nil }

func (l *through) WrapGate(inner interceptor.Gate) interceptor.Gate {
	return l.outer.WrapGate(inner)
}

func (l *through) WrapCall(next interceptor.Next, _ interceptor.Again) interceptor.Next {
	return next
}

func TestRun(t *testing.T) {
	t.Run("gate", func(t *testing.T) {
		Run(t, func() (interceptor.Spec, func() error) {
			l := new(counter)
			return l, l.atRest
		})
	})
	t.Run("call_path", func(t *testing.T) {
		Run(t, func() (interceptor.Spec, func() error) {
			l := &through{outer: new(counter)}
			return l, l.outer.atRest
		})
	})
	t.Run("gate_that_waits", func(t *testing.T) {
		Run(t, func() (interceptor.Spec, func() error) {
			sem := semaphore.NewWeighted(2)
			return adapt.FromSemaphore("limit", sem), func() error {
				if !sem.TryAcquire(2) {
					return errors.New("a permit is held")
				}
				return nil
			}
		})
	})
}

// A kit that finds nothing must be able to find something.
func TestFinds(t *testing.T) {
	t.Run("lost_ticket", func(t *testing.T) {
		l := new(counter)
		f := newFixture(t, []interceptor.Spec{l})
		if err := f.call(f.ctx, f.conn, interceptor.Unary, "ok"); err != nil {
			t.Fatal(err)
		}
		l.held.Add(1) // As if a Release had been lost.
		if err := l.atRest(); err == nil {
			t.Error("atRest() = nil with a ticket held, want an error")
		}
	})
	for name, every := range map[string]int64{"refusal_further_in": 1, "refusal_further_in_to_one_who_asks_again": 2} {
		t.Run(name, func(t *testing.T) {
			l := new(hasty)
			f := newFixture(t, []interceptor.Spec{twice{}, l, &wall{every: every}})
			f.call(f.ctx, f.conn, interceptor.Unary, "ok")
			if err := f.stack.Drain(f.ctx); err != nil {
				t.Fatal(err)
			}
			if l.atRest() == nil {
				t.Error("a gate that takes before it asks inside, and holds after it, was not found")
			}
		})
	}
	t.Run("wait_that_no_end_reaches", func(t *testing.T) {
		l := &deaf{slots: make(chan struct{}, 1)}
		f := newFixture(t, []interceptor.Spec{l})
		ctx, cancel := context.WithCancel(f.ctx)
		defer cancel()
		c := f.crowd(ctx, interceptor.Unary)
		over, stop := context.WithTimeout(f.ctx, 50*time.Millisecond)
		defer stop()
		f.stack.Drain(over)
		if err := c.endsOrRuns(over, f); err == nil {
			t.Error("a gate that waits without Park was not found")
		}
		cancel()
		if err := f.stack.Drain(f.ctx); err != nil {
			t.Error(err)
		}
	})
}

// hasty takes before it asks the gate inside, and holds only if that admits.
type hasty struct{ counter }

func (l *hasty) NewLayer() (interceptor.Layer, error) { return l, nil }

func (l *hasty) WrapGate(inner interceptor.Gate) interceptor.Gate {
	return interceptor.GateFunc(func(ctx context.Context, a *interceptor.Admission, w interceptor.Wait) error {
		l.held.Add(1)
		if err := inner.Admit(ctx, a, w); err != nil {
			return err
		}
		a.Hold(&l.counter, 7)
		return nil
	})
}

// deaf is a limit that waits with the caller's context alone.
type deaf struct {
	interceptor.GateOnly
	slots chan struct{}
}

func (l *deaf) NewLayer() (interceptor.Layer, error) { return l, nil }

func (l *deaf) WrapGate(inner interceptor.Gate) interceptor.Gate {
	return interceptor.GateFunc(func(ctx context.Context, a *interceptor.Admission, w interceptor.Wait) error {
		select {
		case l.slots <- struct{}{}:
		case <-ctx.Done():
			return interceptor.Ended(ctx, "deaf")
		}
		a.Hold(l, 0)
		return inner.Admit(ctx, a, w)
	})
}

func (l *deaf) Release(int64, interceptor.End) { <-l.slots }

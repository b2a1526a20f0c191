// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package hedge

import (
	"context"
	"errors"
	"runtime"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

type valueKey struct{}

// The context is held against what context.WithCancel returns, with each of its
// methods asked first.
func TestCancelContext(t *testing.T) {
	cause := errors.New("cause")
	asks := map[string]func(ctx context.Context){
		"nothing": func(context.Context) {},
		"done":    func(ctx context.Context) { ctx.Done() },
		"err":     func(ctx context.Context) { ctx.Err() },
		"value":   func(ctx context.Context) { ctx.Value(valueKey{}) },
		"cause":   func(ctx context.Context) { context.Cause(ctx) },
		"child":   func(ctx context.Context) { _, stop := context.WithCancel(ctx); stop() },
	}
	ends := map[string]func(parent context.CancelCauseFunc, own context.CancelFunc){
		"open":           func(context.CancelCauseFunc, context.CancelFunc) {},
		"own":            func(_ context.CancelCauseFunc, own context.CancelFunc) { own() },
		"parent":         func(parent context.CancelCauseFunc, _ context.CancelFunc) { parent(cause) },
		"own_and_parent": func(parent context.CancelCauseFunc, own context.CancelFunc) { own(); parent(cause) },
		"parent_and_own": func(parent context.CancelCauseFunc, own context.CancelFunc) { parent(cause); own() },
	}
	state := func(ctx context.Context) (s struct {
		done       bool
		err, cause error
		value      any
		deadline   time.Time
	}) {
		s.err, s.cause, s.value = ctx.Err(), context.Cause(ctx), ctx.Value(valueKey{})
		s.deadline, _ = ctx.Deadline()
		select {
		case <-ctx.Done():
			s.done = true
		default:
		}
		return s
	}
	for ask, first := range asks {
		for end, f := range ends {
			t.Run(ask+"/"+end, func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					parents := func() (context.Context, context.CancelCauseFunc, context.CancelFunc) {
						ctx, cancel := context.WithTimeout(context.WithValue(context.Background(), valueKey{}, "value"), time.Hour)
						ctx, cancelCause := context.WithCancelCause(ctx)
						return ctx, cancelCause, cancel
					}
					parent, cancelParent, stop := parents()
					defer stop()
					want, cancel := context.WithCancel(parent)
					defer cancel()
					wantChild := context.WithValue(want, valueKey{}, "child")
					f(cancelParent, cancel)

					parent, cancelParent, stop = parents()
					defer stop()
					got := &cancelContext{Context: parent}
					defer got.cancel()
					first(got)
					gotChild := context.WithValue(got, valueKey{}, "child")
					f(cancelParent, got.cancel)
					if got, want := state(got), state(want); got != want {
						t.Errorf("it is %+v, want %+v", got, want)
					}
					if got, want := state(gotChild), state(wantChild); got != want {
						t.Errorf("one derived from it is %+v, want %+v", got, want)
					}
				})
			})
		}
	}
}

func TestCancelContextConcurrentUse(t *testing.T) {
	for range 200 {
		parent, cancel := context.WithCancel(context.Background())
		c := &cancelContext{Context: parent}
		var wg sync.WaitGroup
		for _, f := range []func(){
			c.cancel, cancel, func() { <-c.Done() }, func() { c.Err() }, func() { c.Value(valueKey{}) },
			func() { ctx, stop := context.WithCancel(c); defer stop(); <-ctx.Done() },
		} {
			wg.Go(f)
		}
		wg.Wait()
		if c.Err() != context.Canceled || context.Cause(c) != context.Canceled {
			t.Errorf("Err = %v, Cause = %v; want Canceled", c.Err(), context.Cause(c))
		}
	}
}

func TestCancelContextStartsNoGoroutine(t *testing.T) {
	c := &cancelContext{Context: context.Background()}
	defer c.cancel()
	before := runtime.NumGoroutine()
	for range 50 {
		_, stop := context.WithCancel(context.WithValue(c, valueKey{}, "value"))
		defer stop()
		context.AfterFunc(c, func() {})
	}
	if got := runtime.NumGoroutine(); got > before {
		t.Errorf("%d goroutines for contexts derived from it, want none", got-before)
	}
}

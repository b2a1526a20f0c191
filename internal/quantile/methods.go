// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package quantile

import (
	"iter"
	"sync/atomic"
	"time"

	"github.com/belfry-go/belfry/interceptor"
	"github.com/belfry-go/belfry/internal/keyed"
)

// MaxMethods is how many methods have a Window of their own.
const MaxMethods = 1000

// Methods has a Window for each method that was called within the window of time, up to
// 1,000 of them. Those beyond share one. It is safe for concurrent use.
type Methods struct {
	windows *keyed.Map[*Window]
	window  atomic.Int64 // A time.Duration.
}

// NewMethods returns Methods without latencies. window is as of New.
func NewMethods(window time.Duration) *Methods {
	m := new(Methods)
	m.window.Store(int64(window))
	m.windows = keyed.New(
		func() int { return MaxMethods },
		func(string) *Window { return New(time.Duration(m.window.Load())) },
		func(_ *Window, unused time.Duration, _ int64) bool { return unused > time.Duration(m.window.Load()) })
	return m
}

// SetWindow is Window.SetWindow for all methods. Calls of it must follow one another.
func (m *Methods) SetWindow(window time.Duration) {
	if m.window.Swap(int64(window)) == int64(window) {
		return
	}
	for _, w := range m.windows.All() {
		w.SetWindow(window)
	}
}

// Get returns the Window of a method that is called now.
func (m *Methods) Get(method string, now interceptor.Instant) *Window {
	return m.windows.Get(method, int64(now))
}

// All yields the methods that have a Window.
func (m *Methods) All() iter.Seq2[string, *Window] { return m.windows.All() }

// Peek returns the Window of a method if it has one.
func (m *Methods) Peek(method string) (*Window, bool) { return m.windows.Peek(method) }

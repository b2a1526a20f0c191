// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package hedge

import (
	"context"
	"sync"
	"sync/atomic"
)

// A cancelContext is context.WithCancel of the context in it, made only when somebody
// asks for its Done channel, as deriving a context does, or asks after it was cancelled.
// Until then it costs nothing. It makes the real context instead of imitating one,
// because package context recognises its own type even behind a context with a value,
// and starts a goroutine for each context derived from another type.
//
// It is not reused, because gRPC may look at the context of an attempt that is over.
type cancelContext struct {
	context.Context // The parent.

	real atomic.Pointer[realContext]
	mu   sync.Mutex // Held to set real, once.
	end  atomic.Uint32
}

// How a cancelContext ended: not by cancel, by cancel, or by its parent before that.
const (
	open uint32 = iota
	cancelled
	ended
)

type realContext struct {
	context.Context
	cancel context.CancelFunc
}

// get returns the real context.
func (c *cancelContext) get() context.Context {
	if r := c.real.Load(); r != nil {
		return r.Context
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	r := c.real.Load()
	if r == nil {
		r = new(realContext)
		parent := c.Context
		if c.end.Load() == cancelled { // Even if the parent has ended since.
			parent = context.WithoutCancel(parent)
		}
		r.Context, r.cancel = context.WithCancel(parent)
		if c.end.Load() != open {
			r.cancel()
		}
		c.real.Store(r)
	}
	return r.Context
}

// cancel cancels the context.
func (c *cancelContext) cancel() {
	c.mu.Lock()
	r := c.real.Load()
	if r == nil && c.end.Load() == open {
		end := cancelled
		if c.Context.Err() != nil {
			end = ended
		}
		c.end.Store(end)
	}
	c.mu.Unlock()
	if r != nil {
		r.cancel()
	}
}

// now returns the real context if it exists or must exist now, and otherwise the parent,
// which is equivalent.
func (c *cancelContext) now() context.Context {
	if c.end.Load() != open || c.real.Load() != nil {
		return c.get()
	}
	return c.Context
}

func (c *cancelContext) Done() <-chan struct{} { return c.get().Done() }
func (c *cancelContext) Err() error            { return c.now().Err() }
func (c *cancelContext) Value(key any) any     { return c.now().Value(key) }

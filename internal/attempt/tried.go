// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package attempt

import (
	"context"
	"sync/atomic"
)

// Info is the one context value. It is set before the attempt is made and not
// changed afterwards.
type Info struct {
	// Tried holds the endpoints that earlier attempts of the same call were
	// sent to, shared by all attempts of the call, hedges included. A picker
	// passes them over while another endpoint is READY, and adds its choice.
	// Nil if nobody repeats the call.
	Tried *Tried

	// Tracker belongs to the balancing policy's own interceptor, which sees
	// what a picker does not: the kind of the call, its first response and its
	// true end. Nil if that interceptor is not installed.
	Tracker any
}

// WithTried returns a context whose Info has a Tried, and that Tried, for a layer
// that repeats calls. If the Info of ctx has one already, ctx is returned: the
// attempts of nested layers are attempts of one call. It costs one allocation.
func WithTried(ctx context.Context) (context.Context, *Tried) {
	t := &triedContext{Context: ctx}
	if info := FromContext(ctx); info != nil {
		if info.Tried != nil {
			return ctx, info.Tried
		}
		t.info.Tracker = info.Tracker
	}
	t.info.Tried = &t.tried
	return t, &t.tried
}

// triedContext is a context, its Info and its Tried in one.
type triedContext struct {
	context.Context
	info  Info
	tried Tried
}

func (t *triedContext) Value(k any) any {
	if k == (key{}) {
		return &t.info
	}
	return t.Context.Value(k)
}

type key struct{}

// NewContext returns a context that carries info.
func NewContext(ctx context.Context, info *Info) context.Context {
	return context.WithValue(ctx, key{}, info)
}

// FromContext returns the Info in ctx, or nil if there is none.
func FromContext(ctx context.Context) *Info {
	info, _ := ctx.Value(key{}).(*Info)
	return info
}

// maxTried bounds what a Tried remembers. grpc-go itself makes at most five
// attempts of a call; past the bound the oldest endpoint is forgotten.
const maxTried = 8

// Tried is a small set of endpoint identities. The zero value is empty. It is
// safe for concurrent use, because the attempts of a hedged call run side by side.
type Tried struct {
	ids  [maxTried]atomic.Uint64
	next atomic.Uint32
}

// Add adds an endpoint. Identities are unique in the process and never zero.
func (t *Tried) Add(id uint64) {
	i := t.next.Add(1) - 1
	t.ids[i%maxTried].Store(id)
}

// Remove takes back an Add, for a pick that was never sent.
func (t *Tried) Remove(id uint64) {
	for i := range t.len() {
		if t.ids[i].CompareAndSwap(id, 0) {
			return
		}
	}
}

// Has reports whether the endpoint was added.
func (t *Tried) Has(id uint64) bool {
	for i := range t.len() {
		if t.ids[i].Load() == id {
			return true
		}
	}
	return false
}

// Empty reports whether nothing was ever added.
func (t *Tried) Empty() bool { return t.next.Load() == 0 }

func (t *Tried) len() int { return int(min(t.next.Load(), maxTried)) }

// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package attempt

import (
	"context"
	"sync/atomic"
)

// Info is what a balancing policy learns of an attempt, through its context. What is
// exported is not changed.
//
// A context is inherited: by a call that a credential makes for its token, by what an
// interceptor asks first, by all that is done with the context of a stream. So an Info
// names its call, and belongs to the first policy that has picked for it. [FromContext]
// gives it to nobody else.
type Info struct {
	// Method is the call's full method name.
	Method string
	// Target is that of its grpc.ClientConn; empty if it is not known, which fits all.
	Target string

	// Tried holds the endpoints that earlier attempts of the same call were
	// sent to, shared by all attempts of the call, hedges included. To a picker they
	// cost more than others, and it adds its choice. Nil if no layer repeats the call.
	Tried *Tried

	// Tracker belongs to the balancing policy's own interceptor, which sees
	// what a picker does not: the kind of the call, its first response and its
	// true end. Nil if that interceptor is not installed.
	Tracker any

	owner atomic.Uint64 // The policy that has picked for it; zero before.
}

// Own makes an Info that has no owner the policy's.
func (i *Info) Own(policy uint64) { i.owner.CompareAndSwap(0, policy) }

// Context is the context of an attempt: another one with an Info.
type Context struct {
	context.Context
	Info Info
}

// Value returns the Info for its key, and otherwise what the context inside does.
func (c *Context) Value(k any) any {
	if k == (key{}) {
		return &c.Info
	}
	return c.Context.Value(k)
}

type key struct{}

// FromContext returns the Info in ctx if it is that of a call of the method on a channel to
// the target, and no policy but the given one has picked for it. Otherwise it returns nil.
// A policy has an identity of its own in the process; an interceptor's is zero.
func FromContext(ctx context.Context, method, target string, policy uint64) *Info {
	info, _ := ctx.Value(key{}).(*Info)
	if info == nil || info.Method != method || info.Target != target && info.Target != "" {
		return nil
	}
	if o := info.owner.Load(); o != 0 && o != policy {
		return nil
	}
	return info
}

// Hide returns ctx without its Info. It does not allocate if there is none.
func Hide(ctx context.Context) context.Context {
	if ctx.Value(key{}) == nil {
		return ctx
	}
	return hidden{ctx}
}

type hidden struct{ context.Context }

func (h hidden) Value(k any) any {
	if k == (key{}) {
		return nil
	}
	return h.Context.Value(k)
}

// Series is what the attempts of one call share. The zero value is ready for use. It is
// safe for concurrent use, because the attempts of a hedged call run side by side.
type Series struct {
	tried Tried
	taken atomic.Bool // first is in use.
	first Context     // The first attempt's, to save an allocation.
	begun atomic.Int32
}

// Context returns the context of an attempt.
func (s *Series) Context(ctx context.Context, method, target string) *Context {
	c := &s.first
	if !s.taken.CompareAndSwap(false, true) {
		c = new(Context)
	}
	*c = Context{Context: ctx, Info: Info{Method: method, Target: target, Tried: &s.tried}}
	return c
}

// Begin counts an attempt that is about to be sent, and returns how many were before it:
// those of all layers, those in flight included.
func (s *Series) Begin() (before int) { return int(s.begun.Add(1)) - 1 }

// NotSent takes back a Begin.
func (s *Series) NotSent() { s.begun.Add(-1) }

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
func (t *Tried) Has(id uint64) bool { return t.Times(id) > 0 }

// Times returns how many times the endpoint was added.
func (t *Tried) Times(id uint64) (n int) {
	for i := range t.len() {
		if t.ids[i].Load() == id {
			n++
		}
	}
	return n
}

// Empty reports whether nothing was ever added.
func (t *Tried) Empty() bool { return t.next.Load() == 0 }

func (t *Tried) len() int { return int(min(t.next.Load(), maxTried)) }

// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package interceptor

import "context"

// A boundary stands inside each layer that takes part in the call. On the way in
// it remembers where the tickets of the gates inside begin; when the inside of
// the layer is over it releases them. That is what lets a layer call next
// again: attempts do not share tickets.
type boundary struct {
	id   int // From 1 for the outermost; the stack itself is 0.
	gate Gate
	next Next
}

// Admit admits a call to the gates inside. For the first attempt that is part of
// the call's own admission, and failing, it fails as a whole. Admission of a
// further attempt stands for itself.
func (b *boundary) Admit(ctx context.Context, c *Call, w Wait) error {
	if c.running {
		return b.admitAgain(ctx, c, w)
	}
	c.fence[b.id] = len(c.tickets)
	return b.gate.Admit(ctx, c, w)
}

func (b *boundary) admitAgain(ctx context.Context, c *Call, w Wait) (err error) {
	direct := b.id == c.at+1 // Asked by the running layer, not by a gate inside it.
	if direct {
		c.now = 0
		if c.began {
			c.attempt = int(c.root.attempts.Add(1))
		}
	}
	mark := len(c.tickets)
	admitted := false
	defer func() {
		if !admitted {
			c.dropFences(b.id)
			c.release(mark, NotSent, err)
		}
	}()
	c.fence[b.id] = mark
	err = b.gate.Admit(ctx, c, w)
	admitted = err == nil
	if direct && c.prog.obs != nil {
		if admitted {
			c.prog.obs.Admitted(c.method, c.kind, c.attempt)
		} else {
			c.prog.refused(c.method, err)
		}
	}
	return err
}

// enter takes the admission of the inside of b, and admits the call if a layer
// passes it on a second time without having done so.
func (b *boundary) enter(ctx context.Context, c *Call) (lo int, err error) {
	lo = c.fence[b.id]
	if lo == none {
		if err := b.admitAgain(ctx, c, None); err != nil {
			return 0, err
		}
		lo = c.fence[b.id]
	}
	c.fence[b.id] = none
	c.began = true
	return lo, nil
}

// call is the Next that the layer outside b gets.
func (b *boundary) call(ctx context.Context, c *Call) (err error) {
	lo, err := b.enter(ctx, c)
	if err != nil {
		return err
	}
	if c.kind != Unary {
		return b.open(ctx, c, lo)
	}
	at := c.at
	c.at = b.id
	if b.forked(c) {
		c.prog.stack.enterPart()
	}
	returned := false
	defer b.leave(ctx, c, lo, at, &returned, &err)
	err = b.next(ctx, c)
	returned = true
	return err
}

func (b *boundary) leave(ctx context.Context, c *Call, lo, at int, returned *bool, err *error) {
	e := *err
	if !*returned {
		e = errPanic
	}
	c.at = at
	if b.forked(c) {
		defer c.prog.stack.leave(partOne) // Even if a Releaser panics.
		c.ended, c.failed = true, e
		defer c.outs.end()
	}
	c.settle(ctx, b.id, lo, e)
}

// forked reports whether b is where c, a fork, begins and ends.
func (b *boundary) forked(c *Call) bool { return c.parent != nil && c.home == b.id }

// open is call for a stream: what the inside holds it holds until the stream has
// ended.
func (b *boundary) open(ctx context.Context, c *Call, lo int) (err error) {
	outer, at := c.scope, c.at
	s := &scope{}
	s.begin(ctx, c, b.id, lo)
	s.parent = outer
	s.fork = b.forked(c)
	c.prog.stack.enterPart()
	outer.add(s)
	c.scope, c.at = s, b.id
	returned := false
	defer func() {
		c.scope, c.at = outer, at
		switch {
		case !returned:
			s.fail(c, errPanic)
		case err != nil:
			s.fail(c, err)
		default:
			s.open(c, c.stream)
			c.stream = s
		}
	}()
	err = b.next(ctx, c)
	returned = true
	return err
}

// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package interceptor

import (
	"context"

	"google.golang.org/grpc"

	"github.com/belfry-go/belfry/internal/message"
	"github.com/belfry-go/belfry/internal/result"
)

// An Origin is a call as it was when a layer was about to pass it on, before the
// layers inside changed it. A layer that makes further attempts takes one first. It is
// a value and costs nothing.
type Origin struct {
	// Expendable is set by a layer whose further attempts may wait, but must not push
	// another call out of the queue, such as a hedge's.
	Expendable bool

	call   *Call
	method string
	req    any
	reply  any
	opts   []grpc.CallOption
	desc   *grpc.StreamDesc
	scope  *scope
}

// Origin returns the call as it is now.
func (c *Call) Origin() Origin {
	return Origin{
		call: c, method: c.method, req: c.req, reply: c.reply, opts: c.opts,
		desc: c.desc, scope: c.scope,
	}
}

// Again makes a further attempt of o's call: a Call with the same request, and with its
// own reply, its own results for Header, Trailer and Peer options, and its own
// admission by the gates inside the layer.
//
// If the gates admit it, err is nil. The layer then passes the attempt to next, once,
// or gives it up with [Call.GiveUp]. If they refuse it, err says which layer and why,
// nothing was sent, the attempt does not count, and the observer is told unless ctx
// was cancelled meanwhile. A stack that drains refuses further attempts.
//
// w narrows what is left of the time that the call itself may wait here. A further
// attempt goes ahead of the first attempts of its priority in every queue. Under
// [None] it never waits, not even in a buffer. Its wait ends with ctx.
//
// An attempt is not reused, so it may outlive the call. Again may be called
// concurrently with itself and with an attempt that runs on the call, but not after
// the layer has returned, or for a stream not after the stream has ended.
type Again func(ctx context.Context, o *Origin, w Wait) (attempt *Call, err error)

// again is the Again of the layer outside b.
func (b *boundary) again(ctx context.Context, o *Origin, w Wait) (*Call, error) {
	f := b.fork(o)
	f.reply = message.NewLike(o.reply)
	f.own, f.opts = result.Redirect(o.opts)
	f.vars = f.own
	if err := b.readmit(ctx, f, w); err != nil {
		return nil, err
	}
	return f, nil
}

// readmit asks the gates inside b to admit the fork.
func (b *boundary) readmit(ctx context.Context, f *Call, w Wait) (err error) {
	f.attempt, f.ctx = int(f.root.attempts.Load())+1, ctx
	admitted := false
	defer func() {
		if !admitted {
			f.giveUp(endOfRefused(err))
		}
	}()
	if w == None {
		f.bound = never
	} else {
		w = w.Narrow(*f.parent.waitAt(b.id))
	}
	switch {
	case f.prog.stack.drains():
		err = draining
	case ctx.Err() != nil:
		err = Ended(ctx, stackName)
	default:
		if err = b.Admit(ctx, (*Admission)(f), w); err != nil {
			err = f.refusedBy(ctx, err)
		}
	}
	if err == nil && !f.admitted {
		err = errForgotten(f.prog)
	}
	if err != nil {
		if ctx.Err() != context.Canceled || cutShort(ctx) { // Nobody wants it any more.
			f.refused(err)
		}
		return err
	}
	f.attempt = int(f.root.attempts.Add(1))
	if o := f.prog.obs; o != nil {
		o.Admitted(f.observed())
	}
	admitted = true
	return nil
}

// fork makes the Call of a further attempt, which begins and ends at b. It is not
// admitted yet.
func (b *boundary) fork(o *Origin) *Call {
	c := o.call
	c.root.forks.Add(1)
	c.prog.stack.enterPart() // Until it has ended or is given up.
	f := c.prog.calls.Get().(*Call)
	f.target, f.kind, f.root, f.parent, f.fronts, f.home = c.target, c.kind, c.root, c, c.fronts, b.id
	f.method, f.req, f.reply, f.opts, f.desc = o.method, o.req, o.reply, o.opts, o.desc
	f.perCall = c.perCall
	f.waits, f.timed, f.expendable, f.series = c.waits, c.timed, c.expendable || o.Expendable, c.series
	f.scope, f.entered, f.section = o.scope, b.id-1, b.id
	f.outside = o.scope
	return f
}

// detach moves the first attempt of o's call to a fork, with the tickets and notes of the gates
// inside the layer. It is for a layer whose first attempt may outlive the call. The
// attempt shares the call's reply and options.
func (b *boundary) detach(o *Origin) *Call {
	c := o.call
	f := b.fork(o)
	f.attempt, f.ctx, f.now, f.admitted, f.wait = c.attempt, c.ctx, c.now, true, c.wait
	lo := c.from(b.id)
	f.tickets = append(f.tickets, c.tickets[lo:]...)
	clear(c.tickets[lo:])
	c.tickets = c.tickets[:lo]
	f.notes = append(f.notes, c.notes...)
	return f
}

// GiveUp releases an attempt that [Again] made and that was not passed to next.
func (c *Call) GiveUp() { c.giveUp(End{Outcome: NotSent}) }

func (c *Call) giveUp(e End) {
	defer c.prog.stack.leave(partOne) // Even if a Releaser panics.
	c.release(0, e)
}

// Adopt makes the results of f, an attempt that Again made of c, the results of the
// call: the reply of a unary attempt that succeeded, and what Header, Trailer and Peer
// options ask for. Results of attempts that are not adopted are dropped. Adopt does not
// set the stream of f on c, because the layer wraps it.
//
// For a unary call it is called after next has returned, and copies the results. For a
// stream it may be called while f runs, from any goroutine, and again for another
// attempt: the results of the last one are copied when the stream ends, before anybody
// outside the layer is told of the end.
func (c *Call) Adopt(f *Call) {
	if f.kind != Unary {
		f.outside.chosen.Store(f.own)
		return
	}
	c.trailer = f.trailer
	if f.err == errPanic { // A layer inside answered without it.
		return
	}
	if f.err == nil {
		message.CopyInto(c.reply, f.reply)
	}
	f.own.Copy()
}

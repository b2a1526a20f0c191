// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package interceptor

import (
	"context"
	"fmt"
	"io"
	"sync"
	"sync/atomic"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"

	"github.com/belfry-go/belfry/internal/attempt"
)

// PerCall returns what the options of the call say about its attempts (package attempts).
// It is not to be changed.
func (i *Internals) PerCall() *attempt.PerCall {
	if i.perCall == nil {
		return &saysNothing
	}
	return i.perCall
}

var saysNothing attempt.PerCall

// SetWhy notes in the call's report why this further attempt is made.
func (i *Internals) SetWhy(w attempt.Why) {
	if i.perCall != nil && i.perCall.Record != nil {
		p := *i.perCall
		p.Why = w
		i.perCall = &p
	}
}

// Hold leaves a ticket on a further attempt that was admitted, see [Admission.Hold].
func (i *Internals) Hold(r Releaser) { (*Admission)(i).Hold(r, 0) }

// ownOption takes an option of package attempts, and reports whether it is one for this
// stack alone.
func (c *Call) ownOption(o grpc.CallOption) (mine bool) {
	p := *c.Internals().PerCall()
	switch o := o.(type) {
	case attempt.Option:
		o.Set(&p)
	case attempt.ReportOption:
		p.Record, p.Owner, mine = o.NewRecord(), true, true
	case *attempt.Entry: // The call is an attempt of a stack further out.
		p.Why, p.Record = o.Replace()
		mine = true
	default:
		return false
	}
	c.perCall = &p
	return mine
}

// sendAs is send for a call that has options about its attempts.
func (c *Call) sendAs(ctx context.Context, p *attempt.PerCall) (err error) {
	if p.Timeout <= 0 && p.Record == nil {
		return c.send(ctx)
	}
	a := &ownAttempt{single: c.desc != nil && !c.desc.ServerStreams}
	if p.Record != nil {
		a.entry = p.Record.Begin(p.Why)
		c.AddOptions(a.entry)
	}
	if p.Timeout > 0 {
		a.cut = Refuse(stackName, ReasonDeadline, fmt.Sprintf("the attempt took longer than the call allows it (%v)", p.Timeout))
	}
	if c.kind == Unary {
		return a.unary(ctx, c, p.Timeout)
	}
	return a.open(ctx, c, p.Timeout)
}

// ownAttempt is an attempt of a call that has options about its attempts. For a stream it
// is the stream.
type ownAttempt struct {
	grpc.ClientStream
	cut    *Refusal                // What the attempt ends with when its timeout passes; nil if it has none.
	ctx    context.Context         // Of a stream.
	cancel context.CancelCauseFunc // Of a stream with a timeout.
	timer  *time.Timer
	end    StreamEnd
	entry  *attempt.Entry // In the report; nil if there is none.
	single bool           // The server sends one message.
	first  sync.Once      // The first end of RecvMsg.
	early  atomic.Bool    // Whichever comes first has set it: that end, or the timeout.
}

func (a *ownAttempt) unary(outer context.Context, c *Call, timeout time.Duration) error {
	ctx := outer
	if d, ok := ctx.Deadline(); a.cut != nil && (!ok || time.Until(d) > timeout) {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeoutCause(ctx, timeout, a.cut)
		defer cancel()
	}
	err := c.send(ctx)
	if err != nil && ctx != outer && outer.Err() == nil {
		// The server may say first that the deadline has passed. What waits for the attempt
		// to be sent, such as credentials, may say anything.
		d, _ := ctx.Deadline()
		if attempt.ToldFirst(err, timeout, time.Until(d)) || c.fate&attempt.Sent == 0 && context.Cause(ctx) == error(a.cut) {
			err = a.cutShort(err)
		}
	}
	if a.entry != nil {
		a.entry.Seen(c.peer.Addr)
		a.entry.End(err)
	}
	return err
}

// open opens a stream whose first message must come in time.
func (a *ownAttempt) open(ctx context.Context, c *Call, timeout time.Duration) error {
	if a.cut != nil {
		ctx, a.cancel = context.WithCancelCause(ctx)
		a.end = StreamEnd{c.scope}
		a.timer = time.AfterFunc(timeout, func() {
			if a.early.CompareAndSwap(false, true) {
				_ = a.cutNow()
			}
		})
		c.AddOptions(grpc.OnFinish(func(error) { a.timer.Stop(); a.cancel(nil) }))
	}
	a.ctx = ctx
	err := c.send(ctx)
	if err == nil {
		a.ClientStream = c.stream
		c.stream = a
		return nil
	}
	a.stopTimer()
	err = a.explain(err)
	a.ended(err)
	return err
}

func (a *ownAttempt) RecvMsg(m any) error {
	err := a.ClientStream.RecvMsg(m)
	a.first.Do(func() {
		a.stopTimer()
		if !a.early.CompareAndSwap(false, true) && err == nil && !a.single {
			err = a.cutNow() // No message would follow this one.
			a.end.scope.awaitFinish()
		}
		if a.entry == nil {
			return
		}
		if p, ok := peer.FromContext(a.ClientStream.Context()); ok {
			a.entry.Seen(p.Addr)
		}
	})
	err = a.explain(err)
	if err != nil || a.single {
		a.ended(err)
	}
	return err
}

// cutNow ends a stream whose first message has not come in time, and returns its error. It
// may be called again.
func (a *ownAttempt) cutNow() error {
	a.cancel(a.cut)
	err := a.cutShort(context.DeadlineExceeded)
	a.end.End(err)
	return err
}

// cutShort returns the error of an attempt that its timeout has ended with err. Even if
// gRPC made no stream for it, it is not the refusal of a layer: a retry repeats it.
func (a *ownAttempt) cutShort(err error) error { return a.cut.Because(err, true) }

// explain returns the error of a stream.
func (a *ownAttempt) explain(err error) error {
	if err == nil || err == io.EOF || a.cut == nil || context.Cause(a.ctx) != error(a.cut) {
		return err
	}
	if _, ok := AsRefusal(err); ok {
		return err
	}
	return a.cutShort(err)
}

func (a *ownAttempt) stopTimer() {
	if a.timer != nil {
		a.timer.Stop()
	}
}

// ended records that the stream has ended.
func (a *ownAttempt) ended(err error) {
	if err == io.EOF {
		err = nil
	}
	if a.entry != nil {
		// If a layer has cut the stream short, gRPC knows only that it was cancelled.
		if r, ok := AsRefusal(context.Cause(a.ctx)); ok && status.Code(err) == codes.Canceled {
			err = r.Because(err, true)
		}
		a.entry.End(err)
	}
	if a.cancel != nil {
		a.cancel(nil)
	}
}

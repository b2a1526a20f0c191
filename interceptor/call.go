// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package interceptor

import (
	"context"
	"math"
	"sync/atomic"

	"google.golang.org/grpc"

	"github.com/belfry-go/belfry/internal/message"
)

// A Releaser takes back what a gate took for a call. Its dynamic type must be
// comparable, as pointers are. Release is called exactly once for each
// [Call.Hold], possibly from another goroutine than Admit; it must not block.
// token is what Hold was given, o how it ended, and err the true error of the
// call or attempt as seen where the ticket's gate stands; nil if it succeeded.
type Releaser interface {
	Release(token int64, o Outcome, err error)
}

type ticket struct {
	r     Releaser
	token int64
}

// none is the fence of a boundary that the call is not admitted through.
const none = math.MaxInt

// A Call is one call on its way through a stack, or a further attempt of it
// ([Origin.Fork]). Gates leave their tickets on it, layers in the call path read
// and change what is sent.
//
// A Call belongs to the goroutine that runs it; none of its methods may be called
// concurrently, unless said otherwise. It is reused for another call when the
// call is over, so a layer does not keep it longer than its Admit or its call,
// or, for a stream, than the stream.
type Call struct {
	// Set at the start and not changed.
	prog    *program
	kind    Kind
	attempt int
	root    *Call // The call that this is an attempt of; itself if it is the first.
	parent  *Call // What this was forked from; nil if it was not.
	home    int   // The outermost boundary of a fork.
	outs    *outs // The results of a fork that the caller asked for by options.

	// What is sent, and to whom. Layers change it on the way in.
	method   string
	req      any
	reply    any
	opts     []grpc.CallOption
	desc     *grpc.StreamDesc
	cc       *grpc.ClientConn
	conn     grpc.ClientConnInterface // Instead of an invoker or streamer if not nil.
	invoker  grpc.UnaryInvoker
	streamer grpc.Streamer

	// What became of it.
	stream grpc.ClientStream
	kept   kept
	sent   bool  // The innermost Next was reached.
	ended  bool  // Of a fork: it has run,
	failed error // and how that ended.

	// Admission.
	tickets []ticket
	inline  [6]ticket
	fence   []int // fence[i] is where the tickets inside boundary i begin, or none.
	bound   Instant
	place   Place
	now     Instant
	running bool // The call path has been entered.
	began   bool // A boundary has been entered: what is admitted now is a further attempt.

	scope *scope // The innermost stream scope around the running layer.
	at    int    // The innermost boundary around the running layer.

	// Of the root, and used from all its attempts.
	attempts atomic.Int32
	forked   atomic.Bool
	// below is set when a fork of this was sent.
	below atomic.Bool
}

// Method is the full method name, such as "/helloworld.Greeter/SayHello".
func (c *Call) Method() string { return c.method }

// Kind is the kind of the call.
func (c *Call) Kind() Kind { return c.kind }

// Desc describes the stream; nil for a unary call.
func (c *Call) Desc() *grpc.StreamDesc { return c.desc }

// Attempt counts the attempts of the call that were begun before this one: 0 is
// the first.
func (c *Call) Attempt() int { return c.attempt }

// Request is the request of a unary call; nil for a stream.
func (c *Call) Request() any { return c.req }

// SetRequest replaces the request of a unary call for the layers inside.
func (c *Call) SetRequest(req any) { c.req = req }

// Reply is the message that the reply of a unary call is written to; nil for a
// stream.
func (c *Call) Reply() any { return c.reply }

// Options are the call options. They must not be modified; see AddOptions.
// Options that call back at the end (grpc.OnFinish) are not among them: they
// belong to the call, and the stack calls them once.
func (c *Call) Options() []grpc.CallOption { return c.opts }

// AddOptions adds options for the layers inside and the attempt itself.
func (c *Call) AddOptions(opts ...grpc.CallOption) {
	// The caller's slice may have room at its end that is not ours.
	c.opts = append(c.opts[:len(c.opts):len(c.opts)], opts...)
}

// Stream is the stream that the inner Next opened; nil before that and for a
// unary call.
func (c *Call) Stream() grpc.ClientStream { return c.stream }

// SetStream replaces the stream, for a layer that wraps it.
func (c *Call) SetStream(s grpc.ClientStream) { c.stream = s }

// Observer is the stack's observer; never nil.
func (c *Call) Observer() Observer {
	if o := c.prog.obs; o != nil {
		return o
	}
	return NopObserver{}
}

// Observed reports whether the stack has an observer, for a layer to which it costs
// something to know what it would tell one.
func (c *Call) Observed() bool { return c.prog.obs != nil }

// Now is the time, read once per admission and then remembered: all gates that a
// call passes without waiting share one reading. A gate that has waited says so
// ([Call.Waited]), and the next reading is fresh.
func (c *Call) Now() Instant {
	if c.now == 0 {
		c.now = Now()
	}
	return c.now
}

// Waited says that a gate of the named layer has waited since the given moment,
// whether it then admitted the call or not.
func (c *Call) Waited(layer string, since Instant) {
	c.now = Now()
	if o := c.prog.obs; o != nil {
		o.Waited(c.method, layer, c.now.Sub(since))
	}
}

// Bound sets the deadline of a layer for the gates inside it: whatever Wait
// they choose, it ends by then. It returns the bound that held before, zero if
// none did, which the layer restores after the inner gate with SetBound. A bound
// later than the one that holds changes nothing. It spares a deadline layer the
// context that the call path will need, should the call be admitted.
func (c *Call) Bound(deadline Instant) (before Instant) {
	before = c.bound
	if before == 0 || deadline < before {
		c.bound = deadline
	}
	return before
}

// SetBound restores a bound that [Call.Bound] returned.
func (c *Call) SetBound(b Instant) { c.bound = b }

// Widen returns the Wait that allows the more of w and to, but never more than
// the deadlines of the layers outside ([Call.Bound]). The gate that widens has
// made sure that not every call gets to wait: a buffer has a bounded number of
// places.
func (c *Call) Widen(w, to Wait) Wait {
	w = max(w, to)
	if c.bound != 0 {
		w = min(w, c.bound.Wait())
	}
	return w
}

// Hold leaves a ticket on the call: r.Release(token, …) is called exactly once
// when what it stands for is over, that is, when the inside of the nearest layer
// outside this gate that takes part in the call is over: for a gate inside a
// retry, the attempt; otherwise the call. Tickets are released in reverse
// order. A stream holds its tickets until it has ended.
func (c *Call) Hold(r Releaser, token int64) {
	c.tickets = append(c.tickets, ticket{r, token})
}

// Token returns the token of the innermost ticket that r holds on this call. It
// lets the call half of a layer find what its gate half decided.
func (c *Call) Token(r Releaser) (token int64, ok bool) {
	for i := len(c.tickets) - 1; i >= 0; i-- {
		if c.tickets[i].r == r {
			return c.tickets[i].token, true
		}
	}
	return 0, false
}

// Mark is the number of tickets on the call, for [Call.Rollback].
func (c *Call) Mark() int { return len(c.tickets) }

// Rollback releases the tickets held since mark as [NotSent], for a gate that
// goes on after its inner gate refused. Rollback(0, nil) gives up a fork that was
// admitted and is not needed any more.
func (c *Call) Rollback(mark int, err error) {
	c.release(mark, NotSent, err)
}

// release releases the tickets from lo on and removes them.
func (c *Call) release(lo int, o Outcome, err error) {
	if lo >= len(c.tickets) {
		return
	}
	ts := c.tickets[lo:]
	c.tickets = c.tickets[:lo]
	releaseAll(ts, o, err)
}

// releaseAll releases tickets, the last first, and clears them. A Releaser that
// panics does not keep the others from being released.
func releaseAll(ts []ticket, o Outcome, err error) {
	n := len(ts)
	if n == 0 {
		return
	}
	defer func() {
		if n > 0 {
			releaseAll(ts[:n], o, err)
		}
	}()
	for n > 0 {
		n--
		t := ts[n]
		ts[n] = ticket{}
		t.r.Release(t.token, o, err)
	}
}

// settle ends the unary inside of boundary i: whatever is still held inside the
// next boundary was never used, for that boundary was not entered; the rest
// ended with err.
func (c *Call) settle(ctx context.Context, i, lo int, err error) {
	if f := c.fence[i+1]; f < len(c.tickets) {
		c.dropFences(i + 1)
		c.release(f, NotSent, err)
	}
	if lo < len(c.tickets) {
		c.release(lo, outcomeOf(ctx, err, c.wasSent()), err)
	}
}

func (c *Call) dropFences(from int) {
	for i := from; i < len(c.fence); i++ {
		c.fence[i] = none
	}
}

// wasSent reports whether this call or a fork of it was sent.
func (c *Call) wasSent() bool { return c.sent || c.below.Load() }

func (c *Call) markSent() {
	c.sent = true
	for p := c.parent; p != nil; p = p.parent {
		p.below.Store(true)
	}
}

// An Origin is a call as it stood when a layer was about to pass it on, before
// the layers inside changed it. A layer that makes further attempts takes one
// first; it is a value and costs nothing.
type Origin struct {
	call   *Call
	method string
	req    any
	reply  any
	opts   []grpc.CallOption
	desc   *grpc.StreamDesc
	scope  *scope
	at     int
}

// Origin returns the call as it stands now.
func (c *Call) Origin() Origin {
	return Origin{
		call: c, method: c.method, req: c.req, reply: c.reply, opts: c.opts,
		desc: c.desc, scope: c.scope, at: c.at,
	}
}

// Fork makes the Call of a further attempt: the same request, a reply of its
// own, results of its own for Header, Trailer and Peer options, and no tickets,
// so it has to be admitted by the inner gate that WrapCall was given before it
// goes to next:
//
//	f := origin.Fork()
//	if err := inner.Admit(ctx, f, interceptor.None); err != nil { … }
//	err := next(ctx, f)
//	call.Adopt(f)
//
// A fork is not reused, so it may outlive the call. Fork may be called
// concurrently with other Forks and with an attempt that runs on the call
// itself, but not after the layer has returned (for a stream: after its stream
// has ended).
func (o *Origin) Fork() *Call {
	f := o.fork()
	f.attempt = int(f.root.attempts.Add(1))
	f.reply = message.NewLike(o.reply)
	f.outs, f.opts = redirect(o.opts)
	return f
}

// fork copies what attempts share.
func (o *Origin) fork() *Call {
	c := o.call
	c.root.forked.Store(true)
	f := &Call{
		prog: c.prog, kind: c.kind, root: c.root, parent: c, home: o.at + 1,
		method: o.method, req: o.req, reply: o.reply, opts: o.opts, desc: o.desc,
		cc: c.cc, conn: c.conn, invoker: c.invoker, streamer: c.streamer,
		running: true, scope: o.scope, at: o.at,
		fence: make([]int, c.prog.boundaries+2),
	}
	f.tickets = f.inline[:0]
	f.dropFences(0)
	return f
}

// Detach moves the first attempt to a fork: it takes the tickets of the gates
// inside the layer with it, so it goes to next without being admitted again. A
// layer whose first attempt may outlive the call, because another one may win,
// runs it on what Detach returns. It is called before anything else is done
// with the call.
func (c *Call) Detach() *Call {
	f := c.detach()
	f.reply = message.NewLike(c.reply)
	f.outs, f.opts = redirect(c.opts)
	return f
}

// detach is Detach for an attempt that shares the call's reply and options.
func (c *Call) detach() *Call {
	o := c.Origin()
	f := o.fork()
	f.attempt, f.now = c.attempt, c.now
	inside := c.at + 1
	lo := c.fence[inside]
	if lo == none {
		return f
	}
	f.tickets = append(f.tickets, c.tickets[lo:]...)
	clear(c.tickets[lo:])
	c.tickets = c.tickets[:lo]
	for i := inside; i < len(c.fence); i++ {
		if c.fence[i] != none {
			f.fence[i], c.fence[i] = c.fence[i]-lo, none
		}
	}
	return f
}

// Retain keeps the call from being reused for another, for a layer that hands it
// to code that may use it after the call is over.
func (c *Call) Retain() { c.root.forked.Store(true) }

// Adopt makes the results of f, a fork of c, the call's: of a unary attempt that
// succeeded its reply, and of every attempt what Header, Trailer and Peer
// options ask for, once: when it has ended. Results of attempts that are not
// adopted are dropped. The stream of f is not set on c, for that is the layer's
// to wrap.
//
// For a unary call it is called after next has returned. For a stream it may be
// called as soon as the layer has settled on f, also while it runs.
func (c *Call) Adopt(f *Call) {
	// It need not have been sent itself: a layer inside may have forked it, or answered.
	if f.kind == Unary && f.ended && f.failed == nil {
		message.CopyInto(c.reply, f.reply)
	}
	f.outs.adopt()
}

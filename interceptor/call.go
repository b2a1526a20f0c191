// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package interceptor

import (
	"context"
	"sync/atomic"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/peer"

	"github.com/belfry-go/belfry/internal/attempt"
	"github.com/belfry-go/belfry/internal/result"
)

// A Call is one call as the call path sees it, or a further attempt that [Again] made
// of it. Layers read and change what is sent. [Admission] is the same call as gates
// see it.
//
// A Call belongs to the goroutine that runs it. None of its methods may be called
// concurrently unless its comment says so. It is reused for another call when the call
// is over, so a layer must not keep it beyond that, or for a stream beyond the stream.
//
// Put a new field into callState: a Call that is reused starts with the zero callState.
type Call struct {
	callState

	// Room for the slices of callState. It is not cleared: a Call in the pool is used
	// again soon, or dropped.
	ticketRoom [4]ticket
	noteRoom   [2]note
	waits      [8]Wait            // How long the call was allowed to wait in each section; see waitAt.
	options    [8]grpc.CallOption // Of a unary attempt. The first are always ours, see init.
	carried    carriedWait
	room       roomOption
}

// callState is what a Call knows of one call.
type callState struct {
	// Set at the start and not changed.
	prog *program
	target
	ctx     context.Context // As the stack, or [Again], was given it.
	kind    Kind
	static  bool // Generated code makes it.
	attempt int
	root    *Call    // The call that this is an attempt of; itself if it is the first.
	parent  *Call    // What this was forked from; nil if it was not.
	fronts  []*Stack // Stacks in front, whose connection this one is.
	home    int      // The outermost boundary of a fork.

	own        *result.Vars    // Of a fork: where it writes what its layer was asked for by options,
	outside    *scope          // and the scope around that layer; nil for a unary call.
	expendable bool            // See Origin.
	series     *attempt.Series // What all attempts share; nil if no layer may repeat the call.

	finish  []func(error)      // What the caller wants to be told at the end.
	timeout time.Duration      // Of the method, if its deadline is the call's,
	cancel  context.CancelFunc // and what ends that; nil otherwise.

	perCall *attempt.PerCall // What the caller wants of the attempts; nil if nothing.

	// What is sent. Layers change it on the way in.
	method string
	req    any
	reply  any
	opts   []grpc.CallOption
	vars   *result.Vars // Where opts point, if a layer has redirected them.
	desc   *grpc.StreamDesc

	// Admission.
	tickets  []ticket // In the order of their sections.
	notes    []note
	section  int  // The section of the gate that is being asked.
	admitted bool // All gates have admitted it.
	bound    Instant
	slot     Slot
	trying   bool // Admission.Try is asking,
	later    Wait // and how long further attempts may wait meanwhile.
	now      Instant
	wait     Wait    // What the innermost gate was allowed.
	unready  Instant // When it began to wait for its connection, if it has.
	timed    bool    // Somebody wants to know sentAt.

	// The call path.
	entered     int // The innermost boundary that was entered.
	scope       *scope
	wantTrailer bool

	// What became of it.
	fate   attempt.Fate // When it was handed to the connection; see also fates.
	stream grpc.ClientStream
	sentAt Instant
	// For the observer: when it entered the stack, and when it was handed to the connection.
	began, departed Instant
	trailer         metadata.MD
	peer            peer.Peer
	err             error // How it ended; errPanic before that.

	// Also used from all its attempts.
	fates     atomic.Uint32 // What became of them, and of a stream later: an attempt.Fate.
	last      atomic.Uint32 // What became of the last one but this, plus 1; 0 if there is none.
	attempts  atomic.Int32
	forks     atomic.Int32 // Of the root: how many were made of it, without those that were taken back.
	counts    atomic.Bool  // A layer wants to know how many messages are sent.
	firstSent atomic.Int64 // When the first of them was sent.
}

// ownOptions is how many options of an attempt are the stack's.
const ownOptions = 3

// init makes c, which is new, a call of p.
func (c *Call) init(p *program) {
	c.options = [len(c.options)]grpc.CallOption{p.stack.mark, grpc.Peer(&c.peer), grpc.Trailer(&c.trailer)}
	c.carried.call, c.room.call = c, c
	c.reset(p)
}

// reset makes c an unused call of p.
func (c *Call) reset(p *program) {
	c.callState = callState{prog: p, root: c, err: errPanic}
	c.tickets, c.notes = c.ticketRoom[:0], c.noteRoom[:0]
}

// Method is the full method name, such as "/helloworld.Greeter/SayHello".
func (c *Call) Method() string { return c.method }

// Kind is the kind of the call.
func (c *Call) Kind() Kind { return c.kind }

// Desc describes the stream; nil for a unary call.
func (c *Call) Desc() *grpc.StreamDesc { return c.desc }

// Attempt is the number of attempts of the call before this one: 0 for the first.
func (c *Call) Attempt() int { return c.attempt }

// Request is the request of a unary call; nil for a stream.
func (c *Call) Request() any { return c.req }

// SetRequest replaces the request of a unary call for the layers inside.
func (c *Call) SetRequest(req any) { c.req = req }

// Reply is the message that receives the reply of a unary call; nil for a stream.
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

// Noted returns the last note that the gate of a layer left on this call, see
// [Admission.Note].
func (c *Call) Noted(of any) (value int64, ok bool) {
	for i := len(c.notes) - 1; i >= 0; i-- {
		if c.notes[i].of == of {
			return c.notes[i].value, true
		}
	}
	return 0, false
}

// Park is [Admission.Park] for a layer that waits in the call path, such as a retry
// that backs off.
func (c *Call) Park(ctx context.Context) (parked context.Context, done func()) {
	parked, done = c.prog.stack.parked.Add(ctx, c.grpcConn)
	for _, s := range c.fronts {
		inner := done
		p, out := s.parked.Add(parked, nil)
		parked, done = p, func() { out(); inner() }
	}
	return parked, done
}

// Internals is the part of a call that only belfry's own layers use.
func (c *Call) Internals() *Internals { return (*Internals)(c) }

// waitAt points at how long the call was allowed to wait in section i. The last entry
// serves all sections beyond it, whose Waits hardly differ.
func (c *Call) waitAt(i int) *Wait { return &c.waits[min(i, len(c.waits)-1)] }

// whenSent returns when the first of the attempts was sent.
func (c *Call) whenSent() Instant {
	first := Instant(c.firstSent.Load())
	if c.sentAt == 0 || first != 0 && first < c.sentAt {
		return first
	}
	return c.sentAt
}

// arrived records what became of an attempt when it was handed to the connection, for
// it and for all the calls that it is an attempt of.
func (c *Call) arrived(f attempt.Fate) {
	c.fate = f
	if f&attempt.Sent == 0 && c.series != nil {
		c.series.NotSent()
	}
	for p := c.parent; p != nil; p = p.parent {
		p.fates.Or(uint32(f))
		p.last.Store(uint32(f) + 1)
	}
}

// addFate records what became of a stream later, for it and for all the calls that it is
// an attempt of. It may be called concurrently.
func (c *Call) addFate(f attempt.Fate) {
	for ; c != nil; c = c.parent {
		c.fates.Or(uint32(f))
	}
}

// departs records that an attempt is handed to the connection now.
func (c *Call) departs() {
	if !c.timed && !c.root.timed {
		return
	}
	c.sentAt = Now()
	for p := c.parent; p != nil; p = p.parent {
		p.firstSent.CompareAndSwap(0, int64(c.sentAt))
	}
}

// inSeries tells the server and the balancing policy what came before an attempt that is
// about to be handed to the connection. The context is for the connection alone.
func (c *Call) inSeries(ctx context.Context) context.Context {
	if c.series == nil {
		return ctx
	}
	before := c.series.Begin()
	switch {
	case before == 0:
	case c.conn != nil:
		ctx = attempt.WithPreviousMetadata(ctx, before)
	default:
		ctx, c.opts = attempt.WithPrevious(ctx, c.opts, before)
	}
	target := ""
	if c.grpcConn != nil {
		target = c.grpcConn.Target()
	}
	return c.series.Context(ctx, c.method, target)
}

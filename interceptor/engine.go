// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package interceptor

import (
	"context"
	"errors"
	"fmt"
	"sync"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/connectivity"
	"google.golang.org/grpc/status"

	"github.com/belfry-go/belfry/internal/isnil"
)

// A program is a list of layers, compiled. It is not changed.
//
// A call passes the gates from the outermost to the innermost, and then the call
// path. Inside each layer of the call path stands a boundary. The gates between
// two boundaries are a section; what they hold is released when the inside of the
// section's boundary is over.
type program struct {
	stack      *Stack
	layers     []Layer
	gate       Gate
	next       Next
	boundaries int // Layers in the call path; boundary i is inside the i-th, counted from 1.
	obs        Observer
	advice     []string
	calls      sync.Pool // *Call of unary calls

	// choose and lists are set instead of all but stack and layers if the program
	// depends on the method.
	choose func(method string) int
	lists  []*program // The last one has no layers.
}

// of returns the program for a method.
func (p *program) of(method string) *program {
	if p.choose == nil {
		return p
	}
	if i := p.choose(method); i >= 0 && i < len(p.lists)-1 {
		return p.lists[i]
	}
	return p.lists[len(p.lists)-1]
}

// compile compiles layers.
func (s *Stack) compile(layers []Layer) (*program, error) {
	p := &program{stack: s}
	if err := p.take(layers); err != nil {
		return nil, err
	}
	if err := p.check(); err != nil {
		return nil, err
	}
	p.gate, p.next = GateFunc(admitAll), innermost
	id := p.boundaries
	ready := readyPlaces(p.layers)
	waits := 0 // Gates so far that can wait.
	addReady := func() {
		p.gate = &readyGate{inner: p.gate}
		waits++
	}
	for i := len(p.layers) - 1; i >= 0; i-- {
		l := p.layers[i]
		if ready[i+1] {
			addReady()
		}
		gate, next := p.gate, p.next
		var again Again
		if !isGateOnly(l) {
			b := &boundary{id: id, gate: gate, next: next}
			gate, next, again = b, b.call, b.again
			id--
		}
		p.gate = wrapGate(l, gate, waits)
		if traitsOf(l)&Waits != 0 {
			waits++
		}
		if f, ok := l.(*foreign); ok {
			p.next = f.wrap(next, gate.(*boundary))
		} else {
			p.next = l.WrapCall(next, again)
		}
		if isnil.Value(p.gate) {
			return nil, fmt.Errorf("interceptor: layer %d (%s): WrapGate returned nil", i, nameOf(l))
		}
		if p.next == nil {
			return nil, fmt.Errorf("interceptor: layer %d (%s): WrapCall returned nil", i, nameOf(l))
		}
	}
	if ready[0] {
		addReady()
	}
	p.calls.New = func() any {
		c := new(Call)
		c.reset(p)
		return c
	}
	return p, nil
}

// take takes the layers that are not off, and finds the observer.
func (p *program) take(layers []Layer) error {
	for i, l := range layers {
		switch l := l.(type) {
		case off:
			continue
		case *observe:
			if p.obs != nil {
				return fmt.Errorf("interceptor: layer %d: a stack has one observer, this is the second", i)
			}
			p.obs = l.o
		}
		p.layers = append(p.layers, l)
	}
	return nil
}

// gateOver is a layer whose gate depends on how many of the gates inside it can
// wait, each of which passes a [Slot] once. WrapGateOver is called instead of
// WrapGate.
type gateOver interface {
	WrapGateOver(inner Gate, waits int) Gate
}

// wrapGate returns the gate of l around inner, the gate of the layers inside, of which
// so many can wait.
func wrapGate(l Layer, inner Gate, waits int) Gate {
	if over, ok := l.(gateOver); ok {
		return over.WrapGateOver(inner, waits)
	}
	return l.WrapGate(inner)
}

// admitAll is the innermost gate.
func admitAll(_ context.Context, a *Admission, w Wait) error {
	a.admitted, a.wait = true, w
	return nil
}

// A readyGate admits calls while an endpoint is READY. It takes nothing, and asks
// gRPC's state of the connection, so it works with any policy.
type readyGate struct{ inner Gate }

func (g *readyGate) Admit(ctx context.Context, a *Admission, w Wait) error {
	if a.grpcConn != nil && a.grpcConn.GetState() != connectivity.Ready {
		if err := g.wait(ctx, a, w); err != nil {
			return err
		}
	}
	a.pass()
	return g.inner.Admit(ctx, a, w)
}

// errForgotten is the end of a call that a gate has admitted without asking the
// gates inside, whose limits it would have passed by.
func errForgotten(p *program) error {
	return status.Errorf(codes.Internal, "belfry: a gate of %v admitted a call without asking the gate inside it (Gate.Admit must call inner.Admit)", p)
}

var (
	errTwice    = status.Error(codes.Internal, "belfry: a layer passed a call to next twice; a further attempt is a Call of its own, see interceptor.Again")
	errNoStream = errors.New("interceptor: a stream was opened without an error, but is nil")
)

// innermost hands the attempt to the connection, and finds out what became of it.
func innermost(ctx context.Context, c *Call) (err error) {
	if ctx.Err() != nil {
		return Ended(ctx, stackName)
	}
	if o := c.prog.obs; o != nil {
		o.Attempt(c.method, c.attempt)
	}
	c.departs()
	returned := false
	defer func() {
		if !returned { // What panics may have been sent.
			c.arrived(sent)
		}
	}()
	if c.kind != Unary {
		err = c.openStream(ctx)
		returned = true
		return err
	}
	opts := c.optionsOf(c.optRoom[:0])
	if c.conn != nil {
		err = c.conn.Invoke(ctx, c.method, c.req, c.reply, opts...)
	} else {
		err = c.invoker(ctx, c.method, c.req, c.reply, c.cc, opts...)
	}
	returned = true
	if err == nil {
		c.arrived(sent)
	} else {
		c.arrived(fateOf(c.grpcConn, c.peer.Addr != nil, c.trailer, err))
	}
	return err
}

// optionsOf returns the options of the attempt: a copy in room, unless it is unary
// and nobody wants to know what becomes of it. Otherwise they have options by which
// gRPC tells: it sets the peer and the trailer only of an attempt that it made a
// stream for.
func (c *Call) optionsOf(room []grpc.CallOption) []grpc.CallOption {
	unary := c.kind == Unary
	if c.conn != nil && c.grpcConn == nil {
		c.carried.call = c
		room = append(room, &c.carried)
	} else if unary && len(c.tickets) == 0 && c.parent == nil && !c.wantTrailer && c.prog.obs == nil {
		return c.opts
	}
	room = append(append(room, c.opts...), c.prog.stack.mark)
	if unary {
		room = append(room, grpc.Peer(&c.peer), grpc.Trailer(&c.trailer))
	}
	return room
}

// passed is a call option that says which stack the call has passed.
type passed struct {
	grpc.EmptyCallOption
	stack *Stack
}

var errSameStack = status.Error(codes.Internal, "belfry: the same stack stands twice on this connection: its limits would be taken twice by each call; remove one of them")

func (c *Call) openStream(ctx context.Context) error {
	opts := append(c.optionsOf(c.scope.opts[:0]), grpc.OnFinish(c.scope.finish))
	var err error
	if c.conn != nil {
		c.stream, err = c.conn.NewStream(ctx, c.desc, c.method, opts...)
	} else {
		c.stream, err = c.streamer(ctx, c.desc, c.cc, c.method, opts...)
	}
	if err == nil && c.stream == nil {
		err = errNoStream
	}
	if err == nil || c.grpcConn == nil {
		c.arrived(sent)
	} else {
		c.arrived(fateUnsent(c.grpcConn, err))
	}
	return err
}

// A boundary stands inside each layer that takes part in the call. When the
// inside of the layer is over it releases what the gates inside took.
type boundary struct {
	id   int // From 1 for the outermost; the stack itself is 0.
	gate Gate
	next Next
}

// Admit admits a call to the gates inside.
func (b *boundary) Admit(ctx context.Context, a *Admission, w Wait) error {
	outer := a.section
	a.section = b.id
	*(*Call)(a).waitAt(b.id) = w
	err := b.gate.Admit(ctx, a, w)
	a.section = outer
	return err
}

// call is the Next that the layer outside b gets.
func (b *boundary) call(ctx context.Context, c *Call) (err error) {
	if c.entered >= b.id {
		return errTwice
	}
	c.entered = b.id
	if c.kind != Unary {
		return b.open(ctx, c)
	}
	at := c.at
	c.at = b.id
	returned := false
	defer b.leave(ctx, c, at, &returned, &err)
	err = b.next(ctx, c)
	returned = true
	return err
}

func (b *boundary) leave(ctx context.Context, c *Call, at int, returned *bool, err *error) {
	e := *err
	if !*returned {
		e = errPanic
	}
	c.at = at
	if b.begins(c) {
		defer c.prog.stack.leave(partOne) // Even if a Releaser panics.
		c.ended, c.err = true, e
		defer c.outs.end()
	}
	c.settle(ctx, b.id, e)
}

// A ticket is something that a gate took for a call. It belongs to the section of
// its gate: section 0 are the gates outside of all layers in the call path, and
// section i those directly inside the i-th of these. A section's tickets are
// released when the inside of its layer is over.
type ticket struct {
	r       Releaser
	token   int64
	section int
}

// Hold leaves a ticket on the call: r.Release(token, …) is called exactly once
// when what it stands for is over, that is, when the inside of the nearest layer
// outside this gate that takes part in the call is over: for a gate inside a
// retry, the attempt; otherwise the call. Tickets are released in reverse order.
// A stream holds its tickets until it has ended. Hold may be called before or
// after the gate inside is asked.
func (a *Admission) Hold(r Releaser, token int64) {
	t := ticket{r, token, a.section}
	a.tickets = append(a.tickets, t)
	// A gate that holds after asking inside comes after tickets of sections further
	// in. They are kept in the order of sections.
	for i := len(a.tickets) - 1; i > 0 && a.tickets[i-1].section > t.section; i-- {
		a.tickets[i], a.tickets[i-1] = a.tickets[i-1], t
	}
}

// release releases the tickets from index lo on and removes them. Those of section
// ended ended as e says; those of sections further in were never used. If ended is
// negative all ended as e says.
func (c *Call) release(lo, ended int, e End) {
	if lo < len(c.tickets) {
		c.releaseFrom(lo, ended, &e)
	}
}

func (c *Call) releaseFrom(lo, ended int, e *End) {
	ts := c.tickets[lo:]
	c.tickets = c.tickets[:lo]
	releaseAll(ts, ended, e)
}

// releaseAll releases tickets, the last first, and clears them. A Releaser that
// panics does not keep the others from being released. e is passed on without a copy
// but the one that each Releaser gets, for speed.
func releaseAll(ts []ticket, ended int, e *End) {
	n := len(ts)
	defer func() {
		if n > 0 {
			releaseAll(ts[:n], ended, e)
		}
	}()
	for n > 0 {
		n--
		t := ts[n]
		ts[n] = ticket{}
		if t.section == ended || ended < 0 {
			t.r.Release(t.token, *e)
		} else {
			t.r.Release(t.token, End{Outcome: NotSent, Err: e.Err})
		}
	}
}

// settle ends the unary inside of boundary i with err.
func (c *Call) settle(ctx context.Context, i int, err error) {
	lo := c.from(i)
	if lo < len(c.tickets) {
		e := End{Err: err}
		c.judge(ctx, &e)
		c.releaseFrom(lo, i, &e)
	}
}

// from is the index of the first ticket of section i or further in.
func (c *Call) from(i int) int {
	lo := len(c.tickets)
	for lo > 0 && c.tickets[lo-1].section >= i {
		lo--
	}
	return lo
}

// endOf says how c ended with err.
func (c *Call) endOf(ctx context.Context, err error) End {
	e := End{Err: err}
	c.judge(ctx, &e)
	return e
}

// judge completes e, which has the error.
func (c *Call) judge(ctx context.Context, e *End) {
	if e.Err != nil {
		e.Outcome = judge(ctx, e.Err, c.fate|fate(c.fates.Load()))
		if e.Outcome == Failed && status.Code(e.Err) == codes.Canceled {
			// A layer's deadline has cancelled the attempt, and gRPC does not know why.
			if r, ok := AsRefusal(context.Cause(ctx)); ok {
				e.Err = r
			}
		}
	}
	if c.timed && e.Outcome.Sent() {
		e.sent = c.whenSent()
	}
}

// begins reports whether b is where c, an attempt of its own, begins and ends.
func (b *boundary) begins(c *Call) bool { return c.parent != nil && c.home == b.id }

// target is where an attempt goes.
type target struct {
	cc       *grpc.ClientConn
	conn     grpc.ClientConnInterface // Instead of an invoker or streamer if not nil.
	invoker  grpc.UnaryInvoker
	streamer grpc.Streamer
	grpcConn *grpc.ClientConn // cc or conn, if that is gRPC's own; otherwise nil.
}

// prepare sets what a call starts with. finish is what the caller wants to be
// told at its end.
func (c *Call) prepare(kind Kind, method string, t target, opts []grpc.CallOption) (w Wait, finish []func(error), err error) {
	c.kind, c.method, c.target = kind, method, t
	w = Forever
	for _, o := range opts {
		switch o := o.(type) {
		case waitOption:
			w = min(w, o.w)
		case *carriedWait:
			w = min(w, o.call.wait)
			c.fronts = append(c.fronts, o.call.prog.stack)
		case grpc.OnFinishCallOption:
			finish = append(finish, o.OnFinish)
		case passed:
			if o.stack == c.prog.stack {
				err = errSameStack
			}
		}
	}
	c.opts = opts
	if finish != nil {
		c.opts = make([]grpc.CallOption, 0, len(opts))
		for _, o := range opts {
			if _, ok := o.(grpc.OnFinishCallOption); !ok {
				c.opts = append(c.opts, o)
			}
		}
	}
	return w, finish, err
}

// admit has the call admitted by all gates.
func (p *program) admit(ctx context.Context, c *Call, w Wait) error {
	if ctx.Err() != nil {
		return Ended(ctx, stackName)
	}
	if err := p.gate.Admit(ctx, (*Admission)(c), w); err != nil {
		if err == overdue {
			return overdueUnsent
		}
		return err
	}
	if !c.admitted {
		return errForgotten(p)
	}
	c.running = true
	if p.obs != nil {
		p.obs.Admitted(c.method, c.kind, 0)
	}
	return nil
}

func (s *Stack) invoke(ctx context.Context, method string, req, reply any, t target, opts []grpc.CallOption) (err error) {
	p := s.prog.Load().of(method)
	if err := s.begin(); err != nil {
		return p.turnAway(method, opts, err)
	}
	if p.obs != nil {
		p.obs.InFlight(1)
	}
	ctx, cancel := t.withMethodTimeout(ctx, method)
	if cancel != nil {
		defer cancel()
	}
	c := p.calls.Get().(*Call)
	w, finish, err := c.prepare(Unary, method, t, opts)
	c.req, c.reply = req, reply
	returned := false
	defer p.end(ctx, c, finish, &returned, &err)
	if err == nil {
		err = p.admit(ctx, c, w)
	}
	if err == nil {
		err = p.next(ctx, c)
	}
	returned = true
	return err
}

// turnAway is the end of a call that the stack does not take up.
func (p *program) turnAway(method string, opts []grpc.CallOption, err error) error {
	for _, o := range opts {
		if o, ok := o.(grpc.OnFinishCallOption); ok {
			o.OnFinish(err)
		}
	}
	p.refused(method, err)
	return err
}

// end ends a unary call. If it has not returned it panics, and its Call may be
// used by whoever recovers.
func (p *program) end(ctx context.Context, c *Call, finish []func(error), returned *bool, err *error) {
	defer p.stack.leave(callOne) // Even if a Releaser panics.
	e := *err
	if !*returned {
		e = errPanic
	}
	if c.running {
		c.settle(ctx, 0, e)
	} else {
		c.release(0, -1, endOfRefused(e))
	}
	for _, f := range finish {
		f(e)
	}
	if p.obs != nil {
		p.refused(c.method, e)
		if c.running {
			p.obs.Ended(c.method, Unary, c.endOf(ctx, e).Outcome, e)
		}
		p.obs.InFlight(-1)
	}
	if *returned && !c.forked.Load() {
		c.reset(p)
		p.calls.Put(c)
	}
}

// reset makes c an unused call of p.
func (c *Call) reset(p *program) {
	*c = Call{prog: p}
	c.root = c
	c.tickets, c.notes = c.ticketRoom[:0], c.noteRoom[:0]
}

// refused tells the observer about err if it is a refusal. That of a further attempt
// was told when it was refused, not when the call ends with it.
func (p *program) refused(method string, err error) {
	if p.obs == nil {
		return
	}
	if r, ok := AsRefusal(err); ok && !r.Further {
		p.obs.Refused(method, r.Layer, r.Reason)
	}
}

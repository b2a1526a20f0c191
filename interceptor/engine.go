// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package interceptor

import (
	"context"
	"errors"
	"fmt"
	"io"
	"sync"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/connectivity"
	"google.golang.org/grpc/status"

	"github.com/belfry-go/belfry/internal/attempt"
	"github.com/belfry-go/belfry/internal/isnil"
)

// A program is a list of layers, compiled. It is not changed.
//
// A call passes the gates from the outermost to the innermost, and then the call path.
// Each layer of the call path has a boundary inside it. The gates between two
// boundaries are a section; what they hold is released when the call path inside the
// section's boundary has returned.
type program struct {
	stack      *Stack
	layers     []Layer
	gate       Gate
	next       Next
	boundaries int // Layers in the call path; boundary i is inside the i-th, counted from 1.
	obs        Observer
	name       string // of the stack
	advice     []string
	calls      sync.Pool // *Call of unary calls

	// choose and lists are set, instead of all the rest but stack and layers, if the
	// program depends on the method.
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
	p.gate, p.next = lastGate{}, innermost
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
		var inside *boundary
		if !isGateOnly(l) {
			inside = &boundary{id: id, gate: gate, next: next}
			gate, next = inside, inside.enter()
			id--
		}
		p.gate = wrapGate(l, gate, waits)
		if traitsOf(l)&Waits != 0 {
			waits++
		}
		p.next = wrapCall(l, next, inside)
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
		c.init(p)
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
		case *named:
			if p.name != "" {
				return fmt.Errorf("interceptor: layer %d: a stack has one name, this is the second", i)
			}
			p.name = l.name
		case *observe:
			if p.obs != nil {
				return fmt.Errorf("interceptor: layer %d: a stack has one observer, this is the second", i)
			}
			p.obs = l.o
		}
		p.layers = append(p.layers, l)
	}
	if p.name == "" {
		p.name = stackName
	}
	return nil
}

// gateOver is a layer whose gate depends on how many of the gates inside it can wait.
// Each of them passes a [Slot] once. WrapGateOver is called instead of WrapGate.
type gateOver interface {
	WrapGateOver(inner Gate, waits int) Gate
}

// wrapGate returns the gate of l around inner, the gate of the layers inside. waits is
// how many of those can wait.
func wrapGate(l Layer, inner Gate, waits int) Gate {
	if over, ok := l.(gateOver); ok {
		return over.WrapGateOver(inner, waits)
	}
	return l.WrapGate(inner)
}

// callOver is a layer whose call path makes Calls of its own for the boundary inside
// it. wrap is called instead of WrapCall.
type callOver interface {
	wrap(next Next, inside *boundary) Next
}

// wrapCall returns the call path of l around next. inside is the boundary inside l,
// nil if l leaves the call path alone.
func wrapCall(l Layer, next Next, inside *boundary) Next {
	if over, ok := l.(callOver); ok {
		return over.wrap(next, inside)
	}
	if inside == nil {
		return l.WrapCall(next, nil)
	}
	return l.WrapCall(next, inside.again)
}

// lastGate is the innermost gate.
type lastGate struct{}

func (lastGate) Admit(_ context.Context, a *Admission, w Wait) error {
	a.admitted, a.wait = true, max(w, a.later) // A gate further out may only have tried.
	return nil
}

// A readyGate admits calls while an endpoint is READY. It takes nothing. It reads gRPC's
// state of the connection, so it works with any policy.
type readyGate struct{ inner Gate }

func (g *readyGate) Admit(ctx context.Context, a *Admission, w Wait) error {
	if a.grpcConn != nil && a.grpcConn.GetState() != connectivity.Ready {
		if err := g.wait(ctx, a, w); err != nil {
			return err
		}
	}
	a.Internals().Pass()
	return g.inner.Admit(ctx, a, w)
}

// errForgotten fails a call that a gate admitted without asking the gates inside, so
// that it does not bypass their limits.
func errForgotten(p *program) error {
	return status.Errorf(codes.Internal, "belfry: a gate of %v admitted a call without asking the gate inside it (Gate.Admit must call inner.Admit)", p)
}

var (
	errTwice    = status.Error(codes.Internal, "belfry: a layer passed a call to next twice; a further attempt is a Call of its own, see interceptor.Again")
	errNoStream = status.Error(codes.Internal, "belfry: a layer or an interceptor opened a stream without an error, but it is nil")
	errNilGate  = status.Error(codes.Internal, "belfry: a gate returned a nil *Refusal as an error; return nil without a type")
)

// innermost hands the attempt to the connection and records what became of it.
func innermost(ctx context.Context, c *Call) error {
	if ctx.Err() != nil {
		return Ended(ctx, stackName)
	}
	c.departs()
	ctx = c.inSeries(ctx)
	if o := c.prog.obs; o != nil {
		return c.sendObserved(ctx, o)
	}
	if c.perCall != nil {
		return c.sendAs(ctx, c.perCall)
	}
	return c.send(ctx)
}

// sendObserved is innermost for a stack with an observer. The end of a stream's attempt is
// told by its scope.
func (c *Call) sendObserved(ctx context.Context, o Observer) (err error) {
	o.Attempt(c.observed())
	c.departed = Now()
	if c.kind == Unary {
		err = errPanic
		defer func() { c.attemptEnded(ctx, o, c.fate, err, c.peer.Addr) }()
	}
	if c.perCall != nil {
		err = c.sendAs(ctx, c.perCall)
	} else {
		err = c.send(ctx)
	}
	return err
}

// send hands the attempt to the connection.
func (c *Call) send(ctx context.Context) (err error) {
	if c.kind != Unary {
		return c.openStream(ctx)
	}
	opts := c.unaryOptions()
	c.fate = attempt.Sent // What panics may have been sent.
	if c.conn != nil {
		err = c.conn.Invoke(ctx, c.method, c.req, c.reply, opts...)
	} else {
		err = c.invoker(ctx, c.method, c.req, c.reply, c.cc, opts...)
	}
	if err == io.EOF && c.grpcConn != nil { // See scope.unrepeated.
		err = errUnrepeated
	}
	err = c.roomless(err)
	c.arrived(c.fateOf(err))
	return err
}

// roomless returns what an attempt fails with that ended with err: a refusal if no
// endpoint had room for it.
func (c *Call) roomless(err error) error {
	if err != nil && c.room.none.Load() && c.room.none.Swap(false) {
		return noRoom
	}
	return err
}

// unaryOptions returns the options of a unary attempt. It adds those that show what
// became of it: gRPC sets the peer and the trailer only of an attempt that it made a
// stream for. If nobody needs to know, it returns the caller's options as they are.
func (c *Call) unaryOptions() []grpc.CallOption {
	carry, bounded := c.carries(), c.bounded()
	if !carry && !bounded && len(c.tickets) == 0 && c.parent == nil && !c.wantTrailer && c.perCall == nil && c.prog.obs == nil {
		return c.opts
	}
	opts := append(c.options[:ownOptions], c.opts...)
	if carry {
		opts = append(opts, &c.carried)
	}
	if bounded {
		opts = append(opts, &c.room)
	}
	return opts
}

// carries reports whether the connection is told which call it is: one that may let
// calls wait itself.
func (c *Call) carries() bool { return c.conn != nil && c.grpcConn == nil }

// bounded reports whether the balancing policy is told that the call may not wait forever.
func (c *Call) bounded() bool { return c.wait != Forever && c.grpcConn != nil }

// passed is a call option that names a stack that the call has passed.
type passed struct {
	grpc.EmptyCallOption
	stack *Stack
}

var errSameStack = status.Error(codes.Internal, "belfry: the same stack is twice on this connection, so each call would take from its limits twice; remove one of them")

func (c *Call) openStream(ctx context.Context) (err error) {
	if c.parent == nil {
		c.scope.outermost().sent = c.scope
	}
	opts := append(append(c.scope.opts[:0], c.opts...), c.options[0], c.options[1], grpc.OnFinish(c.scope.finish))
	if c.carries() {
		opts = append(opts, &c.carried)
	}
	if c.bounded() {
		opts = append(opts, &c.room)
	}
	if c.conn == nil { // Otherwise credentials among the defaults of the connection are not known.
		opts = append(opts, c.scope.streams.init(c.opts))
	}
	returned := false
	defer func() {
		if !returned { // What panics may have been sent.
			c.arrived(attempt.Sent)
		}
	}()
	if c.conn != nil {
		c.stream, err = c.conn.NewStream(ctx, c.desc, c.method, opts...)
	} else {
		c.stream, err = c.streamer(ctx, c.desc, c.cc, c.method, opts...)
	}
	returned = true
	c.scope.streams.opened()
	if err == nil && c.stream == nil {
		err = errNoStream
	}
	err = c.roomless(err)
	c.arrived(c.fateOf(err))
	return err
}

// A boundary is inside each layer that takes part in the call. When the call path
// inside it returns, it releases what the gates inside took.
type boundary struct {
	id   int // From 1 for the outermost; the stack itself is 0.
	gate Gate
	next Next
}

// Admit admits a call to the gates inside.
func (b *boundary) Admit(ctx context.Context, a *Admission, w Wait) error {
	outer := a.section
	a.section = b.id
	*(*Call)(a).waitAt(b.id) = max(w, a.later)
	err := b.gate.Admit(ctx, a, w)
	a.section = outer
	return err
}

// enter returns the Next that the layer outside b gets.
func (b *boundary) enter() Next {
	return func(ctx context.Context, c *Call) error {
		if c.entered >= b.id {
			return errTwice
		}
		c.entered = b.id
		switch {
		case c.kind != Unary:
			return b.open(ctx, c)
		case c.home == b.id:
			return b.run(ctx, c)
		}
		err := b.next(ctx, c)
		c.settle(ctx, b.id, err) // What a panic leaves is settled further out, by the end of the call at the latest.
		return err
	}
}

// run carries out a unary attempt that begins and ends at b, a fork.
func (b *boundary) run(ctx context.Context, c *Call) error {
	defer c.prog.stack.leave(partOne)
	defer b.end(ctx, c)
	c.err = b.next(ctx, c)
	return c.err
}

func (b *boundary) end(ctx context.Context, c *Call) {
	if c.err == errPanic {
		c.arrived(c.fate)
	}
	c.settleAll(ctx, b.id)
}

// A ticket is something that a gate took for a call. It belongs to the section of its
// gate: section 0 holds the gates outside all layers in the call path, section i those
// directly inside the i-th such layer. A section's tickets are released when the call
// path inside that layer has returned.
type ticket struct {
	r       Releaser
	token   int64
	section int
}

// Hold leaves a ticket on the call. r.Release(token, …) is called exactly once when
// the call, or for a gate inside a retry the attempt, is over: when the call path
// inside the nearest layer outside this gate has returned. Tickets are released in
// reverse order. A stream holds its tickets until it has ended. Hold may be called
// before or after the inner gate is asked.
func (a *Admission) Hold(r Releaser, token int64) {
	t := ticket{r, token, a.section}
	a.tickets = append(a.tickets, t)
	// A gate may hold after it has asked the inner gate, and then comes after tickets of
	// sections further in. Keep the tickets in the order of sections.
	for i := len(a.tickets) - 1; i > 0 && a.tickets[i-1].section > t.section; i-- {
		a.tickets[i], a.tickets[i-1] = a.tickets[i-1], t
	}
}

// release releases the tickets from index lo on, which ended as e says, and removes
// them.
func (c *Call) release(lo int, e End) {
	ts := c.tickets[lo:]
	c.tickets = c.tickets[:lo]
	releaseAll(ts, e)
}

// releaseAll releases tickets, the last first. A Releaser that panics does not keep
// the others from being released.
func releaseAll(ts []ticket, e End) {
	n := len(ts)
	if n == 0 {
		return
	}
	defer func() { releaseAll(ts[:n], e) }()
	for n > 0 {
		n--
		ts[n].r.Release(ts[n].token, e)
	}
}

// settle ends the unary inside of boundary i with err: it releases the tickets of
// section i, and of the sections further in, which were never used. Each is removed
// first, so that after a Releaser that panics the others can be settled further out.
func (c *Call) settle(ctx context.Context, i int, err error) {
	if n := len(c.tickets); n > 0 && c.tickets[n-1].section >= i {
		c.settleHeld(ctx, i, err)
	}
}

func (c *Call) settleHeld(ctx context.Context, i int, err error) {
	e := c.endOf(ctx, err)
	for n := len(c.tickets); n > 0 && c.tickets[n-1].section >= i; n-- {
		t := c.tickets[n-1]
		c.tickets = c.tickets[:n-1]
		switch {
		case t.section == i:
			t.r.Release(t.token, e)
		case t.section <= c.entered: // A layer has recovered from a panic inside it.
			t.r.Release(t.token, c.endOf(ctx, errPanic))
		default:
			t.r.Release(t.token, End{Outcome: NotSent, Err: err})
		}
	}
}

// settleAll is settle for the outermost boundary of a call or fork: nobody is further
// out, so it continues after a Releaser that panics.
func (c *Call) settleAll(ctx context.Context, i int) {
	switch {
	case len(c.tickets) == 0:
	case !c.admitted:
		c.release(0, endOfRefused(c.err))
	default:
		defer c.settleAll(ctx, i)
		c.settle(ctx, i, c.err)
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
func (c *Call) endOf(ctx context.Context, err error) (e End) {
	e.Err = err
	if err != nil {
		fate := c.fate | attempt.Fate(c.fates.Load())
		if err == errPanic && c.forks.Load() > 0 {
			fate |= attempt.Sent // An attempt beside the one that panicked may still be on its way.
		}
		e.Outcome = judge(ctx, err, fate)
		if e.Outcome == Failed && status.Code(err) == codes.Canceled {
			// A layer's deadline has cancelled the attempt, and gRPC does not know why.
			if r, ok := AsRefusal(context.Cause(ctx)); ok {
				e.Err = r
			}
		}
	}
	if c.timed && e.Outcome.Sent() {
		e.sent = c.whenSent()
	}
	return e
}

// target is where a call goes: a connection, or the next interceptor.
type target struct {
	cc       *grpc.ClientConn
	conn     grpc.ClientConnInterface // Instead of an invoker or streamer if not nil.
	invoker  grpc.UnaryInvoker
	streamer grpc.Streamer
	grpcConn *grpc.ClientConn // cc or conn, if that is gRPC's own; otherwise nil.
	once     bool             // gRPC makes one attempt, whatever retryPolicy there is.
}

// prepare takes from the options of a call what the stack needs of them.
func (c *Call) prepare(opts []grpc.CallOption) (w Wait, err error) {
	w = Forever
	mine := 0 // Options that are for this stack alone.
	for _, o := range opts {
		switch o := o.(type) {
		case waitOption:
			w = min(w, o.w)
		case *carriedWait:
			w = min(w, o.call.wait)
			c.fronts = append(c.fronts, o.call.prog.stack)
		case grpc.StaticMethodCallOption:
			c.static = true
		case grpc.OnFinishCallOption:
			c.finish = append(c.finish, o.OnFinish)
			mine++
		case attempt.Option, attempt.ReportOption, *attempt.Entry:
			if c.ownOption(o) {
				mine++
			}
		case passed:
			if o.stack == c.prog.stack {
				err = errSameStack
			}
		}
	}
	c.opts = opts
	if mine > 0 {
		c.opts = make([]grpc.CallOption, 0, len(opts)-mine)
		for _, o := range opts {
			switch o.(type) {
			case grpc.OnFinishCallOption, attempt.ReportOption, *attempt.Entry:
			default:
				c.opts = append(c.opts, o)
			}
		}
	}
	return w, err
}

// admit asks all gates to admit the call.
func (p *program) admit(ctx context.Context, c *Call, w Wait) error {
	if ctx.Err() != nil {
		return Ended(ctx, stackName)
	}
	if err := p.gate.Admit(ctx, (*Admission)(c), w); err != nil {
		c.admitted = false
		return c.refusedBy(ctx, err)
	}
	if !c.admitted {
		return errForgotten(p)
	}
	if p.obs != nil {
		p.obs.Admitted(c.observed())
	}
	return nil
}

// refusedBy is what the caller gets for the error of a gate: the end of a context
// gets the code that it has in gRPC.
func (c *Call) refusedBy(ctx context.Context, err error) error {
	if r, ok := err.(*Refusal); ok {
		if r == nil {
			return errNilGate
		}
		return err
	}
	cancelled := errors.Is(err, context.Canceled)
	if !cancelled && !errors.Is(err, context.DeadlineExceeded) {
		return err
	}
	if _, ok := status.FromError(err); ok {
		return err
	}
	switch {
	case ctx.Err() != nil:
		return Ended(ctx, stackName)
	case c.prog.stack.drains():
		return draining
	case cancelled:
		return Refuse(stackName, ReasonCancelled, "a gate gave up").Because(err, false)
	}
	return Refuse(stackName, ReasonDeadline, "a gate gave up").Because(err, false)
}

// begin returns an unused Call for a unary call, whose target the caller sets.
func (s *Stack) begin(ctx context.Context, method string, opts []grpc.CallOption) (*Call, error) {
	p := s.prog.Load().of(method)
	if err := s.enter(); err != nil {
		return nil, p.turnAway(Observed{Context: ctx, Method: method}, opts, err)
	}
	return p.calls.Get().(*Call), nil
}

// invoke carries out a unary call and returns c to its pool, unless it panics: then
// whoever recovers may use c.
func (c *Call) invoke(ctx context.Context, method string, req, reply any, opts []grpc.CallOption) error {
	c.method, c.req, c.reply = method, req, reply
	err := c.run(ctx, opts)
	if c.forks.Load() == 0 {
		p := c.prog
		c.reset(p)
		p.calls.Put(c)
	}
	return err
}

func (c *Call) run(ctx context.Context, opts []grpc.CallOption) error {
	p := c.prog
	c.ctx = ctx
	ctx = c.withMethodConfig(ctx, 0)
	defer p.stack.leave(callOne)
	defer func() { c.over(ctx) }()
	defer func() { c.settleAll(ctx, 0) }()
	w, err := c.prepare(opts)
	if p.obs != nil {
		c.enters(p.obs)
	}
	if err == nil {
		err = p.admit(ctx, c, w)
	}
	if err == nil {
		ctx = c.withLateMethodConfig(ctx)
		err = p.next(ctx, c)
	}
	c.err = c.told(ctx, err)
	return c.err
}

// enters tells the observer that the call is in the stack.
func (c *Call) enters(o Observer) {
	c.began = Now()
	o.InFlight(c.observed(), 1)
}

// turnAway ends a call that the stack refuses because it drains.
func (p *program) turnAway(c Observed, opts []grpc.CallOption, err error) error {
	for _, o := range opts {
		switch o := o.(type) {
		case grpc.OnFinishCallOption:
			o.OnFinish(err)
		case attempt.ReportOption:
			o.Fill(nil, 0, false)
		}
	}
	if p.obs != nil {
		c.Stack = p.name
		if r, ok := AsRefusal(err); ok {
			p.obs.Refused(c, r)
		}
		p.obs.Ended(c, ObservedEnd{Outcome: NotSent, Err: err})
	}
	return err
}

// over tells the caller and the observer of the end of a unary call.
func (c *Call) over(ctx context.Context) {
	outcome := NotSent
	if c.prog.obs != nil {
		outcome = c.endOf(ctx, c.err).Outcome
	}
	c.tell(outcome, c.err)
}

// tell tells those who want to know that the call is over.
func (c *Call) tell(o Outcome, err error) {
	if c.cancel != nil {
		c.cancel()
	}
	if p := c.perCall; p != nil && p.Owner {
		p.Record.Close(err, errSuperseded)
	}
	for _, f := range c.finish {
		f(err)
	}
	if obs := c.prog.obs; obs != nil {
		c.refused(err)
		if err == io.EOF {
			err = nil
		}
		obs.Ended(c.observed(), ObservedEnd{Took: Now().Sub(c.began), Outcome: o, Err: err})
		obs.InFlight(c.observed(), -1)
	}
}

// refused tells the observer about err if it is a refusal. That of a further attempt
// was told when it was refused, not when the call ends with it.
func (c *Call) refused(err error) {
	if c.prog.obs == nil {
		return
	}
	if r, ok := AsRefusal(err); ok && !r.Further {
		c.prog.obs.Refused(c.observed(), r)
	}
}

// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package interceptor

import (
	"context"
	"io"
	"slices"
	"sync"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
)

// A scope is the life of a stream as seen from one place in the stack: outside
// of all layers (the root, which the caller gets), or inside a layer that takes
// part in the call. It holds the tickets of the gates at that place and releases
// them when the stream has ended there. A layer between two scopes may end
// streams and open others while the outer one lives.
//
// A stream ends, for a scope,
//   - when RecvMsg returns an error, io.EOF included, or the one response of a
//     stream that has only one;
//   - when SendMsg returns an error other than io.EOF, or Header an error;
//   - when gRPC says so (grpc.OnFinish), which is how a stream ends that nobody
//     reads from any more, by its context or by ClientConn.Close. Only the
//     innermost scope hears it, and it is believed only for these two: a retrying
//     interceptor of others behind the stack would make it heard for each attempt;
//   - when its context ends and gRPC does not say so, for outer scopes and for
//     connections that are not gRPC's;
//   - when a layer inside cuts it short ([StreamEnd]);
//   - when the scope around it ends.
//
// Whichever comes first, and only that.
type scope struct {
	grpc.ClientStream // Set by open.

	call    *Call
	ctx     context.Context
	id      int
	tickets []ticket // A part of call.tickets that is not changed any more.
	single  bool     // The server sends one message.
	watch   bool     // The end of ctx has to be watched for.
	fork    bool     // call is a fork that begins here.
	root    *streamCall
	parent  *scope // Nil for the root.

	// mu guards the fields below. It is not held while a layer, a caller's function
	// or another scope is called, so no order with other locks is needed.
	mu       sync.Mutex
	sent     bool
	opened   bool  // The stream is open, or could not be opened.
	over     bool  // The end has been taken up by one of those who saw it.
	early    error // The end, if it came before open,
	isEarly  bool
	outdone  bool     // and whether that was because another one is over.
	children []*scope // Scopes inside, of all attempts.
	stop     func() bool

	opts [4]grpc.CallOption // Room for the options of the attempt.
}

// streamCall is a stream's Call and root scope, in one allocation.
type streamCall struct {
	Call
	scope  scope
	finish []func(error)
	fences [6]int // Room for Call.fence.
}

func (s *Stack) open(ctx context.Context, desc *grpc.StreamDesc, method string, t target, opts []grpc.CallOption) (_ grpc.ClientStream, err error) {
	p := s.prog.Load().of(method)
	if err := s.begin(); err != nil {
		return nil, p.turnAway(method, opts, err)
	}
	if p.obs != nil {
		p.obs.InFlight(1)
	}
	sc := new(streamCall)
	c := &sc.Call
	c.prog, c.root, c.desc = p, c, desc
	c.tickets = c.inline[:0]
	if n := p.boundaries + 2; n <= len(sc.fences) {
		c.fence = sc.fences[:n]
	} else {
		c.fence = make([]int, n)
	}
	w, finish := c.prepare(kindOf(desc), method, t, opts)
	sc.finish = finish
	sc.scope.root = sc
	c.scope = &sc.scope
	returned := false
	defer func() {
		switch {
		case returned && err == nil:
		case !returned:
			sc.abort(errPanic)
		default:
			sc.abort(err)
		}
	}()
	if err = p.gate.Admit(ctx, c, w); err == nil {
		c.running = true
		sc.scope.begin(ctx, c, 0, 0)
		if p.obs != nil {
			p.obs.Admitted(method, c.kind, 0)
		}
		err = p.next(ctx, c)
	}
	returned = true
	if err != nil {
		return nil, err
	}
	sc.scope.open(c, c.stream)
	return &sc.scope, nil
}

// abort ends a stream that was not opened.
func (sc *streamCall) abort(err error) {
	c := &sc.Call
	if c.running {
		sc.scope.fail(c, err)
		return
	}
	c.release(0, NotSent, err)
	sc.done(NotSent, err)
}

// done is the end of the call, after its tickets were released.
func (sc *streamCall) done(o Outcome, err error) {
	for _, f := range sc.finish {
		f(err)
	}
	p := sc.prog
	if p.obs != nil {
		p.refused(sc.method, err)
		if sc.running {
			p.obs.Ended(sc.method, sc.kind, o, err)
		}
		p.obs.InFlight(-1)
	}
	p.stack.leave(callOne)
}

// begin readies s for the stream that is about to be opened inside boundary id,
// whose tickets begin at lo.
func (s *scope) begin(ctx context.Context, c *Call, id, lo int) {
	s.call, s.ctx, s.id = c, ctx, id
	hi := min(c.fence[id+1], len(c.tickets))
	// Later admissions append behind hi, so this part stays as it is.
	s.tickets = c.tickets[lo:hi:hi]
	s.single = !c.desc.ServerStreams
	s.watch = id != c.prog.boundaries || !c.reportsEnd()
}

// reportsEnd reports whether the connection is gRPC's own, which calls
// grpc.OnFinish.
func (c *Call) reportsEnd() bool {
	if c.conn == nil {
		return c.cc != nil
	}
	_, ok := c.conn.(*grpc.ClientConn)
	return ok
}

// unused releases what is held inside the next boundary if it was not entered.
func (s *scope) unused(c *Call, err error) {
	if f := c.fence[s.id+1]; f < len(c.tickets) {
		c.dropFences(s.id + 1)
		c.release(f, NotSent, err)
	}
}

// open says that the stream is open. c is the call on its goroutine.
func (s *scope) open(c *Call, stream grpc.ClientStream) {
	s.unused(c, nil)
	s.mu.Lock()
	s.ClientStream = stream
	s.sent = c.wasSent()
	s.opened = true
	early, isEarly, outdone := s.early, s.isEarly, s.outdone
	if s.watch && !isEarly && s.ctx.Done() != nil {
		s.stop = context.AfterFunc(s.ctx, s.expire)
	}
	s.mu.Unlock()
	if isEarly {
		s.end(early, outdone)
	}
}

// fail says that the stream could not be opened.
func (s *scope) fail(c *Call, err error) {
	s.unused(c, err)
	s.mu.Lock()
	s.sent = c.wasSent()
	s.opened = true
	s.mu.Unlock()
	s.end(err, false)
}

// end ends the stream for s, if it has not ended yet: first for the scopes
// inside, so that tickets are released in reverse order. superseded says that
// the stream has not ended by itself.
func (s *scope) end(err error, superseded bool) {
	s.mu.Lock()
	if !s.opened {
		// Its Call is still in use by the goroutine that opens it, which will end it.
		if !s.isEarly {
			s.early, s.isEarly, s.outdone = err, true, superseded
		}
		s.mu.Unlock()
		return
	}
	if s.over {
		s.mu.Unlock()
		return
	}
	s.over = true
	children, stop := s.children, s.stop
	// A layer inside may have sent it only after it was open.
	sent := s.sent || s.call.below.Load()
	s.children = nil
	s.mu.Unlock()
	if stop != nil {
		stop()
	}
	for _, in := range slices.Backward(children) {
		in.end(err, true)
	}
	if err == io.EOF {
		err = nil
	}
	o := outcomeOf(s.ctx, err, sent)
	if superseded && sent && s.ctx.Err() != context.DeadlineExceeded && !cutShort(s.ctx) {
		o = Ignored
		if err == nil {
			err = errSuperseded
		}
	}
	if o == Failed && status.Code(err) == codes.Canceled {
		// gRPC may tell of a layer's cancelling before the layer does, and not why.
		if r, ok := AsRefusal(context.Cause(s.ctx)); ok {
			err = r
		}
	}
	defer s.ended(o, err) // Even if a Releaser panics.
	releaseAll(s.tickets, o, err)
}

var errSuperseded = status.Error(codes.Canceled, "belfry: the call ended without this attempt")

func (s *scope) ended(o Outcome, err error) {
	if s.fork {
		s.call.outs.end()
	}
	if s.root != nil {
		s.root.done(o, err)
		return
	}
	s.parent.remove(s)
	s.call.prog.stack.leave(partOne)
}

func (s *scope) add(in *scope) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.over {
		s.children = append(s.children, in)
	}
}

func (s *scope) remove(in *scope) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if i := slices.Index(s.children, in); i >= 0 {
		s.children = slices.Delete(s.children, i, i+1)
	}
}

// finish is told by gRPC that the stream has ended. See the type for when that
// is believed.
func (s *scope) finish(err error) {
	closing := isClosing(err)
	if !closing && s.ctx.Err() == nil {
		// gRPC's own deadline, from a service config, ends a stream too.
		if code := status.Code(err); code != codes.Canceled && code != codes.DeadlineExceeded {
			return
		}
	}
	s.end(err, false)
	for p := s.parent; p != nil && (closing || p.ctx.Err() != nil); p = p.parent {
		p.end(err, false)
	}
}

// expire is called when ctx has ended.
func (s *scope) expire() {
	if r, ok := AsRefusal(context.Cause(s.ctx)); ok {
		s.end(r, false)
		return
	}
	s.end(status.FromContextError(s.ctx.Err()).Err(), false)
}

func (s *scope) Header() (md metadata.MD, err error) {
	md, err = s.ClientStream.Header()
	if err != nil {
		s.end(err, false)
	}
	return md, err
}

func (s *scope) SendMsg(m any) error {
	err := s.ClientStream.SendMsg(m)
	if err != nil && err != io.EOF {
		s.end(err, false)
	}
	return err
}

func (s *scope) RecvMsg(m any) error {
	err := s.ClientStream.RecvMsg(m)
	if err != nil || s.single {
		s.end(err, false)
	}
	return err
}

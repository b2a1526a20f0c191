// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package interceptor

import (
	"context"
	"io"
	"net"
	"reflect"
	"slices"
	"sync"
	"sync/atomic"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"github.com/belfry-go/belfry/internal/attempt"
	"github.com/belfry-go/belfry/internal/result"
)

// A scope is a stream as seen from one position in the stack: outside all layers (the
// root, which the caller gets), or inside a layer that takes part in the call. It holds
// the tickets of the gates there, and releases them when the stream has ended there. A
// layer between two scopes may end streams and open others while the outer one lives.
//
// A stream ends, for a scope,
//   - when RecvMsg returns an error, io.EOF included, or the one response of a
//     stream that has only one;
//   - when SendMsg returns an error other than io.EOF, or Header an error;
//   - when gRPC says so (grpc.OnFinish). That is how a stream ends that nobody reads
//     from any more, by its context or by ClientConn.Close. Only the innermost scope
//     hears it, and we trust it only for these two causes: a third-party retrying
//     interceptor below us would fire it once per attempt;
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
	tickets []ticket     // Those of section id. They are a part of call.tickets, which is not changed any more.
	single  bool         // The server sends one message.
	watch   bool         // The end of ctx has to be watched for.
	fork    bool         // call is a fork that begins here.
	vars    *result.Vars // Where the attempt writes its results; nil if that is the caller's business.
	root    *streamCall
	parent  *scope // Nil for the root.

	// Of a layer inside that makes further attempts: the results of which attempt are
	// the stream's, what they are copied to if that is the attempt of another such layer,
	// and who is told of the end. The other two are set before open.
	chosen atomic.Pointer[result.Vars]
	around *result.Vars
	ender  interface{ StreamEnded() }

	// mu guards the fields below. It is not held while a layer, a caller's function
	// or another scope is called, but for Responders, whose own locks are taken under
	// it.
	mu       sync.Mutex
	opened   bool  // The stream is open, or could not be opened.
	over     bool  // The first end was handled.
	copied   bool  // Results were copied.
	shown    bool  // An operation has told of the end, so results are not copied any more.
	how      error // The end that was the first.
	early    error // The end, if it came before open,
	isEarly  bool
	outdone  bool     // and whether that was because another one is over.
	children []*scope // Scopes inside, of all attempts.
	stop     func() bool
	awaited  chan struct{} // Closed when finished is set; nil if nobody waits for that.

	cut       atomic.Bool                   // The first end was an error. Set under mu.
	asked     atomic.Bool                   // A message was sent.
	sends     atomic.Uint32                 // Messages that the connection took, see Internals.Sends.
	responded atomic.Bool                   // The first response was seen before the end. Set under mu.
	finished  atomic.Bool                   // gRPC has ended the stream, and written the results,
	well      atomic.Bool                   // with OK.
	heard     atomic.Bool                   // gRPC has told of a response or of the end, and repeats the stream no more.
	refused   atomic.Bool                   // It took no message any more, before that.
	receiving atomic.Bool                   // RecvMsg was called, and has told no end.
	ending    atomic.Bool                   // The stream is about to end, so operations that begin now do not count.
	busy      atomic.Int32                  // Operations that run, if chosen is set: they may yet choose another attempt.
	quiet     atomic.Pointer[chan struct{}] // Closed when none runs; nil if nobody waits for that.

	streams streamCount        // How many gRPC has made of the stream.
	opts    [8]grpc.CallOption // Room for the options of the attempt,
	kids    [1]*scope          // and for the scopes inside.
}

// streamCall is a stream's Call with the scopes of a stack of usual depth, in one
// allocation.
type streamCall struct {
	Call
	scope scope
	room  [2]scope       // For the outermost boundaries.
	told  sync.WaitGroup // Until the caller's functions were told of the end.
	sent  *scope         // Whose attempt writes its results to the caller's variables; nil before it is sent.

	results sync.Mutex // Guards shown and, until that is set, the caller's variables for results.
	shown   bool       // The caller knows that the stream has ended, and may read them.
}

// Results of a stream, the variables that Header, Trailer and Peer options point at, have
// these writers:
//
//   - gRPC writes those of an attempt when its stream has ended, under a lock that every
//     operation that tells of the end takes afterwards, and then calls scope.finish. If no
//     layer has redirected them they are the caller's own.
//   - A scope around a layer that makes further attempts copies those of the attempt that
//     counts (copyLocked), to the caller's or to those of the attempt that it is itself.
//     It reads them only after SetWritten, which is an atomic store after gRPC's write, or
//     after the copy of the scope further in.
//
// Their reader is the caller once it knows the end: by an operation (told), or by
// grpc.OnFinish (done). So an end that is not gRPC's own, of a context or a layer, is
// handled after gRPC has written, and after the operations have ended that may yet choose
// another attempt (await). Both ways set shown, under the mutex under which the copy is
// made, before the caller is told. What comes later is not copied. The caller may be a stack
// in front, which copies further.

// show keeps results from being copied to the caller's variables from now on.
func (sc *streamCall) show() {
	sc.results.Lock()
	defer sc.results.Unlock()
	sc.shown = true
}

func (s *Stack) open(ctx context.Context, desc *grpc.StreamDesc, method string, t *target, opts []grpc.CallOption) (_ grpc.ClientStream, err error) {
	p := s.prog.Load().of(method)
	if err := s.enter(); err != nil {
		return nil, p.turnAway(Observed{Context: ctx, Method: method, Kind: kindOf(desc)}, opts, err)
	}
	sc := new(streamCall)
	sc.told.Add(1)
	c := &sc.Call
	c.init(p)
	c.desc = desc
	c.ctx, c.kind, c.method, c.target = ctx, kindOf(desc), method, *t
	ctx = c.withMethodConfig(ctx, 0)
	w, err := c.prepare(opts)
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
	if p.obs != nil {
		c.enters(p.obs)
	}
	if err == nil {
		err = p.admit(ctx, c, w)
	}
	if err == nil {
		ctx = c.withLateMethodConfig(ctx)
		sc.scope.begin(ctx, c, 0)
		if err = p.next(ctx, c); err == nil && c.stream == nil {
			err = errNoStream
		}
	}
	returned = true
	if err != nil {
		return nil, c.told(ctx, err)
	}
	sc.scope.open(c, c.stream)
	return &sc.scope, nil
}

// open is [boundary.call] for a stream: what the inside holds it holds until the
// stream has ended.
func (b *boundary) open(ctx context.Context, c *Call) (err error) {
	outer := c.scope
	s := c.newScope(b.id)
	s.begin(ctx, c, b.id)
	s.parent = outer
	// A scope that has the context of the one around it ends with that.
	s.watch = s.watch && !sameContext(ctx, outer.ctx)
	s.fork = c.home == b.id
	c.prog.stack.enterPart()
	outer.add(s)
	c.scope = s
	returned := false
	defer func() {
		c.scope = outer
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
	if err = b.next(ctx, c); err == nil && c.stream == nil {
		err = errNoStream
	}
	returned = true
	return err
}

// newScope returns the scope inside boundary id.
func (c *Call) newScope(id int) *scope {
	if c.parent == nil {
		if sc := c.scope.outermost(); id <= len(sc.room) {
			return &sc.room[id-1]
		}
	}
	return new(scope)
}

// outermost is the stream that the caller gets.
func (s *scope) outermost() *streamCall {
	for s.parent != nil {
		s = s.parent
	}
	return s.root
}

// abort ends a stream that could not be opened.
func (sc *streamCall) abort(err error) {
	c := &sc.Call
	if sc.scope.call != nil { // It has begun.
		sc.scope.fail(c, err)
		return
	}
	e := endOfRefused(err)
	c.release(0, e)
	sc.done(e.Outcome, err)
}

// done ends the call, after its tickets were released.
func (sc *streamCall) done(o Outcome, err error) {
	defer sc.prog.stack.leave(callOne) // Even if a function of the caller or the observer panics.
	defer sc.told.Done()
	if len(sc.finish) > 0 {
		if l := sc.sent; l != nil && l.vars == nil && (l.ctx.Err() != nil || sc.scope.ctx.Err() != nil) {
			l.awaitFinish() // A connection that is not gRPC's may be later than the context.
		}
		sc.show()
	}
	sc.tell(o, err)
}

// begin prepares s for the stream that is about to be opened inside boundary id.
func (s *scope) begin(ctx context.Context, c *Call, id int) {
	s.call, s.ctx, s.id = c, ctx, id
	lo, hi := c.from(id), c.from(id+1)
	s.tickets = c.tickets[lo:hi:hi]
	s.single = !c.desc.ServerStreams
	s.vars = c.vars
	s.watch = !s.innermost() || c.grpcConn == nil
}

// innermost reports whether the stream of s is that of the connection.
func (s *scope) innermost() bool { return s.id == s.call.prog.boundaries }

// sameContext reports whether a and b are known to be one context.
func sameContext(a, b context.Context) bool {
	return reflect.TypeOf(a).Comparable() && reflect.TypeOf(b).Comparable() && a == b
}

// unused releases what is held inside the next boundary, if that was not entered.
func (s *scope) unused(c *Call, err error) {
	if c.entered <= s.id {
		c.release(c.from(s.id+1), End{Outcome: NotSent, Err: err})
	}
}

// open records that the stream is open. c is the call on its goroutine.
func (s *scope) open(c *Call, stream grpc.ClientStream) {
	s.unused(c, nil)
	s.mu.Lock()
	s.ClientStream = stream
	s.opened = true
	early, isEarly, outdone := s.early, s.isEarly, s.outdone
	if s.watch && !isEarly && s.ctx.Done() != nil {
		s.stop = context.AfterFunc(s.ctx, s.expire)
	}
	s.mu.Unlock()
	if isEarly {
		s.await(true)
		_ = s.end(early, outdone)
	}
}

// fail records that the stream could not be opened.
func (s *scope) fail(c *Call, err error) {
	s.unused(c, err)
	if s.innermost() { // There is no stream that could write results.
		s.setFinished()
	}
	s.mu.Lock()
	s.opened = true
	s.mu.Unlock()
	_ = s.end(err, false)
}

// end ends the stream for s, unless it has ended already. It ends the scopes inside
// first, so that tickets are released in reverse order. superseded says that the stream
// did not end by itself. end returns how the stream has ended.
func (s *scope) end(err error, superseded bool) error {
	s.mu.Lock()
	if !s.opened {
		// Its Call is still in use by the goroutine that opens it, which will end it.
		if !s.isEarly {
			s.early, s.isEarly, s.outdone = err, true, superseded
		}
		s.mu.Unlock()
		return err
	}
	if s.over {
		defer s.mu.Unlock()
		if s.root != nil && len(s.root.finish) > 0 && s.cut.Load() {
			return s.how // OnFinish was told that, and the results are of that moment.
		}
		return firstEnd(s.how, err)
	}
	s.over, s.how = true, err
	s.cut.Store(err != nil && err != io.EOF)
	s.copyLocked(false)
	children, stop := s.children, s.stop
	s.children = nil
	s.mu.Unlock()
	if stop != nil {
		stop()
	}
	if s.ender != nil {
		s.ender.StreamEnded()
	}
	for _, in := range slices.Backward(children) {
		_ = in.end(err, true)
	}
	e := s.endOf(err, superseded)
	if o := s.call.prog.obs; o != nil && s.innermost() && s.call.departed != 0 {
		s.observe(o, e)
	}
	defer s.ended(e.Outcome, e.Err) // Even if a Releaser panics.
	releaseAll(s.tickets, e)
	return err
}

// observe tells the observer how the stream of an attempt ended.
func (s *scope) observe(o Observer, e End) {
	var endpoint net.Addr
	if s.finished.Load() { // gRPC has written it.
		endpoint = s.call.peer.Addr
	}
	o.AttemptEnded(s.call.observed(), ObservedEnd{Took: Now().Sub(s.call.departed), Outcome: e.Outcome, Err: e.Err, Peer: endpoint})
}

// firstEnd returns how a stream has ended that has ended with first, and of which an
// operation then says later. A layer, or the end of a context, may end it while an answer
// arrives. It is not a success then, because the holders of tickets and the observer were
// told of that end; a failure of an attempt is kept, because it says more.
func firstEnd(first, later error) error {
	if first != nil && first != io.EOF && (later == nil || later == io.EOF) {
		return first
	}
	return later
}

// copyLocked copies the results of the attempt that counts, once, if gRPC has written
// them. told says that an operation has told of the end: while one runs, the attempt may
// change. Caller must hold s.mu.
func (s *scope) copyLocked(told bool) {
	v := s.chosen.Load()
	if s.copied || s.shown || !told && s.busy.Load() > 0 && !s.ending.Load() || !v.Written() {
		return
	}
	s.copied = true
	if s.around != nil {
		v.Copy()
		s.around.SetWritten()
		return
	}
	root := s.outermost()
	root.results.Lock()
	defer root.results.Unlock()
	if !root.shown {
		v.Copy()
	}
}

// endOf returns how the stream ended with err. superseded says that it did not end by
// itself.
func (s *scope) endOf(err error, superseded bool) End {
	if err == io.EOF {
		err = nil
	}
	e := s.call.endOf(s.ctx, err)
	e.Responded = s.responded.Load()
	if superseded && e.Outcome.Sent() && s.ctx.Err() != context.DeadlineExceeded && !cutShort(s.ctx) {
		e.Outcome = Ignored
		if err == nil {
			e.Err = errSuperseded
		}
	}
	return e
}

var errSuperseded = status.Error(codes.Canceled, "belfry: the call ended without this attempt")

func (s *scope) ended(o Outcome, err error) {
	if s.fork {
		defer s.call.prog.stack.leave(partOne)
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
		if s.children == nil {
			s.children = s.kids[:0]
		}
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

// finish is called by gRPC when the stream has ended, after it has written the results.
// The type says when we trust it.
func (s *scope) finish(err error) {
	if err == nil {
		s.well.Store(true)
	}
	s.setFinished()
	closing := attempt.IsClosing(err)
	if !closing && s.ctx.Err() == nil {
		// gRPC's own deadline, from a service config, ends a stream too.
		if code := status.Code(err); code != codes.Canceled && code != codes.DeadlineExceeded {
			return
		}
	}
	_ = s.stopped(err)
	if closing && s.parent != nil {
		// Contexts tell of their own end. This goroutine may be that of an operation.
		go func() {
			for p := s.parent; p != nil; p = p.parent {
				p.await(true)
				_ = p.end(err, false)
			}
		}()
	}
}

// setFinished records that gRPC has ended the stream, and written the results.
func (s *scope) setFinished() {
	if s.finished.Swap(true) {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.awaited != nil {
		close(s.awaited)
	}
}

// expire is called when ctx has ended.
func (s *scope) expire() {
	s.await(true) // gRPC hears of the end at the same time.
	if r, ok := AsRefusal(context.Cause(s.ctx)); ok {
		_ = s.end(r, false)
		return
	}
	_ = s.end(status.FromContextError(s.ctx.Err()).Err(), false)
}

// await waits until gRPC has written the results of the stream, if a context in the way has
// ended. sure says that it has, though those derived from it may be late. The layer that chooses the results may be any of those
// inside.
func (s *scope) await(sure bool) {
	for s != nil {
		if s.chosen.Load() != nil {
			if sure || s.ctx.Err() != nil {
				s.awaitQuiet()
				s.chosen.Load().Await()
			}
			return
		}
		if s.innermost() {
			if s.call.grpcConn != nil && (sure || s.ctx.Err() != nil) {
				s.awaitFinish()
			}
			return
		}
		s.mu.Lock()
		var in *scope
		if len(s.children) > 0 {
			in = s.children[0]
		}
		s.mu.Unlock()
		s = in
	}
}

// awaitFinish waits until the connection says that the stream has ended, which is about to.
func (s *scope) awaitFinish() {
	if s.finished.Load() {
		return
	}
	s.mu.Lock()
	if !s.opened || s.finished.Load() {
		s.mu.Unlock()
		return
	}
	if s.awaited == nil {
		s.awaited = make(chan struct{})
	}
	awaited := s.awaited
	s.mu.Unlock()
	result.Await(awaited)
}

// stopped records that the stream has ended, as an operation of its caller says. It returns
// how the stream has ended.
func (s *scope) stopped(err error) error {
	if s.innermost() {
		s.setFinished()
		s.vars.SetWritten()
	} else if s.chosen.Load() == nil {
		s.await(false) // The layer inside may have ended it by cancelling it.
	}
	s.mu.Lock()
	s.copyLocked(true)
	s.shown = true
	s.mu.Unlock()
	return s.end(err, false)
}

// begins counts an operation that may choose another attempt.
func (s *scope) begins() (counted bool) {
	if s.chosen.Load() == nil {
		return false
	}
	s.busy.Add(1)
	if s.ending.Load() { // It chooses no other any more.
		s.ends(true)
		return false
	}
	return true
}

// ends ends an operation that begins has counted.
func (s *scope) ends(counted bool) {
	if counted && s.busy.Add(-1) == 0 {
		if q := s.quiet.Swap(nil); q != nil {
			close(*q)
		}
	}
}

// awaitQuiet waits until no operation runs that began before, which is about to be so.
func (s *scope) awaitQuiet() {
	s.ending.Store(true)
	for s.busy.Load() > 0 {
		q := s.quiet.Load()
		if q == nil {
			c := make(chan struct{})
			q = &c
			if !s.quiet.CompareAndSwap(nil, q) {
				continue
			}
			if s.busy.Load() == 0 {
				return
			}
		}
		if !result.Await(*q) {
			return
		}
	}
}

func (s *scope) Header() (md metadata.MD, err error) {
	defer s.ends(s.begins())
	md, err = s.ClientStream.Header()
	if err != nil {
		return md, s.told(s.stopped(err))
	}
	if len(md) > 0 && !s.finished.Load() && !s.refused.Load() {
		s.heard.Store(true)
	}
	if len(md) > 0 && !s.single { // gRPC returns none, and no error, for a stream that ended without one.
		s.respond()
	}
	return md, nil
}

// Context returns the context of the stream without what is for one attempt alone.
func (s *scope) Context() context.Context {
	ctx := s.ClientStream.Context()
	if s.id != s.call.prog.boundaries {
		return ctx // Of a scope inside.
	}
	ctx = attempt.Hide(ctx)
	if s.call.conn != nil && s.call.series != nil {
		ctx = attempt.WithoutPrevious(ctx, s.ctx)
	}
	return ctx
}

func (s *scope) SendMsg(m any) error {
	defer s.ends(s.begins())
	err := s.ClientStream.SendMsg(m)
	if err == io.EOF && s.repeats() {
		err = s.sendEnd()
	}
	switch {
	case err == nil:
		if !s.asked.Load() {
			s.asked.Store(true)
		}
		if s.innermost() && s.call.root.counts.Load() {
			for p := s; p != nil; p = p.parent {
				p.sends.Add(1)
			}
		}
	case err != io.EOF:
		s.notSent(err)
		return s.told(s.stopped(err))
	}
	return err
}

func (s *scope) RecvMsg(m any) error {
	defer s.ends(s.begins())
	var err error
	if s.repeats() {
		err = s.receiveFirst(m)
	} else {
		err = s.ClientStream.RecvMsg(m)
	}
	switch {
	case err == nil && !s.single && s.cut.Load(): // The message comes too late.
		if s.finished.Load() {
			s.vars.SetWritten()
		}
		return s.told(s.end(nil, false))
	case err == nil && !s.single:
		s.respond()
		return nil
	case err != nil && err != io.EOF && attempt.IsReceiveError(err) && !attempt.ServerSpoke(s.ClientStream.Trailer()):
		s.call.addFate(attempt.Unreadable)
	}
	return s.told(s.stopped(err))
}

// repeats reports whether gRPC may repeat the stream by itself: one that no server has seen,
// before its first response.
func (s *scope) repeats() bool {
	return !s.heard.Load() && s.innermost() && s.call.grpcConn != nil
}

// receiveFirst is gRPC's RecvMsg before the first response. It says io.EOF only if the
// server has.
func (s *scope) receiveFirst(m any) error {
	if s.refused.Load() || s.finished.Load() {
		if err := s.unrepeated(); err != nil {
			return err
		}
	}
	s.receiving.Store(true)
	err := s.ClientStream.RecvMsg(m)
	if err != nil {
		s.receiving.Store(false)
	}
	if err == io.EOF {
		if err := s.unrepeated(); err != nil {
			return err
		}
		err = s.ClientStream.RecvMsg(m) // It tells the status, or io.EOF again.
	}
	s.heard.Store(true)
	return err
}

// unrepeated returns an error if gRPC could not repeat the stream and does not tell, though
// it has ended it. When the connection breaks on which gRPC sends again what was sent
// before, RecvMsg says io.EOF, or Header returns none, or SendMsg says io.EOF. gRPC ends the
// stream with OK then, and RecvMsg never returns. A trailer shows that a server has ended the
// stream, and has at least a content type if there is no header. A stream that has a header
// and no trailer may have ended well: we say so only if it was not repeated.
func (s *scope) unrepeated() error {
	n := s.streams.n.Load()
	if n == 1 {
		return nil
	}
	md, _ := s.ClientStream.Header() // The stream has ended, so it does not wait.
	switch {
	case len(md) > 0 && n == 0, // Not known.
		len(s.ClientStream.Trailer()) > 0,
		len(md) == 0 && !s.well.Load():
		return nil
	}
	if err := s.ctx.Err(); err != nil {
		return status.FromContextError(err).Err()
	}
	return errUnrepeated
}

var errUnrepeated = status.Error(codes.Unavailable, "belfry: the connection broke while gRPC repeated the call on it")

// streamCount counts the streams that gRPC makes of one: 1, and those that repeat it once it
// is open. It is 0 if that is not known. gRPC asks the credentials of the call once for each.
type streamCount struct {
	n      atomic.Int32
	creds  credentials.PerRPCCredentials // The caller's, nil if there are none.
	option grpc.PerRPCCredsCallOption
}

// init returns the option that counts, of a stream with other options.
func (c *streamCount) init(opts []grpc.CallOption) grpc.CallOption {
	c.creds = attempt.CredentialsOf(opts)
	c.option.Creds = c
	return &c.option // A pointer is not allocated.
}

// opened records that the stream is open.
func (c *streamCount) opened() {
	if c.n.Load() > 1 { // Others could not be opened.
		c.n.Store(1)
	}
}

func (c *streamCount) GetRequestMetadata(ctx context.Context, uri ...string) (map[string]string, error) {
	c.n.Add(1)
	if c.creds == nil {
		return nil, nil
	}
	return c.creds.GetRequestMetadata(ctx, uri...)
}

func (c *streamCount) RequireTransportSecurity() bool {
	return c.creds != nil && c.creds.RequireTransportSecurity()
}

// sendEnd returns what SendMsg says of a message before the first response, of which gRPC
// says io.EOF. gRPC also says that of a stream that it is about to repeat, and keeps the
// message for that. While RecvMsg runs, it repeats the stream or tells its end. Otherwise
// the stream has ended: it must not be repeated when RecvMsg is called, because the caller
// sends no more.
func (s *scope) sendEnd() error {
	if !s.receiving.Load() {
		s.ClientStream.Context() // gRPC does not repeat a stream whose context is known.
		s.refused.Store(true)
	}
	if s.receiving.Load() && !s.finished.Load() {
		return nil
	}
	return io.EOF
}

// told is err as the layer outside, or the caller, gets it when the stream has ended.
func (s *scope) told(err error) error {
	if s.root != nil {
		s.root.told.Wait() // Another goroutine may be about to.
		s.root.show()
		return s.call.told(s.ctx, err)
	}
	return err
}

// respond tells the holders of tickets about the first response.
func (s *scope) respond() {
	if s.responded.Load() {
		return
	}
	e := End{Outcome: OK, Responded: true, sent: s.call.whenSent()}
	s.mu.Lock()
	defer s.mu.Unlock() // So that no ticket is released meanwhile.
	if s.over || s.responded.Swap(true) {
		return
	}
	for _, t := range slices.Backward(s.tickets) {
		if r, ok := t.r.(Responder); ok {
			r.Respond(t.token, e)
		}
	}
}

// notSent records that the client could not send a message, as SendMsg says. If it was
// the first one, nothing was asked of the server. A connection that is not gRPC's may
// refuse a call only then, as a steer that chooses by the request does.
func (s *scope) notSent(err error) {
	if !s.innermost() {
		return
	}
	first := !s.asked.Load() && !s.responded.Load()
	switch {
	case attempt.IsSendError(err) && first:
		s.call.addFate(attempt.Unsendable | attempt.Unasked)
	case attempt.IsSendError(err):
		s.call.addFate(attempt.Unsendable)
	case first && s.call.grpcConn == nil && fateElsewhere(err)&attempt.Sent == 0 && s.call.forks.Load() == 0:
		// Not for the calls that it is an attempt of: others may have been sent.
		s.call.fates.Or(uint32(attempt.TurnedAway))
	}
}

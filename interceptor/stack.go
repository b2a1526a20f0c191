// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package interceptor

import (
	"context"
	"errors"
	"fmt"
	"reflect"
	"strings"
	"sync"
	"sync/atomic"

	"google.golang.org/grpc"
)

// A Stack is a compiled list of layers, safe for concurrent use by any number of
// connections. Layers share their state with every stack they are in.
type Stack struct {
	prog atomic.Pointer[program]

	// state counts what is in flight: calls, and by partOne their parts, which are
	// the inner scopes of streams and the forks. drainBit is set once the stack
	// drains. It is one word so that no call slips in between.
	state atomic.Int64
	idle  chan struct{} // Closed when the stack drains and nothing is in flight.
	once  sync.Once     // Closes idle.
}

const (
	callOne  = 1
	partOne  = 1 << 32
	drainBit = 1 << 62
)

// program is what a Stack runs; it is not changed.
type program struct {
	stack      *Stack
	layers     []Layer
	gate       Gate
	next       Next
	boundaries int // Layers in the call path; boundary i is inside the i-th, counted from 1.
	obs        Observer
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

// NewStack compiles layers, the first outermost. It fails if a layer is nil, if
// the same layer value occurs twice, or by itself and behind an [Only] (its limit
// would be taken twice by each call, and a call waiting for itself waits for ever),
// and if a layer says that it cannot stand where it stands ([Validator]). No layers
// at all make a stack that does nothing but count and drain.
func NewStack(layers ...Layer) (*Stack, error) {
	s := &Stack{idle: make(chan struct{})}
	if err := s.Replace(layers...); err != nil {
		return nil, err
	}
	return s, nil
}

// Replace compiles layers and lets calls that begin from now on go through
// them. Calls in flight end with the layers they began with. On an error
// nothing has changed. What layers know is theirs: a layer value in both the old
// and the new list keeps its state.
func (s *Stack) Replace(layers ...Layer) error {
	p, err := s.compile(layers)
	if err != nil {
		return err
	}
	s.prog.Store(p)
	return nil
}

// ReplaceByMethod is [Stack.Replace] with several lists of layers, of which each
// call goes through one: the one whose index choose returns for its method, or
// none if there is no such list. choose is called once for each call,
// concurrently. The same layer value may stand in several lists, whose calls it
// then sees all.
func (s *Stack) ReplaceByMethod(choose func(method string) int, lists ...[]Layer) error {
	if choose == nil {
		return errors.New("interceptor: ReplaceByMethod: choose is nil")
	}
	p := &program{stack: s, choose: choose}
	for i, layers := range lists {
		q, err := s.compile(layers)
		if err != nil {
			return fmt.Errorf("%w (of list %d)", err, i)
		}
		p.lists = append(p.lists, q)
		p.layers = append(p.layers, q.layers...)
	}
	none, err := s.compile(nil)
	if err != nil {
		return err
	}
	p.lists = append(p.lists, none)
	s.prog.Store(p)
	return nil
}

// compile compiles layers.
func (s *Stack) compile(layers []Layer) (*program, error) {
	p := &program{stack: s}
	for i, l := range layers {
		if isNil(l) {
			return nil, fmt.Errorf("interceptor: layer %d is nil", i)
		}
		switch l := l.(type) {
		case off:
			continue
		case *observe:
			if isNil(l.o) {
				return nil, fmt.Errorf("interceptor: layer %d: Observe: the observer is nil", i)
			}
			if p.obs != nil {
				return nil, fmt.Errorf("interceptor: layer %d: a stack has one observer, this is the second", i)
			}
			p.obs = l.o
		}
		p.layers = append(p.layers, l)
	}
	for i, l := range p.layers {
		for j, m := range p.layers[:i] {
			if same(l, m) || same(l, bare(m)) || same(bare(l), m) {
				return nil, fmt.Errorf("interceptor: layer %d (%s) is the same value as layer %d: each call would take from it twice", i, nameOf(l), j)
			}
		}
		if v, ok := l.(Validator); ok {
			if err := v.Validate(p.layers[i+1:]); err != nil {
				return nil, fmt.Errorf("interceptor: layer %d (%s): %w", i, nameOf(l), err)
			}
		}
		if !isGateOnly(l) {
			p.boundaries++
		}
	}
	p.gate, p.next = GateFunc(admitAll), innermost
	id := p.boundaries
	for i := len(p.layers) - 1; i >= 0; i-- {
		l := p.layers[i]
		gate, next := p.gate, p.next
		if !isGateOnly(l) {
			b := &boundary{id: id, gate: gate, next: next}
			gate, next = b, b.call
			id--
		}
		if p.gate = l.WrapGate(gate); isNil(p.gate) {
			return nil, fmt.Errorf("interceptor: layer %d (%s): WrapGate returned nil", i, nameOf(l))
		}
		if p.next = l.WrapCall(next, gate); p.next == nil {
			return nil, fmt.Errorf("interceptor: layer %d (%s): WrapCall returned nil", i, nameOf(l))
		}
	}
	p.calls.New = func() any {
		c := &Call{prog: p, fence: make([]int, p.boundaries+2)}
		c.root = c
		c.tickets = c.inline[:0]
		return c
	}
	return p, nil
}

// isNil reports whether v is nil or a nil pointer, map, func or the like in an interface.
func isNil(v any) bool {
	if v == nil {
		return true
	}
	switch r := reflect.ValueOf(v); r.Kind() {
	case reflect.Pointer, reflect.Func, reflect.Map, reflect.Slice, reflect.Chan:
		return r.IsNil()
	}
	return false
}

// same reports whether l and m are one value. Layers without state, such as an
// empty struct, are equal without being harmful twice, but also without use.
func same(l, m Layer) bool {
	t := reflect.TypeOf(l)
	return t == reflect.TypeOf(m) && reflect.ValueOf(l).Comparable() && reflect.ValueOf(m).Comparable() && l == m
}

// bare returns the layer that l applies to the calls that match, if it is an [Only].
// The same one may stand behind several, of which a call matches one, but not also
// by itself.
func bare(l Layer) Layer {
	for {
		switch o := l.(type) {
		case *onlyGate:
			l = o.layer
		case *onlyCall:
			l = o.layer
		default:
			return l
		}
	}
}

func admitAll(context.Context, *Call, Wait) error { return nil }

// innermost hands the attempt to the connection.
func innermost(ctx context.Context, c *Call) error {
	c.markSent()
	if o := c.prog.obs; o != nil {
		o.Attempt(c.method, c.attempt)
	}
	if c.kind == Unary {
		if c.conn != nil {
			return c.conn.Invoke(ctx, c.method, c.req, c.reply, c.opts...)
		}
		return c.invoker(ctx, c.method, c.req, c.reply, c.cc, c.opts...)
	}
	opts := append(c.scope.opts[:0], c.opts...) // A copy, and mostly one that needs no allocation.
	opts = append(opts, grpc.OnFinish(c.scope.finish))
	var err error
	if c.conn != nil {
		c.stream, err = c.conn.NewStream(ctx, c.desc, c.method, opts...)
	} else {
		c.stream, err = c.streamer(ctx, c.desc, c.cc, c.method, opts...)
	}
	if err == nil && c.stream == nil {
		return errNoStream
	}
	return err
}

var errNoStream = errors.New("interceptor: a stream was opened without an error, but is nil")

// DialOptions returns the options for grpc.NewClient. Interceptors that are
// chained by options before these are outside the stack, those by later options
// inside. Those pass on the options of a stream, as one of them tells the stack of
// the end of a stream that is abandoned.
func (s *Stack) DialOptions() []grpc.DialOption {
	return []grpc.DialOption{
		grpc.WithChainUnaryInterceptor(s.UnaryClientInterceptor()),
		grpc.WithChainStreamInterceptor(s.StreamClientInterceptor()),
	}
}

// UnaryClientInterceptor returns the unary half, to place it in a chain of others.
func (s *Stack) UnaryClientInterceptor() grpc.UnaryClientInterceptor {
	return func(ctx context.Context, method string, req, reply any, cc *grpc.ClientConn, invoker grpc.UnaryInvoker, opts ...grpc.CallOption) error {
		return s.invoke(ctx, method, req, reply, target{cc: cc, invoker: invoker}, opts)
	}
}

// StreamClientInterceptor returns the streaming half, to place it in a chain of
// others.
func (s *Stack) StreamClientInterceptor() grpc.StreamClientInterceptor {
	return func(ctx context.Context, desc *grpc.StreamDesc, cc *grpc.ClientConn, method string, streamer grpc.Streamer, opts ...grpc.CallOption) (grpc.ClientStream, error) {
		return s.open(ctx, desc, method, target{cc: cc, streamer: streamer}, opts)
	}
}

// Wrap returns conn with the stack in front, for anything that carries calls:
// a connection one did not dial, a pool, a steer.
//
// The ends of streams are seen best on a *grpc.ClientConn. On anything else a
// stream that is abandoned without its context being cancelled keeps its
// permits, for nothing tells of its end.
func (s *Stack) Wrap(conn grpc.ClientConnInterface) grpc.ClientConnInterface {
	return &wrapped{stack: s, conn: conn}
}

type wrapped struct {
	stack *Stack
	conn  grpc.ClientConnInterface
}

func (w *wrapped) Invoke(ctx context.Context, method string, args, reply any, opts ...grpc.CallOption) error {
	return w.stack.invoke(ctx, method, args, reply, target{conn: w.conn}, opts)
}

func (w *wrapped) NewStream(ctx context.Context, desc *grpc.StreamDesc, method string, opts ...grpc.CallOption) (grpc.ClientStream, error) {
	return w.stack.open(ctx, desc, method, target{conn: w.conn}, opts)
}

// String prints the order of the layers, the outermost first; of several lists
// ([Stack.ReplaceByMethod]) each.
func (s *Stack) String() string {
	p := s.prog.Load()
	if p.choose == nil {
		return p.String()
	}
	lists := make([]string, len(p.lists)-1)
	for i := range lists {
		lists[i] = p.lists[i].String()
	}
	return strings.Join(lists, " | ")
}

func (p *program) String() string {
	names := make([]string, len(p.layers))
	for i, l := range p.layers {
		names[i] = nameOf(l)
	}
	return "[" + strings.Join(names, " > ") + "]"
}

// Layers returns the layers of the stack, the outermost first, and those of
// several lists ([Stack.ReplaceByMethod]) one after the other. Layers that are
// off are not among them.
func (s *Stack) Layers() []Layer {
	return append([]Layer(nil), s.prog.Load().layers...)
}

// InFlight returns how many calls are in the stack: waiting, running, or streams
// that have not ended.
func (s *Stack) InFlight() int { return int(s.state.Load() & (partOne - 1)) }

var draining = Refuse("stack", ReasonDrain, "the stack is draining and takes no new calls")

// Drain refuses new calls from now on, with UNAVAILABLE and reason DRAIN, and
// waits until those in flight have ended, streams and the losers of hedges
// included. If ctx ends first it returns ctx's error, and the stack goes on
// draining. Drain may be called again, and concurrently.
func (s *Stack) Drain(ctx context.Context) error {
	if s.state.Or(drainBit)&^drainBit == 0 {
		s.once.Do(func() { close(s.idle) })
	}
	select {
	case <-s.idle:
		return nil
	default:
	}
	select {
	case <-s.idle:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("interceptor: drain: %d calls still in flight: %w", s.InFlight(), ctx.Err())
	}
}

// begin takes up a call unless the stack drains.
func (s *Stack) begin() error {
	if s.state.Add(callOne)&drainBit != 0 {
		s.leave(callOne)
		return draining
	}
	return nil
}

// enterPart counts one more part of a call that has begun.
func (s *Stack) enterPart() { s.state.Add(partOne) }

// leave is the end of a call or of a part.
func (s *Stack) leave(what int64) {
	if s.state.Add(-what) == drainBit {
		s.once.Do(func() { close(s.idle) })
	}
}

// target is where an attempt goes.
type target struct {
	cc       *grpc.ClientConn
	conn     grpc.ClientConnInterface
	invoker  grpc.UnaryInvoker
	streamer grpc.Streamer
}

// prepare sets what a call starts with. finish is what the caller wants to be
// told at its end.
func (c *Call) prepare(kind Kind, method string, t target, opts []grpc.CallOption) (w Wait, finish []func(error)) {
	c.kind, c.method = kind, method
	c.cc, c.conn, c.invoker, c.streamer = t.cc, t.conn, t.invoker, t.streamer
	c.fence[0] = 0
	for i := 1; i < len(c.fence); i++ {
		c.fence[i] = none
	}
	w = Forever
	for _, o := range opts {
		switch o := o.(type) {
		case waitOption:
			w = min(w, o.w)
		case grpc.OnFinishCallOption:
			finish = append(finish, o.OnFinish)
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
	return w, finish
}

// recycle readies a unary call for another one.
func (p *program) recycle(c *Call) {
	c.method, c.req, c.reply, c.opts = "", nil, nil, nil
	c.cc, c.conn, c.invoker, c.streamer = nil, nil, nil, nil
	c.bound, c.now, c.running, c.began, c.sent, c.at = 0, 0, false, false, false, 0
	if c.attempt != 0 {
		c.attempt = 0
		c.attempts.Store(0)
	}
	if c.kept.on {
		c.kept = kept{}
	}
	p.calls.Put(c)
}

func (s *Stack) invoke(ctx context.Context, method string, req, reply any, t target, opts []grpc.CallOption) (err error) {
	p := s.prog.Load().of(method)
	if err := s.begin(); err != nil {
		return p.turnAway(method, opts, err)
	}
	if p.obs != nil {
		p.obs.InFlight(1)
	}
	c := p.calls.Get().(*Call)
	w, finish := c.prepare(Unary, method, t, opts)
	c.req, c.reply = req, reply
	returned := false
	defer p.end(ctx, c, finish, &returned, &err)
	if err = p.gate.Admit(ctx, c, w); err == nil {
		c.running = true
		if p.obs != nil {
			p.obs.Admitted(method, Unary, 0)
		}
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
		c.settle(ctx, 0, 0, e)
	} else {
		c.release(0, NotSent, e)
	}
	for _, f := range finish {
		f(e)
	}
	if p.obs != nil {
		p.refused(c.method, e)
		if c.running {
			p.obs.Ended(c.method, Unary, outcomeOf(ctx, e, c.wasSent()), e)
		}
		p.obs.InFlight(-1)
	}
	if *returned && !c.forked.Load() {
		p.recycle(c)
	}
}

// refused tells the observer about err if it is a refusal.
func (p *program) refused(method string, err error) {
	if p.obs == nil {
		return
	}
	if r, ok := AsRefusal(err); ok {
		p.obs.Refused(method, r.Layer, r.Reason)
	}
}

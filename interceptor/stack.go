// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package interceptor

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"strings"
	"sync"
	"sync/atomic"

	"google.golang.org/grpc"

	"github.com/belfry-go/belfry/internal/isnil"
	"github.com/belfry-go/belfry/internal/park"
)

// A Stack is a compiled list of layers, safe for concurrent use by any number of
// connections. Layers share their state with every stack they are in.
type Stack struct {
	prog   atomic.Pointer[program]
	mark   grpc.CallOption // Marks calls that have passed the stack.
	parked *park.Lot

	// state counts what is in flight: calls, and in steps of partOne their parts, which
	// are the inner scopes of streams and the forks. drainBit is set once the stack
	// drains. It is one word so that no call enters in between.
	state atomic.Int64
	idle  chan struct{} // Closed when the stack drains and nothing is in flight.
	once  sync.Once     // Closes idle.

	retryPolicy atomic.Pointer[string] // Advice on gRPC's own, once a call has met it.
}

const (
	callOne  = 1
	partOne  = 1 << 32
	drainBit = 1 << 62
)

// stackName names the stack itself in refusals.
const stackName = "stack"

// NewStack makes the layers of specs, the first outermost, and compiles them:
//
//	stack, err := interceptor.NewStack(
//		loadshed.Config{},
//		timeout.Config{Timeout: time.Second},
//		concurrency.Config{Limit: 20},
//	)
//
// The error joins everything that is wrong, each with the index of its spec. The same
// layer value twice, or by itself and behind an [Only], is an error, because each call
// would take from its limit twice, and a call that waits for itself waits for ever. A
// layer that can do nothing at its position is one too, such as a load shed with nothing
// inside that can be not ready. [Stack.Advice] lists what works, but rarely as meant. A
// stack without layers only counts and drains.
func NewStack(specs ...Spec) (*Stack, error) {
	s := &Stack{idle: make(chan struct{}), parked: park.New(draining, closed)}
	s.mark = passed{stack: s}
	if err := s.Replace(specs...); err != nil {
		return nil, err
	}
	s.logAdvice()
	return s, nil
}

// Replace makes and compiles layers as NewStack does. New calls go through them, and
// calls in flight end with the layers they began with. After an error nothing has
// changed.
func (s *Stack) Replace(specs ...Spec) error {
	layers, err := newLayers(specs)
	if err != nil {
		return err
	}
	p, err := s.compile(layers)
	if err != nil {
		return err
	}
	s.use(p)
	return nil
}

// use lets new calls go through p.
func (s *Stack) use(p *program) {
	s.prog.Store(p)
	for _, q := range append(p.lists[:len(p.lists):len(p.lists)], p) {
		if q.obs != nil {
			q.obs.Observes(s)
		}
	}
}

func newLayers(specs []Spec) ([]Layer, error) {
	layers := make([]Layer, len(specs))
	var errs []error
	for i, spec := range specs {
		if isnil.Value(spec) {
			errs = append(errs, fmt.Errorf("interceptor: layer %d is nil", i))
			continue
		}
		l, err := spec.NewLayer()
		if err == nil && isnil.Value(l) {
			err = errors.New("NewLayer returned nil")
		}
		errs = appendAt(errs, i, err)
		layers[i] = l
	}
	return layers, errors.Join(errs...)
}

// appendAt appends err, or each of the errors that it joins, with the index of the
// spec, so that each line of what NewStack returns says which layer it is about.
func appendAt(errs []error, i int, err error) []error {
	if joined, ok := err.(interface{ Unwrap() []error }); ok {
		for _, err := range joined.Unwrap() {
			errs = appendAt(errs, i, err)
		}
	} else if err != nil {
		errs = append(errs, fmt.Errorf("interceptor: layer %d: %w", i, err))
	}
	return errs
}

// PrepareByMethod is [Stack.Replace] with several lists of layers. Each call goes
// through the list whose index choose returns for its method, or through no layers if
// there is no such list. choose is called once for each call, concurrently. The same
// layer value may be in several lists, and then sees the calls of all of them. Nothing
// changes before commit is called, which cannot fail.
func (s *Stack) PrepareByMethod(choose func(method string) int, lists ...[]Layer) (commit func(), err error) {
	if choose == nil {
		return nil, errors.New("interceptor: PrepareByMethod: choose is nil")
	}
	p := &program{stack: s, choose: choose}
	for i, layers := range append(lists[:len(lists):len(lists)], nil) {
		for j, l := range layers {
			if isnil.Value(l) {
				return nil, fmt.Errorf("interceptor: layer %d of list %d is nil", j, i)
			}
		}
		q, err := s.compile(layers)
		if err != nil {
			return nil, fmt.Errorf("%w (of list %d)", err, i)
		}
		p.lists = append(p.lists, q)
		p.layers = append(p.layers, q.layers...)
		p.advice = append(p.advice, q.advice...)
	}
	return func() { s.use(p) }, nil
}

// DialOptions returns the options for grpc.NewClient. Interceptors that are chained by
// earlier options are outside the stack, those by later options inside. The ones inside
// must pass on the options of a call, by which gRPC tells the stack what became of it, and
// append to them what they add: a further attempt has its number in a
// [grpc.PerRPCCredentials], of which gRPC uses the last.
//
// If a layer of the stack retries or hedges, they include [grpc.WithDisableRetry], because
// otherwise each attempt would be multiplied by the retryPolicy of a service config, which
// no budget counts. What gRPC repeats without a policy, because no server has seen it, is
// still repeated. A channel that was dialled without these options keeps its retryPolicy.
// In either case [Stack.Advice] tells of it.
func (s *Stack) DialOptions() []grpc.DialOption {
	once := s.prog.Load().repeats()
	opts := []grpc.DialOption{
		grpc.WithChainUnaryInterceptor(s.unary(once)),
		grpc.WithChainStreamInterceptor(s.stream(once)),
	}
	if once {
		opts = append(opts, grpc.WithDisableRetry())
	}
	return opts
}

// UnaryClientInterceptor returns the unary interceptor, for a chain of interceptors.
func (s *Stack) UnaryClientInterceptor() grpc.UnaryClientInterceptor { return s.unary(false) }

// StreamClientInterceptor returns the streaming interceptor, for a chain of
// interceptors.
func (s *Stack) StreamClientInterceptor() grpc.StreamClientInterceptor { return s.stream(false) }

// unary returns the unary interceptor. once says that gRPC does not repeat by a policy.
func (s *Stack) unary(once bool) grpc.UnaryClientInterceptor {
	return func(ctx context.Context, method string, req, reply any, cc *grpc.ClientConn, invoker grpc.UnaryInvoker, opts ...grpc.CallOption) error {
		c, err := s.begin(ctx, method, opts)
		if err != nil {
			return err
		}
		c.cc, c.grpcConn, c.invoker, c.once = cc, cc, invoker, once
		return c.invoke(ctx, method, req, reply, opts)
	}
}

func (s *Stack) stream(once bool) grpc.StreamClientInterceptor {
	return func(ctx context.Context, desc *grpc.StreamDesc, cc *grpc.ClientConn, method string, streamer grpc.Streamer, opts ...grpc.CallOption) (grpc.ClientStream, error) {
		return s.open(ctx, desc, method, &target{cc: cc, grpcConn: cc, streamer: streamer, once: once}, opts)
	}
}

// Wrap returns conn with the stack in front, for anything that carries calls: a
// connection that somebody else dialled, a pool, a steer.
//
// The stack sees most on a *grpc.ClientConn. On anything else every call that is handed
// to it counts as sent, unless it returns a [*Refusal] that says otherwise, and a stream
// that is abandoned without cancelling its context keeps its permits.
func (s *Stack) Wrap(conn grpc.ClientConnInterface) grpc.ClientConnInterface {
	cc, _ := conn.(*grpc.ClientConn)
	return &wrapped{stack: s, target: target{conn: conn, grpcConn: cc}}
}

type wrapped struct {
	stack  *Stack
	target target
}

// Conns returns what is wrapped, for belfry.WaitReady.
func (w *wrapped) Conns() iter.Seq[grpc.ClientConnInterface] {
	return func(yield func(grpc.ClientConnInterface) bool) { yield(w.target.conn) }
}

func (w *wrapped) Invoke(ctx context.Context, method string, args, reply any, opts ...grpc.CallOption) error {
	c, err := w.stack.begin(ctx, method, opts)
	if err != nil {
		return err
	}
	c.target = w.target
	return c.invoke(ctx, method, args, reply, opts)
}

func (w *wrapped) NewStream(ctx context.Context, desc *grpc.StreamDesc, method string, opts ...grpc.CallOption) (grpc.ClientStream, error) {
	return w.stack.open(ctx, desc, method, &w.target, opts)
}

// String returns the order of the layers, the outermost first. With several lists
// ([Stack.PrepareByMethod]) it returns each.
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

// Name returns the name that [Named] has given the stack, "stack" if none has.
func (s *Stack) Name() string { return s.prog.Load().title() }

func (p *program) title() string {
	if p.choose == nil {
		return p.name
	}
	for _, q := range p.lists {
		if q.name != stackName {
			return q.name
		}
	}
	return stackName
}

// Layers returns the layers of the stack, the outermost first; with several lists
// ([Stack.PrepareByMethod]) one list after the other. It leaves out layers that are off.
func (s *Stack) Layers() []Layer {
	return append([]Layer(nil), s.prog.Load().layers...)
}

// InFlight returns how many calls are in the stack: waiting, running, or streams
// that have not ended.
func (s *Stack) InFlight() int { return int(s.state.Load() & (partOne - 1)) }

var draining = Refuse(stackName, ReasonDrain, "the stack is draining")

// Drain refuses new calls with UNAVAILABLE and reason DRAIN, and waits until those in
// flight have ended, streams and the losers of hedges included. Calls that wait in a
// gate are refused like new ones. A call that backs off before a further attempt, or
// would make one, ends with its last error. Attempts on the wire continue. If ctx ends
// first, Drain returns ctx's error, and the stack keeps draining. Drain may be called
// again, and concurrently.
func (s *Stack) Drain(ctx context.Context) error {
	if s.state.Or(drainBit)&^drainBit == 0 {
		s.once.Do(func() { close(s.idle) })
	}
	s.parked.Drain()
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

// enter counts a new call, unless the stack drains.
func (s *Stack) enter() error {
	if s.state.Add(callOne)&drainBit != 0 {
		s.leave(callOne)
		return draining
	}
	return nil
}

// drains reports whether Drain was called.
func (s *Stack) drains() bool { return s.state.Load()&drainBit != 0 }

// enterPart counts one more part of a call that is in flight.
func (s *Stack) enterPart() { s.state.Add(partOne) }

// leave ends a call or a part.
func (s *Stack) leave(what int64) {
	if s.state.Add(-what) == drainBit {
		s.once.Do(func() { close(s.idle) })
	}
}

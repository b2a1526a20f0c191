// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

// Package layertest is the conformance kit for layers of package interceptor: it
// checks that a layer gives back what it took for a call, however the call ends and
// whoever else refuses it, and that the end of a stack or a connection wakes the calls
// that wait in it.
//
//	func TestConformance(t *testing.T) {
//		layertest.Run(t, func() (interceptor.Spec, func() error) {
//			l := newQuota(10)
//			return l, func() error {
//				if n := l.InUse(); n != 0 {
//					return fmt.Errorf("%d permits in use, want 0", n)
//				}
//				return nil
//			}
//		})
//	}
package layertest

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/connectivity"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	"google.golang.org/grpc/test/bufconn"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/belfry-go/belfry/interceptor"
)

// patience bounds every wait of the kit. It runs out only if a layer is broken.
const patience = 2 * time.Minute

// kinds are the four kinds of call.
var kinds = []interceptor.Kind{
	interceptor.Unary, interceptor.ClientStream, interceptor.ServerStream, interceptor.BidiStream,
}

// Run puts the layer that newLayer returns in a stack, alone and around a gate that
// refuses. For each kind of call and each way a call can end it checks that atRest
// returns nil once the stack is idle. Calls go through a real connection where that is
// possible. newLayer is called for each of these tests and returns a new layer each
// time. atRest may be nil if the layer takes nothing. Use [RunStack] for a layer that
// needs others, such as a load shed.
//
// The layer must admit a few calls one after the other, and let a call succeed that the
// server answers. Where the kit makes many calls at once the layer may refuse any of
// them. Those that wait must end when the stack drains and when the connection is closed,
// as they do if the gate waits with the context of [interceptor.Admission.Park].
func Run(t *testing.T, newLayer func() (layer interceptor.Spec, atRest func() error)) {
	t.Helper()
	RunStack(t, func() ([]interceptor.Spec, func() error) {
		l, atRest := newLayer()
		return []interceptor.Spec{l}, atRest
	})
}

// RunStack is Run for a whole stack of layers.
func RunStack(t *testing.T, newLayers func() (layers []interceptor.Spec, atRest func() error)) {
	t.Helper()
	for _, kind := range kinds {
		for _, e := range ends {
			t.Run(kind.String()+"/"+e.name, func(t *testing.T) {
				layers, atRest := newLayers()
				f := newFixture(t, layers)
				e.run(t, f, kind)
				f.rest(t, atRest)
			})
		}
	}
	for _, kind := range kinds {
		t.Run(kind.String()+"/refused_further_in", func(t *testing.T) {
			layers, atRest := newLayers()
			f := newFixture(t, append(layers[:len(layers):len(layers)], &wall{every: 1}))
			_ = f.call(f.ctx, f.conn, kind, "ok")
			f.rest(t, atRest)
		})
		t.Run(kind.String()+"/asked_again_after_a_refusal_further_in", func(t *testing.T) {
			layers, atRest := newLayers()
			layers = append([]interceptor.Spec{twice{}}, layers...)
			f := newFixture(t, append(layers, &wall{every: 2}))
			_ = f.call(f.ctx, f.conn, kind, "ok")
			f.rest(t, atRest)
		})
	}
	for _, kind := range kinds {
		t.Run(kind.String()+"/drained_while_calls_wait", func(t *testing.T) {
			specs, atRest := newLayers()
			f := newFixture(t, specs)
			ctx, cancel := context.WithCancel(f.ctx)
			defer cancel()
			c := f.crowd(ctx, kind)
			over, stop := context.WithCancel(f.ctx)
			stop()
			_ = f.stack.Drain(over) // It begins to drain and does not wait.
			if err := c.endsOrRuns(f.ctx, f); err != nil {
				t.Errorf("the stack drains: %v", err)
			}
			cancel()
			f.rest(t, atRest)
		})
		t.Run(kind.String()+"/closed_while_calls_wait", func(t *testing.T) {
			specs, atRest := newLayers()
			f := newFixture(t, specs)
			c := f.crowd(f.ctx, kind)
			f.conn.Close()
			if err := c.endsOrRuns(f.ctx, f); err != nil {
				t.Errorf("the connection is closed: %v", err)
			}
			f.rest(t, atRest)
		})
	}
	t.Run("1000_concurrent_calls_with_random_ends", func(t *testing.T) {
		layers, atRest := newLayers()
		f := newFixture(t, layers)
		seed := rand.Uint64()
		t.Logf("seed %d", seed)
		rng := rand.New(rand.NewPCG(seed, 0))
		var wg sync.WaitGroup
		for range 1000 {
			kind, how, d := kinds[rng.IntN(len(kinds))], rng.IntN(6), time.Duration(rng.IntN(20_000))*time.Microsecond
			wg.Go(func() { f.random(kind, how, d) })
		}
		wg.Wait()
		f.rest(t, atRest)
	})
}

// ends are the ways a call can end.
var ends = []struct {
	name string
	run  func(t *testing.T, f *fixture, kind interceptor.Kind)
}{
	{"success", func(t *testing.T, f *fixture, kind interceptor.Kind) {
		for range 3 {
			if err := f.call(f.ctx, f.conn, kind, "ok"); err != nil {
				t.Errorf("a call that the server answers: %v, want no error", err)
			}
		}
	}},
	{"error", func(t *testing.T, f *fixture, kind interceptor.Kind) {
		if err := f.call(f.ctx, f.conn, kind, "fail"); err == nil {
			t.Errorf("a call that the server fails with FAILED_PRECONDITION returned no error")
		}
	}},
	{"unavailable", func(t *testing.T, f *fixture, kind interceptor.Kind) {
		if err := f.call(f.ctx, f.conn, kind, "unavailable"); err == nil {
			t.Errorf("a call that the server fails with UNAVAILABLE returned no error")
		}
	}},
	{"cancellation", func(t *testing.T, f *fixture, kind interceptor.Kind) {
		ctx, cancel := context.WithCancel(f.ctx)
		defer cancel()
		done := make(chan error, 1)
		go func() { done <- f.call(ctx, f.conn, kind, "block") }()
		f.arrived(t)
		cancel()
		if err := <-done; err == nil {
			t.Errorf("a call cancelled by its caller returned no error")
		}
	}},
	{"deadline", func(t *testing.T, f *fixture, kind interceptor.Kind) {
		ctx, cancel := context.WithTimeout(f.ctx, 20*time.Millisecond)
		defer cancel()
		if err := f.call(ctx, f.conn, kind, "block"); err == nil {
			t.Errorf("a call past its deadline returned no error")
		}
	}},
	{"cancelled_before_it_began", func(t *testing.T, f *fixture, kind interceptor.Kind) {
		ctx, cancel := context.WithCancel(f.ctx)
		cancel()
		if err := f.call(ctx, f.conn, kind, "ok"); err == nil {
			t.Errorf("a call with a cancelled context returned no error")
		}
	}},
	{"abandoned_stream", func(t *testing.T, f *fixture, kind interceptor.Kind) {
		if kind == interceptor.Unary {
			return // The kind cannot be abandoned.
		}
		ctx, cancel := context.WithCancel(f.ctx)
		defer cancel()
		if _, err := f.start(ctx, f.conn, kind, "block"); err != nil {
			t.Fatalf("opening a stream: %v", err)
		}
		f.arrived(t)
		cancel()
	}},
	{"abandoned_stream_of_another_kind_of_connection", func(t *testing.T, f *fixture, kind interceptor.Kind) {
		if kind == interceptor.Unary {
			return
		}
		ctx, cancel := context.WithCancel(f.ctx)
		if _, err := f.start(ctx, f.stack.Wrap(fakeConn{}), kind, "block"); err != nil {
			t.Errorf("opening a stream: %v", err)
		}
		cancel()
	}},
	{"panic_in_the_invoker", func(t *testing.T, f *fixture, kind interceptor.Kind) {
		defer func() {
			if got := recover(); got != errInvoker {
				t.Errorf("recovered %v, want the invoker's own panic", got)
			}
		}()
		err := f.call(f.ctx, f.stack.Wrap(fakeConn{panics: true}), kind, "ok")
		t.Errorf("a call whose invoker panics returned %v", err)
	}},
	{"connection_closed", func(t *testing.T, f *fixture, kind interceptor.Kind) {
		done := make(chan error, 1)
		go func() { done <- f.call(f.ctx, f.conn, kind, "block") }()
		f.arrived(t)
		f.conn.Close()
		if err := <-done; err == nil {
			t.Errorf("a call whose connection was closed returned no error")
		}
	}},
	{"connection_closed_under_an_abandoned_stream", func(t *testing.T, f *fixture, kind interceptor.Kind) {
		if kind == interceptor.Unary {
			return
		}
		if _, err := f.start(f.ctx, f.conn, kind, "block"); err != nil {
			t.Fatalf("opening a stream: %v", err)
		}
		f.arrived(t)
		f.conn.Close()
	}},
	{"request_that_cannot_be_sent", func(t *testing.T, f *fixture, kind interceptor.Kind) {
		if err := f.call(f.ctx, f.conn, kind, "ok", grpc.MaxCallSendMsgSize(1)); err == nil {
			t.Errorf("a call whose request is too large returned no error")
		}
	}},
	{"answer_that_cannot_be_taken", func(t *testing.T, f *fixture, kind interceptor.Kind) {
		if err := f.call(f.ctx, f.conn, kind, "ok", grpc.MaxCallRecvMsgSize(1)); err == nil {
			t.Errorf("a call whose answer is too large returned no error")
		}
	}},
	{"creation_failure", func(t *testing.T, f *fixture, kind interceptor.Kind) {
		if err := f.call(f.ctx, f.conn, kind, "ok", grpc.CallContentSubtype("no-such-codec")); err == nil {
			t.Errorf("a call with an unknown codec returned no error")
		}
	}},
	{"creation_failure_of_another_kind_of_connection", func(t *testing.T, f *fixture, kind interceptor.Kind) {
		want := status.Error(codes.FailedPrecondition, "no stream today")
		if err := f.call(f.ctx, f.stack.Wrap(fakeConn{err: want}), kind, "ok"); err == nil {
			t.Errorf("a call on a connection that fails returned no error")
		}
	}},
}

// wall is a gate that refuses, from the first time on, one in every so many times
// that it is asked.
type wall struct {
	interceptor.GateOnly
	every int64
	asked atomic.Int64
}

var errWall = interceptor.Refuse("wall", interceptor.ReasonConcurrency, "layertest refuses the call")

func (l *wall) NewLayer() (interceptor.Layer, error) { return l, nil }

func (l *wall) WrapGate(inner interceptor.Gate) interceptor.Gate {
	return interceptor.GateFunc(func(ctx context.Context, a *interceptor.Admission, w interceptor.Wait) error {
		if (l.asked.Add(1)-1)%l.every == 0 {
			return errWall
		}
		return inner.Admit(ctx, a, w)
	})
}

// twice asks whether the gates inside have capacity now, as a buffer does, and if
// they have none asks again.
type twice struct{ interceptor.GateOnly }

func (l twice) NewLayer() (interceptor.Layer, error) { return l, nil }

func (l twice) WrapGate(inner interceptor.Gate) interceptor.Gate {
	return interceptor.GateFunc(func(ctx context.Context, a *interceptor.Admission, w interceptor.Wait) error {
		if _, err := a.Try(ctx, inner, interceptor.None); err == nil {
			return nil
		}
		return inner.Admit(ctx, a, w)
	})
}

// fixture is a server, and a connection to it through a stack.
type fixture struct {
	ctx   context.Context
	stack *interceptor.Stack
	conn  *grpc.ClientConn
	came  chan struct{} // One for each call that blocks in the server.
}

func newFixture(t *testing.T, layers []interceptor.Spec) *fixture {
	t.Helper()
	stack, err := interceptor.NewStack(layers...)
	if err != nil {
		t.Fatalf("NewStack: %v", err)
	}
	f := &fixture{stack: stack, came: make(chan struct{}, 4096)}
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	t.Cleanup(cancel)
	f.ctx = ctx
	lis := bufconn.Listen(1 << 20)
	srv := grpc.NewServer(grpc.UnknownServiceHandler(f.serve))
	served := make(chan error, 1)
	go func() { served <- srv.Serve(lis) }()
	opts := append(stack.DialOptions(),
		grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return lis.DialContext(ctx) }),
		grpc.WithDisableServiceConfig())
	f.conn, err = grpc.NewClient("passthrough:///bufconn", opts...)
	if err != nil {
		t.Fatalf("NewClient: %v", err)
	}
	t.Cleanup(func() {
		f.conn.Close() // Closing twice is a harmless error.
		srv.Stop()
		// A call that never left the client may be over before Serve starts.
		if err := <-served; err != nil && !errors.Is(err, grpc.ErrServerStopped) {
			t.Errorf("the server ended with %v", err)
		}
	})
	// A load shed in the stack refuses calls while no endpoint is READY.
	f.conn.Connect()
	for state := f.conn.GetState(); state != connectivity.Ready; state = f.conn.GetState() {
		if !f.conn.WaitForStateChange(ctx, state) {
			t.Fatalf("the connection is %v, want READY", state)
		}
	}
	return f
}

// rest waits until the stack is idle and checks that the layer is at rest.
func (f *fixture) rest(t *testing.T, atRest func() error) {
	t.Helper()
	if err := f.stack.Drain(f.ctx); err != nil {
		t.Fatalf("the call was not seen to end: %v", err)
	}
	if atRest == nil {
		return
	}
	if err := atRest(); err != nil {
		t.Errorf("not at rest after the call: %v", err)
	}
}

// crowd is many calls at once, none of which the server answers.
type crowd struct{ ended chan error }

const crowded = 64

// crowd starts the calls, and waits until one has reached the server or ended.
func (f *fixture) crowd(ctx context.Context, kind interceptor.Kind) crowd {
	c := crowd{ended: make(chan error, crowded)}
	for range crowded {
		go func() { c.ended <- f.call(ctx, f.conn, kind, "block") }()
	}
	select {
	case <-f.came:
		f.came <- struct{}{}
	case err := <-c.ended:
		c.ended <- err
	case <-f.ctx.Done():
	}
	return c
}

// endsOrRuns waits until each call has ended or is at the server.
func (c crowd) endsOrRuns(ctx context.Context, f *fixture) error {
	for n := range crowded {
		select {
		case <-f.came:
		case <-c.ended:
		case <-ctx.Done():
			return fmt.Errorf("%d calls still wait: a gate waits without the context of Admission.Park", crowded-n)
		}
	}
	return nil
}

// arrived waits for a call to block in the server.
func (f *fixture) arrived(t *testing.T) {
	t.Helper()
	select {
	case <-f.came:
	case <-f.ctx.Done():
		t.Fatal("the call did not reach the server")
	}
}

// serve does what the name of the method says.
func (f *fixture) serve(_ any, s grpc.ServerStream) error {
	method, _ := grpc.MethodFromServerStream(s)
	what, kind, _ := strings.Cut(method[strings.LastIndex(method, "/")+1:], ".")
	m := new(wrapperspb.StringValue)
	switch what {
	case "fail", "unavailable":
		if err := s.RecvMsg(m); err != nil {
			return err
		}
		if what == "unavailable" {
			return status.Error(codes.Unavailable, "as asked")
		}
		return status.Error(codes.FailedPrecondition, "as asked")
	case "block":
		if err := s.RecvMsg(m); err != nil {
			return err
		}
		f.came <- struct{}{}
		<-s.Context().Done()
		return status.FromContextError(s.Context().Err()).Err()
	}
	var last string
	for {
		if err := s.RecvMsg(m); err == io.EOF {
			break
		} else if err != nil {
			return err
		}
		last = m.GetValue()
	}
	n := 1
	if kind == interceptor.ServerStream.String() || kind == interceptor.BidiStream.String() {
		n = replies
	}
	for range n {
		if err := s.SendMsg(wrapperspb.String(last)); err != nil {
			return err
		}
	}
	return nil
}

// replies is how many messages a stream gets of the server.
const replies = 3

func method(kind interceptor.Kind, what string) string {
	return "/belfry.layertest.Layers/" + what + "." + kind.String()
}

func desc(kind interceptor.Kind) *grpc.StreamDesc {
	return &grpc.StreamDesc{
		StreamName:    "layertest",
		ClientStreams: kind == interceptor.ClientStream || kind == interceptor.BidiStream,
		ServerStreams: kind == interceptor.ServerStream || kind == interceptor.BidiStream,
	}
}

// start opens a stream and sends a message.
func (f *fixture) start(ctx context.Context, conn grpc.ClientConnInterface, kind interceptor.Kind, what string, opts ...grpc.CallOption) (grpc.ClientStream, error) {
	s, err := conn.NewStream(ctx, desc(kind), method(kind, what), opts...)
	if err != nil {
		return nil, err
	}
	if err := s.SendMsg(wrapperspb.String("hello")); err != nil && err != io.EOF {
		return nil, err
	}
	return s, nil
}

// call makes a whole call as generated code does, and checks what it received.
func (f *fixture) call(ctx context.Context, conn grpc.ClientConnInterface, kind interceptor.Kind, what string, opts ...grpc.CallOption) error {
	m := new(wrapperspb.StringValue)
	if kind == interceptor.Unary {
		err := conn.Invoke(ctx, method(kind, what), wrapperspb.String("hello"), m, opts...)
		if err == nil && m.GetValue() != "hello" {
			return fmt.Errorf("received %q, want %q", m.GetValue(), "hello")
		}
		return err
	}
	s, err := f.start(ctx, conn, kind, what, opts...)
	if err != nil {
		return err
	}
	if err := s.CloseSend(); err != nil {
		return err
	}
	if kind == interceptor.ClientStream {
		if err := s.RecvMsg(m); err != nil {
			return err
		}
		if m.GetValue() != "hello" {
			return fmt.Errorf("received %q, want %q", m.GetValue(), "hello")
		}
		return nil
	}
	for n := 0; ; n++ {
		err := s.RecvMsg(m)
		switch {
		case err == io.EOF && n == replies:
			return nil
		case err == io.EOF:
			return fmt.Errorf("received %d messages, want %d", n, replies)
		case err != nil:
			return err
		case m.GetValue() != "hello":
			return fmt.Errorf("received %q, want %q", m.GetValue(), "hello")
		}
	}
}

// random makes a call that ends in one of six ways. It ignores the result, because the
// layer may refuse any of them.
func (f *fixture) random(kind interceptor.Kind, how int, d time.Duration) {
	ctx, cancel := context.WithTimeout(f.ctx, d)
	defer cancel()
	switch how {
	case 0:
		_ = f.call(f.ctx, f.conn, kind, "fail")
	case 1:
		_ = f.call(ctx, f.conn, kind, "block") // Ends by its deadline.
	case 2:
		cancel()
		_ = f.call(ctx, f.conn, kind, "ok")
	case 3:
		if kind != interceptor.Unary {
			_, _ = f.start(ctx, f.conn, kind, "block") // Abandoned, then cancelled.
		}
	case 4:
		defer func() { _ = recover() }()
		_ = f.call(f.ctx, f.stack.Wrap(fakeConn{panics: true}), kind, "ok")
	default:
		_ = f.call(f.ctx, f.conn, kind, "ok")
	}
}

var errInvoker = errors.New("layertest: the invoker's panic")

// fakeConn is a connection that is not gRPC's: it panics, fails, or opens
// streams whose end it does not report.
type fakeConn struct {
	panics bool
	err    error
}

func (c fakeConn) Invoke(context.Context, string, any, any, ...grpc.CallOption) error {
	if c.panics {
		panic(errInvoker)
	}
	return c.err
}

func (c fakeConn) NewStream(ctx context.Context, _ *grpc.StreamDesc, _ string, _ ...grpc.CallOption) (grpc.ClientStream, error) {
	if c.panics {
		panic(errInvoker)
	}
	if c.err != nil {
		return nil, c.err
	}
	return &fakeStream{ctx: ctx}, nil
}

// fakeStream takes messages and sends none until its context ends.
type fakeStream struct {
	grpc.ClientStream
	ctx context.Context
}

func (s *fakeStream) Context() context.Context { return s.ctx }
func (s *fakeStream) SendMsg(any) error        { return nil }
func (s *fakeStream) CloseSend() error         { return nil }
func (s *fakeStream) RecvMsg(any) error {
	<-s.ctx.Done()
	return status.FromContextError(s.ctx.Err()).Err()
}

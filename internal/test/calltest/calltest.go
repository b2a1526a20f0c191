// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

// Package calltest is what the tests of layers have in common: a stack, a server
// behind it, and bursts of calls that say how each of them ended.
//
//	synctest.Test(t, func(t *testing.T) {
//		c := calltest.Stack(t, shed, limit).Wrap(calltest.Takes(time.Second))
//		calltest.Expect(t, calltest.Burst(c, 2),
//			calltest.OK(time.Second), calltest.Refused(0, interceptor.ReasonConcurrency))
//	})
package calltest

import (
	"context"
	"fmt"
	"io"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/belfry-go/belfry/interceptor"
	"github.com/belfry-go/belfry/internal/test/race"
	testingv1 "github.com/belfry-go/belfry/proto/belfry/testing/v1"
)

// Method is the method of the calls of a burst.
const Method = "/s/m"

// Server is a connection that is made of what its calls do. A stream is nil if
// it can be opened.
type Server func(ctx context.Context) error

// Invoke makes a call, whatever its method and messages.
func (s Server) Invoke(ctx context.Context, _ string, _, _ any, _ ...grpc.CallOption) error {
	return s(ctx)
}

// NewStream fails as a call does.
func (s Server) NewStream(ctx context.Context, _ *grpc.StreamDesc, _ string, _ ...grpc.CallOption) (grpc.ClientStream, error) {
	return nil, s(ctx)
}

// Takes is a server whose calls take d, or end with their context as gRPC's do.
func Takes(d time.Duration) Server {
	return func(ctx context.Context) error {
		select {
		case <-time.After(d):
			return nil
		case <-ctx.Done():
			return status.FromContextError(ctx.Err()).Err()
		}
	}
}

// Noop is an invoker that does nothing, for counting and timing what a stack does.
func Noop(context.Context, string, any, any, *grpc.ClientConn, ...grpc.CallOption) error { return nil }

// Chain composes n interceptors that only pass calls on, as grpc.WithChainUnaryInterceptor
// does, which makes a closure for each interceptor and call: what a stack is compared with.
func Chain(n int) grpc.UnaryClientInterceptor {
	pass := func(ctx context.Context, method string, req, reply any, cc *grpc.ClientConn, next grpc.UnaryInvoker, opts ...grpc.CallOption) error {
		return next(ctx, method, req, reply, cc, opts...)
	}
	return ChainOf(slices.Repeat([]grpc.UnaryClientInterceptor{pass}, n)...)
}

// ChainOf composes interceptors as grpc.WithChainUnaryInterceptor does, the first outermost.
func ChainOf(all ...grpc.UnaryClientInterceptor) grpc.UnaryClientInterceptor {
	if len(all) == 1 {
		return all[0]
	}
	return func(ctx context.Context, method string, req, reply any, cc *grpc.ClientConn, last grpc.UnaryInvoker, opts ...grpc.CallOption) error {
		return all[0](ctx, method, req, reply, cc, invokerFrom(all, 0, last), opts...)
	}
}

func invokerFrom(all []grpc.UnaryClientInterceptor, i int, last grpc.UnaryInvoker) grpc.UnaryInvoker {
	if i == len(all)-1 {
		return last
	}
	return func(ctx context.Context, method string, req, reply any, cc *grpc.ClientConn, opts ...grpc.CallOption) error {
		return all[i+1](ctx, method, req, reply, cc, invokerFrom(all, i+1, last), opts...)
	}
}

// Stack is a stack of the layers of specs, the first outermost.
func Stack(t testing.TB, specs ...interceptor.Spec) *interceptor.Stack {
	t.Helper()
	s, err := interceptor.NewStack(specs...)
	if err != nil {
		t.Fatalf("NewStack: %v", err)
	}
	return s
}

// Reason is why err's call was refused, or "" if it was not.
func Reason(err error) interceptor.Reason {
	if r, ok := interceptor.AsRefusal(err); ok {
		return r.Reason
	}
	return ""
}

// End is how a call ended, and how long after the first of its burst had started.
type End struct {
	After  time.Duration
	Reason interceptor.Reason
	Code   codes.Code
}

// OK is the end of a call that succeeds.
func OK(after time.Duration) End { return End{after, "", codes.OK} }

// Refused is the end of a call that is refused with the code of its reason.
func Refused(after time.Duration, r interceptor.Reason) End { return End{after, r, r.Code()} }

// Begin starts n calls one after the other and returns what waits for them and
// says how each ended. It must be called in a synctest bubble: a call starts once
// all waits that the one before has set going.
func Begin(c grpc.ClientConnInterface, n int, opts ...grpc.CallOption) func() []End {
	ends := make([]End, n)
	start := time.Now()
	var wg sync.WaitGroup
	for i := range n {
		wg.Go(func() {
			err := c.Invoke(context.Background(), Method, nil, nil, opts...)
			ends[i] = End{time.Since(start), Reason(err), status.Code(err)}
		})
		synctest.Wait()
	}
	return func() []End {
		wg.Wait()
		return ends
	}
}

// Burst is Begin that waits.
func Burst(c grpc.ClientConnInterface, n int, opts ...grpc.CallOption) []End {
	return Begin(c, n, opts...)()
}

// Expect checks how the calls of a burst ended.
func Expect(t testing.TB, got []End, want ...End) {
	t.Helper()
	if !slices.Equal(got, want) {
		t.Errorf("calls ended as\n%v, want\n%v", got, want)
	}
}

// Counter is a gate that counts the tickets that it has out. The zero value is ready
// to use.
type Counter struct {
	interceptor.GateOnly
	mu   sync.Mutex
	held int // Guarded by mu.
}

// NewLayer returns the counter itself.
func (l *Counter) NewLayer() (interceptor.Layer, error) { return l, nil }

// WrapGate returns the gate.
func (l *Counter) WrapGate(inner interceptor.Gate) interceptor.Gate {
	return interceptor.GateFunc(func(ctx context.Context, a *interceptor.Admission, w interceptor.Wait) error {
		l.add(1)
		a.Hold(l, 0)
		return inner.Admit(ctx, a, w)
	})
}

func (l *Counter) add(n int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.held += n
}

// Release takes a ticket back.
func (l *Counter) Release(int64, interceptor.End) { l.add(-1) }

// AtRest returns an error if tickets are out.
func (l *Counter) AtRest() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.held != 0 {
		return fmt.Errorf("%d tickets held, want none", l.held)
	}
	return nil
}

// Exchange makes a call of a kind and returns what came back.
func Exchange(ctx context.Context, c testingv1.TestServiceClient, kind interceptor.Kind, opts ...grpc.CallOption) (got []string, err error) {
	add := func(p []byte, o *testingv1.Observed) { got = append(got, fmt.Sprintf("%s %d", p, o.GetReceived())) }
	three := int32(3)
	switch kind {
	case interceptor.ClientStream:
		s, err := c.ClientStream(ctx, opts...)
		if err != nil {
			return nil, err
		}
		for i := range 3 {
			err := s.Send(&testingv1.ClientStreamRequest{Payload: fmt.Append(nil, i)})
			if err == io.EOF {
				break // It has ended, and CloseAndRecv returns how.
			}
			if err != nil {
				return nil, fmt.Errorf("sending: %w", err)
			}
		}
		r, err := s.CloseAndRecv()
		if err == nil {
			add(r.GetPayload(), r.GetObserved())
		}
		return got, err
	case interceptor.ServerStream:
		s, err := c.ServerStream(ctx, &testingv1.ServerStreamRequest{Payload: []byte("x"), Behaviour: &testingv1.Behaviour{ResponseCount: &three}}, opts...)
		if err != nil {
			return nil, err
		}
		for {
			r, err := s.Recv()
			if err == io.EOF {
				return got, nil
			}
			if err != nil {
				return got, err
			}
			add(r.GetPayload(), r.GetObserved())
		}
	case interceptor.BidiStream:
		s, err := c.Bidi(ctx, opts...)
		if err != nil {
			return nil, err
		}
		for i := range 3 {
			if err := s.Send(&testingv1.BidiRequest{Payload: fmt.Append(nil, i)}); err != nil && err != io.EOF {
				return nil, fmt.Errorf("sending: %w", err)
			}
			r, err := s.Recv()
			if err != nil {
				return got, err
			}
			add(r.GetPayload(), r.GetObserved())
		}
		if err := s.CloseSend(); err != nil {
			return got, err
		}
		if _, err := s.Recv(); err != io.EOF {
			return got, fmt.Errorf("the end is %w, want io.EOF", err)
		}
		return got, nil
	default:
		r, err := c.Unary(ctx, &testingv1.UnaryRequest{Payload: []byte("x")}, opts...)
		add(r.GetPayload(), r.GetObserved())
		return got, err
	}
}

// AllocateNothing checks that calls of the method through the interceptors, which
// have names, allocate nothing.
func AllocateNothing(t *testing.T, unaries map[string]grpc.UnaryClientInterceptor, method string) {
	t.Helper()
	ctx := context.Background()
	for name, unary := range unaries {
		_ = unary(ctx, method, nil, nil, nil, Noop)
		got := testing.AllocsPerRun(200, func() { _ = unary(ctx, method, nil, nil, nil, Noop) })
		// The stack's own pool may be emptied by the collector, and is by the race detector.
		if got != 0 && !race.Enabled {
			t.Errorf("%s: %v allocations, want 0", name, got)
		}
	}
}

// Bench measures calls of the method through the interceptors, which have names.
func Bench(b *testing.B, unaries map[string]grpc.UnaryClientInterceptor, method string) {
	ctx := context.Background()
	for name, unary := range unaries {
		b.Run(name, func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				_ = unary(ctx, method, nil, nil, nil, Noop)
			}
		})
	}
}

// WantConfigError checks that err has an [interceptor.ConfigError] for a field of a
// layer, with a value.
func WantConfigError(t testing.TB, err error, layer, field string, value any) {
	t.Helper()
	for _, e := range configErrors(err) {
		if e.Layer == layer && e.Field == field {
			if fmt.Sprint(e.Value) != fmt.Sprint(value) { // So that NaN equals itself.
				t.Errorf("%v: the value is %v, want %v", e, e.Value, value)
			}
			if !strings.HasPrefix(e.Rule, "must ") {
				t.Errorf("%v: the rule is %q, want one that says what must be", e, e.Rule)
			}
			return
		}
	}
	t.Errorf("error %v, want a ConfigError for %s of %s", err, field, layer)
}

func configErrors(err error) []*interceptor.ConfigError {
	switch err := err.(type) {
	case *interceptor.ConfigError:
		return []*interceptor.ConfigError{err}
	case interface{ Unwrap() []error }:
		var all []*interceptor.ConfigError
		for _, err := range err.Unwrap() {
			all = append(all, configErrors(err)...)
		}
		return all
	}
	return nil
}

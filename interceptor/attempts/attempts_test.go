// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package attempts_test

import (
	"context"
	"errors"
	"io"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"github.com/belfry-go/belfry/interceptor"
	"github.com/belfry-go/belfry/interceptor/attempts"
	"github.com/belfry-go/belfry/interceptor/budget"
	"github.com/belfry-go/belfry/interceptor/hedge"
	"github.com/belfry-go/belfry/interceptor/retry"
	"github.com/belfry-go/belfry/interceptor/timeout"
	"github.com/belfry-go/belfry/internal/test/calltest"
	"github.com/belfry-go/belfry/internal/test/leaktest"
	"github.com/belfry-go/belfry/internal/testserver"
	testingv1 "github.com/belfry-go/belfry/proto/belfry/testing/v1"
)

func TestMain(m *testing.M) { leaktest.Main(m) }

var plenty = budget.Config{Ratio: 10, MinPerSecond: 1000}

// client returns a client of a server in memory whose attempts do what do says.
func client(t *testing.T, do func(n int, ctx context.Context) error, layers ...interceptor.Spec) testingv1.TestServiceClient {
	var n atomic.Int32
	srv := testserver.New(t, testserver.InMemory(),
		testserver.GRPC(grpc.ChainUnaryInterceptor(func(ctx context.Context, req any, _ *grpc.UnaryServerInfo, h grpc.UnaryHandler) (any, error) {
			if err := do(int(n.Add(1)), ctx); err != nil {
				return nil, err
			}
			return h(ctx, req)
		})),
		testserver.GRPC(grpc.ChainStreamInterceptor(func(srv any, ss grpc.ServerStream, _ *grpc.StreamServerInfo, h grpc.StreamHandler) error {
			if err := do(int(n.Add(1)), ss.Context()); err != nil {
				return err
			}
			return h(srv, ss)
		})))
	return testingv1.NewTestServiceClient(calltest.Stack(t, layers...).Wrap(testserver.Dial(t, srv)))
}

// fails fails the first attempts.
func fails(first int) func(int, context.Context) error {
	return func(n int, _ context.Context) error {
		if n <= first {
			return status.Error(codes.Unavailable, "busy")
		}
		return nil
	}
}

// stalls lets the first attempts stall until their end.
func stalls(first int) func(int, context.Context) error {
	return func(n int, ctx context.Context) error {
		if n <= first {
			<-ctx.Done()
			return status.FromContextError(ctx.Err()).Err()
		}
		return nil
	}
}

func quickRetry(all bool) retry.Config {
	return retry.Config{AllMethods: all, Backoff: retry.Backoff{Initial: time.Microsecond}, Budget: plenty}
}

func TestMaxRetry(t *testing.T) {
	for n, want := range map[int]int{-1: 1, 1: 1, 2: 2, 5: 5} {
		var r attempts.Report
		_, err := client(t, fails(9), quickRetry(true)).Unary(t.Context(), new(testingv1.UnaryRequest), attempts.MaxRetry(n), attempts.Into(&r))
		if len(r.Attempts) != want || status.Code(err) != codes.Unavailable {
			t.Errorf("MaxRetry(%d): %d attempts, %v; want %d", n, len(r.Attempts), err, want)
		}
	}
}

func TestMaxHedge(t *testing.T) {
	for n, want := range map[int]int{1: 1, 2: 2, 4: 4} {
		var r attempts.Report
		// The last attempt answers, in whatever order they arrive.
		_, err := client(t, func(_ int, ctx context.Context) error {
			md, _ := metadata.FromIncomingContext(ctx)
			before, _ := strconv.Atoi(strings.Join(md.Get("grpc-previous-rpc-attempts"), ""))
			return stalls(want-1)(before+1, ctx)
		}, hedge.Config{Delay: time.Millisecond, AllMethods: true, Budget: plenty}).
			Unary(t.Context(), new(testingv1.UnaryRequest), attempts.MaxHedge(n), attempts.Into(&r))
		// On a busy machine the first attempt may be sent after an extra one.
		if len(r.Attempts) != want || r.HedgesFired != want-1 || r.HedgeWon != (r.Attempts[want-1].Layer == "hedge") || err != nil {
			t.Errorf("MaxHedge(%d): %+v, %v; want %d attempts, of which the last wins", n, r, err, want)
		}
	}
}

// An error that was not repeated says what forbade it, and what would allow it.
func TestIdempotent_error(t *testing.T) {
	for _, tc := range []struct {
		all  bool
		opts []grpc.CallOption
		want string
	}{
		{all: false, want: "attempts.Idempotent(true)"},
		{all: true, opts: []grpc.CallOption{attempts.Idempotent(false)}, want: "the call says attempts.Idempotent(false)"},
	} {
		_, err := client(t, fails(1), quickRetry(tc.all)).Unary(t.Context(), new(testingv1.UnaryRequest), tc.opts...)
		if err == nil || !strings.Contains(err.Error(), tc.want) {
			t.Errorf("AllMethods %v: error %v, want %q in it", tc.all, err, tc.want)
		}
	}
}

func TestIdempotent(t *testing.T) {
	for _, tc := range []struct{ all, yes bool }{{true, false}, {false, true}} {
		var r attempts.Report
		client(t, fails(1), quickRetry(tc.all)).Unary(t.Context(), new(testingv1.UnaryRequest), attempts.Idempotent(tc.yes), attempts.Into(&r))
		if got := len(r.Attempts) == 2; got != tc.yes {
			t.Errorf("AllMethods %v, Idempotent(%v): repeated: %v", tc.all, tc.yes, got)
		}
	}
}

// Each attempt is cut short by its own timeout, and the third answers in time.
func TestTimeout(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const timeout = 30 * time.Millisecond
		c := client(t, stalls(2), quickRetry(true))
		var r attempts.Report
		if _, err := c.Unary(t.Context(), new(testingv1.UnaryRequest), attempts.Timeout(timeout), attempts.MaxRetry(50), attempts.Into(&r)); err != nil {
			t.Fatal(err)
		}
		if len(r.Attempts) < 3 {
			t.Errorf("%d attempts, want the first two to be cut short", len(r.Attempts))
		}
		for i, a := range r.Attempts[:2] {
			refusal, ok := interceptor.AsRefusal(a.Err)
			if !ok || refusal.Reason != interceptor.ReasonDeadline || refusal.NotSent() || a.Took < timeout/2 {
				t.Errorf("attempt %d took %v and ended with %v, want DEADLINE after %v", i, a.Took, a.Err, timeout)
			}
		}
		for _, kind := range []string{"server_stream", "bidi"} {
			c := client(t, stalls(2), quickRetry(true))
			opts := []grpc.CallOption{attempts.Timeout(timeout), attempts.MaxRetry(50), attempts.Into(&r)}
			var err error
			if kind == "bidi" {
				var s testingv1.TestService_BidiClient
				if s, err = c.Bidi(t.Context(), opts...); err == nil {
					err = errors.Join(s.Send(new(testingv1.BidiRequest)), s.CloseSend())
				}
				for err == nil {
					_, err = s.Recv()
				}
			} else {
				var s testingv1.TestService_ServerStreamClient
				for s, err = c.ServerStream(t.Context(), new(testingv1.ServerStreamRequest), opts...); err == nil; {
					_, err = s.Recv()
				}
			}
			if err != io.EOF || len(r.Attempts) < 3 {
				t.Fatalf("%s: %d attempts, %v; want the first two to be cut short and io.EOF", kind, len(r.Attempts), err)
			}
			if refusal, ok := interceptor.AsRefusal(r.Attempts[0].Err); !ok || refusal.Reason != interceptor.ReasonDeadline {
				t.Errorf("%s: the first attempt ended with %v, want DEADLINE", kind, r.Attempts[0].Err)
			}
		}
		// Without a retry the caller gets the attempt's deadline, and the call's if that is first.
		c = client(t, stalls(9))
		_, err := c.Unary(t.Context(), new(testingv1.UnaryRequest), attempts.Timeout(timeout))
		if refusal, ok := interceptor.AsRefusal(err); !ok || refusal.Reason != interceptor.ReasonDeadline || status.Code(err) != codes.DeadlineExceeded {
			t.Errorf("got %v, want DEADLINE_EXCEEDED with reason DEADLINE", err)
		}
		ctx, cancel := context.WithTimeout(t.Context(), timeout)
		defer cancel()
		_, err = c.Unary(ctx, new(testingv1.UnaryRequest), attempts.Timeout(time.Hour))
		if _, ok := interceptor.AsRefusal(err); ok || status.Code(err) != codes.DeadlineExceeded {
			t.Errorf("got %v, want the call's own DEADLINE_EXCEEDED", err)
		}
	})
}

// The report says of a stream's attempt that a layer has cut it short, not that it was
// cancelled, which is what gRPC knows.
func TestInto_cutShort(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := client(t, stalls(1), quickRetry(true), timeout.Config{FirstResponse: 100 * time.Millisecond})
		var r attempts.Report
		s, err := c.ServerStream(t.Context(), new(testingv1.ServerStreamRequest), attempts.MaxRetry(50), attempts.Into(&r))
		for err == nil {
			_, err = s.Recv()
		}
		if err != io.EOF || len(r.Attempts) < 2 {
			t.Fatalf("%d attempts, %v; want the first to be cut short and io.EOF", len(r.Attempts), err)
		}
		if refusal, ok := interceptor.AsRefusal(r.Attempts[0].Err); !ok || refusal.Layer != "timeout" || status.Code(refusal) != codes.DeadlineExceeded {
			t.Errorf("the first attempt ended with %v, want the refusal of the timeout", r.Attempts[0].Err)
		}
	})
}

// A server's DEADLINE_EXCEEDED that comes long before the end of an attempt's timeout is
// about a deadline of its own, which a retry does not repeat by default.
func TestTimeout_serversOwnDeadline(t *testing.T) {
	own := status.Error(codes.DeadlineExceeded, "of a database")
	c := client(t, func(int, context.Context) error { return own }, quickRetry(true))
	var r attempts.Report
	_, err := c.Unary(t.Context(), new(testingv1.UnaryRequest), attempts.Timeout(time.Hour), attempts.Into(&r))
	if _, ok := interceptor.AsRefusal(err); ok || status.Convert(err).Message() != "of a database" || len(r.Attempts) != 1 {
		t.Errorf("%d attempts and %v, want one and the server's answer", len(r.Attempts), err)
	}
}

// slowStream delivers its messages after the delays.
type slowStream struct {
	grpc.ClientStream
	ctx    context.Context
	delays []time.Duration
}

func (s *slowStream) RecvMsg(any) error {
	if len(s.delays) == 0 {
		return io.EOF
	}
	select {
	case <-time.After(s.delays[0]):
		s.delays = s.delays[1:]
		return nil
	case <-s.ctx.Done():
		return status.FromContextError(s.ctx.Err()).Err()
	}
}

// The timeout of a stream's attempt ends with its first message.
func TestTimeout_firstMessage(t *testing.T) {
	for _, tc := range []struct {
		delays []time.Duration
		want   codes.Code
	}{{[]time.Duration{time.Second - 1, time.Hour}, codes.OK}, {[]time.Duration{time.Second + 1}, codes.DeadlineExceeded}} {
		synctest.Test(t, func(t *testing.T) {
			open := func(ctx context.Context, _ *grpc.StreamDesc, _ *grpc.ClientConn, _ string, _ ...grpc.CallOption) (grpc.ClientStream, error) {
				return &slowStream{ctx: ctx, delays: tc.delays}, nil
			}
			s, err := calltest.Stack(t).StreamClientInterceptor()(t.Context(), &grpc.StreamDesc{ServerStreams: true}, nil, calltest.Method, open, attempts.Timeout(time.Second))
			for err == nil {
				err = s.RecvMsg(nil)
			}
			if err == io.EOF {
				err = nil
			}
			if status.Code(err) != tc.want {
				t.Errorf("messages after %v: %v, want %v", tc.delays, err, tc.want)
			}
		})
	}
}

// lateStream delivers a message at the moment at which it is cut short.
type lateStream struct {
	grpc.ClientStream
	ctx context.Context
}

func (s *lateStream) RecvMsg(any) error {
	<-s.ctx.Done()
	return nil
}

// The first message of an attempt that was cut short is not delivered: others would not
// follow, and the call could not be repeated any more. Neither is
// a single response: the observer and the limits were told of the deadline.
func TestTimeout_withFirstMessage(t *testing.T) {
	for _, tc := range []struct {
		desc grpc.StreamDesc
		want codes.Code
	}{{grpc.StreamDesc{ServerStreams: true}, codes.DeadlineExceeded}, {grpc.StreamDesc{ClientStreams: true}, codes.DeadlineExceeded}} {
		synctest.Test(t, func(t *testing.T) {
			open := func(ctx context.Context, _ *grpc.StreamDesc, _ *grpc.ClientConn, _ string, _ ...grpc.CallOption) (grpc.ClientStream, error) {
				return &lateStream{ctx: ctx}, nil
			}
			s, err := calltest.Stack(t).StreamClientInterceptor()(t.Context(), &tc.desc, nil, calltest.Method, open, attempts.Timeout(time.Second))
			if err != nil {
				t.Fatal(err)
			}
			if err := s.RecvMsg(nil); status.Code(err) != tc.want {
				t.Errorf("%+v: %v, want %v", tc.desc, err, tc.want)
			}
		})
	}
}

// An attempt whose timeout passes before it is sent may be repeated whatever the method.
func TestTimeout_notSent(t *testing.T) {
	for _, kind := range []interceptor.Kind{interceptor.Unary, interceptor.ServerStream} {
		synctest.Test(t, func(t *testing.T) {
			var r attempts.Report
			c := client(t, fails(0), quickRetry(false))
			_, err := calltest.Exchange(t.Context(), c, kind, attempts.Timeout(200*time.Millisecond), grpc.PerRPCCredentials(new(calltest.SlowToken)), attempts.Into(&r))
			if err != nil || len(r.Attempts) != 2 {
				t.Errorf("%v: %d attempts, %v; want another one when the first got no token in time", kind, len(r.Attempts), err)
			}
		})
	}
}

func TestInto(t *testing.T) {
	fail := func(want string) func(*testing.T, attempts.Report, error) {
		return func(t *testing.T, r attempts.Report, err error) {
			if len(r.Attempts) != 3 || status.Code(err) != codes.Unavailable || status.Convert(err).Message() != "busy" || !strings.Contains(err.Error(), "after 3 attempts") {
				t.Fatalf("%+v, %v; want 3 attempts and the server's error, which says so", r, err)
			}
			for i, a := range r.Attempts {
				wantReason, wantLayer := "Unavailable", "retry"
				if i == 0 {
					wantReason, wantLayer = "", ""
				}
				if a.Reason != wantReason || a.Layer != wantLayer || status.Code(a.Err) != codes.Unavailable || a.Took <= 0 || a.Peer == nil || i > 0 && a.Start <= r.Attempts[i-1].Start {
					t.Errorf("attempt %d is reported as %+v, want by %q for %q, with its error and peer", i, a, wantLayer, wantReason)
				}
			}
		}
	}
	for name, call := range map[string]func(context.Context, testingv1.TestServiceClient, ...grpc.CallOption) error{
		"unary": func(ctx context.Context, c testingv1.TestServiceClient, opts ...grpc.CallOption) error {
			_, err := c.Unary(ctx, new(testingv1.UnaryRequest), opts...)
			return err
		},
		"server_stream": func(ctx context.Context, c testingv1.TestServiceClient, opts ...grpc.CallOption) error {
			s, err := c.ServerStream(ctx, new(testingv1.ServerStreamRequest), opts...)
			for err == nil {
				_, err = s.Recv()
			}
			return err
		},
		"client_stream": func(ctx context.Context, c testingv1.TestServiceClient, opts ...grpc.CallOption) error {
			s, err := c.ClientStream(ctx, opts...)
			if err != nil {
				return err
			}
			_, err = s.CloseAndRecv()
			return err
		},
	} {
		t.Run(name, func(t *testing.T) {
			r := attempts.Report{HedgeWon: true} // Of a call before.
			err := call(t.Context(), client(t, fails(9), quickRetry(true)), attempts.Into(&r))
			fail(name)(t, r, err)
			err = call(t.Context(), client(t, fails(0), quickRetry(true)), attempts.Into(&r))
			if len(r.Attempts) != 1 || r.Attempts[0].Err != nil || r.Attempts[0].Peer == nil || err != nil && err != io.EOF {
				t.Errorf("a call that succeeds: %+v, %v; want one attempt without error", r, err)
			}
		})
	}
}

// A stack behind the connection of another one reports its attempts, in place of the outer
// one's.
func TestInto_nested(t *testing.T) {
	srv := testserver.New(t)
	inner := calltest.Stack(t, quickRetry(true)).Wrap(testserver.Dial(t, srv))
	c := testingv1.NewTestServiceClient(calltest.Stack(t, hedge.Config{Delay: time.Hour, AllMethods: true}).Wrap(inner))
	var r attempts.Report
	_, err := c.Unary(t.Context(), &testingv1.UnaryRequest{Behaviour: &testingv1.Behaviour{Status: &testingv1.Status{Code: int32(codes.Unavailable)}}}, attempts.Into(&r))
	var layers []string
	for _, a := range r.Attempts {
		layers = append(layers, a.Layer)
	}
	// The hedge makes its second attempt at once.
	if want := []string{"", "retry", "retry", "hedge", "retry", "retry"}; !slices.Equal(layers, want) {
		t.Errorf("attempts by %q, %v; want by %q", layers, err, want)
	}
}

func TestInto_drained(t *testing.T) {
	s := calltest.Stack(t)
	if err := s.Drain(t.Context()); err != nil {
		t.Fatal(err)
	}
	r := attempts.Report{HedgesFired: 7}
	err := s.UnaryClientInterceptor()(t.Context(), calltest.Method, nil, nil, nil, calltest.Noop, attempts.Into(&r))
	if r.HedgesFired != 0 || err == nil {
		t.Errorf("report %+v, %v; want it emptied", r, err)
	}
}

// Reports are read as soon as the call returns, while losers end: the race detector sees
// whether one is written later.
func TestInto_race(t *testing.T) {
	c := client(t, func(n int, _ context.Context) error {
		switch n % 4 {
		case 0:
			time.Sleep(2 * time.Millisecond)
		case 1:
			return status.Error(codes.Unavailable, "busy")
		}
		return nil
	}, hedge.Config{Delay: time.Millisecond, MaxAttempts: 3, AllMethods: true, Budget: plenty}, quickRetry(true))
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			for i := range 50 {
				var r attempts.Report
				var err error
				if i%2 == 0 {
					_, err = c.Unary(t.Context(), new(testingv1.UnaryRequest), attempts.Into(&r))
				} else {
					var s testingv1.TestService_ServerStreamClient
					for s, err = c.ServerStream(t.Context(), &testingv1.ServerStreamRequest{Behaviour: &testingv1.Behaviour{ResponseCount: proto.Int32(2)}}, attempts.Into(&r)); err == nil; {
						_, err = s.Recv()
					}
				}
				if len(r.Attempts) == 0 || r.HedgeWon && r.HedgesFired == 0 {
					t.Errorf("report %+v of a call that ended with %v, want its attempts", r, err)
				}
			}
		})
	}
	wg.Wait()
}

// An attempt that ends because the call does is reported with the call's error, unless
// another attempt has decided that.
func TestInto_endOfTheCall(t *testing.T) {
	failsThenStalls := func(n int, ctx context.Context) error {
		if n == 1 {
			return status.Error(codes.Unavailable, "busy")
		}
		return stalls(n)(n, ctx)
	}
	stallsThenFails := func(_ int, ctx context.Context) error {
		if md, _ := metadata.FromIncomingContext(ctx); len(md.Get("grpc-previous-rpc-attempts")) > 0 {
			return status.Error(codes.NotFound, "none")
		}
		return stalls(1)(1, ctx)
	}
	for name, tc := range map[string]struct {
		do    func(int, context.Context) error
		layer interceptor.Spec
		limit time.Duration // Of the call.
		own   time.Duration // Of each attempt.
		want  []codes.Code
	}{
		"deadline": {failsThenStalls, quickRetry(true), 500 * time.Millisecond, 0, []codes.Code{codes.Unavailable, codes.DeadlineExceeded}},
		"own":      {stalls(1), retry.Config{MaxAttempts: 1}, time.Minute, 30 * time.Millisecond, []codes.Code{codes.DeadlineExceeded}},
		"other":    {stallsThenFails, hedge.Config{Delay: time.Millisecond, AllMethods: true, Budget: plenty}, time.Minute, 0, []codes.Code{codes.Canceled, codes.NotFound}},
	} {
		for _, kind := range []interceptor.Kind{interceptor.Unary, interceptor.ClientStream, interceptor.ServerStream, interceptor.BidiStream} {
			t.Run(name+"/"+kind.String(), func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					ctx, cancel := context.WithTimeout(t.Context(), tc.limit)
					defer cancel()
					var r attempts.Report
					_, err := calltest.Exchange(ctx, client(t, tc.do, tc.layer), kind, attempts.Into(&r), attempts.Timeout(tc.own))
					var got []codes.Code
					for _, a := range r.Attempts {
						got = append(got, status.Code(a.Err))
					}
					if !slices.Equal(got, tc.want) {
						t.Errorf("the attempts of a call that ended with %v ended with %v, want %v", err, got, tc.want)
					}
				})
			})
		}
	}
}

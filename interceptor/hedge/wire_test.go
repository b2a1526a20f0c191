// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package hedge_test

import (
	"context"
	"errors"
	"net"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/belfry-go/belfry/interceptor"
	"github.com/belfry-go/belfry/interceptor/budget"
	"github.com/belfry-go/belfry/interceptor/hedge"
	"github.com/belfry-go/belfry/interceptor/retry"
	"github.com/belfry-go/belfry/internal/test/calltest"
	"github.com/belfry-go/belfry/internal/testserver"
	testingv1 "github.com/belfry-go/belfry/proto/belfry/testing/v1"
)

// fetches is a credential of which the n-th fetch, counted from 1, takes a minute. It does
// not heed its context, as those of golang.org/x/oauth2 do not.
type fetches struct {
	n    atomic.Int32
	slow int32
}

func (f *fetches) GetRequestMetadata(context.Context, ...string) (map[string]string, error) {
	if f.n.Add(1) == f.slow {
		time.Sleep(time.Minute)
	}
	return nil, nil
}

func (*fetches) RequireTransportSecurity() bool { return false }

// An attempt that gRPC cannot interrupt ends behind the call, whichever it is, and the
// stack knows of it until then.
func TestLosersThatDoNotHeedTheirContext(t *testing.T) {
	for name, tc := range map[string]struct {
		slow  int32
		delay time.Duration // Of the server.
		took  time.Duration
	}{
		"the_first_attempt": {1, 0, 10 * ms},
		"an_extra_attempt":  {2, 30 * ms, 30 * ms},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				srv := testserver.New(t, testserver.InMemory())
				stack := calltest.Stack(t, mustNew(t, fixed))
				conn := testserver.Dial(t, srv, append(stack.DialOptions(), grpc.WithPerRPCCredentials(&fetches{slow: tc.slow}))...)
				connect(t, conn)
				start := time.Now()
				reply, err := testingv1.NewTestServiceClient(conn).Unary(t.Context(), &testingv1.UnaryRequest{
					Payload: []byte("payload"), Behaviour: &testingv1.Behaviour{Delay: durationpb.New(tc.delay)},
				})
				if took := time.Since(start); err != nil || took != tc.took {
					t.Errorf("got %v after %v, want an answer after %v", err, took, tc.took)
				}
				if err := stack.Drain(t.Context()); err != nil {
					t.Error(err)
				}
				if took := time.Since(start).Truncate(time.Second); took != time.Minute {
					t.Errorf("Drain returned after %v, want it to wait for the loser, which ends after a minute", took)
				}
				if string(reply.GetPayload()) != "payload" {
					t.Errorf("the reply is %v after the loser has ended, want that of the winner", reply)
				}
			})
		})
	}
}

// noToken is a credential whose second fetch fails, or takes as long as its context.
type noToken struct {
	n     atomic.Int32
	stall bool
}

func (f *noToken) GetRequestMetadata(ctx context.Context, _ ...string) (map[string]string, error) {
	if f.n.Add(1) != 2 {
		return nil, nil
	}
	if f.stall {
		<-ctx.Done()
	}
	return nil, errors.New("no token")
}

func (*noToken) RequireTransportSecurity() bool { return false }

// An attempt that was not sent is no answer, whatever its code: it neither ends the call
// while another one runs nor replaces what a server has said.
func TestAttemptThatIsNotSent(t *testing.T) {
	for _, kind := range []interceptor.Kind{interceptor.Unary, interceptor.ClientStream, interceptor.ServerStream, interceptor.BidiStream} {
		for name, tc := range map[string]struct {
			fails codes.Code // The first attempt.
			stall bool
		}{
			"beside_one_that_succeeds": {codes.OK, false},
			"after_an_answer":          {codes.Unavailable, false},
			"after_an_answer,_late":    {codes.Unavailable, true},
		} {
			t.Run(kind.String()+"/"+name, func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					srv := testserver.New(t, testserver.InMemory(), testserver.ServiceTime(testserver.Fixed(100*ms)))
					if tc.fails != codes.OK {
						if err := srv.Fail(tc.fails, 1); err != nil {
							t.Fatal(err)
						}
					}
					l := mustNew(t, hedge.Config{Delay: 10 * ms, Budget: budget.Config{MinPerSecond: 100}})
					conn := testserver.Dial(t, srv, append(calltest.Stack(t, l).DialOptions(), grpc.WithPerRPCCredentials(&noToken{stall: tc.stall}))...)
					connect(t, conn)
					ctx, cancel := context.WithTimeout(t.Context(), time.Second)
					defer cancel()
					if _, err := calltest.Exchange(ctx, testingv1.NewTestServiceClient(conn), kind); status.Code(err) != tc.fails {
						t.Errorf("%v, want %v", err, tc.fails)
					}
				})
			})
		}
	}
}

func connect(t *testing.T, conn *grpc.ClientConn) {
	t.Helper()
	conn.Connect()
	for s := conn.GetState(); s.String() != "READY"; s = conn.GetState() {
		conn.WaitForStateChange(t.Context(), s)
	}
}

// A call that waits for a connection is not slow at a server: an extra attempt would wait
// for the same one.
func TestWaitForAConnection(t *testing.T) {
	for _, delay := range []time.Duration{10 * ms, 0} {
		synctest.Test(t, func(t *testing.T) {
			srv := testserver.New(t, testserver.InMemory())
			e := &events{}
			l := mustNew(t, hedge.Config{Delay: delay, MinDataPoints: 1, Budget: budget.Config{MinPerSecond: 100}})
			dialer := grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) {
				time.Sleep(300 * ms)
				return srv.DialContext(ctx)
			})
			conn := testserver.Dial(t, srv, append(calltest.Stack(t, interceptor.Observe(e), l).DialOptions(), dialer)...)
			client := testingv1.NewTestServiceClient(conn)
			var wg sync.WaitGroup
			for range 20 {
				wg.Go(func() {
					if _, err := client.Unary(t.Context(), &testingv1.UnaryRequest{}); err != nil {
						t.Error(err)
					}
				})
			}
			wg.Wait()
			if log := e.without("budget"); len(log) != 20 {
				t.Errorf("delay %v: 20 calls that waited for the connection had %d attempts and hedges, want none more", delay, len(log))
			}
			if d, ok := l.Delay("/belfry.testing.v1.TestService/Unary"); delay == 0 && (d > ms || !ok) {
				t.Errorf("the delay is %v, %v; want MinDelay, without the time to connect", d, ok)
			}
			// Calls that follow are hedged as usual.
			if _, err := client.Unary(t.Context(), &testingv1.UnaryRequest{Behaviour: &testingv1.Behaviour{Delay: durationpb.New(50 * ms)}}); err != nil {
				t.Error(err)
			}
			if log := e.without("budget"); delay != 0 && len(log) < 23 {
				t.Errorf("delay %v: the observer saw %q, want an extra attempt of the call that is slow", delay, log[20:])
			}
		})
	}
}

// The first attempt stalls until the caller's deadline, and the server has failed the
// extra one by then: its answer is not replaced by the deadline, for streams either.
func TestDeadlineDoesNotReplaceAnswer_stream(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var n atomic.Int32
		srv := testserver.New(t, testserver.InMemory(), testserver.GRPC(grpc.ChainStreamInterceptor(
			func(_ any, s grpc.ServerStream, _ *grpc.StreamServerInfo, _ grpc.StreamHandler) error {
				if n.Add(1) == 1 {
					<-s.Context().Done()
					return s.Context().Err()
				}
				return status.Error(codes.Unavailable, "no")
			})))
		c := testingv1.NewTestServiceClient(testserver.Dial(t, srv, calltest.Stack(t, mustNew(t, fixed)).DialOptions()...))
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		s, err := c.ServerStream(ctx, &testingv1.ServerStreamRequest{})
		if err == nil {
			_, err = s.Recv()
		}
		if status.Code(err) != codes.Unavailable || n.Load() != 2 {
			t.Errorf("got %v after %d attempts, want UNAVAILABLE of the second", err, n.Load())
		}
	})
}

// secondFails is a credential that has no token for the second attempt.
type secondFails struct{ n atomic.Int32 }

func (c *secondFails) GetRequestMetadata(context.Context, ...string) (map[string]string, error) {
	if c.n.Add(1) == 2 {
		return nil, errors.New("no token")
	}
	return nil, nil
}

func (*secondFails) RequireTransportSecurity() bool { return false }

// A retry inside the first attempt of a hedge has no token for its second attempt: that is
// no answer, so the extra attempt is made and wins.
func TestRetryWithoutTokenIsNoAnswer(t *testing.T) {
	for _, kind := range []interceptor.Kind{interceptor.Unary, interceptor.ServerStream} {
		synctest.Test(t, func(t *testing.T) {
			var n atomic.Int32
			fail := func() error {
				if n.Add(1) == 1 {
					time.Sleep(15 * ms) // The extra attempt runs.
					return unavailable
				}
				time.Sleep(30 * ms)
				return nil
			}
			srv := testserver.New(t, testserver.InMemory(), testserver.GRPC(
				grpc.ChainUnaryInterceptor(func(ctx context.Context, req any, _ *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (any, error) {
					if err := fail(); err != nil {
						return nil, err
					}
					return handler(ctx, req)
				}),
				grpc.ChainStreamInterceptor(func(srv any, s grpc.ServerStream, _ *grpc.StreamServerInfo, handler grpc.StreamHandler) error {
					if err := fail(); err != nil {
						return err
					}
					return handler(srv, s)
				})))
			creds := new(secondFails)
			creds.n.Store(-1) // The hedge's extra attempt is the second to ask, the retry the third.
			conf := fixed
			conf.Delay = 10 * ms
			l := calltest.Stack(t, mustNew(t, conf), retry.Config{AllMethods: true, Backoff: retry.Backoff{Initial: ms, Max: ms}})
			conn := testserver.Dial(t, srv, append(l.DialOptions(), grpc.WithPerRPCCredentials(creds))...)
			if _, err := calltest.Exchange(t.Context(), testingv1.NewTestServiceClient(conn), kind); err != nil {
				t.Errorf("%v: %v, want the answer of the extra attempt", kind, err)
			}
		})
	}
}

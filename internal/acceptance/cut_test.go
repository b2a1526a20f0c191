// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package acceptance

import (
	"context"
	"io"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/belfry-go/belfry/balancer/p2c"
	"github.com/belfry-go/belfry/interceptor"
	"github.com/belfry-go/belfry/interceptor/breaker"
	"github.com/belfry-go/belfry/interceptor/buffer"
	"github.com/belfry-go/belfry/interceptor/concurrency"
	"github.com/belfry-go/belfry/interceptor/hedge"
	"github.com/belfry-go/belfry/interceptor/loadshed"
	"github.com/belfry-go/belfry/interceptor/retry"
	"github.com/belfry-go/belfry/interceptor/timeout"
	"github.com/belfry-go/belfry/internal/testserver"
	testingv1 "github.com/belfry-go/belfry/proto/belfry/testing/v1"
	"github.com/belfry-go/belfry/resolver/discover"
)

// dialHanging returns a channel through a stack to the servers of a cluster in memory. The
// caller closes it.
func dialHanging(t *testing.T, c *testserver.Cluster, lb string, specs ...interceptor.Spec) (*grpc.ClientConn, *interceptor.Stack) {
	t.Helper()
	stack, err := interceptor.NewStack(specs...)
	if err != nil {
		t.Fatal(err)
	}
	source, err := discover.List(c.Endpoints()...)
	if err != nil {
		t.Fatal(err)
	}
	opts := append(c.DialOptions(), stack.DialOptions()...)
	opts = append(append(opts, p2c.DialOptions()...), discover.WithSource(source), grpc.WithNoProxy(),
		grpc.WithDefaultServiceConfig(`{"loadBalancingConfig":[{"belfry.p2c":`+lb+`}]}`))
	conn, err := grpc.NewClient("belfry:///cut", opts...)
	if err != nil {
		t.Fatal(err)
	}
	return conn, stack
}

// The timeout of an attempt ends no stream that is in use: the first endpoint never
// answers, the second does, and the stream then lives for ten times that timeout.
func TestAttemptTimeoutLeavesAStreamInUse(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := testserver.NewCluster(t, 2, inMemory)
		defer c.Close()
		c.Server(0).BlackHole()
		stack, err := interceptor.NewStack(retry.Config{AllMethods: true}, timeout.Config{FirstResponse: 100 * time.Millisecond})
		if err != nil {
			t.Fatal(err)
		}
		conn := dialCluster(t, c, "expectedLatency", "", stack.DialOptions()...)
		defer conn.Close()
		n := int32(20)
		for range 5 {
			s, err := testingv1.NewTestServiceClient(conn).ServerStream(t.Context(), &testingv1.ServerStreamRequest{
				Behaviour: &testingv1.Behaviour{ResponseCount: &n, Delay: durationpb.New(50 * time.Millisecond)},
			})
			if err != nil {
				t.Fatal(err)
			}
			for i := range n {
				m, err := s.Recv()
				if err != nil || m.GetObserved().GetIndex() != i {
					t.Fatalf("message %d is %v, %v", i, m, err)
				}
			}
			if _, err := s.Recv(); err != io.EOF {
				t.Fatal(err)
			}
		}
	})
}

// A stream that a bound of its timeout cuts is a deadline, and not cancelled by its caller:
// the balancer avoids the endpoint that hangs, a breaker opens, and a retry repeats it.
func TestStreamsCutShortAreDeadlines(t *testing.T) {
	const bound = 50 * time.Millisecond
	every := func(string) bool { return true }
	for name, cfg := range map[string]timeout.Config{
		"first_response": {FirstResponse: bound},
		"message":        {Message: bound},
		"idle":           {Idle: bound},
		"lifetime":       {Lifetime: bound},
	} {
		t.Run(name, func(t *testing.T) {
			cut, err := timeout.New(cfg, timeout.WithName("attempt"))
			if err != nil {
				t.Fatal(err)
			}
			again, err := retry.New(retry.Config{}, retry.WithIdempotent(every))
			if err != nil {
				t.Fatal(err)
			}
			hedged, err := hedge.New(hedge.Config{Delay: time.Second}, hedge.WithIdempotent(every))
			if err != nil {
				t.Fatal(err)
			}
			t.Run("balancer_and_retry", func(t *testing.T) {
				for _, lb := range []string{`{"load":{"peakEwma":{}}}`, `{}`} {
					synctest.Test(t, func(t *testing.T) {
						c := testserver.NewCluster(t, 5, func(int) []testserver.Option {
							return []testserver.Option{testserver.InMemory(), testserver.ServiceTime(testserver.Fixed(5 * time.Millisecond))}
						})
						defer c.Close()
						conn, stack := dialHanging(t, c, lb, loadshed.Config{}, timeout.Config{Timeout: time.Minute, Lifetime: time.Minute},
							hedged, again, cut, buffer.Config{Size: 10}, concurrency.Config{Limit: 10})
						defer conn.Close()
						client := testingv1.NewTestServiceClient(conn)
						read := func() error {
							s, err := client.ServerStream(t.Context(), &testingv1.ServerStreamRequest{})
							for err == nil {
								_, err = s.Recv()
							}
							if err == io.EOF {
								err = nil
							}
							return err
						}
						for range 50 {
							if err := read(); err != nil {
								t.Fatal(err)
							}
						}
						c.Server(0).BlackHole()
						before := c.Server(0).Stats().Started
						const calls, callers = 400, 4
						var wg sync.WaitGroup
						for range callers {
							wg.Go(func() {
								for range calls / callers {
									if err := read(); err != nil {
										t.Errorf("%s: %v, want the attempt that was cut to be repeated", lb, err)
									}
								}
							})
						}
						wg.Wait()
						// Blind, it would be a fifth. A few find out: at most 3 in 20 runs, so that no
						// false failure is expected.
						if n := c.Server(0).Stats().Started - before; n == 0 || n > calls/40 {
							t.Errorf("%s: %d of %d streams went to the endpoint that hangs, want some, and at most %d", lb, n, calls, calls/40)
						}
						if err := stack.Drain(t.Context()); err != nil {
							t.Error(err)
						}
					})
				}
			})
			for where, specs := range map[string][]interceptor.Spec{
				"breaker_outside": {breaker.Config{}, cut}, "breaker_inside": {cut, breaker.Config{}},
			} {
				t.Run(where, func(t *testing.T) {
					synctest.Test(t, func(t *testing.T) {
						c := testserver.NewCluster(t, 1, inMemory)
						defer c.Close()
						conn, stack := dialHanging(t, c, `{}`, specs...)
						defer conn.Close()
						client := testingv1.NewTestServiceClient(conn)
						c.Server(0).BlackHole()
						opened := false
						for range 40 {
							ctx, cancel := context.WithCancel(t.Context())
							s, err := client.Bidi(ctx)
							if err == nil {
								s.Send(&testingv1.BidiRequest{})
								_, err = s.Recv()
							}
							r, ok := interceptor.AsRefusal(err)
							switch {
							case ok && r.Reason == interceptor.ReasonBreakerOpen:
								opened = true
							case !ok || r.Layer != "attempt" || status.Code(err) != codes.DeadlineExceeded:
								t.Errorf("%v, want the refusal of attempt", err)
							}
							cancel()
						}
						if !opened {
							t.Error("the breaker is still closed after 40 streams that were cut short")
						}
						if err := stack.Drain(t.Context()); err != nil {
							t.Error(err)
						}
					})
				})
			}
		})
	}
}

// A message that is only kept, while a retry backs off, does not keep a stream from being
// idle.
func TestKeptMessagesDoNotRenewIdle(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		srv := testserver.New(t, testserver.InMemory(), testserver.GRPC(grpc.ChainStreamInterceptor(
			func(any, grpc.ServerStream, *grpc.StreamServerInfo, grpc.StreamHandler) error {
				return status.Error(codes.Unavailable, "gone")
			})))
		stack, err := interceptor.NewStack(timeout.Config{Idle: 100 * time.Millisecond},
			retry.Config{AllMethods: true, Backoff: retry.Backoff{Initial: time.Hour, Max: time.Hour}})
		if err != nil {
			t.Fatal(err)
		}
		s, err := testingv1.NewTestServiceClient(testserver.Dial(t, srv, stack.DialOptions()...)).Bidi(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		start := time.Now()
		ended := make(chan error, 1)
		go func() {
			_, err := s.Recv()
			ended <- err
		}()
		for range 20 {
			s.Send(&testingv1.BidiRequest{})
			time.Sleep(50 * time.Millisecond)
			if stack.InFlight() == 0 {
				break
			}
		}
		if took := time.Since(start); stack.InFlight() != 0 || took > 200*time.Millisecond {
			t.Errorf("after %v %d streams are in flight, want none after 200ms", took, stack.InFlight())
		}
		if err := <-ended; status.Code(err) != codes.DeadlineExceeded && status.Code(err) != codes.Unavailable {
			t.Errorf("the stream ended with %v", err)
		}
	})
}

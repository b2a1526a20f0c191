// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package acceptance

import (
	"context"
	"math/rand/v2"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/belfry-go/belfry/interceptor"
	"github.com/belfry-go/belfry/interceptor/concurrency"
	"github.com/belfry-go/belfry/interceptor/failfast"
	"github.com/belfry-go/belfry/interceptor/loadshed"
	"github.com/belfry-go/belfry/internal/testserver"
	testingv1 "github.com/belfry-go/belfry/proto/belfry/testing/v1"
)

// Two endpoints that may have two attempts in flight each, in virtual time.
func TestEndpointLimit(t *testing.T) {
	const limited = `{"endpointLimit":{"fixed":2},"load":{"pendingRequests":{}}}`
	type end struct {
		took time.Duration
		err  error
	}
	// with opens a channel on which unary calls take a second.
	with := func(t *testing.T, lb string, specs []interceptor.Spec, f func(t *testing.T, c *testserver.Cluster, client testingv1.TestServiceClient, calls func(n int, opts ...grpc.CallOption) []end)) {
		synctest.Test(t, func(t *testing.T) {
			c := testserver.NewCluster(t, 2, func(int) []testserver.Option {
				return []testserver.Option{testserver.InMemory(), testserver.ServiceTime(testserver.Fixed(time.Second))}
			})
			defer c.Close()
			conn, _ := dialHanging(t, c, lb, specs...)
			defer conn.Close()
			client := testingv1.NewTestServiceClient(conn)
			conn.Connect()
			for _, s := range c.Servers() {
				if err := s.WaitConnections(t.Context(), 1); err != nil {
					t.Fatal(err)
				}
			}
			synctest.Wait()
			f(t, c, client, func(n int, opts ...grpc.CallOption) []end {
				ends := make([]end, n)
				var wg sync.WaitGroup
				for i := range ends {
					wg.Go(func() {
						begin := time.Now()
						_, err := client.Unary(t.Context(), &testingv1.UnaryRequest{}, opts...)
						ends[i] = end{time.Since(begin), err}
					})
					synctest.Wait() // They come in this order.
				}
				for _, s := range c.Servers() {
					if got := s.Stats().InFlight; got > 2 {
						t.Errorf("%d calls in flight in a server, want at most 2", got)
					}
				}
				wg.Wait()
				return ends
			})
		})
	}
	notReady := func(err error) bool {
		r, ok := interceptor.AsRefusal(err)
		return ok && r.Reason == interceptor.ReasonNotReady && r.NotSent()
	}
	t.Run("calls_wait_in_the_order_of_their_coming", func(t *testing.T) {
		with(t, limited, nil, func(t *testing.T, c *testserver.Cluster, _ testingv1.TestServiceClient, calls func(int, ...grpc.CallOption) []end) {
			for i, e := range calls(10) {
				if want := time.Duration(1+i/4) * time.Second; e.err != nil || e.took != want {
					t.Errorf("call %d took %v and ended with %v, want %v and no error", i, e.took, e.err, want)
				}
			}
		})
	})
	t.Run("streams_count_for_their_life", func(t *testing.T) {
		with(t, limited, nil, func(t *testing.T, c *testserver.Cluster, client testingv1.TestServiceClient, calls func(int, ...grpc.CallOption) []end) {
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			n := int32(1000)
			for range 3 {
				s, err := client.ServerStream(ctx, &testingv1.ServerStreamRequest{Behaviour: &testingv1.Behaviour{Delay: durationpb.New(time.Second), ResponseCount: &n}})
				if err == nil {
					_, err = s.Recv()
				}
				if err != nil {
					t.Fatal(err)
				}
			}
			for i, e := range calls(3) {
				if want := time.Duration(1+i) * time.Second; e.err != nil || e.took != want {
					t.Errorf("with room for one beside the streams call %d took %v and ended with %v, want %v and no error", i, e.took, e.err, want)
				}
			}
			cancel()
			synctest.Wait()
			for i, e := range calls(4) {
				if e.err != nil || e.took != time.Second {
					t.Errorf("after the streams call %d took %v and ended with %v, want 1s and no error", i, e.took, e.err)
				}
			}
		})
	})
	t.Run("deadline_passes_while_waiting", func(t *testing.T) {
		with(t, limited, nil, func(t *testing.T, c *testserver.Cluster, client testingv1.TestServiceClient, calls func(int, ...grpc.CallOption) []end) {
			var wg sync.WaitGroup
			for range 4 {
				wg.Go(func() { client.Unary(t.Context(), &testingv1.UnaryRequest{}) })
			}
			synctest.Wait()
			ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
			defer cancel()
			if _, err := client.Unary(ctx, &testingv1.UnaryRequest{}); status.Code(err) != codes.DeadlineExceeded {
				t.Errorf("got %v, want DEADLINE_EXCEEDED", err)
			}
			wg.Wait()
		})
	})
	t.Run("what_must_not_wait_is_refused", func(t *testing.T) {
		shed := []interceptor.Spec{loadshed.Config{}, concurrency.Config{Limit: 100}}
		with(t, limited, shed, func(t *testing.T, c *testserver.Cluster, client testingv1.TestServiceClient, calls func(int, ...grpc.CallOption) []end) {
			for i, e := range calls(6) {
				if i < 4 && (e.err != nil || e.took != time.Second) || i >= 4 && (!notReady(e.err) || e.took != 0) {
					t.Errorf("call %d took %v and ended with %v, want four calls of 1s, and two refused at once with NOT_READY", i, e.took, e.err)
				}
			}
			if s, err := client.ServerStream(t.Context(), &testingv1.ServerStreamRequest{}); err != nil {
				t.Errorf("a stream while there is room: %v", err)
			} else {
				for err == nil {
					_, err = s.Recv()
				}
			}
		})
	})
	t.Run("what_may_wait_for_a_while", func(t *testing.T) {
		fast := []interceptor.Spec{failfast.Config{After: 300 * time.Millisecond}, concurrency.Config{Limit: 100}}
		with(t, limited, fast, func(t *testing.T, c *testserver.Cluster, _ testingv1.TestServiceClient, calls func(int, ...grpc.CallOption) []end) {
			ends := calls(5)
			if e := ends[4]; !notReady(e.err) || e.took != 300*time.Millisecond {
				t.Errorf("call 4 took %v and ended with %v, want NOT_READY after 300ms", e.took, e.err)
			}
		})
	})
	t.Run("an_option_narrows_the_wait", func(t *testing.T) {
		with(t, limited, nil, func(t *testing.T, c *testserver.Cluster, client testingv1.TestServiceClient, calls func(int, ...grpc.CallOption) []end) {
			ends := calls(5, interceptor.WithWait(interceptor.None))
			if e := ends[4]; !notReady(e.err) || e.took != 0 {
				t.Errorf("call 4 took %v and ended with %v, want NOT_READY at once", e.took, e.err)
			}
		})
	})
	t.Run("a_stream_that_must_not_wait", func(t *testing.T) {
		with(t, limited, nil, func(t *testing.T, c *testserver.Cluster, client testingv1.TestServiceClient, calls func(int, ...grpc.CallOption) []end) {
			var wg sync.WaitGroup
			for range 4 {
				wg.Go(func() { client.Unary(t.Context(), &testingv1.UnaryRequest{}) })
			}
			synctest.Wait()
			_, err := client.ServerStream(t.Context(), &testingv1.ServerStreamRequest{}, interceptor.WithWait(interceptor.None))
			if !notReady(err) {
				t.Errorf("got %v, want NOT_READY", err)
			}
			wg.Wait()
		})
	})
}

// Ten servers of two workers, one of which becomes twenty times slower, and calls that go
// to any of them: a limit for each endpoint, and one limit for all of them.
func TestEndpointLimitOfOneSlowEndpoint(t *testing.T) {
	const (
		work     = 50 * time.Millisecond
		workers  = 2
		servers  = 10
		capacity = (servers - 1) * workers / 0.05 // calls a second, of the fast servers
		load     = 0.8
	)
	run := func(lb string, specs ...interceptor.Spec) (succeed float64, median, high time.Duration) {
		synctest.Test(t, func(t *testing.T) {
			c := testserver.NewCluster(t, servers, func(i int) []testserver.Option {
				return []testserver.Option{testserver.InMemory(), testserver.Seed(uint64(i)), testserver.Workers(workers), testserver.ServiceTime(testserver.Exponential(work))}
			})
			defer c.Close()
			conn, _ := dialHanging(t, c, lb, specs...)
			defer conn.Close()
			client := testingv1.NewTestServiceClient(conn)
			rng := rand.New(rand.NewPCG(1, 2))
			var mu sync.Mutex
			var took []time.Duration
			var offered int
			var wg sync.WaitGroup
			const slowFrom, countFrom, lasts = time.Second, 4 * time.Second, 7 * time.Second
			start := time.Now()
			for time.Since(start) < lasts {
				if time.Since(start) > slowFrom && c.Server(0).SetSpeed(0.05) != nil {
					t.Fatal("the server does not slow down")
				}
				counts := time.Since(start) > countFrom
				if counts {
					offered++
				}
				wg.Go(func() {
					ctx, cancel := context.WithTimeout(t.Context(), time.Second)
					defer cancel()
					begin := time.Now()
					_, err := client.Unary(ctx, &testingv1.UnaryRequest{}, interceptor.WithWait(interceptor.None))
					if err == nil && counts {
						mu.Lock()
						defer mu.Unlock()
						took = append(took, time.Since(begin))
					}
				})
				time.Sleep(time.Duration(rng.ExpFloat64() / (load * capacity) * float64(time.Second)))
			}
			wg.Wait()
			slices.Sort(took)
			succeed = float64(len(took)) / float64(offered)
			median, high = took[len(took)/2], took[len(took)*99/100]
		})
		return succeed, median, high
	}
	// The balancer takes any endpoint, as one that cannot tell them apart. So a tenth of the
	// calls go to the slow one, and wait there until their deadlines.
	each, median, high := run(`{"load":{"constant":{}},"endpointLimit":{"auto":{}}}`)
	t.Logf("a limit for each endpoint: %.1f %% of the calls succeed, median %v, p99 %v", 100*each, median, high)
	all, median, high := run(`{"load":{"constant":{}}}`, concurrency.Config{})
	t.Logf("one limit for all: %.1f %% of the calls succeed, median %v, p99 %v", 100*all, median, high)
	// About 96 % and 37 to 49 %: the calls at the slow endpoint use up the one limit, and lower it.
	if each < 0.9 || all > 0.7 {
		t.Errorf("%.1f %% and %.1f %% of the calls succeed, want at least 90 %% with a limit for each endpoint, and at most 70 %% with one for all", 100*each, 100*all)
	}
}

// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package interceptor_test

import (
	"context"
	"errors"
	"io"
	"net"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/sync/semaphore"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/belfry-go/belfry/interceptor"
	"github.com/belfry-go/belfry/interceptor/adapt"
	"github.com/belfry-go/belfry/interceptor/buffer"
	"github.com/belfry-go/belfry/interceptor/concurrency"
	"github.com/belfry-go/belfry/interceptor/hedge"
	"github.com/belfry-go/belfry/interceptor/loadshed"
	"github.com/belfry-go/belfry/interceptor/retry"
	"github.com/belfry-go/belfry/interceptor/timeout"
	"github.com/belfry-go/belfry/internal/test/calltest"
	"github.com/belfry-go/belfry/internal/testserver"
	testingv1 "github.com/belfry-go/belfry/proto/belfry/testing/v1"
)

// lastEnd is a gate that keeps how the last call ended.
type lastEnd struct {
	interceptor.GateOnly
	end interceptor.End
}

func (l *lastEnd) NewLayer() (interceptor.Layer, error) { return l, nil }
func (*lastEnd) Traits() interceptor.Traits             { return 0 }
func (l *lastEnd) Release(_ int64, e interceptor.End)   { l.end = e }

func (l *lastEnd) WrapGate(inner interceptor.Gate) interceptor.Gate {
	return interceptor.GateFunc(func(ctx context.Context, a *interceptor.Admission, w interceptor.Wait) error {
		a.Hold(l, 0)
		return inner.Admit(ctx, a, w)
	})
}

// slowToy passes calls on after the time that their context asks for.
type slowToy struct{ interceptor.CallOnly }

type slowKey struct{}

func (l slowToy) NewLayer() (interceptor.Layer, error) { return l, nil }

func (slowToy) WrapCall(next interceptor.Next, _ interceptor.Again) interceptor.Next {
	return func(ctx context.Context, c *interceptor.Call) error {
		if d, ok := ctx.Value(slowKey{}).(time.Duration); ok {
			time.Sleep(d) // In a bubble.
			<-ctx.Done()
		}
		return next(ctx, c)
	}
}

// The timeout of gRPC's service config bounds the call, its waiting and all its
// attempts included, and not each attempt.
func TestMethodTimeout(t *testing.T) {
	const config = `{"methodConfig":[{"name":[{}],"timeout":"0.150s"}]}`
	again := interceptor.Foreign("again", func(ctx context.Context, method string, req, reply any, cc *grpc.ClientConn, invoker grpc.UnaryInvoker, opts ...grpc.CallOption) error {
		if err := invoker(ctx, method, req, reply, cc, opts...); status.Code(err) != codes.Unavailable {
			return err
		}
		return invoker(ctx, method, req, reply, cc, opts...)
	}, nil)
	runFresh := func(t *testing.T, f func(t *testing.T, c testingv1.TestServiceClient), specs ...interceptor.Spec) {
		t.Helper()
		synctest.Test(t, func(t *testing.T) {
			srv, err := testserver.Start(testserver.InMemory())
			if err != nil {
				t.Fatal(err)
			}
			defer srv.Close()
			stack := calltest.Stack(t, specs...)
			cc, err := srv.NewClient(append(stack.DialOptions(), grpc.WithDefaultServiceConfig(config))...)
			if err != nil {
				t.Fatal(err)
			}
			defer cc.Close()
			f(t, testingv1.NewTestServiceClient(cc))
			if err := stack.Drain(t.Context()); err != nil {
				t.Error(err)
			}
		})
	}
	run := func(t *testing.T, f func(t *testing.T, c testingv1.TestServiceClient), specs ...interceptor.Spec) {
		t.Helper()
		runFresh(t, func(t *testing.T, c testingv1.TestServiceClient) {
			if _, err := c.Unary(t.Context(), &testingv1.UnaryRequest{}); err != nil { // It has its config by now.
				t.Fatal(err)
			}
			f(t, c)
		}, specs...)
	}
	takes := func(d time.Duration, code codes.Code) *testingv1.UnaryRequest {
		return &testingv1.UnaryRequest{Behaviour: &testingv1.Behaviour{
			Delay: durationpb.New(d), Status: &testingv1.Status{Code: int32(code)},
		}}
	}
	wantEnded := func(t *testing.T, begin time.Time, err error) {
		t.Helper()
		d, r := time.Since(begin), new(interceptor.Refusal)
		if !errors.As(err, &r) || r.Layer != "service config" || status.Code(err) != codes.DeadlineExceeded || d != 150*time.Millisecond {
			t.Errorf("%v after %v, want DEADLINE_EXCEEDED of the service config after 150ms", err, d)
		}
	}

	t.Run("bounds_all_attempts", func(t *testing.T) {
		ended := &lastEnd{}
		run(t, func(t *testing.T, c testingv1.TestServiceClient) {
			begin := time.Now()
			_, err := c.Unary(t.Context(), takes(120*time.Millisecond, codes.Unavailable))
			wantEnded(t, begin, err)
			// It is not the caller whose patience ended.
			if e := ended.end; e.Outcome != interceptor.Failed || e.Code() != codes.DeadlineExceeded {
				t.Errorf("outside the call ended as %v, %v, want failed, DEADLINE_EXCEEDED", e.Outcome, e.Err)
			}
		}, ended, again)
	})
	t.Run("bounds_the_wait_for_the_first_connection", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			opts := append(calltest.Stack(t).DialOptions(), grpc.WithDefaultServiceConfig(config),
				grpc.WithTransportCredentials(insecure.NewCredentials()), grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) {
					<-ctx.Done()
					return nil, ctx.Err()
				}))
			cc, err := grpc.NewClient("passthrough:///nowhere", opts...)
			if err != nil {
				t.Fatal(err)
			}
			defer cc.Close()
			for range 2 { // The second knows the timeout from the start.
				begin := time.Now()
				_, err = testingv1.NewTestServiceClient(cc).Unary(t.Context(), &testingv1.UnaryRequest{})
				if d := time.Since(begin); status.Code(err) != codes.DeadlineExceeded || d != 150*time.Millisecond {
					t.Errorf("%v after %v, want DEADLINE_EXCEEDED after 150ms", err, d)
				}
			}
		})
	})
	t.Run("bounds_the_first_call_of_a_channel", func(t *testing.T) {
		runFresh(t, func(t *testing.T, c testingv1.TestServiceClient) {
			begin := time.Now()
			_, err := c.Unary(t.Context(), takes(120*time.Millisecond, codes.Unavailable))
			wantEnded(t, begin, err)
		}, again)
		runFresh(t, func(t *testing.T, c testingv1.TestServiceClient) {
			begin := time.Now()
			s, err := c.Bidi(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			_, err = s.Recv()
			wantEnded(t, begin, err)
		})
	})
	t.Run("bounds_waiting", func(t *testing.T) {
		run(t, func(t *testing.T, c testingv1.TestServiceClient) {
			begin := time.Now()
			first := make(chan error, 1)
			go func() {
				_, err := c.Unary(t.Context(), takes(140*time.Millisecond, codes.OK))
				first <- err
			}()
			synctest.Wait()
			errs := make(chan error, 2)
			for range 2 {
				go func() {
					_, err := c.Unary(t.Context(), takes(140*time.Millisecond, codes.OK))
					errs <- err
				}()
			}
			if err := <-first; err != nil {
				t.Error(err)
			}
			unsent := 0
			for range 2 {
				err := <-errs
				wantEnded(t, begin, err)
				if r, ok := interceptor.AsRefusal(err); ok && r.NotSent() {
					unsent++
				}
			}
			// The permit may reach the one that still waits at the moment of its deadline.
			if unsent > 1 {
				t.Errorf("%d calls were refused for their method's timeout, want at most the one that still waited", unsent)
			}
		}, adapt.FromSemaphore("limit", semaphore.NewWeighted(1)))
	})
	t.Run("is_a_refund_if_it_passes_before_the_call_is_sent", func(t *testing.T) {
		run(t, func(t *testing.T, c testingv1.TestServiceClient) {
			begin := time.Now()
			_, err := c.Unary(context.WithValue(t.Context(), slowKey{}, 150*time.Millisecond), takes(0, codes.OK))
			wantEnded(t, begin, err)
			if r, ok := interceptor.AsRefusal(err); !ok || !r.NotSent() {
				t.Errorf("%v, want a refusal that says that nothing was sent", err)
			}
		}, slowToy{})
	})
	t.Run("bounds_streams", func(t *testing.T) {
		run(t, func(t *testing.T, c testingv1.TestServiceClient) {
			begin := time.Now()
			s, err := c.Bidi(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			_, err = s.Recv()
			wantEnded(t, begin, err)
		})
	})
	t.Run("is_told_by_the_server_first", func(t *testing.T) {
		run(t, func(t *testing.T, c testingv1.TestServiceClient) {
			for _, tc := range []struct {
				after time.Duration
				own   bool
			}{{20 * time.Millisecond, true}, {140 * time.Millisecond, false}} {
				_, err := c.Unary(t.Context(), takes(tc.after, codes.DeadlineExceeded))
				if _, refused := interceptor.AsRefusal(err); refused == tc.own {
					t.Errorf("after %v the server says DEADLINE_EXCEEDED, and the caller gets %v", tc.after, err)
				}
			}
		})
	})
	t.Run("leaves_no_context_behind", func(t *testing.T) {
		var used context.Context
		keep := interceptor.Foreign("keep", nil, func(ctx context.Context, desc *grpc.StreamDesc, cc *grpc.ClientConn, method string, streamer grpc.Streamer, opts ...grpc.CallOption) (grpc.ClientStream, error) {
			used = ctx
			return streamer(ctx, desc, cc, method, opts...)
		})
		run(t, func(t *testing.T, c testingv1.TestServiceClient) {
			s, err := c.Bidi(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			s.CloseSend()
			if _, err := s.Recv(); err != io.EOF || used.Err() == nil {
				t.Errorf("the stream ended with %v, and its context with %v, want io.EOF and an ended context", err, used.Err())
			}
		}, keep)
	})
	t.Run("bounds_the_recommended_stack", func(t *testing.T) {
		every := func(string) bool { return true }
		hedged, err := hedge.New(hedge.Config{Delay: 20 * time.Millisecond}, hedge.WithIdempotent(every))
		if err != nil {
			t.Fatal(err)
		}
		again, err := retry.New(retry.Config{MaxAttempts: 10}, retry.WithIdempotent(every))
		if err != nil {
			t.Fatal(err)
		}
		run(t, func(t *testing.T, c testingv1.TestServiceClient) {
			read := func(b *testingv1.Behaviour) error {
				s, err := c.ServerStream(t.Context(), &testingv1.ServerStreamRequest{Behaviour: b})
				if err == nil {
					_, err = s.Recv()
				}
				return err
			}
			// If there is no time for another attempt, the call may end with the server's error.
			begin := time.Now()
			_, err := c.Unary(t.Context(), takes(100*time.Millisecond, codes.Unavailable))
			if d := time.Since(begin); err == nil || d > 150*time.Millisecond {
				t.Errorf("%v after %v, want an error after at most 150ms", err, d)
			}
			begin = time.Now()
			_, err = c.Unary(t.Context(), takes(time.Second, codes.OK))
			wantEnded(t, begin, err)
			begin = time.Now()
			wantEnded(t, begin, read(takes(time.Second, codes.OK).GetBehaviour()))
			// Of eight, four run until then, and four wait in the buffer.
			begin = time.Now()
			var all sync.WaitGroup
			for i := range 8 {
				all.Go(func() {
					if i%2 == 0 {
						_, err := c.Unary(t.Context(), takes(time.Second, codes.OK))
						wantEnded(t, begin, err)
						return
					}
					wantEnded(t, begin, read(takes(time.Second, codes.OK).GetBehaviour()))
				})
			}
			all.Wait()
		}, loadshed.Config{}, timeout.Config{Timeout: time.Minute, Lifetime: time.Minute}, hedged, again, buffer.Config{Size: 10}, concurrency.Config{Limit: 4})
	})
	t.Run("an_earlier_deadline_stays", func(t *testing.T) {
		run(t, func(t *testing.T, c testingv1.TestServiceClient) {
			ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
			defer cancel()
			begin := time.Now()
			_, err := c.Unary(ctx, takes(time.Second, codes.OK))
			if d := time.Since(begin); status.Code(err) != codes.DeadlineExceeded || d != 100*time.Millisecond {
				t.Errorf("%v after %v, want DEADLINE_EXCEEDED after 100ms", err, d)
			}
		})
	})
}

// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package interceptor_test

import (
	"context"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/sync/semaphore"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/belfry-go/belfry/interceptor"
	"github.com/belfry-go/belfry/interceptor/adapt"
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
	run := func(t *testing.T, f func(t *testing.T, c testingv1.TestServiceClient), specs ...interceptor.Spec) {
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
			c := testingv1.NewTestServiceClient(cc)
			if _, err := c.Unary(t.Context(), &testingv1.UnaryRequest{}); err != nil { // It has its config by now.
				t.Fatal(err)
			}
			f(t, c)
			if err := stack.Drain(t.Context()); err != nil {
				t.Error(err)
			}
		})
	}
	takes := func(d time.Duration, code codes.Code) *testingv1.UnaryRequest {
		return &testingv1.UnaryRequest{Behaviour: &testingv1.Behaviour{
			Delay: durationpb.New(d), Status: &testingv1.Status{Code: int32(code)},
		}}
	}
	wantEnded := func(t *testing.T, begin time.Time, err error) {
		t.Helper()
		if d := time.Since(begin); status.Code(err) != codes.DeadlineExceeded || d != 150*time.Millisecond {
			t.Errorf("%v after %v, want DEADLINE_EXCEEDED after 150ms", err, d)
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
				if r, ok := interceptor.AsRefusal(err); ok && r.Layer == "service config" && r.NotSent() {
					unsent++
				}
			}
			if unsent != 1 {
				t.Errorf("%d calls were refused for their method's timeout, want the one that still waited", unsent)
			}
		}, adapt.FromSemaphore("limit", semaphore.NewWeighted(1)))
	})
	t.Run("is_a_refund_if_it_passes_before_the_call_is_sent", func(t *testing.T) {
		run(t, func(t *testing.T, c testingv1.TestServiceClient) {
			begin := time.Now()
			_, err := c.Unary(context.WithValue(t.Context(), slowKey{}, 150*time.Millisecond), takes(0, codes.OK))
			wantEnded(t, begin, err)
			if r, ok := interceptor.AsRefusal(err); !ok || r.Layer != "service config" || !r.NotSent() {
				t.Errorf("%v, want a refusal of the service config that says that nothing was sent", err)
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
			if s, err = c.Bidi(t.Context()); err == nil {
				s.CloseSend()
				s.Recv() // It leaves no context behind.
			}
		})
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

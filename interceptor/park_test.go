// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package interceptor_test

import (
	"context"
	"errors"
	"runtime"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/sync/semaphore"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/connectivity"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/belfry-go/belfry/interceptor"
	"github.com/belfry-go/belfry/interceptor/adapt"
	"github.com/belfry-go/belfry/internal/test/calltest"
)

// waitingLayers are layers in whose gates one call can be and others wait.
func waitingLayers() map[string]interceptor.Spec {
	tokens := make(chan struct{}, 1)
	tokens <- struct{}{}
	acquire := func(ctx context.Context) error {
		select {
		case <-tokens:
			return nil
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	return map[string]interceptor.Spec{
		"limit":     newLimit("limit", 1),
		"semaphore": adapt.FromSemaphore("semaphore", semaphore.NewWeighted(1)),
		"limiter":   adapt.FromLimiter("limiter", limiterFunc(acquire)),
		"permit": adapt.FromPermit("permit", interceptor.ReasonConcurrency, func(ctx context.Context, _ bool) (adapt.Permit, error) {
			return ignorePermit{}, acquire(ctx)
		}),
	}
}

// The end of a stack and the end of a connection reach every call that waits, and
// leave those alone that are on the wire.
func TestPark(t *testing.T) {
	for name := range waitingLayers() {
		for _, kind := range []interceptor.Kind{interceptor.Unary, interceptor.BidiStream} {
			t.Run("drain_ends_the_wait_in_a_gate/"+name+"/"+kind.String(), func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					w := newWorld(t, "pick_first", &timeoutToy{d: time.Hour}, waitingLayers()[name])
					awaitState(t, w.cc, connectivity.Ready)
					w.srv.Stall()
					running, waiting := w.begin(t.Context(), kind), w.begin(t.Context(), kind)
					drained := make(chan error, 1)
					go func() { drained <- w.stack.Drain(t.Context()) }()
					expectEnd(t, "the waiting call", <-waiting, calltest.Refused(0, interceptor.ReasonDrain))
					synctest.Wait()
					if len(drained) != 0 || len(running) != 0 {
						t.Error("Drain did not leave the running call alone")
					}
					w.srv.Resume()
					expectEnd(t, "the running call", <-running, calltest.OK(0))
					if err := <-drained; err != nil {
						t.Error(err)
					}
				})
			})

			t.Run("close_ends_the_wait_in_a_gate/"+name+"/"+kind.String(), func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					w := newWorld(t, "pick_first", &timeoutToy{d: time.Hour}, waitingLayers()[name])
					awaitState(t, w.cc, connectivity.Ready)
					w.srv.Stall()
					running, waiting := w.begin(t.Context(), kind), w.begin(t.Context(), kind)
					w.cc.Close()
					expectEnd(t, "the waiting call", <-waiting, calltest.Refused(0, interceptor.ReasonClosed))
					expectEnd(t, "the running call", <-running, refused(0, "", codes.Canceled))
					w.srv.Resume()
				})
			})
		}
	}

	t.Run("drain_ends_the_wait_of_a_further_attempt", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			limit := newLimit("limit", 1)
			s := calltest.Stack(t, &retryToy{n: 2, backoff: time.Second}, limit)
			last := status.Error(codes.Unavailable, "the server's")
			done := make(chan error, 1)
			go func() {
				done <- s.Wrap(answers(last)).Invoke(t.Context(), calltest.Method, nil, new(wrapperspb.StringValue))
			}()
			synctest.Wait()
			<-limit.slots
			time.Sleep(2 * time.Second)
			if err := s.Drain(t.Context()); err != nil {
				t.Fatal(err)
			}
			if err := <-done; calltest.Reason(err) != interceptor.ReasonDrain || !errors.Is(err, last) || status.Convert(err).Message() != "the server's" {
				t.Errorf("the call ended with %v, want the server's error, and DRAIN by errors.As", err)
			}
		})
	})

	t.Run("close_of_one_connection_leaves_calls_of_another_alone", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			s := calltest.Stack(t, newLimit("limit", 1))
			a, b := newWorldOf(t, "pick_first", s), newWorldOf(t, "pick_first", s)
			for _, w := range []*world{a, b} {
				awaitState(t, w.cc, connectivity.Ready)
			}
			b.srv.Stall()
			running := b.begin(t.Context(), interceptor.Unary)
			ofA, ofB := a.begin(t.Context(), interceptor.Unary), b.begin(t.Context(), interceptor.Unary)
			a.cc.Close()
			expectEnd(t, "the call of the closed connection", <-ofA, calltest.Refused(0, interceptor.ReasonClosed))
			synctest.Wait()
			if len(ofB) != 0 {
				t.Fatal("the call of the other connection has ended")
			}
			b.srv.Resume()
			expectEnd(t, "the running call", <-running, calltest.OK(0))
			expectEnd(t, "the call of the other connection", <-ofB, calltest.OK(0))
		})
	})

	t.Run("nothing_is_left_when_nobody_waits", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			w := newWorld(t, "pick_first", newLimit("limit", 1))
			awaitState(t, w.cc, connectivity.Ready)
			for range 3 {
				w.srv.Stall()
				running, waiting := w.begin(t.Context(), interceptor.Unary), w.begin(t.Context(), interceptor.Unary)
				w.srv.Resume()
				<-running
				<-waiting
			}
			synctest.Wait()
			stacks := make([]byte, 1<<20)
			if s := string(stacks[:runtime.Stack(stacks, true)]); strings.Contains(s, "park.(*Lot)") {
				t.Errorf("a goroutine still watches the connection:\n%s", s)
			}
		})
	})

	for name, end := range map[string]func(w *world) error{
		"drain": func(w *world) error { return w.stack.Drain(context.Background()) },
		"close": func(w *world) error { return w.cc.Close() },
	} {
		t.Run(name+"_ends_a_backoff_with_the_last_error", func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := newWorld(t, "pick_first", &retryToy{n: 2, backoff: time.Hour}, newLimit("limit", 1))
				awaitState(t, w.cc, connectivity.Ready)
				if err := w.srv.Fail(codes.Unavailable, 1); err != nil {
					t.Fatal(err)
				}
				done := w.begin(t.Context(), interceptor.Unary)
				if err := end(w); err != nil {
					t.Error(err)
				}
				expectEnd(t, "the call", <-done, refused(0, "", codes.Unavailable))
			})
		})

		t.Run(name+"_ends_what_waits_behind_the_stack", func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := newWorld(t, "pick_first", newLimit("limit", 1))
				inner := &conn{invoke: func(ctx context.Context, _ string, _, _ any, opts ...grpc.CallOption) error {
					parked, done := interceptor.ParkOf(ctx, opts)
					defer done()
					<-parked.Done()
					return interceptor.Ended(parked, "maker")
				}}
				done := make(chan error, 1)
				go func() { done <- w.stack.Wrap(inner).Invoke(t.Context(), calltest.Method, nil, nil) }()
				synctest.Wait()
				if name == "close" { // It is not a connection of gRPC's, which could be closed.
					if len(done) != 0 {
						t.Error("the call has ended")
					}
					return
				}
				end(w)
				if err := <-done; calltest.Reason(err) != interceptor.ReasonDrain {
					t.Errorf("the call ended with %v, want DRAIN", err)
				}
			})
		})
	}

	t.Run("call_that_parks_in_a_draining_stack_does_not_wait", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			hook := &hookToy{}
			s := calltest.Stack(t, hook, newLimit("limit", 1))
			c := s.Wrap(calltest.Takes(time.Second))
			running := calltest.Begin(c, 1)
			hook.hook = func(context.Context) {
				over, cancel := context.WithCancel(context.Background())
				cancel()
				s.Drain(over) // It only begins.
			}
			calltest.Expect(t, calltest.Burst(c, 1), calltest.Refused(0, interceptor.ReasonDrain))
			calltest.Expect(t, running(), calltest.OK(time.Second))
		})
	})

	t.Run("context_of_the_caller_ends_it_too", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			s := calltest.Stack(t, newLimit("limit", 1))
			c := s.Wrap(calltest.Takes(time.Second))
			running := calltest.Begin(c, 1)
			ctx, cancel := context.WithCancel(t.Context())
			done := make(chan error, 1)
			go func() { done <- c.Invoke(ctx, calltest.Method, nil, nil) }()
			synctest.Wait()
			cancel()
			if err := <-done; calltest.Reason(err) != interceptor.ReasonCancelled || !errors.Is(err, context.Canceled) {
				t.Errorf("the call ended with %v, want CANCELLED", err)
			}
			calltest.Expect(t, running(), calltest.OK(time.Second))
		})
	})
}

// slowToLeave parks calls, and is slow to notice that their wait has ended.
type slowToLeave struct{ interceptor.GateOnly }

func (l *slowToLeave) NewLayer() (interceptor.Layer, error) { return l, nil }

func (l *slowToLeave) WrapGate(inner interceptor.Gate) interceptor.Gate {
	return interceptor.GateFunc(func(ctx context.Context, a *interceptor.Admission, w interceptor.Wait) error {
		parked, done := a.Park(ctx)
		defer done()
		<-parked.Done()
		err := interceptor.Ended(parked, "slow")
		time.Sleep(time.Second)
		return err
	})
}

// A call that parks on a connection that is closed does not wait, also while others
// are still on their way out.
func TestParkOnAClosedConnection(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		cc, err := grpc.NewClient("passthrough:///nowhere", grpc.WithTransportCredentials(insecure.NewCredentials()))
		if err != nil {
			t.Fatal(err)
		}
		c := calltest.Stack(t, &slowToLeave{}, &shedToy{}, newLimit("limit", 1)).Wrap(cc)
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		first := make(chan error, 1)
		go func() { first <- c.Invoke(ctx, calltest.Method, nil, nil) }()
		synctest.Wait()
		cc.Close()
		synctest.Wait()
		start := time.Now()
		if err := c.Invoke(ctx, calltest.Method, nil, nil); calltest.Reason(err) != interceptor.ReasonClosed || time.Since(start) != time.Second {
			t.Errorf("got %v after %v, want the end of the connection at once", err, time.Since(start)-time.Second)
		}
		if err := <-first; calltest.Reason(err) != interceptor.ReasonClosed {
			t.Errorf("the first call: %v, want the end of the connection", err)
		}
	})
}

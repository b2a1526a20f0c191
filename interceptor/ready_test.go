// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package interceptor_test

import (
	"context"
	"fmt"
	"net"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/balancer"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/connectivity"
	"google.golang.org/grpc/resolver"
	"google.golang.org/grpc/status"

	"github.com/belfry-go/belfry/interceptor"
	"github.com/belfry-go/belfry/internal/test/calltest"
	"github.com/belfry-go/belfry/internal/testserver"
	testingv1 "github.com/belfry-go/belfry/proto/belfry/testing/v1"
)

// world is a server that can be reached after a second, and a connection to it,
// which is IDLE, with a stack of the layers in front.
type world struct {
	srv   *testserver.Server
	cc    *grpc.ClientConn
	stack *interceptor.Stack
	obs   *recorder
}

func newWorld(t *testing.T, policy string, layers ...interceptor.Spec) *world {
	t.Helper()
	obs := &recorder{}
	w := newWorldOf(t, policy, calltest.Stack(t, append([]interceptor.Spec{interceptor.Observe(obs)}, layers...)...))
	w.obs = obs
	return w
}

// newWorldOf is a world with a stack of the caller's.
func newWorldOf(t *testing.T, policy string, s *interceptor.Stack) *world {
	t.Helper()
	w := &world{srv: testserver.New(t, testserver.InMemory()), stack: s}
	opts := append(w.stack.DialOptions(), w.srv.DialOptions()...)
	opts = append(opts,
		grpc.WithDefaultServiceConfig(fmt.Sprintf(`{"loadBalancingConfig": [{%q: {}}]}`, policy)),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) {
			select {
			case <-time.After(time.Second):
				return w.srv.DialContext(ctx)
			case <-ctx.Done():
				return nil, ctx.Err()
			}
		}))
	cc, err := grpc.NewClient("passthrough:///"+w.srv.Addr(), opts...)
	if err != nil {
		t.Fatal(err)
	}
	w.cc = cc
	t.Cleanup(func() {
		cc.Close()
		if err := w.stack.Drain(context.Background()); err != nil {
			t.Error(err)
		}
	})
	return w
}

// call makes a call that takes no time once it is sent, and says how it ended.
func (w *world) call(ctx context.Context, kind interceptor.Kind, opts ...grpc.CallOption) calltest.End {
	start := time.Now()
	err := exchange(ctx, w.cc, kind, new(testingv1.UnaryRequest), new(testingv1.UnaryResponse), opts...)
	return calltest.End{After: time.Since(start), Reason: calltest.Reason(err), Code: status.Code(err)}
}

// begin starts a call.
func (w *world) begin(ctx context.Context, kind interceptor.Kind, opts ...grpc.CallOption) <-chan calltest.End {
	done := make(chan calltest.End, 1)
	go func() { done <- w.call(ctx, kind, opts...) }()
	synctest.Wait()
	return done
}

func expectEnd(t *testing.T, what string, got, want calltest.End) {
	t.Helper()
	if got != want {
		t.Errorf("%s ended as %v, want %v", what, got, want)
	}
}

func TestReady(t *testing.T) {
	limit := func() *limitToy { return newLimit("limit", 1) }
	for _, tc := range []struct {
		name string
		run  func(t *testing.T, policy string, kind interceptor.Kind)
	}{
		{"shed_refuses_and_connects_an_idle_connection", func(t *testing.T, policy string, kind interceptor.Kind) {
			w := newWorld(t, policy, &shedToy{}, limit())
			expectEnd(t, "a call while IDLE", w.call(t.Context(), kind), calltest.Refused(0, interceptor.ReasonNotReady))
			expectEnd(t, "a call while CONNECTING", w.call(t.Context(), kind), calltest.Refused(0, interceptor.ReasonNotReady))
			time.Sleep(time.Second)
			synctest.Wait()
			expectEnd(t, "a call a second later", w.call(t.Context(), kind), calltest.OK(0))
		}},
		{"option_that_forbids_waiting_refuses", func(t *testing.T, policy string, kind interceptor.Kind) {
			w := newWorld(t, policy, limit())
			expectEnd(t, "a call", w.call(t.Context(), kind, interceptor.WithWait(interceptor.None)), calltest.Refused(0, interceptor.ReasonNotReady))
		}},
		{"fail_fast_refuses_at_its_bound", func(t *testing.T, policy string, kind interceptor.Kind) {
			w := newWorld(t, policy, &failFastToy{d: 300 * time.Millisecond}, limit())
			expectEnd(t, "a call", w.call(t.Context(), kind), calltest.Refused(300*time.Millisecond, interceptor.ReasonNotReady))
			if want := fmt.Sprintf("waited %s connection 300ms", methodOf[kind]); !slices.Contains(w.obs.log.take(), want) {
				t.Errorf("the observer was not told %q", want)
			}
		}},
		{"waiting_takes_nothing_further_in", func(t *testing.T, policy string, kind interceptor.Kind) {
			l, tokens := limit(), newTokens(5)
			w := newWorld(t, policy, &failFastToy{d: time.Minute}, tokens, l)
			done := w.begin(t.Context(), kind)
			time.Sleep(time.Second / 2)
			if free, left := len(l.slots), tokens.tokens.Load(); free != 1 || left != 5 {
				t.Errorf("%d permits and %d tokens are free while the call waits, want 1 and 5", free, left)
			}
			expectEnd(t, "the call", <-done, calltest.OK(time.Second))
		}},
		{"place_in_a_buffer_is_held", func(t *testing.T, policy string, kind interceptor.Kind) {
			buffer := newBuffer(1)
			w := newWorld(t, policy, buffer, limit())
			done := w.begin(t.Context(), kind)
			if n := buffer.used.Load(); n != 1 {
				t.Errorf("%d places of the buffer are taken, want 1", n)
			}
			expectEnd(t, "a second call", w.call(t.Context(), kind), calltest.Refused(0, interceptor.ReasonQueueFull))
			expectEnd(t, "the call", <-done, calltest.OK(time.Second))
		}},
		{"layers_that_do_not_govern_wait_outside", func(t *testing.T, policy string, kind interceptor.Kind) {
			l := limit()
			w := newWorld(t, policy, &timeoutToy{d: time.Minute}, l)
			done := w.begin(t.Context(), kind)
			if free := len(l.slots); free != 1 {
				t.Errorf("%d permits are free while the call waits, want 1", free)
			}
			expectEnd(t, "the call", <-done, calltest.OK(time.Second))
		}},
		{"deadline_of_a_layer_bounds_the_wait", func(t *testing.T, policy string, kind interceptor.Kind) {
			w := newWorld(t, policy, &timeoutToy{d: 300 * time.Millisecond}, newBuffer(1), limit())
			expectEnd(t, "a call", w.call(t.Context(), kind), calltest.Refused(300*time.Millisecond, interceptor.ReasonDeadline))
		}},
		{"deadline_of_the_caller", func(t *testing.T, policy string, kind interceptor.Kind) {
			m := &meter{}
			w := newWorld(t, policy, m, &failFastToy{d: time.Minute}, limit())
			ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
			defer cancel()
			expectEnd(t, "a call", w.call(ctx, kind), refused(300*time.Millisecond, interceptor.ReasonNotReady, codes.DeadlineExceeded))
			expectLog(t, "the gate outside", m, "not_connected DeadlineExceeded")
		}},
		{"caller_cancels", func(t *testing.T, policy string, kind interceptor.Kind) {
			m := &meter{}
			w := newWorld(t, policy, m, &failFastToy{d: time.Minute}, limit())
			ctx, cancel := context.WithCancel(t.Context())
			time.AfterFunc(300*time.Millisecond, cancel)
			expectEnd(t, "a call", w.call(ctx, kind), calltest.Refused(300*time.Millisecond, interceptor.ReasonCancelled))
			expectLog(t, "the gate outside", m, "not_sent Canceled")
		}},
		{"refusal_is_not_connected_for_gates_outside", func(t *testing.T, policy string, kind interceptor.Kind) {
			m := &meter{}
			w := newWorld(t, policy, m, &shedToy{}, limit())
			w.call(t.Context(), kind)
			expectLog(t, "the gate outside", m, "not_connected Unavailable")
		}},
		{"transient_failure_passes_to_grpc", func(t *testing.T, policy string, kind interceptor.Kind) {
			m := &meter{}
			w := newWorld(t, policy, &failFastToy{d: time.Minute}, m, limit())
			w.srv.Stop()
			expectEnd(t, "a call while IDLE", w.call(t.Context(), kind), refused(time.Second, "", codes.Unavailable))
			expectLog(t, "the gate inside", m, "not_connected Unavailable")
		}},
		{"call_that_waits_for_ready_waits_through_transient_failure", func(t *testing.T, policy string, kind interceptor.Kind) {
			w := newWorld(t, policy, &failFastToy{d: time.Minute}, limit())
			w.srv.Stop()
			awaitState(t, w.cc, connectivity.TransientFailure)
			done := w.begin(t.Context(), kind, grpc.WaitForReady(true))
			if err := w.srv.Restart(t.Context()); err != nil {
				t.Fatal(err)
			}
			if end := <-done; end.Code != codes.OK || end.After == 0 {
				t.Errorf("the call ended as %v, want success after a wait", end)
			}
		}},
		{"connection_lost_during_a_backoff", func(t *testing.T, policy string, kind interceptor.Kind) {
			if kind != interceptor.Unary {
				return // The toy backs off only before a stream is open.
			}
			l := limit()
			w := newWorld(t, policy, &failFastToy{d: time.Minute}, &retryToy{n: 2, backoff: time.Second / 2}, l)
			awaitState(t, w.cc, connectivity.Ready)
			if err := w.srv.Fail(codes.Unavailable, 1); err != nil {
				t.Fatal(err)
			}
			done := w.begin(t.Context(), kind)
			w.srv.Heal()
			w.srv.CloseConnections()
			time.Sleep(900 * time.Millisecond)
			if free := len(l.slots); free != 1 {
				t.Errorf("%d permits are free while the retry waits, want 1", free)
			}
			if end := <-done; end.Code != codes.OK || end.After < time.Second {
				t.Errorf("the call ended as %v, want success when the connection is back", end)
			}
		}},
		{"closed_connection_passes_to_grpc", func(t *testing.T, policy string, kind interceptor.Kind) {
			m := &meter{}
			w := newWorld(t, policy, &failFastToy{d: time.Minute}, m, limit())
			w.cc.Close()
			expectEnd(t, "a call", w.call(t.Context(), kind), refused(0, "", codes.Canceled))
			expectLog(t, "the gate", m, "not_sent Canceled")
		}},
		{"closed_connection_passes_to_grpc_through_a_shed", func(t *testing.T, policy string, kind interceptor.Kind) {
			m := &meter{}
			w := newWorld(t, policy, &shedToy{}, m, limit())
			w.cc.Close()
			expectEnd(t, "a call", w.call(t.Context(), kind), refused(0, "", codes.Canceled))
			expectLog(t, "the gate", m, "not_sent Canceled")
		}},
		{"refusal_says_what_the_connection_does", func(t *testing.T, policy string, kind interceptor.Kind) {
			w := newWorld(t, policy, &shedToy{}, limit())
			expectText := func(want string) {
				t.Helper()
				err := exchange(t.Context(), w.cc, kind, new(testingv1.UnaryRequest), new(testingv1.UnaryResponse))
				if err == nil || !strings.Contains(err.Error(), want) {
					t.Errorf("a call ended with %v, want an error with %q", err, want)
				}
			}
			expectText("was idle and connects now")
			expectText("the connection connects")
			w.srv.Stop()
			awaitState(t, w.cc, connectivity.TransientFailure)
			expectText("all fail to connect")
		}},
		{"close_ends_the_wait", func(t *testing.T, policy string, kind interceptor.Kind) {
			m := &meter{}
			w := newWorld(t, policy, m, &failFastToy{d: time.Minute}, limit())
			done := w.begin(t.Context(), kind)
			w.cc.Close()
			expectEnd(t, "the call", <-done, calltest.Refused(0, interceptor.ReasonClosed))
			expectLog(t, "the gate outside", m, "not_sent Canceled")
		}},
		{"drain_ends_the_wait", func(t *testing.T, policy string, kind interceptor.Kind) {
			w := newWorld(t, policy, &failFastToy{d: time.Minute}, limit())
			done := w.begin(t.Context(), kind)
			if err := w.stack.Drain(t.Context()); err != nil {
				t.Fatal(err)
			}
			expectEnd(t, "the call", <-done, calltest.Refused(0, interceptor.ReasonDrain))
		}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			for _, policy := range policies {
				for _, kind := range []interceptor.Kind{interceptor.Unary, interceptor.BidiStream} {
					t.Run(policy+"/"+kind.String(), func(t *testing.T) {
						synctest.Test(t, func(t *testing.T) { tc.run(t, policy, kind) })
					})
				}
			}
		})
	}
}

// lazyPolicy is a policy that connects when it is asked to pick, and not before.
type lazyPolicy struct {
	balancer.ClientConn
	addrs []resolver.Address
	once  sync.Once
}

func (*lazyPolicy) Name() string { return "belfry_test_lazy" }

func (*lazyPolicy) Build(cc balancer.ClientConn, _ balancer.BuildOptions) balancer.Balancer {
	return &lazyPolicy{ClientConn: cc}
}

func (p *lazyPolicy) UpdateClientConnState(s balancer.ClientConnState) error {
	p.addrs = s.ResolverState.Addresses
	p.UpdateState(balancer.State{ConnectivityState: connectivity.Idle, Picker: p})
	return nil
}

func (p *lazyPolicy) Pick(balancer.PickInfo) (balancer.PickResult, error) {
	p.once.Do(func() {
		go func() {
			var sc balancer.SubConn
			//lint:ignore SA1019 the deprecated part is more than one address
			sc, _ = p.NewSubConn(p.addrs, balancer.NewSubConnOptions{StateListener: func(s balancer.SubConnState) {
				if s.ConnectivityState == connectivity.Ready {
					p.UpdateState(balancer.State{ConnectivityState: connectivity.Ready, Picker: picked{sc}})
				}
			}})
			sc.Connect()
		}()
	})
	return balancer.PickResult{}, balancer.ErrNoSubConnAvailable
}

func (*lazyPolicy) ResolverError(error)                                        {}
func (*lazyPolicy) UpdateSubConnState(balancer.SubConn, balancer.SubConnState) {}
func (*lazyPolicy) ExitIdle()                                                  {}
func (*lazyPolicy) Close()                                                     {}

type picked struct{ sc balancer.SubConn }

func (p picked) Pick(balancer.PickInfo) (balancer.PickResult, error) {
	return balancer.PickResult{SubConn: p.sc}, nil
}

func init() { balancer.Register(new(lazyPolicy)) }

// A policy that connects only when it picks gets a call, for which it waits otherwise.
func TestLazyPolicyGetsItsCall(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		srv := testserver.New(t, testserver.InMemory())
		conn := testserver.Dial(t, srv, append(calltest.Stack(t, newLimit("limit", 1)).DialOptions(),
			grpc.WithDefaultServiceConfig(`{"loadBalancingConfig":[{"belfry_test_lazy":{}}]}`))...)
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if _, err := testingv1.NewTestServiceClient(conn).Unary(ctx, &testingv1.UnaryRequest{}); err != nil {
			t.Error(err)
		}
	})
}

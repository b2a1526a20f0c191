// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package maxage_test

import (
	"context"
	"errors"
	"io"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/resolver"
	"google.golang.org/grpc/resolver/manual"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/belfry-go/belfry/balancer/p2c"
	"github.com/belfry-go/belfry/interceptor"
	"github.com/belfry-go/belfry/interceptor/layertest"
	"github.com/belfry-go/belfry/interceptor/maxage"
	"github.com/belfry-go/belfry/internal/test/leaktest"
	"github.com/belfry-go/belfry/internal/testserver"
	testingv1 "github.com/belfry-go/belfry/proto/belfry/testing/v1"
	"github.com/belfry-go/belfry/resolver/discover"
)

func TestMain(m *testing.M) { leaktest.Main(m) }

func TestConformance(t *testing.T) {
	layertest.Run(t, func() (interceptor.Spec, func() error) { return maxage.Config{Age: time.Hour}, nil })
}

// world is servers and a channel through the layer, in virtual time.
type world struct {
	*testserver.Cluster
	t      *testing.T
	r      *manual.Resolver
	client testingv1.TestServiceClient
}

func with(t *testing.T, n int, cfg maxage.Config, f func(t *testing.T, w *world)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		w := &world{t: t, r: manual.NewBuilderWithScheme("maxage")}
		w.Cluster = testserver.NewCluster(t, n, func(int) []testserver.Option {
			return []testserver.Option{testserver.InMemory()}
		})
		defer w.Cluster.Close()
		stack, err := interceptor.NewStack(cfg)
		if err != nil {
			t.Fatal(err)
		}
		w.r.InitialState(resolver.State{Endpoints: w.Endpoints()})
		opts := append(append(w.DialOptions(), stack.DialOptions()...), p2c.DialOptions()...)
		conn, err := grpc.NewClient("maxage:///"+t.Name(), append(opts, grpc.WithResolvers(w.r), grpc.WithNoProxy(),
			grpc.WithDefaultServiceConfig(`{"loadBalancingConfig":[{"belfry.p2c":{}}]}`))...)
		if err != nil {
			t.Fatal(err)
		}
		defer func() {
			if err := stack.Drain(context.Background()); err != nil {
				t.Errorf("the stack is not at rest: %v", err)
			}
		}()
		defer conn.Close()
		w.client = testingv1.NewTestServiceClient(conn)
		conn.Connect()
		synctest.Wait()
		f(t, w)
	})
}

// wantEnded fails the test unless err is the layer's, for a cause, at an age.
func wantEnded(t *testing.T, err error, cause maxage.Cause, from, to time.Duration) *maxage.Ended {
	t.Helper()
	var e *maxage.Ended
	if !errors.As(err, &e) || status.Code(err) != codes.Aborted {
		t.Fatalf("the stream ended with %v, want an Ended and ABORTED", err)
	}
	if e.Cause != cause || e.Age < from || e.Age > to {
		t.Errorf("ended with cause %d after %v, want %d after %v to %v", e.Cause, e.Age, cause, from, to)
	}
	return e
}

// every is a stream of responses, one each second.
func every(count int32) *testingv1.ServerStreamRequest {
	return &testingv1.ServerStreamRequest{Behaviour: &testingv1.Behaviour{Delay: durationpb.New(time.Second), ResponseCount: &count}}
}

func TestAge(t *testing.T) {
	minute := maxage.Config{Age: time.Minute}
	t.Run("server_stream_that_waits", func(t *testing.T) {
		with(t, 1, minute, func(t *testing.T, w *world) {
			s, err := w.client.ServerStream(t.Context(), every(1000))
			n := 0
			for err == nil {
				if _, err = s.Recv(); err == nil {
					n++
				}
			}
			wantEnded(t, err, maxage.Age, 48*time.Second, 72*time.Second)
			if n < 47 || n > 72 {
				t.Errorf("%d messages in that time, one a second", n)
			}
			if _, again := s.Recv(); again == nil {
				t.Error("a message after the end")
			}
			synctest.Wait()
			if got := w.Server(0).Stats().InFlight; got != 0 {
				t.Errorf("%d streams in flight in the server, want 0", got)
			}
		})
	})
	t.Run("server_stream_that_nobody_reads", func(t *testing.T) {
		with(t, 1, minute, func(t *testing.T, w *world) {
			s, err := w.client.ServerStream(t.Context(), every(1000))
			if err != nil {
				t.Fatal(err)
			}
			time.Sleep(2 * time.Minute)
			_, err = s.Recv()
			wantEnded(t, err, maxage.Age, 48*time.Second, 72*time.Second)
		})
	})
	t.Run("shorter_streams_and_unary_calls_pass", func(t *testing.T) {
		with(t, 1, minute, func(t *testing.T, w *world) {
			s, err := w.client.ServerStream(t.Context(), every(3))
			for range 3 {
				if err == nil {
					_, err = s.Recv()
				}
			}
			if err != nil {
				t.Fatal(err)
			}
			if _, err := s.Recv(); err != io.EOF {
				t.Errorf("the end is %v, want io.EOF", err)
			}
			if _, err := w.client.Unary(t.Context(), &testingv1.UnaryRequest{Behaviour: &testingv1.Behaviour{Delay: durationpb.New(time.Hour)}}); err != nil {
				t.Error(err)
			}
		})
	})
	t.Run("bidi_loses_nothing", func(t *testing.T) {
		with(t, 1, maxage.Config{Age: time.Minute, Jitter: maxage.None}, func(t *testing.T, w *world) {
			s, err := w.client.Bidi(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			sent := make(chan int)
			go func() {
				n := 0
				for s.Send(&testingv1.BidiRequest{Behaviour: &testingv1.Behaviour{Delay: durationpb.New(300 * time.Millisecond)}}) == nil {
					n++
					time.Sleep(400 * time.Millisecond)
				}
				sent <- n
			}()
			received := 0
			for err == nil {
				if _, err = s.Recv(); err == nil {
					received++
				}
			}
			e := wantEnded(t, err, maxage.Age, time.Minute, time.Minute)
			if n := <-sent; n != received || !e.Complete {
				t.Errorf("%d requests were sent and %d answered (complete: %v), want all of them", n, received, e.Complete)
			}
		})
	})
	t.Run("bidi_whose_server_goes_on", func(t *testing.T) {
		with(t, 1, maxage.Config{Age: time.Minute, Jitter: maxage.None}, func(t *testing.T, w *world) {
			s, err := w.client.Bidi(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			n := int32(1000)
			if err := s.Send(&testingv1.BidiRequest{Behaviour: &testingv1.Behaviour{Delay: durationpb.New(time.Second), ResponseCount: &n}}); err != nil {
				t.Fatal(err)
			}
			begin := time.Now()
			for err == nil {
				_, err = s.Recv()
			}
			e := wantEnded(t, err, maxage.Age, time.Minute, time.Minute)
			if took := time.Since(begin); took != 65*time.Second || e.Complete {
				t.Errorf("ended after %v (complete: %v), want a minute and the grace of 5s", took, e.Complete)
			}
		})
	})
	t.Run("error_of_the_server_stays", func(t *testing.T) {
		with(t, 1, minute, func(t *testing.T, w *world) {
			b := &testingv1.Behaviour{Status: &testingv1.Status{Code: int32(codes.Internal)}}
			s, err := w.client.ServerStream(t.Context(), &testingv1.ServerStreamRequest{Behaviour: b})
			for err == nil {
				_, err = s.Recv()
			}
			if status.Code(err) != codes.Internal {
				t.Errorf("the stream ended with %v, want INTERNAL", err)
			}
		})
	})
}

var many = int32(1_000_000)

// open keeps a stream of responses open on the world until ctx ends.
func (w *world) open(ctx context.Context) error {
	return maxage.Reopen{}.Run(ctx, func(ctx context.Context) error {
		s, err := w.client.ServerStream(ctx, &testingv1.ServerStreamRequest{Behaviour: &testingv1.Behaviour{Delay: durationpb.New(20 * time.Second), ResponseCount: &many}})
		for err == nil {
			_, err = s.Recv()
		}
		return err
	})
}

func TestRollout(t *testing.T) {
	const streams = 42
	for name, tc := range map[string]struct {
		cfg   maxage.Config
		after time.Duration
		mark  bool // discovery marks those that leave; otherwise it lists them no more
		stay  int
	}{
		"by_age":     {maxage.Config{Age: 2 * time.Minute}, 145 * time.Second, false, 6},
		"draining":   {maxage.Config{}, 11 * time.Second, true, 3},
		"not_listed": {maxage.Config{}, 11 * time.Second, false, 3},
	} {
		t.Run(name, func(t *testing.T) {
			with(t, 6, tc.cfg, func(t *testing.T, w *world) {
				old, fresh := w.Endpoints()[:3], w.Endpoints()[3:]
				w.r.UpdateState(resolver.State{Endpoints: old})
				ctx, cancel := context.WithCancel(t.Context())
				done := make(chan error, streams)
				for range streams {
					go func() { done <- w.open(ctx) }()
				}
				time.Sleep(time.Minute)
				endpoints := w.Endpoints()
				if tc.stay == 3 {
					endpoints = fresh
					if tc.mark {
						for _, e := range old {
							endpoints = append(endpoints[:len(endpoints):len(endpoints)], discover.SetDraining(e, true))
						}
					}
				}
				w.r.UpdateState(resolver.State{Endpoints: endpoints})
				time.Sleep(tc.after)
				for i, s := range w.Servers() {
					n := s.Stats().InFlight
					switch leaves := tc.stay == 3 && i < 3; {
					case leaves && n != 0:
						t.Errorf("server %d leaves, and has %d streams", i, n)
					case !leaves && (n < int64(streams/tc.stay/2) || n > int64(2*streams/tc.stay)):
						t.Errorf("server %d has %d of %d streams, want about %d", i, n, streams, streams/tc.stay)
					}
				}
				cancel()
				for range streams {
					if err := <-done; status.Code(err) != codes.Canceled {
						t.Errorf("a stream ended with %v, want only the caller to end it", err)
					}
				}
			})
		})
	}
}

func TestReopen(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		down := status.Error(codes.Unavailable, "down")
		calls := 0
		begin := time.Now()
		err := maxage.Reopen{Initial: time.Second, Max: 4 * time.Second}.Run(t.Context(), func(context.Context) error {
			if calls++; calls <= 20 {
				return down
			}
			return status.Error(codes.NotFound, "gone")
		})
		if status.Code(err) != codes.NotFound || calls != 21 {
			t.Errorf("%d sessions and %v, want 21 and NOT_FOUND", calls, err)
		}
		if took := time.Since(begin); took == 0 || took > 80*time.Second {
			t.Errorf("20 back-offs of at most 4s took %v", took)
		}
		calls = 0
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		err = maxage.Reopen{}.Run(ctx, func(ctx context.Context) error {
			calls++
			time.Sleep(time.Second)
			return &interceptor.Refusal{Reason: maxage.Reason, Code: codes.Aborted, Err: &maxage.Ended{}}
		})
		if calls < 60 || calls > 61 || !errors.As(err, new(*maxage.Ended)) {
			t.Errorf("%d sessions of a second that were ended in a minute, and %v; want 60 or 61, without a back-off", calls, err)
		}
		if err := (maxage.Reopen{}).Run(t.Context(), func(context.Context) error { return nil }); err != nil {
			t.Errorf("a session without an error: %v", err)
		}
	})
}

func TestConfig(t *testing.T) {
	for _, cfg := range []maxage.Config{{Age: time.Millisecond}, {Jitter: 2}, {Jitter: -0.5}, {Drain: -2}, {Grace: -1}} {
		var e *interceptor.ConfigError
		if _, err := maxage.New(cfg); !errors.As(err, &e) {
			t.Errorf("%+v: %v, want a ConfigError", cfg, err)
		}
	}
	l, err := maxage.New(maxage.Config{})
	if err != nil {
		t.Fatal(err)
	}
	if err := l.Update(maxage.Config{Jitter: 3}); err == nil || l.Config() != (maxage.Config{}) {
		t.Errorf("a wrong update: %v, and the config is %+v", err, l.Config())
	}
}

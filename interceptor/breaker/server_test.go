// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package breaker

import (
	"context"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/sync/semaphore"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/belfry-go/belfry/interceptor"
	"github.com/belfry-go/belfry/interceptor/adapt"
	"github.com/belfry-go/belfry/internal/test/calltest"
	"github.com/belfry-go/belfry/internal/testserver"
	testingv1 "github.com/belfry-go/belfry/proto/belfry/testing/v1"
)

func TestServer(t *testing.T) {
	t.Run("calls_that_were_not_sent_say_nothing", testNotSent)
	t.Run("no_connection_opens", testNoConnection)
	t.Run("long_streams_close_a_half-open_circuit", testLongStreams)
	t.Run("end_of_a_long_stream_is_no_failed_probe", testEndOfALongStream)
}

// limit admits n calls at a time, and lets the others wait.
func limit(n int64) interceptor.Spec {
	return adapt.FromSemaphore("limit", semaphore.NewWeighted(n))
}

func testNotSent(t *testing.T) {
	expired, cancel := context.WithDeadline(t.Context(), time.Now().Add(-time.Second))
	defer cancel()
	cancelled, cancel := context.WithCancel(t.Context())
	cancel()
	b := mustNew(t, Config{ConsecutiveFailures: 1, FailureRatio: 0.01, MinCalls: 1, SlowCallRatio: 0.01, SlowCall: time.Microsecond})
	conn := calltest.Stack(t, b).Wrap(testserver.Dial(t, testserver.New(t)))
	client := testingv1.NewTestServiceClient(conn)
	for name, call := range map[string]func() error{
		"expired":   func() error { _, err := client.Unary(expired, &testingv1.UnaryRequest{}); return err },
		"cancelled": func() error { _, err := client.Unary(cancelled, &testingv1.UnaryRequest{}); return err },
		"stream that comes expired": func() error {
			_, err := client.Bidi(expired)
			return err
		},
		"oversize": func() error {
			_, err := client.Unary(t.Context(), &testingv1.UnaryRequest{Payload: make([]byte, 100)}, grpc.MaxCallSendMsgSize(50))
			return err
		},
	} {
		for range 30 {
			if err := call(); err == nil || calltest.Reason(err) == interceptor.ReasonBreakerOpen {
				t.Fatalf("%s: %v, want an error other than the breaker's", name, err)
			}
		}
		if s := b.State(""); s != Closed {
			t.Errorf("after 30 calls of the kind %s the circuit is %v, want closed", name, s)
		}
	}
}

func testNoConnection(t *testing.T) {
	srv := testserver.New(t)
	conn := testserver.Dial(t, srv)
	srv.Stop()
	for _, c := range []Config{{ConsecutiveFailures: 3}, {ConsecutiveFailures: 3, IgnoreNotConnected: true}} {
		b := mustNew(t, c)
		client := testingv1.NewTestServiceClient(calltest.Stack(t, b).Wrap(conn))
		for range 3 {
			if _, err := client.Unary(t.Context(), &testingv1.UnaryRequest{}); err == nil {
				t.Fatal("a call without a connection succeeded")
			}
		}
		if s := b.State(""); (s == Open) == c.IgnoreNotConnected {
			t.Errorf("after three calls without a connection the circuit is %v, with IgnoreNotConnected %v", s, c.IgnoreNotConnected)
		}
	}
}

// Thirty watchers come back after an outage. Each tries once a second until it has
// its stream, which delivers a message a second for hours.
func testLongStreams(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		srv := testserver.New(t, testserver.InMemory())
		b := mustNew(t, Config{ConsecutiveFailures: 3, Jitter: None})
		client := testingv1.NewTestServiceClient(calltest.Stack(t, b).Wrap(testserver.Dial(t, srv)))
		ctx, cancel := context.WithCancel(t.Context())
		err := srv.Fail(codes.Unavailable, 1)
		if err != nil {
			t.Fatal(err)
		}
		for range 5 {
			if s, err := client.ServerStream(ctx, &testingv1.ServerStreamRequest{}); err == nil {
				s.Recv()
			}
		}
		if s := b.State(""); s != Open {
			t.Fatalf("after five streams that fail the circuit is %v, want open", s)
		}
		srv.Heal()
		var opened atomic.Int64
		var wg sync.WaitGroup
		n := int32(100_000)
		for range 30 {
			wg.Go(func() {
				for ctx.Err() == nil {
					s, err := client.ServerStream(ctx, &testingv1.ServerStreamRequest{Behaviour: &testingv1.Behaviour{Delay: durationpb.New(500 * time.Millisecond), ResponseCount: &n}})
					for first := true; err == nil; first = false {
						if _, err = s.Recv(); err == nil && first {
							opened.Add(1)
						}
					}
					time.Sleep(time.Second)
				}
			})
		}
		time.Sleep(DefaultOpenFor + 2*time.Second)
		if got := opened.Load(); got != 30 || b.State("") != Closed {
			t.Errorf("two seconds after OpenFor %d of 30 streams deliver, and the circuit is %v", got, b.State(""))
		}
		cancel()
		wg.Wait()
	})
}

func testEndOfALongStream(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		srv := testserver.New(t, testserver.InMemory())
		b := mustNew(t, Config{ConsecutiveFailures: 1, OpenFor: time.Second, Jitter: None})
		client := testingv1.NewTestServiceClient(calltest.Stack(t, b).Wrap(testserver.Dial(t, srv)))
		b.Trip("", time.Second)
		time.Sleep(2 * time.Second)
		n := int32(3600)
		s, err := client.ServerStream(t.Context(), &testingv1.ServerStreamRequest{Behaviour: &testingv1.Behaviour{
			Delay: durationpb.New(time.Second), ResponseCount: &n, Status: &testingv1.Status{Code: int32(codes.Unavailable)},
		}})
		if err != nil {
			t.Fatal(err)
		}
		got := 0
		for ; err == nil; got++ {
			_, err = s.Recv()
		}
		if _, err := client.Unary(t.Context(), &testingv1.UnaryRequest{}); err != nil {
			t.Errorf("after a probe that delivered %d messages: %v, want the circuit closed", got-1, err)
		}
	})
}

func TestOrder(t *testing.T) {
	t.Run("inside_a_limit_an_open_circuit_stops_what_waits", testOpenStopsWhatWaits)
	t.Run("slow_calls_are_the_servers", testSlowCallsAreTheServers)
	t.Run("advice", testAdvice)
}

func testOpenStopsWhatWaits(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := mustNew(t, Config{ConsecutiveFailures: 3, OpenFor: 5 * time.Second, Jitter: None})
		sent := 0
		conn := calltest.Stack(t, limit(1), b).Wrap(calltest.Server(func(context.Context) error {
			sent++
			time.Sleep(100 * time.Millisecond)
			return unavailable
		}))
		ends := calltest.Burst(conn, 100)
		if sent != 3 {
			t.Errorf("%d of 100 calls that wait were sent, want 3: the circuit is open then", sent)
		}
		for i, e := range ends[3:] {
			if e.Reason != interceptor.ReasonBreakerOpen || e.After != 300*time.Millisecond {
				t.Fatalf("call %d ended as %v, want refused as soon as the circuit opens", i+3, e)
			}
		}
	})
}

// A burst of the client's own waits for a permit, in both orders, while each call
// takes the server 10 ms.
func testSlowCallsAreTheServers(t *testing.T) {
	for _, inside := range []bool{false, true} {
		synctest.Test(t, func(t *testing.T) {
			b := mustNew(t, Config{SlowCallRatio: 0.1, SlowCall: 100 * time.Millisecond, MinCalls: 1})
			specs := []interceptor.Spec{b, limit(1)}
			if inside {
				specs = []interceptor.Spec{limit(1), b}
			}
			conn := calltest.Stack(t, specs...).Wrap(calltest.Takes(10 * time.Millisecond))
			for i, e := range calltest.Burst(conn, 50) {
				if e.Code != codes.OK {
					t.Fatalf("breaker inside the limit %v: call %d ended as %v, want OK", inside, i, e)
				}
			}
			if s := b.State(""); s != Closed {
				t.Errorf("breaker inside the limit %v: the circuit is %v, want closed", inside, s)
			}
		})
	}
}

func testAdvice(t *testing.T) {
	if got := calltest.Stack(t, limit(1), Config{}).Advice(); len(got) != 0 {
		t.Errorf("advice %q, want none", got)
	}
	if got := calltest.Stack(t, Config{}, limit(1)).Advice(); len(got) != 1 {
		t.Errorf("advice %q on a breaker outside a limit, want one sentence", got)
	}
}

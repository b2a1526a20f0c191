// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package throttle

import (
	"context"
	"fmt"
	"io"
	"math"
	"math/rand/v2"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/sync/semaphore"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/connectivity"
	"google.golang.org/grpc/status"

	"github.com/belfry-go/belfry/interceptor"
	"github.com/belfry-go/belfry/interceptor/adapt"
	"github.com/belfry-go/belfry/interceptor/layertest"
	"github.com/belfry-go/belfry/internal/check"
	"github.com/belfry-go/belfry/internal/keyed"
	"github.com/belfry-go/belfry/internal/test/calltest"
	"github.com/belfry-go/belfry/internal/test/leaktest"
	"github.com/belfry-go/belfry/internal/testserver"
	testingv1 "github.com/belfry-go/belfry/proto/belfry/testing/v1"
)

func TestMain(m *testing.M) { leaktest.Main(m) }

func TestProbability(t *testing.T) {
	t.Run("is_the_books_formula", testProbabilityIsTheBooksFormula)
	t.Run("is_compared_with_a_random_number", testProbabilityIsComparedWithARandomNumber)
	t.Run("spares_an_outage_and_recovers", testProbabilitySparesAnOutageAndRecovers)
	t.Run("forgets_an_outage_in_two_windows", testProbabilityForgetsAnOutageInTwoWindows)
	t.Run("lets_K_times_the_capacity_through", testProbabilityLetsKTimesTheCapacityThrough)
	t.Run("is_drawn_for_once_inside_a_limit", testProbabilityIsDrawnForOnceInsideALimit)
}

func TestCount(t *testing.T) {
	t.Run("calls_in_flight", testCountCallsInFlight)
	t.Run("outcome_and_code", testCountOutcomeAndCode)
	t.Run("calls_that_are_not_sent", testCountCallsThatAreNotSent)
	t.Run("stream_once", testCountStreamOnce)
	t.Run("by_method", testCountByMethod)
	t.Run("idle_keys_make_room", testCountIdleKeysMakeRoom)
	t.Run("window_forgets", testCountWindowForgets)
}

func TestConfig(t *testing.T) {
	t.Run("update_keeps_what_was_counted", testConfigUpdateKeepsWhatWasCounted)
	t.Run("bad_values_are_errors", testConfigBadValuesAreErrors)
	t.Run("empty_name", testConfigEmptyName)
	t.Run("name", testConfigName)
}

const method = "/s/m"

// server is a connection that answers with what answer says.
type server struct {
	answer   func(method string) error
	messages int // Of each stream, before its end.
	calls    atomic.Int64
}

func (s *server) Invoke(_ context.Context, method string, _, _ any, _ ...grpc.CallOption) error {
	s.calls.Add(1)
	return s.answer(method)
}

func (s *server) NewStream(ctx context.Context, _ *grpc.StreamDesc, method string, _ ...grpc.CallOption) (grpc.ClientStream, error) {
	s.calls.Add(1)
	return &stream{ctx: ctx, left: s.messages, end: s.answer(method)}, nil
}

type stream struct {
	grpc.ClientStream
	ctx  context.Context
	left int
	end  error
}

func (s *stream) RecvMsg(any) error {
	if s.left--; s.left >= 0 {
		return nil
	}
	if s.end == nil {
		return io.EOF
	}
	return s.end
}

func answering(err error) *server { return &server{answer: func(string) error { return err }} }

var byMethod = interceptor.KeyBy{Method: true}

func mustNew(t testing.TB, c Config) *Layer {
	t.Helper()
	l, err := New(c)
	if err != nil {
		t.Fatal(err)
	}
	return l
}

func wrap(t testing.TB, conn grpc.ClientConnInterface, specs ...interceptor.Spec) grpc.ClientConnInterface {
	t.Helper()
	return calltest.Stack(t, specs...).Wrap(conn)
}

func call(c grpc.ClientConnInterface) error {
	return c.Invoke(context.Background(), method, nil, nil)
}

func throttled(err error) bool {
	r, ok := interceptor.AsRefusal(err)
	return ok && r.Reason == interceptor.ReasonThrottled
}

var (
	unavailable = status.Error(codes.Unavailable, "overloaded")
	notFound    = status.Error(codes.NotFound, "no such thing")
)

func wantStats(t *testing.T, l *Layer, m string, requests, accepts int64) {
	t.Helper()
	if s := l.Stats(m); s.Requests != requests || s.Accepts != accepts {
		t.Errorf("%d requests, %d accepted, want %d and %d", s.Requests, s.Accepts, requests, accepts)
	}
}

func testProbabilityIsTheBooksFormula(t *testing.T) {
	for _, tc := range []struct {
		k, share          float64
		requests, accepts int64
		want              float64
	}{
		{2, 1, 100, 100, 0},
		{2, 1, 100, 50, 0}, // Every second one: the edge.
		{2, 1, 100, 49, 2.0 / 101},
		{2, 1, 100, 30, 40.0 / 101},
		{2, 1, 100, 0, 100.0 / 101},
		{2, 0.9, 100, 0, 0.9},
		{2, 0.75, 100, 0, 0.75},
		{1.1, 1, 100, 50, 45.0 / 101},
		{1, 1, 100, 50, 50.0 / 101},
		{2, 1, 9, 0, 0}, // Fewer than MinRequests.
		{2, 1, 10, 0, 10.0 / 11},
	} {
		s, err := settingsOf(Config{K: tc.k, MaxRefused: tc.share})
		if err != nil {
			t.Fatal(err)
		}
		if got := s.probability(tc.requests, tc.accepts); math.Abs(got-tc.want) > 1e-12 {
			t.Errorf("K %v, share %v, %d requests, %d accepts: probability %v, want %v", tc.k, tc.share, tc.requests, tc.accepts, got, tc.want)
		}
	}
	s, err := settingsOf(Config{MinRequests: 1})
	if err != nil {
		t.Fatal(err)
	}
	if got := s.probability(1, 0); got != 0.5 {
		t.Errorf("MinRequests 1: probability %v after one failure, want the formula's 0.5", got)
	}
}

func testProbabilityIsComparedWithARandomNumber(t *testing.T) {
	l := mustNew(t, Config{})
	next := 1.0 // Never below.
	l.random = func() float64 { return next }
	srv := answering(unavailable)
	c := wrap(t, srv, l)
	for range 100 {
		if err := call(c); err != unavailable {
			t.Fatalf("call: %v, want the server's error", err)
		}
	}
	wantStats(t, l, "", 100, 0)
	next = 0.89
	err := call(c)
	if !throttled(err) || status.Code(err) != codes.Unavailable {
		t.Errorf("call at 0.89 with probability 0.9: %v, want a refusal with UNAVAILABLE and reason THROTTLED", err)
	}
	wantStats(t, l, "", 101, 0) // The refused is a request.
	next = 0.9
	if err := call(c); err != unavailable {
		t.Errorf("call at 0.9 with probability 0.9: %v, want it to reach the server", err)
	}
	if got := srv.calls.Load(); got != 101 {
		t.Errorf("%d calls reached the server, want 101", got)
	}
}

func testCountCallsInFlight(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := mustNew(t, Config{MinRequests: 1})
		c := wrap(t, &server{answer: func(string) error { time.Sleep(time.Second); return nil }}, l)
		done := make(chan error, 100)
		for range 100 {
			go func() { done <- call(c) }()
		}
		synctest.Wait()
		wantStats(t, l, "", 0, 0)
		for range 100 {
			if err := <-done; err != nil {
				t.Errorf("a call of a burst at the start: %v, want no error", err)
			}
		}
		wantStats(t, l, "", 100, 100)
	})
}

func testCountOutcomeAndCode(t *testing.T) {
	refuse := interceptor.Refuse("inner", interceptor.ReasonConcurrency, "")
	notReady := interceptor.Refuse("connection", interceptor.ReasonNotReady, "")
	deadline := interceptor.Refuse("timeout", interceptor.ReasonDeadline, "")
	deadline.Sent = true
	for _, tc := range []struct {
		name              string
		config            Config
		cause             error // Of the end of the context, while the call runs.
		err               error
		requests, accepts int64
	}{
		{"success", Config{}, nil, nil, 1, 1},
		{"an error that is an answer", Config{}, nil, notFound, 1, 1},
		{"UNAVAILABLE", Config{}, nil, unavailable, 1, 0},
		{"RESOURCE_EXHAUSTED", Config{}, nil, status.Error(codes.ResourceExhausted, ""), 1, 0},
		{"DEADLINE_EXCEEDED", Config{}, nil, status.Error(codes.DeadlineExceeded, ""), 1, 0},
		{"cancelled by the caller", Config{}, context.Canceled, status.Error(codes.Canceled, ""), 0, 0},
		{"past the caller's deadline", Config{}, context.DeadlineExceeded, status.Error(codes.DeadlineExceeded, ""), 0, 0},
		{"past the deadline of a layer", Config{}, deadline, status.Error(codes.Canceled, ""), 1, 0},
		{"not sent", Config{}, nil, refuse, 0, 0},
		{"without a connection", Config{}, nil, notReady, 0, 0},
		{"without a connection if so configured", Config{CountNotConnected: true}, nil, notReady, 1, 0},
		{"other codes by config", Config{RejectCodes: []codes.Code{codes.NotFound}}, nil, notFound, 1, 0},
		{"none of the other codes by config", Config{RejectCodes: []codes.Code{codes.NotFound}}, nil, unavailable, 1, 1},
	} {
		t.Run(tc.name, func(t *testing.T) {
			l := mustNew(t, tc.config)
			ctx, cancel := context.WithCancelCause(context.Background())
			defer cancel(nil)
			srv := &server{answer: func(string) error {
				if tc.cause != nil {
					cancel(tc.cause)
				}
				return tc.err
			}}
			wrap(t, srv, l).Invoke(ctx, method, nil, nil)
			wantStats(t, l, "", tc.requests, tc.accepts)
		})
	}
	t.Run("refused by a gate inside", func(t *testing.T) {
		l := mustNew(t, Config{})
		inner := adapt.FromAllow("inner", interceptor.ReasonConcurrency, func(context.Context) (func(interceptor.Outcome, error), error) {
			return nil, refuse
		})
		if err := call(wrap(t, answering(nil), l, inner)); err != error(refuse) {
			t.Errorf("call: %v, want the inner refusal", err)
		}
		wantStats(t, l, "", 0, 0)
	})
}

// On a real connection, calls that were not sent do not count.
func testCountCallsThatAreNotSent(t *testing.T) {
	expired, cancel := context.WithDeadline(t.Context(), time.Now().Add(-time.Second))
	defer cancel()
	srv := testserver.New(t)
	l := mustNew(t, Config{})
	conn := testserver.Dial(t, srv)
	client := testingv1.NewTestServiceClient(wrap(t, conn, l))
	if _, err := client.Unary(t.Context(), &testingv1.UnaryRequest{}); err != nil {
		t.Fatal(err)
	}
	for range 100 {
		client.Unary(expired, &testingv1.UnaryRequest{})
		client.Unary(t.Context(), &testingv1.UnaryRequest{Payload: make([]byte, 100)}, grpc.MaxCallSendMsgSize(50))
	}
	srv.Stop()
	conn.WaitForStateChange(t.Context(), connectivity.Ready)
	for range 100 {
		client.Unary(t.Context(), &testingv1.UnaryRequest{})
	}
	wantStats(t, l, "", 1, 1)
}

func testCountStreamOnce(t *testing.T) {
	l := mustNew(t, Config{})
	for _, tc := range []struct {
		messages          int
		end               error
		requests, accepts int64
	}{
		{0, nil, 1, 1},
		{0, unavailable, 1, 0},
		{2, nil, 1, 1},
		{2, unavailable, 1, 1}, // It was accepted.
	} {
		conn := wrap(t, &server{answer: func(string) error { return tc.end }, messages: tc.messages}, l)
		s, err := conn.NewStream(context.Background(), &grpc.StreamDesc{ServerStreams: true}, method)
		if err != nil {
			t.Fatal(err)
		}
		before := l.Stats("")
		for range 4 {
			s.RecvMsg(nil)
		}
		after := l.Stats("")
		if n, m := after.Requests-before.Requests, after.Accepts-before.Accepts; n != tc.requests || m != tc.accepts {
			t.Errorf("a stream of %d messages that ended with %v counted as %d requests and %d accepts, want %d and %d",
				tc.messages, tc.end, n, m, tc.requests, tc.accepts)
		}
	}
}

// While the limit is busy, a call that waits in a buffer has not been drawn for.
func testProbabilityIsDrawnForOnceInsideALimit(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := mustNew(t, Config{})
		draws := 0
		l.random = func() float64 { draws++; return 1 }
		for range DefaultMinRequests {
			l.all.Release(0, interceptor.End{Outcome: interceptor.Failed, Err: unavailable})
		}
		limit := adapt.FromSemaphore("limit", semaphore.NewWeighted(1))
		stack := calltest.Stack(t, &twice{}, limit, l)
		if got := stack.Advice(); len(got) != 0 {
			t.Errorf("advice %q, want none", got)
		}
		calltest.Burst(stack.Wrap(calltest.Takes(time.Second)), 5)
		if draws != 5 {
			t.Errorf("%d draws for 5 calls, want 5", draws)
		}
		if got := calltest.Stack(t, l, limit).Advice(); len(got) != 1 {
			t.Errorf("advice %q on a throttle outside a limit, want one sentence", got)
		}
	})
}

// twice asks the gates inside without waiting, and again if that was in vain, as a
// buffer does.
type twice struct{ interceptor.GateOnly }

func (l *twice) NewLayer() (interceptor.Layer, error) { return l, nil }

func (l *twice) WrapGate(inner interceptor.Gate) interceptor.Gate {
	return interceptor.GateFunc(func(ctx context.Context, a *interceptor.Admission, w interceptor.Wait) error {
		if mayWait, err := a.Try(ctx, inner, interceptor.None); !mayWait {
			return err
		}
		return inner.Admit(ctx, a, w)
	})
}

func testCountByMethod(t *testing.T) {
	l := mustNew(t, Config{KeyBy: byMethod})
	l.random = func() float64 { return 0 }
	c := wrap(t, &server{answer: func(m string) error {
		if m == "/s/bad" {
			return unavailable
		}
		return nil
	}}, l)
	for range 20 {
		c.Invoke(context.Background(), "/s/bad", nil, nil)
		if err := c.Invoke(context.Background(), "/s/good", nil, nil); err != nil {
			t.Fatalf("a call of the good method: %v, want no error", err)
		}
	}
	wantStats(t, l, "/s/good", 20, 20)
	wantStats(t, l, "/s/bad", 20, 0)
	wantStats(t, l, "/s/never", 0, 0)
	err := c.Invoke(context.Background(), "/s/bad", nil, nil)
	if r, ok := interceptor.AsRefusal(err); !throttled(err) || !ok || r.Key != "/s/bad" {
		t.Errorf("a call of the bad method: %v, want a refusal that names it", err)
	}
}

func testCountIdleKeysMakeRoom(t *testing.T) {
	for _, config := range []Config{{KeyIdle: time.Minute}, {KeyIdle: time.Second, Window: time.Minute}} {
		synctest.Test(t, func(t *testing.T) {
			config.KeyBy, config.MaxKeys = byMethod, 3
			l := mustNew(t, config)
			c := wrap(t, answering(nil), l)
			for i := range config.MaxKeys {
				c.Invoke(context.Background(), fmt.Sprintf("/s/%d", i), nil, nil)
			}
			time.Sleep(time.Minute - time.Second)
			c.Invoke(context.Background(), "/s/new", nil, nil)
			wantStats(t, l, "/s/new", 0, 0)
			wantStats(t, l, keyed.Others, 1, 1)
			time.Sleep(time.Second)
			c.Invoke(context.Background(), "/s/new", nil, nil)
			wantStats(t, l, "/s/new", 1, 1)
		})
	}
}

func testCountWindowForgets(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := mustNew(t, Config{Window: 20 * time.Second})
		c := wrap(t, answering(notFound), l)
		call(c)
		time.Sleep(18 * time.Second)
		call(c)
		wantStats(t, l, "", 2, 2)
		time.Sleep(2 * time.Second)
		wantStats(t, l, "", 1, 1)
		time.Sleep(20 * time.Second)
		wantStats(t, l, "", 0, 0)
	})
}

// Sixty calls a second, to a server that works for a minute, rejects everything for
// two, and works again. False failures: the share below is the mean of 3,600
// independent draws, so its standard deviation is below 0.5 %; the bounds are at
// least five of those away, which is less than one run in a million.
func testProbabilitySparesAnOutageAndRecovers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		seed := rand.Uint64()
		t.Logf("seed %d", seed)
		rng := rand.New(rand.NewPCG(seed, 0))
		l := mustNew(t, Config{})
		l.random = rng.Float64
		var down bool
		srv := &server{answer: func(string) error {
			if down {
				return unavailable
			}
			return nil
		}}
		c := wrap(t, srv, l)
		run := func(d time.Duration) (share float64) {
			n, reached := 0, srv.calls.Load()
			for range int(d / time.Second) {
				for range 60 {
					call(c)
					n++
				}
				time.Sleep(time.Second)
			}
			return float64(srv.calls.Load()-reached) / float64(n)
		}
		if got := run(time.Minute); got != 1 {
			t.Errorf("healthy: %v of the calls reach the server, want all", got)
		}
		down = true
		run(time.Minute)
		if got := run(time.Minute); got < 0.075 || got > 0.125 {
			t.Errorf("down for a window: %v of the calls reach the server, want a tenth", got)
		}
		down = false
		took, half := time.Duration(0), time.Duration(0)
		for took < 10*time.Minute && l.Stats("").Probability > 0 {
			if run(time.Second); half == 0 && l.Stats("").Probability < 0.5 {
				half = took
			}
			took += time.Second
		}
		// Standard deviations of about 3 s.
		if half < 25*time.Second || half > 55*time.Second {
			t.Errorf("half of the calls pass after %v, want about 1.35 of a window, 40s", half)
		}
		if took < 38*time.Second || took > 61*time.Second {
			t.Errorf("no call is refused any more after %v, want about one and three quarters of a window, 53s, and at most two", took)
		}
		if got := run(time.Minute); got != 1 {
			t.Errorf("recovered: %v of the calls reach the server, want all", got)
		}
	})
}

// After an outage of ten minutes, no call is refused two windows after the recovery,
// whatever the settings and the rate of calls. During the outage a call reaches the
// server in every two windows.
func testProbabilityForgetsAnOutageInTwoWindows(t *testing.T) {
	for _, tc := range []struct {
		name   string
		config Config
		every  time.Duration // Between calls.
	}{
		{"defaults", Config{}, 50 * time.Millisecond},
		{"defaults_at_a_low_rate", Config{}, 2 * time.Second},
		{"K_1.1", Config{K: 1.1}, 50 * time.Millisecond},
		{"MaxRefused_1", Config{MaxRefused: 1}, 50 * time.Millisecond},
		{"both_and_a_short_window", Config{K: 1.1, MaxRefused: 1, Window: 2 * time.Second}, 10 * time.Millisecond},
	} {
		t.Run(tc.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				seed := rand.Uint64()
				t.Logf("seed %d", seed)
				l := mustNew(t, tc.config)
				l.random = rand.New(rand.NewPCG(seed, 0)).Float64
				window := l.settings.Load().Window
				down := true
				var last time.Time // When a call reached the server.
				srv := &server{answer: func(string) error {
					if last = time.Now(); down {
						return unavailable
					}
					return nil
				}}
				c := wrap(t, srv, l)
				for start := time.Now(); time.Since(start) < 10*time.Minute; time.Sleep(tc.every) {
					if call(c); time.Since(last) > 2*window {
						t.Fatalf("no call has reached the server for %v", time.Since(last))
					}
				}
				down = false
				for start := time.Now(); time.Since(start) < 2*window; time.Sleep(tc.every) {
					call(c)
				}
				for range 1000 {
					if err := call(c); err != nil {
						t.Fatalf("two windows after the recovery: %v, want no error", err)
					}
				}
			})
		})
	}
}

// The server takes one call in ten. What reaches it settles at K times that
// share: with K 2 a fifth.
func testProbabilityLetsKTimesTheCapacityThrough(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := mustNew(t, Config{Window: 2 * time.Minute})
		seed := rand.Uint64()
		t.Logf("seed %d", seed)
		l.random = rand.New(rand.NewPCG(seed, 0)).Float64
		capacity := 0
		srv := &server{answer: func(string) error {
			if capacity--; capacity < 0 {
				return unavailable
			}
			return nil
		}}
		c := wrap(t, srv, l)
		var last int64
		for second := range 600 {
			capacity = 10
			if second == 480 {
				last = srv.calls.Load()
			}
			for range 100 {
				call(c)
			}
			time.Sleep(time.Second)
		}
		// 20 of 100 in each of 120 s. A standard deviation is 1.7 %: six of them.
		if got := float64(srv.calls.Load()-last) / 120; got < 18 || got > 22 {
			t.Errorf("%v calls a second reach a server that accepts 10, want about 20", got)
		}
	})
}

func testConfigUpdateKeepsWhatWasCounted(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := mustNew(t, Config{})
		l.random = func() float64 { return 0 }
		c := wrap(t, answering(unavailable), l)
		for range 10 {
			call(c)
		}
		for _, bad := range []Config{{K: 0.5}, {K: 3, MaxRefused: 2}, {MinRequests: -1, Window: time.Nanosecond}} {
			if err := l.Update(bad); err == nil {
				t.Errorf("Update(%+v) returned no error", bad)
			}
		}
		if s := l.Stats(""); s.Probability != 0.9 || s.Requests != 10 {
			t.Errorf("after bad updates: %+v, want 10 requests and probability 0.9", s)
		}
		if err := l.Update(Config{KeyBy: byMethod}); err == nil || !strings.Contains(err.Error(), "must stay nothing") {
			t.Errorf("Update of KeyBy: %v, want an error: it cannot change", err)
		}
		if err := l.Update(Config{K: 3, MaxRefused: 0.5, Window: time.Minute}); err != nil {
			t.Fatal(err)
		}
		if s := l.Stats(""); s.Probability != 0.5 || s.Requests != 10 {
			t.Errorf("after an update: %+v, want the 10 requests kept and probability 0.5", s)
		}
		time.Sleep(time.Minute)
		wantStats(t, l, "", 0, 0)
	})
}

func testConfigBadValuesAreErrors(t *testing.T) {
	for _, tc := range []struct {
		c    Config
		want string
	}{
		{Config{K: 0.99}, "throttle: K is 0.99, must be"},
		{Config{K: math.NaN()}, "throttle: K is NaN, must be"},
		{Config{K: math.Inf(1)}, "throttle: K is +Inf, must be"},
		{Config{Window: time.Millisecond}, "throttle: Window is 1ms, must be"},
		{Config{Window: -1}, "throttle: Window is -1ns, must be"},
		{Config{Window: 48 * time.Hour}, "throttle: Window is 48h0m0s, must be"},
		{Config{MaxRefused: -0.1}, "throttle: MaxRefused is -0.1, must be"},
		{Config{MaxRefused: 1.1}, "throttle: MaxRefused is 1.1, must be"},
		{Config{MaxRefused: math.NaN()}, "throttle: MaxRefused is NaN, must be"},
		{Config{MinRequests: -1}, "throttle: MinRequests is -1, must be"},
		{Config{MaxKeys: -1}, "throttle: MaxKeys is -1, must be"},
		{Config{KeyIdle: time.Millisecond}, "throttle: KeyIdle is 1ms, must be"},
		{Config{KeyBy: interceptor.KeyBy{Method: true, Metadata: "x"}}, "throttle: KeyBy is Method and"},
		{Config{RejectCodes: []codes.Code{codes.Unavailable, codes.OK}}, "throttle: RejectCodes[1] is OK, must be"},
		{Config{RejectCodes: []codes.Code{}}, "throttle: RejectCodes is [], must"},
	} {
		if _, err := New(tc.c); err == nil || !strings.HasPrefix(err.Error(), tc.want) {
			t.Errorf("New(%+v): %v, want an error that begins with %q", tc.c, err, tc.want)
		}
	}
}

func testConfigEmptyName(t *testing.T) {
	if _, err := New(Config{}, WithName("")); err == nil || !strings.Contains(err.Error(), `throttle: WithName is ""`) {
		t.Errorf("New with an empty name = %v, want an error that names WithName", err)
	}
}

func testConfigName(t *testing.T) {
	l, err := New(Config{MinRequests: 1}, WithName("orders-throttle"))
	if err != nil {
		t.Fatal(err)
	}
	l.random = func() float64 { return 0 }
	c := wrap(t, answering(unavailable), l)
	call(c)
	if r, ok := interceptor.AsRefusal(call(c)); !ok || r.Layer != "orders-throttle" || l.String() != "orders-throttle" {
		t.Errorf("refusal %v of layer %v, want both to be orders-throttle's", r, l)
	}
}

func TestConformance(t *testing.T) {
	for name, by := range map[string]interceptor.KeyBy{"one": {}, "by_method": byMethod} {
		t.Run(name, func(t *testing.T) {
			layertest.Run(t, func() (interceptor.Spec, func() error) {
				l := mustNew(t, Config{KeyBy: by})
				return l, func() error {
					if s := l.Stats(""); s.Accepts > s.Requests {
						return fmt.Errorf("%d of %d requests accepted", s.Accepts, s.Requests)
					}
					return nil
				}
			})
		})
	}
}

func benchmarks(t testing.TB) map[string]grpc.UnaryClientInterceptor {
	out := map[string]grpc.UnaryClientInterceptor{}
	for name, c := range map[string]Config{"admitted": {}, "admitted_by_method": {KeyBy: byMethod}, "refused": {}} {
		l := mustNew(t, c)
		if name == "refused" {
			l.random = func() float64 { return 0 }
			for range DefaultMinRequests {
				l.all.Release(0, interceptor.End{Outcome: interceptor.Failed, Err: unavailable})
			}
		}
		out[name] = calltest.Stack(t, l).UnaryClientInterceptor()
	}
	return out
}

func TestNothingIsAllocated(t *testing.T) { calltest.AllocateNothing(t, benchmarks(t), method) }

func BenchmarkThrottle(b *testing.B) { calltest.Bench(b, benchmarks(b), method) }

func settingsOf(c Config) (*settings, error) {
	errs := check.Of("throttle")
	return c.settings(errs, nil), errs.Err()
}

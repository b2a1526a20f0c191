// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package ratelimit

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"reflect"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/time/rate"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"github.com/belfry-go/belfry/interceptor"
	"github.com/belfry-go/belfry/interceptor/layertest"
	"github.com/belfry-go/belfry/internal/retryafter"
	"github.com/belfry-go/belfry/internal/test/calltest"
	"github.com/belfry-go/belfry/internal/test/leaktest"
	"github.com/belfry-go/belfry/internal/test/race"
)

func TestMain(m *testing.M) { leaktest.Main(m) }

func TestRate(t *testing.T) {
	t.Run("one_per_100_ms", testRateOnePer100Ms)
	t.Run("window_passes", testRateWindowPasses)
	t.Run("window_has_no_edge", testRateWindowHasNoEdge)
	t.Run("smooth_burst", testRateSmoothBurst)
	t.Run("random_calls_stay_within_the_bound", testRateRandomCallsStayWithinTheBound)
	t.Run("concurrent_calls", testRateConcurrentCalls)
	t.Run("two_stacks_share_one", testRateTwoStacksShareOne)
	t.Run("stream_takes_one_token", testRateStreamTakesOneToken)
}

func TestQueue(t *testing.T) {
	t.Run("first_come_first_served", testQueueFirstComeFirstServed)
	t.Run("is_not_overtaken_by_calls_that_do_not_wait", testQueueIsNotOvertakenByCallsThatDoNotWait)
	t.Run("moves_up_when_a_call_gives_up", testQueueMovesUpWhenACallGivesUp)
	t.Run("refuses_at_once_what_would_wait_in_vain", testQueueRefusesAtOnceWhatWouldWaitInVain)
	t.Run("passes_a_slot_once_for_each_admission", testQueuePassesASlotOnceForEachAdmission)
	t.Run("is_observed", testQueueIsObserved)
}

func TestUpdate(t *testing.T) {
	t.Run("higher_limit_holds_for_calls_that_wait", testUpdateHigherLimitHoldsForCallsThatWait)
	t.Run("lower_limit_refuses_calls_that_would_wait_in_vain", testUpdateLowerLimitRefusesCallsThatWouldWaitInVain)
	t.Run("keeps_what_was_taken", testUpdateKeepsWhatWasTaken)
}

func TestConfig(t *testing.T) {
	t.Run("bad_values_are_errors", testConfigBadValuesAreErrors)
	t.Run("empty_name", testConfigEmptyName)
	t.Run("bad_arguments_are_errors", testConfigBadArgumentsAreErrors)
}

func TestKeys(t *testing.T) {
	t.Run("method", testKeysMethod)
	t.Run("metadata", testKeysMetadata)
	t.Run("beyond_the_bound_share_a_rate", testKeysBeyondTheBoundShareARate)
	t.Run("idle_ones_are_dropped", testKeysIdleOnesAreDropped)
	t.Run("are_kept_while_calls_wait", testKeysAreKeptWhileCallsWait)
	t.Run("come_and_go_concurrently", testKeysComeAndGoConcurrently)
}

func TestFromRate(t *testing.T) {
	t.Run("waits_refuses_and_refunds", testFromRateWaitsRefusesAndRefunds)
	t.Run("changed_while_calls_wait", testFromRateChangedWhileCallsWait)
	t.Run("resumed_while_calls_wait", testFromRateResumedWhileCallsWait)
}

func TestFromLimiter(t *testing.T) {
	t.Run("is_asked_again", testFromLimiterIsAskedAgain)
	t.Run("that_does_not_say_when_is_asked_again", testFromLimiterThatDoesNotSayWhenIsAskedAgain)
	t.Run("fails_closed_or_open", testFromLimiterFailsClosedOrOpen)
	t.Run("failing_open_gives_nothing_back", testFromLimiterFailingOpenGivesNothingBack)
	t.Run("refusal_names_the_key", testFromLimiterRefusalNamesTheKey)
	t.Run("that_says_at_once_is_not_asked_in_a_loop", testFromLimiterThatSaysAtOnceIsNotAskedInALoop)
	t.Run("that_is_slow_does_not_turn_back_the_clock_of_gates_inside", testFromLimiterThatIsSlow)
}

const ms = time.Millisecond

// server notes when calls reached it, counted from when it was made.
type server struct {
	grpc.ClientConnInterface
	start   time.Time
	mu      sync.Mutex
	started []time.Duration
	names   []string
}

func newServer() *server { return &server{start: time.Now()} }

func (s *server) Invoke(_ context.Context, method string, _, _ any, _ ...grpc.CallOption) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.started = append(s.started, time.Since(s.start))
	s.names = append(s.names, method)
	return nil
}

func (s *server) times() []time.Duration {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Clone(s.started)
}

func (s *server) methods() []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Clone(s.names)
}

var byMethod = interceptor.KeyBy{Method: true}

func mustNew(t testing.TB, cfg Config, opts ...Option) *Layer {
	t.Helper()
	l, err := New(cfg, opts...)
	if err != nil {
		t.Fatalf("New(%+v): %v", cfg, err)
	}
	return l
}

var noWait = interceptor.WithWait(interceptor.None)

func call(conn grpc.ClientConnInterface, opts ...grpc.CallOption) error {
	return conn.Invoke(context.Background(), "/s/m", nil, nil, opts...)
}

func wantOK(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Errorf("got %v, want no error", err)
	}
}

// wantRefused checks a refusal of the rate limit and returns when it says to retry.
func wantRefused(t *testing.T, err error, retryAfter time.Duration) {
	t.Helper()
	var r *interceptor.Refusal
	if !errors.As(err, &r) || r.Reason != interceptor.ReasonRateLimit || !r.NotSent() {
		t.Fatalf("got %v, want a refusal with reason RATE_LIMIT that was not sent", err)
	}
	st := status.Convert(err)
	if st.Code() != codes.ResourceExhausted {
		t.Errorf("code %v, want RESOURCE_EXHAUSTED", st.Code())
	}
	var got time.Duration
	for _, d := range st.Details() {
		if info, ok := d.(*errdetails.RetryInfo); ok {
			got = info.GetRetryDelay().AsDuration()
		}
	}
	want := time.Duration(0)
	if retryAfter > 0 {
		want = retryafter.RoundUp(retryAfter)
	}
	if got != want {
		t.Errorf("RetryInfo says %v, want %v: %v rounded up", got, want, retryAfter)
	}
}

// wantKey checks that a refusal names its key: in a field, in its text, and in the
// metadata of its ErrorInfo.
func wantKey(t *testing.T, err error, key string) {
	t.Helper()
	r, ok := interceptor.AsRefusal(err)
	if !ok || r.Key != key || !strings.Contains(err.Error(), fmt.Sprintf("%q", key)) {
		t.Fatalf("got %v with key %q, want a refusal that names %q", err, r.Key, key)
	}
	for _, d := range status.Convert(err).Details() {
		if info, ok := d.(*errdetails.ErrorInfo); ok && info.GetMetadata()["key"] == key {
			return
		}
	}
	t.Errorf("the status of %v has no ErrorInfo with key %q", err, key)
}

func wantTimes(t *testing.T, got []time.Duration, want ...time.Duration) {
	t.Helper()
	if !slices.Equal(got, want) {
		t.Errorf("calls reached the server at %v, want %v", got, want)
	}
}

// refuseInside refuses what reaches it while on.
type refuseInside struct {
	interceptor.GateOnly
	on atomic.Bool
}

func (l *refuseInside) NewLayer() (interceptor.Layer, error) { return l, nil }

func (l *refuseInside) WrapGate(inner interceptor.Gate) interceptor.Gate {
	no := interceptor.Refuse("inside", interceptor.ReasonShed, "")
	return interceptor.GateFunc(func(ctx context.Context, a *interceptor.Admission, w interceptor.Wait) error {
		if l.on.Load() {
			return no
		}
		return inner.Admit(ctx, a, w)
	})
}

// Tower's reaching_capacity.
func testRateOnePer100Ms(t *testing.T) {
	for _, cfg := range []Config{{Limit: 1, Per: 100 * ms, Algorithm: Window}, {Limit: 1, Per: 100 * ms}} {
		t.Run(cfg.Algorithm.String(), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				srv := newServer()
				conn := calltest.Stack(t, mustNew(t, cfg)).Wrap(srv)
				wantOK(t, call(conn))
				wantRefused(t, call(conn, noWait), 100*ms)
				wantTimes(t, srv.times(), 0)
				wantOK(t, call(conn))
				wantTimes(t, srv.times(), 0, 100*ms)
			})
		})
	}
}

// Tower's remaining_gets_reset.
func testRateWindowPasses(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		conn := calltest.Stack(t, mustNew(t, Config{Limit: 3, Per: 100 * ms, Algorithm: Window})).Wrap(newServer())
		wantOK(t, call(conn))
		time.Sleep(100 * ms)
		for range 3 {
			wantOK(t, call(conn, noWait))
		}
		wantRefused(t, call(conn, noWait), 100*ms)
	})
}

// Tower lets 199 calls of 100 per 200 ms pass within 10 ms around a window's edge.
func testRateWindowHasNoEdge(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		srv := newServer()
		conn := calltest.Stack(t, mustNew(t, Config{Limit: 100, Per: 200 * ms, Algorithm: Window})).Wrap(srv)
		wantOK(t, call(conn))
		time.Sleep(195 * ms)
		for range 10 { // 99 before what Tower takes for the edge, and as many as possible after it.
			for range 200 {
				call(conn, noWait)
			}
			time.Sleep(ms)
		}
		if n := len(srv.times()); n != 101 {
			t.Errorf("%d calls began in 205 ms, want 101: the first and, once it had left the window, 100", n)
		}
		wantWindow(t, srv.times(), 100, 200*ms)
	})
}

// wantWindow checks that no interval of length per has more than limit calls.
func wantWindow(t *testing.T, times []time.Duration, limit int, per time.Duration) {
	t.Helper()
	for i := limit; i < len(times); i++ {
		if d := times[i] - times[i-limit]; d < per {
			t.Fatalf("%d calls began within %v, want at most %d in %v", limit+1, d, limit, per)
		}
	}
}

// wantSmooth checks that no interval of length t has more than burst + t/interval
// calls.
func wantSmooth(t *testing.T, times []time.Duration, burst int, interval time.Duration) {
	t.Helper()
	for i := range times {
		for j := i + burst; j < len(times); j++ {
			if d, want := times[j]-times[i], time.Duration(j-i+1-burst)*interval; d < want {
				t.Fatalf("%d calls began within %v, want at least %v", j-i+1, d, want)
			}
		}
	}
}

func testRateSmoothBurst(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		srv := newServer()
		conn := calltest.Stack(t, mustNew(t, Config{Limit: 10, Burst: 3})).Wrap(srv)
		for range 6 {
			wantOK(t, call(conn))
		}
		wantTimes(t, srv.times(), 0, 0, 0, 100*ms, 200*ms, 300*ms)
		time.Sleep(time.Hour) // No more than the burst is saved.
		for range 3 {
			wantOK(t, call(conn, noWait))
		}
		wantRefused(t, call(conn, noWait), 100*ms)
	})
}

func testRateRandomCallsStayWithinTheBound(t *testing.T) {
	for _, cfg := range []Config{
		{Limit: 7, Per: 100 * ms, Burst: 4},
		{Limit: 3, Per: 10 * ms, Burst: 1},
		{Limit: 5, Per: 50 * ms, Algorithm: Window},
		{Limit: 1, Per: 10 * ms, Algorithm: Window},
		{Limit: 40, Per: 300 * ms, Algorithm: Window},
	} {
		t.Run(fmt.Sprintf("%v_%d_per_%v", cfg.Algorithm, cfg.Limit, cfg.Per), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				seed := rand.Uint64()
				t.Logf("seed %d", seed)
				rng := rand.New(rand.NewPCG(seed, 0))
				inside, srv := new(refuseInside), newServer()
				l := mustNew(t, cfg)
				conn := calltest.Stack(t, l, inside).Wrap(srv)
				var wg sync.WaitGroup
				for range 3000 {
					inside.on.Store(rng.IntN(4) == 0)
					ctx, cancel := context.WithTimeout(context.Background(), time.Duration(rng.IntN(40))*ms)
					wg.Go(func() {
						defer cancel()
						conn.Invoke(ctx, "/s/m", nil, nil) // It may be refused.
					})
					if rng.IntN(3) == 0 {
						synctest.Wait()
					}
					time.Sleep(time.Duration(rng.ExpFloat64() * float64(cfg.Per) / float64(cfg.Limit) / 3))
				}
				wg.Wait()
				if n := l.Waiting(); n != 0 {
					t.Errorf("%d calls wait at the end, want 0", n)
				}
				times := srv.times()
				if len(times) < 500 {
					t.Errorf("%d calls began, want at least 500 of about 1000 tokens", len(times))
				}
				if cfg.Algorithm == Window {
					wantWindow(t, times, cfg.Limit, cfg.Per)
				} else {
					wantSmooth(t, times, cfg.Burst, cfg.Per/time.Duration(cfg.Limit))
				}
			})
		})
	}
}

func testRefundAfterARefusalInside(t *testing.T) {
	for _, algorithm := range []Algorithm{Smooth, Window} {
		t.Run(algorithm.String(), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				inside, srv := new(refuseInside), newServer()
				conn := calltest.Stack(t, mustNew(t, Config{Limit: 2, Algorithm: algorithm}), inside).Wrap(srv)
				inside.on.Store(true)
				for range 10 {
					if r, ok := interceptor.AsRefusal(call(conn, noWait)); !ok || r.Layer != "inside" {
						t.Fatalf("refused by %v, want the layer inside", r)
					}
				}
				inside.on.Store(false)
				wantOK(t, call(conn, noWait))
			})
		})
	}
}

func testRefundOfACancelledCall(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := mustNew(t, Config{Limit: 1})
		conn := calltest.Stack(t, l).Wrap(newServer())
		ctx, cancel := context.WithCancel(context.Background())
		cancel()
		wantOK(t, call(conn))
		if err := conn.Invoke(ctx, "/s/m", nil, nil); status.Code(err) != codes.Canceled {
			t.Errorf("a cancelled call that would have to wait: %v, want CANCELLED", err)
		}
		time.Sleep(time.Second)
		wantOK(t, call(conn, noWait))
	})
}

// start makes calls, one after the other, in the background.
func start(t *testing.T, conn grpc.ClientConnInterface, ctx context.Context, name string) <-chan error {
	t.Helper()
	done := make(chan error, 1)
	go func() { done <- conn.Invoke(ctx, name, nil, nil) }()
	synctest.Wait()
	return done
}

func testQueueFirstComeFirstServed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		srv := newServer()
		conn := calltest.Stack(t, mustNew(t, Config{Limit: 10})).Wrap(srv)
		var done []<-chan error
		for _, m := range []string{"a", "b", "c", "d"} {
			done = append(done, start(t, conn, context.Background(), m))
		}
		for _, d := range done {
			wantOK(t, <-d)
		}
		wantTimes(t, srv.times(), 0, 100*ms, 200*ms, 300*ms)
		if got, want := srv.methods(), []string{"a", "b", "c", "d"}; !slices.Equal(got, want) {
			t.Errorf("served in the order %v, want %v", got, want)
		}
	})
}

func testQueueIsNotOvertakenByCallsThatDoNotWait(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		srv := newServer()
		conn := calltest.Stack(t, mustNew(t, Config{Limit: 10})).Wrap(srv)
		wantOK(t, call(conn))
		a, b := start(t, conn, context.Background(), "a"), start(t, conn, context.Background(), "b")
		time.Sleep(50 * ms)
		wantRefused(t, call(conn, noWait), 250*ms) // After a's turn and b's.
		wantOK(t, <-a)
		wantRefused(t, call(conn, noWait), 200*ms)
		wantOK(t, <-b)
		wantTimes(t, srv.times(), 0, 100*ms, 200*ms)
	})
}

func testQueueMovesUpWhenACallGivesUp(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		srv := newServer()
		l := mustNew(t, Config{Limit: 10})
		conn := calltest.Stack(t, l).Wrap(srv)
		wantOK(t, call(conn))
		ctx, cancel := context.WithCancel(context.Background())
		a, b, c := start(t, conn, ctx, "a"), start(t, conn, context.Background(), "b"), start(t, conn, context.Background(), "c")
		time.Sleep(50 * ms)
		if n := l.Waiting(); n != 3 {
			t.Errorf("Waiting() = %d, want 3", n)
		}
		cancel()
		if err := <-a; status.Code(err) != codes.Canceled {
			t.Errorf("the cancelled call: %v, want CANCELLED", err)
		}
		wantOK(t, <-b)
		wantOK(t, <-c)
		wantTimes(t, srv.times(), 0, 100*ms, 200*ms)
		if n := l.Waiting(); n != 0 {
			t.Errorf("Waiting() = %d, want 0", n)
		}
	})
}

// slowGate holds calls up and then refuses them.
type slowGate struct {
	interceptor.GateOnly
	d time.Duration
}

func (l *slowGate) NewLayer() (interceptor.Layer, error) { return l, nil }

func (l *slowGate) WrapGate(inner interceptor.Gate) interceptor.Gate {
	return interceptor.GateFunc(func(ctx context.Context, a *interceptor.Admission, w interceptor.Wait) error {
		if a.Method() == "slow" {
			time.Sleep(l.d)
			return interceptor.Refuse("slow", interceptor.ReasonShed, "")
		}
		return inner.Admit(ctx, a, w)
	})
}

func testRefundGoesToTheFirstInTheQueue(t *testing.T) {
	for _, algorithm := range []Algorithm{Smooth, Window} {
		t.Run(algorithm.String(), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				srv := newServer()
				conn := calltest.Stack(t, mustNew(t, Config{Limit: 1, Algorithm: algorithm}), &slowGate{d: 300 * ms}).Wrap(srv)
				slow := start(t, conn, context.Background(), "slow")
				a, b := start(t, conn, context.Background(), "a"), start(t, conn, context.Background(), "b")
				if r, ok := interceptor.AsRefusal(<-slow); !ok || r.Layer != "slow" {
					t.Errorf("refused by %v, want slow", r)
				}
				wantOK(t, <-a)
				wantOK(t, <-b)
				wantTimes(t, srv.times(), 300*ms, 1300*ms)
			})
		})
	}
}

func testQueueRefusesAtOnceWhatWouldWaitInVain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		srv := newServer()
		conn := calltest.Stack(t, mustNew(t, Config{Limit: 1})).Wrap(srv)
		wantOK(t, call(conn))
		begin := time.Now()
		for _, d := range []time.Duration{10 * ms, time.Second} { // At its deadline a call is over.
			ctx, cancel := context.WithTimeout(context.Background(), d)
			wantRefused(t, conn.Invoke(ctx, "/s/m", nil, nil), time.Second)
			cancel()
		}
		wantRefused(t, call(conn, interceptor.WithWait(interceptor.For(time.Second-1))), time.Second)
		if d := time.Since(begin); d != 0 {
			t.Errorf("refused after %v, want at once", d)
		}
		ctx, cancel := context.WithTimeout(context.Background(), time.Second+1)
		defer cancel()
		wantOK(t, conn.Invoke(ctx, "/s/m", nil, nil))
		wantOK(t, call(conn, interceptor.WithWait(interceptor.For(time.Second))))
		wantTimes(t, srv.times(), 0, time.Second, 2*time.Second)
	})
}

func testRateTwoStacksShareOne(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := mustNew(t, Config{Limit: 2, Algorithm: Window})
		a, b := calltest.Stack(t, l).Wrap(newServer()), calltest.Stack(t, l).Wrap(newServer())
		wantOK(t, call(a, noWait))
		wantOK(t, call(b, noWait))
		wantRefused(t, call(a, noWait), time.Second)
		wantRefused(t, call(b, noWait), time.Second)
	})
}

func testRateConcurrentCalls(t *testing.T) {
	for _, algorithm := range []Algorithm{Smooth, Window} {
		t.Run(algorithm.String(), func(t *testing.T) {
			l := mustNew(t, Config{Limit: 1000, Per: time.Hour, Algorithm: algorithm})
			var n, taken atomic.Int64
			var wg sync.WaitGroup
			for range 8 {
				wg.Go(func() {
					for range 1000 {
						at, ok := l.one.src.take(interceptor.Now())
						if !ok {
							continue
						}
						if taken.Add(1)%3 == 0 {
							l.one.src.refund(at)
							continue
						}
						n.Add(1)
					}
				})
			}
			wg.Wait()
			least, most := int64(1000), int64(1000)
			if algorithm == Smooth {
				least, most = 99, 100 // The default burst; one token may come back too late.
			}
			if got := n.Load(); got < least || got > most {
				t.Errorf("%d tokens taken and kept, want from %d to %d", got, least, most)
			}
		})
	}
}

func testUpdateHigherLimitHoldsForCallsThatWait(t *testing.T) {
	for _, algorithm := range []Algorithm{Smooth, Window} {
		t.Run(algorithm.String(), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				srv := newServer()
				l := mustNew(t, Config{Limit: 1, Algorithm: algorithm})
				conn := calltest.Stack(t, l).Wrap(srv)
				wantOK(t, call(conn))
				a, b := start(t, conn, context.Background(), "a"), start(t, conn, context.Background(), "b")
				time.Sleep(500 * ms) // Half a token.
				want := []time.Duration{0, 550 * ms, 650 * ms}
				cfg := Config{Limit: 10, Burst: 1}
				if algorithm == Window {
					want = []time.Duration{0, 500 * ms, 500 * ms}
					cfg = Config{Limit: 10, Algorithm: Window}
				}
				wantOK(t, l.Update(cfg))
				wantOK(t, <-a)
				wantOK(t, <-b)
				wantTimes(t, srv.times(), want...)
			})
		})
	}
}

func testUpdateLowerLimitRefusesCallsThatWouldWaitInVain(t *testing.T) {
	for _, algorithm := range []Algorithm{Smooth, Window} {
		t.Run(algorithm.String(), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				srv := newServer()
				l := mustNew(t, Config{Limit: 10, Per: time.Second, Burst: 0, Algorithm: algorithm})
				conn := calltest.Stack(t, l).Wrap(srv)
				n := 10
				if algorithm == Smooth {
					n = 1
				}
				for range n {
					wantOK(t, call(conn))
				}
				ctx, cancel := context.WithTimeout(context.Background(), 1500*ms)
				defer cancel()
				a, b := start(t, conn, ctx, "a"), start(t, conn, context.Background(), "b")
				wantOK(t, l.Update(Config{Limit: 1, Per: 2 * time.Second, Algorithm: algorithm}))
				wantRefused(t, <-a, 2*time.Second)
				wantOK(t, <-b)
				if got := srv.times(); got[len(got)-1] != 2*time.Second {
					t.Errorf("the other waiter began at %v, want 2s", got[len(got)-1])
				}
			})
		})
	}
}

func testUpdateKeepsWhatWasTaken(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := mustNew(t, Config{Limit: 10, Burst: 10})
		conn := calltest.Stack(t, l).Wrap(newServer())
		for range 6 {
			wantOK(t, call(conn, noWait))
		}
		wantOK(t, l.Update(Config{Limit: 20, Burst: 8})) // 6 of them are taken.
		wantOK(t, call(conn, noWait))
		wantOK(t, call(conn, noWait))
		wantRefused(t, call(conn, noWait), 50*ms)
		wantOK(t, l.Update(Config{Limit: 20, Burst: 2})) // No more than all can be missing.
		wantRefused(t, call(conn, noWait), 50*ms)
		time.Sleep(100 * ms)
		wantOK(t, call(conn, noWait))
		wantOK(t, call(conn, noWait))
		wantRefused(t, call(conn, noWait), 50*ms)
		want := Config{Limit: 20, Burst: 2} // As it was given.
		if got := l.Config(); !reflect.DeepEqual(got, want) {
			t.Errorf("Config() = %+v, want %+v", got, want)
		}
	})
}

func testConfigBadValuesAreErrors(t *testing.T) {
	for _, tt := range []struct {
		cfg  Config
		want string
	}{
		{Config{}, "Limit is 0"},
		{Config{Limit: -1}, "Limit is -1"},
		{Config{Limit: 1e9 + 1}, "Limit is 1000000001"},
		{Config{Limit: 1e6 + 1, Algorithm: Window}, "Limit is 1000001"},
		{Config{Limit: 1e8, Per: ms}, "Limit is 100000000"},
		{Config{Limit: 1, Per: -1}, "Per is -1ns"},
		{Config{Limit: 1, Per: 1}, "Per is 1ns"},
		{Config{Limit: 1, Per: maxPer + 1}, "Per is 8760h0m0.000000001s"},
		{Config{Limit: 1, Burst: -1}, "Burst is -1"},
		{Config{Limit: 1, Burst: 1e9 + 1}, "Burst is 1000000001"},
		{Config{Limit: 1, Per: time.Hour, Burst: 8761}, "Burst is 8761"},
		{Config{Limit: 1, Burst: 1, Algorithm: Window}, "Burst is 1"},
		{Config{Limit: 1, Algorithm: 7}, "Algorithm is Algorithm(7)"},
		{Config{Limit: 1, KeyBy: interceptor.KeyBy{Method: true, Metadata: "x"}}, `KeyBy is Method and Metadata "x"`},
		{Config{Limit: 1, MaxKeys: -1}, "MaxKeys is -1"},
		{Config{Limit: 1, MaxKeys: 1e6 + 1}, "MaxKeys is 1000001"},
	} {
		l := mustNew(t, Config{Limit: 5})
		before := l.Config()
		for what, err := range map[string]error{
			"New":    func() error { _, err := New(tt.cfg); return err }(),
			"Update": l.Update(tt.cfg),
		} {
			if err == nil || !strings.HasPrefix(err.Error(), "ratelimit: "+tt.want) {
				t.Errorf("%s(%+v): %v, want an error that begins with %q", what, tt.cfg, err, "ratelimit: "+tt.want)
			}
		}
		if !reflect.DeepEqual(l.Config(), before) {
			t.Errorf("after a bad Update: %+v, want %+v", l.Config(), before)
		}
	}
	for _, cfg := range []Config{
		{Limit: 1, Algorithm: Window}, {Limit: 1, KeyBy: byMethod}, {Limit: 1, KeyBy: byName},
	} {
		if err := mustNew(t, Config{Limit: 1}).Update(cfg); err == nil || !strings.Contains(err.Error(), "must stay") {
			t.Errorf("Update(%+v): %v, want an error: it cannot change", cfg, err)
		}
	}
	if _, err := New(Config{Limit: 1}, WithFailOpen()); err == nil {
		t.Error("New with WithFailOpen returned no error")
	}
}

func testConfigEmptyName(t *testing.T) {
	_, ofNew := New(Config{Limit: 1}, WithName(""))
	_, ofRate := FromRate(rate.NewLimiter(1, 1), WithName("")).NewLayer()
	_, ofLimiter := FromLimiter(&store{}, interceptor.KeyBy{}, WithName("")).NewLayer()
	for _, err := range []error{ofNew, ofRate, ofLimiter} {
		if err == nil || !strings.Contains(err.Error(), `ratelimit: WithName is ""`) {
			t.Errorf("with an empty name: %v, want an error that names WithName", err)
		}
	}
}

func testKeysMethod(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := mustNew(t, Config{Limit: 1, KeyBy: byMethod})
		conn := calltest.Stack(t, l).Wrap(newServer())
		for _, m := range []string{"/s/a", "/s/b"} {
			wantOK(t, conn.Invoke(context.Background(), m, nil, nil, noWait))
		}
		wantRefused(t, conn.Invoke(context.Background(), "/s/a", nil, nil, noWait), time.Second)
		if n := l.Keys(); n != 2 {
			t.Errorf("Keys() = %d, want 2", n)
		}
	})
}

func testKeysMetadata(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		conn := calltest.Stack(t, mustNew(t, Config{Limit: 1, KeyBy: interceptor.KeyBy{Metadata: "Tenant"}})).Wrap(newServer())
		as := func(tenant string) error {
			ctx := metadata.AppendToOutgoingContext(context.Background(), "tenant", tenant)
			return conn.Invoke(ctx, "/s/m", nil, nil, noWait)
		}
		wantOK(t, as("a"))
		wantOK(t, as("b"))
		wantOK(t, call(conn, noWait)) // None is a key too.
		wantRefused(t, as("a"), time.Second)
		wantRefused(t, call(conn, noWait), time.Second)
	})
}

// byName takes the method's name for the key.
var byName = interceptor.KeyBy{Func: func(_ context.Context, a *interceptor.Admission) string { return a.Method() }}

func testKeysBeyondTheBoundShareARate(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := mustNew(t, Config{Limit: 1, MaxKeys: 2, KeyBy: byName})
		conn := calltest.Stack(t, l).Wrap(newServer())
		as := func(key string) error { return conn.Invoke(context.Background(), key, nil, nil, noWait) }
		wantOK(t, as("a"))
		time.Sleep(500 * ms)
		wantOK(t, as("b"))
		wantOK(t, as("c")) // The rest's one token,
		wantRefused(t, as("d"), time.Second)
		wantRefused(t, as("b"), time.Second)
		wantRefused(t, as("a"), 500*ms) // and a is not forgiven anything.
		time.Sleep(500 * ms)            // a's token has come: it is idle.
		wantOK(t, as("d"))              // Its place,
		wantRefused(t, as("d"), time.Second)
		wantRefused(t, as("a"), 500*ms) // and a shares now what c has taken.
		if n := l.Keys(); n != 2 {
			t.Errorf("Keys() = %d, want 2", n)
		}
	})
}

func testKeysIdleOnesAreDropped(t *testing.T) {
	for _, algorithm := range []Algorithm{Smooth, Window} {
		synctest.Test(t, func(t *testing.T) {
			l := mustNew(t, Config{Limit: 1, Algorithm: algorithm, KeyBy: byName})
			conn := calltest.Stack(t, l).Wrap(newServer())
			most := 0
			for i := range 5000 { // Ten keys a second, of which ten are in use.
				wantOK(t, conn.Invoke(context.Background(), fmt.Sprint(i), nil, nil))
				time.Sleep(100 * ms)
				most = max(most, l.Keys())
			}
			if most > 500 {
				t.Errorf("%v: up to %d keys were kept, want some 10 and at most 500", algorithm, most)
			}
		})
	}
}

func testKeysAreKeptWhileCallsWait(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := mustNew(t, Config{Limit: 1, MaxKeys: 1, KeyBy: byName})
		srv := newServer()
		conn := calltest.Stack(t, l).Wrap(srv)
		wantOK(t, conn.Invoke(context.Background(), "a", nil, nil))
		a := start(t, conn, context.Background(), "a")
		wantOK(t, conn.Invoke(context.Background(), "b", nil, nil))
		b := start(t, conn, context.Background(), "b")
		if n := l.Waiting(); n != 2 {
			t.Errorf("Waiting() = %d, want 2", n)
		}
		wantOK(t, l.Update(Config{Limit: 10, MaxKeys: 1, KeyBy: byName}))
		wantOK(t, <-a)
		wantOK(t, <-b)
		wantTimes(t, srv.times(), 0, 0, 100*ms, 100*ms)
	})
}

func testKeysComeAndGoConcurrently(t *testing.T) {
	l := mustNew(t, Config{Limit: 1000, Per: ms, Burst: 1, MaxKeys: 50, KeyBy: byName})
	conn := calltest.Stack(t, l).Wrap(newServer())
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	var wg sync.WaitGroup
	for i := range 8 {
		rng := rand.New(rand.NewPCG(seed, uint64(i)))
		wg.Go(func() {
			for range 2000 {
				conn.Invoke(context.Background(), fmt.Sprint(rng.IntN(200)), nil, nil)
			}
		})
	}
	wg.Wait()
	if n := l.Keys(); n > 50 {
		t.Errorf("Keys() = %d, want at most 50", n)
	}
	if n := l.keys.Pins(); n != 0 {
		t.Errorf("%d calls use a queue at rest, want 0", n)
	}
}

// stream is a stream of three responses.
type streams struct {
	grpc.ClientConnInterface
}

func (streams) NewStream(ctx context.Context, _ *grpc.StreamDesc, _ string, _ ...grpc.CallOption) (grpc.ClientStream, error) {
	return &stream{ctx: ctx, left: 3}, nil
}

type stream struct {
	grpc.ClientStream
	ctx  context.Context
	left int
}

func (s *stream) RecvMsg(any) error {
	if s.left--; s.left < 0 {
		return io.EOF
	}
	return nil
}

func testRateStreamTakesOneToken(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		conn := calltest.Stack(t, mustNew(t, Config{Limit: 2, Burst: 2})).Wrap(streams{})
		for range 2 {
			s, err := conn.NewStream(context.Background(), &grpc.StreamDesc{ServerStreams: true}, "/s/m", noWait)
			if err != nil {
				t.Fatalf("NewStream: %v", err)
			}
			for err == nil {
				err = s.RecvMsg(nil)
			}
			if err != io.EOF {
				t.Errorf("the stream ended with %v, want io.EOF", err)
			}
		}
		_, err := conn.NewStream(context.Background(), &grpc.StreamDesc{ServerStreams: true}, "/s/m", noWait)
		wantRefused(t, err, 500*ms)
	})
}

func testFromRateWaitsRefusesAndRefunds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		srv, inside := newServer(), new(refuseInside)
		lim := rate.NewLimiter(10, 2)
		stack := calltest.Stack(t, FromRate(lim, WithName("xrate")), inside)
		if got := stack.String(); !strings.HasPrefix(got, "[xrate > ") {
			t.Errorf("String() = %q, want the layer's name in it", got)
		}
		conn := stack.Wrap(srv)
		inside.on.Store(true)
		for range 10 {
			call(conn, noWait) // Refused further in.
		}
		if got := lim.Tokens(); got != 2 {
			t.Errorf("%v tokens after refusals further in, want 2", got)
		}
		inside.on.Store(false)
		for range 4 {
			wantOK(t, call(conn))
		}
		wantRefused(t, call(conn, noWait), 100*ms)
		wantTimes(t, srv.times(), 0, 0, 100*ms, 200*ms)
		lim.SetLimit(0)
		wantRefused(t, call(conn), 0)
		lim.SetLimit(rate.Inf)
		for range 10 {
			wantOK(t, call(conn, noWait))
		}
	})
}

func testFromRateChangedWhileCallsWait(t *testing.T) {
	for name, change := range map[string]func(*rate.Limiter){
		"slower":  func(l *rate.Limiter) { l.SetLimit(0.001) },
		"stopped": func(l *rate.Limiter) { l.SetLimit(0) },
		"drained": func(l *rate.Limiter) { l.ReserveN(time.Now(), 1) },
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				lim := rate.NewLimiter(1, 1)
				l := FromRate(lim)
				conn := calltest.Stack(t, l).Wrap(newServer())
				wantOK(t, call(conn))
				start := time.Now()
				time.AfterFunc(500*ms, func() { change(lim) })
				err := call(conn, interceptor.WithWait(interceptor.For(1500*ms)))
				if d := time.Since(start); d != 1500*ms {
					t.Errorf("a call that may wait 1.5s ended after %v with %v", d, err)
				}
				var r *interceptor.Refusal
				if !errors.As(err, &r) || r.Reason != interceptor.ReasonRateLimit || (r.RetryAfter == 0) != (name == "stopped") {
					t.Errorf("it ended with %v, want a refusal with reason RATE_LIMIT, and when to retry if that is known", err)
				}
				if n := l.(*rateLayer).queue.waiting.Load(); n != 0 {
					t.Errorf("%d calls wait, want none", n)
				}
			})
		})
	}
}

func testFromRateResumedWhileCallsWait(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		srv, lim := newServer(), rate.NewLimiter(1, 1)
		conn := calltest.Stack(t, FromRate(lim)).Wrap(srv)
		wantOK(t, call(conn))
		time.AfterFunc(500*ms, func() { lim.SetLimit(0) })
		time.AfterFunc(5*time.Second, func() { lim.SetLimit(rate.Inf) })
		ctx, cancel := context.WithTimeout(context.Background(), time.Hour)
		defer cancel()
		wantOK(t, conn.Invoke(ctx, "/s/m", nil, nil))
		if at := srv.times()[1]; at > 6*time.Second {
			t.Errorf("the call was sent at %v, want within a second of when the limiter went on at 5s", at)
		}
	})
}

func testConfigBadArgumentsAreErrors(t *testing.T) {
	two := interceptor.KeyBy{Method: true, Metadata: "x"}
	for what, tt := range map[string]struct {
		spec interceptor.Spec
		want string
	}{
		"FromRate(nil)":               {FromRate(nil), "FromRate.limiter is nil"},
		"FromRate with WithFailOpen":  {FromRate(rate.NewLimiter(1, 1), WithFailOpen()), "WithFailOpen is set"},
		"FromLimiter(nil)":            {FromLimiter(nil, interceptor.KeyBy{}), "FromLimiter.limiter is nil"},
		"FromLimiter of a nil *store": {FromLimiter((*store)(nil), interceptor.KeyBy{}), "FromLimiter.limiter is nil"},
		"FromLimiter with two keys":   {FromLimiter(&store{}, two), "FromLimiter.by is Method and"},
		"WithPriority(nil)":           {FromRate(rate.NewLimiter(1, 1), WithPriority(nil)), "WithPriority is nil"},
	} {
		if _, err := tt.spec.NewLayer(); err == nil || !strings.HasPrefix(err.Error(), "ratelimit: "+tt.want) {
			t.Errorf("%s: %v, want an error that begins with %q", what, err, "ratelimit: "+tt.want)
		}
	}
}

// store is a Limiter with a number of tokens for each key, and one more every
// retry.
type store struct {
	mu     sync.Mutex
	tokens map[string]int
	retry  time.Duration
	err    error
	asked  int
}

func (s *store) Take(ctx context.Context, key string) (Decision, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.asked++
	switch {
	case s.err != nil:
		return Decision{}, s.err
	case s.tokens[key] == 0:
		return Decision{RetryAfter: s.retry}, nil
	}
	s.tokens[key]--
	return Decision{OK: true}, nil
}

func (s *store) Refund(key string) { s.add(key) }

func (s *store) add(key string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.tokens[key]++
}

func testFromLimiterIsAskedAgain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		srv, inside := newServer(), new(refuseInside)
		st := &store{tokens: map[string]int{"/s/m": 1}, retry: 70 * ms}
		conn := calltest.Stack(t, FromLimiter(st, byMethod), inside).Wrap(srv)
		inside.on.Store(true)
		call(conn)
		inside.on.Store(false)
		wantOK(t, call(conn)) // With the token that came back.
		wantRefused(t, call(conn, noWait), 70*ms)
		wantRefused(t, call(conn, interceptor.WithWait(interceptor.For(69*ms))), 70*ms)
		time.AfterFunc(200*ms, func() { st.add("/s/m") })
		wantOK(t, call(conn))
		wantTimes(t, srv.times(), 0, 210*ms)

		st.retry = 0 // It does not know.
		time.AfterFunc(250*ms, func() { st.add("/s/m") })
		wantOK(t, call(conn))
		wantTimes(t, srv.times(), 0, 210*ms, 510*ms)
		wantRefused(t, call(conn, noWait), 0)

		ctx, cancel := context.WithCancel(context.Background())
		time.AfterFunc(50*ms, cancel)
		if err := conn.Invoke(ctx, "/s/m", nil, nil); status.Code(err) != codes.Canceled {
			t.Errorf("cancelled while waiting: %v, want CANCELLED", err)
		}
	})
}

func testFromLimiterFailsClosedOrOpen(t *testing.T) {
	down := errors.New("the store is down")
	for _, tt := range []struct {
		opts []Option
		want codes.Code
	}{
		{nil, codes.Unavailable},
		{[]Option{WithFailOpen()}, codes.OK},
	} {
		st := &store{tokens: map[string]int{}, err: down}
		err := call(calltest.Stack(t, FromLimiter(st, interceptor.KeyBy{}, tt.opts...)).Wrap(newServer()))
		if status.Code(err) != tt.want || err != nil && !errors.Is(err, down) {
			t.Errorf("with a limiter that fails: %v, want %v and the limiter's error in it", err, tt.want)
		}
	}
}

func testFromLimiterFailingOpenGivesNothingBack(t *testing.T) {
	st, inside := &store{tokens: map[string]int{}, err: errors.New("down")}, new(refuseInside)
	inside.on.Store(true)
	conn := calltest.Stack(t, FromLimiter(st, interceptor.KeyBy{}, WithFailOpen()), inside).Wrap(newServer())
	if r, ok := interceptor.AsRefusal(call(conn)); !ok || r.Layer != "inside" {
		t.Fatalf("refused by %v, want the layer inside", r)
	}
	if n := st.tokens[""]; n != 0 {
		t.Errorf("%d tokens were given back that were not taken", n)
	}
}

func testFromLimiterThatDoesNotSayWhenIsAskedAgain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		st, srv := &store{tokens: map[string]int{}}, newServer()
		conn := calltest.Stack(t, FromLimiter(st, interceptor.KeyBy{})).Wrap(srv)
		ctx, cancel := context.WithTimeout(context.Background(), time.Second)
		defer cancel()
		time.AfterFunc(250*ms, func() { st.add("") })
		wantOK(t, conn.Invoke(ctx, "/s/m", nil, nil))
		wantTimes(t, srv.times(), 300*ms)
		start, asked := time.Now(), st.asked
		wantRefused(t, conn.Invoke(ctx, "/s/m", nil, nil), 0)
		if d := time.Since(start); d != 600*ms || st.asked-asked != 7 {
			t.Errorf("refused after %v and %d questions, want 600ms and 7: once more would be at the deadline", d, st.asked-asked)
		}
	})
}

func testFromLimiterThatSaysAtOnceIsNotAskedInALoop(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		st := &store{retry: time.Microsecond}
		conn := calltest.Stack(t, FromLimiter(st, interceptor.KeyBy{})).Wrap(newServer())
		wantRefused(t, call(conn, interceptor.WithWait(interceptor.For(100*ms))), time.Microsecond)
		if st.asked > 101 {
			t.Errorf("asked %d times in 100 ms, want at most once in a millisecond", st.asked)
		}
	})
}

// slowly is a Limiter that takes d to let a call pass.
type slowly time.Duration

func (d slowly) Take(context.Context, string) (Decision, error) {
	time.Sleep(time.Duration(d))
	return Decision{OK: true}, nil
}

func (slowly) Refund(string) {}

// A rate inside a limiter that takes its time takes the token of the moment in which
// the call is sent, not of the one in which it arrived.
func testFromLimiterThatIsSlow(t *testing.T) {
	for _, d := range []time.Duration{ms / 2, 500 * ms} {
		synctest.Test(t, func(t *testing.T) {
			// Its Burst is one token, so calls are at least an interval of d apart.
			obs, rate, srv := new(watcher), mustNew(t, Config{Limit: int(time.Second / d), Burst: 1}), newServer()
			early := mustNew(t, Config{Limit: 1000, Burst: 1000}) // Reads the clock.
			slow := calltest.Stack(t, interceptor.Observe(obs), early, FromLimiter(slowly(d), interceptor.KeyBy{}), rate).Wrap(srv)
			wantOK(t, call(slow))
			wantOK(t, call(calltest.Stack(t, rate).Wrap(srv)))
			wantTimes(t, srv.times(), d, 2*d)
			var want []string
			if d >= ms {
				want = []string{"ratelimit waited 500ms"}
			}
			if !slices.Equal(obs.log, want) {
				t.Errorf("observed %q, want %q", obs.log, want)
			}
		})
	}
}

func testFromLimiterRefusalNamesTheKey(t *testing.T) {
	conn := calltest.Stack(t, FromLimiter(&store{retry: ms}, byMethod)).Wrap(newServer())
	wantKey(t, call(conn, noWait), "/s/m")
}

// watcher notes what an observer of a rate limit sees.
type watcher struct {
	interceptor.NopObserver
	mu  sync.Mutex
	log []string
}

func (w *watcher) add(format string, args ...any) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.log = append(w.log, fmt.Sprintf(format, args...))
}

func (w *watcher) Waited(_ interceptor.Observed, layer string, d time.Duration) {
	w.add("%s waited %v", layer, d)
}
func (w *watcher) Refused(_ interceptor.Observed, r *interceptor.Refusal) {
	w.add("%s refused %s", r.Layer, r.Reason)
}

func testQueueIsObserved(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		obs := new(watcher)
		conn := calltest.Stack(t, interceptor.Observe(obs), mustNew(t, Config{Limit: 10})).Wrap(newServer())
		call(conn)
		call(conn)
		call(conn, noWait)
		want := []string{"ratelimit waited 100ms", "ratelimit refused RATE_LIMIT"}
		if !slices.Equal(obs.log, want) {
			t.Errorf("observed %q, want %q", obs.log, want)
		}
	})
}

// slots is a gate whose calls wait in a slot, and how often that was passed.
type slots struct {
	interceptor.GateOnly
	passed atomic.Int64
}

func (p *slots) NewLayer() (interceptor.Layer, error) { return p, nil }
func (p *slots) Pass()                                { p.passed.Add(1) }

func (p *slots) WrapGate(inner interceptor.Gate) interceptor.Gate {
	return interceptor.GateFunc(func(ctx context.Context, a *interceptor.Admission, w interceptor.Wait) error {
		before := a.Internals().SetSlot(p)
		defer a.Internals().SetSlot(before)
		return inner.Admit(ctx, a, w)
	})
}

func testQueuePassesASlotOnceForEachAdmission(t *testing.T) {
	for name, newLayer := range map[string]func() interceptor.Spec{
		"smooth": func() interceptor.Spec { return mustNew(t, Config{Limit: 10}) },
		"keyed":  func() interceptor.Spec { return mustNew(t, Config{Limit: 10, KeyBy: byMethod}) },
		"x/time": func() interceptor.Spec { return FromRate(rate.NewLimiter(10, 1)) },
		"elsewhere": func() interceptor.Spec {
			st := &store{tokens: map[string]int{"": 1}, retry: 100 * ms}
			time.AfterFunc(100*ms, func() { st.add("") })
			return FromLimiter(st, interceptor.KeyBy{})
		},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				p := new(slots)
				conn := calltest.Stack(t, p, newLayer()).Wrap(newServer())
				wantOK(t, call(conn))
				if n := p.passed.Load(); n != 1 {
					t.Errorf("the slot was passed %d times by a call that did not wait, want once", n)
				}
				wantOK(t, call(conn))
				if n := p.passed.Load(); n != 2 {
					t.Errorf("the slot was passed %d times by two calls, want twice", n)
				}
				wantRefused(t, call(conn, noWait), 100*ms)
				ctx, cancel := context.WithTimeout(context.Background(), time.Hour)
				done := start(t, conn, ctx, "/s/m")
				cancel()
				<-done
				if n := p.passed.Load(); n != 2 {
					t.Errorf("the slot was passed %d times, want twice: the others were not admitted", n)
				}
			})
		})
	}
}

func TestConformance(t *testing.T) {
	st := func() *store { return &store{tokens: map[string]int{"": 200}, retry: ms} }
	for name, newLayer := range map[string]func(t *testing.T) (interceptor.Spec, func() error){
		"smooth": func(t *testing.T) (interceptor.Spec, func() error) {
			l := mustNew(t, Config{Limit: 5000, Burst: 100})
			return l, atRest(l)
		},
		"window": func(t *testing.T) (interceptor.Spec, func() error) {
			l := mustNew(t, Config{Limit: 300, Per: 100 * ms, Algorithm: Window})
			return l, atRest(l)
		},
		"keyed": func(t *testing.T) (interceptor.Spec, func() error) {
			l := mustNew(t, Config{Limit: 2000, KeyBy: byMethod, MaxKeys: 10})
			return l, atRest(l)
		},
		"x/time": func(t *testing.T) (interceptor.Spec, func() error) {
			l := FromRate(rate.NewLimiter(5000, 10))
			return l, func() error {
				if n := l.(*rateLayer).queue.waiting.Load(); n != 0 {
					return fmt.Errorf("%d calls wait", n)
				}
				return nil
			}
		},
		"elsewhere": func(t *testing.T) (interceptor.Spec, func() error) {
			l, err := FromLimiter(st(), interceptor.KeyBy{}).NewLayer()
			if err != nil {
				t.Fatal(err)
			}
			return &bounded{l}, nil
		},
	} {
		t.Run(name, func(t *testing.T) {
			layertest.Run(t, func() (interceptor.Spec, func() error) { return newLayer(t) })
		})
	}
}

// bounded lets no call wait, for a store whose tokens run out.
type bounded struct{ interceptor.Layer }

func (b *bounded) NewLayer() (interceptor.Layer, error) { return b, nil }

func (b *bounded) WrapGate(inner interceptor.Gate) interceptor.Gate {
	g := b.Layer.WrapGate(inner)
	return interceptor.GateFunc(func(ctx context.Context, a *interceptor.Admission, w interceptor.Wait) error {
		return g.Admit(ctx, a, interceptor.None)
	})
}

func atRest(l *Layer) func() error {
	return func() error {
		if n := l.Waiting(); n != 0 {
			return fmt.Errorf("%d calls wait", n)
		}
		if l.keys != nil && l.keys.Pins() != 0 {
			return fmt.Errorf("%d calls use a queue", l.keys.Pins())
		}
		return nil
	}
}

func cases(t testing.TB) map[string]grpc.UnaryClientInterceptor {
	m := map[string]grpc.UnaryClientInterceptor{}
	for name, l := range map[string]interceptor.Spec{
		"smooth/admitting":      mustNew(t, Config{Limit: 1e9, Burst: 1e9}),
		"smooth/refusing":       mustNew(t, Config{Limit: 1, Per: time.Hour}),
		"window/admitting":      mustNew(t, Config{Limit: 100_000, Per: ms, Algorithm: Window}),
		"window/refusing":       mustNew(t, Config{Limit: 1, Per: time.Hour, Algorithm: Window}),
		"by_method/admitting":   mustNew(t, Config{Limit: 1e9, Burst: 1e9, KeyBy: byMethod}),
		"by_method/refusing":    mustNew(t, Config{Limit: 1, Per: time.Hour, KeyBy: byMethod}),
		"x_time_rate/admitting": FromRate(rate.NewLimiter(1e12, 1e6)),
		"x_time_rate/refusing":  FromRate(rate.NewLimiter(rate.Every(time.Hour), 1)),
	} {
		m[name] = calltest.Stack(t, l).UnaryClientInterceptor()
	}
	m["no_layer"] = calltest.Stack(t).UnaryClientInterceptor()
	return m
}

func TestNoGateAllocatesAdmittedOrRefused(t *testing.T) {
	if race.Enabled {
		t.Skip("the race detector allocates")
	}
	ctx, opts := context.Background(), []grpc.CallOption{noWait}
	for name, unary := range cases(t) {
		if n := testing.AllocsPerRun(1000, func() { unary(ctx, "/s/m", nil, nil, nil, calltest.Noop, opts...) }); n != 0 {
			t.Errorf("%s: %v allocations a call, want 0", name, n)
		}
	}
}

func BenchmarkUnary(b *testing.B) {
	m := cases(b)
	names := make([]string, 0, len(m))
	for name := range m {
		names = append(names, name)
	}
	slices.Sort(names)
	for _, name := range names {
		ctx, cancel := context.WithTimeout(context.Background(), time.Hour)
		opts := []grpc.CallOption{noWait}
		b.Run(name, func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				m[name](ctx, "/s/m", nil, nil, nil, calltest.Noop, opts...)
			}
		})
		b.Run(name+"/parallel", func(b *testing.B) {
			b.ReportAllocs()
			b.RunParallel(func(pb *testing.PB) {
				for pb.Next() {
					m[name](ctx, "/s/m", nil, nil, nil, calltest.Noop, opts...)
				}
			})
		})
		cancel()
	}
}

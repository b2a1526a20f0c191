// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package breaker

import (
	"context"
	"fmt"
	"io"
	"maps"
	"math"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/belfry-go/belfry/interceptor"
	"github.com/belfry-go/belfry/interceptor/layertest"
	"github.com/belfry-go/belfry/internal/check"
	"github.com/belfry-go/belfry/internal/test/calltest"
	"github.com/belfry-go/belfry/internal/test/leaktest"
)

func TestMain(m *testing.M) { leaktest.Main(m) }

func TestTrip(t *testing.T) {
	t.Run("consecutive_failures", testTripConsecutiveFailures)
	t.Run("RESOURCE_EXHAUSTED_is_no_part_of_a_run", testTripRESOURCEEXHAUSTEDIsNoPartOfARun)
	t.Run("RESOURCE_EXHAUSTED_counts_in_the_ratio", testTripRESOURCEEXHAUSTEDCountsInTheRatio)
	t.Run("failure_ratio_of_the_least_number_of_calls", testTripFailureRatioOfTheLeastNumberOfCalls)
	t.Run("failure_ratio_is_exact", testTripFailureRatioIsExact)
	t.Run("window_forgets", testTripWindowForgets)
	t.Run("slow_calls_that_succeed", testTripSlowCallsThatSucceed)
	t.Run("by_hand", testTripByHand)
	t.Run("calls_from_before_it_do_not_count", testTripCallsFromBeforeItDoNotCount)
}

func TestStream(t *testing.T) {
	t.Run("without_a_response_is_judged_by_its_end", testStreamWithoutAResponseIsJudgedByItsEnd)
	t.Run("is_judged_by_its_first_response_only", testStreamIsJudgedByItsFirstResponseOnly)
	t.Run("is_a_probe_by_its_first_response", testStreamIsAProbeByItsFirstResponse)
}

func TestOutcome(t *testing.T) {
	t.Run("cancelled_and_not_sent", testOutcomeCancelledAndNotSent)
	t.Run("the_callers_deadline", testOutcomeTheCallersDeadline)
	t.Run("deadline_of_a_layer", testOutcomeDeadlineOfALayer)
	t.Run("no_connection", testOutcomeNoConnection)
}

func TestOpen(t *testing.T) {
	t.Run("refuses_and_says_for_how_long", testOpenRefusesAndSaysForHowLong)
	t.Run("longer_after_each_failed_probe", testOpenLongerAfterEachFailedProbe)
	t.Run("jitter_only_shortens", testOpenJitterOnlyShortens)
	t.Run("delay_never_overflows", testOpenDelayNeverOverflows)
}

func TestHalfOpen(t *testing.T) {
	t.Run("closes_when_all_probes_succeed", testHalfOpenClosesWhenAllProbesSucceed)
	t.Run("opens_at_the_first_failed_probe", testHalfOpenOpensAtTheFirstFailedProbe)
	t.Run("probe_that_says_nothing_is_replaced", testHalfOpenProbeThatSaysNothingIsReplaced)
	t.Run("slow_probe_fails", testHalfOpenSlowProbeFails)
	t.Run("probe_given_up_fails_if_it_was_slow", testHalfOpenProbeGivenUpFailsIfItWasSlow)
	t.Run("of_many_calls_exactly_the_probes_pass", testHalfOpenOfManyCallsExactlyTheProbesPass)
	t.Run("probes_that_do_not_end_let_more_pass", testHalfOpenProbesThatDoNotEndLetMorePass)
}

func TestKeys(t *testing.T) {
	t.Run("have_circuits_of_their_own", testKeysHaveCircuitsOfTheirOwn)
}

func TestConfig(t *testing.T) {
	t.Run("update_keeps_states_and_counts", testConfigUpdateKeepsStatesAndCounts)
	t.Run("fewer_probes_close_a_half_open_circuit", testConfigFewerProbesCloseAHalfOpenCircuit)
	t.Run("bad_values_are_errors", testConfigBadValuesAreErrors)
	t.Run("empty_name", testConfigEmptyName)
}

func TestState(t *testing.T) {
	t.Run("names", testStateNames)
	t.Run("changes_arrive_in_order", testStateChangesArriveInOrder)
}

const method = "/s/m"

// server is a connection that answers with what answer says, after delay.
type server struct {
	delay  time.Duration
	answer error
	calls  int
	ends   chan error // How a stream ends that is read from.
}

func (s *server) Invoke(ctx context.Context, _ string, _, _ any, _ ...grpc.CallOption) error {
	s.calls++
	answer := s.answer // As it is when the call begins.
	if s.delay > 0 {
		select {
		case <-time.After(s.delay):
		case <-ctx.Done():
			return status.FromContextError(ctx.Err()).Err()
		}
	}
	return answer
}

func (s *server) NewStream(ctx context.Context, _ *grpc.StreamDesc, _ string, _ ...grpc.CallOption) (grpc.ClientStream, error) {
	s.calls++
	return &stream{ctx: ctx, ends: s.ends}, nil
}

type stream struct {
	grpc.ClientStream
	ctx  context.Context
	ends chan error
}

func (s *stream) RecvMsg(any) error {
	select {
	case err := <-s.ends:
		return err
	case <-s.ctx.Done():
		return status.FromContextError(s.ctx.Err()).Err()
	}
}

var (
	unavailable = status.Error(codes.Unavailable, "down")
	exhausted   = status.Error(codes.ResourceExhausted, "busy")
	notFound    = status.Error(codes.NotFound, "no such thing")
)

// fixture is a breaker before a server.
type fixture struct {
	*testing.T
	b       *Layer
	srv     *server
	conn    grpc.ClientConnInterface
	changes []string
}

func newFixture(t *testing.T, c Config, opts ...Option) *fixture {
	t.Helper()
	f := &fixture{T: t, srv: &server{ends: make(chan error)}}
	f.b = mustNew(t, c, append(opts, WithOnStateChange(func(c Change) {
		f.changes = append(f.changes, fmt.Sprintf("%s>%s %s %v", c.From, c.To, c.Cause, c.OpenFor))
	}))...)
	f.b.random = func() float64 { return 0 }
	f.conn = calltest.Stack(t, f.b).Wrap(f.srv)
	return f
}

func mustNew(t testing.TB, c Config, opts ...Option) *Layer {
	t.Helper()
	b, err := New(c, opts...)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// call makes a call that the server answers with err and returns what came of it.
func (f *fixture) call(err error) error {
	f.srv.answer = err
	return f.conn.Invoke(context.Background(), method, nil, nil)
}

// calls makes a call for each of errs, and fails if one does not reach the server.
func (f *fixture) calls(errs ...error) {
	f.Helper()
	for i, err := range errs {
		if got := f.call(err); got != err {
			f.Fatalf("call %d: %v, want what the server answers: %v", i, got, err)
		}
	}
}

func (f *fixture) state(want State) {
	f.Helper()
	if got := f.b.State(method); got != want {
		f.Errorf("the circuit is %v, want %v", got, want)
	}
}

// refused makes a call and expects a refusal that asks to come again after d.
func (f *fixture) refused(d time.Duration) {
	f.Helper()
	before := f.srv.calls
	err := f.call(nil)
	r, ok := interceptor.AsRefusal(err)
	if !ok || r.Reason != interceptor.ReasonBreakerOpen || status.Code(err) != codes.Unavailable || !r.NotSent() {
		f.Fatalf("call: %v, want a refusal with UNAVAILABLE and reason BREAKER_OPEN", err)
	}
	if r.RetryAfter != d {
		f.Errorf("RetryAfter is %v, want %v", r.RetryAfter, d)
	}
	if f.srv.calls != before {
		f.Error("the refused call reached the server")
	}
}

func (f *fixture) changed(want ...string) {
	f.Helper()
	if !slices.Equal(f.changes, want) {
		f.Errorf("changes:\n%s\nwant:\n%s", strings.Join(f.changes, "\n"), strings.Join(want, "\n"))
	}
}

func times(n int, err error) []error { return slices.Repeat([]error{err}, n) }

func testTripConsecutiveFailures(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFixture(t, Config{ConsecutiveFailures: 3})
		f.calls(unavailable, unavailable, nil, unavailable, unavailable, notFound, unavailable, unavailable)
		f.state(Closed)
		f.calls(unavailable)
		f.state(Open)
		f.refused(5 * time.Second)
		f.changed("closed>open consecutive failures 5s")
	})
}

func testTripRESOURCEEXHAUSTEDIsNoPartOfARun(t *testing.T) {
	f := newFixture(t, Config{ConsecutiveFailures: 3})
	f.calls(times(10, exhausted)...)
	f.state(Closed)
	f.calls(unavailable, unavailable, exhausted, unavailable)
	f.state(Open)
}

func testTripRESOURCEEXHAUSTEDCountsInTheRatio(t *testing.T) {
	f := newFixture(t, Config{FailureRatio: 0.5})
	f.calls(times(20, exhausted)...)
	f.state(Open)
}

func testTripFailureRatioOfTheLeastNumberOfCalls(t *testing.T) {
	f := newFixture(t, Config{}) // 0.5 of at least 20.
	f.calls(times(19, unavailable)...)
	f.state(Closed)
	f.calls(unavailable)
	f.state(Open)

	f = newFixture(t, Config{FailureRatio: 0.25, MinCalls: 4})
	f.calls(nil, nil, nil, nil, unavailable) // 1 of 5.
	f.state(Closed)
	f.calls(unavailable) // 2 of 6.
	f.state(Open)
	f.changed("closed>open failure ratio 5s")
}

func testTripFailureRatioIsExact(t *testing.T) {
	f := newFixture(t, Config{FailureRatio: 0.3, MinCalls: 10})
	f.calls(times(7, nil)...)
	f.calls(unavailable, unavailable)
	f.state(Closed)
	f.calls(unavailable) // 3 of 10.
	f.state(Open)
}

func testTripWindowForgets(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFixture(t, Config{FailureRatio: 0.5, MinCalls: 10, Window: 10 * time.Second})
		f.calls(times(9, unavailable)...)
		time.Sleep(10 * time.Second)
		f.calls(unavailable)
		f.state(Closed)
		f.calls(times(9, unavailable)...)
		f.state(Open)
	})
}

func testTripSlowCallsThatSucceed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFixture(t, Config{SlowCallRatio: 0.5, SlowCall: 100 * time.Millisecond, MinCalls: 4})
		f.srv.delay = 99 * time.Millisecond
		f.calls(nil, nil, nil, nil)
		f.state(Closed)
		f.srv.delay = 100 * time.Millisecond
		f.calls(nil, nil, nil)
		f.state(Closed)
		f.calls(nil) // 4 of 8.
		f.state(Open)
		f.changed("closed>open slow calls 5s")
	})
}

// open opens a stream of responses.
func (f *fixture) open() grpc.ClientStream {
	f.Helper()
	s, err := f.conn.NewStream(context.Background(), &grpc.StreamDesc{ServerStreams: true, ClientStreams: true}, method)
	if err != nil {
		f.Fatal(err)
	}
	return s
}

// receive receives from a stream what the server sends: a message, or an end.
func (f *fixture) receive(s grpc.ClientStream, err error) {
	f.Helper()
	go func() { f.srv.ends <- err }()
	if got := s.RecvMsg(nil); got != err {
		f.Fatalf("RecvMsg: %v, want %v", got, err)
	}
}

func testStreamWithoutAResponseIsJudgedByItsEnd(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFixture(t, Config{ConsecutiveFailures: 2, SlowCallRatio: 0.1, SlowCall: time.Millisecond, MinCalls: 1})
		streams := []grpc.ClientStream{f.open(), f.open(), f.open(), f.open()}
		time.Sleep(time.Minute)
		f.receive(streams[0], unavailable)
		f.receive(streams[1], io.EOF)
		f.receive(streams[2], unavailable)
		f.state(Closed)
		f.receive(streams[3], unavailable)
		f.state(Open)
		f.changed("closed>open consecutive failures 5s")
	})
}

func testStreamIsJudgedByItsFirstResponseOnly(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFixture(t, Config{ConsecutiveFailures: 2})
		long, bad := f.open(), f.open()
		f.receive(bad, unavailable)
		f.receive(long, nil) // The first response ends the run.
		f.calls(unavailable)
		f.state(Closed)
		f.receive(long, nil)         // Further ones do not,
		f.receive(long, unavailable) // and neither does its end extend it.
		f.state(Closed)
		f.calls(unavailable)
		f.state(Open)
	})
}

func testStreamIsAProbeByItsFirstResponse(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFixture(t, Config{ConsecutiveFailures: 1, Probes: 2})
		f.halfOpen()
		first, second := f.open(), f.open()
		f.refused(0)
		f.receive(first, nil)
		f.receive(first, nil)
		f.receive(first, unavailable) // A later end is no probe's failure.
		f.state(HalfOpen)
		f.receive(second, nil)
		f.state(Closed)
		f.receive(second, unavailable)
		f.state(Closed)
		f.changed("closed>open consecutive failures 5s", "open>half-open open long enough 0s", "half-open>closed the probes succeeded 0s")
	})
}

func testOutcomeCancelledAndNotSent(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFixture(t, Config{ConsecutiveFailures: 2, FailureRatio: 0.1, MinCalls: 2, SlowCallRatio: 0.1, SlowCall: time.Millisecond})
		f.calls(unavailable)
		f.srv.delay = time.Hour
		for range 10 {
			ctx, cancel := context.WithCancel(context.Background())
			time.AfterFunc(time.Minute, cancel)
			if err := f.conn.Invoke(ctx, method, nil, nil); status.Code(err) != codes.Canceled {
				t.Fatalf("a call that its caller cancels: %v, want CANCELLED", err)
			}
		}
		f.srv.delay = 0
		refusal := interceptor.Refuse("inner", interceptor.ReasonConcurrency, "")
		f.calls(times(10, refusal)...)
		f.state(Closed)
		// And the run is as long as it was.
		f.calls(unavailable)
		f.state(Open)
	})
}

func testOutcomeTheCallersDeadline(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFixture(t, Config{ConsecutiveFailures: 1, SlowCallRatio: 0.5, SlowCall: time.Second, MinCalls: 2})
		f.srv.delay = time.Hour
		giveUp := func(after time.Duration) {
			t.Helper()
			ctx, cancel := context.WithTimeout(context.Background(), after)
			defer cancel()
			if err := f.conn.Invoke(ctx, method, nil, nil); status.Code(err) != codes.DeadlineExceeded {
				t.Fatalf("a call past its deadline: %v, want DEADLINE_EXCEEDED", err)
			}
		}
		for range 10 {
			giveUp(time.Second - 1)
		}
		f.state(Closed)
		giveUp(time.Second)
		f.state(Closed)
		giveUp(time.Second)
		f.state(Open)
		f.changed("closed>open slow calls 5s")
	})
}

func testOutcomeDeadlineOfALayer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFixture(t, Config{ConsecutiveFailures: 1})
		f.srv.delay = time.Hour
		ctx, cancel := context.WithCancelCause(context.Background())
		time.AfterFunc(time.Second, func() {
			r := interceptor.Refuse("timeout", interceptor.ReasonDeadline, "")
			r.Sent = true
			cancel(r)
		})
		f.conn.Invoke(ctx, method, nil, nil)
		f.state(Open)
	})
}

func testOutcomeNoConnection(t *testing.T) {
	notReady := interceptor.Refuse("connection", interceptor.ReasonNotReady, "")
	// Whatever the codes say.
	f := newFixture(t, Config{ConsecutiveFailures: 2, FailureCodes: []codes.Code{codes.Internal}})
	f.calls(notReady)
	f.state(Closed)
	f.calls(notReady)
	f.state(Open)
	f = newFixture(t, Config{ConsecutiveFailures: 2, FailureRatio: 0.1, MinCalls: 1, IgnoreNotConnected: true})
	f.calls(times(10, notReady)...)
	f.state(Closed)

	synctest.Test(t, func(t *testing.T) { // As a probe.
		f := newFixture(t, Config{ConsecutiveFailures: 1})
		f.halfOpen()
		f.calls(notReady)
		f.state(Open)
		f = newFixture(t, Config{ConsecutiveFailures: 1, IgnoreNotConnected: true})
		f.halfOpen()
		f.calls(notReady, notReady)
		f.state(HalfOpen)
		f.calls(nil)
		f.state(Closed)
	})
}

func testOpenRefusesAndSaysForHowLong(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFixture(t, Config{ConsecutiveFailures: 1, OpenFor: 16 * time.Second})
		f.calls(unavailable)
		f.refused(16 * time.Second)
		time.Sleep(time.Second)
		f.refused(15 * time.Second)
		time.Sleep(time.Millisecond) // The time left is rounded up.
		f.refused(15 * time.Second)
		time.Sleep(15*time.Second - 2*time.Millisecond)
		f.refused(time.Millisecond)
		f.state(Open)
		err := f.call(nil)
		var after time.Duration
		for _, d := range status.Convert(err).Details() {
			if d, ok := d.(*errdetails.RetryInfo); ok {
				after = d.GetRetryDelay().AsDuration()
			}
		}
		if after != time.Millisecond {
			t.Errorf("the status's RetryInfo asks for %v, want 1ms", after)
		}
		time.Sleep(time.Millisecond)
		f.state(HalfOpen)
		f.calls(nil)
		f.state(Closed)
		f.changed("closed>open consecutive failures 16s", "open>half-open open long enough 0s", "half-open>closed the probes succeeded 0s")
	})
}

func testOpenLongerAfterEachFailedProbe(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFixture(t, Config{ConsecutiveFailures: 1, OpenFor: time.Second, OpenGrowth: 3, MaxOpenFor: 10 * time.Second})
		for _, d := range []time.Duration{1, 3, 9, 10, 10} {
			f.calls(unavailable)
			f.state(Open)
			time.Sleep(d*time.Second - 1)
			f.state(Open)
			time.Sleep(time.Nanosecond)
			f.state(HalfOpen)
		}
		f.calls(nil)
		f.state(Closed)
		f.calls(unavailable)
		f.refused(time.Second)
	})
}

func testOpenJitterOnlyShortens(t *testing.T) {
	for _, tc := range []struct {
		jitter, random float64
		want           time.Duration
	}{
		{0, 0, 10 * time.Second}, {0, 0.5, 9 * time.Second}, {0, 0.999, 8002 * time.Millisecond}, // 0 means 0.2.
		{0.5, 0.5, 7500 * time.Millisecond}, {-1, 0.9, 10 * time.Second}, {1, 0.999999999999, time.Millisecond},
	} {
		s, err := settingsOf(Config{OpenFor: 10 * time.Second, Jitter: tc.jitter})
		if err != nil {
			t.Fatal(err)
		}
		if got := s.delay(1, tc.random); got != tc.want {
			t.Errorf("jitter %v, random number %v: open for %v, want %v", tc.jitter, tc.random, got, tc.want)
		}
	}
}

func testOpenDelayNeverOverflows(t *testing.T) {
	s, err := settingsOf(Config{OpenFor: time.Hour, OpenGrowth: 1e300, MaxOpenFor: 100 * time.Hour, Jitter: None})
	if err != nil {
		t.Fatal(err)
	}
	for _, n := range []int{1, 2, 3, 1000, math.MaxInt} {
		want := 100 * time.Hour
		if n == 1 {
			want = time.Hour
		}
		if got := s.delay(n, 0); got != want {
			t.Errorf("delay of trip %d is %v, want %v", n, got, want)
		}
	}
	if s, err = settingsOf(Config{MaxOpenFor: math.MaxInt64, Jitter: None}); err != nil {
		t.Fatal(err)
	}
	if got := s.delay(1000, 0); got != math.MaxInt64 {
		t.Errorf("with no bound that matters the delay of trip 1000 is %v, want %v", got, time.Duration(math.MaxInt64))
	}
}

// waiting makes a call that the server answers after delay, and returns its
// result on a channel.
func (f *fixture) waiting(ctx context.Context, delay time.Duration, answer error) <-chan error {
	f.srv.delay, f.srv.answer = delay, answer
	done := make(chan error, 1)
	go func() { done <- f.conn.Invoke(ctx, method, nil, nil) }()
	synctest.Wait()
	return done
}

func (f *fixture) halfOpen() {
	f.Helper()
	f.calls(unavailable)
	time.Sleep(f.b.settings.Load().OpenFor)
	f.state(HalfOpen)
}

func testHalfOpenClosesWhenAllProbesSucceed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFixture(t, Config{ConsecutiveFailures: 1, Probes: 3})
		f.halfOpen()
		var probes []<-chan error
		for range 3 {
			probes = append(probes, f.waiting(context.Background(), time.Second, nil))
		}
		f.refused(0)
		for i, p := range probes {
			if err := <-p; err != nil {
				t.Errorf("probe %d: %v, want no error", i, err)
			}
		}
		f.state(Closed)
	})
}

func testHalfOpenOpensAtTheFirstFailedProbe(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFixture(t, Config{ConsecutiveFailures: 1, Probes: 2})
		f.halfOpen()
		bad := f.waiting(context.Background(), time.Second, unavailable)
		good := f.waiting(context.Background(), 2*time.Second, nil)
		<-bad
		f.state(Open)
		<-good
		f.state(Open)
		f.changed("closed>open consecutive failures 5s", "open>half-open open long enough 0s", "half-open>open a probe failed 10s")
	})
}

func testHalfOpenProbeThatSaysNothingIsReplaced(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFixture(t, Config{ConsecutiveFailures: 1})
		f.halfOpen()
		ctx, cancel := context.WithCancel(context.Background())
		p := f.waiting(ctx, time.Hour, nil)
		f.refused(0)
		cancel()
		<-p
		f.srv.delay = 0
		f.state(HalfOpen)
		// It was sent, so its place is taken until an OpenFor is over: otherwise a server
		// that hangs would get as many probes as there are impatient callers.
		f.refused(0)
		time.Sleep(DefaultOpenFor)
		f.calls(interceptor.Refuse("inner", interceptor.ReasonConcurrency, ""))
		f.state(HalfOpen)
		f.calls(notFound) // An answer.
		f.state(Closed)
	})
}

func testHalfOpenSlowProbeFails(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFixture(t, Config{ConsecutiveFailures: 1, SlowCallRatio: 0.5, SlowCall: time.Second})
		f.halfOpen()
		f.srv.delay = time.Second
		f.calls(nil)
		f.state(Open)
	})
}

func testHalfOpenProbeGivenUpFailsIfItWasSlow(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFixture(t, Config{ConsecutiveFailures: 1, SlowCallRatio: 0.5, SlowCall: time.Second})
		f.halfOpen()
		ctx, cancel := context.WithTimeout(context.Background(), time.Second)
		defer cancel()
		<-f.waiting(ctx, time.Hour, nil)
		f.state(Open)
	})
}

func testHalfOpenOfManyCallsExactlyTheProbesPass(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFixture(t, Config{ConsecutiveFailures: 3, OpenFor: time.Second, Probes: 3})
		f.calls(times(3, unavailable)...)
		time.Sleep(time.Second)
		var passed, refused atomic.Int64
		conn := calltest.Stack(t, f.b).Wrap(calltest.Server(func(context.Context) error {
			passed.Add(1)
			time.Sleep(time.Millisecond)
			return nil
		}))
		var wg sync.WaitGroup
		for range 100 {
			wg.Go(func() {
				if conn.Invoke(context.Background(), method, nil, nil) != nil {
					refused.Add(1)
				}
			})
		}
		wg.Wait()
		if passed.Load() != 3 || refused.Load() != 97 {
			t.Errorf("%d calls passed and %d were refused, want 3 and 97", passed.Load(), refused.Load())
		}
		f.state(Closed)
	})
}

func testHalfOpenProbesThatDoNotEndLetMorePass(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFixture(t, Config{ConsecutiveFailures: 1, OpenFor: 5 * time.Second})
		f.halfOpen()
		hung := f.waiting(context.Background(), time.Hour, unavailable)
		time.Sleep(5*time.Second - 1)
		f.refused(0)
		time.Sleep(time.Nanosecond)
		f.srv.delay = 0
		f.calls(nil)
		f.state(Closed)
		<-hung // What it says of then is nothing now.
		f.state(Closed)
	})
}

func testTripCallsFromBeforeItDoNotCount(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFixture(t, Config{ConsecutiveFailures: 1})
		old := f.waiting(context.Background(), 5*time.Second+time.Millisecond, unavailable)
		f.srv.delay = 0
		f.halfOpen()
		probe := f.waiting(context.Background(), time.Second, nil)
		<-old
		f.state(HalfOpen)
		<-probe
		f.state(Closed)
	})
}

func testTripByHand(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFixture(t, Config{ConsecutiveFailures: 2})
		f.calls(unavailable)
		f.b.Trip("", 0)
		time.Sleep(24 * time.Hour)
		f.state(Open)
		f.refused(0)
		f.b.Reset("")
		f.state(Closed)
		f.calls(unavailable, nil) // The run of before is forgotten.
		f.b.Trip("", 16*time.Second)
		f.refused(16 * time.Second)
		time.Sleep(16 * time.Second)
		f.calls(nil)
		f.state(Closed)
		f.changed("closed>open Trip 0s", "open>closed Reset 0s", "closed>open Trip 16s",
			"open>half-open open long enough 0s", "half-open>closed the probes succeeded 0s")
	})
}

func testKeysHaveCircuitsOfTheirOwn(t *testing.T) {
	type key struct{}
	byTenant := interceptor.KeyBy{Func: func(ctx context.Context, _ *interceptor.Admission) string {
		s, _ := ctx.Value(key{}).(string)
		return s
	}}
	for _, tc := range []struct {
		name   string
		config Config
		call   func(c grpc.ClientConnInterface, k string) error
	}{
		{"method", Config{KeyBy: interceptor.KeyBy{Method: true}}, func(c grpc.ClientConnInterface, k string) error {
			return c.Invoke(context.Background(), k, nil, nil)
		}},
		{"key", Config{KeyBy: byTenant}, func(c grpc.ClientConnInterface, k string) error {
			return c.Invoke(context.WithValue(context.Background(), key{}, k), method, nil, nil)
		}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				tc.config.ConsecutiveFailures, tc.config.MaxKeys = 1, 3
				f := newFixture(t, tc.config)
				f.srv.answer = unavailable
				tc.call(f.conn, "/a")
				f.srv.answer = nil
				if err := tc.call(f.conn, "/b"); err != nil {
					t.Errorf("b: %v, want no error: its circuit is closed", err)
				}
				err := tc.call(f.conn, "/a")
				if r, ok := interceptor.AsRefusal(err); !ok || r.Message != "the circuit is open" || r.Key != "/a" {
					t.Errorf("a: %v, want a refusal that names it", err)
				}
				tc.call(f.conn, "/c")
				f.srv.answer = unavailable
				tc.call(f.conn, "/d") // Beyond the bound.
				if _, ok := interceptor.AsRefusal(tc.call(f.conn, "/e")); !ok {
					t.Error("e was called, want it refused: it shares a circuit with d")
				}
				want := map[string]State{"/a": Open, "/b": Closed, "/c": Closed, Others: Open}
				if got := f.b.States(); fmt.Sprint(got) != fmt.Sprint(want) {
					t.Errorf("states are %v, want %v", got, want)
				}
				f.b.Trip("/b", time.Hour)
				if got := f.b.State("/b"); got != Open {
					t.Errorf("b is %v after Trip, want open", got)
				}
				// After the time in which keys are forgotten: a is half-open, c idle, and b
				// still open.
				time.Sleep(DefaultKeyIdle)
				f.srv.answer = nil
				tc.call(f.conn, "/f")
				want = map[string]State{"/b": Open, "/f": Closed, Others: HalfOpen}
				if got := f.b.States(); fmt.Sprint(got) != fmt.Sprint(want) {
					t.Errorf("states are %v, want %v", got, want)
				}
			})
		})
	}
}

func testConfigUpdateKeepsStatesAndCounts(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFixture(t, Config{ConsecutiveFailures: 5, FailureRatio: 0.9, MinCalls: 10})
		f.calls(times(3, unavailable)...)
		if err := f.b.Update(Config{ConsecutiveFailures: 1, OpenFor: -1}); err == nil {
			t.Error("a bad Update returned no error")
		}
		f.calls(unavailable)
		f.state(Closed)
		if err := f.b.Update(Config{FailureRatio: 0.5, MinCalls: 5, Window: time.Minute}); err != nil {
			t.Fatal(err)
		}
		f.calls(unavailable) // The fifth of five.
		f.state(Open)
		if err := f.b.Update(Config{ConsecutiveFailures: 1, OpenFor: time.Second, MaxOpenFor: time.Second}); err != nil {
			t.Fatal(err)
		}
		f.refused(5 * time.Second) // As it was told when it opened.
		time.Sleep(5 * time.Second)
		f.calls(unavailable)
		f.refused(time.Second)
	})
}

func testConfigFewerProbesCloseAHalfOpenCircuit(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		config := Config{ConsecutiveFailures: 1, Probes: 3}
		f := newFixture(t, config)
		f.halfOpen()
		f.calls(nil, nil) // Two of three.
		config.Probes = 2
		if err := f.b.Update(config); err != nil {
			t.Fatal(err)
		}
		f.calls(nil)
		f.state(Closed)
	})
}

func testConfigBadValuesAreErrors(t *testing.T) {
	for _, tc := range []struct {
		c    Config
		want string
	}{
		{Config{ConsecutiveFailures: -1}, "breaker: ConsecutiveFailures is -1, must be"},
		{Config{FailureRatio: 1.5}, "breaker: FailureRatio is 1.5, must be"},
		{Config{FailureRatio: math.NaN()}, "breaker: FailureRatio is NaN, must be"},
		{Config{SlowCallRatio: -0.5}, "breaker: SlowCallRatio is -0.5, must be"},
		{Config{SlowCallRatio: 0.5}, "breaker: SlowCall is 0s, must be"},
		{Config{SlowCall: time.Second}, "breaker: SlowCall is 1s, must be"},
		{Config{SlowCallRatio: 0.5, SlowCall: 1}, "breaker: SlowCall is 1ns, must be"},
		{Config{Window: time.Millisecond}, "breaker: Window is 1ms, must be"},
		{Config{MinCalls: -1}, "breaker: MinCalls is -1, must be"},
		{Config{OpenFor: 1}, "breaker: OpenFor is 1ns, must be"},
		{Config{OpenGrowth: 0.5}, "breaker: OpenGrowth is 0.5, must be"},
		{Config{OpenGrowth: math.Inf(1)}, "breaker: OpenGrowth is +Inf, must be"},
		{Config{MaxOpenFor: time.Second}, "breaker: MaxOpenFor is 1s, must be at least OpenFor, 5s"},
		{Config{Jitter: 1.1}, "breaker: Jitter is 1.1, must be"},
		{Config{Jitter: math.NaN()}, "breaker: Jitter is NaN, must be"},
		{Config{Probes: -1}, "breaker: Probes is -1, must be"},
		{Config{FailureCodes: []codes.Code{99}}, "breaker: FailureCodes[0] is Code(99), must be"},
		{Config{FailureCodes: []codes.Code{}}, "breaker: FailureCodes is [], must"},
		{Config{MaxKeys: -1}, "breaker: MaxKeys is -1, must be"},
		{Config{KeyIdle: 1}, "breaker: KeyIdle is 1ns, must be"},
		{Config{KeyBy: interceptor.KeyBy{Method: true, Metadata: "x"}}, "breaker: KeyBy is Method and Metadata \"x\", must"},
	} {
		if _, err := New(tc.c); err == nil || !strings.HasPrefix(err.Error(), tc.want) {
			t.Errorf("New(%+v): %v, want an error that begins with %q", tc.c, err, tc.want)
		}
	}
	err := mustNew(t, Config{}).Update(Config{KeyBy: interceptor.KeyBy{Method: true}})
	if want := "breaker: KeyBy is Method, must stay nothing: make a new layer"; err == nil || err.Error() != want {
		t.Errorf("Update of KeyBy: %v, want %q", err, want)
	}
}

func testConfigEmptyName(t *testing.T) {
	if _, err := New(Config{}, WithName("")); err == nil || !strings.Contains(err.Error(), `breaker: WithName is ""`) {
		t.Errorf("New with an empty name = %v, want an error that names WithName", err)
	}
}

func testStateNames(t *testing.T) {
	if got := fmt.Sprint(Closed, HalfOpen, Open, State(9)); got != "closed half-open open unknown" {
		t.Errorf("states print as %q", got)
	}
}

func testStateChangesArriveInOrder(t *testing.T) {
	var changes []Change // The circuit's lock orders the appends.
	b := mustNew(t, Config{ConsecutiveFailures: 1, OpenFor: time.Millisecond, Jitter: None}, WithOnStateChange(func(c Change) { changes = append(changes, c) }))
	unary := calltest.Stack(t, b).UnaryClientInterceptor()
	var wg sync.WaitGroup
	for g := range 8 {
		wg.Go(func() {
			for i := range 2000 {
				unary(context.Background(), method, nil, nil, nil, func(context.Context, string, any, any, *grpc.ClientConn, ...grpc.CallOption) error {
					if (i+g)%7 == 0 {
						return unavailable
					}
					return nil
				})
			}
		})
	}
	wg.Wait()
	b.Reset("")
	state := Closed
	for i, c := range changes {
		if c.From != state || c.To == state {
			t.Fatalf("change %d is %v to %v, but the circuit was %v", i, c.From, c.To, state)
		}
		state = c.To
	}
	if state != Closed || len(changes) == 0 {
		t.Errorf("after Reset and %d changes the last state seen is %v, want closed", len(changes), state)
	}
}

func TestConformance(t *testing.T) {
	for name, c := range map[string]Config{
		"closed":    {ConsecutiveFailures: math.MaxInt32, FailureRatio: 1, SlowCallRatio: 1, SlowCall: time.Hour, MinCalls: math.MaxInt32},
		"trips":     {ConsecutiveFailures: 3, OpenFor: time.Millisecond, Probes: 2},
		"by_method": {ConsecutiveFailures: 3, OpenFor: time.Millisecond, KeyBy: interceptor.KeyBy{Method: true}},
	} {
		t.Run(name, func(t *testing.T) {
			layertest.Run(t, func() (interceptor.Spec, func() error) {
				b := mustNew(t, c)
				return b, func() error {
					circuits := map[string]*circuit{"": b.all}
					if b.keys != nil {
						circuits = maps.Collect(b.keys.All())
					}
					for k, c := range circuits {
						c.mu.Lock()
						n, st := c.probing, stateOf(c.state.Load())
						c.mu.Unlock()
						// A probe that was given up keeps its place for an OpenFor.
						if most := b.Config().Probes; st == HalfOpen && n > max(most, 1) {
							return fmt.Errorf("%q has %d probes out, want at most %d", k, n, max(most, 1))
						}
					}
					return nil
				}
			})
		})
	}
}

func benchmarks(t testing.TB) map[string]grpc.UnaryClientInterceptor {
	out := map[string]grpc.UnaryClientInterceptor{}
	for name, c := range map[string]Config{
		"closed_consecutive": {ConsecutiveFailures: 5},
		"closed_ratio":       {},
		"closed_all":         {ConsecutiveFailures: 5, FailureRatio: 0.5, SlowCallRatio: 0.5, SlowCall: time.Second},
		"closed_by_method":   {ConsecutiveFailures: 5, KeyBy: interceptor.KeyBy{Method: true}},
		"open":               {},
		"open_until_reset":   {},
	} {
		b := mustNew(t, c)
		switch name {
		case "open":
			b.Trip("", time.Hour)
		case "open_until_reset":
			b.Trip("", 0)
		}
		out[name] = calltest.Stack(t, b).UnaryClientInterceptor()
	}
	return out
}

func TestNothingIsAllocated(t *testing.T) { calltest.AllocateNothing(t, benchmarks(t), method) }

func BenchmarkBreaker(b *testing.B) { calltest.Bench(b, benchmarks(b), method) }

func settingsOf(c Config) (*settings, error) {
	errs := check.Of("breaker")
	return c.settings(errs, nil), errs.Err()
}

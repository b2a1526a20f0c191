// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package hedge_test

import (
	"context"
	"errors"
	"fmt"
	"math"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/belfry-go/belfry/interceptor"
	"github.com/belfry-go/belfry/interceptor/budget"
	"github.com/belfry-go/belfry/interceptor/hedge"
	"github.com/belfry-go/belfry/interceptor/layertest"
	"github.com/belfry-go/belfry/interceptor/retry"
	"github.com/belfry-go/belfry/interceptor/timeout"
	"github.com/belfry-go/belfry/internal/attempt"
	"github.com/belfry-go/belfry/internal/test/calltest"
	"github.com/belfry-go/belfry/internal/test/leaktest"
	"github.com/belfry-go/belfry/internal/test/race"
)

func TestMain(m *testing.M) { leaktest.Main(m) }

const (
	method = "/test.Service/Method"
	ms     = time.Millisecond
)

var (
	unavailable = status.Error(codes.Unavailable, "try another")
	fatal       = status.Error(codes.InvalidArgument, "never")

	// fixed hedges after 10 ms, and once.
	fixed = hedge.Config{Delay: 10 * ms, Budget: budget.Config{MinPerSecond: 100}}
)

// mustNew returns a layer that hedges all methods, unless c names some.
func mustNew(t testing.TB, c hedge.Config, opts ...hedge.Option) *hedge.Layer {
	t.Helper()
	c.AllMethods = c.Methods == nil
	l, err := hedge.New(c, opts...)
	if err != nil {
		t.Fatalf("New(%+v): %v", c, err)
	}
	return l
}

// answer is what an attempt gets.
type answer struct {
	after   time.Duration
	reply   string
	err     error
	trailer metadata.MD
	panics  any
}

// server gives attempts their answers in turn, the last again and again, and logs
// what happens, with the time since the first attempt.
type server struct {
	t       *testing.T
	answers []answer
	timeout time.Duration // Of each call, if not zero.

	mu    sync.Mutex
	start time.Time
	n     int
	log   []string
	ctxs  []context.Context
}

func newServer(t *testing.T, answers ...answer) *server { return &server{t: t, answers: answers} }

func (s *server) add(format string, args ...any) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.log = append(s.log, fmt.Sprintf("%v ", time.Since(s.start).Round(ms))+fmt.Sprintf(format, args...))
}

func (s *server) Invoke(ctx context.Context, _ string, req, reply any, opts ...grpc.CallOption) error {
	s.mu.Lock()
	if s.n == 0 {
		s.start = time.Now()
	}
	n := s.n
	s.n++
	a := s.answers[min(n, len(s.answers)-1)]
	s.ctxs = append(s.ctxs, ctx)
	s.mu.Unlock()
	s.add("%d sent", n)
	if got := req.(*wrapperspb.StringValue).GetValue(); got != "hello" {
		s.t.Errorf("attempt %d carries %q, want the caller's request", n, got)
	}
	select {
	case <-time.After(a.after):
	case <-ctx.Done():
		s.add("%d cancelled", n)
		return status.FromContextError(ctx.Err()).Err()
	}
	if a.panics != nil {
		panic(a.panics)
	}
	for _, o := range opts {
		switch o := o.(type) {
		case grpc.TrailerCallOption:
			*o.TrailerAddr = a.trailer
		case grpc.HeaderCallOption:
			*o.HeaderAddr = metadata.Pairs("attempt", fmt.Sprint(n))
		case grpc.OnFinishCallOption:
			s.t.Error("an attempt was given the call's OnFinish")
		}
	}
	reply.(*wrapperspb.StringValue).Value = a.reply
	s.add("%d answered", n)
	return a.err
}

func (s *server) NewStream(context.Context, *grpc.StreamDesc, string, ...grpc.CallOption) (grpc.ClientStream, error) {
	panic("the server takes unary calls")
}

// call makes a call through the layers. It returns the time it took, too.
func (s *server) call(opts []grpc.CallOption, layers ...interceptor.Spec) (reply string, took time.Duration, err error) {
	s.t.Helper()
	start := time.Now()
	r := wrapperspb.String("before")
	ctx := s.t.Context()
	if s.timeout > 0 {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, s.timeout)
		defer cancel()
	}
	err = calltest.Stack(s.t, layers...).Wrap(s).Invoke(ctx, method, wrapperspb.String("hello"), r, opts...)
	took = time.Since(start)
	synctest.Wait() // Losers end behind the call.
	return r.GetValue(), took, err
}

func (s *server) want(log ...string) {
	s.t.Helper()
	s.mu.Lock()
	defer s.mu.Unlock()
	if !slices.Equal(s.log, log) {
		s.t.Errorf("the server saw\n\t%s\nwant\n\t%s", strings.Join(s.log, "\n\t"), strings.Join(log, "\n\t"))
	}
}

// tower returns a layer as in Tower's tests: a percentile of 90, ten data points,
// and eight latencies of 1 ms and two of 10 ms, so that the delay is 10 ms.
func tower(t *testing.T) *hedge.Layer {
	t.Helper()
	l := mustNew(t, hedge.Config{Percentile: 0.9, MinDataPoints: 10, Budget: budget.Config{MinPerSecond: 100}})
	for i := range 10 {
		if _, ok := l.Delay(method); ok {
			t.Errorf("calls are hedged with %d of 10 data points", i)
		}
		a := answer{after: ms}
		if i >= 8 {
			a.after = 10 * ms
		}
		if _, _, err := newServer(t, a).call(nil, l); err != nil {
			t.Fatal(err)
		}
	}
	if d, ok := l.Delay(method); !ok || d < 10*ms || d > 10*ms*101/100 {
		t.Errorf("the delay is %v, %v; want 10ms within a hundredth", d, ok)
	}
	return l
}

// The tests that Tower's own hedge has, by their names there.

func TestTowerOrigCompletesFirst(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newServer(t, answer{after: 15 * ms, reply: "orig-done"}, answer{after: 15 * ms, reply: "hedge-done"})
		if got, took, err := s.call(nil, tower(t)); got != "orig-done" || err != nil || took != 15*ms {
			t.Errorf("got %q, %v after %v; want orig-done after 15ms", got, err, took)
		}
		s.want("0s 0 sent", "10ms 1 sent", "15ms 0 answered", "15ms 1 cancelled")
	})
}

func TestTowerHedgeCompletesFirst(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newServer(t, answer{after: 50 * ms, reply: "orig-done"}, answer{after: 5 * ms, reply: "hedge-done"})
		got, took, err := s.call(nil, tower(t))
		if got != "hedge-done" || err != nil || took.Round(ms) != 15*ms {
			t.Errorf("got %q, %v after %v; want hedge-done after 15ms", got, err, took)
		}
		s.want("0s 0 sent", "10ms 1 sent", "15ms 1 answered", "15ms 0 cancelled")
	})
}

func TestTowerCompletesBeforeHedge(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newServer(t, answer{reply: "orig-done"})
		if got, _, err := s.call(nil, tower(t)); got != "orig-done" || err != nil {
			t.Errorf("got %q, %v; want orig-done", got, err)
		}
		time.Sleep(time.Second)
		s.want("0s 0 sent", "0s 0 answered")
	})
}

func TestTowerRequestNotRetryable(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newServer(t, answer{after: 50 * ms, reply: "orig-done"})
		c := fixed
		c.Methods, c.AllMethods = []string{"/not.This/Method"}, false
		l := mustNew(t, c)
		if got, took, err := s.call(nil, l); got != "orig-done" || err != nil || took != 50*ms {
			t.Errorf("got %q, %v after %v; want orig-done after 50ms", got, err, took)
		}
		s.want("0s 0 sent", "50ms 0 answered")
	})
}

// What Tower has wrong: whichever finishes first wins there, an error too. In gRFC A6 a
// non-fatal failure does not win while another attempt runs. Any other status is the
// server's answer, and ends the call.
func TestWhoWins(t *testing.T) {
	notFound := status.Error(codes.NotFound, "none")
	for name, tc := range map[string]struct {
		answers []answer
		want    string
		err     error
		took    time.Duration
	}{
		"the hedge fails, the original succeeds":      {[]answer{{after: 50 * ms, reply: "orig"}, {err: unavailable}}, "orig", nil, 50 * ms},
		"the original fails, the hedge succeeds":      {[]answer{{after: 15 * ms, err: unavailable}, {after: 30 * ms, reply: "hedge"}}, "hedge", nil, 40 * ms},
		"both fail, the original first":               {[]answer{{after: 15 * ms, err: unavailable}, {after: 30 * ms, err: notFound}}, "", notFound, 40 * ms},
		"both fail, the hedge first":                  {[]answer{{after: 50 * ms, err: notFound}, {after: 30 * ms, err: unavailable}}, "", notFound, 50 * ms},
		"the hedge has a fatal failure":               {[]answer{{after: time.Hour}, {after: ms, err: notFound}}, "", notFound, 11 * ms},
		"the original has a fatal failure":            {[]answer{{after: 15 * ms, err: fatal}, {after: time.Hour}}, "", fatal, 15 * ms},
		"the original fails before there is one":      {[]answer{{after: 5 * ms, err: fatal}, {reply: "hedge"}}, "", fatal, 5 * ms},
		"both succeed at once, one of them counts":    {[]answer{{after: 20 * ms, reply: "same"}, {after: 10 * ms, reply: "same"}}, "same", nil, 20 * ms},
		"a deadline does not replace the hedge's":     {[]answer{{after: time.Hour}, {after: ms, err: unavailable}}, "", unavailable, 200 * ms},
		"a deadline does not replace the original's":  {[]answer{{after: ms, err: unavailable}, {after: time.Hour}}, "", unavailable, 200 * ms},
		"a deadline is all there is":                  {[]answer{{after: time.Hour}}, "", context.DeadlineExceeded, 200 * ms},
		"a fatal failure after a non-fatal one":       {[]answer{{after: 50 * ms, err: fatal}, {after: ms, err: unavailable}}, "", fatal, 50 * ms},
		"a fatal failure comes first, a success late": {[]answer{{after: 50 * ms, reply: "late"}, {after: ms, err: fatal}}, "", fatal, 11 * ms},
	} {
		for where, outer := range map[string][]interceptor.Spec{"caller": nil, "layer": {timeout.Config{Timeout: 200 * ms}}} {
			t.Run(name+", deadline of a "+where, func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					s := newServer(t, tc.answers...)
					if outer == nil {
						s.timeout = 200 * ms
					}
					got, took, err := s.call(nil, append(outer, mustNew(t, fixed))...)
					if status.Code(err) != status.Code(tc.err) && tc.err != context.DeadlineExceeded || tc.err == context.DeadlineExceeded && status.Code(err) != codes.DeadlineExceeded || took != tc.took || err == nil && got != tc.want {
						t.Errorf("got %q, %v after %v; want %q, %v after %v", got, err, took, tc.want, tc.err, tc.took)
					}
				})
			})
		}
	}
}

// A lookup that mostly misses is hedged like one that finds: to answer that there is
// nothing takes the server as long.
func TestLatency_of_misses(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := mustNew(t, hedge.Config{})
		none := status.Error(codes.NotFound, "none")
		for range 100 {
			newServer(t, answer{after: 10 * ms, err: none}).call(nil, l)
		}
		s := newServer(t, answer{after: time.Second, err: none}, answer{after: 10 * ms, err: none})
		if _, took, err := s.call(nil, l); !errors.Is(err, none) || took > 21*ms {
			t.Errorf("got %v after %v, want the extra attempt's NOT_FOUND after 20ms", err, took)
		}
	})
}

// Each method has its own percentile: that of many fast calls would double each call of
// a slow method, which gains nothing.
func TestLatency_by_method(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := mustNew(t, hedge.Config{})
		var attempts [2]int
		unary := calltest.Stack(t, l).UnaryClientInterceptor()
		for i := range 4000 {
			slow, d := 0, time.Millisecond
			if i%40 == 0 {
				slow, d = 1, 20*ms
			}
			if err := unary(t.Context(), []string{"/s/Fast", "/s/Slow"}[slow], nil, nil, nil, func(ctx context.Context, _ string, _, _ any, _ *grpc.ClientConn, _ ...grpc.CallOption) error {
				attempts[slow]++
				return work(ctx, d)
			}); err != nil {
				t.Fatal(err)
			}
		}
		if attempts[0] > 3900+4 || attempts[1] > 100+4 {
			t.Errorf("%d attempts of 3,900 fast calls and %d of 100 slow ones, want hardly more than the calls", attempts[0], attempts[1])
		}
		if _, ok := l.Delay("/s/Other"); ok {
			t.Error("there is a delay for a method that was never called")
		}
	})
}

// retryInfo returns a status with a RetryInfo.
func retryInfo(t *testing.T, d time.Duration) error {
	t.Helper()
	st, err := status.New(codes.Unavailable, "come back").WithDetails(&errdetails.RetryInfo{RetryDelay: durationpb.New(d)})
	if err != nil {
		t.Fatal(err)
	}
	return st.Err()
}

func TestExtraAttempts(t *testing.T) {
	pushback := func(v string) metadata.MD { return metadata.Pairs("grpc-retry-pushback-ms", v) }
	slow := answer{after: time.Second}
	for _, tc := range []struct {
		name    string
		max     int
		answers []answer
		want    string // When attempts are sent.
	}{
		{"two at most by default", 0, []answer{slow}, "0s 10ms"},
		{"one after each delay", 4, []answer{slow}, "0s 10ms 20ms 30ms"},
		{"none", 1, []answer{slow}, "0s"},
		{"a non-fatal failure brings the next at once", 4, []answer{{after: 3 * ms, err: unavailable}, slow}, "0s 3ms 13ms 23ms"},
		{"also that of an extra attempt", 4, []answer{slow, {after: 2 * ms, err: unavailable}, slow}, "0s 10ms 12ms 22ms"},
		{"up to the maximum", 4, []answer{{err: unavailable}}, "0s 0s 0s 0s"},
		{"a fatal failure brings none, and none after it", 4, []answer{{after: 15 * ms, err: fatal}, slow}, "0s 10ms"},
		{"negative pushback brings none", 4, []answer{{after: 3 * ms, err: unavailable, trailer: pushback("-1")}, slow}, "0s"},
		{"negative pushback of an extra attempt, too", 4, []answer{slow, {err: unavailable, trailer: pushback("-1")}}, "0s 10ms"},
		{"pushback says when", 4, []answer{{after: 3 * ms, err: unavailable, trailer: pushback("40")}, slow}, "0s 43ms 53ms 63ms"},
		{"RetryInfo says when", 4, []answer{{after: 3 * ms, err: retryInfo(t, 40*ms)}, slow}, "0s 43ms 53ms 63ms"},
		{"pushback of an extra attempt says when", 3, []answer{slow, {after: 2 * ms, err: unavailable, trailer: pushback("40")}, slow}, "0s 10ms 52ms"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				c := fixed
				c.MaxAttempts = tc.max
				s := newServer(t, tc.answers...)
				s.call(nil, mustNew(t, c))
				var sent []string
				for _, e := range s.log {
					if at, ok := strings.CutSuffix(e, " sent"); ok {
						sent = append(sent, strings.Fields(at)[0])
					}
				}
				if got := strings.Join(sent, " "); got != tc.want {
					t.Errorf("attempts at %s, want %s", got, tc.want)
				}
			})
		})
	}
}

// gRFC A6 allows a hedgingDelay of 0.
func TestDelayNone(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newServer(t, answer{after: time.Second}, answer{after: time.Second}, answer{after: 5 * ms, reply: "third"})
		l := mustNew(t, hedge.Config{Delay: hedge.None, MaxAttempts: 3, Budget: budget.Config{Ratio: 10}})
		if d, ok := l.Delay(method); d != 0 || !ok {
			t.Errorf("Delay() = %v, %v; want 0, true", d, ok)
		}
		if got, took, err := s.call(nil, l); got != "third" || err != nil || took != 5*ms {
			t.Errorf("got %q, %v after %v; want the third attempt's answer after 5ms", got, err, took)
		}
	})
}

func TestPolicy(t *testing.T) {
	partial := func(_ context.Context, a *hedge.Attempt) hedge.Verdict {
		switch {
		case a.Method != method || a.Err == nil && a.Trailer == nil:
			return hedge.Answer
		case a.Err == nil && a.Reply.(*wrapperspb.StringValue).GetValue() == "partial":
			return hedge.Hedge
		case a.Err == nil && a.Reply.(*wrapperspb.StringValue).GetValue() == "old":
			return hedge.Wait
		case status.Code(a.Err) == codes.Unavailable && a.N == 1:
			return hedge.Answer
		}
		return hedge.ByCode
	}
	md := metadata.Pairs("n", "1")
	for name, tc := range map[string]struct {
		answers []answer
		want    string
		err     error
		took    time.Duration
		sent    int
	}{
		"a partial reply is hedged at once":          {[]answer{{after: ms, reply: "partial", trailer: md}, {after: ms, reply: "whole", trailer: md}}, "whole", nil, 2 * ms, 2},
		"and is better than none":                    {[]answer{{after: ms, reply: "partial", trailer: md}, {after: ms, reply: "partial", trailer: md}}, "partial", nil, 2 * ms, 2},
		"a deadline does not replace it":             {[]answer{{after: ms, reply: "partial", trailer: md}, {after: time.Hour}}, "partial", nil, 100 * ms, 2},
		"an old reply waits for the extra attempt":   {[]answer{{after: 15 * ms, reply: "old", trailer: md}, {after: 10 * ms, reply: "new", trailer: md}}, "new", nil, 20 * ms, 2},
		"an old reply is all there is":               {[]answer{{after: ms, reply: "old", trailer: md}}, "old", nil, ms, 1},
		"a failure is an answer":                     {[]answer{{after: ms, err: unavailable, trailer: md}}, "", unavailable, ms, 1},
		"the rest goes by the code, a fatal failure": {[]answer{{after: ms, err: fatal, trailer: md}}, "", fatal, ms, 1},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s := newServer(t, tc.answers...)
				s.timeout = 100 * ms
				var trailer metadata.MD
				got, took, err := s.call([]grpc.CallOption{grpc.Trailer(&trailer)}, mustNew(t, fixed, hedge.WithPolicy(partial)))
				if err == nil && got != tc.want || err != tc.err || took != tc.took || s.n != tc.sent {
					t.Errorf("got %q, %v after %v and %d attempts; want %q, %v after %v and %d", got, err, took, s.n, tc.want, tc.err, tc.took, tc.sent)
				}
				if !slices.Equal(trailer.Get("n"), []string{"1"}) {
					t.Errorf("trailer %v, want that of the attempt that the call ended with", trailer)
				}
			})
		})
	}
	if _, err := hedge.New(hedge.Config{}, hedge.WithPolicy(nil)); err == nil || !strings.Contains(err.Error(), "WithPolicy") {
		t.Errorf("New with a nil policy = %v, want an error that names it", err)
	}
}

func TestServerDelayEndedByWinner(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newServer(t, answer{after: 20 * ms, reply: "orig"}, answer{err: unavailable, trailer: metadata.Pairs("grpc-retry-pushback-ms", "5000")})
		c := fixed
		c.MaxAttempts = 3
		if got, took, err := s.call(nil, mustNew(t, c)); got != "orig" || err != nil || took != 20*ms {
			t.Errorf("got %q, %v after %v; want the original's answer after 20ms", got, err, took)
		}
	})
}

// The same as a retry's in its back-off.
func TestServerDelayCancelledKeepsServersError(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newServer(t, answer{err: unavailable, trailer: metadata.Pairs("grpc-retry-pushback-ms", "5000")})
		ctx, cancel := context.WithCancel(t.Context())
		time.AfterFunc(time.Second, cancel)
		start := time.Now()
		err := calltest.Stack(t, mustNew(t, fixed)).Wrap(s).Invoke(ctx, method, wrapperspb.String("hello"), new(wrapperspb.StringValue))
		if status.Code(err) != codes.Canceled || !errors.Is(err, unavailable) || time.Since(start) != time.Second {
			t.Errorf("got %v after %v, want CANCELLED that wraps the server's error when the caller gives up", err, time.Since(start))
		}
	})
}

func TestDeadlineEndsAllAttempts(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newServer(t, answer{after: time.Hour})
		ctx, cancel := context.WithTimeout(t.Context(), 25*ms)
		defer cancel()
		err := calltest.Stack(t, mustNew(t, fixed)).Wrap(s).Invoke(ctx, method, wrapperspb.String("hello"), new(wrapperspb.StringValue))
		if status.Code(err) != codes.DeadlineExceeded {
			t.Errorf("got %v, want DEADLINE_EXCEEDED", err)
		}
		synctest.Wait()
		if got := len(s.log); got != 4 {
			t.Errorf("the server saw %q, want two attempts sent and cancelled", s.log)
		}
	})
}

// tickets is a gate that notes how its tickets are released.
type tickets struct {
	interceptor.GateOnly
	name string
	mu   sync.Mutex
	log  []string
}

func (l *tickets) NewLayer() (interceptor.Layer, error) { return l, nil }

func (l *tickets) WrapGate(inner interceptor.Gate) interceptor.Gate {
	return interceptor.GateFunc(func(ctx context.Context, c *interceptor.Admission, w interceptor.Wait) error {
		c.Hold(l, int64(c.Attempt()))
		return inner.Admit(ctx, c, w)
	})
}

func (l *tickets) Release(n int64, e interceptor.End) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.log = append(l.log, fmt.Sprintf("%s %d %s", l.name, n, e.Outcome))
}

func TestLosersAreIgnored(t *testing.T) {
	for winner, answers := range [][]answer{
		{{after: 15 * ms}, {after: time.Hour}},
		{{after: time.Hour}, {after: 5 * ms}},
	} {
		synctest.Test(t, func(t *testing.T) {
			call, inside := &tickets{name: "call"}, &tickets{name: "attempt"}
			newServer(t, answers...).call(nil, call, mustNew(t, fixed), inside)
			slices.Sort(inside.log)
			want := []string{"attempt 0 ok", "attempt 1 ignored"}
			if winner == 1 {
				want = []string{"attempt 0 ignored", "attempt 1 ok"}
			}
			if !slices.Equal(inside.log, want) || !slices.Equal(call.log, []string{"call 0 ok"}) {
				t.Errorf("attempt %d wins: released %q and %q, want %q and the call ok", winner, inside.log, call.log, want)
			}
		})
	}
}

func TestResultsAreThoseOfWinner(t *testing.T) {
	for winner, answers := range [][]answer{
		{{after: 15 * ms, reply: "0", trailer: metadata.Pairs("n", "0")}, {after: 15 * ms, reply: "1", trailer: metadata.Pairs("n", "1")}},
		{{after: 16 * ms, reply: "0", trailer: metadata.Pairs("n", "0")}, {after: 5 * ms, reply: "1", trailer: metadata.Pairs("n", "1")}},
		{{after: 5 * ms, err: unavailable, reply: "x", trailer: metadata.Pairs("n", "0")}, {after: 5 * ms, reply: "1", trailer: metadata.Pairs("n", "1")}},
	} {
		synctest.Test(t, func(t *testing.T) {
			var header, trailer metadata.MD
			finished := 0
			s := newServer(t, answers...)
			got, _, err := s.call([]grpc.CallOption{grpc.Header(&header), grpc.Trailer(&trailer), grpc.OnFinish(func(error) { finished++ })}, mustNew(t, fixed))
			want := fmt.Sprint(min(winner, 1))
			if got != want || err != nil || finished != 1 || !slices.Equal(header.Get("attempt"), []string{want}) || !slices.Equal(trailer.Get("n"), []string{want}) {
				t.Errorf("got %q, %v, header %v, trailer %v, %d OnFinish; want those of attempt %s and one", got, err, header, trailer, finished, want)
			}
			var tried *attempt.Tried
			for i, ctx := range s.ctxs {
				info := attempt.FromContext(ctx, method, "", 0)
				if info == nil || info.Tried == nil || tried != nil && info.Tried != tried {
					t.Errorf("attempt %d has %+v, want the Tried of the first", i, info)
					continue
				}
				tried = info.Tried
				md, _ := metadata.FromOutgoingContext(ctx)
				if got := strings.Join(md.Get("grpc-previous-rpc-attempts"), ","); (got == "") != (i == 0) || i > 0 && got != fmt.Sprint(i) {
					t.Errorf("attempt %d carries grpc-previous-rpc-attempts %q", i, got)
				}
			}
		})
	}
}

// refusing is a layer whose call path refuses all attempts but the first.
type refusing struct{ interceptor.CallOnly }

func (l *refusing) NewLayer() (interceptor.Layer, error) { return l, nil }

func (*refusing) WrapCall(next interceptor.Next, _ interceptor.Again) interceptor.Next {
	return func(ctx context.Context, c *interceptor.Call) error {
		if c.Attempt() > 0 {
			return interceptor.Refuse("refusing", interceptor.ReasonShed, "")
		}
		return next(ctx, c)
	}
}

func TestRefusedAttemptCostsNothing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := mustNew(t, fixed)
		e := &events{}
		_, _, err := newServer(t, answer{err: unavailable}).call(nil, interceptor.Observe(e), l, &refusing{})
		wantRefusedAgain(t, err, "refusing", interceptor.ReasonShed)
		if got := strings.Count(strings.Join(e.log, ","), "refused refusing SHED"); got != 1 {
			t.Errorf("the observer saw %q, want the refusal, once", e.log)
		}
		if got := l.Budget().Balance(); math.Abs(got-1000.0475) > 1e-9 {
			t.Errorf("balance = %v, want 1000 + 0.0475", got)
		}
	})
}

// events notes what an observer sees.
type events struct {
	interceptor.NopObserver
	mu  sync.Mutex
	log []string
}

func (e *events) add(format string, args ...any) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.log = append(e.log, fmt.Sprintf(format, args...))
}

func (e *events) Refused(_ interceptor.Observed, r *interceptor.Refusal) {
	e.add("refused %s %s", r.Layer, r.Reason)
}
func (e *events) Attempt(c interceptor.Observed)                  { e.add("attempt %d", c.Attempt) }
func (e *events) HedgeFired(_ interceptor.Observed, layer string) { e.add("fired %s", layer) }
func (e *events) HedgeWon(_ interceptor.Observed, layer string)   { e.add("won %s", layer) }
func (e *events) Budget(layer string, balance float64)            { e.add("budget %s %.2f", layer, balance) }

func TestBudgetBoundsHedges(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := &events{}
		l := mustNew(t, hedge.Config{Delay: 10 * ms, Budget: budget.Config{Ratio: 0.5, MinPerSecond: budget.None}})
		for range 3 {
			newServer(t, answer{after: time.Second}, answer{}).call(nil, interceptor.Observe(e), l)
		}
		want := []string{
			"budget hedge 0.50", "attempt 0", "budget hedge 0.50", "refused hedge BUDGET",
			"budget hedge 1.00", "attempt 0", "budget hedge 0.00", "fired hedge", "attempt 1", "won hedge",
			"budget hedge 0.50", "attempt 0", "budget hedge 0.50", "refused hedge BUDGET",
		}
		if !slices.Equal(e.log, want) {
			t.Errorf("the observer saw\n%q, want\n%q", e.log, want)
		}
	})
}

func TestLatencyOfLostFirstAttempt(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := tower(t)
		// Two thirds of the calls from now on take 100 ms on the first attempt, and
		// 1 ms on the second. Were these left out, all that is recorded would be 1 ms.
		for i := range 300 {
			s := newServer(t, answer{after: ms}, answer{after: ms})
			if i%3 > 0 {
				s.answers[0].after = 100 * ms
			}
			s.call(nil, l)
		}
		if d, _ := l.Delay(method); d < 20*ms || d > 102*ms {
			t.Errorf("the delay is %v, want it to have grown from 10ms towards the 100ms that most calls take", d)
		}
	})
}

func TestLatency(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := mustNew(t, hedge.Config{})
		for range 20 {
			newServer(t, answer{err: unavailable}).call(nil, l)
		}
		if _, ok := l.Delay(method); ok {
			t.Error("calls are hedged although only failures are known")
		}
		for range 10 {
			newServer(t, answer{after: 20 * ms}).call(nil, l)
		}
		if d, ok := l.Delay(method); !ok || d < 20*ms || d > 21*ms {
			t.Errorf("the delay is %v, %v; want 20ms", d, ok)
		}
		time.Sleep(2 * time.Minute)
		if _, ok := l.Delay(method); ok {
			t.Error("calls are hedged although all latencies are older than the window")
		}
		for range 10 {
			newServer(t, answer{}).call(nil, l)
		}
		if d, ok := l.Delay(method); !ok || d != ms {
			t.Errorf("the delay is %v, %v; want MinDelay", d, ok)
		}
	})
}

func TestPanicReachesCaller(t *testing.T) {
	for name, answers := range map[string][]answer{
		"of the first":           {{after: 20 * ms, panics: "boom"}, {after: time.Hour}},
		"of an extra attempt":    {{after: time.Hour}, {after: 20 * ms, panics: "boom"}},
		"of one made at once":    {{err: unavailable}, {panics: "boom"}},
		"before there is a race": {{panics: "boom"}},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				inside := &tickets{name: "attempt"}
				s := newServer(t, answers...)
				defer func() {
					if got := recover(); got != "boom" {
						t.Errorf("recovered %v, want the attempt's panic", got)
					}
					synctest.Wait()
					if len(inside.log) != s.n {
						t.Errorf("%d attempts, released %q; want all to have ended", s.n, inside.log)
					}
				}()
				_, _, err := s.call(nil, mustNew(t, fixed), inside)
				t.Errorf("the call returned %v, want a panic", err)
			})
		})
	}
}

func TestMaxExtraLoad(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := mustNew(t, hedge.Config{MaxExtraLoad: 0.25})
		for i := range 100 {
			newServer(t, answer{after: time.Duration(i+1) * ms}).call(nil, l)
		}
		if d, ok := l.Delay(method); !ok || d < 77*ms || d > 81*ms {
			t.Errorf("the delay is %v, want the 80th percentile, 80ms as of a few calls ago", d)
		}
		l = mustNew(t, hedge.Config{MaxExtraLoad: 0.25})
		for range 8 {
			l.Budget().Deposit(interceptor.Now())
		}
		if got := l.Budget().Balance(); math.Abs(got-11.9) > 1e-9 {
			t.Errorf("balance = %v after 8 calls, want 0.2375 for each and ten in reserve", got)
		}
	})
}

func TestInvalidConfigChangesNothing(t *testing.T) {
	l := mustNew(t, fixed)
	for field, c := range map[string]hedge.Config{
		"MaxExtraLoad is 1":     {MaxExtraLoad: 1},
		"MaxExtraLoad is 1e-07": {MaxExtraLoad: 1e-7},
		"MaxExtraLoad is -0.1":  {MaxExtraLoad: -0.1},
		"MaxExtraLoad is NaN":   {MaxExtraLoad: math.NaN()},
		"Delay":                 {Delay: -2},
		"Percentile is 0.5":     {Percentile: 0.5, Delay: 1},
		"Percentile is 1":       {Percentile: 1},
		"Percentile is NaN":     {Percentile: math.NaN()},
		"MinDelay":              {MinDelay: -1},
		"MinDataPoints":         {MinDataPoints: -1},
		"Window is 1ms":         {Window: ms},
		"Window is 2h":          {Window: 2 * time.Hour},
		"MaxAttempts is 11":     {MaxAttempts: 11},
		"MaxAttempts is -1":     {MaxAttempts: -1},
		"NonFatal[0]":           {NonFatal: []codes.Code{codes.OK}},
		"BufferBytes":           {BufferBytes: -1},
		"Budget.TTL":            {Budget: budget.Config{TTL: 1}, Delay: 5},
	} {
		if _, err := hedge.New(c); err == nil || !strings.HasPrefix(err.Error(), "hedge: "+field) {
			t.Errorf("New(%+v) = %v, want an error that names %s", c, err, field)
		}
		if err := l.Update(c); err == nil || !strings.HasPrefix(err.Error(), "hedge: "+field) {
			t.Errorf("Update(%+v) = %v, want an error that names %s", c, err, field)
		}
	}
	if d, ok := l.Delay(method); d != 10*ms || !ok || l.Budget().Balance() != 1000 {
		t.Errorf("delay %v, balance %v after bad updates, want 10ms and 1000 as before", d, l.Budget().Balance())
	}
	for name, o := range map[string]hedge.Option{"WithBudget": hedge.WithBudget(nil), "WithIdempotent": hedge.WithIdempotent(nil)} {
		if _, err := hedge.New(hedge.Config{}, o); err == nil || !strings.Contains(err.Error(), name) {
			t.Errorf("New with %s(nil) = %v, want an error that names it", name, err)
		}
	}
	b, err := budget.New(budget.Config{})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := hedge.New(hedge.Config{Budget: budget.Config{Ratio: 1}}, hedge.WithBudget(b)); err == nil || !strings.Contains(err.Error(), "Budget") {
		t.Errorf("New with two budgets = %v, want an error that names Budget", err)
	}
	if h, err := hedge.New(hedge.Config{}, hedge.WithBudget(b)); err != nil || h.Budget() != b {
		t.Errorf("New with a shared budget = %v, want a layer that has it", err)
	}
}

func TestUpdate(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := tower(t)
		before := l.Budget().Balance()
		c := hedge.Config{Percentile: 0.5, Window: 2 * time.Minute, Budget: budget.Config{MinPerSecond: 100}}
		if err := l.Update(c); err != nil {
			t.Fatal(err)
		}
		if d, ok := l.Delay(method); !ok || d < ms || d > ms*101/100 {
			t.Errorf("the delay is %v, %v; want the median of what is known, 1ms", d, ok)
		}
		if got := l.Budget().Balance(); got != before {
			t.Errorf("balance = %v, want %v as before", got, before)
		}
	})
}

func TestMethods(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := fixed
		c.Methods = []string{} // None but those that are declared.
		s := newServer(t, answer{after: 50 * ms})
		e := &events{}
		s.call(nil, interceptor.Observe(e), mustNew(t, c))
		s.want("0s 0 sent", "50ms 0 answered")
		if !slices.Contains(e.log, "refused hedge NOT_IDEMPOTENT") {
			t.Errorf("the observer saw %q, want to be told that the call may not be hedged", e.log)
		}
		s = newServer(t, answer{after: 50 * ms}, answer{})
		s.call(nil, mustNew(t, c, hedge.WithIdempotent(func(m string) bool { return m == method })))
		s.want("0s 0 sent", "10ms 1 sent", "10ms 1 answered", "10ms 0 cancelled")
	})
}

func TestConformance(t *testing.T) {
	for name, delay := range map[string]time.Duration{"hedging_at_once": time.Microsecond, "hedging_some": 5 * ms, "by_percentile": 0} {
		t.Run(name, func(t *testing.T) {
			layertest.RunStack(t, func() ([]interceptor.Spec, func() error) {
				outer, inner := new(calltest.Counter), new(calltest.Counter)
				l := mustNew(t, hedge.Config{Delay: delay, MaxAttempts: 3, Budget: budget.Config{MinPerSecond: 100}})
				return []interceptor.Spec{outer, l, inner}, func() error { return errors.Join(outer.AtRest(), inner.AtRest()) }
			})
		})
	}
}

func TestConformanceAroundRetry(t *testing.T) {
	layertest.RunStack(t, func() ([]interceptor.Spec, func() error) {
		b, err := budget.New(budget.Config{MinPerSecond: 100})
		if err != nil {
			t.Fatal(err)
		}
		r, err := retry.New(retry.Config{AllMethods: true, Backoff: retry.Backoff{Initial: 10 * time.Microsecond}}, retry.WithBudget(b))
		if err != nil {
			t.Fatal(err)
		}
		outer, inner := new(calltest.Counter), new(calltest.Counter)
		l := mustNew(t, hedge.Config{Delay: 100 * time.Microsecond}, hedge.WithBudget(b))
		return []interceptor.Spec{outer, l, r, inner}, func() error { return errors.Join(outer.AtRest(), inner.AtRest()) }
	})
}

func TestAllocations(t *testing.T) {
	const undeclared = "/belfry.testing.v1.TestService/Unary"
	opts := []grpc.CallOption{grpc.StaticMethod()}
	ctx := t.Context()
	for _, tc := range []struct {
		name string
		c    hedge.Config
		want float64
	}{
		{"one attempt", hedge.Config{MaxAttempts: 1}, 0},
		{"undeclared", hedge.Config{Delay: time.Second}, 0},
		// A context for the first attempt, what tells its successors of it, and a timer.
		{"does not fire", hedge.Config{Delay: time.Second, AllMethods: true}, 4},
		{"does not fire by percentile", hedge.Config{AllMethods: true}, 4},
	} {
		conn := calltest.Stack(t, tc.c).Wrap(calltest.Server(func(context.Context) error { return nil }))
		n := testing.AllocsPerRun(1000, func() { conn.Invoke(ctx, undeclared, nil, nil, opts...) })
		if n > tc.want+0.1 && !race.Enabled { // A percentile is computed again now and then.
			t.Errorf("%s: %v allocations, want %v", tc.name, n, tc.want)
		}
	}
}

func benchmark(b *testing.B, c hedge.Config) {
	unary := calltest.Stack(b, mustNew(b, c)).UnaryClientInterceptor()
	opts := []grpc.CallOption{grpc.StaticMethod()}
	ctx := b.Context()
	b.ReportAllocs()
	for b.Loop() {
		unary(ctx, method, nil, nil, nil, calltest.Noop, opts...)
	}
}

func BenchmarkNotHedged(b *testing.B)          { benchmark(b, hedge.Config{MaxAttempts: 1}) }
func BenchmarkHedgeNotFired(b *testing.B)      { benchmark(b, hedge.Config{}) }
func BenchmarkHedgeNotFiredFixed(b *testing.B) { benchmark(b, hedge.Config{Delay: time.Second}) }

// On a connection the first attempt has a goroutine of its own. What that costs with all
// of gRPC, see BenchmarkConnection of package acceptance.
func BenchmarkHedgeNotFiredApart(b *testing.B) {
	conn := calltest.Stack(b, mustNew(b, hedge.Config{Delay: time.Second})).Wrap(nothing{})
	b.ReportAllocs()
	for b.Loop() {
		conn.Invoke(b.Context(), method, nil, nil)
	}
}

// nothing is a connection whose calls are over at once.
type nothing struct{ grpc.ClientConnInterface }

func (nothing) Invoke(context.Context, string, any, any, ...grpc.CallOption) error { return nil }

// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package acceptance

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/belfry-go/belfry/interceptor"
	"github.com/belfry-go/belfry/interceptor/breaker"
	"github.com/belfry-go/belfry/interceptor/budget"
	"github.com/belfry-go/belfry/interceptor/buffer"
	"github.com/belfry-go/belfry/interceptor/concurrency"
	"github.com/belfry-go/belfry/interceptor/hedge"
	"github.com/belfry-go/belfry/interceptor/mapping"
	"github.com/belfry-go/belfry/interceptor/ratelimit"
	"github.com/belfry-go/belfry/interceptor/retry"
	"github.com/belfry-go/belfry/interceptor/stackconfig"
	"github.com/belfry-go/belfry/interceptor/timeout"
	"github.com/belfry-go/belfry/internal/test/calltest"
)

// held is a server that answers no call until it is told to.
type held struct {
	grpc.ClientConnInterface
	mu  sync.Mutex // Guards now and max.
	now int
	max int // The most calls that ran at a time.
	end chan struct{}
}

func newHeld() *held { return &held{end: make(chan struct{})} }

func (h *held) Invoke(ctx context.Context, _ string, _, _ any, _ ...grpc.CallOption) error {
	h.mu.Lock()
	h.now++
	h.max = max(h.max, h.now)
	h.mu.Unlock()
	defer func() {
		h.mu.Lock()
		defer h.mu.Unlock()
		h.now--
	}()
	select {
	case <-h.end:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

func (h *held) running() int {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.now
}

// Tower's builder_service test: the same layers around an inner service that
// answers "world" to true.
func TestTowersBuilderServiceComposes(t *testing.T) {
	s := newStack(t, `{"buffer": {"size": 5}}, {"concurrency": {"limit": 5}}, {"rateLimit": {"limit": 5, "per": "5s", "burst": 5}},
		{"retry": {"allMethods": true}}, {"provided": "response"}, {"provided": "request"}`,
		stackconfig.WithLayer("response", mapping.Response(func(_ context.Context, _ string, m *wrapperspb.StringValue) error {
			m.Value = fmt.Sprint(m.Value == "world")
			return nil
		})),
		stackconfig.WithLayer("request", mapping.Request(func(_ context.Context, _ string, m *wrapperspb.StringValue) (*wrapperspb.StringValue, error) {
			return wrapperspb.String(fmt.Sprint(m.Value == "hello")), nil
		})))
	want := "*: [buffer > concurrency > ratelimit > retry > mapresponse > maprequest]"
	if got := s.String(); got != want {
		t.Errorf("String() = %q, want %q: the first layer is the outermost", got, want)
	}
	var seen string
	unary := s.UnaryClientInterceptor()
	reply := new(wrapperspb.StringValue)
	err := unary(t.Context(), "/s.S/M", wrapperspb.String("hello"), reply, nil,
		func(_ context.Context, _ string, req, reply any, _ *grpc.ClientConn, _ ...grpc.CallOption) error {
			seen = req.(*wrapperspb.StringValue).Value
			reply.(*wrapperspb.StringValue).Value = "world"
			return nil
		})
	if err != nil || seen != "true" || reply.Value != "true" {
		t.Errorf("the inner service saw %q, the caller got %q and %v, want true, true and no error", seen, reply.Value, err)
	}
}

// The order is the program: what is in flight, waits and is refused of 200 calls
// at a time, as the documentation of package interceptor counts it.
func TestOrderDecidesHowManyCallsAreInFlight(t *testing.T) {
	const (
		shed     = `{"loadShed": {}}`
		queue    = `{"name": "buffer", "buffer": {"size": 100}}`
		limit    = `{"name": "limit", "concurrency": {"limit": 10}}`
		failFast = `{"failFast": {"after": "0.3s"}}`
		within   = `{"rateLimit": {"limit": 1000000000, "burst": 1000000000}}` // What is always ready.
	)
	for _, c := range []struct {
		order                  string
		run, atLimit, inBuffer int // At a time; the rest of 200 calls is refused.
	}{
		{queue + "," + limit, 10, 100, 100},
		{queue + "," + limit + "," + within, 10, 100, 100},
		{limit + "," + queue + "," + within, 10, 190, 0},
		{shed + "," + limit, 10, 0, -1},
		{limit + "," + shed + "," + within, 10, 190, -1},
		{shed + "," + queue + "," + limit, 10, 100, 100},
		{queue + "," + shed + "," + limit, 10, 0, 0},
		{queue + "," + failFast + "," + limit, 10, 100, 100},
		{failFast + "," + queue + "," + limit, 10, 100, 100},
		{shed + "," + failFast + "," + limit, 10, 0, -1},
	} {
		synctest.Test(t, func(t *testing.T) {
			s := newStack(t, c.order)
			server := newHeld()
			conn := s.Wrap(server)
			errs := make(chan error, 200)
			for range 200 {
				go func() { errs <- conn.Invoke(t.Context(), "/s.S/M", nil, nil) }()
			}
			synctest.Wait()
			in := c.run + c.atLimit
			l := s.Layer("limit").(*concurrency.Layer)
			if run, wait, refused := server.running(), l.Waiting(), len(errs); run != c.run || wait != c.atLimit || refused != 200-in {
				t.Errorf("%v: %d run, %d wait at the limit and %d are refused, want %d, %d and %d", s, run, wait, refused, c.run, c.atLimit, 200-in)
			}
			if c.inBuffer >= 0 {
				if got := s.Layer("buffer").(*buffer.Layer).Waiting(); got != c.inBuffer {
					t.Errorf("%v: %d wait in the buffer, want %d", s, got, c.inBuffer)
				}
			}
			if got := s.InFlight(); got != in {
				t.Errorf("%v: InFlight() = %d, want %d", s, got, in)
			}
			close(server.end)
			var ok int
			for range 200 {
				err := <-errs
				r, refused := interceptor.AsRefusal(err)
				switch {
				case err == nil:
					ok++
				case !refused || !r.NotSent():
					t.Errorf("%v: a call ended with %v, want no error or a refusal", s, err)
				}
			}
			if ok != in || server.max != 10 {
				t.Errorf("%v: %d calls succeeded, at most %d at a time, want %d and 10", s, ok, server.max, in)
			}
		})
	}
}

// TestOrderDecidesWhereCallsWait holds the lines of the documentation in which calls
// wait at two gates: three calls find a token, and no other token comes.
func TestOrderDecidesWhereCallsWait(t *testing.T) {
	const (
		queue = `{"name": "buffer", "buffer": {"size": 100}}`
		limit = `{"name": "limit", "concurrency": {"limit": 10}}`
		rate  = `{"name": "rate", "rateLimit": {"limit": 3, "per": "3600s", "burst": 3}}`
	)
	for _, c := range []struct {
		order                    string
		inBuffer, atLimit, inAll int
	}{
		{queue + "," + limit + "," + rate, 100, 93, 103}, // 7 of the 10 with a permit wait for a token.
		{limit + "," + queue + "," + rate, 7, 190, 200},
	} {
		synctest.Test(t, func(t *testing.T) {
			s := newStack(t, c.order)
			server := newHeld()
			conn := s.Wrap(server)
			ctx, cancel := context.WithCancel(t.Context())
			var wg sync.WaitGroup
			for range 200 {
				wg.Go(func() { conn.Invoke(ctx, "/s.S/M", nil, nil) })
			}
			synctest.Wait()
			inBuffer, atLimit := s.Layer("buffer").(*buffer.Layer).Waiting(), s.Layer("limit").(*concurrency.Layer).Waiting()
			if inBuffer != c.inBuffer || atLimit != c.atLimit || s.InFlight() != c.inAll || server.running() != 3 {
				t.Errorf("%v: %d calls in the buffer, %d at the limit, %d in all, %d run, want %d, %d, %d and 3",
					s, inBuffer, atLimit, s.InFlight(), server.running(), c.inBuffer, c.atLimit, c.inAll)
			}
			cancel()
			wg.Wait()
		})
	}
}

// departures is a server that notes when each call comes, and answers with err
// after a time, but not before it has recovered.
type departures struct {
	grpc.ClientConnInterface
	take      time.Duration
	err       error
	recovered time.Time
	mu        sync.Mutex // Guards sent.
	sent      []time.Time
}

func (d *departures) Invoke(context.Context, string, any, any, ...grpc.CallOption) error {
	d.mu.Lock()
	d.sent = append(d.sent, time.Now())
	d.mu.Unlock()
	time.Sleep(max(d.take, time.Until(d.recovered)))
	return d.err
}

// within is the largest number of calls that came in any interval of length w.
func (d *departures) within(w time.Duration) (most int) {
	for i, first := 0, 0; i < len(d.sent); i++ {
		for d.sent[i].Sub(d.sent[first]) > w {
			first++
		}
		most = max(most, i-first+1)
	}
	return most
}

// TestOrderDecidesWhatADecisionIsWorth holds the table of the documentation about
// what decides inside and outside of what waits. 100 calls a second come for 20 s to a
// rate of 100/s with a burst of one, and the server stalls for the first 10 s.
func TestOrderDecidesWhatADecisionIsWorth(t *testing.T) {
	limit := concurrency.Config{Limit: 10}
	rate := ratelimit.Config{Limit: 100, Burst: 1}
	for _, c := range []struct {
		layers   []interceptor.Spec
		min, max int // Calls sent in any 100 ms.
	}{
		{[]interceptor.Spec{limit, rate}, 10, 11}, // Burst + 100 × 0.1.
		{[]interceptor.Spec{rate, limit}, 1000, 1100},
	} {
		synctest.Test(t, func(t *testing.T) {
			s := calltest.Stack(t, c.layers...)
			server := &departures{recovered: time.Now().Add(10 * time.Second), take: time.Millisecond}
			conn := s.Wrap(server)
			var wg sync.WaitGroup
			for range 2000 {
				wg.Go(func() { conn.Invoke(t.Context(), "/s.S/M", nil, nil) })
				time.Sleep(10 * time.Millisecond)
			}
			wg.Wait()
			if got := server.within(100 * time.Millisecond); got < c.min || got > c.max {
				t.Errorf("%v: %d calls were sent within 100ms, want %d to %d", s, got, c.min, c.max)
			}
		})
	}
	queue, one, three := buffer.Config{Size: 100}, concurrency.Config{Limit: 1}, breaker.Config{ConsecutiveFailures: 3}
	for _, c := range []struct {
		layers []interceptor.Spec
		sent   int // Of 100 calls that come at once.
	}{
		{[]interceptor.Spec{queue, one, three}, 3},
		{[]interceptor.Spec{three, queue, one}, 100},
	} {
		synctest.Test(t, func(t *testing.T) {
			s := calltest.Stack(t, c.layers...)
			server := &departures{take: time.Millisecond, err: status.Error(codes.Unavailable, "down")}
			conn := s.Wrap(server)
			var wg sync.WaitGroup
			for range 100 {
				wg.Go(func() { conn.Invoke(t.Context(), "/s.S/M", nil, nil) })
			}
			wg.Wait()
			if len(server.sent) != c.sent {
				t.Errorf("%v: %d of 100 calls were sent, want %d", s, len(server.sent), c.sent)
			}
		})
	}
}

// attempts is a server whose attempts take a time each and then fail, unless their
// context ends first.
type attempts struct {
	grpc.ClientConnInterface
	take    time.Duration
	started atomic.Int64
	now     atomic.Int64 // How many run.
}

func (a *attempts) Invoke(ctx context.Context, _ string, _, _ any, _ ...grpc.CallOption) error {
	a.started.Add(1)
	a.now.Add(1)
	defer a.now.Add(-1)
	select {
	case <-time.After(a.take):
		return status.Error(codes.Unavailable, "down")
	case <-ctx.Done():
		return status.FromContextError(ctx.Err()).Err()
	}
}

// What is outside of a layer that makes several attempts sees calls, and what is
// inside sees attempts, as the second table of the documentation of package
// interceptor has it, with smaller numbers. Attempts take a second and fail, and the
// only back-off is between the first and the second: ten seconds.
func TestOrderDecidesWhetherALayerSeesCallsOrAttempts(t *testing.T) {
	const sec = time.Second
	again := func(backoff time.Duration) interceptor.Spec {
		return retry.Config{AllMethods: true, Backoff: retry.Backoff{Initial: backoff, Max: time.Minute, Jitter: retry.NoJitter}}
	}
	limit := func(n int64) interceptor.Spec { return concurrency.Config{Limit: n} }
	rate := ratelimit.Config{Limit: 2, Burst: 2}
	oneSecond := timeout.Config{Timeout: sec}
	extra := hedge.Config{AllMethods: true, Delay: sec / 10, Budget: budget.Config{Ratio: 1}}
	// A budget for all of them: the defaults allow fewer.
	three := retry.Config{AllMethods: true, MaxAttempts: 3, Backoff: retry.Backoff{Initial: sec / 100}, Budget: budget.Config{Ratio: 10, MinPerSecond: 10}}
	two := hedge.Config{AllMethods: true, MaxAttempts: 2, Delay: sec / 10, Budget: budget.Config{Ratio: 10, MinPerSecond: 10}}
	for _, c := range []struct {
		name          string
		layers        []interceptor.Spec
		calls         int
		take, at      time.Duration // How long an attempt takes, and when is looked.
		started, runs int64         // Attempts, then.
		ends          time.Duration // When the last call has ended; 0 is not checked.
	}{
		{"a call keeps its permit while it backs off", []interceptor.Spec{limit(2), again(10 * sec)}, 4, sec, 5 * sec, 2, 0, 0},
		{"while a call backs off another may run", []interceptor.Spec{again(10 * sec), limit(2)}, 4, sec, 5 * sec, 4, 0, 0},
		{"a rate of calls does not count attempts", []interceptor.Spec{rate, again(sec / 100)}, 2, sec / 100, sec / 2, 6, 0, 0},
		{"a rate of attempts does, and a retry waits for its token", []interceptor.Spec{again(sec / 100), rate}, 2, sec / 100, sec * 4 / 10, 2, 0, 2*sec + sec/100},
		{"one second for the call", []interceptor.Spec{oneSecond, again(sec)}, 1, time.Hour, sec / 2, 1, 1, sec},
		{"one second for each attempt, and back-offs of one and two", []interceptor.Spec{again(sec), oneSecond}, 1, time.Hour, sec / 2, 1, 1, 6 * sec},
		{"a hedged call holds two permits", []interceptor.Spec{extra, limit(3)}, 2, sec, sec / 2, 3, 3, 0},
		{"two calls and up to four attempts", []interceptor.Spec{limit(2), extra}, 2, sec, sec / 2, 4, 4, 0},
		{"the inner timeout never acts", []interceptor.Spec{oneSecond, timeout.Config{Timeout: 2 * sec}}, 1, time.Hour, sec / 2, 1, 1, sec},
		{"each attempt of a hedge is retried", []interceptor.Spec{two, three}, 1, sec, 5 * sec, 6, 0, 0},
		{"each attempt of a retry is hedged", []interceptor.Spec{three, two}, 1, sec, 5 * sec, 6, 0, 0},
	} {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s := calltest.Stack(t, c.layers...)
				server := &attempts{take: c.take}
				conn := s.Wrap(server)
				begin := time.Now()
				var wg sync.WaitGroup
				for range c.calls {
					wg.Go(func() { conn.Invoke(t.Context(), "/s.S/M", nil, nil) })
				}
				time.Sleep(c.at)
				synctest.Wait()
				if started, runs := server.started.Load(), server.now.Load(); started != c.started || runs != c.runs {
					t.Errorf("%v: after %v %d attempts have started and %d run, want %d and %d", s, c.at, started, runs, c.started, c.runs)
				}
				wg.Wait()
				if d := time.Since(begin); c.ends != 0 && d != c.ends {
					t.Errorf("%v: the last call ended after %v, want %v", s, d, c.ends)
				}
			})
		})
	}
}

// One deadline holds for waiting and running.
func TestADeadlineCoversWaiting(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		// Tower's Timeout(50 ms) > ConcurrencyLimit(1) lets 20 calls of 40 ms succeed,
		// the last after 800 ms.
		s := newStack(t, `{"timeout": {"call": "0.05s"}}, {"concurrency": {"limit": 1}}`)
		server := sleeper(40 * time.Millisecond)
		conn := s.Wrap(server)
		begin := time.Now()
		errs := make(chan error, 20)
		for range 20 {
			go func() { errs <- conn.Invoke(t.Context(), "/s.S/M", nil, nil) }()
		}
		ok := 0
		for range 20 {
			if err := <-errs; err == nil {
				ok++
			} else if !errors.Is(err, context.DeadlineExceeded) {
				t.Errorf("a call ended with %v, want a deadline exceeded", err)
			}
		}
		if d := time.Since(begin); ok != 1 || d != 50*time.Millisecond {
			t.Errorf("%d of 20 calls of 40ms succeeded, the last ended after %v, want 1 and 50ms", ok, d)
		}
	})
}

// sleeper is a server whose calls take a time.
type sleeper time.Duration

func (d sleeper) Invoke(ctx context.Context, _ string, _, _ any, _ ...grpc.CallOption) error {
	timer := time.NewTimer(time.Duration(d))
	defer timer.Stop()
	select {
	case <-timer.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

func (sleeper) NewStream(context.Context, *grpc.StreamDesc, string, ...grpc.CallOption) (grpc.ClientStream, error) {
	return nil, errors.New("no streams here")
}

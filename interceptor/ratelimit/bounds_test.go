// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package ratelimit

import (
	"context"
	"fmt"
	"math/rand/v2"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/sync/semaphore"
	"golang.org/x/time/rate"
	"google.golang.org/grpc"
	"google.golang.org/grpc/metadata"

	"github.com/belfry-go/belfry/interceptor"
	"github.com/belfry-go/belfry/interceptor/adapt"
	"github.com/belfry-go/belfry/internal/test/calltest"
	"github.com/belfry-go/belfry/internal/test/race"
	"github.com/belfry-go/belfry/internal/testserver"
	testingv1 "github.com/belfry-go/belfry/proto/belfry/testing/v1"
)

func TestRefund(t *testing.T) {
	t.Run("late_tokens_do_not_exceed_the_bound", testLateRefunds)
	t.Run("keeps_the_rate_exact", testExactUnderRefunds)
	t.Run("of_random_tokens_at_random_times", testRandomRefunds)
	t.Run("of_all_tokens_leaves_a_full_bucket", testRefundOfAll)
	t.Run("for_calls_that_are_not_sent", testNotSent)
	t.Run("of_tokens_from_before_an_update", testRefundAfterUpdate)
	t.Run("to_a_limiter_of_x_time_rate_in_time_only", testRefundFromRate)
	t.Run("after_a_refusal_inside", testRefundAfterARefusalInside)
	t.Run("of_a_cancelled_call", testRefundOfACancelledCall)
	t.Run("goes_to_the_first_in_the_queue", testRefundGoesToTheFirstInTheQueue)
}

// limit admits n calls at a time, and lets the others wait.
func limit(n int64) interceptor.Spec {
	return adapt.FromSemaphore("limit", semaphore.NewWeighted(n))
}

// Calls that took their tokens seconds ago give them back all at once.
func testLateRefunds(t *testing.T) {
	for _, cfg := range []Config{{Limit: 100, Burst: 10}, {Limit: 100, Algorithm: Window}} {
		t.Run(cfg.Algorithm.String(), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				l, srv := mustNew(t, cfg), newServer()
				full := semaphore.NewWeighted(1)
				full.TryAcquire(1)
				stuck := calltest.Stack(t, l, adapt.FromSemaphore("limit", full)).Wrap(newServer())
				conn := calltest.Stack(t, l).Wrap(srv)
				ctx, cancel := context.WithCancel(context.Background())
				var wg sync.WaitGroup
				for range 500 { // They take tokens for 5 s, and wait inside.
					wg.Go(func() { stuck.Invoke(ctx, "/s/m", nil, nil) })
				}
				time.Sleep(6 * time.Second)
				waiters, giveUp := context.WithCancel(context.Background())
				for range 2000 {
					wg.Go(func() { conn.Invoke(waiters, "/s/m", nil, nil) })
				}
				time.Sleep(time.Second)
				before := len(srv.times())
				cancel()
				time.Sleep(200 * ms)
				synctest.Wait()
				got, most := len(srv.times())-before, 10+20
				if cfg.Algorithm == Window { // What is still in the window may come back.
					most = 100
				}
				if got > most {
					t.Errorf("%d calls were sent in 200 ms, want at most %d", got, most)
				}
				if cfg.Algorithm == Window {
					wantWindow(t, srv.times(), cfg.Limit, time.Second)
				} else {
					wantSmooth(t, srv.times(), cfg.Burst, 10*ms)
				}
				giveUp()
				wg.Wait()
			})
		})
	}
}

// A backlog whose calls are refused inside, give up, or pass: what is sent is the
// rate, to two calls in ten seconds.
func testExactUnderRefunds(t *testing.T) {
	base := rand.Uint64()
	t.Logf("seed %d", base)
	for seed := range uint64(20) {
		synctest.Test(t, func(t *testing.T) {
			rng := rand.New(rand.NewPCG(base, seed))
			limit, burst := 1+rng.IntN(100), 1+rng.IntN(20)
			l, srv := mustNew(t, Config{Limit: limit, Burst: burst}), newServer()
			inside := adapt.FromAllow("inside", interceptor.ReasonFilter, func(ctx context.Context) (func(interceptor.Outcome, error), error) {
				if ctx.Value(refusedKey{}) != nil {
					return nil, interceptor.Refuse("inside", interceptor.ReasonFilter, "")
				}
				return nil, nil
			})
			conn := calltest.Stack(t, l, inside).Wrap(srv)
			ctx, cancel := context.WithCancel(context.Background())
			defer cancel()
			var wg sync.WaitGroup
			for range 2*10*limit + burst + 50 {
				ctx := ctx
				if rng.IntN(4) == 0 {
					var stop context.CancelFunc
					ctx, stop = context.WithTimeout(ctx, time.Duration(rng.IntN(3000))*ms)
					defer stop()
				}
				if rng.IntN(5) == 0 {
					ctx = context.WithValue(ctx, refusedKey{}, true)
				}
				wg.Go(func() { conn.Invoke(ctx, "/s/m", nil, nil) })
			}
			time.Sleep(10 * time.Second)
			synctest.Wait()
			if l.Waiting() > 0 {
				got, want := len(srv.times()), burst+10*limit
				if got > want+1 || got < want-2 {
					t.Errorf("%d calls of %d per second and burst %d were sent in 10 s, want %d", got, limit, burst, want)
				}
			}
			wantSmooth(t, srv.times(), burst, time.Second/time.Duration(limit))
			cancel()
			wg.Wait()
		})
	}
}

type refusedKey struct{}

// The tokens that are not given back are always within the bound, and at most one
// of those that are is lost for longer than it takes the bucket to make one.
func testRandomRefunds(t *testing.T) {
	base := rand.Uint64()
	t.Logf("seed %d", base)
	for seed := range uint64(100) {
		synctest.Test(t, func(t *testing.T) {
			rng := rand.New(rand.NewPCG(base, seed))
			const interval = 10 * ms
			burst := 1 + rng.IntN(12)
			g := mustNew(t, Config{Limit: 100, Burst: burst}).one.src.(*gcra)
			type token struct {
				slot int64
				at   time.Duration
			}
			var out []token
			var kept []time.Duration
			start := time.Now()
			for range 2000 {
				switch i := rng.IntN(10); {
				case i < 5:
					now := interceptor.Now()
					next := g.next(now, 0)
					slot, ok := g.take(now)
					if ok != (next == now) {
						t.Fatalf("take at %v: %v, but the next token comes at %v", now, ok, next)
					}
					if ok {
						out = append(out, token{slot, time.Since(start)})
					}
				case i < 8 && len(out) > 0:
					i := rng.IntN(len(out))
					if rng.IntN(2) == 0 {
						g.refund(out[i].slot)
					} else {
						kept = append(kept, out[i].at)
					}
					out = slices.Delete(out, i, i+1)
				case i < 9:
					time.Sleep(time.Duration(rng.IntN(int(interval))))
				case rng.IntN(4) == 0:
					time.Sleep(time.Duration(rng.IntN(burst+1)) * interval)
				}
			}
			for _, o := range out {
				kept = append(kept, o.at)
			}
			slices.Sort(kept)
			wantSmooth(t, kept, burst, interval)
			if n := len(g.free); n > burst {
				t.Errorf("%d slots are free, want at most the burst of %d", n, burst)
			}
		})
	}
}

func testRefundOfAll(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		seed := rand.Uint64()
		t.Logf("seed %d", seed)
		rng := rand.New(rand.NewPCG(seed, 0))
		g := mustNew(t, Config{Limit: 1, Per: time.Hour, Burst: 20}).one.src.(*gcra)
		tokens := func() (n int) {
			for now := interceptor.Now(); g.next(now, n) == now; n++ {
			}
			return n
		}
		var out []int64
		for range 20 {
			slot, ok := g.take(interceptor.Now())
			if !ok {
				t.Fatal("no token, want 20")
			}
			out = append(out, slot)
		}
		time.Sleep(ms)
		rng.Shuffle(len(out), func(i, j int) { out[i], out[j] = out[j], out[i] })
		for _, slot := range out {
			g.refund(slot)
		}
		// The first of them is just being made up for.
		if n := tokens(); n < 19 {
			t.Errorf("%d tokens after all were given back, want at least 19 of 20", n)
		}
		time.Sleep(time.Hour)
		if n := tokens(); n != 20 || !g.full(interceptor.Now()) {
			t.Errorf("%d tokens an interval later, want a full bucket of 20", n)
		}
	})
}

// Tokens of the old rate do not make a new one that is lower exceed its bound.
func testRefundAfterUpdate(t *testing.T) {
	for _, cfg := range []Config{{Limit: 10, Burst: 1}, {Limit: 1, Burst: 3}, {Limit: 100, Burst: 5}} {
		synctest.Test(t, func(t *testing.T) {
			l := mustNew(t, Config{Limit: 10, Burst: 10})
			src := l.one.src
			var out []int64
			for range 10 {
				slot, _ := src.take(interceptor.Now())
				out = append(out, slot)
			}
			time.Sleep(150 * ms)
			src.refund(out[5])
			wantOK(t, l.Update(cfg))
			var kept []time.Duration
			start := time.Now()
			for i := range out {
				if i != 5 {
					src.refund(out[i])
				}
				for _, ok := src.take(interceptor.Now()); ok; _, ok = src.take(interceptor.Now()) {
					kept = append(kept, time.Since(start))
				}
				time.Sleep(10 * ms)
			}
			wantSmooth(t, kept, cfg.Burst, time.Second/time.Duration(cfg.Limit))
		})
	}
}

func testRefundFromRate(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := rate.NewLimiter(10, 5)
		src := rateSource{l}
		at, _ := src.take(0)
		time.Sleep(499 * ms)
		l.ReserveN(time.Now(), 5)
		src.refund(at)
		if n := l.Tokens(); n < 0.9 {
			t.Errorf("%v tokens after one came back before five could have come, want 1", n)
		}
		time.Sleep(ms)
		src.refund(at)
		if n := l.Tokens(); n > 1.1 {
			t.Errorf("%v tokens after one came back late, want no more than before", n)
		}
	})
}

// Calls that come expired or cancelled, and calls for which there is no connection,
// burn no tokens.
func testNotSent(t *testing.T) {
	expired, cancel := context.WithDeadline(t.Context(), time.Now().Add(-time.Second))
	defer cancel()
	cancelled, cancel := context.WithCancel(t.Context())
	cancel()
	for _, algorithm := range []Algorithm{Smooth, Window} {
		cfg := Config{Limit: 20, Per: time.Hour, Algorithm: algorithm}
		if algorithm == Smooth {
			cfg.Burst = 20
		}
		for name, tt := range map[string]struct {
			ctx context.Context
			req *testingv1.UnaryRequest
			own []grpc.CallOption
			off bool // The server is.
		}{
			"expired":       {ctx: expired},
			"cancelled":     {ctx: cancelled},
			"oversize":      {req: &testingv1.UnaryRequest{Payload: make([]byte, 100)}, own: []grpc.CallOption{grpc.MaxCallSendMsgSize(50)}},
			"no_connection": {off: true},
		} {
			t.Run(fmt.Sprintf("%v/%s", algorithm, name), func(t *testing.T) {
				l, srv := mustNew(t, cfg), testserver.New(t)
				conn := calltest.Stack(t, l).Wrap(testserver.Dial(t, srv))
				client := testingv1.NewTestServiceClient(conn)
				if tt.off {
					srv.Stop()
				} else if _, err := client.Unary(t.Context(), &testingv1.UnaryRequest{}); err != nil {
					t.Fatal(err)
				}
				for range 30 {
					ctx := tt.ctx
					if ctx == nil {
						ctx = t.Context()
					}
					_, err := client.Unary(ctx, tt.req, tt.own...)
					if err == nil || calltest.Reason(err) == interceptor.ReasonRateLimit {
						t.Fatalf("a call that is %s: %v, want an error other than the limit's", name, err)
					}
				}
				left := 0
				for now := interceptor.Now(); l.one.src.next(now, left) == now; left++ {
				}
				want := 19
				if tt.off {
					want = 20
				}
				if left != want {
					t.Errorf("%d tokens are left, want %d", left, want)
				}
			})
		}
	}
}

func TestOrder(t *testing.T) {
	t.Run("inside_a_limit_it_bounds_what_is_sent", testInsideALimit)
}

// The server hangs for 10 s, and then calls take 1 ms.
func testInsideALimit(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := mustNew(t, Config{Limit: 100, Burst: 10})
		stack := calltest.Stack(t, limit(10), l)
		if advice := stack.Advice(); len(advice) != 0 {
			t.Errorf("advice %q, want none", advice)
		}
		if advice := calltest.Stack(t, l, limit(10)).Advice(); len(advice) != 1 {
			t.Errorf("advice %q on a rate outside a limit, want one sentence", advice)
		}
		var mu sync.Mutex
		var sent []time.Duration
		start := time.Now()
		conn := stack.Wrap(calltest.Server(func(context.Context) error {
			mu.Lock()
			sent = append(sent, time.Since(start))
			mu.Unlock()
			time.Sleep(max(10*time.Second-time.Since(start), 0) + ms)
			return nil
		}))
		var wg sync.WaitGroup
		for range 2000 { // 100 a second.
			wg.Go(func() { conn.Invoke(context.Background(), "/s/m", nil, nil) })
			time.Sleep(10 * ms)
		}
		wg.Wait()
		wantSmooth(t, sent, 10, 10*ms)
	})
}

func TestPriority(t *testing.T) {
	t.Run("higher_goes_first", testPriority)
	t.Run("of_the_layers_own", testOwnPriority)
	t.Run("further_attempts_go_before_first_ones", testFurtherFirst)
}

func testPriority(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		srv := newServer()
		conn := calltest.Stack(t, mustNew(t, Config{Limit: 10})).Wrap(srv)
		wantOK(t, call(conn))
		var done []<-chan error
		for i, m := range []string{"low", "high", "low2", "high2"} {
			done = append(done, start(t, conn, interceptor.ContextWithPriority(context.Background(), i%2), m))
		}
		// It would have to wait for three others, but its rank lets it pass two.
		ctx, cancel := context.WithTimeout(interceptor.ContextWithPriority(context.Background(), 2), 150*ms)
		defer cancel()
		done = append(done, start(t, conn, ctx, "highest"))
		for _, d := range done {
			wantOK(t, <-d)
		}
		if got, want := srv.methods()[1:], []string{"highest", "high", "high2", "low", "low2"}; !slices.Equal(got, want) {
			t.Errorf("served in the order %v, want %v", got, want)
		}
	})
}

func testOwnPriority(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		srv := newServer()
		first := WithPriority(interceptor.MetadataPriority("priority"))
		conn := calltest.Stack(t, mustNew(t, Config{Limit: 10}, first)).Wrap(srv)
		wantOK(t, call(conn))
		a := start(t, conn, context.Background(), "a")
		b := start(t, conn, metadata.AppendToOutgoingContext(context.Background(), "priority", "1"), "b")
		wantOK(t, <-a)
		wantOK(t, <-b)
		if got, want := srv.methods()[1:], []string{"b", "a"}; !slices.Equal(got, want) {
			t.Errorf("served in the order %v, want %v", got, want)
		}
	})
}

// again is a layer that makes a second attempt of calls of the method "again".
type again struct{ interceptor.CallOnly }

func (l *again) NewLayer() (interceptor.Layer, error) { return l, nil }

func (l *again) WrapCall(next interceptor.Next, again interceptor.Again) interceptor.Next {
	return func(ctx context.Context, c *interceptor.Call) error {
		o := c.Origin()
		err := next(ctx, c)
		if c.Method() != "again" || err != nil {
			return err
		}
		a, err := again(ctx, &o, interceptor.Forever)
		if err != nil {
			return err
		}
		return next(ctx, a)
	}
}

func testFurtherFirst(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		srv := newServer()
		conn := calltest.Stack(t, &again{}, mustNew(t, Config{Limit: 10})).Wrap(srv)
		var done []<-chan error
		for _, m := range []string{"again", "a", "b"} {
			done = append(done, start(t, conn, context.Background(), m))
		}
		for _, d := range done {
			wantOK(t, <-d)
		}
		if got, want := srv.methods(), []string{"again", "again", "a", "b"}; !slices.Equal(got, want) {
			t.Errorf("served in the order %v, want %v", got, want)
		}
	})
}

func TestEnd(t *testing.T) {
	t.Run("of_the_stack_reaches_those_who_wait", testDrain)
}

func testDrain(t *testing.T) {
	for name, spec := range map[string]interceptor.Spec{
		"smooth":    mustNew(t, Config{Limit: 1, Per: time.Hour}),
		"elsewhere": FromLimiter(&store{tokens: map[string]int{"": 1}, retry: time.Minute}, interceptor.KeyBy{}),
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				stack := calltest.Stack(t, spec)
				conn := stack.Wrap(newServer())
				wantOK(t, call(conn))
				waiting := start(t, conn, context.Background(), "/s/m")
				begin := time.Now()
				if err := stack.Drain(context.Background()); err != nil {
					t.Error(err)
				}
				if got := calltest.Reason(<-waiting); got != interceptor.ReasonDrain {
					t.Errorf("a call that waits when the stack drains: reason %q, want DRAIN", got)
				}
				if d := time.Since(begin); d != 0 {
					t.Errorf("Drain took %v, want no time", d)
				}
			})
		})
	}
}

func TestRefusal(t *testing.T) {
	t.Run("names_the_key", testRefusalNamesKey)
	t.Run("allocates_nothing_at_any_time_left", testRefusalAllocatesNothing)
}

func testRefusalNamesKey(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := mustNew(t, Config{Limit: 1, MaxKeys: 1, KeyBy: byMethod})
		conn := calltest.Stack(t, l).Wrap(newServer())
		for _, tt := range [][2]string{{"/s/a", "/s/a"}, {"/s/b", "(others)"}} {
			wantOK(t, conn.Invoke(context.Background(), tt[0], nil, nil))
			wantKey(t, conn.Invoke(context.Background(), tt[0], nil, nil, noWait), tt[1])
		}
		wantOK(t, l.Update(Config{Limit: 2, MaxKeys: 1, KeyBy: byMethod}))
		err := conn.Invoke(context.Background(), "/s/a", nil, nil, noWait)
		if r, _ := interceptor.AsRefusal(err); r == nil || r.Message != "more than 2 in 1s" {
			t.Errorf("after an update: %v, want a refusal that says the new rate", err)
		}
	})
}

func testRefusalAllocatesNothing(t *testing.T) {
	if race.Enabled {
		t.Skip("the race detector allocates")
	}
	l := mustNew(t, Config{Limit: 1, Per: time.Hour, KeyBy: byMethod})
	unary := calltest.Stack(t, l).UnaryClientInterceptor()
	ctx, opts := context.Background(), []grpc.CallOption{noWait}
	refuse := func() { unary(ctx, "/s/m", nil, nil, nil, calltest.Noop, opts...) }
	refuse()
	if n := testing.AllocsPerRun(1000, refuse); n != 0 {
		t.Errorf("%v allocations for a refusal, want 0", n)
	}
}

// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package concurrency_test

import (
	"context"
	"fmt"
	"math"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/sync/semaphore"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/belfry-go/belfry/interceptor"
	"github.com/belfry-go/belfry/interceptor/concurrency"
	"github.com/belfry-go/belfry/internal/test/calltest"
)

const ms = time.Millisecond

// feed gives a limit one round of samples after the other: as many as it allows,
// or inFlight if that is not zero, all started and ended together.
type feed struct {
	limit concurrency.Limit
	now   interceptor.Instant
}

func newFeed(l concurrency.Limit) *feed { return &feed{limit: l, now: interceptor.Instant(time.Hour)} }

func (f *feed) round(n int64, rtt time.Duration, dropped int64) {
	if n == 0 {
		n = f.limit.Limit()
	}
	for i := range n {
		s := concurrency.Sample{Start: f.now, RTT: rtt, InFlight: n}
		if i < dropped {
			s.Result = concurrency.Dropped
		}
		f.limit.OnSample(s)
	}
	f.now = f.now.Add(rtt + 1)
}

// queueing is a server that works on n calls at a time, base each.
func queueing(n int64, base time.Duration) func(inFlight int64) time.Duration {
	return func(inFlight int64) time.Duration {
		return max(base, base*time.Duration(inFlight)/time.Duration(n))
	}
}

func check(t *testing.T, what string, got, lo, hi int64) {
	t.Helper()
	if got < lo || got > hi {
		t.Errorf("%s: limit %d, want %d to %d", what, got, lo, hi)
	}
}

func must[T any](t testing.TB) func(T, error) T {
	return func(v T, err error) T {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
}

func TestAIMD(t *testing.T) {
	f := newFeed(must[*concurrency.AIMD](t)(concurrency.NewAIMD(concurrency.AIMDConfig{Initial: 30, Max: 40})))
	for i := range int64(5) {
		f.round(0, 10*ms, 0)
		// A round of L samples adds 1/L each, to a limit that grows meanwhile.
		check(t, "after a round of successes", f.limit.Limit(), 30+i, 31+i)
	}
	for range 20 {
		f.round(0, 10*ms, 0)
	}
	check(t, "at the upper bound", f.limit.Limit(), 40, 40)
	f.round(0, 10*ms, 40)
	check(t, "after 40 drops of one round", f.limit.Limit(), 36, 36) // Netflix's ratio, 0.9.
	f.round(0, 10*ms, 1)
	check(t, "after a drop of the next round", f.limit.Limit(), 32, 33)
	for range 100 {
		f.round(0, 10*ms, 1)
	}
	check(t, "a drop in every round, where +1 and -10% balance", f.limit.Limit(), 8, 11)
}

func TestAIMDIdleClient(t *testing.T) {
	f := newFeed(must[*concurrency.AIMD](t)(concurrency.NewAIMD(concurrency.AIMDConfig{Initial: 30})))
	for range 100 {
		f.round(14, 10*ms, 0)
	}
	check(t, "a client that uses 14 of 30", f.limit.Limit(), 30, 30)
	for range 3 {
		f.round(15, 10*ms, 0)
	}
	check(t, "a client that uses half", f.limit.Limit(), 31, 31)
}

func TestAIMDTimeout(t *testing.T) {
	f := newFeed(must[*concurrency.AIMD](t)(concurrency.NewAIMD(concurrency.AIMDConfig{Initial: 30, Timeout: 50 * ms})))
	f.round(0, 51*ms, 0)
	check(t, "successes over the timeout", f.limit.Limit(), 27, 27)
	f.round(0, 50*ms, 0)
	check(t, "successes at the timeout", f.limit.Limit(), 27, 28)
	f.limit.OnSample(concurrency.Sample{Start: f.now, RTT: 49 * ms, InFlight: 28, Result: concurrency.GivenUp})
	check(t, "a call given up before the timeout", f.limit.Limit(), 27, 28)
	f.limit.OnSample(concurrency.Sample{Start: f.now, RTT: 51 * ms, InFlight: 28, Result: concurrency.GivenUp})
	check(t, "a call given up after the timeout", f.limit.Limit(), 25, 25)
}

func TestGradient2Formula(t *testing.T) {
	// As published: it acts on each sample.
	g := must[*concurrency.Gradient2](t)(concurrency.NewGradient2(concurrency.Gradient2Config{Initial: 50, Window: 1, WindowSamples: 1}))
	at := interceptor.Instant(time.Hour)
	limit := 50.0
	sample := func(what string, rtt time.Duration) {
		t.Helper()
		at = at.Add(time.Second)
		g.OnSample(concurrency.Sample{Start: at, RTT: rtt, InFlight: g.Limit()})
		check(t, what, g.Limit(), int64(limit), int64(limit))
	}
	for range 10 {
		limit = 0.8*limit + 0.2*(limit+4)
		sample("no queueing: gradient 1", 10*ms)
	}
	long := 10 + 2.0/601*(40-10)
	limit = 0.8*limit + 0.2*(0.5*limit+4)
	sample("1.5·10.1/40 is below the least gradient, 0.5", 40*ms)
	long += 2.0 / 601 * (20 - long)
	limit = 0.8*limit + 0.2*(1.5*long/20*limit+4)
	sample("1.5·10.13/20: gradient 0.76", 20*ms)
	long += 2.0 / 601 * (4 - long)
	limit += 0.8
	sample("faster than ever", 4*ms)
	long *= 0.95 // For it was more than twice as long.
	long += 2.0 / 601 * (20 - long)
	limit = 0.8*limit + 0.2*(1.5*long/20*limit+4)
	sample("1.5·9.63/20: gradient 0.72", 20*ms)
}

func TestGradient2(t *testing.T) {
	cfg := concurrency.Gradient2Config{Min: 1, Max: 1000, Window: 10 * ms}
	newG := func() *feed { return newFeed(must[*concurrency.Gradient2](t)(concurrency.NewGradient2(cfg))) }

	f := newG()
	for range 200 {
		f.round(0, 10*ms, 0)
	}
	up := f.limit.Limit()
	check(t, "200 rounds without queueing", up, 80, 200)

	// Four times the long-term latency: gradient 0.5, at first.
	for range 10 {
		f.round(0, 40*ms, 0)
	}
	check(t, "ten slow rounds", f.limit.Limit(), up/4, up*3/4)

	f = newG()
	for range 200 {
		f.round(9, 10*ms, 0)
	}
	check(t, "a client that uses 9 of 20", f.limit.Limit(), 20, 20)

	f = newG()
	f.round(0, 10*ms, 20)
	check(t, "a round of drops", f.limit.Limit(), 18, 18)

	// A server of 40 workers, 10 ms each: what is in flight settles where the round
	// trip is about Tolerance times the long-term one, so not below the workers
	// and not at the upper bound.
	f = newG()
	rtt := queueing(40, 10*ms)
	for range 300 {
		f.round(0, rtt(f.limit.Limit()), 0)
	}
	check(t, "a server of 40 workers", f.limit.Limit(), 40, 200)
}

func TestVegas(t *testing.T) {
	f := newFeed(must[*concurrency.Vegas](t)(concurrency.NewVegas(concurrency.VegasConfig{Window: 10 * ms})))
	rtt := queueing(60, 10*ms)
	for range 200 {
		f.round(0, rtt(f.limit.Limit()), 0)
	}
	// With log10(limit) = 1, three to six calls queue.
	check(t, "a server of 60 workers", f.limit.Limit(), 62, 67)

	rtt = queueing(30, 10*ms) // The server loses half its workers.
	for range 100 {
		f.round(0, rtt(f.limit.Limit()), 0)
	}
	check(t, "the server at half its speed", f.limit.Limit(), 32, 37)

	rtt = queueing(1_000_000, 10*ms)
	for range 1000 {
		f.round(0, rtt(f.limit.Limit()), 0)
	}
	check(t, "no queueing at all", f.limit.Limit(), 1000, 1000)
	f.round(0, 10*ms, 1000)
	check(t, "drops", f.limit.Limit(), 997, 997) // By log10(1000), once.
}

func TestVegasProbe(t *testing.T) {
	f := newFeed(must[*concurrency.Vegas](t)(concurrency.NewVegas(concurrency.VegasConfig{Window: 10 * ms, ProbeWindows: 50})))
	for range 60 {
		f.round(10, 10*ms, 0)
	}
	check(t, "a client that uses 10 of 20, at first", f.limit.Limit(), 21, 26)
	before := f.limit.Limit()
	for range 45 { // The path has become longer; so far that looks like a queue.
		f.round(before, 30*ms, 0)
	}
	if got := f.limit.Limit(); got >= before {
		t.Errorf("limit %d after the round trip became longer, want less than %d", got, before)
	}
	low := f.limit.Limit()
	for range 200 {
		f.round(0, 30*ms, 0)
	}
	if got := f.limit.Limit(); got <= low {
		t.Errorf("limit %d after the new round trip was found to be the best, want more than %d", got, low)
	}
}

func TestUpdateAlgorithm(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := limit(t, concurrency.Config{Limit: 40})
		update := func(cfg concurrency.Config, want int64) {
			t.Helper()
			if err := l.Update(cfg); err != nil {
				t.Fatal(err)
			}
			if got := l.Limit(); got != want {
				t.Errorf("limit %d after Update(%+v), want %d", got, cfg, want)
			}
		}
		update(concurrency.Config{AIMD: &concurrency.AIMDConfig{}}, 40) // Begins where the fixed one was.
		calltest.Burst(calltest.Stack(t, l).Wrap(calltest.Server(func(context.Context) error { return status.Error(codes.Unavailable, "") })), 1)
		if got := l.Limit(); got != 36 {
			t.Fatalf("limit %d after a drop, want 36", got)
		}
		update(concurrency.Config{AIMD: &concurrency.AIMDConfig{BackoffRatio: 0.5}}, 36)
		update(concurrency.Config{AIMD: &concurrency.AIMDConfig{Initial: 5, Max: 30}}, 30)
		update(concurrency.Config{}, 30)
		update(concurrency.Config{Auto: &concurrency.AutoConfig{Max: 29}}, 29)
		update(concurrency.Config{Vegas: &concurrency.VegasConfig{}}, 14) // It begins with a probe, at half the limit.
		update(concurrency.Config{Gradient2: &concurrency.Gradient2Config{Min: 35}}, 35)
		update(concurrency.Config{Limit: 3}, 3)
	})
}

// Stats say what an algorithm thinks.
func TestStatsOfAlgorithms(t *testing.T) {
	for name, cfg := range map[string]concurrency.Config{
		"auto":      {},
		"gradient2": {Gradient2: &concurrency.Gradient2Config{}},
		"vegas":     {Vegas: &concurrency.VegasConfig{}},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				l := limit(t, cfg)
				takes := 10 * ms
				var err error
				c := calltest.Stack(t, l).Wrap(calltest.Server(func(context.Context) error {
					time.Sleep(takes)
					return err
				}))
				for range 500 {
					calltest.Burst(c, 5)
				}
				if s := l.Stats(""); s.Baseline != 10*ms || s.Latency != 10*ms || s.Lowered != "" {
					t.Errorf("after calls of 10ms: %+v", s)
				}
				takes = 20 * ms
				for range 100 {
					calltest.Burst(c, 5)
				}
				if s := l.Stats(""); s.Latency <= 15*ms {
					t.Errorf("after calls of 20ms: %+v", s)
				}
				err = status.Error(codes.Unavailable, "overloaded")
				calltest.Burst(c, 1)
				if s := l.Stats(""); s.Lowered != "drop" {
					t.Errorf("after a drop: %+v", s)
				}
			})
		})
	}
}

// recorder is an algorithm that only takes notes.
type recorder struct {
	n       int64
	samples []concurrency.Sample
}

func (r *recorder) Limit() int64                  { return r.n }
func (r *recorder) OnSample(s concurrency.Sample) { r.samples = append(r.samples, s) }

func TestSamples(t *testing.T) {
	unavailable, notFound := status.Error(codes.Unavailable, ""), status.Error(codes.NotFound, "")
	call := func(l *concurrency.Layer, ctx context.Context, err error, inside ...interceptor.Spec) {
		c := calltest.Stack(t, append([]interceptor.Spec{l}, inside...)...).Wrap(calltest.Server(func(ctx context.Context) error {
			select {
			case <-time.After(20 * ms):
				return err
			case <-ctx.Done():
				return status.FromContextError(ctx.Err()).Err()
			}
		}))
		c.Invoke(ctx, calltest.Method, nil, nil)
	}
	bg := context.Background()
	callFor := func(l *concurrency.Layer, patience time.Duration) {
		ctx, cancel := context.WithTimeout(bg, patience)
		defer cancel()
		call(l, ctx, nil)
	}
	for _, tc := range []struct {
		name string
		cfg  concurrency.Config
		do   func(l *concurrency.Layer)
		want []concurrency.Sample
	}{
		{"success", concurrency.Config{}, func(l *concurrency.Layer) { call(l, bg, nil) }, []concurrency.Sample{{RTT: 20 * ms, InFlight: 1}}},
		{"waiting further in is not part of the round trip", concurrency.Config{}, func(l *concurrency.Layer) { call(l, bg, nil, &slow{50 * ms}) }, []concurrency.Sample{{RTT: 20 * ms, InFlight: 1}}},
		{"a sign of overload", concurrency.Config{}, func(l *concurrency.Layer) { call(l, bg, unavailable) }, []concurrency.Sample{{RTT: 20 * ms, InFlight: 1, Result: concurrency.Dropped}}},
		{"the caller's deadline", concurrency.Config{}, func(l *concurrency.Layer) { callFor(l, 10*ms) },
			[]concurrency.Sample{{RTT: 10 * ms, InFlight: 1, Result: concurrency.GivenUp}}},
		{"another failure", concurrency.Config{}, func(l *concurrency.Layer) { call(l, bg, notFound) }, nil},
		{"a configured code", concurrency.Config{DropCodes: []codes.Code{codes.NotFound}}, func(l *concurrency.Layer) {
			call(l, bg, notFound)
			call(l, bg, unavailable)
		}, []concurrency.Sample{{RTT: 20 * ms, InFlight: 1, Result: concurrency.Dropped}}},
		{"no codes", concurrency.Config{DropCodes: []codes.Code{}}, func(l *concurrency.Layer) { call(l, bg, unavailable) }, nil},
		{"a cancelled call", concurrency.Config{}, func(l *concurrency.Layer) {
			ctx, cancel := context.WithCancel(bg)
			time.AfterFunc(10*ms, cancel)
			call(l, ctx, nil)
		}, []concurrency.Sample{{RTT: 10 * ms, InFlight: 1, Result: concurrency.GivenUp}}},
		{"a call that was refused further in", concurrency.Config{}, func(l *concurrency.Layer) {
			call(l, bg, nil, &hold{err: interceptor.Refuse("x", interceptor.ReasonRateLimit, "")})
		}, nil},
		{"a deadline that a layer inside has set", concurrency.Config{}, func(l *concurrency.Layer) {
			call(l, bg, interceptor.Refuse("timeout", interceptor.ReasonDeadline, "").Because(context.DeadlineExceeded, true))
		}, []concurrency.Sample{{RTT: 20 * ms, InFlight: 1, Result: concurrency.Dropped}}},
		{"a stream", concurrency.Config{}, stream20, nil},
		{"a stream that is to be sampled", concurrency.Config{SampleStreams: true}, stream20, []concurrency.Sample{{RTT: 20 * ms, InFlight: 1}}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := &recorder{n: 5}
				l := limit(t, tc.cfg, concurrency.WithAlgorithm(r))
				tc.do(l)
				if len(r.samples) != len(tc.want) {
					t.Fatalf("%d samples %+v, want %d", len(r.samples), r.samples, len(tc.want))
				}
				for i, got := range r.samples {
					if got.Start == 0 {
						t.Errorf("sample %d has no start", i)
					}
					got.Start = 0
					if got != tc.want[i] {
						t.Errorf("sample %d = %+v, want %+v", i, got, tc.want[i])
					}
				}
				checkRest(t, l)
			})
		})
	}
}

// stream20 receives the one message and the end of a stream that lives for 20ms.
func stream20(l *concurrency.Layer) {
	s, err := interceptor.NewStack(l)
	if err != nil {
		panic(err)
	}
	c := s.Wrap(&streams{errs: []error{nil}})
	st, err := c.NewStream(context.Background(), &grpc.StreamDesc{ClientStreams: true}, calltest.Method)
	if err != nil {
		panic(err)
	}
	time.Sleep(20 * ms)
	st.RecvMsg(nil)
}

// slow is a gate that takes its time, and says so.
type slow struct{ d time.Duration }

func (s *slow) NewLayer() (interceptor.Layer, error) { return s, nil }

func (s *slow) WrapCall(next interceptor.Next, _ interceptor.Again) interceptor.Next { return next }

func (s *slow) WrapGate(inner interceptor.Gate) interceptor.Gate {
	return interceptor.GateFunc(func(ctx context.Context, a *interceptor.Admission, w interceptor.Wait) error {
		since := a.Now()
		time.Sleep(s.d)
		a.Waited("slow", since)
		return inner.Admit(ctx, a, w)
	})
}

func TestAlgorithmBelowOne(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := &recorder{n: -3}
		l := limit(t, concurrency.Config{}, concurrency.WithAlgorithm(r))
		c := calltest.Stack(t, l).Wrap(calltest.Takes(time.Second))
		calltest.Expect(t, calltest.Burst(c, 2), calltest.OK(time.Second), calltest.OK(2*time.Second))
		r.n = 2 // Takes effect with the next sample.
		calltest.Expect(t, calltest.Burst(c, 3), calltest.OK(time.Second), calltest.OK(2*time.Second), calltest.OK(2*time.Second))
	})
}

// A server of ten workers, 20 ms each, and a hundred clients that never rest. Each
// algorithm, through a whole stack and in virtual time, finds a limit at which the
// workers are busy and the queue in the server is short; Gradient2 lets it grow
// slowly, as latency that lasts becomes its new normal.
func TestAdaptiveFindsCapacity(t *testing.T) {
	for _, tc := range []struct {
		name    string
		cfg     concurrency.Config
		refuses int64 // In flight in the server when it answers UNAVAILABLE.
		lo, hi  int64
	}{
		{"aimd", concurrency.Config{AIMD: &concurrency.AIMDConfig{}}, 25, 12, 26},
		{"gradient2", concurrency.Config{Gradient2: &concurrency.Gradient2Config{}}, math.MaxInt64, 10, 80},
		{"vegas", concurrency.Config{Vegas: &concurrency.VegasConfig{}}, math.MaxInt64, 7, 18},
		{"auto", concurrency.Config{}, math.MaxInt64, 3, 24}, // 7 in a drain, 3 in the first ones.
	} {
		t.Run(tc.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				l := limit(t, tc.cfg)
				workers := semaphore.NewWeighted(10)
				var served, inFlight int64 // Written by whoever runs; one at a time, see mu.
				mu := make(chan struct{}, 1)
				add := func(p *int64, n int64) int64 {
					mu <- struct{}{}
					defer func() { <-mu }()
					*p += n
					return *p
				}
				c := calltest.Stack(t, l).Wrap(calltest.Server(func(ctx context.Context) error {
					defer add(&inFlight, -1)
					if add(&inFlight, 1) > tc.refuses {
						time.Sleep(ms)
						return status.Error(codes.Unavailable, "overloaded")
					}
					if err := workers.Acquire(ctx, 1); err != nil {
						return status.FromContextError(err).Err()
					}
					defer workers.Release(1)
					time.Sleep(20 * ms)
					add(&served, 1)
					return nil
				}))
				ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
				defer cancel()
				var clients sync.WaitGroup
				for range 100 {
					clients.Go(func() {
						for ctx.Err() == nil {
							c.Invoke(ctx, calltest.Method, nil, nil)
						}
					})
				}
				time.Sleep(10 * time.Second)
				for i := range 18 {
					time.Sleep(time.Second)
					check(t, fmt.Sprintf("after %d seconds", i+11), l.Limit(), tc.lo, tc.hi)
				}
				clients.Wait()
				// 500 a second, and a little for the start.
				if n := add(&served, 0); n < 14_500 {
					t.Errorf("%d calls served in 30s, want at least 14,500 of 15,000", n)
				}
				checkRest(t, l)
			})
		})
	}
}

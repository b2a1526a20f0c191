// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package concurrency_test

import (
	"context"
	"fmt"
	"math"
	"slices"
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
	"github.com/belfry-go/belfry/limit"
)

const ms = time.Millisecond

func check(t *testing.T, what string, got, lo, hi int64) {
	t.Helper()
	if got < lo || got > hi {
		t.Errorf("%s: limit %d, want %d to %d", what, got, lo, hi)
	}
}

func TestUpdateAlgorithm(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := newLayer(t, concurrency.Config{Limit: 40})
		update := func(cfg concurrency.Config, want int64) {
			t.Helper()
			if err := l.Update(cfg); err != nil {
				t.Fatal(err)
			}
			if got := l.Limit(); got != want {
				t.Errorf("limit %d after Update(%+v), want %d", got, cfg, want)
			}
		}
		update(concurrency.Config{AIMD: &limit.AIMDConfig{}}, 40) // Begins where the fixed one was.
		calltest.Burst(calltest.Stack(t, l).Wrap(calltest.Server(func(context.Context) error { return status.Error(codes.Unavailable, "") })), 1)
		if got := l.Limit(); got != 36 {
			t.Fatalf("limit %d after a drop, want 36", got)
		}
		update(concurrency.Config{AIMD: &limit.AIMDConfig{BackoffRatio: 0.5}}, 36)
		update(concurrency.Config{AIMD: &limit.AIMDConfig{Initial: 5, Max: 30}}, 30)
		update(concurrency.Config{}, 30)
		update(concurrency.Config{Auto: &limit.AutoConfig{Max: 29}}, 29)
		update(concurrency.Config{Vegas: &limit.VegasConfig{}}, 14) // It begins with a probe, at half the limit.
		update(concurrency.Config{Gradient2: &limit.Gradient2Config{Min: 35}}, 35)
		update(concurrency.Config{Limit: 3}, 3)
	})
}

// An observer is told of changed limits, with their keys and the reason.
func TestObserverOfKeys(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		obs := &limitObserver{}
		l := newLayer(t, concurrency.Config{AIMD: &limit.AIMDConfig{}, KeyBy: interceptor.KeyBy{Method: true}})
		stack := calltest.Stack(t, interceptor.Observe(obs), l)
		c := stack.Wrap(calltest.Server(func(context.Context) error {
			time.Sleep(20 * ms)
			return status.Error(codes.Unavailable, "overloaded")
		}))
		for _, method := range []string{"/s/a", "/s/b", "/s/a", "/s/a"} {
			c.Invoke(t.Context(), method, nil, nil)
		}
		want := []string{"/s/a: 20 ", "/s/b: 20 ", "/s/a: 18 drop 20ms", "/s/a: 16 drop 20ms"}
		if got := obs.told; !slices.Equal(got, want) {
			t.Errorf("the observer was told %q, want %q", got, want)
		}
		if len(obs.stacks) != 1 || obs.stacks[0] != stack {
			t.Errorf("the observer knows %d stacks, want the one that it observes", len(obs.stacks))
		}
	})
}

// limitObserver takes notes of limits.
type limitObserver struct {
	interceptor.NopObserver
	told   []string
	stacks []*interceptor.Stack
}

func (o *limitObserver) Observes(s *interceptor.Stack) { o.stacks = append(o.stacks, s) }

func (o *limitObserver) Limit(l interceptor.LimitState) {
	text := fmt.Sprintf("%s: %d %s", l.Key, l.Limit, l.Lowered)
	if l.Last.RTT > 0 {
		text += fmt.Sprint(" ", l.Last.RTT)
	}
	o.told = append(o.told, text)
}

// Stats say what an algorithm thinks.
func TestStatsOfAlgorithms(t *testing.T) {
	for name, cfg := range map[string]concurrency.Config{
		"auto":      {},
		"gradient2": {Gradient2: &limit.Gradient2Config{}},
		"vegas":     {Vegas: &limit.VegasConfig{}},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				l := newLayer(t, cfg)
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
				if s := l.Stats(""); s.Lowered != "drop" || s.Last.Result != limit.Dropped || s.Last.RTT != takes {
					t.Errorf("after a drop: %+v", s)
				}
			})
		})
	}
}

// recorder is an algorithm that only takes notes.
type recorder struct {
	n       int64
	samples []limit.Sample
}

func (r *recorder) Limit() int64            { return r.n }
func (r *recorder) OnSample(s limit.Sample) { r.samples = append(r.samples, s) }

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
		want []limit.Sample
	}{
		{"success", concurrency.Config{}, func(l *concurrency.Layer) { call(l, bg, nil) }, []limit.Sample{{RTT: 20 * ms, InFlight: 1}}},
		{"waiting further in is not part of the round trip", concurrency.Config{}, func(l *concurrency.Layer) { call(l, bg, nil, &slow{50 * ms}) }, []limit.Sample{{RTT: 20 * ms, InFlight: 1}}},
		{"a sign of overload", concurrency.Config{}, func(l *concurrency.Layer) { call(l, bg, unavailable) }, []limit.Sample{{RTT: 20 * ms, InFlight: 1, Result: limit.Dropped}}},
		{"the caller's deadline", concurrency.Config{}, func(l *concurrency.Layer) { callFor(l, 10*ms) },
			[]limit.Sample{{RTT: 10 * ms, InFlight: 1, Result: limit.GivenUp}}},
		{"another failure", concurrency.Config{}, func(l *concurrency.Layer) { call(l, bg, notFound) }, nil},
		{"a configured code", concurrency.Config{DropCodes: []codes.Code{codes.NotFound}}, func(l *concurrency.Layer) {
			call(l, bg, notFound)
			call(l, bg, unavailable)
		}, []limit.Sample{{RTT: 20 * ms, InFlight: 1, Result: limit.Dropped}}},
		{"no codes", concurrency.Config{DropCodes: []codes.Code{}}, func(l *concurrency.Layer) { call(l, bg, unavailable) }, nil},
		{"a cancelled call", concurrency.Config{}, func(l *concurrency.Layer) {
			ctx, cancel := context.WithCancel(bg)
			time.AfterFunc(10*ms, cancel)
			call(l, ctx, nil)
		}, []limit.Sample{{RTT: 10 * ms, InFlight: 1, Result: limit.GivenUp}}},
		{"a call that was refused further in", concurrency.Config{}, func(l *concurrency.Layer) {
			call(l, bg, nil, &hold{err: interceptor.Refuse("x", interceptor.ReasonRateLimit, "")})
		}, nil},
		{"a deadline that a layer inside has set", concurrency.Config{}, func(l *concurrency.Layer) {
			call(l, bg, interceptor.Refuse("timeout", interceptor.ReasonDeadline, "").Because(context.DeadlineExceeded, true))
		}, []limit.Sample{{RTT: 20 * ms, InFlight: 1, Result: limit.Dropped}}},
		{"a stream", concurrency.Config{}, stream20, nil},
		{"a stream that is to be sampled", concurrency.Config{SampleStreams: true}, stream20, []limit.Sample{{RTT: 20 * ms, InFlight: 1}}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := &recorder{n: 5}
				l := newLayer(t, tc.cfg, concurrency.WithAlgorithm(r))
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
		l := newLayer(t, concurrency.Config{}, concurrency.WithAlgorithm(r))
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
		{"aimd", concurrency.Config{AIMD: &limit.AIMDConfig{}}, 25, 12, 26},
		{"gradient2", concurrency.Config{Gradient2: &limit.Gradient2Config{}}, math.MaxInt64, 10, 80},
		{"vegas", concurrency.Config{Vegas: &limit.VegasConfig{}}, math.MaxInt64, 7, 18},
		{"auto", concurrency.Config{}, math.MaxInt64, 3, 24}, // 7 in a drain, 3 in the first ones.
	} {
		t.Run(tc.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				l := newLayer(t, tc.cfg)
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

// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package concurrency_test

import (
	"context"
	"io"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"github.com/belfry-go/belfry/interceptor"
	"github.com/belfry-go/belfry/interceptor/concurrency"
	"github.com/belfry-go/belfry/interceptor/hedge"
	"github.com/belfry-go/belfry/interceptor/retry"
	"github.com/belfry-go/belfry/internal/test/calltest"
	"github.com/belfry-go/belfry/limit"
)

// again makes a second attempt of calls that fail. It waits as long as the call.
type again struct{ interceptor.CallOnly }

func (l *again) NewLayer() (interceptor.Layer, error) { return l, nil }
func (l *again) String() string                       { return "again" }

func (l *again) WrapCall(next interceptor.Next, again interceptor.Again) interceptor.Next {
	return func(ctx context.Context, c *interceptor.Call) error {
		origin := c.Origin()
		err := next(ctx, c)
		if err == nil {
			return nil
		}
		f, refused := again(ctx, &origin, interceptor.Forever)
		if refused != nil {
			return interceptor.RefusedAgain(refused, err)
		}
		err = next(ctx, f)
		c.Adopt(f)
		return err
	}
}

func idempotent(string) bool { return true }

func layer(t *testing.T, l interceptor.Layer, err error) interceptor.Layer {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
	return l
}

// Outside of layers that make attempts an algorithm learns from the call, not from its
// first attempt.
func TestSamplesOutsideAttempts(t *testing.T) {
	one := func(t *testing.T, r *recorder, rtt time.Duration, dropped bool) {
		t.Helper()
		if len(r.samples) != 1 || (r.samples[0].Result == limit.Dropped) != dropped || r.samples[0].RTT != rtt {
			t.Errorf("samples %+v, want one of %v, dropped: %v", r.samples, rtt, dropped)
		}
	}
	t.Run("retry", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			r := &recorder{n: 10}
			l := newLayer(t, concurrency.Config{}, concurrency.WithAlgorithm(r))
			rl, err := retry.New(retry.Config{MaxAttempts: 2}, retry.WithIdempotent(idempotent))
			n := 0
			start, sent := time.Now(), time.Duration(0)
			err = calltest.Stack(t, l, layer(t, rl, err)).Wrap(calltest.Server(func(context.Context) error {
				if n++; n == 2 {
					sent = time.Since(start)
				}
				time.Sleep(10 * ms)
				if n == 1 {
					return status.Error(codes.Unavailable, "flaky")
				}
				return nil
			})).Invoke(context.Background(), calltest.Method, nil, &struct{}{})
			if err != nil {
				t.Fatal(err)
			}
			one(t, r, sent+10*ms, false)
			checkRest(t, l)
		})
	})
	t.Run("hedge", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			r := &recorder{n: 10}
			l := newLayer(t, concurrency.Config{}, concurrency.WithAlgorithm(r))
			hl, err := hedge.New(hedge.Config{Delay: 10 * ms}, hedge.WithIdempotent(idempotent))
			var n atomic.Int32
			s := calltest.Stack(t, l, layer(t, hl, err))
			err = s.Wrap(calltest.Server(func(ctx context.Context) error {
				if n.Add(1) == 1 {
					return calltest.Takes(time.Second)(ctx)
				}
				return calltest.Takes(5 * ms)(ctx)
			})).Invoke(context.Background(), calltest.Method, nil, &struct{}{})
			if err != nil {
				t.Fatal(err)
			}
			one(t, r, 15*ms, false)
			if err := s.Drain(context.Background()); err != nil {
				t.Fatal(err)
			}
			checkRest(t, l)
		})
	})
	t.Run("inside_it_learns_from_each_attempt", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			r := &recorder{n: 10}
			l := newLayer(t, concurrency.Config{}, concurrency.WithAlgorithm(r))
			err := calltest.Stack(t, &again{}, l).Wrap(calltest.Server(func(context.Context) error {
				time.Sleep(10 * ms)
				return status.Error(codes.Unavailable, "down")
			})).Invoke(context.Background(), calltest.Method, nil, &struct{}{})
			if status.Code(err) != codes.Unavailable || len(r.samples) != 2 || r.samples[0].Result != limit.Dropped || r.samples[1].Result != limit.Dropped {
				t.Errorf("got %v and samples %+v, want two drops", err, r.samples)
			}
			checkRest(t, l)
		})
	})
}

// slowStream is a stream that responds after a while and ends after another.
type slowStream struct {
	grpc.ClientStream
	ctx         context.Context
	first, then time.Duration
	err         error
	got         int
}

func (s *slowStream) Context() context.Context { return s.ctx }

func (s *slowStream) Header() (metadata.MD, error) {
	time.Sleep(s.first)
	s.first = 0
	return metadata.Pairs("k", "v"), nil
}

func (s *slowStream) RecvMsg(any) error {
	if s.got++; s.got == 1 && s.first > 0 {
		time.Sleep(s.first)
		return nil
	}
	time.Sleep(s.then)
	return s.err
}

type slowStreams struct {
	grpc.ClientConnInterface
	stream slowStream
}

func (c *slowStreams) NewStream(ctx context.Context, _ *grpc.StreamDesc, _ string, _ ...grpc.CallOption) (grpc.ClientStream, error) {
	s := c.stream
	s.ctx = ctx
	return &s, nil
}

// A stream's first response is its round trip and its success, whatever becomes of it
// later.
func TestSamplesStreams(t *testing.T) {
	drain := func(s grpc.ClientStream) {
		for s.RecvMsg(nil) == nil {
		}
	}
	for _, tc := range []struct {
		name   string
		stream slowStream
		read   func(s grpc.ClientStream)
		want   []limit.Sample
	}{
		{"message", slowStream{first: 30 * ms, then: time.Hour, err: io.EOF}, drain, []limit.Sample{{RTT: 30 * ms, InFlight: 1}}},
		{"header", slowStream{first: 30 * ms, then: time.Hour, err: io.EOF}, func(s grpc.ClientStream) {
			if _, err := s.Header(); err != nil {
				panic(err)
			}
			drain(s)
		}, []limit.Sample{{RTT: 30 * ms, InFlight: 1}}},
		{"fails_later", slowStream{first: 30 * ms, then: time.Hour, err: status.Error(codes.Unavailable, "moved")}, drain, []limit.Sample{{RTT: 30 * ms, InFlight: 1}}},
		{"fails_without_a_response", slowStream{then: 40 * ms, err: status.Error(codes.Unavailable, "down")}, drain, []limit.Sample{{RTT: 40 * ms, InFlight: 1, Result: limit.Dropped}}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := &recorder{n: 5}
				l := newLayer(t, concurrency.Config{SampleStreams: true}, concurrency.WithAlgorithm(r))
				s, err := calltest.Stack(t, l).Wrap(&slowStreams{stream: tc.stream}).NewStream(context.Background(), &grpc.StreamDesc{ServerStreams: true}, calltest.Method)
				if err != nil {
					t.Fatal(err)
				}
				tc.read(s)
				for i := range r.samples {
					r.samples[i].Start = 0
				}
				if !slices.Equal(r.samples, tc.want) {
					t.Errorf("samples %+v, want %+v", r.samples, tc.want)
				}
				checkRest(t, l)
			})
		})
	}
}

// A further attempt goes ahead of the first attempts of its priority, and behind those
// of a higher one.
func TestQueueFurtherAttempts(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := fixed(t, 1)
		type name struct{}
		var sent []string
		c := calltest.Stack(t, &again{}, l).Wrap(calltest.Server(func(ctx context.Context) error {
			sent = append(sent, ctx.Value(name{}).(string))
			time.Sleep(time.Second)
			if len(sent) == 1 {
				return status.Error(codes.Unavailable, "flaky")
			}
			return nil
		}))
		var wg sync.WaitGroup
		for _, call := range []struct {
			name     string
			priority int
		}{{"flaky", 1}, {"one", 1}, {"two", 1}, {"low", 0}, {"high", 2}, {"three", 1}} {
			ctx := context.WithValue(interceptor.ContextWithPriority(context.Background(), call.priority), name{}, call.name)
			wg.Go(func() {
				if err := c.Invoke(ctx, calltest.Method, nil, &struct{}{}); err != nil {
					t.Errorf("%s: %v", call.name, err)
				}
			})
			synctest.Wait()
		}
		wg.Wait()
		// The permit of the first attempt goes to "high" before its further attempt comes.
		if want := []string{"flaky", "high", "flaky", "one", "two", "three", "low"}; !slices.Equal(sent, want) {
			t.Errorf("sent %v, want %v", sent, want)
		}
		checkRest(t, l)
	})
}

// A call that may not wait passes a heavy one that waits only if it ranks higher.
func TestCostIsOvertakenByPriority(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := newLayer(t, concurrency.Config{Limit: 4}, concurrency.WithCost(costOf))
		c := calltest.Stack(t, l).Wrap(calltest.Takes(time.Second))
		none := interceptor.WithWait(interceptor.None)
		running := invoke(costs(3), c)
		synctest.Wait()
		heavy := invoke(costs(2), c)
		synctest.Wait()
		if err := c.Invoke(costs(1), calltest.Method, nil, nil, none); calltest.Reason(err) != interceptor.ReasonConcurrency {
			t.Errorf("a call of the same priority: %v, want a refusal: the permit is promised", err)
		}
		if err := c.Invoke(interceptor.ContextWithPriority(costs(1), 1), calltest.Method, nil, nil, none); err != nil {
			t.Errorf("a call of a higher priority: %v", err)
		}
		if err := <-running; err != nil {
			t.Error(err)
		}
		if err := <-heavy; err != nil {
			t.Error(err)
		}
		checkRest(t, l)
	})
}

// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package concurrency_test

import (
	"context"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/belfry-go/belfry/interceptor"
	"github.com/belfry-go/belfry/interceptor/concurrency"
	"github.com/belfry-go/belfry/internal/test/calltest"
	"github.com/belfry-go/belfry/limit"
)

// starter marks all calls.
type starter struct{ recorder }

func (s *starter) OnStart() uint8 { return 9 }

// Every end of a call with a mark is a sample.
func TestSamplesMarked(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := &starter{recorder{n: 5}}
		l := newLayer(t, concurrency.Config{}, concurrency.WithAlgorithm(a))
		takes := func(err error) calltest.Server {
			return func(context.Context) error { time.Sleep(20 * ms); return err }
		}
		refuse := &hold{err: interceptor.Refuse("x", interceptor.ReasonRateLimit, "")}
		for _, tc := range []struct {
			name   string
			inside []interceptor.Spec
			err    error
			want   limit.Sample
		}{
			{"success", nil, nil, limit.Sample{RTT: 20 * ms, Result: limit.Succeeded}},
			{"a failure that says nothing", nil, status.Error(codes.NotFound, ""), limit.Sample{RTT: 20 * ms, Result: limit.Void}},
			{"refused further in", []interceptor.Spec{refuse}, nil, limit.Sample{Result: limit.Void}},
		} {
			a.samples = nil
			calltest.Stack(t, append([]interceptor.Spec{l}, tc.inside...)...).Wrap(takes(tc.err)).Invoke(t.Context(), calltest.Method, nil, nil)
			tc.want.Mark, tc.want.InFlight = 9, 1
			if len(a.samples) != 1 {
				t.Errorf("%s: %d samples, want 1", tc.name, len(a.samples))
				continue
			}
			got := a.samples[0]
			if (got.Start == 0) != (tc.want.RTT == 0) {
				t.Errorf("%s: start %v", tc.name, got.Start)
			}
			if got.Start = 0; got != tc.want {
				t.Errorf("%s: sample %+v, want %+v", tc.name, got, tc.want)
			}
		}
		checkRest(t, l)
	})
}

// A sample says whether the limit held calls back since the last one.
func TestSamplesLimited(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := &recorder{n: 1}
		l := newLayer(t, concurrency.Config{}, concurrency.WithAlgorithm(r))
		c := calltest.Stack(t, l).Wrap(calltest.Takes(time.Second))
		none := interceptor.WithWait(interceptor.None)
		calltest.Burst(c, 1)
		calltest.Burst(c, 2) // The second waits.
		running := invoke(t.Context(), c)
		synctest.Wait()
		c.Invoke(t.Context(), calltest.Method, nil, nil, none) // It is refused.
		if err := <-running; err != nil {
			t.Error(err)
		}
		var got []bool
		for _, s := range r.samples {
			got = append(got, s.Limited)
		}
		if want := []bool{false, true, false, true}; len(got) != 4 || got[0] != want[0] || got[1] != want[1] || got[2] != want[2] || got[3] != want[3] {
			t.Errorf("limited: %v, want %v", got, want)
		}
		checkRest(t, l)
	})
}

// explainer knows how long calls take without a queue.
type explainer struct{ recorder }

func (*explainer) Explain() limit.State { return limit.State{Baseline: 10 * ms} }

// A call does not wait until the server has too little time for it.
func TestWaitLeavesTimeForTheServer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := newLayer(t, concurrency.Config{}, concurrency.WithAlgorithm(&explainer{recorder{n: 1}}))
		c := calltest.Stack(t, l).Wrap(calltest.Takes(time.Second))
		running := invoke(t.Context(), c)
		synctest.Wait()
		for _, tc := range []struct{ left, want time.Duration }{
			{100 * ms, 60 * ms},
			{20 * ms, 10 * ms}, // At least half.
		} {
			ctx, cancel := context.WithTimeout(t.Context(), tc.left)
			began := time.Now()
			err := c.Invoke(ctx, calltest.Method, nil, nil)
			cancel()
			if r, ok := interceptor.AsRefusal(err); !ok || r.Reason != interceptor.ReasonConcurrency {
				t.Errorf("with %v left: %v, want a refusal", tc.left, err)
			}
			if got := time.Since(began); got != tc.want {
				t.Errorf("with %v left it waited for %v, want %v", tc.left, got, tc.want)
			}
		}
		if err := <-running; err != nil {
			t.Error(err)
		}
		checkRest(t, l)
	})
}

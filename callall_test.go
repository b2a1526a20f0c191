// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package belfry_test

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"math/rand/v2"
	"runtime"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/belfry-go/belfry"
)

// A probe counts its calls. A call takes as many seconds as its request says,
// unless its context ends first.
type probe struct {
	started, ended, inFlight, peak atomic.Int64
}

func (p *probe) call(ctx context.Context, seconds int) (string, error) {
	p.started.Add(1)
	n := p.inFlight.Add(1)
	for {
		peak := p.peak.Load()
		if n <= peak || p.peak.CompareAndSwap(peak, n) {
			break
		}
	}
	defer p.ended.Add(1)
	defer p.inFlight.Add(-1)
	select {
	case <-time.After(time.Duration(seconds) * time.Second):
		return fmt.Sprint("slept ", seconds), nil
	case <-ctx.Done():
		return "", ctx.Err()
	}
}

type callAllFunc = func(context.Context, int, iter.Seq[int], func(context.Context, int) (string, error)) iter.Seq2[int, belfry.Result[int, string]]

// callAlls are the two functions, for tests of both.
var callAlls = map[string]callAllFunc{
	"ordered":   belfry.CallAll[int, string, iter.Seq[int]],
	"unordered": belfry.CallAllUnordered[int, string, iter.Seq[int]],
}

// forBoth runs a test for both functions, each in virtual time.
func forBoth(t *testing.T, test func(*testing.T, callAllFunc)) {
	for name, callAll := range callAlls {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) { test(t, callAll) })
		})
	}
}

func TestCallAllOrder(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var p probe
		start := time.Now()
		var requests []int
		var indexes []int
		for i, r := range belfry.CallAll(t.Context(), 3, slices.Values([]int{3, 1, 2}), p.call) {
			if want := fmt.Sprint("slept ", r.Request); r.Response != want || r.Err != nil {
				t.Errorf("result %d = %q, %v, want %q, nil", i, r.Response, r.Err, want)
			}
			indexes = append(indexes, i)
			requests = append(requests, r.Request)
		}
		if want := []int{3, 1, 2}; !slices.Equal(requests, want) {
			t.Errorf("results are of the requests %v, want %v", requests, want)
		}
		if want := []int{0, 1, 2}; !slices.Equal(indexes, want) {
			t.Errorf("indexes are %v, want %v", indexes, want)
		}
		if got, want := time.Since(start), 3*time.Second; got != want {
			t.Errorf("took %v, want %v: all calls at the same time", got, want)
		}
	})
}

func TestCallAllUnorderedOrder(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var p probe
		start := time.Now()
		var got []string
		for i, r := range belfry.CallAllUnordered(t.Context(), 3, slices.Values([]int{3, 1, 2}), p.call) {
			got = append(got, fmt.Sprintf("%d:%d@%v", i, r.Request, time.Since(start)))
		}
		if want := []string{"1:1@1s", "2:2@2s", "0:3@3s"}; !slices.Equal(got, want) {
			t.Errorf("results are %v, want %v", got, want)
		}
	})
}

func TestCallAllWithoutRequestsEnds(t *testing.T) {
	forBoth(t, func(t *testing.T, callAll callAllFunc) {
		var p probe
		for i, r := range callAll(t.Context(), 3, slices.Values([]int(nil)), p.call) {
			t.Errorf("result %d = %+v, want none", i, r)
		}
		if got := p.started.Load(); got != 0 {
			t.Errorf("%d calls were made, want 0", got)
		}
	})
}

// CallAll yields results while it waits for the next request.
func TestCallAllResultsBeforeNextRequest(t *testing.T) {
	forBoth(t, func(t *testing.T, callAll callAllFunc) {
		var p probe
		start := time.Now()
		requests := func(yield func(int) bool) {
			for _, seconds := range []int{1, 2, 3} {
				if !yield(seconds) {
					return
				}
				time.Sleep(10 * time.Second)
			}
		}
		var got []time.Duration
		for range callAll(t.Context(), 3, requests, p.call) {
			got = append(got, time.Since(start))
		}
		if want := []time.Duration{1 * time.Second, 12 * time.Second, 23 * time.Second}; !slices.Equal(got, want) {
			t.Errorf("results came after %v, want %v", got, want)
		}
		if got, want := time.Since(start), 30*time.Second; got != want {
			t.Errorf("ended after %v, want %v: when the requests ended", got, want)
		}
	})
}

func TestCallAllDoesNotEndAtAnError(t *testing.T) {
	forBoth(t, func(t *testing.T, callAll callAllFunc) {
		failure := status.Error(codes.Unavailable, "no")
		call := func(_ context.Context, n int) (string, error) {
			if n%2 == 1 {
				return "", failure
			}
			return "yes", nil
		}
		failed, succeeded := 0, 0
		for i, r := range callAll(t.Context(), 1, slices.Values([]int{0, 1, 2, 3, 4}), call) {
			if r.Request != i {
				t.Errorf("result %d is of request %d, want %d", i, r.Request, i)
			}
			if r.Err == failure {
				failed++
			} else if r.Err == nil {
				succeeded++
			}
		}
		if failed != 2 || succeeded != 3 {
			t.Errorf("%d failed and %d succeeded, want 2 and 3", failed, succeeded)
		}
	})
}

// CallAll pulls a request only when a place is free.
func TestCallAllPullsWhenThereIsRoom(t *testing.T) {
	forBoth(t, func(t *testing.T, callAll callAllFunc) {
		for _, concurrency := range []int{1, 2, 5} {
			var p probe
			pulled := 0
			requests := func(yield func(int) bool) {
				for range 20 {
					pulled++
					if !yield(1) {
						return
					}
				}
			}
			results := 0
			for range callAll(t.Context(), concurrency, requests, p.call) {
				// The others come and go while this one is looked at.
				time.Sleep(10 * time.Second)
				synctest.Wait()
				if got, limit := pulled, results+concurrency; got > limit {
					t.Errorf("concurrency %d: %d requests pulled while result %d is looked at, want at most %d", concurrency, got, results, limit)
				}
				if got, limit := p.started.Load(), int64(results+concurrency); got > limit {
					t.Errorf("concurrency %d: %d calls started while result %d is looked at, want at most %d", concurrency, got, results, limit)
				}
				results++
			}
			if results != 20 {
				t.Errorf("concurrency %d: %d results, want 20", concurrency, results)
			}
			if got, want := p.peak.Load(), int64(concurrency); got != want {
				t.Errorf("concurrency %d: at most %d calls at a time, want %d", concurrency, got, want)
			}
		}
	})
}

// CallAll uses all of its concurrency.
func TestCallAllConcurrency(t *testing.T) {
	forBoth(t, func(t *testing.T, callAll callAllFunc) {
		var p probe
		start := time.Now()
		n := 0
		for range callAll(t.Context(), 10, slices.Values(slices.Repeat([]int{1}, 100)), p.call) {
			n++
		}
		if got, want := time.Since(start), 10*time.Second; n != 100 || got != want {
			t.Errorf("%d results after %v, want 100 after %v", n, got, want)
		}
	})
}

func TestCallAllConsumerBreaks(t *testing.T) {
	forBoth(t, func(t *testing.T, callAll callAllFunc) {
		var p probe
		endless := func(yield func(int) bool) {
			for i := 1; yield(i); i++ {
			}
		}
		start := time.Now()
		for range callAll(t.Context(), 4, endless, p.call) {
			break
		}
		if got, want := time.Since(start), time.Second; got != want {
			t.Errorf("the loop was left after %v, want %v: the calls in flight are cancelled", got, want)
		}
		if s, e := p.started.Load(), p.ended.Load(); s != 4 || e != s {
			t.Errorf("%d calls started and %d ended when the loop was left, want 4 and 4", s, e)
		}
	})
}

func TestCallAllConsumerPanics(t *testing.T) {
	forBoth(t, func(t *testing.T, callAll callAllFunc) {
		var p probe
		func() {
			defer func() {
				if got := recover(); got != "enough" {
					t.Errorf("recovered %v, want the consumer's panic", got)
				}
			}()
			for range callAll(t.Context(), 2, slices.Values([]int{1, 100, 100}), p.call) {
				panic("enough")
			}
		}()
		if s, e := p.started.Load(), p.ended.Load(); s != 2 || e != s {
			t.Errorf("%d calls started and %d ended when the loop was left, want 2 and 2", s, e)
		}
	})
}

func TestCallAllEndsWithItsContext(t *testing.T) {
	forBoth(t, func(t *testing.T, callAll callAllFunc) {
		var p probe
		ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
		defer cancel()
		var answered, cancelled, uncalled int
		for i, r := range callAll(ctx, 2, slices.Values([]int{1, 100, 100, 100, 100}), p.call) {
			switch {
			case r.Err == nil:
				answered++
			case r.Err == context.DeadlineExceeded:
				cancelled++
			default:
				uncalled++
				if i != 3 || !errors.Is(r.Err, context.DeadlineExceeded) || status.Code(r.Err) != codes.DeadlineExceeded {
					t.Errorf("result %d has the error %v, want request 3 not called because of the deadline", i, r.Err)
				}
			}
		}
		if answered != 1 || cancelled != 2 || uncalled != 1 {
			t.Errorf("%d answered, %d cancelled, %d not called, want 1, 2, 1", answered, cancelled, uncalled)
		}
		if s, e := p.started.Load(), p.ended.Load(); s != 3 || e != s {
			t.Errorf("%d calls started and %d ended, want 3 and 3", s, e)
		}
	})
}

// CallAll adds no error when its context ends after the last call.
func TestCallAllContextEndsAfterLastCall(t *testing.T) {
	forBoth(t, func(t *testing.T, callAll callAllFunc) {
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		n := 0
		for i, r := range callAll(ctx, 1, slices.Values([]int{0, 1}), func(_ context.Context, i int) (string, error) {
			if i == 1 {
				cancel()
			}
			return "", nil
		}) {
			n++
			if r.Err != nil {
				t.Errorf("result %d has the error %v, want nil", i, r.Err)
			}
		}
		if n != 2 {
			t.Errorf("%d results, want 2", n)
		}
	})
}

func TestCallAllContextEndedBefore(t *testing.T) {
	forBoth(t, func(t *testing.T, callAll callAllFunc) {
		cause := errors.New("giving up")
		ctx, cancel := context.WithCancelCause(t.Context())
		cancel(cause)
		var p probe
		n := 0
		for i, r := range callAll(ctx, 4, slices.Values([]int{1, 2}), p.call) {
			n++
			if i != 0 || r.Request != 1 || !errors.Is(r.Err, context.Canceled) || !errors.Is(r.Err, cause) {
				t.Errorf("result %d = %+v, want index 0 and an error that wraps context.Canceled and its cause", i, r)
			}
		}
		if n != 1 || p.started.Load() != 0 {
			t.Errorf("%d results and %d calls, want 1 and 0", n, p.started.Load())
		}
	})
}

// A loop can be left while its requests block, if they return when the context ends.
func TestCallAllBreakWhileRequestsBlock(t *testing.T) {
	forBoth(t, func(t *testing.T, callAll callAllFunc) {
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		requests := make(chan int, 1)
		requests <- 1
		var p probe
		for range callAll(ctx, 4, func(yield func(int) bool) {
			for {
				select {
				case req := <-requests:
					if !yield(req) {
						return
					}
				case <-ctx.Done():
					return
				}
			}
		}, p.call) {
			cancel()
			break
		}
		if s, e := p.started.Load(), p.ended.Load(); s != 1 || e != 1 {
			t.Errorf("%d calls started and %d ended, want 1 and 1", s, e)
		}
	})
}

func TestCallAllWithAChannel(t *testing.T) {
	type callAllFunc func(context.Context, int, <-chan int, func(context.Context, int) (string, error)) iter.Seq2[int, belfry.Result[int, string]]
	for name, callAll := range map[string]callAllFunc{
		"ordered":   belfry.CallAll[int, string, <-chan int],
		"unordered": belfry.CallAllUnordered[int, string, <-chan int],
	} {
		run := func(what string, test func(t *testing.T, ch chan int, p *probe)) {
			t.Run(name+"/"+what, func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) { test(t, make(chan int, 3), &probe{}) })
			})
		}
		run("ends_when_it_is_closed", func(t *testing.T, ch chan int, p *probe) {
			n := 0
			ch <- 1
			for _, r := range callAll(t.Context(), 2, ch, p.call) {
				if n++; r.Request != n || r.Err != nil {
					t.Errorf("result %d is %+v, want request %d without an error", n, r, n)
				}
				if n == 3 {
					close(ch)
				} else {
					ch <- n + 1
				}
			}
			if n != 3 {
				t.Errorf("%d results, want 3", n)
			}
		})
		run("can_be_left_while_it_is_empty", func(t *testing.T, ch chan int, p *probe) {
			ch <- 1
			start := time.Now()
			for range callAll(t.Context(), 4, ch, p.call) {
				break
			}
			if got := time.Since(start); got != time.Second {
				t.Errorf("the loop was left after %v, want at once after the call's second", got)
			}
		})
		run("ends_with_its_context_while_it_is_empty", func(t *testing.T, ch chan int, p *probe) {
			ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
			defer cancel()
			ch <- 1
			var errs []error
			for _, r := range callAll(ctx, 4, ch, p.call) {
				errs = append(errs, r.Err)
			}
			if len(errs) != 2 || errs[0] != nil || status.Code(errs[1]) != codes.DeadlineExceeded {
				t.Errorf("errors are %v, want none for the call, and DEADLINE_EXCEEDED for the request that did not arrive in time", errs)
			}
		})
		run("closed_after_its_context_has_ended", func(t *testing.T, ch chan int, p *probe) {
			ctx, cancel := context.WithCancel(t.Context())
			cancel()
			close(ch)
			for i, r := range callAll(ctx, 4, ch, p.call) {
				t.Errorf("result %d is %+v, want none: nothing was left to call", i, r)
			}
		})
	}
}

// The request arrives after the loop has been left.
func TestCallAllBreakCallsNothingMore(t *testing.T) {
	forBoth(t, func(t *testing.T, callAll callAllFunc) {
		var p probe
		for range callAll(t.Context(), 4, func(yield func(int) bool) {
			if yield(1) {
				time.Sleep(time.Hour)
				yield(2)
			}
		}, p.call) {
			break
		}
		if s := p.started.Load(); s != 1 {
			t.Errorf("%d calls started, want 1", s)
		}
	})
}

func TestCallAllBreakPullsNothingMore(t *testing.T) {
	forBoth(t, func(t *testing.T, callAll callAllFunc) {
		var p probe
		pulled := 0
		for range callAll(t.Context(), 1, func(yield func(int) bool) {
			for pulled++; yield(1); pulled++ {
			}
		}, p.call) {
			break
		}
		if pulled != 1 {
			t.Errorf("%d requests were pulled, want 1", pulled)
		}
	})
}

func TestCallAllPanicOfCall(t *testing.T) {
	forBoth(t, func(t *testing.T, callAll callAllFunc) {
		var p probe
		boom := errors.New("boom")
		start := time.Now()
		func() {
			defer func() {
				v := recover()
				err, ok := v.(*belfry.PanicError)
				if !ok || err.Value != boom || !errors.Is(err, boom) {
					t.Fatalf("recovered %v, want a *PanicError of %v", v, boom)
				}
				if !strings.Contains(err.Error(), "boom") || !strings.Contains(string(err.Stack), "panickingCall") {
					t.Errorf("the error is %q, want it to hold the value and the stack of the call", err)
				}
			}()
			// In order, the first call is waited for when the second panics.
			for range callAll(t.Context(), 2, slices.Values([]int{100, -1, 1}), func(ctx context.Context, n int) (string, error) {
				if n == -1 {
					time.Sleep(time.Second)
					panickingCall(boom)
				}
				return p.call(ctx, n)
			}) {
				t.Error("got a result, want a panic")
			}
			t.Error("the loop ended, want a panic")
		}()
		if got, want := time.Since(start), time.Second; got != want {
			t.Errorf("the panic came after %v, want %v", got, want)
		}
		if s, e := p.started.Load(), p.ended.Load(); s != 1 || e != s {
			t.Errorf("%d other calls started and %d ended, want 1 and 1", s, e)
		}
	})
}

func panickingCall(err error) { panic(err) }

func TestCallAllPanicOfRequests(t *testing.T) {
	forBoth(t, func(t *testing.T, callAll callAllFunc) {
		defer func() {
			if err, ok := recover().(*belfry.PanicError); !ok || err.Value != "no more" || err.Unwrap() != nil {
				t.Errorf("recovered %v, want a *PanicError of %q", err, "no more")
			}
		}()
		var p probe
		for range callAll(t.Context(), 2, func(yield func(int) bool) {
			yield(1)
			panic("no more")
		}, p.call) {
		}
		t.Error("the loop ended, want a panic")
	})
}

func TestCallAllPassesOnGoexit(t *testing.T) {
	forBoth(t, func(t *testing.T, callAll callAllFunc) {
		left := make(chan bool, 1)
		go func() {
			normally := false
			defer func() { left <- normally }()
			for range callAll(t.Context(), 2, slices.Values([]int{1, 2}), func(context.Context, int) (string, error) {
				runtime.Goexit() // as t.FailNow does
				return "", nil
			}) {
			}
			normally = true
		}()
		if <-left {
			t.Error("the loop ended normally, want runtime.Goexit")
		}
	})
}

func TestCallAllBadConcurrency(t *testing.T) {
	forBoth(t, func(t *testing.T, callAll callAllFunc) {
		for _, concurrency := range []int{-1, 0, 1_000_001} {
			var p probe
			n := 0
			for i, r := range callAll(t.Context(), concurrency, slices.Values([]int{1, 2}), p.call) {
				n++
				want := fmt.Sprintf("belfry: CallAll: concurrency is %d, must be from 1 to 1000000", concurrency)
				if i != 0 || r.Err == nil || r.Err.Error() != want {
					t.Errorf("result %d has the error %v, want index 0 and %q", i, r.Err, want)
				}
			}
			if n != 1 || p.started.Load() != 0 {
				t.Errorf("concurrency %d: %d results and %d calls, want 1 and 0", concurrency, n, p.started.Load())
			}
		}
	})
}

func TestCallAllRangedOverAgain(t *testing.T) {
	forBoth(t, func(t *testing.T, callAll callAllFunc) {
		var p probe
		results := callAll(t.Context(), 2, slices.Values([]int{1, 2, 3}), p.call)
		if got := p.started.Load(); got != 0 {
			t.Errorf("%d calls were made before the loop, want 0", got)
		}
		for round := range 2 {
			n := 0
			for range results {
				n++
			}
			if n != 3 {
				t.Errorf("round %d: %d results, want 3", round, n)
			}
		}
	})
}

// CallAll calls every request once under random times.
func TestCallAllRandomTimes(t *testing.T) {
	seed := rand.Uint64()
	t.Logf("seed %d; the check is exact, so it never fails by chance", seed)
	forBoth(t, func(t *testing.T, callAll callAllFunc) {
		rng := rand.New(rand.NewPCG(seed, 0))
		for range 50 {
			requests := make([]int, rng.IntN(200))
			for i := range requests {
				requests[i] = rng.IntN(20)
			}
			concurrency := 1 + rng.IntN(20)
			var p probe
			got := make([]int, len(requests))
			for i, r := range callAll(t.Context(), concurrency, slices.Values(requests), p.call) {
				if want := fmt.Sprint("slept ", requests[i]); r.Err != nil || r.Request != requests[i] || r.Response != want {
					t.Errorf("result %d = %+v, want request %d answered %q", i, r, requests[i], want)
				}
				got[i]++
			}
			if i := slices.IndexFunc(got, func(n int) bool { return n != 1 }); i >= 0 {
				t.Errorf("request %d has %d results, want 1", i, got[i])
			}
			if got := p.peak.Load(); got > int64(concurrency) {
				t.Errorf("%d calls at a time, want at most %d", got, concurrency)
			}
		}
	})
}

func TestBindPassesTheOptions(t *testing.T) {
	var got []grpc.CallOption
	method := func(_ context.Context, n int, opts ...grpc.CallOption) (string, error) {
		got = opts
		return fmt.Sprint(n), nil
	}
	res, err := belfry.Bind(method, grpc.WaitForReady(true), grpc.MaxCallRecvMsgSize(1))(t.Context(), 7)
	if res != "7" || err != nil {
		t.Errorf("call = %q, %v, want %q, nil", res, err, "7")
	}
	if want := []grpc.CallOption{grpc.WaitForReady(true), grpc.MaxCallRecvMsgSize(1)}; !slices.Equal(got, want) {
		t.Errorf("options are %v, want %v", got, want)
	}
}

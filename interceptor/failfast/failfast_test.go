// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package failfast_test

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"

	"github.com/belfry-go/belfry/interceptor"
	"github.com/belfry-go/belfry/interceptor/concurrency"
	"github.com/belfry-go/belfry/interceptor/failfast"
	"github.com/belfry-go/belfry/interceptor/layertest"
	"github.com/belfry-go/belfry/interceptor/loadshed"
	"github.com/belfry-go/belfry/interceptor/retry"
	"github.com/belfry-go/belfry/internal/test/calltest"
)

const ms = time.Millisecond

func after(t testing.TB, d time.Duration) *failfast.Layer {
	t.Helper()
	l, err := failfast.New(failfast.Config{After: d})
	if err != nil {
		t.Fatal(err)
	}
	return l
}

func limit(t testing.TB, n int64) *concurrency.Layer {
	t.Helper()
	l, err := concurrency.New(concurrency.Config{Limit: n})
	if err != nil {
		t.Fatal(err)
	}
	return l
}

func checkState(t *testing.T, f *failfast.Layer, failing bool, waiting int) {
	t.Helper()
	if f.Failing() != failing || f.Waiting() != waiting {
		t.Errorf("failing %v with %d waiting, want %v with %d", f.Failing(), f.Waiting(), failing, waiting)
	}
}

func invoke(ctx context.Context, c grpc.ClientConnInterface, opts ...grpc.CallOption) <-chan error {
	done := make(chan error, 1)
	go func() { done <- c.Invoke(ctx, calltest.Method, nil, nil, opts...) }()
	synctest.Wait()
	return done
}

func TestBound(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := calltest.Stack(t, after(t, 300*ms), limit(t, 1)).Wrap(calltest.Takes(time.Second))
		calltest.Expect(t, calltest.Burst(c, 2), calltest.OK(time.Second), calltest.Refused(300*ms, interceptor.ReasonFailFast))
		c = calltest.Stack(t, after(t, 0), limit(t, 1)).Wrap(calltest.Takes(time.Minute))
		calltest.Expect(t, calltest.Burst(c, 2), calltest.OK(time.Minute), calltest.Refused(failfast.DefaultAfter, interceptor.ReasonFailFast))
	})
}

// A call that found room at once is retried while the limit is busy, for as long as a
// call may wait here, and not at all under a load shed.
func TestRetryInsideWaits(t *testing.T) {
	for name, tc := range map[string]struct {
		outside []interceptor.Spec
		busy    time.Duration
		want    codes.Code
		attempt int32
	}{
		"within_the_bound":   {nil, 200 * ms, codes.OK, 2},
		"not_beyond_it":      {nil, time.Second, codes.Unavailable, 1},
		"not_in_a_load_shed": {[]interceptor.Spec{loadshed.Config{}}, 200 * ms, codes.Unavailable, 1},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				l := limit(t, 1)
				specs := append(tc.outside, after(t, 300*ms), retry.Config{AllMethods: true, Backoff: retry.Backoff{Initial: 10 * ms, Jitter: retry.NoJitter}}, l)
				var attempts atomic.Int32
				c := calltest.Stack(t, specs...).Wrap(calltest.Server(func(context.Context) error {
					if attempts.Add(1) == 1 {
						return status.Error(codes.Unavailable, "try again")
					}
					return nil
				}))
				other := calltest.Stack(t, l).Wrap(calltest.Takes(tc.busy))
				done := invoke(t.Context(), c)
				invoke(t.Context(), other) // It takes the permit while the call backs off.
				if err := <-done; status.Code(err) != tc.want || attempts.Load() != tc.attempt {
					t.Errorf("%d attempts, %v, want %d and %v", attempts.Load(), err, tc.attempt, tc.want)
				}
				time.Sleep(2 * time.Second)
			})
		})
	}
}

func TestFailing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := after(t, 300*ms)
		s := calltest.Stack(t, f, limit(t, 1))
		c := s.Wrap(calltest.Takes(time.Second))
		start := time.Now()
		running := invoke(context.Background(), c)
		first := calltest.Begin(c, 2)
		time.Sleep(100 * ms)
		second := calltest.Begin(c, 2)
		time.Sleep(199 * ms)
		checkState(t, f, false, 4)
		third := calltest.Begin(c, 1) // Has waited for a millisecond.
		// All at 300ms, however long they have waited.
		failFast := func(d time.Duration) calltest.End { return calltest.Refused(d, interceptor.ReasonFailFast) }
		calltest.Expect(t, first(), failFast(300*ms), failFast(300*ms))
		calltest.Expect(t, second(), failFast(200*ms), failFast(200*ms))
		calltest.Expect(t, third(), failFast(1*ms))
		checkState(t, f, true, 0)
		// New calls at once.
		calltest.Expect(t, calltest.Burst(c, 3), failFast(0), failFast(0), failFast(0))
		time.Sleep(699 * ms)
		calltest.Expect(t, calltest.Burst(c, 1), failFast(0))
		if err := <-running; err != nil || time.Since(start) != time.Second {
			t.Fatalf("the call that ran: %v after %v", err, time.Since(start))
		}
		// The permit is free. The first call finds it; the second may wait again.
		ends := calltest.Begin(c, 2)
		checkState(t, f, false, 1)
		calltest.Expect(t, ends(), calltest.OK(time.Second), failFast(300*ms))
		if err := s.Drain(context.Background()); err != nil {
			t.Error(err)
		}
	})
}

func TestMovingQueue(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := after(t, 300*ms)
		c := calltest.Stack(t, f, limit(t, 1)).Wrap(calltest.Takes(200 * ms))
		ends := calltest.Begin(c, 3)
		time.Sleep(250 * ms)
		late := calltest.Begin(c, 1) // Is admitted at 400ms, after the bound of the first has passed.
		calltest.Expect(t, ends(), calltest.OK(200*ms), calltest.OK(400*ms), calltest.Refused(300*ms, interceptor.ReasonFailFast))
		synctest.Wait()
		checkState(t, f, false, 0)
		calltest.Expect(t, late(), calltest.OK(350*ms))
	})
}

func TestCallThatGivesUp(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := after(t, 300*ms)
		c := calltest.Stack(t, f, limit(t, 1)).Wrap(calltest.Takes(time.Second))
		start := time.Now()
		running := invoke(context.Background(), c)
		ctx, cancel := context.WithCancel(context.Background())
		gives := invoke(ctx, c)
		time.Sleep(100 * ms)
		stays := invoke(context.Background(), c)
		cancel()
		if err := <-gives; calltest.Reason(err) != interceptor.ReasonCancelled || time.Since(start) != 100*ms {
			t.Errorf("the cancelled call: %v after %v, want CANCELLED after 100ms", err, time.Since(start))
		}
		if err := <-stays; calltest.Reason(err) != interceptor.ReasonFailFast || time.Since(start) != 300*ms {
			t.Errorf("the other one: %v after %v, want FAIL_FAST after 300ms", err, time.Since(start))
		}
		checkState(t, f, true, 0)
		<-running
	})
}

func TestTighterWaitOrDeadline(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := after(t, 300*ms)
		c := calltest.Stack(t, f, limit(t, 1)).Wrap(calltest.Takes(time.Second))
		calltest.Expect(t, calltest.Burst(c, 2, interceptor.WithWait(interceptor.None)),
			calltest.OK(time.Second), calltest.Refused(0, interceptor.ReasonConcurrency))
		calltest.Expect(t, calltest.Burst(c, 2, interceptor.WithWait(interceptor.For(100*ms))),
			calltest.OK(time.Second), calltest.Refused(100*ms, interceptor.ReasonConcurrency))
		checkState(t, f, false, 0)
		running := invoke(context.Background(), c)
		ctx, cancel := context.WithTimeout(context.Background(), 100*ms)
		defer cancel()
		if err := c.Invoke(ctx, calltest.Method, nil, nil); calltest.Reason(err) != interceptor.ReasonDeadline || status.Code(err) != codes.DeadlineExceeded {
			t.Errorf("a call with a deadline of 100ms: %v, want DEADLINE", err)
		}
		checkState(t, f, false, 0)
		<-running
	})
}

func TestRefusalTellsInnerReason(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f, l := after(t, 300*ms), limit(t, 1)
		c := calltest.Stack(t, f, l).Wrap(calltest.Takes(200 * ms))
		a, b := invoke(context.Background(), c), invoke(context.Background(), c)
		err := <-invoke(context.Background(), c)
		r, _ := interceptor.AsRefusal(err)
		var inner *interceptor.Refusal
		if r == nil || r.Reason != interceptor.ReasonFailFast || !errors.As(r.Err, &inner) || inner.Reason != interceptor.ReasonConcurrency {
			t.Errorf("got %v, want FAIL_FAST around CONCURRENCY", err)
		}
		if err := errors.Join(<-a, <-b); err != nil {
			t.Error(err)
		}
	})
}

// decides is a gate that refuses for a reason that waiting does not change.
type decides struct {
	interceptor.GateOnly
	asked int
}

func (g *decides) NewLayer() (interceptor.Layer, error) { return g, nil }

func (g *decides) WrapGate(interceptor.Gate) interceptor.Gate {
	no := interceptor.Refuse("filter", interceptor.ReasonFilter, "")
	return interceptor.GateFunc(func(context.Context, *interceptor.Admission, interceptor.Wait) error {
		g.asked++
		return no
	})
}

func TestRefusalThatWaitingCannotHelp(t *testing.T) {
	f, g := after(t, 300*ms), &decides{}
	err := calltest.Stack(t, f, g).Wrap(calltest.Takes(0)).Invoke(context.Background(), calltest.Method, nil, nil)
	if calltest.Reason(err) != interceptor.ReasonFilter || g.asked != 1 {
		t.Errorf("got %v after asking %d times, want the filter's refusal after once", err, g.asked)
	}
	checkState(t, f, false, 0)
}

func TestEndedCall(t *testing.T) {
	f, l := after(t, 300*ms), limit(t, 1)
	if err := l.SetLimit(0); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	err := calltest.Stack(t, f, l).Wrap(calltest.Takes(0)).Invoke(ctx, calltest.Method, nil, nil)
	if calltest.Reason(err) != interceptor.ReasonCancelled || status.Code(err) != codes.Canceled {
		t.Errorf("got %v, want CANCELLED", err)
	}
	checkState(t, f, false, 0)
}

func TestUpdate(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := after(t, time.Minute)
		c := calltest.Stack(t, f, limit(t, 1)).Wrap(calltest.Takes(time.Second))
		ends := calltest.Begin(c, 2)
		time.Sleep(100 * ms)
		if err := f.Update(failfast.Config{After: -1}); err == nil || f.Config().After != time.Minute {
			t.Errorf("Update(-1) = %v, Config() = %+v; want an error and no change", err, f.Config())
		}
		if err := f.Update(failfast.Config{After: 300 * ms}); err != nil {
			t.Fatal(err)
		}
		calltest.Expect(t, ends(), calltest.OK(time.Second), calltest.Refused(300*ms, interceptor.ReasonFailFast))
		checkState(t, f, true, 0)
		if err := f.Update(failfast.Config{After: 200 * ms}); err != nil || !f.Failing() {
			t.Errorf("Update = %v, failing %v; want the state kept", err, f.Failing())
		}
		calltest.Expect(t, calltest.Burst(c, 2), calltest.OK(time.Second), calltest.Refused(200*ms, interceptor.ReasonFailFast))
	})
}

func TestConfigErrors(t *testing.T) {
	if _, err := failfast.New(failfast.Config{After: -time.Second}); err == nil || !strings.Contains(err.Error(), "failfast: After is -1s, must be positive, or 0 for 3s") {
		t.Errorf("New = %v", err)
	}
	if _, err := failfast.New(failfast.Config{}, failfast.WithName("")); err == nil || !strings.Contains(err.Error(), `failfast: WithName is ""`) {
		t.Errorf("New = %v", err)
	}
	if _, err := interceptor.NewStack(limit(t, 1), after(t, 0)); err == nil || !strings.Contains(err.Error(), "failfast") {
		t.Errorf("NewStack with a fail-fast innermost = %v, want an error", err)
	}
}

func TestConformance(t *testing.T) {
	layertest.RunStack(t, func() ([]interceptor.Spec, func() error) {
		f, l := after(t, 10*ms), limit(t, 20)
		return []interceptor.Spec{f, l}, func() error {
			if f.Waiting() != 0 || l.InUse() != 0 || l.Waiting() != 0 {
				return fmt.Errorf("%d calls wait here and %d inside, %d permits in use; want none", f.Waiting(), l.Waiting(), l.InUse())
			}
			return nil
		}
	})
}

func unary(tb testing.TB) map[string]func() {
	calls := make(map[string]func())
	for name, failing := range map[string]bool{"admitted": false, "failing": true} {
		f, l := after(tb, ms), limit(tb, 1)
		ic := calltest.Stack(tb, f, l).UnaryClientInterceptor()
		call := func() { ic(context.Background(), calltest.Method, nil, nil, nil, calltest.Noop) }
		if failing {
			if err := l.SetLimit(0); err != nil {
				tb.Fatal(err)
			}
			call() // Waits in vain.
		}
		if f.Failing() != failing {
			tb.Fatalf("failing %v, want %v", f.Failing(), failing)
		}
		calls[name] = call
	}
	return calls
}

func TestAllocations(t *testing.T) {
	for name, call := range unary(t) {
		if n := testing.AllocsPerRun(1000, call); n >= 1 {
			t.Errorf("%s: %v allocations per call, want 0", name, n)
		}
	}
}

func BenchmarkFailFast(b *testing.B) {
	for name, call := range unary(b) {
		b.Run(name, func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				call()
			}
		})
	}
}

// A server that cannot be reached is no reason to wait for longer than the bound.
func TestNoReadyEndpoint(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := after(t, 300*ms)
		s := calltest.Stack(t, f, limit(t, 10))
		conn, err := grpc.NewClient("passthrough:///nowhere", append(s.DialOptions(),
			grpc.WithTransportCredentials(insecure.NewCredentials()),
			grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) {
				<-ctx.Done()
				return nil, ctx.Err()
			}))...)
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		failed := calltest.Refused(300*ms, interceptor.ReasonFailFast)
		calltest.Expect(t, calltest.Burst(conn, 2), failed, failed)
		checkState(t, f, true, 0)
		calltest.Expect(t, calltest.Burst(conn, 1), calltest.Refused(0, interceptor.ReasonFailFast))
		if n := s.InFlight(); n != 0 {
			t.Errorf("%d calls in flight, want none", n)
		}
	})
}

// ignorant is a gate that waits and asks neither its Wait nor Park.
type ignorant struct{ interceptor.GateOnly }

func (g *ignorant) NewLayer() (interceptor.Layer, error) { return g, nil }

func (g *ignorant) WrapGate(inner interceptor.Gate) interceptor.Gate {
	return interceptor.GateFunc(func(ctx context.Context, a *interceptor.Admission, w interceptor.Wait) error {
		if w == interceptor.None {
			return errors.New("busy")
		}
		<-ctx.Done()
		return ctx.Err()
	})
}

func TestDrainWakesWaiters(t *testing.T) {
	for name, inside := range map[string]interceptor.Spec{"limit": limit(t, 1), "ignorant": &ignorant{}} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				f := after(t, time.Hour)
				s := calltest.Stack(t, f, inside)
				if l, ok := inside.(*concurrency.Layer); ok {
					if err := l.SetLimit(0); err != nil {
						t.Fatal(err)
					}
				}
				ends := calltest.Begin(s.Wrap(calltest.Takes(0)), 2)
				if err := s.Drain(context.Background()); err != nil {
					t.Fatal(err)
				}
				drained := calltest.Refused(0, interceptor.ReasonDrain)
				calltest.Expect(t, ends(), drained, drained)
				checkState(t, f, false, 0)
			})
		})
	}
}

// stubborn is a gate that admits nobody who waits; the first one it does not even let
// go when the waiting is over.
type stubborn struct {
	interceptor.GateOnly
	ready   bool
	waited  int
	release chan struct{}
}

func (g *stubborn) NewLayer() (interceptor.Layer, error) { return g, nil }

func (g *stubborn) WrapGate(inner interceptor.Gate) interceptor.Gate {
	return interceptor.GateFunc(func(ctx context.Context, a *interceptor.Admission, w interceptor.Wait) error {
		switch {
		case w == interceptor.None && g.ready:
			return inner.Admit(ctx, a, w)
		case w == interceptor.None:
			return errors.New("busy")
		}
		if g.waited++; g.waited == 1 {
			<-g.release
		}
		<-ctx.Done()
		return ctx.Err()
	})
}

// A call that was told to fail and has not gone yet does not stop the clock of those
// that come later.
func TestFailingTwice(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f, g := after(t, 300*ms), &stubborn{release: make(chan struct{})}
		c := calltest.Stack(t, f, g).Wrap(calltest.Takes(0))
		first := calltest.Begin(c, 1)
		time.Sleep(400 * ms)
		checkState(t, f, true, 0)
		g.ready = true
		calltest.Expect(t, calltest.Burst(c, 1), calltest.OK(0))
		g.ready = false
		second := calltest.Begin(c, 1)
		checkState(t, f, false, 1)
		calltest.Expect(t, second(), calltest.Refused(300*ms, interceptor.ReasonFailFast))
		close(g.release)
		calltest.Expect(t, first(), calltest.Refused(700*ms, interceptor.ReasonFailFast))
	})
}

// Whatever happens, nobody waits who could be admitted, none waits for longer than
// the bound, and the layer does not fail while calls are admitted.
func TestLiveness(t *testing.T) {
	const bound = 50 * ms
	for seed := range uint64(100) {
		synctest.Test(t, func(t *testing.T) {
			rng := rand.New(rand.NewPCG(seed, 1))
			n := int64(1 + rng.IntN(3))
			f, l := after(t, bound), limit(t, n)
			c := calltest.Stack(t, f, l)
			var wg sync.WaitGroup
			for range 200 {
				service := time.Duration(rng.IntN(40)) * ms
				if rng.IntN(20) == 0 {
					service = 500 * ms
				}
				patience := time.Duration(1+rng.IntN(200)) * ms
				wg.Go(func() {
					ctx, cancel := context.WithTimeout(context.Background(), patience)
					defer cancel()
					started := time.Now()
					err := c.Wrap(calltest.Takes(service)).Invoke(ctx, calltest.Method, nil, nil)
					if r := calltest.Reason(err); r != "" && time.Since(started) > bound {
						t.Errorf("seed %d: %v after %v, want at most %v", seed, err, time.Since(started), bound)
					}
				})
				time.Sleep(time.Duration(rng.IntN(30)) * ms)
				synctest.Wait()
				if f.Waiting() > 0 && l.InUse() < n {
					t.Fatalf("seed %d: %d calls wait, and %d of %d permits are in use", seed, f.Waiting(), l.InUse(), n)
				}
			}
			wg.Wait()
			if f.Waiting() != 0 || l.Waiting() != 0 || l.InUse() != 0 {
				t.Errorf("seed %d: at rest %d and %d calls wait, and %d permits are in use", seed, f.Waiting(), l.Waiting(), l.InUse())
			}
		})
	}
}

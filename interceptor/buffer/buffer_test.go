// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package buffer_test

import (
	"context"
	"errors"
	"fmt"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/belfry-go/belfry/interceptor"
	"github.com/belfry-go/belfry/interceptor/buffer"
	"github.com/belfry-go/belfry/interceptor/concurrency"
	"github.com/belfry-go/belfry/interceptor/layertest"
	"github.com/belfry-go/belfry/interceptor/loadshed"
	"github.com/belfry-go/belfry/internal/test/calltest"
	"github.com/belfry-go/belfry/internal/test/race"
)

func must[T any](t testing.TB) func(T, error) T {
	return func(v T, err error) T {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
}

func slots(t testing.TB, n int) *buffer.Layer {
	t.Helper()
	return must[*buffer.Layer](t)(buffer.New(buffer.Config{Size: n}))
}

func limit(t testing.TB, n int64) *concurrency.Layer {
	t.Helper()
	return must[*concurrency.Layer](t)(concurrency.New(concurrency.Config{Limit: n}))
}

func shed(t testing.TB) *loadshed.Layer {
	t.Helper()
	return must[*loadshed.Layer](t)(loadshed.New(loadshed.Config{}))
}

func checkRest(t *testing.T, b *buffer.Layer) {
	t.Helper()
	if n := b.Waiting(); n != 0 {
		t.Errorf("%d slots taken at rest, want none", n)
	}
}

func TestNoSlotForCallThatNeedNotWait(t *testing.T) {
	b := slots(t, 1)
	c := calltest.Stack(t, b, limit(t, 2)).Wrap(calltest.Server(func(context.Context) error {
		if n := b.Waiting(); n != 0 {
			t.Errorf("%d slots taken while a call runs, want none", n)
		}
		return status.Error(codes.NotFound, "the server's")
	}))
	for range 10 {
		if err := c.Invoke(context.Background(), calltest.Method, nil, nil); status.Code(err) != codes.NotFound {
			t.Errorf("got %v, want the server's answer", err)
		}
	}
}

// Tower's Shed(Buffer(2, Limit(1))).
func TestInsideShed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := slots(t, 2)
		c := calltest.Stack(t, shed(t), b, limit(t, 1)).Wrap(calltest.Takes(time.Second))
		for range 2 {
			ends := calltest.Begin(c, 4)
			if got := b.Waiting(); got != 2 {
				t.Errorf("%d calls wait, want 2", got)
			}
			calltest.Expect(t, ends(),
				calltest.OK(time.Second), calltest.OK(2*time.Second), calltest.OK(3*time.Second), calltest.Refused(0, interceptor.ReasonQueueFull))
			checkRest(t, b)
		}
	})
}

func TestSlotIsFreeWhenCallRuns(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := calltest.Stack(t, slots(t, 1), limit(t, 1)).Wrap(calltest.Takes(time.Second))
		first := calltest.Begin(c, 3) // Runs, waits, refused.
		time.Sleep(1500 * time.Millisecond)
		second := calltest.Begin(c, 2) // The second of the first runs.
		calltest.Expect(t, first(), calltest.OK(time.Second), calltest.OK(2*time.Second), calltest.Refused(0, interceptor.ReasonQueueFull))
		calltest.Expect(t, second(), calltest.OK(1500*time.Millisecond), calltest.Refused(0, interceptor.ReasonQueueFull))
	})
}

func TestCancelledWaiter(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := slots(t, 2)
		var sent []string
		c := calltest.Stack(t, b, limit(t, 1)).Wrap(calltest.Server(func(ctx context.Context) error {
			sent = append(sent, ctx.Value(name{}).(string))
			time.Sleep(time.Second)
			return nil
		}))
		call := func(ctx context.Context, n string) <-chan error {
			done := make(chan error, 1)
			go func() { done <- c.Invoke(context.WithValue(ctx, name{}, n), calltest.Method, nil, nil) }()
			synctest.Wait()
			return done
		}
		bg := context.Background()
		ctx, cancel := context.WithCancel(bg)
		one, two, three := call(bg, "hello1"), call(ctx, "hello2"), call(bg, "hello3")
		cancel()
		if err := <-two; calltest.Reason(err) != interceptor.ReasonCancelled || status.Code(err) != codes.Canceled {
			t.Errorf("the cancelled call: %v, want CANCELLED", err)
		}
		four := call(bg, "hello4") // Takes the place that is free again.
		if err := errors.Join(<-one, <-three, <-four); err != nil {
			t.Error(err)
		}
		if want := []string{"hello1", "hello3", "hello4"}; !slices.Equal(sent, want) {
			t.Errorf("sent %q, want %q", sent, want)
		}
		checkRest(t, b)
	})
}

// notReady is a gate that is not ready until a moment, and then fails or admits.
type notReady struct {
	interceptor.GateOnly
	until time.Time
	err   error
	asked atomic.Int64
}

func (g *notReady) NewLayer() (interceptor.Layer, error) { return g, nil }

func (g *notReady) WrapGate(inner interceptor.Gate) interceptor.Gate {
	busy := interceptor.Refuse("inner", interceptor.ReasonConcurrency, "not ready")
	return interceptor.GateFunc(func(ctx context.Context, a *interceptor.Admission, w interceptor.Wait) error {
		g.asked.Add(1)
		switch err := w.Sleep(ctx, interceptor.InstantOf(g.until)); {
		case err == interceptor.ErrWaitOver:
			return busy
		case err != nil:
			return interceptor.Ended(ctx, "inner")
		case g.err != nil:
			return g.err
		}
		return inner.Admit(ctx, a, w)
	})
}

func TestInnerNotReadyAndFailing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := slots(t, 10)
		inner := &notReady{until: time.Now().Add(time.Second)}
		c := calltest.Stack(t, shed(t), b, inner).Wrap(calltest.Takes(0))
		calltest.Expect(t, calltest.Burst(c, 2), calltest.OK(time.Second), calltest.OK(time.Second))

		inner.until, inner.err = time.Now().Add(time.Second), interceptor.Refuse("inner", interceptor.ReasonQuota, "foobar")
		ends := calltest.Begin(c, 3)
		if got := b.Waiting(); got != 3 {
			t.Errorf("%d calls wait, want 3", got)
		}
		over := calltest.Refused(time.Second, interceptor.ReasonQuota)
		calltest.Expect(t, ends(), over, over, over)
		checkRest(t, b)
	})
}

func TestRefusalThatWaitingCannotHelp(t *testing.T) {
	for _, r := range []interceptor.Reason{interceptor.ReasonFilter, interceptor.ReasonThrottled, interceptor.ReasonBreakerOpen} {
		inner := &notReady{until: time.Now(), err: interceptor.Refuse("inner", r, "")}
		c := calltest.Stack(t, slots(t, 1), inner).Wrap(calltest.Takes(0))
		if err := c.Invoke(context.Background(), calltest.Method, nil, nil); calltest.Reason(err) != r || status.Code(err) != r.Code() {
			t.Errorf("got %v, want the refusal from inside with %s", err, r)
		}
		if got := inner.asked.Load(); got != 1 {
			t.Errorf("the layer inside was asked %d times, want once", got)
		}
	}
}

func TestEndedCallTakesNoSlot(t *testing.T) {
	l := limit(t, 1)
	if err := l.SetLimit(0); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	err := calltest.Stack(t, slots(t, 1), l).Wrap(calltest.Takes(0)).Invoke(ctx, calltest.Method, nil, nil)
	if calltest.Reason(err) != interceptor.ReasonCancelled || status.Code(err) != codes.Canceled {
		t.Errorf("got %v, want CANCELLED", err)
	}
}

func TestMaxWaitAndDeadline(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := must[*buffer.Layer](t)(buffer.New(buffer.Config{Size: 5, MaxWait: 300 * time.Millisecond}))
		c := calltest.Stack(t, shed(t), b, limit(t, 1)).Wrap(calltest.Takes(time.Second))
		ends := calltest.Begin(c, 2)
		ctx, cancel := context.WithTimeout(context.Background(), 100*time.Millisecond)
		defer cancel()
		start := time.Now()
		err := c.Invoke(ctx, calltest.Method, nil, nil)
		if calltest.Reason(err) != interceptor.ReasonDeadline || time.Since(start) != 100*time.Millisecond {
			t.Errorf("a call with a deadline: %v after %v, want DEADLINE after 100ms", err, time.Since(start))
		}
		calltest.Expect(t, ends(), calltest.OK(time.Second), calltest.Refused(300*time.Millisecond, interceptor.ReasonConcurrency))
		checkRest(t, b)
	})
}

func TestUpdate(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := slots(t, 3)
		c := calltest.Stack(t, b, limit(t, 1)).Wrap(calltest.Takes(time.Second))
		ends := calltest.Begin(c, 4)
		for _, bad := range []buffer.Config{{}, {Size: 1, MaxWait: -1}} {
			if err := b.Update(bad); err == nil || b.Config() != (buffer.Config{Size: 3}) {
				t.Errorf("Update(%+v) = %v, Config() = %+v; want an error and no change", bad, err, b.Config())
			}
		}
		if err := b.Update(buffer.Config{Size: 1}); err != nil {
			t.Fatal(err)
		}
		calltest.Expect(t, calltest.Burst(c, 1), calltest.Refused(0, interceptor.ReasonQueueFull))
		if err := b.Update(buffer.Config{Size: 4}); err != nil {
			t.Fatal(err)
		}
		calltest.Expect(t, calltest.Burst(c, 1), calltest.OK(5*time.Second))
		calltest.Expect(t, ends(), calltest.OK(time.Second), calltest.OK(2*time.Second), calltest.OK(3*time.Second), calltest.OK(4*time.Second))
		checkRest(t, b)
	})
}

func TestNestedBuffers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		outer, inner := slots(t, 3), slots(t, 1)
		c := calltest.Stack(t, outer, inner, limit(t, 1)).Wrap(calltest.Takes(time.Second))
		ends := calltest.Begin(c, 3)
		// The third finds the inner one full and waiting there does not help it.
		calltest.Expect(t, ends(), calltest.OK(time.Second), calltest.OK(2*time.Second), calltest.Refused(0, interceptor.ReasonQueueFull))
		checkRest(t, outer)
		checkRest(t, inner)
	})
}

// Tower sheds 116 of such 5,000 calls.
func TestNoRefusalWhileThereIsRoom(t *testing.T) {
	b := slots(t, 10_000)
	c := calltest.Stack(t, shed(t), b, limit(t, 10)).Wrap(calltest.Server(func(context.Context) error { return nil }))
	var wg sync.WaitGroup
	var failed atomic.Int64
	for range 5000 {
		wg.Go(func() {
			if err := c.Invoke(context.Background(), calltest.Method, nil, nil); err != nil {
				failed.Add(1)
			}
		})
	}
	wg.Wait()
	if n := failed.Load(); n != 0 {
		t.Errorf("%d of 5,000 calls were refused, want none", n)
	}
	checkRest(t, b)
}

// As many clients as there are permits and places, each with one call at a time:
// there is always room. It is refused if a place is still taken by a call that was
// handed a permit but has not run since.
func TestClientsThatFitAreNeverRefused(t *testing.T) {
	b := slots(t, 2)
	c := calltest.Stack(t, shed(t), b, limit(t, 1)).Wrap(calltest.Server(func(context.Context) error { return nil }))
	n := 10_000 // Each call wakes another one, which takes its time on a busy machine.
	if race.Enabled {
		n = 500
	}
	var wg sync.WaitGroup
	var failed atomic.Int64
	for range 3 {
		wg.Go(func() {
			for range n {
				if err := c.Invoke(context.Background(), calltest.Method, nil, nil); err != nil {
					failed.Add(1)
				}
			}
		})
	}
	wg.Wait()
	if refused := failed.Load(); refused != 0 {
		t.Errorf("%d of %d calls were refused, want none", refused, 3*n)
	}
	checkRest(t, b)
}

func TestConfigErrors(t *testing.T) {
	for _, tc := range []struct {
		cfg  buffer.Config
		opts []buffer.Option
		want string
	}{
		{buffer.Config{}, nil, "buffer: Size is 0, must be from 1 to 2147483647"},
		{buffer.Config{Size: -3}, nil, "buffer: Size is -3"},
		{buffer.Config{Size: 1, MaxWait: -time.Second}, nil, "buffer: MaxWait is -1s, must be positive, or 0 for no bound"},
		{buffer.Config{Size: 1}, []buffer.Option{buffer.WithName("")}, `buffer: WithName is ""`},
	} {
		if _, err := buffer.New(tc.cfg, tc.opts...); err == nil || !strings.Contains(err.Error(), tc.want) {
			t.Errorf("New(%+v) = %v, want an error that says %q", tc.cfg, err, tc.want)
		}
	}
	if _, err := interceptor.NewStack(limit(t, 1), slots(t, 1)); err == nil || !strings.Contains(err.Error(), "buffer") {
		t.Errorf("NewStack with a buffer innermost = %v, want an error", err)
	}
}

func TestConformance(t *testing.T) {
	layertest.RunStack(t, func() ([]interceptor.Spec, func() error) {
		b := slots(t, 200)
		return []interceptor.Spec{b, limit(t, 20)}, func() error {
			if n := b.Waiting(); n != 0 {
				return fmt.Errorf("%d slots taken, want none", n)
			}
			return nil
		}
	})
}

// unary are the calls of the benchmarks: one that passes, one that is refused.
func unary(tb testing.TB) map[string]func() {
	full := limit(tb, 1)
	if err := full.SetLimit(0); err != nil {
		tb.Fatal(err)
	}
	taken := slots(tb, 1)
	ctx, cancel := context.WithCancel(context.Background())
	wait := calltest.Stack(tb, taken, full).UnaryClientInterceptor()
	waiting := make(chan struct{})
	go func() {
		defer close(waiting)
		wait(ctx, calltest.Method, nil, nil, nil, calltest.Noop)
	}()
	for taken.Waiting() == 0 { // It is on its way.
		runtime.Gosched()
	}
	tb.Cleanup(func() { cancel(); <-waiting })
	calls := make(map[string]func())
	for name, layers := range map[string][]interceptor.Spec{
		"admitted":           {slots(tb, 100), limit(tb, 1024)},
		"refused":            {taken, full},
		"admitted_in_a_shed": {shed(tb), slots(tb, 100), limit(tb, 1024)},
		"refused_in_a_shed":  {shed(tb), taken, full},
	} {
		ic := calltest.Stack(tb, layers...).UnaryClientInterceptor()
		calls[name] = func() { ic(ctx, calltest.Method, nil, nil, nil, calltest.Noop) }
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

func BenchmarkBuffer(b *testing.B) {
	for name, call := range unary(b) {
		b.Run(name, func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				call()
			}
		})
	}
}

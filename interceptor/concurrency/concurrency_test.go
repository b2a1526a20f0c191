// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package concurrency_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"reflect"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"github.com/belfry-go/belfry/interceptor"
	"github.com/belfry-go/belfry/interceptor/concurrency"
	"github.com/belfry-go/belfry/interceptor/layertest"
	"github.com/belfry-go/belfry/internal/test/calltest"
	"github.com/belfry-go/belfry/limit"
)

func newLayer(t testing.TB, cfg concurrency.Config, opts ...concurrency.Option) *concurrency.Layer {
	t.Helper()
	l, err := concurrency.New(cfg, opts...)
	if err != nil {
		t.Fatalf("New(%+v): %v", cfg, err)
	}
	return l
}

func fixed(t testing.TB, n int64) *concurrency.Layer {
	t.Helper()
	return newLayer(t, concurrency.Config{Limit: n})
}

func atRest(l *concurrency.Layer) error {
	if n, w := l.InUse(), l.Waiting(); n != 0 || w != 0 {
		return fmt.Errorf("%d permits in use and %d calls waiting, want none", n, w)
	}
	return nil
}

func checkRest(t *testing.T, ls ...*concurrency.Layer) {
	t.Helper()
	for _, l := range ls {
		if err := atRest(l); err != nil {
			t.Error(err)
		}
	}
}

// invoke starts a call and returns where its error will be.
func invoke(ctx context.Context, c grpc.ClientConnInterface, opts ...grpc.CallOption) <-chan error {
	done := make(chan error, 1)
	go func() { done <- c.Invoke(ctx, calltest.Method, nil, nil, opts...) }()
	return done
}

func TestLimitAdmitsAsCallsEnd(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := fixed(t, 2)
		c := calltest.Stack(t, l).Wrap(calltest.Takes(time.Second))
		calltest.Begin(c, 4)
		time.Sleep(500 * time.Millisecond)
		if got := [2]int{int(l.InUse()), l.Waiting()}; got != [2]int{2, 2} {
			t.Errorf("%v calls running and waiting, want 2 and 2", got)
		}
		time.Sleep(1600 * time.Millisecond)
		checkRest(t, l)
		calltest.Expect(t, calltest.Burst(c, 5),
			calltest.OK(time.Second), calltest.OK(time.Second), calltest.OK(2*time.Second), calltest.OK(2*time.Second), calltest.OK(3*time.Second))
	})
}

func TestLimitOfZero(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := fixed(t, 1)
		if err := l.SetLimit(0); err != nil {
			t.Fatal(err)
		}
		c := calltest.Stack(t, l).Wrap(calltest.Takes(0))
		ctx, cancel := context.WithTimeout(context.Background(), time.Hour)
		defer cancel()
		start := time.Now()
		err := c.Invoke(ctx, calltest.Method, nil, nil)
		if calltest.Reason(err) != interceptor.ReasonDeadline || status.Code(err) != codes.DeadlineExceeded || time.Since(start) != time.Hour {
			t.Errorf("a call at a limit of 0 ended with %v after %v, want DEADLINE after its deadline, 1h", err, time.Since(start))
		}
		done := invoke(context.Background(), c)
		synctest.Wait()
		if err := l.SetLimit(1); err != nil {
			t.Fatal(err)
		}
		if err := <-done; err != nil {
			t.Errorf("a call that waited for the limit to be raised: %v", err)
		}
		checkRest(t, l)
	})
}

// hold is a gate that calls wait in for d, after they have got what gates outside gave.
type hold struct {
	interceptor.GateOnly
	d   time.Duration
	err error
}

func (h *hold) NewLayer() (interceptor.Layer, error) { return h, nil }

func (h *hold) WrapGate(inner interceptor.Gate) interceptor.Gate {
	return interceptor.GateFunc(func(ctx context.Context, a *interceptor.Admission, w interceptor.Wait) error {
		if err := w.Sleep(ctx, interceptor.Now().Add(h.d)); err != nil {
			return interceptor.Ended(ctx, "hold")
		}
		if h.err != nil {
			return h.err
		}
		return inner.Admit(ctx, a, w)
	})
}

func TestPermitHeldWhileWaitingInside(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := fixed(t, 1)
		c := calltest.Stack(t, l, &hold{d: time.Second}).Wrap(calltest.Takes(time.Second))
		calltest.Expect(t, calltest.Burst(c, 2), calltest.OK(2*time.Second), calltest.OK(4*time.Second))
		checkRest(t, l)
	})
}

func TestPermitOfRefusedCallIsHandedOn(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := fixed(t, 1)
		no := interceptor.Refuse("no", interceptor.ReasonFilter, "")
		c := calltest.Stack(t, l, &hold{d: time.Second, err: no}).Wrap(calltest.Takes(0))
		calltest.Expect(t, calltest.Burst(c, 2),
			calltest.Refused(time.Second, interceptor.ReasonFilter), calltest.Refused(2*time.Second, interceptor.ReasonFilter))
		checkRest(t, l)
	})
}

func TestPermitOfEndedCallIsHandedOn(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := fixed(t, 1)
		boom := status.Error(codes.Internal, "boom")
		answers := []error{boom, nil, nil}
		c := calltest.Stack(t, l).Wrap(calltest.Server(func(ctx context.Context) error {
			err := answers[0]
			answers = answers[1:]
			select {
			case <-time.After(time.Second):
				return err
			case <-ctx.Done():
				return status.FromContextError(ctx.Err()).Err()
			}
		}))
		start := time.Now()
		ctx, cancel := context.WithCancel(context.Background())
		first := invoke(context.Background(), c)
		synctest.Wait()
		second := invoke(ctx, c)
		synctest.Wait()
		third := invoke(context.Background(), c)
		if err := <-first; err != boom {
			t.Errorf("first: %v, want the server's error", err)
		}
		synctest.Wait()
		cancel()
		if err := <-second; status.Code(err) != codes.Canceled || time.Since(start) != time.Second {
			t.Errorf("second: %v after %v, want CANCELLED after 1s", err, time.Since(start))
		}
		if err := <-third; err != nil || time.Since(start) != 2*time.Second {
			t.Errorf("third: %v after %v, want success after 2s", err, time.Since(start))
		}
		checkRest(t, l)
	})
}

func TestQueueCancelledWaiter(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := fixed(t, 1)
		c := calltest.Stack(t, l).Wrap(calltest.Takes(time.Second))
		start := time.Now()
		invoke(context.Background(), c)
		synctest.Wait()
		ctx, cancel := context.WithCancel(context.Background())
		second := invoke(ctx, c)
		synctest.Wait()
		third := invoke(context.Background(), c)
		synctest.Wait()
		time.Sleep(100 * time.Millisecond)
		cancel()
		err := <-second
		if calltest.Reason(err) != interceptor.ReasonCancelled || status.Code(err) != codes.Canceled || !errors.Is(err, context.Canceled) || time.Since(start) != 100*time.Millisecond {
			t.Errorf("the cancelled waiter: %v after %v, want CANCELLED at once", err, time.Since(start))
		}
		if err := <-third; err != nil || time.Since(start) != 2*time.Second {
			t.Errorf("the waiter behind it: %v after %v, want success after 2s", err, time.Since(start))
		}
		checkRest(t, l)
	})
}

func TestLimitIsSharedByStacks(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := fixed(t, 1)
		a, b := calltest.Stack(t, l).Wrap(calltest.Takes(time.Second)), calltest.Stack(t, l).Wrap(calltest.Takes(time.Second))
		start := time.Now()
		first, second := invoke(context.Background(), a), invoke(context.Background(), b)
		if err := errors.Join(<-first, <-second); err != nil || time.Since(start) != 2*time.Second {
			t.Errorf("two calls of two connections ended with %v after %v, want success after 2s", err, time.Since(start))
		}
	})
}

func TestRefusalOfCallThatMayNotWait(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := calltest.Stack(t, fixed(t, 1)).Wrap(calltest.Takes(time.Second))
		calltest.Expect(t, calltest.Burst(c, 3, interceptor.WithWait(interceptor.None)),
			calltest.OK(time.Second), calltest.Refused(0, interceptor.ReasonConcurrency), calltest.Refused(0, interceptor.ReasonConcurrency))
		calltest.Expect(t, calltest.Burst(c, 2, interceptor.WithWait(interceptor.For(300*time.Millisecond))),
			calltest.OK(time.Second), calltest.Refused(300*time.Millisecond, interceptor.ReasonConcurrency))
		calltest.Expect(t, calltest.Burst(c, 2, interceptor.WithWait(interceptor.Until(time.Now().Add(-time.Second)))),
			calltest.OK(time.Second), calltest.Refused(0, interceptor.ReasonConcurrency))
	})
}

func TestMaxWait(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := newLayer(t, concurrency.Config{Limit: 1, MaxWait: 300 * time.Millisecond})
		c := calltest.Stack(t, l).Wrap(calltest.Takes(time.Second))
		calltest.Expect(t, calltest.Burst(c, 2), calltest.OK(time.Second), calltest.Refused(300*time.Millisecond, interceptor.ReasonConcurrency))
		calltest.Expect(t, calltest.Burst(c, 2, interceptor.WithWait(interceptor.For(100*time.Millisecond))),
			calltest.OK(time.Second), calltest.Refused(100*time.Millisecond, interceptor.ReasonConcurrency))
		checkRest(t, l)
	})
}

// order starts a call that runs for a second, then one call each of the named
// contexts, 10 ms apart, and returns in which order they were admitted.
func order(t *testing.T, l *concurrency.Layer, calls ...context.Context) (admitted []int) {
	t.Helper()
	var mu sync.Mutex
	type key struct{}
	c := calltest.Stack(t, l).Wrap(calltest.Server(func(ctx context.Context) error {
		mu.Lock()
		if n, ok := ctx.Value(key{}).(int); ok {
			admitted = append(admitted, n)
		}
		mu.Unlock()
		time.Sleep(time.Second)
		return nil
	}))
	var all []<-chan error
	all = append(all, invoke(context.Background(), c))
	synctest.Wait()
	for i, ctx := range calls {
		all = append(all, invoke(context.WithValue(ctx, key{}, i), c))
		time.Sleep(10 * time.Millisecond)
	}
	for _, done := range all {
		<-done
	}
	checkRest(t, l)
	return admitted
}

func TestQueueOrder(t *testing.T) {
	bg := context.Background()
	high, low := interceptor.ContextWithPriority(bg, 5), interceptor.ContextWithPriority(bg, -1)
	withMD := func(p string) context.Context { return metadata.AppendToOutgoingContext(bg, "x-priority", p) }
	for _, tc := range []struct {
		name  string
		cfg   concurrency.Config
		opts  []concurrency.Option
		calls []context.Context
		want  []int
	}{
		{"FIFO admits who has waited longest", concurrency.Config{}, nil, []context.Context{bg, bg, bg}, []int{0, 1, 2}},
		{"LIFO admits who came last", concurrency.Config{Discipline: concurrency.LIFO}, nil, []context.Context{bg, bg, bg}, []int{2, 1, 0}},
		{"a higher priority goes first", concurrency.Config{}, nil, []context.Context{low, bg, high, bg, high}, []int{2, 4, 1, 3, 0}},
		{"LIFO is within a priority", concurrency.Config{Discipline: concurrency.LIFO}, nil, []context.Context{high, bg, high, bg}, []int{2, 0, 3, 1}},
		{"priorities come from metadata", concurrency.Config{}, []concurrency.Option{concurrency.WithPriority(interceptor.MetadataPriority("x-priority"))},
			[]context.Context{withMD("-3"), withMD("none"), bg, withMD("7")}, []int{3, 1, 2, 0}},
		{"a full FIFO queue refuses who comes last", concurrency.Config{MaxWaiters: 2}, nil, []context.Context{bg, bg, bg, bg}, []int{0, 1}},
		{"a full LIFO queue refuses who has waited longest", concurrency.Config{MaxWaiters: 2, Discipline: concurrency.LIFO}, nil, []context.Context{bg, bg, bg}, []int{2, 1}},
		{"a full queue refuses the lowest priority", concurrency.Config{MaxWaiters: 2}, nil, []context.Context{low, bg, high, low}, []int{2, 1}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				tc.cfg.Limit = 1
				if got := order(t, newLayer(t, tc.cfg, tc.opts...), tc.calls...); !slices.Equal(got, tc.want) {
					t.Errorf("admitted %v, want %v", got, tc.want)
				}
			})
		})
	}
}

func TestQueueFull(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := newLayer(t, concurrency.Config{Limit: 1, MaxWaiters: 1})
		calltest.Expect(t, calltest.Burst(calltest.Stack(t, l).Wrap(calltest.Takes(time.Second)), 3),
			calltest.OK(time.Second), calltest.OK(2*time.Second), calltest.Refused(0, interceptor.ReasonQueueFull))
		l = newLayer(t, concurrency.Config{Limit: 1, MaxWaiters: 1, Discipline: concurrency.LIFO})
		calltest.Expect(t, calltest.Burst(calltest.Stack(t, l).Wrap(calltest.Takes(time.Second)), 3),
			calltest.OK(time.Second), calltest.Refused(0, interceptor.ReasonQueueFull), calltest.OK(2*time.Second))
	})
}

// The queue is standing from the first call to be admitted later than the target
// until the interval has passed; from then on CoDel refuses.
func TestCoDelStandingQueue(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		cfg := concurrency.Config{Limit: 1, Discipline: concurrency.CoDel, CoDelTarget: 20 * time.Millisecond, CoDelInterval: 100 * time.Millisecond}
		c := calltest.Stack(t, newLayer(t, cfg)).Wrap(calltest.Takes(10 * time.Millisecond))
		for i, e := range calltest.Burst(c, 10) { // A burst that is over within the interval.
			if e.Reason != "" {
				t.Errorf("call %d of a burst was refused: %v", i, e)
			}
		}
		var refusals int
		for _, e := range calltest.Burst(c, 200) {
			if e.Reason == interceptor.ReasonConcurrency {
				refusals++
			} else if e.Reason != "" {
				t.Errorf("a call ended with %v", e)
			}
		}
		// The nth refusal comes 100ms/sqrt(n) after the one before, so by t there are
		// about (t/200ms)²; 146 calls served in 1.46s and 53 refused make 200.
		if refusals < 50 || refusals > 57 {
			t.Errorf("%d of 200 calls were refused, want about 53", refusals)
		}
		fifo := cfg
		fifo.Discipline = concurrency.FIFO
		for i, e := range calltest.Burst(calltest.Stack(t, newLayer(t, fifo)).Wrap(calltest.Takes(10*time.Millisecond)), 200) {
			if want := calltest.OK(time.Duration(i+1) * 10 * time.Millisecond); e != want {
				t.Errorf("call %d of a FIFO queue ended as %v, want %v", i, e, want)
			}
		}
	})
}

func costOf(ctx context.Context, _ *interceptor.Admission) int64 {
	n, _ := ctx.Value(costKey{}).(int64)
	return n
}

type costKey struct{}

func costs(n int64) context.Context { return context.WithValue(context.Background(), costKey{}, n) }

func TestCostIsNotOvertaken(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := newLayer(t, concurrency.Config{Limit: 4}, concurrency.WithCost(costOf))
		c := calltest.Stack(t, l).Wrap(calltest.Takes(time.Second))
		start := time.Now()
		at := func(done <-chan error) time.Duration {
			if err := <-done; err != nil {
				t.Error(err)
			}
			return time.Since(start)
		}
		call := func(n int64) <-chan error {
			done := invoke(costs(n), c)
			synctest.Wait()
			return done
		}
		a := call(3)
		heavy := call(2) // Does not fit beside a.
		light := call(1) // Would fit, but heavy is first.
		none := call(0)  // Counts as 1.
		if err := c.Invoke(costs(1), calltest.Method, nil, nil, interceptor.WithWait(interceptor.None)); calltest.Reason(err) != interceptor.ReasonConcurrency {
			t.Errorf("a call that may not wait, while a permit is free but promised: %v, want a refusal", err)
		}
		got := []time.Duration{at(a), at(heavy), at(light), at(none)}
		if want := []time.Duration{time.Second, 2 * time.Second, 2 * time.Second, 2 * time.Second}; !slices.Equal(got, want) {
			t.Errorf("calls ended after %v, want %v", got, want)
		}
		checkRest(t, l)
	})
}

func TestCostAboveLimitRunsAlone(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := newLayer(t, concurrency.Config{Limit: 2}, concurrency.WithCost(costOf))
		c := calltest.Stack(t, l).Wrap(calltest.Takes(time.Second))
		start := time.Now()
		small := invoke(costs(1), c)
		synctest.Wait()
		big := invoke(costs(10), c)
		synctest.Wait()
		after := invoke(costs(1), c)
		if err := errors.Join(<-small, <-big); err != nil || time.Since(start) != 2*time.Second {
			t.Errorf("the heavy call: %v after %v, want success after 2s", err, time.Since(start))
		}
		if err := <-after; err != nil || time.Since(start) != 3*time.Second {
			t.Errorf("the call behind it: %v after %v, want success after 3s", err, time.Since(start))
		}
		checkRest(t, l)
	})
}

func TestCostWaiterGivesUp(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := newLayer(t, concurrency.Config{Limit: 2}, concurrency.WithCost(costOf))
		c := calltest.Stack(t, l).Wrap(calltest.Takes(time.Second))
		start := time.Now()
		first := invoke(costs(1), c)
		synctest.Wait()
		heavy := invoke(costs(2), c, interceptor.WithWait(interceptor.For(100*time.Millisecond)))
		synctest.Wait()
		light := invoke(costs(1), c)
		if err := <-heavy; calltest.Reason(err) != interceptor.ReasonConcurrency {
			t.Errorf("the heavy call: %v, want a refusal", err)
		}
		if err := errors.Join(<-first, <-light); err != nil || time.Since(start) != 1100*time.Millisecond {
			t.Errorf("the light call: %v after %v, want success after 1.1s, from when the heavy one gave up", err, time.Since(start))
		}
	})
}

func TestSetLimitWhileCallsRun(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := fixed(t, 3)
		c := calltest.Stack(t, l).Wrap(calltest.Takes(time.Second))
		ends := calltest.Begin(c, 8)
		if err := l.SetLimit(1); err != nil {
			t.Fatal(err)
		}
		if got := l.InUse(); got != 3 {
			t.Errorf("%d permits in use after shrinking, want the 3 that are out", got)
		}
		time.Sleep(1500 * time.Millisecond) // One runs since 1s.
		if got := l.InUse(); got != 1 {
			t.Errorf("%d permits in use after calls ended, want 1", got)
		}
		if err := l.SetLimit(4); err != nil { // Admits three waiters at 1.5s, for 2.5s.
			t.Fatal(err)
		}
		if got := l.InUse(); got != 4 {
			t.Errorf("%d permits in use at once after growing, want 4", got)
		}
		s := time.Second
		calltest.Expect(t, ends(),
			calltest.OK(s), calltest.OK(s), calltest.OK(s), calltest.OK(2*s),
			calltest.OK(2500*time.Millisecond), calltest.OK(2500*time.Millisecond), calltest.OK(2500*time.Millisecond), calltest.OK(3*s))
		checkRest(t, l)
	})
}

func TestUpdate(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		cfg := concurrency.Config{Limit: 1}
		l := newLayer(t, cfg)
		c := calltest.Stack(t, l).Wrap(calltest.Takes(time.Second))
		ends := calltest.Begin(c, 4)
		bad := concurrency.Config{Limit: 50, MaxWaiters: -1}
		if err := l.Update(bad); err == nil || !reflect.DeepEqual(l.Config(), cfg) || l.Limit() != 1 || l.InUse() != 1 {
			t.Errorf("Update(%+v) = %v, and the layer has %+v with limit %d; want an error and no change", bad, err, l.Config(), l.Limit())
		}
		// An algorithm that is not valid, along with rules that are.
		if err := l.Update(concurrency.Config{AIMD: &limit.AIMDConfig{Min: 9, Max: 3}, Discipline: concurrency.LIFO}); err == nil || l.Config().Discipline != concurrency.FIFO {
			t.Errorf("Update with a bad algorithm = %v, Config() = %+v", err, l.Config())
		}
		if err := l.Update(concurrency.Config{Limit: 1, Discipline: concurrency.LIFO, MaxWaiters: 1}); err != nil {
			t.Fatal(err)
		}
		if l.Waiting() != 3 {
			t.Errorf("%d calls wait, want all 3 that did before", l.Waiting())
		}
		s := time.Second
		calltest.Expect(t, ends(), calltest.OK(s), calltest.OK(4*s), calltest.OK(3*s), calltest.OK(2*s))
		checkRest(t, l)
	})
}

// stream sends one message, then its end.
type stream struct {
	grpc.ClientStream
	ctx  context.Context
	errs []error
}

func (s *stream) Context() context.Context { return s.ctx }
func (s *stream) RecvMsg(any) error {
	err := s.errs[0]
	s.errs = s.errs[1:]
	return err
}

// streams is a connection whose streams receive errs, or cannot be opened.
type streams struct {
	errs []error
	open error
}

func (c *streams) Invoke(context.Context, string, any, any, ...grpc.CallOption) error { return nil }

func (c *streams) NewStream(ctx context.Context, _ *grpc.StreamDesc, _ string, _ ...grpc.CallOption) (grpc.ClientStream, error) {
	if c.open != nil {
		return nil, c.open
	}
	return &stream{ctx: ctx, errs: slices.Clone(c.errs)}, nil
}

func TestStreamHoldsPermit(t *testing.T) {
	desc := &grpc.StreamDesc{ServerStreams: true}
	l := fixed(t, 2)
	holding := func(want int64, when string) {
		t.Helper()
		if got := l.InUse(); got != want {
			t.Errorf("%d permits in use %s, want %d", got, when, want)
		}
	}
	c := calltest.Stack(t, l).Wrap(&streams{errs: []error{nil, io.EOF, io.EOF}})
	s, err := c.NewStream(context.Background(), desc, calltest.Method)
	if err != nil {
		t.Fatal(err)
	}
	holding(1, "by an open stream")
	if err := s.RecvMsg(nil); err != nil {
		t.Fatal(err)
	}
	holding(1, "after a message")
	for range 2 {
		if err := s.RecvMsg(nil); err != io.EOF {
			t.Errorf("the end: %v, want EOF", err)
		}
		holding(0, "after EOF")
	}
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithCancel(context.Background())
		if _, err := c.NewStream(ctx, desc, calltest.Method); err != nil {
			t.Fatal(err)
		}
		holding(1, "by an abandoned stream")
		cancel()
		synctest.Wait()
		holding(0, "after its context was cancelled")
	})
	if _, err := calltest.Stack(t, l).Wrap(&streams{open: io.ErrUnexpectedEOF}).NewStream(context.Background(), desc, calltest.Method); err == nil {
		t.Error("a stream that cannot be opened was opened")
	}
	holding(0, "after a creation failure")
}

func TestConfigErrors(t *testing.T) {
	type cfg = concurrency.Config
	for _, tc := range []struct {
		cfg  cfg
		opts []concurrency.Option
		want string
	}{
		{cfg{AIMD: &limit.AIMDConfig{}, Auto: &limit.AutoConfig{}}, nil, "AIMD is &{"},
		{cfg{Auto: &limit.AutoConfig{Min: -1}}, nil, "Auto.Min is -1"},
		{cfg{Auto: &limit.AutoConfig{Initial: 5, Max: 4}}, nil, "Auto.Initial is 5, must be from Min, 1, to Max, 4"},
		{cfg{Limit: 1, Vegas: &limit.VegasConfig{}}, nil, "Vegas is &{"},
		{cfg{Limit: -1}, nil, "Limit is -1, must be from 1"},
		{cfg{Limit: 1 << 40}, nil, "Limit is 1099511627776, must be from 1 to 2147483647"},
		{cfg{Limit: 1}, []concurrency.Option{concurrency.WithName("")}, `WithName is ""`},
		{cfg{Limit: 1}, []concurrency.Option{concurrency.WithAlgorithm(new(limit.AIMD))}, "Limit is 1, must not be set if WithAlgorithm"},
		{cfg{Limit: 1, Discipline: 7}, nil, "Discipline is Discipline(7)"},
		{cfg{Limit: 1, MaxWaiters: -2}, nil, "MaxWaiters is -2"},
		{cfg{Limit: 1, MaxWait: -time.Second}, nil, "MaxWait is -1s"},
		{cfg{Limit: 1, CoDelTarget: -1}, nil, "CoDelTarget is -1ns"},
		{cfg{Limit: 1, CoDelInterval: -1}, nil, "CoDelInterval is -1ns"},
		{cfg{Limit: 1, DropCodes: []codes.Code{codes.Internal, codes.OK}}, nil, "DropCodes[1] is OK"},
		{cfg{Limit: 1, DropCodes: []codes.Code{77}}, nil, "DropCodes[0] is Code(77)"},
		{cfg{AIMD: &limit.AIMDConfig{Min: -1}}, nil, "AIMD.Min is -1"},
		{cfg{AIMD: &limit.AIMDConfig{Min: 5, Max: 4}}, nil, "AIMD.Max is 4, must be from Min, 5"},
		{cfg{AIMD: &limit.AIMDConfig{Initial: 5000}}, nil, "AIMD.Initial is 5000, must be from Min, 1, to Max, 1000"},
		{cfg{AIMD: &limit.AIMDConfig{BackoffRatio: 1}}, nil, "AIMD.BackoffRatio is 1, must be from 0.5 to 0.99"},
		{cfg{AIMD: &limit.AIMDConfig{Increase: -1}}, nil, "AIMD.Increase is -1"},
		{cfg{AIMD: &limit.AIMDConfig{Timeout: -1}}, nil, "AIMD.Timeout is -1ns"},
		{cfg{Gradient2: &limit.Gradient2Config{Smoothing: 2}}, nil, "Gradient2.Smoothing is 2"},
		{cfg{Gradient2: &limit.Gradient2Config{Tolerance: 0.5}}, nil, "Gradient2.Tolerance is 0.5"},
		{cfg{Gradient2: &limit.Gradient2Config{QueueSize: -1}}, nil, "Gradient2.QueueSize is -1"},
		{cfg{Gradient2: &limit.Gradient2Config{LongWindow: 3}}, nil, "Gradient2.LongWindow is 3"},
		{cfg{Gradient2: &limit.Gradient2Config{BackoffRatio: 0.1}}, nil, "Gradient2.BackoffRatio is 0.1"},
		{cfg{Gradient2: &limit.Gradient2Config{Window: -1}}, nil, "Gradient2.Window is -1ns"},
		{cfg{Gradient2: &limit.Gradient2Config{Max: -7}}, nil, "Gradient2.Max is -7"},
		{cfg{Vegas: &limit.VegasConfig{WindowSamples: -1}}, nil, "Vegas.WindowSamples is -1"},
		{cfg{Vegas: &limit.VegasConfig{ProbeWindows: 1}}, nil, "Vegas.ProbeWindows is 1"},
		{cfg{Vegas: &limit.VegasConfig{Smoothing: -0.1}}, nil, "Vegas.Smoothing is -0.1"},
		{cfg{Vegas: &limit.VegasConfig{Initial: -3}}, nil, "Vegas.Initial is -3"},
	} {
		_, err := concurrency.New(tc.cfg, tc.opts...)
		if err == nil || !strings.HasPrefix(err.Error(), "concurrency: ") || !strings.Contains(err.Error(), tc.want) {
			t.Errorf("New(%+v) = %v, want an error that says %q", tc.cfg, err, tc.want)
		}
	}
	for field, o := range map[string]concurrency.Option{
		"WithCost": concurrency.WithCost(nil), "WithPriority": concurrency.WithPriority(nil), "WithAlgorithm": concurrency.WithAlgorithm(nil),
	} {
		_, err := concurrency.New(concurrency.Config{Limit: 1}, o)
		calltest.WantConfigError(t, err, "concurrency", field, nil)
	}
	l := fixed(t, 5)
	for _, n := range []int64{-1, 1 << 31} {
		if err := l.SetLimit(n); err == nil || l.Limit() != 5 {
			t.Errorf("SetLimit(%d) = %v, limit %d; want an error and 5", n, err, l.Limit())
		}
	}
	if err := newLayer(t, concurrency.Config{AIMD: &limit.AIMDConfig{}}).SetLimit(3); err == nil || !strings.Contains(err.Error(), "AIMD") {
		t.Errorf("SetLimit of an adaptive limit = %v, want an error that names the algorithm", err)
	}
}

type observer struct {
	interceptor.NopObserver
	mu     sync.Mutex
	events []string
}

func (o *observer) add(format string, args ...any) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.events = append(o.events, fmt.Sprintf(format, args...))
}
func (o *observer) Limit(l interceptor.LimitState) { o.add("limit %s%s %v", l.Layer, l.Key, l.Limit) }
func (o *observer) Waited(_ interceptor.Observed, layer string, d time.Duration) {
	o.add("waited %s %v", layer, d)
}
func (o *observer) Refused(_ interceptor.Observed, r *interceptor.Refusal) {
	o.add("refused %s %s", r.Layer, r.Reason)
}

func TestObserver(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		obs := &observer{}
		l := newLayer(t, concurrency.Config{Limit: 1}, concurrency.WithName("orders"))
		c := calltest.Stack(t, interceptor.Observe(obs), l).Wrap(calltest.Takes(time.Second))
		calltest.Burst(c, 2)
		calltest.Burst(c, 2, interceptor.WithWait(interceptor.None))
		if err := l.SetLimit(2); err != nil {
			t.Fatal(err)
		}
		calltest.Burst(c, 1)
		want := []string{"limit orders 1", "waited orders 1s", "refused orders CONCURRENCY", "limit orders 2"}
		if !slices.Equal(obs.events, want) {
			t.Errorf("observed %q, want %q", obs.events, want)
		}
	})
}

func TestDrainWakesWaiters(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := fixed(t, 1)
		s := calltest.Stack(t, l)
		ends := calltest.Begin(s.Wrap(calltest.Takes(time.Second)), 3)
		if err := s.Drain(context.Background()); err != nil {
			t.Fatal(err)
		}
		drained := calltest.Refused(0, interceptor.ReasonDrain)
		calltest.Expect(t, ends(), calltest.OK(time.Second), drained, drained)
		checkRest(t, l)
	})
}

// RFC 8289 forgets a standing queue when it is empty, however it became so.
func TestCoDelQueueEmptiedByCancellation(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := newLayer(t, concurrency.Config{Limit: 1, Discipline: concurrency.CoDel})
		s := calltest.Stack(t, l)
		slow := s.Wrap(calltest.Takes(20 * time.Millisecond))
		ends := calltest.Begin(slow, 2) // The second waits for longer than the target,
		ctx, cancel := context.WithCancel(context.Background())
		third, fourth := invoke(ctx, slow), invoke(ctx, slow) // and at its grant two others wait,
		time.Sleep(25 * time.Millisecond)
		cancel() // which give up.
		for _, gone := range []<-chan error{third, fourth} {
			if err := <-gone; calltest.Reason(err) != interceptor.ReasonCancelled {
				t.Errorf("got %v, want CANCELLED", err)
			}
		}
		ends()
		time.Sleep(time.Hour)
		// No queue has been standing for 100 ms.
		calltest.Expect(t, calltest.Burst(s.Wrap(calltest.Takes(6*time.Millisecond)), 4),
			calltest.OK(6*time.Millisecond), calltest.OK(12*time.Millisecond), calltest.OK(18*time.Millisecond), calltest.OK(24*time.Millisecond))
		checkRest(t, l)
	})
}

func TestRefusalTexts(t *testing.T) {
	const what = "belfry: orders: "
	high := interceptor.ContextWithPriority(context.Background(), 1)
	none := func() interceptor.Wait { return interceptor.None }
	forever := func() interceptor.Wait { return interceptor.Forever }
	for _, tc := range []struct {
		name string
		cfg  concurrency.Config
		wait func() interceptor.Wait
		want []string // Of those that are refused of one, two of the same priority and one of a higher.
	}{
		{"may_not_wait", concurrency.Config{Limit: 1}, none,
			[]string{what + "CONCURRENCY: no permit is free (limit 1)", what + "CONCURRENCY: no permit is free (limit 1)", what + "CONCURRENCY: no permit is free (limit 1)"}},
		{"adaptive", concurrency.Config{AIMD: &limit.AIMDConfig{Initial: 1}}, none,
			[]string{what + "CONCURRENCY: no permit is free", what + "CONCURRENCY: no permit is free", what + "CONCURRENCY: no permit is free"}},
		{"queue_full", concurrency.Config{Limit: 1, MaxWaiters: 1}, forever,
			[]string{what + "QUEUE_FULL: evicted from the wait queue by a call that goes first (limit 1)", what + "QUEUE_FULL: wait queue is full (1 waiting, limit 1)"}},
		{"max_wait", concurrency.Config{Limit: 1, MaxWait: time.Minute}, forever,
			[]string{what + "CONCURRENCY: no permit became free in 1m0s (limit 1)", what + "CONCURRENCY: no permit became free in 1m0s (limit 1)", what + "CONCURRENCY: no permit became free in 1m0s (limit 1)"}},
		{"in_time", concurrency.Config{Limit: 1}, func() interceptor.Wait { return interceptor.For(time.Second) },
			[]string{what + "CONCURRENCY: no permit became free in the time that the call may wait (limit 1)", what + "CONCURRENCY: no permit became free in the time that the call may wait (limit 1)", what + "CONCURRENCY: no permit became free in the time that the call may wait (limit 1)"}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				l := newLayer(t, tc.cfg, concurrency.WithName("orders"))
				c := calltest.Stack(t, l).Wrap(calltest.Takes(time.Hour))
				var got []string
				var mu sync.Mutex
				var wg sync.WaitGroup
				for _, ctx := range []context.Context{context.Background(), context.Background(), context.Background(), high} {
					wg.Go(func() {
						if err := c.Invoke(ctx, calltest.Method, nil, nil, interceptor.WithWait(tc.wait())); err != nil {
							mu.Lock()
							defer mu.Unlock()
							got = append(got, err.Error())
						}
					})
					synctest.Wait()
				}
				wg.Wait()
				slices.Sort(got)
				if !slices.Equal(got, tc.want) {
					t.Errorf("refused with\n%q, want\n%q", got, tc.want)
				}
			})
		})
	}
	t.Run("after_set_limit", func(t *testing.T) {
		l := fixed(t, 7)
		c := calltest.Stack(t, l).Wrap(calltest.Takes(0))
		if err := l.SetLimit(0); err != nil {
			t.Fatal(err)
		}
		err := c.Invoke(context.Background(), calltest.Method, nil, nil, interceptor.WithWait(interceptor.None))
		if want := "belfry: concurrency: CONCURRENCY: no permit is free (limit 0)"; err == nil || err.Error() != want {
			t.Errorf("got %v, want %q", err, want)
		}
	})
}

func TestKeys(t *testing.T) {
	tenant := func(name string) context.Context {
		return metadata.AppendToOutgoingContext(context.Background(), "tenant", name)
	}
	keyBy := interceptor.KeyBy{Metadata: "tenant"}
	none := interceptor.WithWait(interceptor.None)
	t.Run("each_has_a_limit", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			l := newLayer(t, concurrency.Config{Limit: 1, KeyBy: keyBy})
			c := calltest.Stack(t, l).Wrap(calltest.Takes(time.Second))
			a1, a2, b := invoke(tenant("a"), c), invoke(tenant("a"), c), invoke(tenant("b"), c)
			synctest.Wait()
			if got, want := l.Stats("a"), (interceptor.LimitState{Layer: "concurrency", Key: "a", Limit: 1, InUse: 1, Waiting: 1}); got != want {
				t.Errorf("stats of a: %+v, want %+v", got, want)
			}
			if l.InUse() != 2 || l.Waiting() != 1 || l.Limit() != 1 {
				t.Errorf("in use %d, waiting %d, limit %d; want 2, 1, 1", l.InUse(), l.Waiting(), l.Limit())
			}
			err := c.Invoke(tenant("b"), calltest.Method, nil, nil, none)
			if r, _ := interceptor.AsRefusal(err); r == nil || r.Key != "b" || r.Reason != interceptor.ReasonConcurrency {
				t.Errorf("got %v, want a refusal that names b", err)
			}
			for _, done := range []<-chan error{a1, a2, b} {
				if err := <-done; err != nil {
					t.Error(err)
				}
			}
			checkRest(t, l)
		})
	})
	t.Run("too_many_share_one", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			l := newLayer(t, concurrency.Config{Limit: 1, KeyBy: keyBy, MaxKeys: 2})
			c := calltest.Stack(t, l).Wrap(calltest.Takes(time.Second))
			var dones []<-chan error
			for _, name := range []string{"a", "b", "c"} {
				dones = append(dones, invoke(tenant(name), c))
				synctest.Wait()
			}
			err := c.Invoke(tenant("d"), calltest.Method, nil, nil, none)
			if r, _ := interceptor.AsRefusal(err); r == nil || r.Key != concurrency.Others {
				t.Errorf("got %v, want a refusal for the limit that c and d share", err)
			}
			for _, done := range dones {
				if err := <-done; err != nil {
					t.Error(err)
				}
			}
			time.Sleep(time.Second)
			// Those that have no call make room.
			e := invoke(tenant("e"), c)
			synctest.Wait() // The search for room is at most one at a time.
			f := invoke(tenant("f"), c)
			synctest.Wait()
			if l.Stats("e").InUse != 1 || l.Stats("f").InUse != 1 || l.Stats("a") != (interceptor.LimitState{}) {
				t.Errorf("stats of e %+v, f %+v, a %+v; want limits of their own, and none", l.Stats("e"), l.Stats("f"), l.Stats("a"))
			}
			<-e
			<-f
			checkRest(t, l)
		})
	})
	t.Run("set_limit_and_update_change_all", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			l := newLayer(t, concurrency.Config{Limit: 1, KeyBy: keyBy})
			c := calltest.Stack(t, l).Wrap(calltest.Takes(time.Second))
			all := func(n int) {
				t.Helper()
				var dones []<-chan error
				for range n {
					dones = append(dones, invoke(tenant("a"), c, none), invoke(tenant("b"), c, none))
				}
				synctest.Wait()
				if got := l.InUse(); got != int64(2*n) {
					t.Errorf("%d permits in use, want %d of each of two keys", got, n)
				}
				for _, done := range dones {
					if err := <-done; err != nil {
						t.Error(err)
					}
				}
			}
			all(1)
			if err := l.SetLimit(3); err != nil {
				t.Fatal(err)
			}
			all(3)
			if err := l.Update(concurrency.Config{Limit: 2, KeyBy: keyBy}); err != nil {
				t.Fatal(err)
			}
			all(2)
			if err := l.Update(concurrency.Config{AIMD: &limit.AIMDConfig{}, KeyBy: keyBy}); err != nil {
				t.Fatal(err)
			}
			if got := l.Stats("a").Limit; got != 2 {
				t.Errorf("the algorithm of a key starts at %d, want the limit that held, 2", got)
			}
			calltest.WantConfigError(t, l.Update(concurrency.Config{Limit: 2}), "concurrency", "KeyBy", interceptor.KeyBy{})
			checkRest(t, l)
		})
	})
	t.Run("what_an_algorithm_has_learnt_is_kept_for_a_minute", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			l := newLayer(t, concurrency.Config{AIMD: &limit.AIMDConfig{}, KeyBy: keyBy, MaxKeys: 1})
			s := calltest.Stack(t, l)
			down := s.Wrap(calltest.Server(func(context.Context) error { return status.Error(codes.Unavailable, "") }))
			<-invoke(tenant("a"), down)
			if got := l.Stats("a").Limit; got != 18 {
				t.Fatalf("limit %d after a drop, want 18", got)
			}
			ok := s.Wrap(calltest.Takes(0))
			time.Sleep(59 * time.Second)
			<-invoke(tenant("b"), ok)
			if got := l.Stats("a").Limit; got != 18 {
				t.Errorf("limit %d of a after 59s, want 18", got)
			}
			time.Sleep(2 * time.Second)
			<-invoke(tenant("b"), ok)
			if got, gone := l.Stats("b").Limit, l.Stats("a").Limit; got != 20 || gone != 0 {
				t.Errorf("limits %d of b and %d of a after 61s, want 20 and none", got, gone)
			}
		})
	})
	t.Run("concurrently", func(t *testing.T) {
		l := newLayer(t, concurrency.Config{Limit: 2, KeyBy: keyBy, MaxKeys: 5})
		c := calltest.Stack(t, l).Wrap(calltest.Takes(0))
		var wg sync.WaitGroup
		for i := range 8 {
			wg.Go(func() {
				for n := range 500 {
					if err := c.Invoke(tenant(string(rune('a'+(n*i)%11))), calltest.Method, nil, nil); err != nil {
						t.Error(err)
					}
				}
			})
		}
		wg.Wait()
		checkRest(t, l)
	})
}

func TestConformance(t *testing.T) {
	for name, cfg := range map[string]concurrency.Config{
		"fixed":     {Limit: 20},
		"priority":  {Limit: 20, MaxWaiters: 100, Discipline: concurrency.LIFO},
		"keys":      {Limit: 20, KeyBy: interceptor.KeyBy{Method: true}, MaxKeys: 3},
		"codel":     {Limit: 20, MaxWait: time.Second, Discipline: concurrency.CoDel},
		"gradient2": {Gradient2: &limit.Gradient2Config{WindowSamples: 1, Window: 1}, SampleStreams: true},
	} {
		t.Run(name, func(t *testing.T) {
			layertest.Run(t, func() (interceptor.Spec, func() error) {
				l := newLayer(t, cfg)
				return l, func() error { return atRest(l) }
			})
		})
	}
}

// An adaptive queue serves who came first, until calls have waited for an interval
// without a break, and then who came last, until nobody waits.
func TestQueueAdaptive(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := newLayer(t, concurrency.Config{Limit: 1, Discipline: concurrency.Adaptive, CoDelInterval: time.Second})
		type name struct{}
		var sent []int
		c := calltest.Stack(t, l).Wrap(calltest.Server(func(ctx context.Context) error {
			sent = append(sent, ctx.Value(name{}).(int))
			time.Sleep(400 * ms)
			return nil
		}))
		var wg sync.WaitGroup
		burst := func(from, to int) {
			for i := from; i <= to; i++ {
				wg.Go(func() {
					if err := c.Invoke(context.WithValue(t.Context(), name{}, i), calltest.Method, nil, nil); err != nil {
						t.Error(err)
					}
				})
				synctest.Wait()
			}
		}
		burst(1, 6) // At 0.4 and 0.8 s the oldest goes first, later the newest.
		wg.Wait()
		burst(7, 9) // The queue has been empty.
		wg.Wait()
		if want := []int{1, 2, 3, 6, 5, 4, 7, 8, 9}; !slices.Equal(sent, want) {
			t.Errorf("sent %v, want %v", sent, want)
		}
		checkRest(t, l)
	})
}

// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package buffer_test

import (
	"context"
	"math"
	"math/rand/v2"
	"net"
	"runtime"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/grpc-ecosystem/go-grpc-middleware/v2/interceptors"
	"github.com/grpc-ecosystem/go-grpc-middleware/v2/interceptors/selector"
	"golang.org/x/sync/semaphore"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"

	"github.com/belfry-go/belfry/interceptor"
	"github.com/belfry-go/belfry/interceptor/adapt"
	"github.com/belfry-go/belfry/interceptor/buffer"
	"github.com/belfry-go/belfry/interceptor/concurrency"
	"github.com/belfry-go/belfry/internal/test/calltest"
)

// hangs is a server that answers nothing.
var hangs = calltest.Server(func(ctx context.Context) error {
	<-ctx.Done()
	return status.FromContextError(ctx.Err()).Err()
})

// opaque is a gate of somebody else's that lets one call through at a time and knows
// neither traits, nor slots, nor parking.
type opaque struct {
	interceptor.GateOnly
	free chan struct{}
}

func newOpaque() *opaque {
	g := &opaque{free: make(chan struct{}, 1)}
	g.free <- struct{}{}
	return g
}

func (g *opaque) NewLayer() (interceptor.Layer, error) { return g, nil }
func (g *opaque) Release(int64, interceptor.End)       { g.free <- struct{}{} }

func (g *opaque) WrapGate(inner interceptor.Gate) interceptor.Gate {
	full := interceptor.Refuse("opaque", interceptor.ReasonConcurrency, "")
	return interceptor.GateFunc(func(ctx context.Context, a *interceptor.Admission, w interceptor.Wait) error {
		switch err := w.On(ctx, g.free); {
		case err == interceptor.ErrWaitOver:
			return full
		case err != nil:
			return err // Not what it should be.
		}
		a.Hold(g, 0)
		return inner.Admit(ctx, a, w)
	})
}

// nothing matches no call.
var nothing = selector.MatchFunc(func(context.Context, interceptors.CallMeta) bool { return false })

// A buffer bounds what waits inside it, at however many gates in whichever order.
func TestBounds(t *testing.T) {
	const size = 5
	sem := func(n int64) interceptor.Spec {
		return adapt.FromSemaphore("semaphore", semaphore.NewWeighted(n))
	}
	all := selector.MatchFunc(func(context.Context, interceptors.CallMeta) bool { return true })
	lim := func(n int64) interceptor.Spec { return concurrency.Config{Limit: n} }
	for _, tc := range []struct {
		name    string
		inside  func() []interceptor.Spec
		running int
	}{
		{"one_gate", func() []interceptor.Spec { return []interceptor.Spec{lim(1)} }, 1},
		{"wide_then_narrow", func() []interceptor.Spec { return []interceptor.Spec{lim(1000), lim(1)} }, 1},
		{"narrow_then_wide", func() []interceptor.Spec { return []interceptor.Spec{lim(1), lim(1000)} }, 1},
		{"three_gates", func() []interceptor.Spec { return []interceptor.Spec{lim(100), lim(10), lim(3)} }, 3},
		{"limit_then_semaphore", func() []interceptor.Spec { return []interceptor.Spec{lim(100), sem(1)} }, 1},
		{"semaphore_then_limit", func() []interceptor.Spec { return []interceptor.Spec{sem(100), lim(1)} }, 1},
		{"gate_that_knows_nothing", func() []interceptor.Spec { return []interceptor.Spec{lim(100), newOpaque(), lim(100)} }, 1},
		{"gate_that_knows_nothing_innermost", func() []interceptor.Spec { return []interceptor.Spec{lim(2), newOpaque()} }, 1},
		{"only", func() []interceptor.Spec {
			return []interceptor.Spec{interceptor.Only(nothing, lim(7)), lim(100), interceptor.Only(all, lim(2))}
		}, 2},
		{"inside_a_retry", func() []interceptor.Spec {
			return []interceptor.Spec{lim(100), &again{wait: interceptor.Forever}, lim(1)}
		}, 1},
		{"fail_fast", func() []interceptor.Spec { return []interceptor.Spec{fast(t, time.Hour), lim(100), lim(1)} }, 1},
		{"second_buffer", func() []interceptor.Spec { return []interceptor.Spec{lim(100), slots(t, 3), lim(1)} }, 1},
	} {
		t.Run(tc.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				b := slots(t, size)
				s := calltest.Stack(t, append([]interceptor.Spec{shed(t), b}, tc.inside()...)...)
				ctx, cancel := context.WithCancel(context.Background())
				defer cancel()
				var wg sync.WaitGroup
				for range 200 {
					wg.Go(func() { s.Wrap(hangs).Invoke(ctx, calltest.Method, nil, nil) })
					time.Sleep(10 * time.Millisecond)
					synctest.Wait()
					if n := b.Waiting(); n > size {
						t.Fatalf("%d slots are taken, and there are %d", n, size)
					}
				}
				if n := s.InFlight(); n > tc.running+size {
					t.Errorf("%d calls in flight, want at most %d that run and %d that wait", n, tc.running, size)
				}
				cancel()
				wg.Wait()
				checkRest(t, b)
			})
		})
	}
}

// unreachable dials for ever.
var unreachable = grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) {
	<-ctx.Done()
	return nil, ctx.Err()
})

// A buffer counts those that wait for an endpoint, too.
func TestBoundsWaitersForConnection(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := slots(t, 3)
		s := calltest.Stack(t, b, limit(t, 1))
		conn, err := grpc.NewClient("passthrough:///nowhere", append(s.DialOptions(),
			grpc.WithTransportCredentials(insecure.NewCredentials()), unreachable)...)
		if err != nil {
			t.Fatal(err)
		}
		ends := calltest.Begin(conn, 5)
		if n := b.Waiting(); n != 3 {
			t.Errorf("%d calls wait for a READY endpoint, want 3", n)
		}
		if err := conn.Close(); err != nil {
			t.Fatal(err)
		}
		closed, full := calltest.Refused(0, interceptor.ReasonClosed), calltest.Refused(0, interceptor.ReasonQueueFull)
		calltest.Expect(t, ends(), closed, closed, closed, full, full)
		checkRest(t, b)
	})
}

func TestDrainWakesWaiters(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := slots(t, 3)
		s := calltest.Stack(t, shed(t), b, limit(t, 1))
		ends := calltest.Begin(s.Wrap(calltest.Takes(time.Second)), 3)
		if err := s.Drain(context.Background()); err != nil {
			t.Fatal(err)
		}
		drained := calltest.Refused(0, interceptor.ReasonDrain)
		calltest.Expect(t, ends(), calltest.OK(time.Second), drained, drained)
		checkRest(t, b)
	})
}

// probe is a gate that looks at the buffer when it is asked.
type probe struct {
	interceptor.GateOnly
	look func()
}

func (g *probe) NewLayer() (interceptor.Layer, error) { return g, nil }
func (g *probe) Traits() interceptor.Traits           { return 0 }

func (g *probe) WrapGate(inner interceptor.Gate) interceptor.Gate {
	return interceptor.GateFunc(func(ctx context.Context, a *interceptor.Admission, w interceptor.Wait) error {
		g.look()
		return inner.Admit(ctx, a, w)
	})
}

// A slot is free the moment a permit is handed to its call, so a call that comes
// before that has woken up is not refused for lack of a slot that nobody waits in.
func TestSlotIsFreeAtTheGrant(t *testing.T) {
	t.Run("of_a_waiter", func(t *testing.T) {
		defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(1)) // The waiter does not run before this goroutine waits.
		for range 100 {
			b := slots(t, 1)
			started := make(chan struct{})
			c := calltest.Stack(t, b, interceptor.Only(nothing, limit(t, 1)), limit(t, 1)).Wrap(calltest.Server(func(ctx context.Context) error {
				if ctx.Value(name{}) == "first" {
					close(started) // It has the permit.
					for b.Waiting() == 0 {
						runtime.Gosched()
					}
				}
				return nil
			}))
			second := make(chan error, 1)
			go func() { <-started; second <- c.Invoke(named("second"), calltest.Method, nil, nil) }()
			atEnd := -1
			// The permit is released before the call's end is told.
			err := c.Invoke(named("first"), calltest.Method, nil, nil, grpc.OnFinish(func(error) { atEnd = b.Waiting() }))
			if err != nil {
				t.Fatal(err)
			}
			if err := <-second; err != nil {
				t.Fatal(err)
			}
			if atEnd > 0 {
				t.Fatalf("%d slots are taken when the permit has been handed on, want none", atEnd)
			}
		}
	})
	t.Run("of_a_call_that_finds_a_permit_after_all", func(t *testing.T) {
		l := limit(t, 1)
		if err := l.SetLimit(0); err != nil {
			t.Fatal(err)
		}
		// Asked for between the first look and the slot.
		raise := func(context.Context, *interceptor.Admission) int {
			if err := l.SetLimit(1); err != nil {
				t.Error(err)
			}
			return 0
		}
		b := must[*buffer.Layer](t)(buffer.New(buffer.Config{Size: 1}, buffer.WithPriority(raise)))
		looked := 0
		look := &probe{look: func() {
			looked++
			if n := b.Waiting(); n != 0 {
				t.Errorf("%d slots are taken behind the limit, want none", n)
			}
		}}
		if err := calltest.Stack(t, b, l, look).Wrap(calltest.Takes(0)).Invoke(context.Background(), calltest.Method, nil, nil); err != nil {
			t.Fatal(err)
		}
		if looked != 1 {
			t.Errorf("the gate behind the limit was asked %d times, want once", looked)
		}
	})
	t.Run("of_two_buffers", func(t *testing.T) {
		defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(1))
		inner := slots(t, 1)
		ctx, cancel := context.WithCancel(context.Background())
		defer cancel()
		// Between the first look and the slot of the outer one the inner one has room again.
		makeRoom := func(context.Context, *interceptor.Admission) int {
			cancel()
			for inner.Waiting() > 0 {
				runtime.Gosched()
			}
			return 0
		}
		outer := must[*buffer.Layer](t)(buffer.New(buffer.Config{Size: 1}, buffer.WithPriority(makeRoom)))
		l := limit(t, 1)
		c := calltest.Stack(t, inner, l).Wrap(calltest.Server(func(context.Context) error {
			for outer.Waiting() == 0 || l.Waiting() == 0 {
				runtime.Gosched()
			}
			return nil
		}))
		var atEnd []int
		first := make(chan error, 1)
		go func() {
			first <- c.Invoke(context.Background(), calltest.Method, nil, nil, grpc.OnFinish(func(error) { atEnd = []int{outer.Waiting(), inner.Waiting()} }))
		}()
		for l.InUse() == 0 {
			runtime.Gosched()
		}
		second := make(chan error, 1)
		go func() { second <- c.Invoke(ctx, calltest.Method, nil, nil) }()
		for inner.Waiting() == 0 {
			runtime.Gosched()
		}
		if err := calltest.Stack(t, outer, inner, l).Wrap(calltest.Takes(0)).Invoke(context.Background(), calltest.Method, nil, nil); err != nil {
			t.Error(err)
		}
		if err := <-first; err != nil {
			t.Error(err)
		}
		if err := <-second; calltest.Reason(err) != interceptor.ReasonCancelled {
			t.Error(err)
		}
		if !slices.Equal(atEnd, []int{0, 0}) {
			t.Errorf("slots taken outside and inside when the permit has been handed on: %v, want none", atEnd)
		}
	})
	t.Run("of_the_last_of_two_gates", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			b, outer, inner := slots(t, 4), limit(t, 2), limit(t, 1)
			ends := calltest.Begin(calltest.Stack(t, b, outer, inner).Wrap(calltest.Takes(time.Second)), 5)
			// One runs, one waits at the inner limit, three at the outer one.
			if got, want := []int{b.Waiting(), outer.Waiting(), inner.Waiting()}, []int{4, 3, 1}; !slices.Equal(got, want) {
				t.Errorf("slots taken, waiting outside, inside: %v, want %v", got, want)
			}
			time.Sleep(1500 * time.Millisecond)
			if got, want := []int{b.Waiting(), outer.Waiting(), inner.Waiting()}, []int{3, 2, 1}; !slices.Equal(got, want) {
				t.Errorf("slots taken, waiting outside, inside: %v, want %v after one has ended", got, want)
			}
			for i, e := range ends() {
				if e.Reason != "" {
					t.Errorf("call %d: %v", i, e)
				}
			}
			checkRest(t, b)
		})
	})
}

// Whatever happens, no slot is lost or invented: with one gate that can wait the
// slots are its waiters, with two all calls between the buffer and the last gate.
func TestLiveness(t *testing.T) {
	for seed := range uint64(200) {
		synctest.Test(t, func(t *testing.T) {
			rng := rand.New(rand.NewPCG(seed, 3))
			cost := func(ctx context.Context, _ *interceptor.Admission) int64 { return ctx.Value(costKey{}).(int64) }
			newLimit := func() *concurrency.Layer {
				var opts []concurrency.Option
				if rng.IntN(2) == 0 {
					opts = append(opts, concurrency.WithCost(cost))
				}
				return must[*concurrency.Layer](t)(concurrency.New(concurrency.Config{
					Limit: 1 + rng.Int64N(6), Discipline: concurrency.Discipline(rng.IntN(3)), MaxWaiters: rng.IntN(2) * 5,
				}, opts...))
			}
			limits := []*concurrency.Layer{newLimit(), newLimit()}[:1+rng.IntN(2)]
			b := slots(t, 1+rng.IntN(8))
			specs := []interceptor.Spec{shed(t), b}
			for _, l := range limits {
				specs = append(specs, l)
			}
			s := calltest.Stack(t, specs...)
			running := 0 // Changed one at a time.
			var mu sync.Mutex
			add := func(n int) {
				mu.Lock()
				defer mu.Unlock()
				running += n
			}
			var wg sync.WaitGroup
			var ends []chan struct{}
			for range 150 {
				switch rng.IntN(6) {
				case 0, 1, 2:
					end := make(chan struct{})
					ends = append(ends, end)
					ctx := context.WithValue(interceptor.ContextWithPriority(context.Background(), rng.IntN(3)), costKey{}, 1+rng.Int64N(4))
					ctx, cancel := context.WithCancel(ctx)
					if rng.IntN(3) == 0 {
						time.AfterFunc(time.Duration(rng.IntN(30))*time.Millisecond, cancel)
					}
					wg.Go(func() {
						defer cancel()
						s.Wrap(calltest.Server(func(context.Context) error {
							add(1)
							defer add(-1)
							<-end
							return nil
						})).Invoke(ctx, calltest.Method, nil, nil)
					})
				case 3, 4:
					if len(ends) > 0 {
						i := rng.IntN(len(ends))
						close(ends[i])
						ends = slices.Delete(ends, i, i+1)
					}
				case 5:
					if rng.IntN(4) == 0 {
						if err := limits[rng.IntN(len(limits))].SetLimit(1 + rng.Int64N(6)); err != nil {
							t.Fatal(err)
						}
					} else if rng.IntN(4) == 0 {
						if err := b.Update(buffer.Config{Size: 1 + rng.IntN(8)}); err != nil {
							t.Fatal(err)
						}
					}
				}
				time.Sleep(time.Duration(rng.IntN(4)) * time.Millisecond)
				synctest.Wait()
				waiting := 0
				for _, l := range limits {
					waiting += l.Waiting()
					if l.Waiting() > 0 && l.InUse() == 0 {
						t.Fatalf("seed %d: %d wait, and nobody has a permit", seed, l.Waiting())
					}
				}
				mu.Lock()
				if inStack := s.InFlight(); b.Waiting() != waiting || b.Waiting() != inStack-running {
					t.Fatalf("seed %d: %d slots are taken, %d calls wait, and %d of %d run", seed, b.Waiting(), waiting, running, inStack)
				}
				mu.Unlock()
			}
			for _, end := range ends {
				close(end)
			}
			wg.Wait()
			for _, l := range limits {
				if l.Waiting() != 0 || l.InUse() != 0 {
					t.Errorf("seed %d: at rest %d calls wait and %d permits are in use", seed, l.Waiting(), l.InUse())
				}
			}
			checkRest(t, b)
		})
	}
}

type costKey struct{}

// who says how calls ended that come to a buffer of two slots while one runs.
func who(t *testing.T, b *buffer.Layer, priorities ...int) (sent []int, refusals map[int]*interceptor.Refusal) {
	t.Helper()
	s := calltest.Stack(t, shed(t), b, limit(t, 1))
	c := s.Wrap(calltest.Server(func(ctx context.Context) error {
		if i, ok := ctx.Value(name{}).(int); ok {
			sent = append(sent, i)
		}
		time.Sleep(time.Second)
		return nil
	}))
	ends := calltest.Begin(c, 1) // Runs.
	refusals = make(map[int]*interceptor.Refusal)
	var mu sync.Mutex
	var wg sync.WaitGroup
	for i, p := range priorities {
		wg.Go(func() {
			ctx := context.WithValue(interceptor.ContextWithPriority(context.Background(), p), name{}, i)
			if r, ok := interceptor.AsRefusal(c.Invoke(ctx, calltest.Method, nil, nil)); ok {
				mu.Lock()
				defer mu.Unlock()
				refusals[i] = r
			}
		})
		synctest.Wait()
		if n := b.Waiting(); n > 2 || s.InFlight() > 3 {
			t.Errorf("%d slots are taken, and %d calls are in flight, want at most 2 and 3", n, s.InFlight())
		}
	}
	wg.Wait()
	ends()
	checkRest(t, b)
	return sent, refusals
}

func TestPriorityDecidesWhoIsRefused(t *testing.T) {
	for _, tc := range []struct {
		name       string
		priorities []int
		sent       []int
	}{
		{"equals_by_arrival", []int{0, 0, 0}, []int{0, 1}},
		{"higher_evicts_the_latest_of_the_lowest", []int{0, 0, 1}, []int{2, 0}},
		{"lower_evicts_nobody", []int{1, 1, 0, 0}, []int{0, 1}},
		{"one_after_the_other", []int{0, 1, 2, 3}, []int{3, 2}},
		{"lowest_goes_first", []int{-1, 0, 5, -7}, []int{2, 1}},
		{"beyond_what_fits_a_word", []int{math.MinInt, math.MaxInt, math.MaxInt}, []int{1, 2}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				b := slots(t, 2)
				sent, refusals := who(t, b, tc.priorities...)
				if !slices.Equal(sent, tc.sent) {
					t.Errorf("sent %v, want %v", sent, tc.sent)
				}
				for i, r := range refusals {
					if r.Layer != "buffer" || r.Reason != interceptor.ReasonQueueFull || status.Code(r) != codes.Unavailable {
						t.Errorf("call %d was refused with %v, want QUEUE_FULL of the buffer", i, r)
					}
				}
			})
		})
	}
	t.Run("refusals_say_why", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			_, refusals := who(t, slots(t, 2), 0, 0, 0, 1)
			for i, want := range map[int]string{
				1: "belfry: buffer: QUEUE_FULL: evicted from the wait queue by a call that goes first",
				2: "belfry: buffer: QUEUE_FULL: wait queue is full (2 waiting)",
			} {
				if got := refusals[i]; got == nil || got.Error() != want {
					t.Errorf("call %d: %v, want %q", i, got, want)
				}
			}
		})
	})
	t.Run("evicted_from_a_gate_that_knows_nothing", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			b := slots(t, 1)
			c := calltest.Stack(t, b, newOpaque()).Wrap(calltest.Takes(time.Second))
			ends := calltest.Begin(c, 2)
			if err := c.Invoke(interceptor.ContextWithPriority(context.Background(), 1), calltest.Method, nil, nil); err != nil {
				t.Error(err)
			}
			calltest.Expect(t, ends(), calltest.OK(time.Second), calltest.Refused(0, interceptor.ReasonQueueFull))
			checkRest(t, b)
		})
	})
	t.Run("by_a_function", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			b := must[*buffer.Layer](t)(buffer.New(buffer.Config{Size: 2}, buffer.WithPriority(
				func(ctx context.Context, _ *interceptor.Admission) int { return -ctx.Value(name{}).(int) })))
			if sent, _ := who(t, b, 0, 0, 0, 0); !slices.Equal(sent, []int{0, 1}) {
				t.Errorf("sent %v, want the ones that a function of one's own prefers", sent)
			}
		})
	})
}

// In the recommended order high priority loses next to nothing in an overload, and
// low priority uses what is left: 3000 calls a second for 1000 that the server can do.
func TestPriorityInOverload(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := slots(t, 100)
		c := calltest.Stack(t, shed(t), b, limit(t, 10)).Wrap(calltest.Takes(10 * time.Millisecond))
		rng := rand.New(rand.NewPCG(1, 2))
		var mu sync.Mutex
		var calls, ok [2]int
		var wg sync.WaitGroup
		start := time.Now()
		for i := range 30_000 {
			p := 0
			if i%10 == 0 {
				p = 1
			}
			calls[p]++
			wg.Go(func() {
				ctx, cancel := context.WithTimeout(interceptor.ContextWithPriority(context.Background(), p), time.Second)
				defer cancel()
				if c.Invoke(ctx, calltest.Method, nil, nil) == nil {
					mu.Lock()
					defer mu.Unlock()
					ok[p]++
				}
			})
			time.Sleep(time.Duration(rng.ExpFloat64() * float64(time.Second/3000)))
		}
		elapsed := time.Since(start)
		wg.Wait()
		t.Logf("in %v high %d of %d, low %d of %d", elapsed, ok[1], calls[1], ok[0], calls[0])
		if lost := calls[1] - ok[1]; lost*100 >= calls[1] {
			t.Errorf("%d of %d calls of high priority failed, want less than 1 %%", lost, calls[1])
		}
		if left := int(elapsed.Seconds()*1000) - ok[1]; ok[0]*100 < left*98 {
			t.Errorf("%d calls of low priority succeeded, want at least 98 %% of the %d that are left", ok[0], left)
		}
		checkRest(t, b)
	})
}

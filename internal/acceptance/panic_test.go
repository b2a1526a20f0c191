// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package acceptance

import (
	"context"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/sync/semaphore"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/belfry-go/belfry/interceptor"
	"github.com/belfry-go/belfry/interceptor/adapt"
	"github.com/belfry-go/belfry/interceptor/buffer"
	"github.com/belfry-go/belfry/interceptor/concurrency"
	"github.com/belfry-go/belfry/interceptor/hedge"
	"github.com/belfry-go/belfry/interceptor/ratelimit"
	"github.com/belfry-go/belfry/interceptor/retry"
	"github.com/belfry-go/belfry/internal/test/calltest"
)

// panicky is an observer that panics in one of its methods, once.
type panicky struct {
	in    string
	fired atomic.Bool
}

func (o *panicky) panic(in string) {
	if in == o.in && !o.fired.Swap(true) {
		panic(in)
	}
}

func (o *panicky) Admitted(c interceptor.Observed) {
	if o.panic("Admitted"); c.Attempt > 0 {
		o.panic("Admitted further")
	}
}

func (o *panicky) InFlight(_ interceptor.Observed, delta int) {
	if o.panic("InFlight"); delta < 0 {
		o.panic("InFlight -1")
	}
}

func (o *panicky) Refused(interceptor.Observed, *interceptor.Refusal) { o.panic("Refused") }
func (o *panicky) Waited(_ interceptor.Observed, layer string, _ time.Duration) {
	o.panic("Waited at " + layer)
}
func (o *panicky) Attempt(interceptor.Observed)                        { o.panic("Attempt") }
func (o *panicky) Ended(interceptor.Observed, interceptor.ObservedEnd) { o.panic("Ended") }
func (o *panicky) AttemptEnded(interceptor.Observed, interceptor.ObservedEnd) {
	o.panic("AttemptEnded")
}
func (o *panicky) Further(interceptor.Observed, string, interceptor.FurtherAttempt) {
	o.panic("Further")
}
func (o *panicky) HedgeFired(interceptor.Observed, string) { o.panic("HedgeFired") }
func (o *panicky) HedgeWon(interceptor.Observed, string)   { o.panic("HedgeWon") }
func (o *panicky) Budget(string, float64)                  { o.panic("Budget") }
func (o *panicky) Limit(interceptor.LimitState)            { o.panic("Limit") }
func (o *panicky) Observes(*interceptor.Stack)             {}

// flaky fails one call of three, and takes its time for one of four.
type flaky struct{}

func (flaky) Invoke(ctx context.Context, _ string, _, _ any, _ ...grpc.CallOption) error {
	d := 5 * time.Millisecond
	if rand.IntN(4) == 0 {
		d = 100 * time.Millisecond
	}
	select {
	case <-time.After(d):
	case <-ctx.Done():
		return status.FromContextError(ctx.Err()).Err()
	}
	if rand.IntN(3) == 0 {
		return status.Error(codes.Unavailable, "")
	}
	return nil
}

func (s flaky) NewStream(ctx context.Context, _ *grpc.StreamDesc, _ string, _ ...grpc.CallOption) (grpc.ClientStream, error) {
	if err := s.Invoke(ctx, "", nil, nil); err != nil {
		return nil, err
	}
	return over{}, nil
}

// A panic of the observer is the caller's to see, who may recover: nothing that the
// call has taken may be lost by it.
func TestPanic(t *testing.T) {
	for _, in := range []string{
		"Admitted", "Admitted further", "InFlight", "InFlight -1", "Refused", "Waited at concurrency", "Waited at semaphore", "Attempt", "Ended",
		"Further", "HedgeFired", "HedgeWon", "Budget", "Limit",
	} {
		t.Run("of_the_observer_in_"+in, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				o := &panicky{in: in}
				limit, err := concurrency.New(concurrency.Config{Limit: 4})
				if err != nil {
					t.Fatal(err)
				}
				sem := semaphore.NewWeighted(3)
				stack := calltest.Stack(t, interceptor.Observe(o), hedge.Config{AllMethods: true, Delay: 20 * time.Millisecond, MaxExtraLoad: 0.5},
					retry.Config{AllMethods: true}, buffer.Config{Size: 5}, limit, adapt.FromSemaphore("semaphore", sem),
					ratelimit.Config{Limit: 100, KeyBy: interceptor.KeyBy{Method: true}})
				conn := stack.Wrap(flaky{})
				var wg sync.WaitGroup
				// Whether a hedge wins is chance: of 100 calls none does in one run of 100, of
				// 10,000 in one of 1e200.
				for i := 0; i < 100 || !o.fired.Load() && i < 10_000; i++ {
					wg.Go(func() {
						defer func() { recover() }()
						if i%4 > 0 {
							conn.Invoke(context.Background(), "/s/m", new(wrapperspb.StringValue), new(wrapperspb.StringValue))
							return
						}
						s, err := conn.NewStream(context.Background(), &grpc.StreamDesc{ServerStreams: true}, "/s/stream")
						for err == nil {
							err = s.RecvMsg(new(wrapperspb.StringValue))
						}
					})
					time.Sleep(7 * time.Millisecond)
				}
				wg.Wait()
				synctest.Wait() // For the losers of hedges.
				if !o.fired.Load() {
					t.Fatal("the observer was not asked")
				}
				if n := limit.InUse(); n != 0 {
					t.Errorf("%d permits in use after all calls, want none", n)
				}
				if !sem.TryAcquire(3) {
					t.Error("a permit of the semaphore is in use after all calls")
				}
				ctx, cancel := context.WithTimeout(context.Background(), time.Second)
				defer cancel()
				if err := stack.Drain(ctx); err != nil {
					t.Error(err)
				}
			})
		})
	}
	t.Run("of_a_hedge_beside_an_attempt_on_its_way", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			ends := &outcomes{ended: make(chan interceptor.Outcome, 1)}
			conn := calltest.Stack(t, interceptor.Observe(&panicky{in: "HedgeFired"}), ends,
				hedge.Config{AllMethods: true, Delay: time.Millisecond}).Wrap(calltest.Takes(time.Second))
			func() {
				defer func() { recover() }()
				conn.Invoke(t.Context(), "/s/m", new(wrapperspb.StringValue), new(wrapperspb.StringValue))
			}()
			if o := <-ends.ended; !o.Sent() {
				t.Errorf("the call is %v to a gate outside, want one that was sent", o)
			}
			synctest.Wait()
		})
	})
	t.Run("of_a_priority_leaves_the_key_droppable", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			panics := true
			rate, err := ratelimit.New(ratelimit.Config{Limit: 1, MaxKeys: 1, KeyBy: interceptor.KeyBy{Metadata: "key"}},
				ratelimit.WithPriority(func(context.Context, *interceptor.Admission) int {
					if panics {
						panic("priority")
					}
					return 0
				}))
			if err != nil {
				t.Fatal(err)
			}
			conn := calltest.Stack(t, rate).Wrap(calltest.Takes(0))
			call := func(key string, opts ...grpc.CallOption) error {
				defer func() { recover() }()
				return conn.Invoke(metadata.AppendToOutgoingContext(context.Background(), "key", key), "/s/m", nil, nil, opts...)
			}
			call("a")
			call("a") // Would wait.
			panics = false
			time.Sleep(time.Minute)
			call("b")
			if r, ok := interceptor.AsRefusal(call("b", interceptor.WithWait(interceptor.None))); !ok || r.Key != "b" {
				t.Errorf("got %v, want a refusal for key b, which takes the place of key a", r)
			}
		})
	})
}

// outcomes is a gate that is told how calls have ended.
type outcomes struct {
	interceptor.GateOnly
	ended chan interceptor.Outcome
}

func (o *outcomes) NewLayer() (interceptor.Layer, error) { return o, nil }
func (o *outcomes) Release(_ int64, e interceptor.End)   { o.ended <- e.Outcome }

func (o *outcomes) WrapGate(inner interceptor.Gate) interceptor.Gate {
	return interceptor.GateFunc(func(ctx context.Context, a *interceptor.Admission, w interceptor.Wait) error {
		a.Hold(o, 0)
		return inner.Admit(ctx, a, w)
	})
}

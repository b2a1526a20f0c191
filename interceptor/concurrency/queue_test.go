// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package concurrency

import (
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/belfry-go/belfry/interceptor"
	"github.com/belfry-go/belfry/internal/waitlist"
)

func waiterOf(cost int64) *waiter { return newWaiter(cost, waitlist.Rank{}, 0, nil) }

// passes counts how often a slot is passed.
type passes int

func (n *passes) Pass() { *n++ }

// Tower's multi_waiters: a permit that was given to a waiter which has gone is
// given to the next.
func TestPermitsWaiterGone(t *testing.T) {
	p := &permits{}
	p.setLimit(1)
	if _, ok := p.take(1, 0); !ok {
		t.Fatal("no permit at rest")
	}
	second, third := waiterOf(1), waiterOf(1)
	p.enqueue(second)
	p.enqueue(third)
	p.release(1)
	if len(second.done) != 1 || len(third.done) != 0 {
		t.Fatalf("after a release %d, %d of the waiters have ended, want 1, 0", len(second.done), len(third.done))
	}
	if p.abandon(second) || second.why != admitted {
		t.Fatal("the second was taken from the queue, want: admitted already")
	}
	p.release(second.cost)
	if len(third.done) != 1 || third.why != admitted {
		t.Error("the permit was not handed on to the third")
	}
}

// passFunc is a slot that calls a function.
type passFunc func()

func (f passFunc) Pass() { f() }

// A slot is passed before anybody can see that the permits are taken, and while none
// can be taken without the lock. Otherwise a call could be told that there is no
// permit, and then find the slot of the one that has it still taken.
func TestPermitsPassSlotFirst(t *testing.T) {
	p := &permits{}
	p.setLimit(2)
	passed := 0
	slot := passFunc(func() {
		passed++
		if p.state.Load()&lockedBit == 0 || p.inUse() != 1 {
			t.Errorf("the slot was passed in state %#x, want one permit in use and the lock", p.state.Load())
		}
	})
	p.take(1, 0)
	if !p.takeLocked(1, 0, waitlist.Rank{}, slot) {
		t.Fatal("no permit")
	}
	w := newWaiter(1, waitlist.Rank{}, 0, slot)
	p.enqueue(w)
	p.release(1)
	if passed != 2 || w.why != admitted || len(w.done) != 1 {
		t.Errorf("slots were passed %d times, want 2", passed)
	}
}

// A queue of random calls against a model that is a plain sum: what is in use is
// what was admitted and not released, never more than the limit but for a call
// that runs alone, and nobody waits who could run.
func TestPermitsRandomHistories(t *testing.T) {
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	rng := rand.New(rand.NewPCG(seed, 0))
	for range 200 {
		synctest.Test(t, func(t *testing.T) {
			p := &permits{}
			p.configure(1+rng.Int64N(8), Discipline(rng.IntN(3)), rng.IntN(6), time.Millisecond, 5*time.Millisecond)
			var waiting []*waiter
			var running []int64
			settle := func() {
				still := waiting[:0]
				for _, w := range waiting {
					if len(w.done) == 0 {
						still = append(still, w)
					} else if w.why == admitted {
						running = append(running, w.cost)
					}
					if passed := *w.slot.(*passes) == 1; passed != (len(w.done) == 1 && w.why == admitted) {
						t.Fatalf("the slot of a call was passed %d times, and it has ended as %d: %v", *w.slot.(*passes), w.why, len(w.done) == 1)
					}
				}
				waiting = still
			}
			for step := range 300 {
				switch rng.IntN(6) {
				case 0:
					cost, rank, slot := 1+rng.Int64N(4), waitlist.Rank{Priority: rng.IntN(3)}, new(passes)
					first := p.firstLocked()
					want := p.fits(cost, 0, p.inUse()) && (first == nil || rank.Before(first.rank))
					got := p.takeLocked(cost, 0, rank, slot)
					if got != want || (*slot == 1) != got {
						t.Fatalf("step %d: permits were taken: %v, want %v; the slot was passed %d times", step, got, want, *slot)
					}
					if got {
						running = append(running, cost)
					}
				case 1, 2:
					w := newWaiter(1+rng.Int64N(4), waitlist.Rank{Priority: rng.IntN(3)}, interceptor.Now(), new(passes))
					waiting = append(waiting, w)
					p.enqueue(w)
				case 3:
					if len(running) > 0 {
						i := rng.IntN(len(running))
						cost := running[i]
						running = append(running[:i], running[i+1:]...)
						p.release(cost)
					}
				case 4:
					if len(waiting) > 0 {
						i := rng.IntN(len(waiting))
						if !p.abandon(waiting[i]) {
							t.Fatalf("step %d: a waiter could not leave the queue", step)
						}
						waiting = append(waiting[:i], waiting[i+1:]...)
					}
				default:
					if rng.IntN(4) == 0 {
						p.setLimit(rng.Int64N(9))
					} else if rng.IntN(4) == 0 {
						p.configure(1+rng.Int64N(8), Discipline(rng.IntN(3)), rng.IntN(6), time.Millisecond, 5*time.Millisecond)
					}
					time.Sleep(time.Duration(rng.IntN(3)) * time.Millisecond)
				}
				settle()
				var sum int64
				for _, cost := range running {
					sum += cost
				}
				limit, inUse, n := p.read()
				if inUse != sum || n != len(waiting) {
					t.Fatalf("step %d: %d in use and %d waiting, want %d and %d", step, inUse, n, sum, len(waiting))
				}
				if bit := p.state.Load()&lockedBit != 0; bit != (n > 0) {
					t.Fatalf("step %d: the state says that the lock is needed: %v, and %d do", step, bit, n)
				}
				if n > 0 && p.fits(p.firstLocked().cost, 0, inUse) {
					t.Fatalf("step %d: the first waiter, of cost %d, could run: %d of %d in use", step, p.firstLocked().cost, inUse, limit)
				}
			}
		})
	}
}

func TestPermitsFullQueueEvictsNobodyInVain(t *testing.T) {
	for _, tc := range []struct {
		discipline Discipline
		priority   int
	}{{FIFO, 1}, {LIFO, 0}} {
		p := &permits{}
		p.configure(3, tc.discipline, 1, 0, 0)
		p.take(1, 0)
		heavy, light := waiterOf(3), newWaiter(1, waitlist.Rank{Priority: tc.priority}, 0, nil)
		p.enqueue(heavy)
		p.enqueue(light)
		if len(light.done) != 1 || light.why != admitted {
			t.Errorf("%v: the call that goes first and fits was not admitted", tc.discipline)
		}
		if len(heavy.done) != 0 {
			t.Errorf("%v: the only one that waits was refused (%d), and as many may", tc.discipline, heavy.why)
		}
	}
}

// The extra attempt of a hedge goes first among those that wait, but no call is
// refused for its sake.
func TestPermitsExpendableEvictsNobody(t *testing.T) {
	p := &permits{}
	p.configure(1, FIFO, 1, 0, 0)
	p.take(1, 0)
	first, extra := waiterOf(1), newWaiter(1, waitlist.Rank{Further: true}, 0, nil)
	extra.expendable = true
	p.enqueue(first)
	p.enqueue(extra)
	if len(first.done) != 0 || len(extra.done) != 1 || extra.why != queueFull {
		t.Errorf("the queue was full: the first attempt ended %d times, the extra one with %d; want it refused", len(first.done), extra.why)
	}
}

// RFC 8289, 5.4: the law sets refusals interval/sqrt(count) apart.
func TestCoDelsControlLaw(t *testing.T) {
	const ms = interceptor.Instant(time.Millisecond)
	c := codel{target: 5 * time.Millisecond, interval: 100 * time.Millisecond}
	var drops []interceptor.Instant
	for now := ms; now <= 400*ms; now += ms {
		if c.drop(now, 6*time.Millisecond, 2) {
			drops = append(drops, now/ms)
		}
	}
	// Standing from 1ms, so 101ms; then +100, +70.7, +57.7, +50.
	want := []interceptor.Instant{101, 201, 272, 330, 380}
	if len(drops) != len(want) {
		t.Fatalf("refused at %v ms, want %v", drops, want)
	}
	for i := range want {
		if drops[i] != want[i] {
			t.Errorf("refused at %v ms, want %v", drops, want)
			break
		}
	}
	if c.drop(401*ms, 4*time.Millisecond, 2) || c.dropping {
		t.Error("refusing goes on below the target")
	}
	c.above = ms // It has been standing since before.
	if c.drop(402*ms, time.Second, 1) || c.above != 0 {
		t.Error("a call was refused that only one other waits behind")
	}
}

// Calls with and without the lock, at once: if one of them handed a permit to nobody,
// a waiter would wait for ever.
func TestPermitsWithAndWithoutLock(t *testing.T) {
	const limit, most = 3, 2
	p := &permits{}
	p.setLimit(limit)
	var running atomic.Int64
	var wg sync.WaitGroup
	for i := range 8 {
		wg.Go(func() {
			for n := range 20_000 {
				cost := int64(1 + (n+i)%most)
				if _, ok := p.take(cost, 0); !ok {
					w := waiterOf(cost)
					p.enqueue(w)
					if n%5 == 0 && p.abandon(w) {
						continue
					}
					if n%5 != 0 {
						<-w.done
					}
				}
				if got := running.Add(cost); got > limit {
					t.Errorf("%d permits in use, want at most %d", got, limit)
				}
				running.Add(-cost)
				p.release(cost)
			}
		})
	}
	wg.Wait()
	if _, inUse, waiting := p.read(); inUse != 0 || waiting != 0 || p.state.Load() != 0 {
		t.Errorf("at rest %d permits are in use and %d calls wait, state %#x, want none", inUse, waiting, p.state.Load())
	}
}

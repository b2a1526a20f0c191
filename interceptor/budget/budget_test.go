// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package budget_test

import (
	"context"
	"fmt"
	"math"
	"math/rand/v2"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/belfry-go/belfry/interceptor"
	"github.com/belfry-go/belfry/interceptor/adapt"
	"github.com/belfry-go/belfry/interceptor/budget"
	"github.com/belfry-go/belfry/internal/test/leaktest"
)

func TestMain(m *testing.M) { leaktest.Main(m) }

func mustNew(t testing.TB, c budget.Config) *budget.Budget {
	t.Helper()
	b, err := budget.New(c)
	if err != nil {
		t.Fatalf("New(%+v): %v", c, err)
	}
	return b
}

// withdrawals is how often b lets itself be withdrawn from now.
func withdrawals(b *budget.Budget) (n int) {
	for b.Withdraw(interceptor.Now()) {
		n++
	}
	return n
}

func deposits(b *budget.Budget, n int) {
	for range n {
		b.Deposit(interceptor.Now())
	}
}

// The tests that Tower's own budget has, by their names there.

func TestTowerTpsEmpty(t *testing.T) {
	b := mustNew(t, budget.Config{TTL: time.Second, MinPerSecond: budget.None, Ratio: 1})
	if b.Withdraw(interceptor.Now()) {
		t.Error("Withdraw of an empty budget = true, want false")
	}
}

func TestTowerTpsLeaky(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := mustNew(t, budget.Config{TTL: time.Second, MinPerSecond: budget.None, Ratio: 1})
		deposits(b, 1)
		time.Sleep(3 * time.Second)
		if b.Withdraw(interceptor.Now()) {
			t.Error("Withdraw 3s after the deposit, with a ttl of 1s = true, want false")
		}
	})
}

func TestTowerTpsSlots(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := mustNew(t, budget.Config{TTL: time.Second, MinPerSecond: budget.None, Ratio: 0.5})
		deposits(b, 2)
		time.Sleep(901 * time.Millisecond)
		if !b.Withdraw(interceptor.Now()) {
			t.Error("Withdraw 901ms after two deposits of a half = false, want true")
		}
		time.Sleep(2001 * time.Millisecond)
		deposits(b, 1)
		time.Sleep(301 * time.Millisecond)
		deposits(b, 1)
		time.Sleep(801 * time.Millisecond)
		deposits(b, 1)
		if got := b.Balance(); got != 1 {
			t.Errorf("balance = %v, want 1: the first deposit is forgotten, the others count", got)
		}
		if !b.Withdraw(interceptor.Now()) {
			t.Error("Withdraw of the second and the third deposit = false, want true")
		}
	})
}

func TestTowerTpsReserve(t *testing.T) {
	b := mustNew(t, budget.Config{TTL: time.Second, MinPerSecond: 5, Ratio: 1})
	if got := withdrawals(b); got != 5 {
		t.Errorf("%d withdrawals of a reserve of 5, want 5", got)
	}
}

func TestDefault(t *testing.T) {
	b := mustNew(t, budget.Config{})
	if got := withdrawals(b); got != 100 {
		t.Errorf("%d withdrawals of the default reserve, want 10/s for 10s = 100", got)
	}
	deposits(b, 100)
	if got := withdrawals(b); got != 20 {
		t.Errorf("%d withdrawals for 100 calls, want 20", got)
	}
}

// What Tower has wrong.

func TestRatioIsExact(t *testing.T) {
	for _, tc := range []struct {
		ratio float64
		calls int
		want  int
	}{
		{0.1, 100, 10}, {0.2, 100, 20}, {0.3, 100, 30}, {0.4, 100, 40}, {0.6, 100, 60}, {0.75, 100, 75}, {0.9, 100, 90},
		{1, 100, 100}, {1.5, 100, 150}, {2.5, 3, 7}, {1000, 3, 3000}, {0.000001, 1_000_000, 1}, {0.001, 999, 0}, {0.05, 19, 0}, {0.05, 20, 1},
		{budget.None, 100, 0},
	} {
		b := mustNew(t, budget.Config{TTL: time.Minute, MinPerSecond: budget.None, Ratio: tc.ratio})
		now := interceptor.Now()
		for range tc.calls {
			b.Deposit(now)
		}
		got := 0
		for b.Withdraw(now) {
			got++
		}
		if got != tc.want {
			t.Errorf("%d calls at a ratio of %v allow %d attempts, want %d", tc.calls, tc.ratio, got, tc.want)
		}
	}
}

func TestMinPerSecondIsExact(t *testing.T) {
	for _, ttl := range []time.Duration{time.Second, 2 * time.Second, 10 * time.Second} {
		for _, per := range []float64{0.5, 1, 10} {
			synctest.Test(t, func(t *testing.T) {
				b := mustNew(t, budget.Config{TTL: ttl, MinPerSecond: per, Ratio: budget.None})
				got := 0
				for range 10_000 { // Every millisecond for 10 s.
					got += withdrawals(b)
					time.Sleep(time.Millisecond)
				}
				want := int(10 * per)
				if reserve := per * ttl.Seconds(); reserve < 1 { // 0.5/s at a ttl of 1 s is never a whole attempt.
					want = 0
				}
				if got != want {
					t.Errorf("ttl %v: %d withdrawals in 10s at %v/s, want %d", ttl, got, per, want)
				}
			})
		}
	}
}

func TestTTL(t *testing.T) {
	for _, ttl := range []time.Duration{time.Second, 10 * time.Second, time.Minute} {
		synctest.Test(t, func(t *testing.T) {
			b := mustNew(t, budget.Config{TTL: ttl, MinPerSecond: budget.None, Ratio: 1})
			start := time.Now()
			time.Sleep(ttl / 300) // Somewhere in a period.
			for range 5 {
				deposits(b, 1)
				time.Sleep(ttl / 50) // Touched regularly, which Tower's took for time passing.
			}
			born := time.Since(start) - 5*ttl/50
			for time.Since(start)-born < ttl {
				if !b.Withdraw(interceptor.Now()) {
					t.Fatalf("ttl %v: the deposit is forgotten at the age of %v", ttl, time.Since(start)-born)
				}
				b.Refund(interceptor.Now())
				time.Sleep(ttl / 1000)
			}
			time.Sleep(ttl/100 + 4*ttl/50)
			if b.Withdraw(interceptor.Now()) {
				t.Errorf("ttl %v: the deposits still count at an age of more than 1.01 ttl", ttl)
			}
		})
	}
}

// The bound of the documentation, checked against a list of all that happened.
// It holds for every run, so there is no false failure.
func TestBoundHoldsInEveryTTL(t *testing.T) {
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	rng := rand.New(rand.NewPCG(seed, 0))
	synctest.Test(t, func(t *testing.T) {
		const ttl = time.Second
		b := mustNew(t, budget.Config{TTL: ttl, MinPerSecond: 3, Ratio: 0.3})
		type event struct {
			at time.Time
			n  float64
		}
		var events []event
		refused := 0
		for range 20_000 {
			time.Sleep(time.Duration(rng.ExpFloat64() * float64(4*time.Millisecond)))
			now := time.Now()
			// Twice the hundredth: one for the age, one for the period it began in.
			sum := func(age time.Duration, counts func(n float64) bool) (s float64) {
				for i := len(events) - 1; i >= 0 && now.Sub(events[i].at) < age; i-- {
					if counts(events[i].n) {
						s += events[i].n
					}
				}
				return s
			}
			if rng.IntN(3) > 0 {
				deposits(b, 1)
				events = append(events, event{now, 0.3})
				continue
			}
			in := func(n float64) bool { return n > 0 }
			out := func(n float64) bool { return n < 0 }
			most := 3 + sum(ttl+ttl/50, in) + sum(ttl, out)
			least := 3 + sum(ttl, in) + sum(ttl+ttl/50, out)
			switch b.Withdraw(interceptor.Now()) {
			case true:
				if most < 1-1e-9 {
					t.Fatalf("an attempt was allowed with a balance of at most %v", most)
				}
				events = append(events, event{now, -1})
			case false:
				refused++
				if least >= 1+1e-9 {
					t.Fatalf("an attempt was refused with a balance of at least %v", least)
				}
			}
		}
		if refused < 100 {
			t.Errorf("only %d attempts were refused: the test tests little", refused)
		}
	})
}

func TestRefundAndUndo(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := mustNew(t, budget.Config{TTL: time.Second, MinPerSecond: 1, Ratio: 0.5})
		at := interceptor.Now()
		b.Deposit(at)
		b.Withdraw(at)
		time.Sleep(500 * time.Millisecond)
		b.Refund(at)
		b.Undo(at)
		if got := b.Balance(); got != 1 {
			t.Errorf("balance = %v after a refund and an undo, want the reserve of 1", got)
		}
		b.Deposit(interceptor.Now())
		time.Sleep(600 * time.Millisecond) // The first period is forgotten.
		b.Refund(at)
		b.Undo(at)
		if got := b.Balance(); got != 1.5 {
			t.Errorf("balance = %v after a refund of what is forgotten, want 1.5", got)
		}
	})
}

func TestConcurrentUse(t *testing.T) {
	b := mustNew(t, budget.Config{TTL: time.Minute, MinPerSecond: 10, Ratio: 0.5})
	const workers, each = 8, 5000
	var spent atomic.Int64
	var wg sync.WaitGroup
	for range workers {
		wg.Go(func() {
			for range each {
				now := interceptor.Now()
				b.Deposit(now)
				if b.Withdraw(now) {
					spent.Add(1)
				}
			}
		})
	}
	wg.Wait()
	const paid = 600 + workers*each/2
	if got := float64(spent.Load()) + b.Balance(); got != paid {
		t.Errorf("%d spent and a balance of %v, want %d together", spent.Load(), b.Balance(), paid)
	}
}

func TestTTLForgetsEverything(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := mustNew(t, budget.Config{TTL: time.Second, MinPerSecond: 7, Ratio: 0.3})
		var wg sync.WaitGroup
		for i := range 8 {
			wg.Go(func() {
				for range 2000 {
					now := interceptor.Now()
					b.Deposit(now)
					b.Withdraw(now)
					if i%2 == 0 {
						time.Sleep(time.Millisecond)
					}
				}
			})
		}
		wg.Wait()
		time.Sleep(1011 * time.Millisecond)
		if got := withdrawals(b); got != 7 {
			t.Errorf("%d withdrawals a ttl after everything, want the reserve of 7", got)
		}
	})
}

func TestUpdateKeepsBalance(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := mustNew(t, budget.Config{TTL: time.Second, MinPerSecond: 10, Ratio: 1})
		deposits(b, 5)
		for range 12 {
			b.Withdraw(interceptor.Now())
		}
		if err := b.Update(budget.Config{TTL: time.Second, MinPerSecond: 20, Ratio: 0.5}); err != nil {
			t.Fatal(err)
		}
		if got := b.Balance(); got != 13 {
			t.Errorf("balance = %v after 10 more in reserve, want 3+10", got)
		}
		time.Sleep(500 * time.Millisecond)
		if err := b.Update(budget.Config{TTL: 2 * time.Second, MinPerSecond: 10, Ratio: 0.5}); err != nil {
			t.Fatal(err)
		}
		if got := b.Balance(); got != 13 {
			t.Errorf("balance = %v with another ttl and the same reserve, want 13", got)
		}
		time.Sleep(time.Second) // Past the old ttl, within the new one.
		deposits(b, 2)
		if got := b.Balance(); got != 14 {
			t.Errorf("balance = %v, want 14: the past counts by the new ttl, a call as a half", got)
		}
		time.Sleep(600 * time.Millisecond)
		deposits(b, 0)
		if got := withdrawals(b); got != 21 {
			t.Errorf("%d withdrawals when the past is forgotten, want 20+1", got)
		}
	})
}

func TestUndoAfterUpdate(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := mustNew(t, budget.Config{TTL: time.Minute, MinPerSecond: 1, Ratio: 0.1})
		var at []interceptor.Instant
		for _, ratio := range []float64{1, 0.5, budget.None, 2, 2, 0.3} {
			now := interceptor.Now()
			for range 10 {
				b.Deposit(now)
				at = append(at, now)
			}
			time.Sleep(time.Second)
			if err := b.Update(budget.Config{TTL: time.Minute, MinPerSecond: 1, Ratio: ratio}); err != nil {
				t.Fatal(err)
			}
			time.Sleep(time.Second)
		}
		if got := b.Balance(); got != 60+1+10+5+0+20+20 {
			t.Errorf("balance = %v with all calls paid in, want 116", got)
		}
		for _, at := range at {
			b.Undo(at)
		}
		if got := b.Balance(); got != 60 {
			t.Errorf("balance = %v after none of the calls was sent, want the reserve of 60", got)
		}
	})
}

func TestInvalidConfigChangesNothing(t *testing.T) {
	b := mustNew(t, budget.Config{})
	for field, configs := range map[string][]budget.Config{
		"TTL":          {{TTL: time.Millisecond}, {TTL: 61 * time.Second}, {TTL: -time.Second}},
		"Ratio":        {{Ratio: -0.5}, {Ratio: 1001}, {Ratio: math.NaN()}, {Ratio: math.Inf(1)}, {Ratio: 1e-9}},
		"MinPerSecond": {{MinPerSecond: -2}, {MinPerSecond: math.Inf(-1)}, {MinPerSecond: math.NaN()}, {MinPerSecond: 2e6}},
	} {
		for _, c := range configs {
			if _, err := budget.New(c); err == nil || !strings.HasPrefix(err.Error(), "budget: "+field+" is ") {
				t.Errorf("New(%+v) = %v, want an error that names %s", c, err, field)
			}
			if err := b.Update(c); err == nil {
				t.Errorf("Update(%+v) = nil, want an error", c)
			}
		}
	}
	if got := b.Balance(); got != 100 {
		t.Errorf("balance = %v after bad updates, want 100 as before", got)
	}
}

// spender is the gate of a layer that spends a budget.
type spender struct {
	interceptor.GateOnly
	b *budget.Budget
}

func (s *spender) NewLayer() (interceptor.Layer, error) { return s, nil }

func (s *spender) WrapGate(inner interceptor.Gate) interceptor.Gate {
	return interceptor.GateFunc(func(ctx context.Context, c *interceptor.Admission, w interceptor.Wait) error {
		s.b.Count(c, "spender")
		return inner.Admit(ctx, c, w)
	})
}

func TestCount(t *testing.T) {
	b := mustNew(t, budget.Config{Ratio: 1, MinPerSecond: budget.None})
	var refuse error
	gate := adapt.FromAllow("gate", interceptor.ReasonShed, func(context.Context) (func(interceptor.Outcome, error), error) { return nil, refuse })
	s, err := interceptor.NewStack(&spender{b: b}, &spender{b: b}, gate)
	if err != nil {
		t.Fatal(err)
	}
	var answer error
	call := func() error {
		return s.UnaryClientInterceptor()(context.Background(), "/s/m", nil, nil, nil,
			func(context.Context, string, any, any, *grpc.ClientConn, ...grpc.CallOption) error { return answer })
	}
	for _, tc := range []struct {
		what           string
		refuse, answer error
		want           float64
	}{
		{"a call that succeeds", nil, nil, 1},
		{"a call that fails", nil, status.Error(codes.Unavailable, ""), 2},
		{"a call that was refused", fmt.Errorf("full"), nil, 2},
	} {
		refuse, answer = tc.refuse, tc.answer
		if err := call(); (err != nil) != (refuse != nil || answer != nil) {
			t.Fatalf("%s: got %v", tc.what, err)
		}
		if got := b.Balance(); got != tc.want {
			t.Errorf("balance after %s = %v, want %v", tc.what, got, tc.want)
		}
	}
	if n := testing.AllocsPerRun(100, func() { call() }); n > 4 { // Of FromAllow's refusal.
		t.Errorf("%v allocations for a call that is refused, want at most those of the refusal", n)
	}
}

func TestAllocations(t *testing.T) {
	b := mustNew(t, budget.Config{})
	if n := testing.AllocsPerRun(1000, func() {
		now := interceptor.Now()
		b.Deposit(now)
		b.Withdraw(now)
		b.Refund(now)
		b.Balance()
	}); n != 0 {
		t.Errorf("%v allocations, want none", n)
	}
}

func BenchmarkDeposit(b *testing.B) {
	bud := mustNew(b, budget.Config{})
	now := interceptor.Now() // As Call.Now, read once for all layers.
	b.ReportAllocs()
	for b.Loop() {
		bud.Deposit(now)
	}
}

func BenchmarkDepositParallel(b *testing.B) {
	bud := mustNew(b, budget.Config{})
	b.ReportAllocs()
	b.RunParallel(func(pb *testing.PB) {
		for pb.Next() {
			bud.Deposit(interceptor.Now())
		}
	})
}

func BenchmarkWithdrawGrantedAndRefunded(b *testing.B) {
	bud := mustNew(b, budget.Config{})
	now := interceptor.Now()
	b.ReportAllocs()
	for b.Loop() {
		bud.Withdraw(now)
		bud.Refund(now)
	}
}

func BenchmarkWithdrawRefused(b *testing.B) {
	bud := mustNew(b, budget.Config{MinPerSecond: budget.None})
	now := interceptor.Now()
	b.ReportAllocs()
	for b.Loop() {
		bud.Withdraw(now)
	}
}

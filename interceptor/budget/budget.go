// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package budget

import (
	"math"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/belfry-go/belfry/interceptor"
	"github.com/belfry-go/belfry/internal/check"
)

const (
	// DefaultTTL, DefaultRatio and DefaultMinPerSecond are Finagle's and Tower's.
	DefaultTTL          = 10 * time.Second
	DefaultRatio        = 0.2
	DefaultMinPerSecond = 10

	// None as a Ratio or a MinPerSecond means none, because zero is the default.
	None = check.None
)

// Config bounds the further attempts. The zero value is the default: two for ten calls,
// plus ten a second.
type Config struct {
	// TTL is how long a call and a paid attempt are remembered. From 1 s to 60 s; zero
	// means 10 s.
	TTL time.Duration
	// Ratio is how many further attempts one call pays for: 0.2 is one for five calls,
	// 1.5 three for two. From 0.000001 to 1,000, in steps of 0.000001; zero means 0.2,
	// [None] means that calls pay for nothing.
	Ratio float64
	// MinPerSecond is how many further attempts there may be in a second whatever the
	// calls pay for, so that a client with few calls can repeat some of them. Those of a
	// whole TTL may come at once. Up to 1,000,000; zero means 10, [None] means no such
	// reserve.
	MinPerSecond float64
	// MaxConcurrent is how many further attempts there may be at once, those that back off
	// or wait included. It bounds what they hold while servers are slow and the rate does
	// not: Envoy's max_retries. From 1 to 1,000,000; zero means no such bound, because a
	// good one depends on how many calls are in flight.
	MaxConcurrent int
}

// settings is a Config in millionths of an attempt.
type settings struct {
	given   Config
	ttl     time.Duration
	deposit int64 // For each call.
	reserve int64
}

// one is what a further attempt costs. Balances are counted in millionths of an
// attempt, so that every Ratio with up to six decimals is exact, and adds up
// exactly.
const one = 1_000_000

func (c Config) settings() (settings, error) {
	s := settings{given: c}
	errs := check.Of("budget")
	check.Default(errs, "TTL", &c.TTL, check.From(time.Second, time.Minute), DefaultTTL)
	check.DefaultOrNone(errs, "Ratio", &c.Ratio, check.From(1.0/one, 1000), DefaultRatio, "none")
	check.DefaultOrNone(errs, "MinPerSecond", &c.MinPerSecond, check.From(1.0/one, 1e6), DefaultMinPerSecond, "none")
	check.Zero(errs, "MaxConcurrent", c.MaxConcurrent, check.From(1, 1_000_000), "no bound")
	s.ttl = c.TTL
	s.deposit = units(c.Ratio)
	s.reserve = int64(math.Round(float64(units(c.MinPerSecond)) * c.TTL.Seconds()))
	return s, errs.Err()
}

func units(v float64) int64 {
	if v == None {
		return 0
	}
	return int64(math.Round(v * one))
}

const (
	// periods is the number of slots in a TTL: an amount is forgotten when it is older
	// than one TTL, at most by a hundredth of it.
	periods = 100
	slots   = periods + 1

	// keep is longer than any amount is remembered.
	keep = 2 * time.Minute
)

// A Budget pays for the further attempts of all layers and stacks that share it. Its
// methods may be called concurrently. All but Update are lock-free and allocate
// nothing.
//
// At any moment its balance is the reserve, plus Ratio for each call of the last TTL,
// minus one for each further attempt of the last TTL. It is kept in a ring of periods.
// When a new period starts, the first call drops the oldest.
type Budget struct {
	deposit atomic.Int64              // For each call.
	before  atomic.Pointer[[]deposit] // Earlier deposits, in order of time; immutable.
	w       atomic.Pointer[window]
	most    atomic.Int64 // MaxConcurrent.
	running atomic.Int64 // Further attempts.

	// mu serialises Update. Nothing is locked under it.
	mu sync.Mutex
	s  settings // The current settings; guarded by mu.
}

// deposit is what each call paid in before a moment.
type deposit struct {
	until  interceptor.Instant
	amount int64
}

// window is the amounts of the last TTL. A window is replaced when the TTL
// changes.
type window struct {
	period  interceptor.Instant // How long a period is.
	balance atomic.Int64        // The reserve, and the sum of all slots.
	turned  atomic.Int64        // The last period that all slots were made ready for.
	slots   [slots]slot
}

// slot holds what was paid in and out in one period: that of its epoch.
type slot struct {
	epoch  atomic.Int64
	amount atomic.Int64
}

// New returns a budget with its whole reserve.
func New(c Config) (*Budget, error) {
	s, err := c.settings()
	if err != nil {
		return nil, err
	}
	b := &Budget{s: s}
	b.deposit.Store(s.deposit)
	b.most.Store(int64(c.MaxConcurrent))
	b.w.Store(newWindow(s))
	return b, nil
}

func newWindow(s settings) *window {
	w := &window{period: interceptor.Instant(s.ttl / periods)}
	w.balance.Store(s.reserve)
	return w
}

// Update changes the configuration. What was paid in and spent stays, and is forgotten
// after the new TTL. New calls count with the new Ratio. After an error nothing has
// changed. If the TTL changes, amounts that are booked at the same moment may be lost.
func (b *Budget) Update(c Config) error {
	s, err := c.settings()
	if err != nil {
		return err
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	b.depositLocked(s.deposit)
	b.most.Store(int64(c.MaxConcurrent))
	old := b.w.Load()
	if s.ttl == b.s.ttl {
		old.balance.Add(s.reserve - b.s.reserve)
		b.s = s
		return nil
	}
	w := newWindow(s)
	now := interceptor.Now()
	old.turn(now)
	w.turn(now)
	for i := range old.slots {
		at := interceptor.Instant(old.slots[i].epoch.Load()) * old.period
		w.book(int64(at/w.period), old.slots[i].amount.Load())
	}
	b.w.Store(w)
	b.s = s
	return nil
}

// depositLocked sets what calls pay in. Caller must hold b.mu.
func (b *Budget) depositLocked(amount int64) {
	was := b.deposit.Load()
	if was == amount {
		return
	}
	now := interceptor.Now()
	var before []deposit
	if p := b.before.Load(); p != nil {
		before = slices.DeleteFunc(slices.Clone(*p), func(d deposit) bool { return now.Sub(d.until) > keep })
	}
	before = append(before, deposit{now, was})
	b.before.Store(&before)
	b.deposit.Store(amount)
}

// paid returns what a call paid in at the moment at.
func (b *Budget) paid(at interceptor.Instant) int64 {
	if p := b.before.Load(); p != nil {
		for _, d := range *p {
			if at <= d.until {
				return d.amount
			}
		}
	}
	return b.deposit.Load()
}

// Deposit counts a call at the moment now.
func (b *Budget) Deposit(now interceptor.Instant) {
	w := b.w.Load()
	w.book(w.turn(now), b.deposit.Load())
}

// Undo takes back the Deposit of the moment at, for a call that was not sent.
func (b *Budget) Undo(at interceptor.Instant) {
	w := b.w.Load()
	w.book(int64(at/w.period), -b.paid(at))
}

// Begin counts a further attempt that is about to be made, if MaxConcurrent allows it.
func (b *Budget) Begin() bool {
	n := b.running.Add(1)
	if most := b.most.Load(); most > 0 && n > most {
		b.running.Add(-1)
		return false
	}
	return true
}

// End is called once for each Begin that was true, when the attempt has ended.
func (b *Budget) End() { b.running.Add(-1) }

// Concurrent returns how many further attempts there are now.
func (b *Budget) Concurrent() int { return int(b.running.Load()) }

// Withdraw pays for a further attempt at the moment now, if the balance is enough.
func (b *Budget) Withdraw(now interceptor.Instant) bool {
	w := b.w.Load()
	p := w.turn(now)
	for {
		have := w.balance.Load()
		if have < one {
			return false
		}
		if w.balance.CompareAndSwap(have, have-one) {
			break
		}
	}
	if !w.note(p, -one) {
		w.balance.Add(one) // The period has ended, and with it what was spent in it.
	}
	return true
}

// Refund takes back the Withdraw of the moment at, for an attempt that was not
// sent.
func (b *Budget) Refund(at interceptor.Instant) {
	w := b.w.Load()
	w.turn(interceptor.Now())
	w.book(int64(at/w.period), one)
}

// Config returns the configuration as it was given to New or Update.
func (b *Budget) Config() Config {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.s.given
}

// Balance returns how many further attempts could be made now. It is below zero when
// the calls that paid for the attempts of the last TTL are older than that. It is as of
// the last call or attempt, because nothing else moves the budget.
func (b *Budget) Balance() float64 { return float64(b.w.Load().balance.Load()) / one }

// book adds an amount to period p, unless that is forgotten.
func (w *window) book(p, amount int64) {
	if amount != 0 && w.note(p, amount) {
		w.balance.Add(amount)
	}
}

// note adds an amount to the slot of period p, and reports whether that slot still
// exists. If the slot moves to its next period at this moment, the amount counts for
// that period, which only changes when it is forgotten.
func (w *window) note(p, amount int64) bool {
	s := &w.slots[p%slots]
	if s.epoch.Load() > p {
		return false
	}
	s.amount.Add(amount)
	return true
}

// turn advances all slots to the period of now, and returns it: what is too old leaves
// the balance. Several callers may turn at once; each slot is turned by one of them.
func (w *window) turn(now interceptor.Instant) (p int64) {
	last := w.turned.Load()
	if since := now - interceptor.Instant(last)*w.period; since >= 0 && since < w.period {
		return last // The usual case, faster than a division.
	}
	p = int64(now / w.period)
	if last >= p {
		return p
	}
	for q := max(last+1, p-slots+1); q <= p; q++ {
		s := &w.slots[q%slots]
		epoch := s.epoch.Load()
		if epoch >= q {
			continue
		}
		// What is added from now on is for q, or comes late. Either way it is in the
		// balance, and leaves it when the slot turns again.
		amount := s.amount.Load()
		if s.epoch.CompareAndSwap(epoch, q) && amount != 0 {
			s.amount.Add(-amount)
			w.balance.Add(-amount)
		}
	}
	for last < p && !w.turned.CompareAndSwap(last, p) {
		last = w.turned.Load()
	}
	return p
}

// Count is called by the gate of a layer that spends the budget. It deposits for a call,
// and takes that back if the call was not sent. Further attempts do not count, and a call
// that passes several layers with the same budget counts once. layer names the layer to
// the observer. Count does not block.
func (b *Budget) Count(a *interceptor.Admission, layer string) {
	counted := (*deposited)(b)
	if a.Attempt() != 0 || a.Held(counted) {
		return
	}
	now := a.Now()
	b.Deposit(now)
	a.Hold(counted, int64(now))
	if a.Internals().Observed() {
		a.Observer().Budget(layer, b.Balance())
	}
}

// deposited is a Budget as the ticket of a call that it counted.
type deposited Budget

// Release takes the deposit back if the call was not sent.
func (d *deposited) Release(at int64, e interceptor.End) {
	if !e.Outcome.Sent() {
		(*Budget)(d).Undo(interceptor.Instant(at))
	}
}

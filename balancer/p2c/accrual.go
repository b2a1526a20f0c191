// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package p2c

import (
	"fmt"
	"math"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/connectivity"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/belfry-go/belfry/internal/attempt"
	"github.com/belfry-go/belfry/load"
	configv1 "github.com/belfry-go/belfry/proto/belfry/config/v1"
)

// This file is what the field failureAccrual does: an endpoint whose attempts fail is put
// aside, tried with one call when its time has passed, and back when that is answered.
//
// An answer costs one load of a word while there are no failures. The number of attempts
// that ended is not counted for the rate: it follows from what the picks count, and is read
// when an attempt fails.

const (
	defaultRow         = 5
	maxFailures        = 1_000_000
	defaultSuccessRate = 0.8
	defaultMinAttempts = 10
	defaultWindow      = 10 * time.Second
	minWindow          = 100 * time.Millisecond
	maxWindow          = time.Hour
	defaultBaseTime    = 3 * time.Second
	defaultMaxTime     = time.Minute
	defaultMaxAside    = 0.5
	maxSlow            = 1_000_000

	// The window is known to a tenth.
	buckets = 10

	measureEvery = time.Second
)

// accrualConfig is the parsed form of belfry.config.v1.FailureAccrual. Immutable.
type accrualConfig struct {
	failures    uint32
	successRate float64
	minAttempts uint32
	window      time.Duration
	baseTime    time.Duration
	maxTime     time.Duration
	maxAside    float64
	slow        float64
	useEjected  bool
}

// newAccrualConfig returns nil without an error if it has nothing to do.
func newAccrualConfig(m *configv1.FailureAccrual) (*accrualConfig, error) {
	if m == nil {
		m = &configv1.FailureAccrual{}
	}
	c := &accrualConfig{
		failures:    defaultRow,
		successRate: defaultSuccessRate,
		minAttempts: defaultMinAttempts,
		window:      defaultWindow,
		baseTime:    defaultBaseTime,
		maxAside:    defaultMaxAside,
	}
	if m.Failures != nil {
		if c.failures = m.GetFailures(); c.failures > maxFailures {
			return nil, configError("failureAccrual.failures", c.failures, fmt.Sprintf("between 0 and %d", maxFailures))
		}
	}
	if m.SuccessRate != nil {
		if c.successRate = m.GetSuccessRate(); !(c.successRate >= 0 && c.successRate <= 1) {
			return nil, configError("failureAccrual.successRate", c.successRate, "between 0 and 1")
		}
	}
	if m.MinAttempts != nil {
		if c.minAttempts = m.GetMinAttempts(); c.minAttempts < 1 || c.minAttempts > maxFailures {
			return nil, configError("failureAccrual.minAttempts", c.minAttempts, fmt.Sprintf("between 1 and %d", maxFailures))
		}
	}
	var err error
	if c.window, err = durationBetween("failureAccrual.window", m.GetWindow(), defaultWindow, minWindow, maxWindow); err != nil {
		return nil, err
	}
	if c.baseTime, err = durationBetween("failureAccrual.baseTime", m.GetBaseTime(), defaultBaseTime, 1, math.MaxInt64); err != nil {
		return nil, err
	}
	if c.maxTime, err = durationBetween("failureAccrual.maxTime", m.GetMaxTime(), max(defaultMaxTime, c.baseTime), c.baseTime, math.MaxInt64); err != nil {
		return nil, err
	}
	if m.MaxAside != nil {
		if c.maxAside = m.GetMaxAside(); !(c.maxAside >= 0 && c.maxAside <= 1) {
			return nil, configError("failureAccrual.maxAside", c.maxAside, "between 0 and 1")
		}
	}
	if c.slow = m.GetSlow(); c.slow != 0 && !(c.slow >= 2 && c.slow <= maxSlow) {
		return nil, configError("failureAccrual.slow", c.slow, fmt.Sprintf("0, or between 2 and %d", maxSlow))
	}
	if c.useEjected = m.GetUseEjected(); c.failures == 0 && c.successRate == 0 && c.slow == 0 && !c.useEjected {
		return nil, nil
	}
	return c, nil
}

// usesEjected reports whether endpoints that a parent has taken out are used when no other is
// left.
func (c *config) usesEjected() bool { return c.accrual != nil && c.accrual.useEjected }

// slow reports whether endpoints are put aside that are slow.
func (c *config) slow() bool { return c.accrual != nil && c.accrual.slow > 0 }

// durationBetween returns a duration of a config, or the default if it is unset.
func durationBetween(field string, m *durationpb.Duration, unset, least, most time.Duration) (time.Duration, error) {
	if m == nil {
		return unset, nil
	}
	d := m.AsDuration()
	switch {
	case d >= least && d <= most:
		return d, nil
	case most < math.MaxInt64:
		return 0, configError(field, d, fmt.Sprintf("between %v and %v", least, most))
	case least > 1:
		return 0, configError(field, d, fmt.Sprintf("at least %v", least))
	}
	return 0, configError(field, d, "above 0s")
}

// accrual judges an endpoint by how its attempts end.
type accrual struct {
	ep *endpoint // nil while it is kept

	first atomic.Uint32 // of the rows that count, see candidate.run
	voids atomic.Uint32 // attempts whose end said nothing
	aside atomic.Bool   // written with policy.mu held
	slow  atomic.Uint32 // attempts in a row that were slow

	mu       sync.Mutex // guards failures and ring. Nothing is locked under it.
	failures uint32
	ring     [buckets]bucket

	// Guarded by policy.mu. They are of the time aside that is, or was last.
	why     string
	since   int64
	until   int64
	back    int64         // since when it is back; 0 if it never was aside
	last    time.Duration // the time aside that a further one doubles
	offered *offer        // to the next call
	stop    func()        // the timer of the next offer
}

// A bucket is what was counted when the first failure of a tenth of the window came.
type bucket struct {
	tenth    int64 // 0 if there is none
	ended    uint32
	failures uint32
}

// A run is the number of failures in a row, below, and above it the number of the row. An
// attempt remembers which row there was when it was picked: its answer ends that one only.
//
// It stands in the candidate, where a pick has read it already. The lower half is 0 if an
// answer changes nothing.
type run struct{ word atomic.Uint64 }

const (
	rowAt  = 32
	oneRow = 1 << rowAt

	// runAside is set while the endpoint is aside.
	runAside = 1 << 31
)

func rowOf(word uint64) uint32 { return uint32(word >> rowAt) }

func failuresOf(word uint64) uint32 { return uint32(word) &^ runAside }

// row returns the number of the row now.
func (r *run) row() uint32 { return rowOf(r.word.Load()) }

// quiet reports whether an answer changes nothing.
func (r *run) quiet() bool { return uint32(r.word.Load()) == 0 }

// fail counts a failure of the row, and starts one if there is none.
func (r *run) fail() uint32 {
	for {
		w := r.word.Load()
		next := w + 1
		if failuresOf(w) == 0 {
			next += oneRow
		}
		if r.word.CompareAndSwap(w, next) {
			return failuresOf(next)
		}
	}
}

// end ends the row, unless it is another by now.
func (r *run) end(word uint64) {
	if failuresOf(word) != 0 {
		r.word.CompareAndSwap(word, word&^math.MaxUint32)
	}
}

// next starts another row with so many failures, and returns its number.
func (r *run) next(failures uint32, aside bool) uint32 {
	for {
		w := r.word.Load()
		next := uint64(rowOf(w)+1)<<rowAt | uint64(failures)
		if aside {
			next |= runAside
		}
		if r.word.CompareAndSwap(w, next) {
			return rowOf(next)
		}
	}
}

// run returns the endpoint's.
func (a *accrual) run() *run { return &a.ep.candidate.run }

// accrual returns the endpoint's, nil if the config has none.
func (ep *endpoint) accrual() *accrual { return ep.candidate.meter.Load().accrual.Load() }

func (ep *endpoint) isAside() bool {
	a := ep.accrual()
	return a != nil && a.aside.Load()
}

// accrueLocked gives the endpoint what it needs for a config. One that was aside when its
// channel went idle is back, and aside again at its next failure.
func (ep *endpoint) accrueLocked(cfg *accrualConfig) {
	m := ep.candidate.meter.Load()
	old := m.accrual.Load()
	switch {
	case cfg == nil:
		if old != nil {
			old.stopLocked()
			old.withdrawLocked()
			old.aside.Store(false)
			m.accrual.Store(nil)
		}
	case old == nil || old.ep != ep:
		a := &accrual{ep: ep}
		failures := uint32(0)
		if old != nil && old.aside.Load() && cfg.failures > 0 {
			failures = cfg.failures - 1
			a.last = old.last
		}
		a.first.Store(a.run().next(failures, false))
		m.accrual.Store(a)
	}
}

// keptLocked returns what is kept of it while the channel is idle: it holds no endpoint, and
// with that no closed channel in memory.
func (a *accrual) keptLocked() *accrual {
	k := &accrual{last: a.last}
	k.aside.Store(a.aside.Load())
	return k
}

// isReady reports whether the endpoint's child has a connection.
func isReady(c *candidate) bool {
	s := c.child.Load()
	return s != nil && s.ConnectivityState == connectivity.Ready
}

// accrue is told how the attempt of a pick ended, or that it was answered. It is called once
// for each.
func (k *pick) accrue(o load.Outcome, err error) {
	a := k.meter.accrual.Load()
	if a == nil || a.ep == nil {
		return
	}
	refused := err != nil && status.Code(err) == codes.ResourceExhausted
	switch {
	case o == load.Failed:
		a.failed(k, err, refused)
	case o == load.Completed && !refused:
		a.answered(k)
	case o != load.Completed:
		a.voids.Add(1)
	}
	if k.picker.config.accrual.slow > 0 && !a.aside.Load() && int32(k.row-a.first.Load()) >= 0 {
		a.timed(k, o)
	}
}

// answered is told of an answer.
func (a *accrual) answered(k *pick) {
	w := a.run().word.Load()
	switch {
	case rowOf(w) != k.row: // It was sent before.
	case a.aside.Load():
		a.tried(k)
	default:
		a.run().end(w)
	}
}

// failed is told of a failure.
func (a *accrual) failed(k *pick, err error, refused bool) {
	cfg := k.picker.config.accrual
	if a.aside.Load() {
		if a.run().row() == k.row {
			a.triedInVain(k, err)
		}
		return
	}
	if int32(k.row-a.first.Load()) < 0 {
		a.voids.Add(1) // It was sent before the endpoint was put aside or came back.
		return
	}
	row := uint32(0)
	if !refused {
		row = a.run().fail()
	}
	ended, failures, bad := a.rate(cfg)
	switch {
	case cfg.failures > 0 && row >= cfg.failures:
		a.ep.policy.putAside(a, k, err, "failures", fmt.Sprintf("%d attempts in a row failed, the last with %v", row, err))
	case bad:
		a.ep.policy.putAside(a, k, err, "success_rate", fmt.Sprintf("%d of %d attempts failed, the last with %v", failures, ended, err))
	}
}

// rate counts a failure, and reports whether too many of the attempts in the window failed.
func (a *accrual) rate(cfg *accrualConfig) (ended, failures uint32, bad bool) {
	c := a.ep.candidate
	tenth := a.ep.policy.now()/int64(cfg.window/buckets) + 1
	attempts, _ := c.tally.read() // this one is still counted
	all := c.picks() - uint32(attempts) - a.voids.Load() + 1
	a.mu.Lock()
	defer a.mu.Unlock()
	first := &a.ring[tenth%buckets]
	if first.tenth != tenth {
		*first = bucket{tenth, all - 1, a.failures}
	}
	a.failures++
	for i := range a.ring {
		if b := &a.ring[i]; b.tenth > max(tenth-buckets, 0) && b.tenth < first.tenth {
			first = b
		}
	}
	ended, failures = all-first.ended, a.failures-first.failures
	bad = int32(ended) >= int32(cfg.minAttempts) && float64(failures) > (1-cfg.successRate)*float64(ended)
	return ended, failures, bad
}

// forget forgets what was counted, and makes what earlier attempts say count for nothing.
func (a *accrual) forget() {
	a.first.Store(a.run().next(0, a.aside.Load()))
	a.slow.Store(0)
	a.mu.Lock()
	defer a.mu.Unlock()
	a.ring = [buckets]bucket{}
}

// putAside puts an endpoint aside. k is the attempt that decided it and err how it failed, if
// it was one that failed.
func (b *policy) putAside(a *accrual, k *pick, err error, reason, why string) {
	ep := a.ep
	b.mu.Lock()
	cfg := b.picker.config.accrual
	if b.closed || ep.gone || a.aside.Load() || cfg == nil || ep.accrual() != a {
		b.mu.Unlock()
		return
	}
	now := b.now()
	if a.back != 0 && time.Duration(now-a.back) >= a.last {
		a.last = 0
	}
	a.aside.Store(true)
	a.why, a.since = why, now
	a.forget()
	d := a.waitLocked(cfg, k, err)
	b.seatLocked(ep)
	b.mu.Unlock()

	b.metrics.putAside(reason)
	if more, ok := b.putAsides.May(now); ok {
		logger.Warningf("%s: endpoint %s is put aside for %v: %s%s", b.opts.Target.String(), ep.addr, d.Round(time.Millisecond), why, more)
	}
}

// waitLocked starts the time after which a call may try the endpoint.
func (a *accrual) waitLocked(cfg *accrualConfig, k *pick, err error) time.Duration {
	b := a.ep.policy
	a.last = min(max(2*a.last, cfg.baseTime), cfg.maxTime)
	d := a.last
	if k != nil && err != nil {
		if asked := attempt.WishOf(err, k.trailer); asked.Asked {
			d = max(min(asked.After, mostPushback), leastAside)
		}
	}
	r := random(b.random())
	d += time.Duration(float64(d) * 0.5 * float64(r.below(1<<20)) / (1 << 20))
	a.until = b.now() + int64(d)
	a.offerAfterLocked(d)
	return d
}

// offerAfterLocked sets the timer to offer the endpoint, in the place of the one that is set.
func (a *accrual) offerAfterLocked(d time.Duration) {
	b := a.ep.policy
	a.stopLocked()
	a.stop = b.after(d, func() {
		b.mu.Lock()
		defer b.mu.Unlock()
		if !b.closed && !a.ep.gone && a.aside.Load() {
			a.offerLocked()
		}
	})
}

// leastAside is the least time that a server can ask for: at none each call would try it.
const leastAside = 100 * time.Millisecond

// stopLocked ends the time.
func (a *accrual) stopLocked() {
	if a.stop != nil {
		a.stop()
		a.stop = nil
	}
}

// An offer lets one call try an endpoint.
type offer struct {
	a     *accrual
	row   uint32 // of a
	taken atomic.Bool
	next  *offer
}

// offerLocked lets the next call try the endpoint, and another if that one has no result
// when as much time has passed again.
func (a *accrual) offerLocked() {
	b := a.ep.policy
	cfg := b.picker.config.accrual
	if cfg == nil || a.ep.condition != aside {
		return
	}
	if a.offered == nil || a.offered.taken.Load() {
		o := &offer{a: a, row: a.run().row()}
		a.offered = o
		for {
			o.next = b.offers.Load()
			if b.offers.CompareAndSwap(o.next, o) {
				break
			}
		}
	}
	a.offerAfterLocked(max(a.last, cfg.baseTime))
}

// withdrawLocked takes an offer back that no call has taken.
func (a *accrual) withdrawLocked() {
	if a != nil && a.offered != nil {
		a.offered.taken.Store(true)
		a.offered = nil
	}
}

// trial returns an endpoint for a call to try, nil as a rule. It takes no lock.
func (b *policy) trial(tried *attempt.Tried) *candidate {
	for {
		o := b.offers.Load()
		if o == nil || tried != nil && tried.Has(o.a.ep.candidate.id()) {
			return nil
		}
		if !b.offers.CompareAndSwap(o, o.next) {
			continue
		}
		c := o.a.ep.candidate
		// One that is not READY is offered again when it is, and one without room later.
		if !o.taken.Swap(true) && o.a.aside.Load() && o.row == o.a.run().row() && isReady(c) && c.hasRoom() {
			return c
		}
	}
}

// tried is told that an endpoint that is aside has answered a call that was sent since. In a
// panic that may be any call.
func (a *accrual) tried(k *pick) {
	b, ep := a.ep.policy, a.ep
	b.mu.Lock()
	if !a.aside.Load() || a.run().row() != k.row || ep.gone || b.closed {
		b.mu.Unlock()
		return
	}
	if cfg := b.picker.config.accrual; cfg != nil && k.slow() {
		a.againLocked(cfg, k, nil)
		b.mu.Unlock()
		return
	}
	away, now := a.returnLocked(), a.back
	b.mu.Unlock()
	if more, ok := b.returns.May(now); ok {
		logger.Warningf("%s: endpoint %s is back after %v: it answered%s", b.opts.Target.String(), ep.addr, away.Round(time.Millisecond), more)
	}
}

// returnLocked brings the endpoint back.
func (a *accrual) returnLocked() (away time.Duration) {
	b := a.ep.policy
	a.stopLocked()
	a.withdrawLocked()
	a.aside.Store(false)
	a.back = b.now()
	a.forget()
	if !b.seating.seated[aside] {
		a.ep.rampLocked()
	}
	b.seatLocked(a.ep)
	return time.Duration(a.back - a.since)
}

// triedInVain is told that a call failed that was sent since the endpoint is aside.
func (a *accrual) triedInVain(k *pick, err error) {
	b := a.ep.policy
	b.mu.Lock()
	defer b.mu.Unlock()
	cfg := b.picker.config.accrual
	// In a panic others fail than the one that tries.
	if a.aside.Load() && a.run().row() == k.row && a.offered != nil && a.offered.taken.Load() && cfg != nil && !b.closed && !a.ep.gone {
		a.againLocked(cfg, k, err)
	}
}

// againLocked keeps the endpoint aside for another time.
func (a *accrual) againLocked(cfg *accrualConfig, k *pick, err error) {
	a.offered = nil
	d := a.waitLocked(cfg, k, err)
	if logger.V(2) {
		logger.Infof("%s: endpoint %s stays aside for %v", a.ep.policy.opts.Target.String(), a.ep.addr, d.Round(time.Millisecond))
	}
}

// resumeLocked offers the endpoint if its time has passed while it was draining or ejected.
func (a *accrual) resumeLocked() {
	if a.until <= a.ep.policy.now() {
		a.offerLocked()
	}
}

// tryNowLocked lets a call try the endpoint now, and the time aside start from the least.
func (a *accrual) tryNowLocked() {
	a.last = 0
	a.until = a.ep.policy.now()
	a.offerLocked()
}

// reconnectedLocked lets a call try the endpoint now if it is aside: it has a new connection,
// or a parent has let it in again.
func (a *accrual) reconnectedLocked() {
	if a != nil && a.aside.Load() {
		a.withdrawLocked()
		a.until = a.ep.policy.now()
		a.offerLocked()
	}
}

// slow reports whether the attempt took longer than the config allows. A stream does not: it
// may have nothing to say.
func (k *pick) slow() bool {
	most := k.picker.policy.slowAfter.Load()
	return most > 0 && k.picker.config.accrual.slow > 0 && (k.track == nil || !k.track.stream) &&
		k.picker.policy.now()-int64(k.began) >= most
}

// timed is told of an attempt that ended, whether it was answered, failed or was given up. One
// that was given up early says nothing.
func (a *accrual) timed(k *pick, o load.Outcome) {
	switch slow := k.slow(); {
	case slow:
		cfg := k.picker.config.accrual
		if n := a.slow.Add(1); n >= max(cfg.failures, 1) {
			a.ep.policy.putAside(a, k, nil, "slow", fmt.Sprintf("%d attempts in a row took longer than %v, %v times what the median endpoint's take", n,
				time.Duration(k.picker.policy.slowAfter.Load()).Round(time.Microsecond), cfg.slow))
		}
	case o == load.Completed && a.slow.Load() != 0:
		a.slow.Store(0)
	}
}

// measureMedian sets what slow is, and comes back in a second. It does nothing unless the
// config asks for it.
func (b *policy) measureMedian() {
	b.mu.Lock()
	p := b.picker
	cfg := p.config.accrual
	if b.measuring = !b.closed && cfg != nil && cfg.slow > 0; !b.measuring {
		b.slowAfter.Store(0)
		b.mu.Unlock()
		return
	}
	b.after(measureEvery, b.measureMedian)
	b.mu.Unlock()

	var latencies []time.Duration
	if all := b.all.Load(); all != nil {
		for _, ep := range *all {
			c := ep.candidate
			if d := c.meter.Load().Inspect(c.query(p, load.Instant(b.now()), 0)); d.Latency > 0 && d.Samples >= 1 && !ep.isAside() {
				latencies = append(latencies, d.Latency)
			}
		}
	}
	slowAfter := int64(0)
	if len(latencies) >= 3 { // of two nobody knows which is the slow one
		slices.Sort(latencies)
		slowAfter = int64(min(cfg.slow*float64(latencies[(len(latencies)-1)/2]), math.MaxInt64/2))
	}
	b.slowAfter.Store(slowAfter)
}

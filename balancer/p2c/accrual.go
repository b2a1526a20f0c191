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

// This file implements the field failureAccrual. An endpoint whose attempts fail is put aside.
// When its time aside has passed, one call tries it. If that is answered, the endpoint is
// back.
//
// While there are no failures, an answer only loads one word. The number of ended attempts,
// for the rate, follows from the counts of picks. It is read when an attempt fails.

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

	// The window moves in steps of a tenth.
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

// newAccrualConfig returns nil, without an error, if failure accrual is off.
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

// usesEjected reports whether ejected endpoints are used when no other is left.
func (c *config) usesEjected() bool { return c.accrual != nil && c.accrual.useEjected }

// slow reports whether slow endpoints are put aside.
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

	first atomic.Uint32 // the first row that counts, see run. Attempts that were sent in earlier rows do not.
	voids atomic.Uint32 // how many attempts do not count for the rate
	aside atomic.Bool   // written with policy.mu held
	slow  atomic.Uint32 // how many attempts in a row were slow

	mu       sync.Mutex // guards failures and ring. Nothing is locked under it.
	failures uint32
	ring     [buckets]bucket

	// Guarded by policy.mu. why, since and until are those of the current or the last time
	// aside. Times are by policy.now.
	why     string
	since   int64
	until   int64         // when a call may try the endpoint
	back    int64         // when the endpoint came back last; 0 if it never did
	last    time.Duration // the last time aside, which the next one doubles; 0 if that starts from baseTime
	offered *offer        // the last offer; nil if it was withdrawn or its call has failed
	stop    func()        // stops the timer of the next offer; nil if no timer is set
}

// A bucket holds the counts at the first failure of a tenth of the window.
type bucket struct {
	tenth    int64 // the number of the tenth, from 1; 0 in an empty bucket
	ended    uint32
	failures uint32
}

// A run counts failures in a row, which are failures without an answer between them. Rows are
// numbered: the upper half of the word is the number of the current row, the lower half its
// number of failures. An attempt remembers the row in which it was sent, and its answer ends
// only that row.
//
// A run is in the candidate, which a pick has in its cache already. The lower half is 0 if an
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

// row returns the number of the current row.
func (r *run) row() uint32 { return rowOf(r.word.Load()) }

// quiet reports whether an answer changes nothing.
func (r *run) quiet() bool { return uint32(r.word.Load()) == 0 }

// fail counts a failure, and returns how many the row has. Without failures so far it starts
// a new row.
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

// end ends the row if the run still is word.
func (r *run) end(word uint64) {
	if failuresOf(word) != 0 {
		r.word.CompareAndSwap(word, word&^math.MaxUint32)
	}
}

// next starts a new row with a number of failures, and returns the number of the row.
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

// run returns the run of the endpoint.
func (a *accrual) run() *run { return &a.ep.candidate.run }

// accrual returns the accrual of the endpoint, nil if the config has none.
func (ep *endpoint) accrual() *accrual { return ep.candidate.meter.Load().accrual.Load() }

func (ep *endpoint) isAside() bool {
	a := ep.accrual()
	return a != nil && a.aside.Load()
}

// accrueLocked gives the endpoint an accrual for a config. An endpoint that was aside when its
// channel went idle is in use again, and is put aside at its next failure.
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

// keptLocked returns the copy that is kept while the channel is idle. The copy has no
// endpoint, so that it does not keep a closed channel in memory.
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

// accrue is told how the attempt of a pick ended, or that the first message of its stream has
// arrived. It is called once for each pick.
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
	case rowOf(w) != k.row: // the attempt was sent in another row
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
			a.trialFailed(k, err)
		}
		return
	}
	if int32(k.row-a.first.Load()) < 0 {
		a.voids.Add(1) // sent before the endpoint was put aside or came back
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
	attempts, _ := c.tally.read() // includes the attempt that has failed
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

// forget resets what was counted. Attempts that were sent before do not count any more.
func (a *accrual) forget() {
	a.first.Store(a.run().next(0, a.aside.Load()))
	a.slow.Store(0)
	a.mu.Lock()
	defer a.mu.Unlock()
	a.ring = [buckets]bucket{}
}

// putAside puts an endpoint aside. k is the attempt whose end decided that. err is its error,
// nil if it did not fail but was slow.
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

// waitLocked starts a time aside, after which a call may try the endpoint, and returns it. k
// and err are as in putAside.
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

// offerAfterLocked sets the timer for the next offer of the endpoint. It replaces one that is
// set.
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

// leastAside is the shortest time aside that a server can ask for. With 0 each call would try
// the endpoint.
const leastAside = 100 * time.Millisecond

// stopLocked stops the timer.
func (a *accrual) stopLocked() {
	if a.stop != nil {
		a.stop()
		a.stop = nil
	}
}

// An offer lets one call try an endpoint.
type offer struct {
	a     *accrual
	row   uint32 // of the run of a when the offer was made; the offer ends with the row
	taken atomic.Bool
	next  *offer
}

// offerLocked lets the next call try the endpoint. If that call has no result after the last
// time aside, another call may try it.
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

// withdrawLocked withdraws the offer, so that no call takes it any more.
func (a *accrual) withdrawLocked() {
	if a != nil && a.offered != nil {
		a.offered.taken.Store(true)
		a.offered = nil
	}
}

// trial returns an endpoint that the call is to try, or nil. It takes no lock.
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
		// An endpoint that is not READY is offered again when it is READY, and one without room
		// after its next time.
		if !o.taken.Swap(true) && o.a.aside.Load() && o.row == o.a.run().row() && isReady(c) && c.hasRoom() {
			return c
		}
	}
}

// tried is told that an endpoint that is aside has answered a call that was sent since it is
// aside. In a panic that may be any call.
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

// returnLocked brings the endpoint back, and returns how long it was aside.
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

// trialFailed is told that a call has failed that was sent since the endpoint is aside.
func (a *accrual) trialFailed(k *pick, err error) {
	b := a.ep.policy
	b.mu.Lock()
	defer b.mu.Unlock()
	cfg := b.picker.config.accrual
	// In a panic the call need not be the one that took the offer.
	if a.aside.Load() && a.run().row() == k.row && a.offered != nil && a.offered.taken.Load() && cfg != nil && !b.closed && !a.ep.gone {
		a.againLocked(cfg, k, err)
	}
}

// againLocked starts a further time aside.
func (a *accrual) againLocked(cfg *accrualConfig, k *pick, err error) {
	a.offered = nil
	d := a.waitLocked(cfg, k, err)
	if logger.V(2) {
		logger.Infof("%s: endpoint %s stays aside for %v", a.ep.policy.opts.Target.String(), a.ep.addr, d.Round(time.Millisecond))
	}
}

// resumeLocked is called when the endpoint is seated as one that is aside. It offers the
// endpoint if its time aside has passed, as it may have while it was draining or ejected.
func (a *accrual) resumeLocked() {
	if a.until <= a.ep.policy.now() {
		a.offerLocked()
	}
}

// tryNowLocked lets a call try the endpoint now. If it fails, the time aside starts from
// baseTime again.
func (a *accrual) tryNowLocked() {
	a.last = 0
	a.until = a.ep.policy.now()
	a.offerLocked()
}

// dueLocked is called before the endpoint is seated with a new connection, or because it is
// not ejected any more. If it is aside, a call may try it then.
func (a *accrual) dueLocked() {
	if a != nil && a.aside.Load() {
		a.until = a.ep.policy.now()
	}
}

// slow reports whether the attempt takes longer than the config allows. A stream is never
// slow, because its server may have nothing to send.
func (k *pick) slow() bool {
	most := k.picker.policy.slowAfter.Load()
	return most > 0 && k.picker.config.accrual.slow > 0 && (k.track == nil || !k.track.stream) &&
		k.picker.policy.now()-int64(k.began) >= most
}

// timed is told of the end of an attempt, to count slow ones. An attempt that was given up
// early changes nothing.
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

// measureMedian sets slowAfter from the median latency of the endpoints, and sets a timer for
// the next time. It ends if the config has no slow any more.
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
	if len(latencies) >= 3 { // of two, either may be the slow one
		slices.Sort(latencies)
		slowAfter = int64(min(cfg.slow*float64(latencies[(len(latencies)-1)/2]), math.MaxInt64/2))
	}
	b.slowAfter.Store(slowAfter)
}

// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package concurrency

import (
	"cmp"
	"context"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"google.golang.org/grpc/grpclog"

	"github.com/belfry-go/belfry/interceptor"
	"github.com/belfry-go/belfry/internal/waitlist"
	"github.com/belfry-go/belfry/limit"
)

// limiter is one limit with its queue and its algorithm: a Layer has one, or one for
// each key. It is the Releaser of the permits of its calls.
type limiter struct {
	layer *Layer
	key   string

	permits  permits
	reserve  reserve
	heavy    heavy
	refusals atomic.Pointer[refusals]
	observed atomic.Int64                  // The limit that an observer was last told.
	limited  atomic.Bool                   // A call was refused, or had to wait, for want of a permit since the last sample.
	starter  atomic.Pointer[limit.Starter] // The algorithm, nil if it is no Starter.

	// mu guards algorithm and what it points to, and orders changes of the limit.
	// permits.mu is taken under it.
	mu        sync.Mutex
	algorithm limit.Algorithm // Nil for a fixed limit.
	last      limit.Sample    // What it learnt last.
	logged    int64           // The highest limit since the last line that was logged.
}

// refusals are the refusals of one configuration. Each is made when it is first needed.
type refusals struct {
	limit      int64 // Fixed; -1 if it changes by itself.
	maxWaiters int
	maxWait    time.Duration
	made       [refusedCount]atomic.Pointer[interceptor.Refusal]
}

func newLimiter(l *Layer, key string) *limiter {
	lim := &limiter{layer: l, key: key}
	lim.observed.Store(-1)
	lim.reserve.init()
	return lim
}

// configure applies set.
func (lim *limiter) configure(set *settings) error {
	lim.mu.Lock()
	defer lim.mu.Unlock()
	algorithm, err := lim.choose(set.config)
	if err != nil {
		return err
	}
	lim.algorithm = algorithm
	lim.starter.Store(nil)
	if s, ok := algorithm.(limit.Starter); ok {
		lim.starter.Store(&s)
	}
	n := set.limit
	if algorithm != nil {
		n = limitOf(algorithm)
	}
	lim.permits.configure(n, set.config.Discipline, set.config.MaxWaiters, set.target, set.interval)
	lim.refusals.Store(set.refusals())
	return nil
}

// choose returns the algorithm that cfg asks for, nil for a fixed limit. If the current
// one is of the same kind it is reconfigured. A new one starts at the current limit, if
// there is one.
func (lim *limiter) choose(cfg Config) (limit.Algorithm, error) {
	var next interface {
		limit.Algorithm
		SetLimit(n int64)
	}
	var err error
	switch before := lim.algorithm; {
	case lim.layer.custom != nil:
		return lim.layer.custom, nil
	case cfg.AIMD != nil:
		if a, ok := before.(*limit.AIMD); ok {
			return a, a.Update(*cfg.AIMD)
		}
		next, err = limit.NewAIMD(*cfg.AIMD)
	case cfg.Gradient2 != nil:
		if g, ok := before.(*limit.Gradient2); ok {
			return g, g.Update(*cfg.Gradient2)
		}
		next, err = limit.NewGradient2(*cfg.Gradient2)
	case cfg.Vegas != nil:
		if v, ok := before.(*limit.Vegas); ok {
			return v, v.Update(*cfg.Vegas)
		}
		next, err = limit.NewVegas(*cfg.Vegas)
	case cfg.Limit > 0:
		return nil, nil
	default:
		auto := limit.AutoConfig{}
		if cfg.Auto != nil {
			auto = *cfg.Auto
		}
		if a, ok := before.(*limit.Auto); ok {
			return a, a.Update(auto)
		}
		next, err = limit.NewAuto(auto)
	}
	if err != nil {
		return nil, err
	}
	if n := lim.permits.limit.Load(); n > 0 {
		next.SetLimit(n)
	}
	return next, nil
}

// setLimit sets a fixed limit.
func (lim *limiter) setLimit(set *settings) {
	lim.mu.Lock()
	defer lim.mu.Unlock()
	lim.permits.setLimit(set.limit)
	lim.refusals.Store(set.refusals())
}

// idle reports whether no call has or wants a permit.
func (lim *limiter) idle() bool { return lim.permits.state.Load() == 0 }

type gate struct {
	layer *Layer
	inner interceptor.Gate
}

func (g *gate) Admit(ctx context.Context, a *interceptor.Admission, w interceptor.Wait) error {
	l := g.layer
	lim := l.one
	if lim == nil {
		// A limit that a call has permits of, or waits at, is not forgotten. Pinned, it
		// is not either before that.
		e := l.keys.Pin(l.settings.Load().config.KeyBy.Key(ctx, a), int64(a.Now()))
		defer e.Unpin()
		lim = e.Value
	}
	cost := int64(1)
	if l.cost != nil {
		cost = min(max(l.cost(ctx, a), 1), maxLimit)
	}
	set := l.settings.Load()
	level, err := lim.acquire(ctx, a, w, cost, set)
	if err != nil {
		return err
	}
	lim.hold(a, cost, level, set)
	lim.observe(a)
	return g.inner.Admit(ctx, a, w)
}

// acquire takes permits for a call, or waits for them as long as w allows. level is
// that of the reserve, for released.
func (lim *limiter) acquire(ctx context.Context, a *interceptor.Admission, w interceptor.Wait, cost int64, set *settings) (level int64, err error) {
	p, in := &lim.permits, a.Internals()
	slot := in.Slot()
	final := w == interceptor.None && !in.Trying()
	if final && (lim.reserve.active.Load() || lim.heavy.active.Load()) {
		return lim.acquireReserving(ctx, a, cost, slot)
	}
	inUse, ok := int64(0), false
	if slot == nil { // A slot has to be passed under the lock.
		inUse, ok = p.take(cost, 0)
	}
	switch {
	case ok:
		return 0, nil
	case w.Remaining() > 0:
		return 0, lim.wait(ctx, a, w, cost, set)
	case p.fits(cost, 0, inUse) && p.takeLocked(cost, 0, lim.layer.rank(ctx, a), slot):
		return 0, nil
	}
	lim.holdBack()
	if final {
		priority := lim.layer.priority(ctx, a)
		lim.reserve.refused(priority, inUse, p.limit.Load(), a.Now)
		if cost > 1 {
			lim.heavy.arrived(cost, priority, false, a.Now())
		}
	}
	return 0, lim.refuse(noneFree)
}

// holdBack notes that the limit holds calls back.
func (lim *limiter) holdBack() {
	if !lim.limited.Load() {
		lim.limited.Store(true)
	}
}

// acquireReserving takes permits for a call that may not wait, where some are kept
// for higher priorities or for heavier calls.
func (lim *limiter) acquireReserving(ctx context.Context, a *interceptor.Admission, cost int64, slot interceptor.Slot) (level int64, err error) {
	p, rank := &lim.permits, lim.layer.rank(ctx, a)
	n, now := p.limit.Load(), a.Now()
	keep, owed, weighs := int64(0), int64(0), lim.heavy.active.Load()
	if lim.reserve.active.Load() {
		keep = min(lim.reserve.against(rank.Priority, now), n-1)
	}
	if weighs {
		owed = lim.heavy.against(cost, rank.Priority, now)
	}
	ok, inUse := false, p.inUse()
	if owed < n { // Otherwise a heavy call waits until nothing else runs.
		keep := max(keep, owed)
		if slot == nil {
			inUse, ok = p.take(cost, keep)
		}
		ok = ok || p.fits(cost, keep, inUse) && p.takeLocked(cost, keep, rank, slot)
	}
	if weighs {
		lim.heavy.arrived(cost, rank.Priority, ok, now)
	}
	if ok {
		return lim.reserve.admitted(rank.Priority, cost, now), nil
	}
	lim.holdBack()
	lim.reserve.refused(rank.Priority, inUse, n, a.Now)
	switch {
	case !p.fits(cost, 0, inUse):
		return 0, lim.refuse(noneFree)
	case p.fits(cost, keep, inUse):
		return 0, lim.refuse(owedToHeavy)
	}
	return 0, lim.refuse(reserved)
}

// wait waits for permits.
func (lim *limiter) wait(ctx context.Context, a *interceptor.Admission, w interceptor.Wait, cost int64, set *settings) error {
	l, p := lim.layer, &lim.permits
	if ctx.Err() != nil { // It must not take the position of a call that can still wait.
		return interceptor.Ended(ctx, l.name)
	}
	since, over := interceptor.Now(), noneInTime
	if set.config.MaxWait > 0 {
		if bound := since.Add(set.config.MaxWait).Wait(); bound < w {
			w, over = bound, maxWaitOver
		}
	}
	if bound := lim.leave(ctx, a, since); bound < w {
		w, over = bound, noneInTime
	}
	parked, done := a.Park(ctx)
	defer done()
	wt := newWaiter(cost, l.rank(ctx, a), since, a.Internals().Slot())
	wt.expendable = a.Internals().Expendable()
	p.enqueue(wt)
	if p.waits() {
		lim.holdBack()
	}
	err := w.On(parked, wt.done)
	if err != nil && !p.abandon(wt) {
		if wt.why == admitted && err != interceptor.ErrWaitOver {
			p.release(cost) // The call will not be made, so others get the permits.
		} else {
			err = nil
		}
	}
	held := err == nil && wt.why == admitted
	defer func() {
		if held {
			p.release(cost) // The observer panicked.
		}
	}()
	a.Waited(l.name, since)
	held = false
	switch {
	case err == interceptor.ErrWaitOver:
		return lim.refuse(over)
	case err != nil:
		return interceptor.Ended(parked, l.name)
	case wt.why != admitted:
		return lim.refuse(wt.why)
	}
	return nil
}

// lastChance is how many times the latency of the server without a queue a call needs.
const lastChance = 4

// leave returns how long a call may wait and still have the time that the server needs. A
// server works on what expires, too: if calls were sent with less, it might do nothing else,
// and the algorithm would see only calls that say nothing. But a call may wait for half of
// what it has left, whatever the algorithm thinks.
func (lim *limiter) leave(ctx context.Context, a *interceptor.Admission, now interceptor.Instant) interceptor.Wait {
	end := a.Internals().Deadline(ctx)
	if end == 0 {
		return interceptor.Forever
	}
	lim.mu.Lock()
	defer lim.mu.Unlock()
	e, ok := lim.algorithm.(limit.Explainer)
	if !ok {
		return interceptor.Forever
	}
	needs := e.Explain().Baseline
	if needs <= 0 {
		return interceptor.Forever
	}
	return end.Add(-min(lastChance*needs, end.Sub(now)/2)).Wait()
}

// refuse returns the refusal for a reason.
func (lim *limiter) refuse(why refused) error {
	rs := lim.refusals.Load()
	if r := rs.made[why].Load(); r != nil {
		return r
	}
	reason := interceptor.ReasonConcurrency
	if why == queueFull || why == evicted {
		reason = interceptor.ReasonQueueFull
	}
	r := interceptor.Refuse(lim.layer.name, reason, rs.text(why))
	if lim.key != "" {
		r = r.ForKey(lim.key)
	}
	rs.made[why].Store(r) // If two make it at once, both are right.
	return r
}

// text returns the text of a refusal. It names the settings that only an update changes.
func (rs *refusals) text(why refused) string {
	text, detail := "", ""
	switch why {
	case queueFull:
		text, detail = "wait queue is full", fmt.Sprintf("%d waiting", rs.maxWaiters)
	case evicted:
		text = "evicted from the wait queue by a call that goes first"
	case delayed:
		text, detail = "calls wait too long for a permit", "CoDel"
	case noneInTime:
		text = "no permit became free in the time that the call may wait"
	case maxWaitOver:
		text = "no permit became free in " + rs.maxWait.String()
	case noneFree:
		text = "no permit is free"
	case reserved:
		text = "the free permits are kept for higher priorities"
	case owedToHeavy:
		text = "the free permits are kept for a call that costs more"
	}
	if rs.limit >= 0 {
		if detail != "" {
			detail += ", "
		}
		detail += fmt.Sprintf("limit %d", rs.limit)
	}
	if detail != "" {
		text += " (" + detail + ")"
	}
	return text
}

// The token of a call has a bit that says whether the algorithm learns from it, the
// level of the reserve, the mark of the algorithm, and how many permits it holds.
const (
	sampled    = 1
	levelBits  = 1
	levelMask  = 7
	markShift  = 4
	tokenShift = markShift + 4 // limit.MaxMark has as many bits.
)

// hold leaves the permits on the call.
func (lim *limiter) hold(a *interceptor.Admission, cost, level int64, set *settings) {
	token := cost<<tokenShift | level<<levelBits
	if set.adaptive && (set.config.SampleStreams || a.Kind() == interceptor.Unary) {
		a.Timed()
		token |= sampled
		if s := lim.starter.Load(); s != nil {
			token |= int64((*s).OnStart()&limit.MaxMark) << markShift
		}
	}
	a.Hold(lim, token)
}

// Respond tells the algorithm how long the first response of a stream took.
func (lim *limiter) Respond(token int64, e interceptor.End) {
	if token&sampled != 0 {
		lim.sample(token, e)
	}
}

// Release takes permits back. The algorithm learns first, while the permits of the
// call still count.
func (lim *limiter) Release(token int64, e interceptor.End) {
	if token&sampled != 0 && !e.Responded {
		lim.sample(token, e)
	}
	cost := token >> tokenShift
	lim.reserve.released(token>>levelBits&levelMask, cost)
	lim.permits.release(cost)
}

// sample tells the algorithm how a call has ended.
func (lim *limiter) sample(token int64, e interceptor.End) {
	s := limit.Sample{RTT: e.Took(), Result: limit.Void, Mark: uint8(token >> markShift & limit.MaxMark)}
	if s.RTT > 0 {
		s.Start = limit.Instant(e.SentAt())
		switch e.Outcome {
		case interceptor.OK:
			s.Result = limit.Succeeded
		case interceptor.Ignored:
			s.Result = limit.GivenUp
		case interceptor.Failed:
			if lim.layer.settings.Load().drops.Has(e.Code()) {
				s.Result = limit.Dropped
			}
		}
	}
	if s.Result == limit.Void && s.Mark == 0 {
		return
	}
	s.Limited = lim.limited.Load() && lim.limited.Swap(false)
	var halved func()
	defer func() {
		if halved != nil {
			halved()
		}
	}()
	lim.mu.Lock()
	defer lim.mu.Unlock()
	if lim.algorithm == nil {
		return // The limit has become a fixed one.
	}
	s.InFlight = lim.permits.inUse()
	lim.algorithm.OnSample(s)
	lim.last = s
	if n, was := limitOf(lim.algorithm), lim.permits.limit.Load(); n != was {
		lim.permits.setLimit(n)
		halved = lim.halvedLocked(n, was)
	}
}

// halvedLocked returns what logs that the limit has fallen to half of what it was since the
// last line, nil if it has not. Caller must hold lim.mu.
func (lim *limiter) halvedLocked(n, was int64) (log func()) {
	high := max(lim.logged, was)
	if lim.logged = max(high, n); n > high/2 {
		return nil
	}
	lim.logged = n
	why := ""
	if e, ok := lim.algorithm.(limit.Explainer); ok {
		why = e.Explain().Lowered
	}
	return func() {
		l := lim.layer
		if more, ok := l.log.May(int64(interceptor.Now())); ok {
			logger.Warningf("concurrency %q: the limit%s has fallen from %d to %d: %s%s", l.name, ofKey(lim.key), high, n, cmp.Or(why, "the algorithm does not say why"), more)
		}
	}
}

func ofKey(key string) string {
	if key == "" {
		return ""
	}
	return fmt.Sprintf(" of %q", key)
}

var logger = grpclog.Component("belfry")

// limitOf returns a's limit, within what the layer can enforce.
func limitOf(a limit.Algorithm) int64 { return min(max(a.Limit(), 1), maxLimit) }

// state returns what the limit does and thinks.
func (lim *limiter) state() interceptor.LimitState {
	lim.mu.Lock()
	defer lim.mu.Unlock()
	l := lim.layer
	st := interceptor.LimitState{Layer: l.name, Key: lim.key, ByMethod: l.settings.Load().config.KeyBy.Method, Last: lim.last}
	st.Limit, st.InUse, st.Waiting = lim.permits.read()
	if e, ok := lim.algorithm.(limit.Explainer); ok {
		st.State = e.Explain()
	}
	return st
}

// observe reports a changed limit to the observer of a call. Limits change at the end of
// calls, where there is no observer, so the next call reports it.
func (lim *limiter) observe(a *interceptor.Admission) {
	if !a.Internals().Observed() {
		return
	}
	n := lim.permits.limit.Load()
	if was := lim.observed.Load(); was != n && lim.observed.CompareAndSwap(was, n) {
		a.Observer().Limit(lim.state())
	}
}

// rank returns the rank of a call in every queue.
func (l *Layer) rank(ctx context.Context, a *interceptor.Admission) waitlist.Rank {
	return waitlist.Rank{Priority: l.priority(ctx, a), Further: a.Attempt() > 0}
}

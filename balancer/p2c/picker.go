// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package p2c

import (
	"context"
	"math"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"google.golang.org/grpc/balancer"
	"google.golang.org/grpc/connectivity"
	"google.golang.org/grpc/metadata"

	"github.com/belfry-go/belfry/internal/attempt"
	"github.com/belfry-go/belfry/load"
)

// This file is the hot path: Pick, and Done. It takes no lock, and allocates
// nothing.

// picker picks the least loaded of a few READY endpoints: config.choices of them
// at random, and those that were the least loaded at the last pick. With no more
// endpoints than that it looks at them all.
//
// It holds the READY set itself, not a copy, so it stays good while endpoints
// come and go; there is a new picker for a new config.
type picker struct {
	policy *policy
	config *config
	metric load.Metric
	ready  *readySet

	// remembered holds the least loaded of the last pick, config.memory of them.
	// Goroutines that pick at the same time overwrite each other's, which does no
	// harm: any of them is a good candidate. One that is not READY any more is
	// taken out, and is not picked even if a late write puts it back.
	remembered [maxMemory]atomic.Pointer[candidate]

	// idle is in how many rounds of the endpoints picks saw nothing in flight, up to
	// idleRounds. Where many cores pick it stays what it is, so they do not write it.
	idle atomic.Uint32
}

// now reads the clock, for a metric that has use for the time. Reading it twice is
// half of what a pick by pendingRequests would cost.
func (p *picker) now() load.Instant {
	if p.config.timeless {
		return 0
	}
	return load.Instant(p.policy.now())
}

// Pick implements balancer.Picker.
func (p *picker) Pick(info balancer.PickInfo) (balancer.PickResult, error) {
	b := p.policy
	var tried *attempt.Tried
	var track *tracker
	a := attempt.FromContext(info.Ctx, info.FullMethodName, b.target, b.id)
	if a != nil {
		tried = a.Tried
		track, _ = a.Tracker.(*tracker)
	}
	now := p.now()
	call := call{stream: track != nil && track.stream}
	if !p.config.classless {
		call.class = p.metric.Class(info.FullMethodName, call.stream)
	}
	var c *candidate
	if p.config.accrual != nil && b.offers.Load() != nil {
		c = b.trial(tried)
	}
	trial := c != nil
	if !trial && tried != nil && !tried.Empty() {
		c = p.chooseAgain(now, call, tried)
	}
	switch {
	case c != nil:
	case p.config.twoExact && !p.ready.unequal.Load():
		c = p.chooseOfTwo(now, call)
	default:
		c = p.chooseAny(now, call)
	}
	if c == nil { // What was drawn has left meanwhile.
		if c = p.ready.first(); c == nil {
			// The last one has just left; the channel hears of it next.
			return balancer.PickResult{}, balancer.ErrNoSubConnAvailable
		}
	}
	child := c.child.Load()
	if child.ConnectivityState != connectivity.Ready {
		// It has just left. The channel gets a new picker, and then it picks again.
		return balancer.PickResult{}, balancer.ErrNoSubConnAvailable
	}
	limited := p.config.limited()
	if limited && !(trial && c.take()) {
		var err error
		if c, now, err = p.hold(info.Ctx, c, now, track, tried); err != nil {
			return balancer.PickResult{}, err
		}
		child = c.child.Load()
	}
	result, err := child.Picker.Pick(info)
	if err != nil {
		if limited {
			c.untake()
			b.queue.admit(c)
		}
		return result, err
	}

	if a != nil {
		a.Own(b.id)
	}
	var k *pick
	var h *handle
	if track != nil {
		k, h = track.pick(), b.handles.Get().(*handle)
		h.pick = k
	} else {
		k = b.picks.Get().(*pick)
		h = &k.handle
		if k.uses++; k.uses&(k.uses-1) == 0 { // seldom, as it may take a while
			b.untracked(info.FullMethodName)
		}
	}
	k.picker, k.candidate, k.meter, k.ctx, k.tried, k.inner = p, c, c.meter.Load(), info.Ctx, tried, result.Done
	if p.config.timeless && !k.meter.timeless { // the metric has just changed
		now = k.now()
	}
	k.row = c.run.row()
	if p.config.slow() {
		k.began = load.Instant(b.now())
	}
	if !k.meter.quiet {
		a := &k.attempt
		a.Method, a.Stream = info.FullMethodName, call.stream
		c.fill(&a.Query, p, now, call.class)
		if limited {
			a.InFlight = max(a.InFlight-1, 0) // Its own is counted.
		}
		k.sample.Ticket = k.meter.Start(a)
	}
	c.picked(limited)
	if limited {
		k.begin()
	}
	if track != nil {
		track.begin(k)
		if b.conn.Load() == nil && track.conn != nil {
			b.conn.Store(track.conn)
		}
	}
	b.metrics.picked()
	if p.config.zones != nil && p.isAway(c) {
		b.metrics.pickedAway()
	}
	if tried != nil {
		if tried.Has(k.meter.id) {
			b.metrics.pickedTried()
		}
		tried.Add(k.meter.id)
	}
	result.Done = h.done
	return result, nil
}

// call is what the choice of an endpoint depends on besides the endpoints.
type call struct {
	class  load.Class
	stream bool
}

// chooseAny returns the candidate to pick, nil if no endpoint is READY.
func (p *picker) chooseAny(now load.Instant, call call) *candidate {
	v := p.ready.view()
	n, d, m := len(v.slots), p.config.choices, p.config.memory
	switch n {
	case 0:
		return nil
	case 1:
		return v.slots[0].Load()
	}
	s := selection{picker: p, call: call, random: random(p.policy.random())}
	switch {
	case p.ready.unequal.Load():
		for range d {
			s.add(v.slots[v.draw(&s.random)].Load())
		}
	case n <= d+m:
		for i := range v.slots {
			s.add(v.slots[i].Load())
		}
		m = 0 // it has seen them all
	default:
		if m > 0 && p.idle.Load() >= idleRounds {
			d = min(d, restChoices)
		}
		// d distinct indexes by Floyd's algorithm (Bentley, "Programming Pearls: a
		// sample of brilliance", CACM 1987): d random numbers, whatever n.
		var index [maxChoices]uint32
		var taken uint64 // the indexes modulo 64
		r, bits, count := s.random, uint64(0), 0
		for i := range uint32(d) {
			// One random number is enough for two indexes, with a bias below n/2^32.
			if bits <<= 32; i&1 == 0 {
				bits = r.next()
			}
			last := uint32(n-d) + i
			k := uint32(bits >> 32 * uint64(last+1) >> 32)
			again := taken>>(k&63)&1 != 0
			if n > 64 && again { // in this order: the first is foreseen
				again = slices.Contains(index[:i], k)
			}
			if again {
				k = last
			}
			index[i] = k
			taken |= 1 << (k & 63)
		}
		for _, k := range index[:d] {
			if c := v.slots[k].Load(); c != nil {
				s.seen[count] = c
				count++
			}
		}
		s.random, s.count = r, count
	}
	if p.config.zones != nil {
		s.drawHome(v)
	}
	s.drawn = s.count
	for i := range m {
		if c := p.remembered[i].Load(); c != nil && c.slot.Load() != notReady {
			s.add(c) // It may be among the drawn, which does no harm.
		}
	}
	best := s.choose(now)
	if m > 0 {
		p.rememberCheapest(&s, m)
	}
	return best
}

// chooseOfTwo is the power of two choices among endpoints of one weight, by costs
// without an error: chooseAny without what more needs.
func (p *picker) chooseOfTwo(now load.Instant, call call) *candidate {
	slots := p.ready.view().slots
	switch len(slots) {
	case 0:
		return nil
	case 1:
		return slots[0].Load()
	}
	// One random number is enough for both indexes: each takes a half of it, with
	// a bias below n/2^32.
	u := p.policy.random()
	i := uint32(u >> 32 * uint64(len(slots)) >> 32)
	j := uint32(u & math.MaxUint32 * uint64(len(slots)-1) >> 32)
	if j >= i {
		j++
	}
	a, b := slots[i].Load(), slots[j].Load()
	if a == nil || b == nil {
		if a == nil {
			return b
		}
		return a
	}
	r := random(u)
	la, lb := a.look(p, now), b.look(p, now)
	if max(la, lb) >= avoided && p.config.exploreEvery > 0 && r.below(p.config.exploreEvery) == 0 {
		la, lb = lb, la
	}
	if call.stream && max(la, lb) <= min(la, lb)*(1+equalStreams) {
		la, lb = float32(a.open()), float32(b.open())
	}
	switch {
	case la < lb:
		return a
	case lb < la:
		return b
	}
	if r.next()&1 == 0 {
		return a
	}
	return b
}

// rest reports whether the channel has nothing in flight, as far as its picks see. One pick
// looks at some of its endpoints, so it takes several to tell, and with many endpoints
// not each of them is counted.
func (p *picker) rest(s *selection, busy bool) bool {
	idle := p.idle.Load()
	switch {
	case busy && idle != 0:
		p.idle.Store(0)
	case busy:
	case idle >= idleRounds:
		return true
	default:
		round := uint32(int(p.ready.size.Load())+s.count-1) / uint32(s.count)
		if round <= 1 || s.random.below(round) == 0 {
			p.idle.Store(idle + 1)
		}
	}
	return false
}

// idleRounds is how many times as many endpoints as there are the picks in a row that saw
// nothing in flight have to look at, on average.
const idleRounds = 4

// restChoices is how many endpoints a pick draws at most while the channel is at rest. More only
// help to find one with less in flight. The cheapest are remembered.
const restChoices = 4

// rememberCheapest makes the next pick look again at the m cheapest of this one.
func (p *picker) rememberCheapest(s *selection, m int) {
	var last *candidate
	rank := uint64(0)
	for i := 0; i < m; {
		var c *candidate
		if next := s.least(rank); next != noRank {
			c, rank = s.seen[uint32(next)], next+1
			if c == last {
				continue // It was drawn twice.
			}
		}
		if p.remembered[i].Load() != c {
			p.remembered[i].Store(c)
		}
		last = c
		i++
	}
}

// remember takes over what another picker of the same READY set remembers.
func (p *picker) remember(old *picker) {
	p.idle.Store(old.idle.Load())
	for i := range p.config.memory {
		p.remembered[i].Store(old.remembered[i].Load())
	}
}

// forget no longer remembers a candidate.
func (p *picker) forget(c *candidate) {
	for i := range p.remembered {
		p.remembered[i].CompareAndSwap(c, nil)
	}
}

// pick is an attempt in flight, from Pick to Done and, where a tracker has more
// to say, to the end of the call. Without a tracker it comes from a pool.
type pick struct {
	handle handle     // unless it is a tracker's
	pool   *sync.Pool // where it belongs, if not to a tracker

	picker    *picker
	candidate *candidate
	meter     *measure // that was told of the start
	ctx       context.Context
	tried     *attempt.Tried
	inner     func(balancer.DoneInfo) // the child's Done
	uses      uint32                  // how many attempts without a tracker it was
	trailer   metadata.MD             // of the attempt
	report    load.Report             // in the trailer
	reported  bool                    // there is one

	// What the meter is told: the start, of which the end needs the ticket, and the end.
	attempt load.Attempt
	sample  load.Sample

	// Of a pick that is a sample for the limit of its endpoint.
	limit *foundLimit // nil if it is none
	began load.Instant
	mark  uint8

	row uint32 // see run; began is set, too

	// Of a pick with a tracker.
	track  *tracker
	state  atomic.Uint32
	doneAt load.Instant // when Done was called, before pickAwaiting is set
}

// Bits of pick.state. They are only ever set.
const (
	pickResponded = 1 << iota // the first response has been seen
	pickAwaiting              // Done was called with a nil error: the true one comes from the tracker
	pickFinished              // the meter has been told
	pickAnswered              // the first message of a stream has arrived
)

// handle is what grpc calls when an attempt is done. Its method value is made once, which
// saves each pick an allocation: a pooled pick has a handle of its own, and a tracker's
// takes one from a pool of handles.
type handle struct {
	done func(balancer.DoneInfo) // its onDone
	pick *pick
	pool *sync.Pool // of handles
}

// onDone is called by grpc exactly once for each pick.
func (h *handle) onDone(info balancer.DoneInfo) {
	k := h.pick
	if h.pool != nil {
		h.pick = nil
		h.pool.Put(h)
	}
	k.onDone(info)
}

func (k *pick) onDone(info balancer.DoneInfo) {
	if k.inner != nil {
		k.inner(info)
	}
	k.trailer = info.Trailer
	if info.ServerLoad != nil {
		k.report, k.reported = reportOf(info.ServerLoad)
	}
	now := k.now()
	switch {
	case info.Err == nil && info.BytesSent && k.track == nil: // as classify would say
		k.finish(now, load.Completed, nil)
	case !info.BytesSent:
		outcome := classifyUnsent(k.ctx, info, k.picker.config.failures)
		if outcome == load.NotSent && k.tried != nil {
			k.tried.Remove(k.meter.id)
		}
		k.finish(now, outcome, info.Err)
	case info.Err == nil && k.track != nil:
		k.doneAt = now
		k.track.await(k)
	default:
		outcome := classifyDone(k.ctx, info, k.state.Load()&pickResponded != 0, k.picker.config.failures)
		if outcome == load.NotSent && k.tried != nil {
			k.tried.Remove(k.meter.id)
		}
		k.finish(now, outcome, info.Err)
	}
}

// now reads the clock, if the meter has use for the time.
func (k *pick) now() load.Instant {
	if k.meter.timeless {
		return 0
	}
	return load.Instant(k.picker.policy.now())
}

// respond says that the first response of a stream has arrived. Headers are one, but no
// answer yet: a server may send them, and then fail the call.
func (k *pick) respond() {
	if k.state.CompareAndSwap(0, pickResponded) {
		k.meter.Respond(load.Response{Now: k.now(), Ticket: k.sample.Ticket})
		k.candidate.tally.add(oneStream - oneAttempt)
		k.candidate.changed()
	}
}

// message says that the first message of a stream has arrived.
func (k *pick) message() {
	k.answered()
	if k.picker.config.accrual != nil && k.state.Or(pickAnswered)&(pickAnswered|pickFinished) == 0 {
		k.accrue(load.Completed, nil)
	}
}

// pushback makes the endpoint dearer for as long as the server asked for when it failed the
// attempt, and returns that.
func (k *pick) pushback(err error) time.Duration {
	after := min(attempt.WishOf(err, k.trailer).After, mostPushback)
	if after > 0 {
		k.meter.pushback.Store(k.picker.policy.now() + int64(after))
	}
	return after
}

// finish tells the meter, once, how an attempt ended. err is for people to look at, and for
// the limit of the endpoint.
func (k *pick) finish(now load.Instant, o load.Outcome, err error) {
	var before uint32 // bits of the state
	if k.track != nil {
		if before = k.state.Or(pickFinished); before&pickFinished != 0 {
			return
		}
	}
	responded := before&pickResponded != 0
	switch {
	case o == load.Completed:
		k.answered()
	case o == load.Failed:
		k.meter.failed(load.Instant(k.picker.policy.now()), err)
	case (o == load.Cancelled || o == load.NotSent) && !responded:
		k.picker.policy.metrics.sampleDropped(o)
	}
	if k.meter.learns(o) || k.reported {
		k.tell(now, o, err, responded)
	}
	if k.limit != nil {
		k.limit.end(k, o, err)
	}
	if accrual := k.picker.config.accrual; accrual != nil && before&pickAnswered == 0 {
		// An answer changes nothing as a rule.
		if o != load.Completed || err != nil || accrual.slow > 0 || !k.candidate.run.quiet() {
			k.accrue(o, err)
		}
	}
	if responded {
		k.candidate.tally.add(-oneStream)
		k.candidate.changed()
	} else {
		k.candidate.tally.add(-oneAttempt)
	}
	k.picker.policy.queue.admit(k.candidate)
	if k.track == nil {
		k.picker, k.candidate, k.meter, k.ctx, k.tried, k.inner, k.trailer, k.limit = nil, nil, nil, nil, nil, nil, nil, nil
		if k.reported {
			k.report, k.reported = load.Report{}, false
		}
		k.pool.Put(k)
	}
}

// answered notes that the server has answered an attempt.
func (k *pick) answered() {
	if k.meter.note(everAnswered) {
		k.candidate.changed()
		if k.meter.health.Load()&everFailed != 0 {
			k.meter.judge()
		}
	}
}

// tell tells the meter how the attempt ended.
func (k *pick) tell(now load.Instant, o load.Outcome, err error, responded bool) {
	s := &k.sample
	s.Now, s.Outcome, s.Responded, s.Report, s.InFlight, s.Pushback = now, o, responded, nil, 0, 0
	if err != nil && o != load.NotSent {
		s.Pushback = k.pushback(err)
	}
	if k.reported {
		attempts, _ := k.candidate.tally.read()
		if !responded {
			attempts = max(attempts-1, 0)
		}
		s.Report, s.InFlight = &k.report, attempts
	}
	if k.meter.Finish(s) || o != load.Completed {
		k.candidate.changed()
	}
	if k.meter.timeless && o != load.Completed {
		k.meter.note(everGivenUp)
		k.candidate.detail.Store(special)
	}
}

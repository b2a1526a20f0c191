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

// This file is the hot path: Pick, and Done. It takes no lock and allocates nothing, except
// where a call waits for an endpoint with room and where an attempt fails.

// picker picks the cheapest of a few READY endpoints: config.choices of them at random, and
// config.memory of them that were the cheapest at the last pick. With no more endpoints than
// both together it looks at all of them.
//
// It uses the READY set itself, not a copy, so it stays valid when endpoints come and go.
// Only a new config makes a new picker.
type picker struct {
	policy *policy
	config *config
	metric load.Metric
	ready  *readySet

	// remembered holds the config.memory cheapest candidates of the last pick. Goroutines
	// that pick at the same time overwrite those of each other. That does no harm, because
	// all of them are good candidates. One that leaves the READY set is removed. If a late
	// write puts it back, it is still not picked.
	remembered [maxMemory]atomic.Pointer[candidate]

	// idle counts the rounds, up to idleRounds, in which picks saw nothing in flight. A round
	// is as many endpoints looked at as there are. Under load it stays 0, so that cores do
	// not write it.
	idle atomic.Uint32
}

// now returns the time, or 0 for a metric that does not use it. To read the clock twice would
// be half of the cost of a pick with pendingRequests.
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
	if c == nil { // the drawn endpoints have left the READY set meanwhile
		if c = p.ready.first(); c == nil {
			// The last endpoint has just left. The channel gets a new picker next.
			return balancer.PickResult{}, balancer.ErrNoSubConnAvailable
		}
	}
	child := c.child.Load()
	if child.ConnectivityState != connectivity.Ready {
		// It is not READY any more. The channel gets a new picker, and picks again.
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
		if k.uses++; k.uses&(k.uses-1) == 0 { // seldom, because untracked may take long
			b.untracked(info.FullMethodName)
		}
	}
	k.picker, k.candidate, k.meter, k.ctx, k.tried, k.inner = p, c, c.meter.Load(), info.Ctx, tried, result.Done
	if p.config.timeless && !k.meter.timeless { // a new config has just replaced the metric
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
			a.InFlight = max(a.InFlight-1, 0) // take has counted this attempt
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

// call is the properties of a call on which the choice of an endpoint depends.
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
		m = 0 // all endpoints are looked at
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
			if n > 64 && again { // in this order, because the processor predicts the first condition
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
			s.add(c) // it may have been drawn too, which does no harm
		}
	}
	best := s.choose(now)
	if m > 0 {
		p.rememberCheapest(&s, m)
	}
	return best
}

// chooseOfTwo is chooseAny for two choices, no memory, equal weights and costs without
// errors, which needs less work.
func (p *picker) chooseOfTwo(now load.Instant, call call) *candidate {
	slots := p.ready.view().slots
	switch len(slots) {
	case 0:
		return nil
	case 1:
		return slots[0].Load()
	}
	// One random number is enough for both indexes: each uses half of its bits, with a
	// bias below n/2^32.
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

// rest reports whether the channel is at rest: nothing is in flight, as far as its picks see.
// busy is whether this pick saw something in flight. One pick looks at some of the endpoints,
// so several picks decide. Only one pick in a round is counted, at random.
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

// idleRounds is how many rounds in a row without anything in flight are a rest, on average.
const idleRounds = 4

// restChoices is how many endpoints a pick with a memory draws at most while the channel is at
// rest. More draws would only help to find an endpoint with less in flight, and there is nothing
// in flight. The cheapest endpoints are remembered.
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
				continue // the same candidate a second time
			}
		}
		if p.remembered[i].Load() != c {
			p.remembered[i].Store(c)
		}
		last = c
		i++
	}
}

// remember copies what the picker of the config before remembers.
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

// pick is an attempt in flight, from Pick to Done, or with a tracker to the end of the call
// if that is later. Without a tracker it comes from a pool.
type pick struct {
	handle handle     // used without a tracker
	pool   *sync.Pool // of the pick; nil with a tracker

	picker    *picker
	candidate *candidate
	meter     *measure // of the candidate when it was picked
	ctx       context.Context
	tried     *attempt.Tried
	inner     func(balancer.DoneInfo) // the child's Done
	uses      uint32                  // how often it was used for an attempt, without a tracker
	trailer   metadata.MD             // of the attempt
	report    load.Report             // of the server, from the trailer
	reported  bool                    // whether there is a report

	// The arguments of Start and Finish of the meter.
	attempt load.Attempt
	sample  load.Sample

	began load.Instant // set for a sample of a limit, and if slow endpoints are put aside
	row   uint32       // the row in which the attempt was sent, see run

	// Of a pick that is a sample for the limit of its endpoint.
	limit *foundLimit // nil if the pick is not a sample
	mark  uint8

	// Of a pick with a tracker.
	track  *tracker
	state  atomic.Uint32
	doneAt load.Instant // when Done was called; set before pickAwaiting
}

// Bits of pick.state. They are only ever set.
const (
	pickResponded = 1 << iota // the first response has arrived
	pickAwaiting              // Done was called with a nil error; the true one comes from the tracker
	pickFinished              // the end of the attempt is counted
	pickAnswered              // the first message of a stream has arrived
)

// handle holds the function that gRPC calls when an attempt is done. The method value is made
// once for each handle, which saves an allocation at each pick. A pooled pick has a handle of
// its own. A pick of a tracker takes one from a pool of handles.
type handle struct {
	done func(balancer.DoneInfo) // its onDone
	pick *pick
	pool *sync.Pool // of handles
}

// onDone is called by gRPC exactly once for each pick.
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
	case info.Err == nil && info.BytesSent && k.track == nil: // classify would return the same
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

// now returns the time, or 0 for a meter that does not use it.
func (k *pick) now() load.Instant {
	if k.meter.timeless {
		return 0
	}
	return load.Instant(k.picker.policy.now())
}

// respond is called when the first response of a stream arrives. Headers are a response, but
// not an answer: a server may send them and then fail the call.
func (k *pick) respond() {
	if k.state.CompareAndSwap(0, pickResponded) {
		k.meter.Respond(load.Response{Now: k.now(), Ticket: k.sample.Ticket})
		k.candidate.tally.add(oneStream - oneAttempt)
		k.candidate.changed()
	}
}

// message is called when the first message of a stream arrives.
func (k *pick) message() {
	k.answered()
	if k.picker.config.accrual != nil && k.state.Or(pickAnswered)&(pickAnswered|pickFinished) == 0 {
		k.accrue(load.Completed, nil)
	}
}

// pushback reads from the end of the attempt for how long the server asked not to be called,
// and returns that time. The endpoint costs more until then.
func (k *pick) pushback(err error) time.Duration {
	after := min(attempt.WishOf(err, k.trailer).After, mostPushback)
	if after > 0 {
		k.meter.pushback.Store(k.picker.policy.now() + int64(after))
	}
	return after
}

// finish counts the end of an attempt, once, with the meter, the limit and the accrual of the
// endpoint. err is the error of the attempt.
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
		// As a rule an answer changes nothing.
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

// answered notes that the endpoint has answered an attempt.
func (k *pick) answered() {
	if k.meter.note(everAnswered) {
		k.candidate.changed()
		if k.meter.health.Load()&everFailed != 0 {
			k.meter.judge()
		}
	}
}

// tell calls Finish of the meter.
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

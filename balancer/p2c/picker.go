// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package p2c

import (
	"context"
	"math"
	"math/bits"
	"sync"
	"sync/atomic"

	"google.golang.org/grpc/balancer"

	"github.com/belfry-go/belfry/internal/attempt"
	"github.com/belfry-go/belfry/load"
)

// This file is the hot path: Pick, and Done. It takes no lock, and allocates
// nothing.

// candidate is what a pick needs of a READY endpoint, together in one cache line.
// It is immutable but for slot: when the endpoint's weight changes, or its child
// reports anew, another takes its place.
type candidate struct {
	meter  load.Meter
	child  balancer.Picker
	tally  *tally       // the endpoint's
	id     uint64       // the endpoint's
	weight load.Weight  // at least 1
	slot   atomic.Int32 // in the READY set, or notReady
	_      [8]byte
}

// newCandidate makes the candidate of a READY endpoint. The caller holds
// policy.mu.
func newCandidate(ep *endpoint) *candidate {
	c := &candidate{meter: ep.meter, child: ep.reported.Load().Picker, tally: &ep.tally, id: ep.id, weight: max(ep.weight, 1)}
	c.slot.Store(notReady)
	return c
}

// load returns what the meter says of the endpoint now.
func (c *candidate) load(now load.Instant) load.Estimate { return c.meter.Load(c.query(now)) }

func (c *candidate) query(now load.Instant) load.Query {
	attempts, streams := c.tally.read()
	return load.Query{Now: now, InFlight: attempts, Streams: streams, Weight: 1}
}

// tally counts what is in flight to an endpoint, exactly: the attempts, and by
// themselves the open streams, which have had a response.
//
// It also holds the limit of the endpoint, see limit.go.
type tally struct {
	word  atomic.Int64
	most  atomic.Int64               // how many may be in flight together
	found atomic.Pointer[foundLimit] // the algorithm that finds most; nil if none does
}

const (
	oneAttempt = 1
	oneStream  = 1 << 32
)

func (t *tally) add(n int64) { t.word.Add(n) }

// read returns the attempts in flight and the open streams.
func (t *tally) read() (attempts, streams int) {
	// Between the response and the end of a stream that both come at this moment,
	// one of the counts may be below zero.
	w := t.word.Load()
	attempts = int(int32(w))
	return max(attempts, 0), max(int((w-int64(attempts))>>32), 0)
}

// picker picks the least loaded of a few READY endpoints: config.choices of them
// at random, and those that were the least loaded at the last pick.
//
// It holds the READY set itself, not a copy, so it stays good while endpoints
// come and go; there is a new picker for a new config.
type picker struct {
	policy *policy
	config *config
	ready  *readySet

	// remembered holds the least loaded of the last pick, config.memory of them.
	// Goroutines that pick at the same time overwrite each other's, which does no
	// harm: any of them is a good candidate. One that is not READY any more is
	// taken out, and is not picked even if a late write puts it back.
	remembered [maxMemory]atomic.Pointer[candidate]
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
	var c *candidate
	if tried != nil && !tried.Empty() {
		c = p.chooseAgain(now, tried)
	}
	switch {
	case c != nil:
	case p.config.choices == 2 && p.config.memory == 0:
		c = p.chooseOfTwo(now)
	default:
		c = p.chooseAny(now)
	}
	if c == nil {
		// The last one has just left; the channel hears of it next.
		return balancer.PickResult{}, balancer.ErrNoSubConnAvailable
	}
	if c.slot.Load() == notReady {
		// It has just left, or another stands in its place. The channel gets a new
		// picker, and then it picks again.
		return balancer.PickResult{}, balancer.ErrNoSubConnAvailable
	}
	limited := p.config.limit != nil
	if limited {
		var err error
		if c, now, err = p.hold(c, now, info.Ctx, track, tried); err != nil {
			return balancer.PickResult{}, err
		}
	}
	result, err := c.child.Pick(info)
	if err != nil {
		if limited {
			c.tally.add(-oneAttempt)
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
	k.picker, k.candidate, k.ctx, k.tried, k.inner = p, c, info.Ctx, tried, result.Done
	query := c.query(now)
	if limited {
		query.InFlight = max(query.InFlight-1, 0) // Its own is counted.
		k.begin(now)
	} else {
		c.tally.add(oneAttempt)
	}
	k.ticket = c.meter.Start(load.Attempt{Query: query, Method: info.FullMethodName, Stream: track != nil && track.stream})
	if track != nil {
		track.begin(k)
	}
	b.metrics.picked()
	if tried != nil {
		if tried.Has(c.id) {
			b.metrics.pickedTried()
		}
		tried.Add(c.id)
	}
	result.Done = h.done
	return result, nil
}

// chooseAny returns the candidate to pick, nil if no endpoint is READY.
func (p *picker) chooseAny(now load.Instant) *candidate {
	slots := p.ready.view()
	n, d, m := len(slots), p.config.choices, p.config.memory
	if n == 1 {
		return slots[0].Load()
	}
	s := selection{random: random(p.policy.random())}
	if n <= d {
		for i := range slots {
			s.look(slots[i].Load())
		}
		return s.least(now)
	}

	// d distinct indexes by Floyd's algorithm (Bentley, "Programming Pearls: a
	// sample of brilliance", CACM 1987): d random numbers, whatever n.
	var index [maxChoices]uint32
	for i := range d {
		last := uint32(n - d + i)
		k := s.random.below(last + 1)
		for _, earlier := range index[:i] {
			if earlier == k {
				k = last
				break
			}
		}
		index[i] = k
		s.look(slots[k].Load())
	}
	if m == 0 {
		return s.least(now)
	}
	for i := range m {
		if c := p.remembered[i].Load(); c != nil && c.slot.Load() != notReady && !s.looksAt(c) {
			s.look(c)
		}
	}
	best := s.least(now)
	for i, c := range s.leastOf(m) {
		if p.remembered[i].Load() != c {
			p.remembered[i].Store(c)
		}
	}
	return best
}

// chooseOfTwo is the power of two choices: chooseAny without what more choices
// and memory need.
func (p *picker) chooseOfTwo(now load.Instant) *candidate {
	slots := p.ready.view()
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
	// Both are fetched before the first is measured: see selection.
	wa, wb := a.weight, b.weight
	la, lb := a.load(now).Cost, b.load(now).Cost
	if wa != wb {
		la, lb = wa.Divide(la), wb.Divide(lb)
	}
	if la != lb {
		if la < lb {
			return a
		}
		return b
	}
	r := random(u)
	if r.float()*(float64(wa)+float64(wb)) < float64(wa) {
		return a
	}
	return b
}

// chooseAgain is chooseAny for a call that has tried endpoints, without memory. It looks
// at as many others, and at those on its way that the call has tried. The least loaded of
// these is chosen if it still is the least loaded at dearer times its load, and the call
// has not returned to it before: an endpoint that hangs may look cheap for long beside one
// whose streams last, and all attempts would go to it.
func (p *picker) chooseAgain(now load.Instant, tried *attempt.Tried) *candidate {
	slots := p.ready.view()
	n, d := len(slots), p.config.choices
	if n == 0 {
		return nil
	}
	r := random(p.policy.random())
	others, before := selection{random: r}, selection{random: r}
	look := func(c *candidate) {
		s := &others
		if c != nil && tried.Has(c.id) {
			s = &before
		}
		if s.count < d && !s.looksAt(c) {
			s.look(c)
		}
	}
	// Few endpoints are tried, so a few draws more than d find d others. Where
	// there are hardly any, all are looked at. With few endpoints the tried ones are met.
	few := n <= 2*d
	if !few {
		for i := 0; i < 2*d && others.count < d; i++ {
			look(slots[others.random.below(uint32(n))].Load())
		}
	}
	first := int(others.random.below(uint32(n)))
	for i := 0; i < n && (few || others.count < d); i++ {
		look(slots[(first+i)%n].Load())
	}
	c, back := others.least(now), before.least(now)
	if c == nil || back != nil && tried.Times(back.id) == 1 && p.price(back, now, dearer) < p.price(c, now, 1) {
		return back
	}
	return c
}

// dearer is how many times as much an endpoint costs a call that has tried it. Simulated
// in virtual time, two endpoints, retries at once, calls of 10 ms in the mean:
//
//   - One fails at once, and looks idle to pendingRequests. Of 6,000 calls with three
//     attempts 2,460 fail at a factor of 1, 276 at 4, 19 at 8, 4 at 10 and none if it is
//     never picked again. The default metric needs none.
//   - Each fails a tenth, and one is 15 times slower. The mean latency by the default
//     metric is 19 ms at 1, 26 at 4, 32 at 8, 34 at 10, and 52 if the call never goes back.
const dearer = 10

// price returns the load of a candidate times a factor. By pendingRequests an idle endpoint
// counts as one with an attempt in flight, because it would cost nothing however dear.
func (p *picker) price(c *candidate, now load.Instant, factor float64) float64 {
	l := c.load(now).Cost
	if p.config.counts {
		l = max(l, 1)
	}
	return c.weight.Divide(l) * factor
}

// remember takes over what another picker of the same READY set remembers.
func (p *picker) remember(old *picker) {
	for i := range p.config.memory {
		p.remembered[i].Store(old.remembered[i].Load())
	}
}

// remind remembers another candidate, or none, in the place of old.
func (p *picker) remind(old, c *candidate) {
	for i := range p.remembered {
		p.remembered[i].CompareAndSwap(old, c)
	}
}

// selection is the candidates that one pick looks at, and finds the least loaded
// of them. It works in passes, first gathering, then measuring, then comparing:
// with many endpoints each is a miss in the cache, and so the processor fetches
// them side by side, where a comparison after each would make it wait.
type selection struct {
	random random
	count  int
	seen   [maxChoices + maxMemory]*candidate
	loads  [maxChoices + maxMemory]float64
}

// look adds a candidate, unless it is nil.
func (s *selection) look(c *candidate) {
	if c != nil {
		s.seen[s.count] = c
		s.count++
	}
}

// looksAt reports whether the candidate was added.
func (s *selection) looksAt(c *candidate) bool {
	for _, other := range s.seen[:s.count] {
		if other == c {
			return true
		}
	}
	return false
}

// least measures the candidates and returns the least loaded, nil if there are
// none. Of equal ones each is chosen with a probability in proportion to its
// weight, never by the order in which they were added.
func (s *selection) least(now load.Instant) *candidate {
	for i, c := range s.seen[:s.count] {
		l := c.load(now).Cost
		if c.weight != 1 {
			l = c.weight.Divide(l)
		}
		s.loads[i] = l
	}
	var best *candidate
	var bestLoad, equals float64 // equals is the sum of the weights of the equal ones
	for i, c := range s.seen[:s.count] {
		switch l := s.loads[i]; {
		case best == nil || l < bestLoad:
			best, bestLoad, equals = c, l, 0
		case l == bestLoad:
			if equals == 0 {
				equals = float64(best.weight)
			}
			w := float64(c.weight)
			equals += w
			if s.random.float()*equals < w {
				best = c
			}
		}
	}
	return best
}

// leastOf returns the m least loaded of the measured candidates, nil where there
// are fewer. It reorders the selection.
func (s *selection) leastOf(m int) []*candidate {
	for i := range min(m, s.count) {
		k := i
		for j := i + 1; j < s.count; j++ {
			if s.loads[j] < s.loads[k] {
				k = j
			}
		}
		s.seen[i], s.seen[k] = s.seen[k], s.seen[i]
		s.loads[i], s.loads[k] = s.loads[k], s.loads[i]
	}
	return s.seen[:m]
}

// random is a generator for one pick: SplitMix64 (Steele, Lea, Flood, "Fast
// splittable pseudorandom number generators", OOPSLA 2014), seeded by one number
// of the policy's source.
type random uint64

func (r *random) next() uint64 {
	*r += 0x9e3779b97f4a7c15
	z := uint64(*r)
	z = (z ^ z>>30) * 0xbf58476d1ce4e5b9
	z = (z ^ z>>27) * 0x94d049bb133111eb
	return z ^ z>>31
}

// below returns a number in [0, n). The bias is below n/2^64.
func (r *random) below(n uint32) uint32 {
	hi, _ := bits.Mul64(r.next(), uint64(n))
	return uint32(hi)
}

// float returns a number in [0, 1).
func (r *random) float() float64 { return float64(r.next()>>11) / (1 << 53) }

// pick is an attempt in flight, from Pick to Done and, where a tracker has more
// to say, to the end of the call. Without a tracker it comes from a pool.
type pick struct {
	handle handle     // unless it is a tracker's
	pool   *sync.Pool // where it belongs, if not to a tracker

	picker    *picker
	candidate *candidate
	ticket    load.Ticket
	ctx       context.Context
	tried     *attempt.Tried
	inner     func(balancer.DoneInfo) // the child's Done
	uses      uint32                  // how many attempts without a tracker it was

	// Of a pick that is a sample for the limit of its endpoint.
	limit *foundLimit // nil if it is none
	began load.Instant
	mark  uint8

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
	now := k.picker.now()
	switch {
	case info.Err == nil && info.BytesSent && k.track == nil: // as classify would say
		k.finish(now, load.Completed, nil)
	case !info.BytesSent:
		outcome := classifyUnsent(k.ctx, info, k.picker.config.failures)
		if outcome == load.NotSent && k.tried != nil {
			k.tried.Remove(k.candidate.id)
		}
		k.finish(now, outcome, info.Err)
	case info.Err == nil && k.track != nil:
		k.doneAt = now
		k.track.await(k)
	default:
		outcome := classifyDone(k.ctx, info, k.state.Load()&pickResponded != 0, k.picker.config.failures)
		if outcome == load.NotSent && k.tried != nil {
			k.tried.Remove(k.candidate.id)
		}
		k.finish(now, outcome, info.Err)
	}
}

// respond says that the first response of a stream has arrived.
func (k *pick) respond() {
	if k.state.CompareAndSwap(0, pickResponded) {
		k.candidate.tally.add(oneStream - oneAttempt)
		k.candidate.meter.Respond(load.Response{Now: k.picker.now(), Ticket: k.ticket})
	}
}

// finish tells the meter, once, how an attempt ended with err.
func (k *pick) finish(now load.Instant, o load.Outcome, err error) {
	responded := false
	if k.track != nil {
		old := k.state.Or(pickFinished)
		if old&pickFinished != 0 {
			return
		}
		responded = old&pickResponded != 0
	}
	if !responded && (o == load.Cancelled || o == load.NotSent) {
		k.picker.policy.metrics.sampleDropped(o)
	}
	if k.limit != nil {
		k.limit.end(k, now, o, err)
	}
	if responded {
		k.candidate.tally.add(-oneStream)
	} else {
		k.candidate.tally.add(-oneAttempt)
	}
	k.candidate.meter.Finish(load.Sample{Now: now, Ticket: k.ticket, Outcome: o, Responded: responded})
	k.picker.policy.queue.admit(k.candidate)
	if k.track == nil {
		k.picker, k.candidate, k.ctx, k.tried, k.inner, k.limit = nil, nil, nil, nil, nil, nil
		k.pool.Put(k)
	}
}

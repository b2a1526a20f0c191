// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package p2c

import (
	"cmp"
	"context"
	"math"
	"math/bits"
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

// candidate is what a pick needs of an endpoint, together in one cache line. It
// lives as long as its endpoint. With many endpoints a pick spends its time on
// fetching these lines, so what the meter said is kept in them for a while.
type candidate struct {
	// cost is what the meter said, as a float32, and until which tick it is good, in
	// the lower half. It is 0 if the meter must be asked.
	cost   atomic.Uint64
	detail atomic.Uint64 // the error of the cost and the queue, two float32
	tally  tally
	meter  atomic.Pointer[measure]
	child  atomic.Pointer[balancer.State] // the last report of the endpoint's child
	id     uint64                         // the endpoint's
	heard  atomic.Uint32                  // when the endpoint was heard of last, in heardBits
	weight atomic.Uint32                  // at least 1
	slot   atomic.Int32                   // in the READY set, or notReady
	picks  atomic.Uint32                  // written with tally
}

// measure is a meter and what the policy has to know besides.
type measure struct {
	load.Meter
	timeless bool // it has no use for the time
	room     *room
	// health is what the attempts so far were, of everAnswered and everFailed.
	health atomic.Uint32

	failures atomic.Uint64
	failure  atomic.Pointer[failure]

	// pushback is until when the server asked not to be called, 0 if it did not.
	pushback atomic.Int64
}

const (
	everAnswered = 1 << iota
	everFailed
)

// A failure is how an attempt failed.
type failure struct {
	at  load.Instant
	err error
}

// failed counts a failure, and notes one in 100 ms at most, because that allocates.
func (m *measure) failed(now load.Instant, err error) {
	m.note(everFailed)
	m.failures.Add(1)
	if f := m.failure.Load(); f == nil || time.Duration(now-f.at) >= noteAfter {
		m.failure.Store(&failure{now, err})
	}
}

const noteAfter = 100 * time.Millisecond

// note notes that an attempt was answered, or failed.
func (m *measure) note(what uint32) {
	if h := m.health.Load(); h&everAnswered == 0 && h&what == 0 {
		m.health.Or(what)
	}
}

const (
	// Estimates are good for whole ticks of 131 us, and for a second at most:
	// whoever asks the meter while an attempt starts may keep what was right before.
	tickBits = 17
	mostGood = time.Second

	heardBits = 20

	// An endpoint that has only failed so far costs so many times as much, which is
	// more than any other that has not.
	avoided = 1 << 60
	maxCost = 1e18

	// special is the detail of an endpoint by pendingRequests whose cost may not be
	// what is in flight. As numbers it is no error and no queue.
	special = 1 << 63
)

// tickOf returns the time in ticks. It wraps after six days.
func tickOf(now load.Instant) uint32 { return uint32(uint64(now) >> tickBits) }

func (c *candidate) query(p *picker, now load.Instant, class load.Class) load.Query {
	attempts, streams := c.tally.read()
	return load.Query{Now: now, InFlight: attempts, Streams: streams, Weight: p.ready.relative(c), Class: class}
}

// look returns what one more attempt at the endpoint costs.
func (c *candidate) look(p *picker, now load.Instant) float32 {
	if p.config.counts && c.detail.Load() == 0 && !p.ready.unequal.Load() {
		attempts, _ := c.tally.read()
		return float32(attempts) // as the meter would say
	}
	if w := c.cost.Load(); w != 0 && int32(uint32(w)-tickOf(now)) > 0 {
		return math.Float32frombits(uint32(w >> 32))
	}
	cost, _ := c.ask(p, now, 0)
	return cost
}

// ask asks the meter, and keeps what it says for calls of class 0.
func (c *candidate) ask(p *picker, now load.Instant, class load.Class) (cost float32, detail uint64) {
	m := c.meter.Load()
	e := m.Load(c.query(p, now, class))
	cost = float32(min(e.Cost, maxCost))
	if m.health.Load() == everFailed {
		cost = (1 + cost) * avoided
	}
	if m.pushback.Load() != 0 {
		cost, e.Good = p.pushedBack(m, cost, e.Good)
	}
	detail = uint64(math.Float32bits(float32(e.Error)))<<32 | uint64(math.Float32bits(float32(e.Queue)))
	if class != 0 {
		return cost, detail
	}
	if p.config.counts && (e.Good == 0 || cost >= avoided || m.pushback.Load() != 0) {
		detail = special
	}
	// What did not change is not written: the line is read by all cores.
	if c.detail.Load() != detail {
		c.detail.Store(detail)
	}
	if heard := uint32(uint64(e.Heard) >> heardBits); c.heard.Load() != heard {
		c.heard.Store(heard)
	}
	if e.Good >= 1<<tickBits {
		good := tickOf(now) + uint32(min(e.Good, mostGood)>>tickBits)
		c.cost.Store(uint64(math.Float32bits(cost))<<32 | uint64(good))
	}
	return cost, detail
}

// pushedBack returns the cost of an endpoint that may have asked not to be called, and for
// how long it is good.
func (p *picker) pushedBack(m *measure, cost float32, good time.Duration) (float32, time.Duration) {
	until := m.pushback.Load()
	left := time.Duration(until - p.policy.now())
	if left <= 0 {
		m.pushback.CompareAndSwap(until, 0)
		return cost, good
	}
	if p.config.counts {
		cost++ // an idle endpoint would cost nothing however dear
	}
	if p.config.timeless { // there is no clock by which it would end
		return cost * dearer, 0
	}
	return cost * dearer, min(good, max(left, 1<<tickBits))
}

// mostPushback bounds for how long a server can ask not to be called, because one that is
// mistaken would be lost.
const mostPushback = time.Minute

// changed makes the next pick ask the meter.
func (c *candidate) changed() {
	if c.cost.Load() != 0 {
		c.cost.Store(0)
	}
}

// open returns the open streams and those that wait for their first response or
// any other attempt, per weight.
func (c *candidate) open() float64 {
	attempts, streams := c.tally.read()
	return float64(attempts+streams) / float64(c.weight.Load())
}

// tally counts what is in flight to an endpoint, exactly: the attempts, and by
// themselves the open streams, which have had a response.
type tally struct{ word atomic.Int64 }

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
	metric load.Metric
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
	call := call{stream: track != nil && track.stream}
	if !p.config.classless {
		call.class = p.metric.Class(info.FullMethodName, call.stream)
	}
	var c *candidate
	if tried != nil && !tried.Empty() {
		c = p.chooseAgain(now, call, tried)
	}
	switch {
	case c != nil:
	case p.config.choices == 2 && p.config.memory == 0 && p.config.exact && !p.ready.unequal.Load():
		c = p.chooseOfTwo(now, call)
	default:
		c = p.chooseAny(now, call)
	}
	if c == nil {
		// The last one has just left; the channel hears of it next.
		return balancer.PickResult{}, balancer.ErrNoSubConnAvailable
	}
	child := c.child.Load()
	if child.ConnectivityState != connectivity.Ready {
		// It has just left. The channel gets a new picker, and then it picks again.
		return balancer.PickResult{}, balancer.ErrNoSubConnAvailable
	}
	limited := p.config.limit != nil
	if limited {
		var err error
		if c, now, err = p.hold(info.Ctx, c, now, track, tried); err != nil {
			return balancer.PickResult{}, err
		}
		child = c.child.Load()
	}
	result, err := child.Picker.Pick(info)
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
	k.picker, k.candidate, k.meter, k.ctx, k.tried, k.inner = p, c, c.meter.Load(), info.Ctx, tried, result.Done
	if p.config.timeless && !k.meter.timeless { // the metric has just changed
		now = k.now()
	}
	query := c.query(p, now, call.class)
	if limited {
		query.InFlight = max(query.InFlight-1, 0) // Its own is counted.
		k.begin()
	} else {
		c.tally.add(oneAttempt)
	}
	k.ticket = k.meter.Start(load.Attempt{Query: query, Method: info.FullMethodName, Stream: call.stream})
	c.picks.Add(1)
	c.changed()
	if track != nil {
		track.begin(k)
		if b.conn.Load() == nil && track.conn != nil {
			b.conn.Store(track.conn)
		}
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
	case n <= d:
		for i := range v.slots {
			s.add(v.slots[i].Load())
		}
		s.drawn = s.count
		m = 0 // it has seen them all
	default:
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
			s.add(v.slots[k].Load())
		}
	}
	s.drawn = s.count
	for i := range m {
		if c := p.remembered[i].Load(); c != nil && c.slot.Load() != notReady && !s.has(c) {
			s.add(c)
		}
	}
	best := s.choose(now)
	if m > 0 {
		p.keep(s.leastOf(m))
	}
	return best
}

// keep remembers the candidates for the next pick.
func (p *picker) keep(least []*candidate) {
	for i, c := range least {
		if p.remembered[i].Load() != c {
			p.remembered[i].Store(c)
		}
	}
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

// chooseAgain is chooseAny for a call that has tried endpoints, without memory. It looks
// at as many others, and at those on its way that the call has tried. The least loaded of
// these is chosen if it still is the least loaded at dearer times its load, and the call
// has not returned to it before: an endpoint that hangs may look cheap for long beside one
// whose streams last, and all attempts would go to it.
func (p *picker) chooseAgain(now load.Instant, call call, tried *attempt.Tried) *candidate {
	v := p.ready.view()
	n, d := len(v.slots), p.config.choices
	if n == 0 {
		return nil
	}
	r := random(p.policy.random())
	others, before := selection{picker: p, call: call, random: r}, selection{picker: p, call: call, random: r}
	look := func(c *candidate) {
		s := &others
		if c != nil && tried.Has(c.id) {
			s = &before
		}
		if s.count < d && !s.has(c) {
			s.add(c)
		}
	}
	// Few endpoints are tried, so a few draws more than d find d others. Where
	// there are hardly any, all are looked at. With few endpoints the tried ones are met.
	few := n <= 2*d
	if !few {
		for i := 0; i < 2*d && others.count < d; i++ {
			k := 0
			if p.ready.unequal.Load() {
				k = v.draw(&others.random)
			} else {
				k = int(others.random.below(uint32(n)))
			}
			look(v.slots[k].Load())
		}
	}
	first := int(others.random.below(uint32(n)))
	for i := 0; i < n && (few || others.count < d); i++ {
		look(v.slots[(first+i)%n].Load())
	}
	others.drawn, before.drawn = others.count, before.count
	c, back := others.choose(now), before.choose(now)
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
func (p *picker) price(c *candidate, now load.Instant, factor float32) float32 {
	l := c.look(p, now)
	if p.config.counts {
		l = max(l, 1)
	}
	return l * factor
}

// remember takes over what another picker of the same READY set remembers.
func (p *picker) remember(old *picker) {
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

// selection is the candidates that one pick looks at, and finds the best of them.
// It works in passes, first gathering, then measuring, then comparing: with many
// endpoints each is a miss in the cache, and so the processor fetches them side by
// side, where a comparison after each would make it wait.
type selection struct {
	picker *picker
	call   call
	random random
	count  int
	drawn  int // the first so many are random draws, the others remembered
	seen   [maxChoices + maxMemory]*candidate
	costs  [maxChoices + maxMemory]float32
}

// add adds a candidate, unless it is nil.
func (s *selection) add(c *candidate) {
	if c != nil {
		s.seen[s.count] = c
		s.count++
	}
}

// has reports whether the candidate was added.
func (s *selection) has(c *candidate) bool {
	for _, other := range s.seen[:s.count] {
		if other == c {
			return true
		}
	}
	return false
}

// choose measures the candidates and returns the best, nil if there are none.
//
// Costs that differ by less than three of their errors are equal, up to a limit.
// While none of the candidates has anything in flight, the limit is wide and one of
// the random draws is taken at random: only latencies could tell them apart, and
// these latencies do not. Else the limit is narrow, and the one with the fewest
// attempts in flight is taken, of those the cheapest, or where weights differ and it
// is not idle any. A
// stream goes where the fewest are open.
func (s *selection) choose(now load.Instant) *candidate {
	if s.count == 0 {
		return nil
	}
	p := s.picker
	var queue float32
	best := 0
	if s.call.class == 0 {
		for i, c := range s.seen[:s.count] {
			s.costs[i] = c.look(p, now)
		}
		for i, c := range s.seen[:s.count] {
			queue += math.Float32frombits(uint32(c.detail.Load()))
			if s.costs[i] < s.costs[best] {
				best = i
			}
		}
	} else {
		for i, c := range s.seen[:s.count] {
			var detail uint64
			s.costs[i], detail = c.ask(p, now, s.call.class)
			queue += math.Float32frombits(uint32(detail))
			if s.costs[i] < s.costs[best] {
				best = i
			}
		}
	}
	if every := p.config.exploreEvery; every > 0 && s.random.below(every) == 0 {
		if c := s.unheard(now); c != nil {
			return c
		}
	}

	rest := queue == 0
	limit, errors := p.config.equalUnderLoad, float32(equalErrors)
	if rest {
		limit = p.config.equalAtRest
	}
	weighted := p.ready.unequal.Load()
	if weighted {
		limit, errors = max(limit, equalWeighted), math.MaxFloat32
	}
	if s.call.stream {
		limit, errors = equalStreams, math.MaxFloat32
	}
	var skipped uint32 // bits of candidates
	if weighted && !s.call.stream && !p.config.exact {
		if skipped = s.light(now, queue/float32(s.count)); skipped != 0 {
			var first bool
			if best, skipped, first = s.bestBut(now, best, skipped, limit); first {
				return s.seen[0]
			}
		}
	}
	least := s.costs[best]
	equals := 0
	var bestQueue float32
	var bestOpen float64
	for i, c := range s.seen[:s.count] {
		if (rest || weighted) && i >= s.drawn {
			break
		}
		cost := s.costs[i]
		if cost > least*(1+limit) || skipped>>i&1 != 0 {
			continue
		}
		detail := s.detail(now, c)
		if cost > least*(1+min(limit, errors*math.Float32frombits(uint32(detail>>32)))) {
			continue
		}
		q := math.Float32frombits(uint32(detail))
		open := 0.0
		if s.call.stream {
			open = c.open()
		}
		switch better := compare(open, bestOpen, q, bestQueue); {
		case equals == 0 || better < 0:
			best, bestOpen, bestQueue, equals = i, open, q, 1
		case better > 0:
		case !rest && (!weighted || q == 0) && cost != s.costs[best]:
			if cost < s.costs[best] {
				best, equals = i, 1
			}
		default:
			equals++
			if s.random.below(uint32(equals)) == 0 {
				best = i
			}
		}
	}
	return s.seen[best]
}

// detail returns the error of a candidate's cost and its queue.
func (s *selection) detail(now load.Instant, c *candidate) uint64 {
	if s.call.class != 0 {
		_, detail := c.ask(s.picker, now, s.call.class)
		return detail
	}
	return c.detail.Load()
}

// light returns which of the random draws are idle endpoints of a small weight, as bits.
// queue is what the candidates have in flight per weight, on average.
func (s *selection) light(now load.Instant, queue float32) (bits uint32) {
	for i, c := range s.seen[:s.drawn] {
		attempts, _ := c.tally.read()
		if attempts == 0 && math.Float32frombits(uint32(s.detail(now, c))) == 0 {
			if w := float32(s.picker.ready.relative(c)); w < lightWeight && queue*w < lightQueue {
				bits |= 1 << i
			}
		}
	}
	return bits
}

// bestBut returns the cheapest candidate but for light ones, and which of them do not
// take part: those that are cheaper because they are idle, not because they are faster.
// first says that one that does not is to be picked, because it was drawn first.
func (s *selection) bestBut(now load.Instant, best int, light uint32, limit float32) (_ int, skipped uint32, first bool) {
	heavy := -1
	for i := range s.seen[:s.drawn] {
		if light>>i&1 == 0 && (heavy < 0 || s.costs[i] < s.costs[heavy]) {
			heavy = i
		}
	}
	if heavy < 0 {
		return best, 0, false
	}
	idle := s.costs[heavy] / (1 + math.Float32frombits(uint32(s.detail(now, s.seen[heavy]))))
	for i := range s.seen[:s.drawn] {
		if light>>i&1 != 0 && idle <= s.costs[i]*(1+limit) {
			skipped |= 1 << i
		}
	}
	if skipped != light {
		return best, 0, false
	}
	return heavy, skipped, skipped&1 != 0 && s.costs[0] <= s.costs[heavy]*(1+limit)
}

const (
	// equalErrors is how many standard errors of its cost make an endpoint equal to
	// the cheapest. The cheapest of many is as a rule one or two below what it should
	// be, and the other as much above.
	equalErrors = 3

	// Where weights differ, costs are equal up to so much at least, whatever their
	// error: who gives weights wants shares. With few calls in flight an endpoint of
	// weight 1 beside one of 2 has another number of them per weight, and its price is
	// off by as much.
	equalWeighted = 0.6

	// An endpoint of less than lightWeight times the mean weight has more in flight per
	// weight than the others if it has one attempt, and less if it has none. Where they have
	// less than lightQueue of that one, it would be picked whenever it is idle and drawn. It is
	// picked if it is the first of the draws, which is its share.
	lightWeight = 0.5
	lightQueue  = 0.5

	// A stream may last for hours, and its cost is that of its first response: how many
	// there are matters more, unless an endpoint is much slower than others.
	equalStreams = 2
)

// compare orders by the open streams, then by the queue.
func compare(open, open2 float64, queue, queue2 float32) int {
	switch {
	case open != open2:
		return cmp.Compare(open, open2)
	case queue != queue2:
		return cmp.Compare(queue, queue2)
	}
	return 0
}

// unheard returns the candidate that was not heard of for the longest, of those
// with nothing in flight that were not heard of for config.exploreAfter. One that
// has only failed so far is tried again too.
func (s *selection) unheard(now load.Instant) *candidate {
	after := uint32(s.picker.config.exploreAfter >> heardBits)
	tick := uint32(uint64(now) >> heardBits)
	var oldest *candidate
	var longest int32
	for i, c := range s.seen[:s.count] {
		if math.Float32frombits(uint32(c.detail.Load())) > 0 {
			continue
		}
		heard := c.heard.Load()
		silent := int32(tick - heard)
		if heard == 0 && s.costs[i] < avoided || heard != 0 && silent < int32(after) {
			continue
		}
		if oldest == nil || silent > longest {
			oldest, longest = c, silent
		}
	}
	return oldest
}

// leastOf returns the m cheapest of the measured candidates, nil where there are
// fewer. It reorders the selection.
func (s *selection) leastOf(m int) []*candidate {
	if s.picker.ready.unequal.Load() {
		s.distinct()
	}
	for i := range min(m, s.count) {
		k := i
		for j := i + 1; j < s.count; j++ {
			if s.costs[j] < s.costs[k] {
				k = j
			}
		}
		s.seen[i], s.seen[k] = s.seen[k], s.seen[i]
		s.costs[i], s.costs[k] = s.costs[k], s.costs[i]
	}
	return s.seen[:m]
}

// distinct leaves out what was drawn twice.
func (s *selection) distinct() {
	n := s.count
	s.count = 0
	for i, c := range s.seen[:n] {
		s.seen[i] = nil
		if !s.has(c) {
			s.costs[s.count] = s.costs[i]
			s.add(c)
		}
	}
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

// pick is an attempt in flight, from Pick to Done and, where a tracker has more
// to say, to the end of the call. Without a tracker it comes from a pool.
type pick struct {
	handle handle     // unless it is a tracker's
	pool   *sync.Pool // where it belongs, if not to a tracker

	picker    *picker
	candidate *candidate
	meter     *measure // that was told of the start
	ticket    load.Ticket
	ctx       context.Context
	tried     *attempt.Tried
	inner     func(balancer.DoneInfo) // the child's Done
	uses      uint32                  // how many attempts without a tracker it was
	trailer   metadata.MD             // of the attempt
	report    load.Report             // in the trailer
	reported  bool                    // there is one

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
		k.meter.Respond(load.Response{Now: k.now(), Ticket: k.ticket})
		k.candidate.tally.add(oneStream - oneAttempt)
		k.candidate.changed()
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
	responded := false
	if k.track != nil {
		old := k.state.Or(pickFinished)
		if old&pickFinished != 0 {
			return
		}
		responded = old&pickResponded != 0
	}
	switch {
	case o == load.Completed:
		k.meter.note(everAnswered)
	case o == load.Failed:
		k.meter.failed(load.Instant(k.picker.policy.now()), err)
	case (o == load.Cancelled || o == load.NotSent) && !responded:
		k.picker.policy.metrics.sampleDropped(o)
	}
	sample := load.Sample{Now: now, Ticket: k.ticket, Outcome: o, Responded: responded}
	if err != nil && o != load.NotSent {
		sample.Pushback = k.pushback(err)
	}
	if k.reported {
		attempts, _ := k.candidate.tally.read()
		sample.Report, sample.InFlight = &k.report, attempts
		if !responded {
			sample.InFlight = max(attempts-1, 0)
		}
	}
	k.meter.Finish(sample)
	if k.meter.timeless && o != load.Completed {
		k.candidate.detail.Store(special)
	}
	if k.limit != nil {
		k.limit.end(k, o, err)
	}
	if responded {
		k.candidate.tally.add(-oneStream)
	} else {
		k.candidate.tally.add(-oneAttempt)
	}
	k.candidate.changed()
	k.picker.policy.queue.admit(k.candidate)
	if k.track == nil {
		k.picker, k.candidate, k.meter, k.ctx, k.tried, k.inner, k.trailer, k.limit = nil, nil, nil, nil, nil, nil, nil, nil
		if k.reported {
			k.report, k.reported = load.Report{}, false
		}
		k.pool.Put(k)
	}
}

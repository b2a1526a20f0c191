// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package p2c

import (
	"cmp"
	"math"
	"math/bits"

	"github.com/belfry-go/belfry/load"
)

// selection is the candidates that one pick looks at. choose returns the best of them. It
// works in three passes: it collects the candidates, then measures them, then compares them.
// With many endpoints each candidate is a cache miss. In passes the processor fetches several
// candidates at the same time. If it compared each one before the next, it would wait for
// each.
type selection struct {
	picker *picker
	call   call
	random random
	home   int32  // how many endpoints of the READY set are at home; 0 if zones do not count
	away   uint32 // the candidates that are not at home, as bits
	count  int    // how many candidates there are
	drawn  int    // how many of these, the first ones, were drawn; the others were remembered
	seen   [maxChoices + maxMemory]*candidate
	costs  [maxChoices + maxMemory]float32
	// details are the errors of the costs, and the queues, as candidate.detail has them.
	details [maxChoices + maxMemory]uint64

	first, second uint64 // the two least ranks
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
// Costs that differ by no more than four of their errors are equal, up to a limit:
//
//   - While the channel is at rest, the limit is wide, because only latencies could tell
//     the endpoints apart, and such latencies do not. choose takes one of the equal draws
//     at random.
//   - Otherwise the limit is narrow. choose takes the one with the fewest attempts in
//     flight, and of several such ones the cheapest. But if weights differ, and they have
//     attempts in flight, it takes any of them.
//   - For a stream choose takes the one with the fewest open streams.
//
// If zones count, all equal candidates are at home if the cheapest is, and away if it is not.
func (s *selection) choose(now load.Instant) *candidate {
	if s.count == 0 {
		return nil
	}
	p := s.picker
	weighted := p.ready.unequal.Load()
	queue := s.measure(now)
	if s.home > 0 {
		s.chargeAway()
	}
	if every := p.config.exploreEvery; every > 0 && s.random.below(every) == 0 {
		if c := s.unheard(now); c != nil {
			return c
		}
	}

	rest := p.rest(s, queue > 0)
	limit, errors := p.config.equalUnderLoad, float32(equalErrors)
	if rest {
		limit = p.config.equalAtRest
	}
	if weighted {
		limit, errors = max(limit, equalWeighted), math.MaxFloat32
	}
	if s.call.stream {
		limit, errors = equalStreams, math.MaxFloat32
	}
	least := s.costs[uint32(s.first)]
	skipped := s.otherZones() // the candidates that are not taken, as bits
	if weighted && !s.call.stream && !p.config.exact {
		if light := s.light(queue/float32(s.count)) &^ skipped; light != 0 {
			heavy := s.leastBut(skipped | light)
			if heavy >= 0 && s.onlyIdle(heavy, light, limit) {
				if light&1 != 0 && s.costs[0] <= s.costs[heavy]*(1+limit) {
					return s.seen[0]
				}
				least, skipped = s.costs[heavy], skipped|light
			}
		}
	}
	count := s.count
	if rest || weighted {
		count = s.drawn
	}
	like := likeness{least: least, limit: min(limit*least, math.MaxFloat32), errors: min(errors*least, math.MaxFloat32)}
	if rest {
		like.time = p.config.equalTime
		if !s.call.stream && skipped == 0 {
			// As a rule most are equal, so two draws among all are likely to find one.
			for range 2 {
				if i := s.random.below(uint32(count)); like.has(s.costs[i], s.details[i]) {
					return s.seen[i]
				}
			}
		}
	}
	// This loop has no branches, because a processor cannot predict which costs are equal.
	var equal [maxChoices + maxMemory]uint8
	var equals uint32
	for i, cost := range s.costs[:count] {
		equal[equals] = uint8(i)
		var is uint32
		if like.has(cost, s.details[i]) {
			is = 1
		}
		equals += is &^ (skipped >> i)
	}
	switch {
	case equals == 0: // only draws count, and the cheapest candidate was remembered
		return s.seen[uint32(s.first)]
	case equals == 1:
		return s.seen[equal[0]]
	case rest && !s.call.stream:
		return s.seen[equal[s.random.below(equals)]]
	}
	return s.leastBusy(equal[:equals], rest, weighted)
}

// likeness says which costs are equal to the least. With e for the error of a cost, divided by
// the cost, these are the costs that exceed least by no more than min(errors*e, limit), or by
// no more than time*e.
type likeness struct{ least, limit, errors, time float32 }

// has reports whether a cost is equal to the least. It compares bits, which are in the order of
// the numbers if these are not negative.
func (l *likeness) has(cost float32, detail uint64) bool {
	e := math.Float32frombits(uint32(detail >> 32))
	within := min(math.Float32bits(l.errors*e), math.Float32bits(l.limit))
	within = max(within, math.Float32bits(l.time*e))
	return math.Float32bits(cost) <= math.Float32bits(l.least+math.Float32frombits(within))
}

// measure sets the costs, the details and the least ranks of the candidates. It returns the sum
// of their queues.
func (s *selection) measure(now load.Instant) (queue float32) {
	tick := tickOf(now)
	first, second := uint64(noRank), uint64(noRank)
	for i, c := range s.seen[:s.count] {
		cost, good := c.kept(tick)
		detail := c.detail.Load()
		if !good || s.call.class != 0 {
			cost, detail = c.ask(s.picker, now, s.call.class)
		}
		s.costs[i], s.details[i] = cost, detail
		queue += math.Float32frombits(uint32(detail))
		rank := rankOf(cost, i)
		second = min(second, max(first, rank))
		first = min(first, rank)
	}
	s.first, s.second = first, second
	return queue
}

// rankOf returns the rank of a candidate: the bits of its cost above its index. The bits of costs
// are in the order of the costs. So ranks are compared without a branch, which a processor
// could not predict.
func rankOf(cost float32, i int) uint64 { return uint64(math.Float32bits(cost))<<32 | uint64(i) }

const noRank = math.MaxUint64

// least returns the least rank that is at least from, noRank if there is none.
func (s *selection) least(from uint64) uint64 {
	switch {
	case from <= s.first:
		return s.first
	case from <= s.second:
		return s.second
	}
	least := uint64(noRank)
	for i, cost := range s.costs[:s.count] {
		if rank := rankOf(cost, i); rank >= from {
			least = min(least, rank)
		}
	}
	return least
}

// leastBusy returns, of candidates with equal costs, the one with the fewest attempts in
// flight, or for a stream the one with the fewest open streams. See choose.
func (s *selection) leastBusy(equal []uint8, rest, weighted bool) *candidate {
	best, ties := 0, 0
	var bestQueue float32
	var bestOpen float64
	for _, i := range equal {
		c, cost := s.seen[i], s.costs[i]
		q := math.Float32frombits(uint32(s.details[i]))
		open := 0.0
		if s.call.stream {
			open = c.open()
		}
		switch better := compare(open, bestOpen, q, bestQueue); {
		case ties == 0 || better < 0:
			best, bestOpen, bestQueue, ties = int(i), open, q, 1
		case better > 0:
		case !rest && (!weighted || q == 0) && cost != s.costs[best]:
			if cost < s.costs[best] {
				best, ties = int(i), 1
			}
		default:
			ties++
			if s.random.below(uint32(ties)) == 0 {
				best = int(i)
			}
		}
	}
	return s.seen[best]
}

// light returns, as bits, which of the draws are idle endpoints of a small weight. queue is the
// mean queue of the candidates. See lightWeight.
func (s *selection) light(queue float32) (bits uint32) {
	for i, c := range s.seen[:s.drawn] {
		attempts, _ := c.tally.read()
		if attempts == 0 && math.Float32frombits(uint32(s.details[i])) == 0 {
			if w := float32(s.picker.ready.relative(c)); w < lightWeight && queue*w < lightQueue {
				bits |= 1 << i
			}
		}
	}
	return bits
}

// leastBut returns the index of the cheapest draw that is not in light, or -1.
func (s *selection) leastBut(light uint32) int {
	heavy := -1
	for i := range s.drawn {
		if light>>i&1 == 0 && (heavy < 0 || s.costs[i] < s.costs[heavy]) {
			heavy = i
		}
	}
	return heavy
}

// onlyIdle reports whether the light candidates are cheaper than the heavy one only because they
// are idle: if that were idle too, it would cost no more than they do, within the limit.
func (s *selection) onlyIdle(heavy int, light uint32, limit float32) bool {
	idle := s.costs[heavy] / (1 + math.Float32frombits(uint32(s.details[heavy])))
	for i := range s.drawn {
		if light>>i&1 != 0 && idle > s.costs[i]*(1+limit) {
			return false
		}
	}
	return true
}

const (
	// equalErrors is by how many standard errors a cost may exceed the least and still be
	// equal to it. The cheapest of many is as a rule one or two errors below its true
	// cost, and another one as many above.
	equalErrors = 4

	// If weights differ, equalWeighted is the least limit up to which costs are equal,
	// whatever their errors, because a weight is meant to give a share. With few calls in
	// flight, an endpoint of weight 1 and one of weight 2 cannot have the same number per
	// weight, and their costs differ by that.
	equalWeighted = 0.6

	// An endpoint of less than lightWeight times the mean weight has more in flight per
	// weight than the others if it has one attempt, and less if it has none. If the others
	// have less than lightQueue of what one attempt is for it, it would be picked whenever
	// it is idle and drawn. So it is picked only if it is the first draw, which gives it its
	// share.
	lightWeight = 0.5
	lightQueue  = 0.5

	// For a stream costs are equal up to equalStreams. A stream may last for hours, and the
	// cost is only that of its first response. So the number of streams matters more, unless
	// an endpoint is much slower than others.
	equalStreams = 2
)

// compare compares open streams, and if these are equal queues.
func compare(open, open2 float64, queue, queue2 float32) int {
	switch {
	case open != open2:
		return cmp.Compare(open, open2)
	case queue != queue2:
		return cmp.Compare(queue, queue2)
	}
	return 0
}

// unheard returns the candidate that answered or failed the longest time ago, of those with
// nothing in flight for which that is longer than config.exploreAfter; nil if there is none.
// Of endpoints for which no such time is known, only two kinds count: those that have only
// failed, and those in another zone, to which no call would go while home has room.
func (s *selection) unheard(now load.Instant) *candidate {
	after := uint32(s.picker.config.exploreAfter >> heardBits)
	tick := uint32(uint64(now) >> heardBits)
	var oldest *candidate
	var longest int32
	for i, c := range s.seen[:s.count] {
		if math.Float32frombits(uint32(s.details[i])) > 0 {
			continue
		}
		heard := c.heard.Load()
		silent := int32(tick - heard)
		cheap := s.costs[i] < avoided && (s.away>>i&1 == 0 || s.picker.config.timeless)
		if heard == 0 && cheap || heard != 0 && silent < int32(after) {
			continue
		}
		if oldest == nil || silent > longest {
			oldest, longest = c, silent
		}
	}
	return oldest
}

// random is a generator of random numbers for one pick: SplitMix64 (Steele, Lea, Flood,
// "Fast splittable pseudorandom number generators", OOPSLA 2014). Its seed is one number of
// the policy's source.
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

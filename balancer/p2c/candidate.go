// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package p2c

import (
	"math"
	"sync/atomic"
	"time"

	"google.golang.org/grpc/balancer"

	"github.com/belfry-go/belfry/load"
)

// candidate is what a pick needs of an endpoint, together in one cache line. It
// lives as long as its endpoint. With many endpoints a pick spends its time on
// fetching these lines, so what the meter said is kept in them for a while.
type candidate struct {
	// cost is what the meter said, as a float32, and for how long it is good, see
	// tagBits. It is askTag if the meter must be asked.
	cost   atomic.Uint64
	detail atomic.Uint64 // the error of the cost and the queue, two float32
	tally  tally
	meter  atomic.Pointer[measure]
	child  atomic.Pointer[balancer.State] // the last report of the endpoint's child
	run    run
	heard  atomic.Uint32 // when the endpoint was heard of last, in heardBits
	weight atomic.Uint32 // at least 1
	slot   atomic.Int32  // in the READY set, or notReady
	laps   atomic.Uint32 // how often tally.picks has begun at 0 again
}

// id names the endpoint in what calls remember of those that they tried.
func (c *candidate) id() uint64 { return c.meter.Load().id }

// measure is a meter and what the policy has to know besides, in one cache line.
type measure struct {
	load.Meter
	id       uint64 // see candidate.id. It stays when the meter is replaced.
	timeless bool   // it has no use for the time
	// quiet is whether it need not be told of a start, nor of an answer unless an
	// attempt was given up before.
	quiet bool
	// health is what the attempts so far were, of everAnswered, everFailed and
	// everGivenUp.
	health atomic.Uint32
	room   *room

	// pushback is until when the server asked not to be called, 0 if it did not.
	pushback atomic.Int64

	// accrual judges the endpoint; nil if the config has none.
	accrual atomic.Pointer[accrual]

	ep atomic.Pointer[endpoint] // which has it; nil while it is kept
}

const (
	everAnswered = 1 << iota
	everFailed
	everGivenUp
)

// A failure is how an attempt failed.
type failure struct {
	at  load.Instant
	err error
}

// failed counts a failure, and notes one in 100 ms at most, because that allocates.
func (m *measure) failed(now load.Instant, err error) {
	if m.note(everFailed) {
		m.judge()
	}
	m.room.failures.Add(1)
	if f := m.room.failure.Load(); f == nil || time.Duration(now-f.at) >= noteAfter {
		m.room.failure.Store(&failure{now, err})
	}
}

const noteAfter = 100 * time.Millisecond

// note notes that an attempt was answered, failed, or was given up, and returns whether it is
// the first.
func (m *measure) note(what uint32) (first bool) {
	return m.health.Load()&what == 0 && m.health.Or(what)&what == 0
}

// onlyFailed reports whether attempts failed, and none was ever answered.
func (m *measure) onlyFailed() bool { return m.health.Load()&(everAnswered|everFailed) == everFailed }

// learns reports whether the meter has to be told of the end of an attempt.
func (m *measure) learns(o load.Outcome) bool {
	return !m.quiet || o != load.Completed || m.health.Load()&everGivenUp != 0
}

// quietMetric reports whether the meters of a metric are quiet.
func quietMetric(m load.Metric) bool {
	switch m.(type) {
	case *load.PendingRequests, *load.Constant:
		return true
	}
	return false
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

// Of the lower half of candidate.cost the last 8 bits are a tag: 0 if the cost is that with
// nothing in flight, and else an odd number that counts the starts and ends of attempts. The
// others are the tick until which the cost is good. So nothing has to be written when an
// attempt starts or ends.
const (
	tagBits = 8
	askTag  = 2 // is never right
	longest = uint32(mostGood>>tickBits) << tagBits
)

func (c *candidate) tag() uint8 {
	w := c.tally.word.Load()
	tag := uint8(2*(w>>picksAt)-w)<<1 | 1
	if w&(1<<streamsAt-1) == idleAttempts {
		tag = 0
	}
	return tag
}

// kept returns what the meter said last, and whether it is still good.
func (c *candidate) kept(tick uint32) (cost float32, good bool) {
	w := c.cost.Load()
	return math.Float32frombits(uint32(w >> 32)), uint8(w) == c.tag() && uint32(w)-(tick+1)<<tagBits < longest
}

func (c *candidate) query(p *picker, now load.Instant, class load.Class) (q load.Query) {
	c.fill(&q, p, now, class)
	return q
}

// fill makes q what a meter is asked.
func (c *candidate) fill(q *load.Query, p *picker, now load.Instant, class load.Class) {
	q.Now, q.Class, q.Weight = now, class, 1
	q.InFlight, q.Streams = c.tally.read()
	if p.ready.unequal.Load() {
		q.Weight = p.ready.relative(c)
	}
}

// look returns what one more attempt at the endpoint costs.
func (c *candidate) look(p *picker, now load.Instant) float32 {
	if p.config.counts && c.detail.Load() == 0 && !p.ready.unequal.Load() {
		attempts, _ := c.tally.read()
		return float32(attempts) // as the meter would say
	}
	cost, good := c.kept(tickOf(now))
	if !good {
		cost, _ = c.ask(p, now, 0)
	}
	return cost
}

// ask asks the meter, and keeps what it says for calls of class 0.
func (c *candidate) ask(p *picker, now load.Instant, class load.Class) (cost float32, detail uint64) {
	m := c.meter.Load()
	tag := c.tag() // before what it stands for is read
	e := m.Load(c.query(p, now, class))
	cost = float32(min(e.Cost, maxCost))
	if m.onlyFailed() {
		cost = (1 + cost) * avoided
	}
	if m.pushback.Load() != 0 {
		cost, e.Good = p.pushedBack(m, cost, e.Good)
	}
	detail = uint64(math.Float32bits(float32(e.Error))&^coarse)<<32 | uint64(math.Float32bits(float32(e.Queue)))
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
	if e.Good < 1<<tickBits {
		c.changed()
		return cost, detail
	}
	until := tickOf(now) + uint32(min(e.Good, mostGood)>>tickBits)
	c.cost.Store(uint64(math.Float32bits(cost))<<32 | uint64(until<<tagBits) | uint64(tag))
	return cost, detail
}

// coarse is the bits of an error that are left out, so that it seldom changes. It is
// right to 3 %.
const coarse = 1<<19 - 1

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
		return cost * costlier, 0
	}
	return cost * costlier, min(good, max(left, 1<<tickBits))
}

// mostPushback bounds for how long a server can ask not to be called, because one that is
// mistaken would be lost.
const mostPushback = time.Minute

// changed makes the next pick ask the meter.
func (c *candidate) changed() {
	if c.cost.Load() != askTag {
		c.cost.Store(askTag)
	}
}

// open returns the open streams and those that wait for their first response or
// any other attempt, per weight.
func (c *candidate) open() float64 {
	attempts, streams := c.tally.read()
	return float64(attempts+streams) / float64(c.weight.Load())
}

// picked counts a pick, and if it is not held already an attempt.
func (c *candidate) picked(held bool) {
	n := int64(onePick + oneAttempt)
	if held {
		n = onePick
	}
	if uint64(c.tally.word.Add(n))>>picksAt == 0 {
		c.laps.Add(1)
	}
}

// picks returns the number of picks so far, modulo 2^32.
func (c *candidate) picks() uint32 {
	for {
		laps := c.laps.Load()
		w := uint64(c.tally.word.Load())
		if c.laps.Load() == laps {
			return laps<<(64-picksAt) + uint32(w>>picksAt)
		}
	}
}

// tally counts what is in flight to an endpoint, exactly: the attempts, and by
// themselves the open streams, which have had a response. Above these it counts the
// picks, in the same word because one atomic write is cheaper than two.
//
// Between the response and the end of a stream that both come at this moment, one of
// the counts may be below zero, so each has an offset.
type tally struct{ word atomic.Int64 }

const (
	streamsAt = 24 // up to 16 million attempts in flight
	picksAt   = 44 // and a million open streams

	oneAttempt = 1
	oneStream  = 1 << streamsAt
	onePick    = 1 << picksAt

	idleAttempts = 256 * oneAttempt
	tallyOffset  = idleAttempts + 256*oneStream
)

func (t *tally) add(n int64) { t.word.Add(n) }

// read returns the attempts in flight and the open streams.
func (t *tally) read() (attempts, streams int) { return tallied(t.word.Load()) }

func tallied(word int64) (attempts, streams int) {
	attempts = int(word&(1<<streamsAt-1)) - idleAttempts
	streams = int(word>>streamsAt&(1<<(picksAt-streamsAt)-1)) - 256
	return max(attempts, 0), max(streams, 0)
}

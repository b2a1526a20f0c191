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

// candidate is what a pick needs of an endpoint, in one cache line. It exists as long as
// its endpoint. With many endpoints a pick spends most of its time on fetching these lines,
// so each also keeps the last estimate of its meter.
type candidate struct {
	// cost is the cost in the last estimate, as a float32, and until when it is good, see
	// tagBits. It is askTag if the meter must be asked.
	cost   atomic.Uint64
	detail atomic.Uint64 // the error of the cost, and the queue, two float32
	tally  tally
	meter  atomic.Pointer[measure]
	child  atomic.Pointer[balancer.State] // the last report of the endpoint's child
	run    run
	heard  atomic.Uint32 // when the endpoint last answered or failed, in units of 2^heardBits ns
	weight atomic.Uint32 // at least 1
	slot   atomic.Int32  // its index in the READY set, or notReady
	laps   atomic.Uint32 // how often the picks in tally have started at 0 again
}

// id names the endpoint in what calls remember of those that they tried.
func (c *candidate) id() uint64 { return c.meter.Load().id }

// measure is a meter and what else the policy knows of an endpoint, in one cache line. It
// can be kept for longer than the endpoint exists.
type measure struct {
	load.Meter
	id       uint64 // see candidate.id. It stays when the meter is replaced.
	timeless bool   // whether the meter does not use the time
	// quiet is whether the meter need not be told of starts, nor of answers before an
	// attempt has ended in another way.
	quiet bool
	// health is how attempts have ended so far: everAnswered, everFailed, everGivenUp.
	health atomic.Uint32
	room   *room

	// pushback is until when the server asked not to be called, by policy.now; 0 if it
	// did not ask.
	pushback atomic.Int64

	// accrual judges the endpoint; nil if the config has none.
	accrual atomic.Pointer[accrual]

	ep atomic.Pointer[endpoint] // that uses it; nil while it is kept
}

const (
	everAnswered = 1 << iota
	everFailed
	everGivenUp
)

// A failure is the time and the error of an attempt that failed.
type failure struct {
	at  load.Instant
	err error
}

// failed counts a failure. It notes the error at most once in noteAfter, because that
// allocates.
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

// note sets a bit of health, and reports whether it was not set before.
func (m *measure) note(what uint32) (first bool) {
	return m.health.Load()&what == 0 && m.health.Or(what)&what == 0
}

// onlyFailed reports whether an attempt has failed and none was ever answered.
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
	// Estimates are good for whole ticks of 131 us, and for a second at most, because a
	// goroutine that asks the meter while an attempt starts may keep the estimate from
	// before the start.
	tickBits = 17
	mostGood = time.Second

	heardBits = 20

	// An endpoint that has only failed costs this many times as much. That is more than
	// any endpoint costs that has not.
	avoided = 1 << 60
	maxCost = 1e18

	// special is the detail of an endpoint with pendingRequests whose cost may differ from
	// its number of attempts in flight. As two float32 it is an error of 0 and a queue of 0.
	special = 1 << 63
)

// tickOf returns the time in ticks. It wraps after six days.
func tickOf(now load.Instant) uint32 { return uint32(uint64(now) >> tickBits) }

// In the lower half of candidate.cost the last 8 bits are a tag: 0 if the cost is that with
// nothing in flight, else an odd number that counts the starts and ends of attempts. The
// other bits are the tick until which the cost is good. A cost is good only if its tag is
// that of now, so a start or an end of an attempt need not write it.
const (
	tagBits = 8
	askTag  = 2 // no tag has this value
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

// kept returns the cost in the last estimate of the meter, and whether it is still good.
func (c *candidate) kept(tick uint32) (cost float32, good bool) {
	w := c.cost.Load()
	return math.Float32frombits(uint32(w >> 32)), uint8(w) == c.tag() && uint32(w)-(tick+1)<<tagBits < longest
}

func (c *candidate) query(p *picker, now load.Instant, class load.Class) (q load.Query) {
	c.fill(&q, p, now, class)
	return q
}

// fill sets q to the query for the meter.
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

// ask asks the meter. If the class is 0, it keeps the answer.
func (c *candidate) ask(p *picker, now load.Instant, class load.Class) (cost float32, detail uint64) {
	m := c.meter.Load()
	tag := c.tag() // before the query reads the attempts in flight
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
	// All cores read the line, so it is written only if something has changed.
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

// coarse is the bits of an error that are cleared, so that detail seldom changes. That makes
// the error up to 6 % smaller.
const coarse = 1<<19 - 1

// pushedBack returns the cost of an endpoint whose server has asked not to be called, and
// for how long that cost is good. After the time that the server asked for it changes
// nothing.
func (p *picker) pushedBack(m *measure, cost float32, good time.Duration) (float32, time.Duration) {
	until := m.pushback.Load()
	left := time.Duration(until - p.policy.now())
	if left <= 0 {
		m.pushback.CompareAndSwap(until, 0)
		return cost, good
	}
	if p.config.counts {
		cost++ // an idle endpoint costs 0, and 0 times a factor is 0
	}
	if p.config.timeless { // picks read no clock, so each asks again
		return cost * costlier, 0
	}
	return cost * costlier, min(good, max(left, 1<<tickBits))
}

// mostPushback bounds for how long a server can ask not to be called, so that a mistake does
// not take it out of use for good.
const mostPushback = time.Minute

// changed makes the next pick ask the meter.
func (c *candidate) changed() {
	if c.cost.Load() != askTag {
		c.cost.Store(askTag)
	}
}

// open returns the number of open streams and attempts in flight, per weight.
func (c *candidate) open() float64 {
	attempts, streams := c.tally.read()
	return float64(attempts+streams) / float64(c.weight.Load())
}

// picked counts a pick, and an attempt unless take has counted it (held).
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

// tally counts exactly what is in flight to an endpoint: the attempts and, apart from them,
// the open streams, which have had a response. It counts picks too. All three are in one
// word, because one atomic write is cheaper than two.
//
// If the response and the end of a stream are counted in the other order, a count is below
// zero for a moment. So each has an offset.
type tally struct{ word atomic.Int64 }

const (
	streamsAt = 24 // the bits below: up to 16 million attempts in flight
	picksAt   = 44 // the bits between: up to a million open streams

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

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

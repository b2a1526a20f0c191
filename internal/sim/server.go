// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package sim

import (
	"math"
	"slices"

	"github.com/belfry-go/belfry/internal/agenda"
)

// behaviour is what a server does with the calls that reach it.
type behaviour uint8

const (
	answers      behaviour = iota
	fails                  // answers UNAVAILABLE at once
	failsHalf              // fails half of them
	failsQuarter           // fails a quarter of them
	silent                 // never answers
)

// server does the work of calls: those in service side by side, the others
// waiting in one queue in the order of their arrival. Under processor sharing
// all are in service and share the workers evenly.
//
// All calls in service progress at the same rate, so the server keeps a clock of
// the work that each has got, which runs at that rate, and a call is done when
// the clock shows what it showed at its begin plus its work. A change of speed
// then touches no call.
type server struct {
	cluster   *cluster
	addr      string
	workers   int // 0: as many as there are calls
	weight    uint32
	zone      int
	sharing   bool
	behaviour behaviour

	speed   float64 // work done per time
	stopped bool    // does nothing for now

	clock      float64 // nanoseconds of work
	clockAt    int64   // when clock was brought up to date
	running    []*call // a heap by call.doneAt
	waiting    agenda.Queue[*call]
	completion uint64 // the number of the valid completion event

	// What the oracle knows beyond that: see oracle.
	free   []float64
	onWire int

	sent    int // measured calls
	last    int // calls of the last method in flight
	streams int // open
}

// rate returns how fast the clock runs.
func (s *server) rate() float64 {
	switch n := len(s.running); {
	case s.stopped:
		return 0
	case s.sharing && n > s.workers:
		return s.speed * float64(s.workers) / float64(n)
	default:
		return s.speed
	}
}

// advance brings the clock up to date. It comes before each change of rate.
func (s *server) advance() {
	s.clock += s.rate() * float64(s.cluster.now-s.clockAt)
	s.clockAt = s.cluster.now
}

// schedule replaces the completion event. It comes after each change of rate,
// or of the call that is done first.
func (s *server) schedule() {
	s.completion = 0
	if rate := s.rate(); rate > 0 && len(s.running) > 0 {
		left := math.Ceil(max(s.running[0].doneAt-s.clock, 0) / rate)
		s.completion = s.cluster.agenda.Add(s.cluster.now+int64(left), s)
	}
}

func (s *server) setSpeed(speed float64) {
	s.advance()
	s.speed = speed
	s.schedule()
}

func (s *server) stop(stopped bool) {
	s.advance()
	s.stopped = stopped
	s.schedule()
}

// receive takes a call that has come over the network.
func (s *server) receive(c *call) {
	s.onWire--
	switch {
	case s.behaviour == silent, c.silent:
		c.lost = true
		return
	case s.behaviour == fails, s.behaviour == failsHalf && c.coins&1 == 0, s.behaviour == failsQuarter && c.coins&3 == 0:
		c.failed = true
		c.reply()
		return
	}
	s.advance()
	if s.workers > 0 && !s.sharing && len(s.running) >= s.workers {
		s.waiting.Push(c)
		return
	}
	s.begin(c)
	s.schedule()
}

// fire completes what is done by now.
func (s *server) fire(number uint64) {
	if number != s.completion {
		return
	}
	s.advance()
	// Times are whole nanoseconds, and the clock is not: half of one is nothing.
	for len(s.running) > 0 && s.running[0].doneAt <= s.clock+0.5 {
		s.popRunning().reply()
		if s.waiting.Len() > 0 {
			s.begin(s.waiting.Pop())
		}
	}
	s.schedule()
}

func (s *server) begin(c *call) {
	c.doneAt = s.clock + c.work
	s.running = append(s.running, c)
	i := len(s.running) - 1
	for i > 0 {
		parent := (i - 1) / 2
		if c.doneAt >= s.running[parent].doneAt {
			break
		}
		s.running[i] = s.running[parent]
		i = parent
	}
	s.running[i] = c
}

func (s *server) popRunning() *call {
	first := s.running[0]
	n := len(s.running) - 1
	last := s.running[n]
	s.running[n] = nil
	s.running = s.running[:n]
	if n == 0 {
		return first
	}
	i := 0
	for {
		child := 2*i + 1
		if child >= n {
			break
		}
		if child+1 < n && s.running[child+1].doneAt < s.running[child].doneAt {
			child++
		}
		if s.running[child].doneAt >= last.doneAt {
			break
		}
		s.running[i] = s.running[child]
		i = child
	}
	s.running[i] = last
	return first
}

// oracle is the chooser that knows every queue, the true work of every call in
// it and the speed of every server, though not the future. It joins the server
// where a call of mean work is expected to be answered first.
//
// With queues in the order of arrival that is the best there is. It needs no more
// than one number for each worker, the reading of the server's clock at which it
// is free of all that has been sent (Kiefer and Wolfowitz, "On the theory of
// queues with many servers", 1955). With processor sharing there is no such
// order: what a call gets depends on those that come after it, so the oracle is
// only good, and can be beaten.
//
// It sends a stream where the fewest are open.
type oracle struct {
	cluster *cluster
}

func (o *oracle) choose(c *call) (*server, error) {
	mean := float64(o.cluster.scenario.Mean)
	transit := float64(o.cluster.scenario.transit())
	between := float64(o.cluster.scenario.Between)
	var best *server
	least, equals := math.Inf(1), 0
	for _, s := range o.cluster.servers {
		delay := s.delay(mean, transit)
		if c.stream {
			delay = float64(s.streams)
		} else if s.zone != c.client.zone {
			delay = s.delay(mean, transit+between) + 2*between
		}
		switch {
		case best == nil || delay < least:
			best, least, equals = s, delay, 1
		case delay == least:
			equals++
			if o.cluster.choice.IntN(equals) == 0 {
				best = s
			}
		}
	}
	if best.zone != c.client.zone {
		transit += between
	}
	best.expect(c.work, transit)
	return best, nil
}

func (o *oracle) finished(*call, error) {}

func (o *oracle) update() error { return nil }

func (o *oracle) close() {}

// delay returns how long a call of the given work would be in service and wait
// for it, from its arrival.
func (s *server) delay(work, transit float64) float64 {
	if s.behaviour != answers || s.stopped {
		return math.Inf(1)
	}
	if s.workers == 0 {
		return work / s.speed
	}
	if s.sharing {
		n := float64(len(s.running) + s.onWire + 1)
		return work * max(1, n/float64(s.workers)) / s.speed
	}
	s.advance()
	wait := max(slices.Min(s.free)-(s.clock+transit*s.speed), 0)
	return (wait + work) / s.speed
}

// expect counts the work of a call as sent to the server.
func (s *server) expect(work, transit float64) {
	if s.workers == 0 || s.sharing {
		return
	}
	i := 0
	for k := range s.free {
		if s.free[k] < s.free[i] {
			i = k
		}
	}
	s.free[i] = max(s.free[i], s.clock+transit*s.speed) + work
}

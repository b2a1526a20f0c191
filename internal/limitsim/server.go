// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package limitsim

import (
	"math"

	"github.com/belfry-go/belfry/internal/agenda"
)

// server does the work of calls. FIFO, as many as it has workers are in service and the
// others wait in one queue. With shared cores all are in service and share the cores
// evenly.
//
// All calls in service progress at the same rate. The server keeps a clock of the work
// that each has got, which runs at that rate, and a call is done when the clock shows what
// it showed at its begin plus its work. A change of speed then touches no call.
type server struct {
	run     *run
	workers int
	shared  bool
	queue   int     // calls that may wait; the others are refused; 0: no bound
	speed   float64 // work done per time
	stalled bool

	clock      float64 // nanoseconds of work
	clockAt    int64   // when clock was brought up to date
	running    []*call // a heap by call.doneAt
	waiting    agenda.Queue[*call]
	completion uint64 // the number of the valid completion event
	complete   func(uint64)
}

func (s *server) rate() float64 {
	switch n := len(s.running); {
	case s.stalled:
		return 0
	case s.shared && n > s.workers:
		return s.speed * float64(s.workers) / float64(n)
	default:
		return s.speed
	}
}

// advance brings the clock up to date. It comes before each change of rate.
func (s *server) advance() {
	s.clock += s.rate() * float64(s.run.now-s.clockAt)
	s.clockAt = s.run.now
}

// schedule replaces the completion event. It comes after each change of the rate or of
// the calls in service.
func (s *server) schedule() {
	s.completion = 0
	if rate := s.rate(); rate > 0 && len(s.running) > 0 {
		left := math.Ceil(max(s.running[0].doneAt-s.clock, 0) / rate)
		s.completion = s.run.agenda.Add(s.run.now+int64(left), s.complete)
	}
}

// change changes the server by f.
func (s *server) change(f func(*server)) {
	s.advance()
	f(s)
	s.fill()
	s.schedule()
}

// receive takes a call, or reports that it refuses it.
func (s *server) receive(c *call) bool {
	if s.queue > 0 && s.excess() >= s.queue {
		return false
	}
	s.advance()
	s.waiting.Push(c)
	before := len(s.running)
	first := s.first()
	s.fill()
	if len(s.running) != before && (s.shared || s.first() != first) {
		s.schedule()
	}
	return true
}

// excess returns how many calls there are beyond the workers.
func (s *server) excess() int { return s.waiting.Len() + max(len(s.running)-s.workers, 0) }

func (s *server) first() *call {
	if len(s.running) == 0 {
		return nil
	}
	return s.running[0]
}

// fill begins the work of calls that wait while workers are free.
func (s *server) fill() {
	for s.waiting.Len() > 0 && (s.shared || len(s.running) < s.workers) {
		c := s.waiting.Pop()
		c.doneAt = s.clock + c.work
		s.push(c)
	}
}

// done completes what is done by now.
func (s *server) done(number uint64) {
	if number != s.completion {
		return
	}
	s.advance()
	// Times are whole nanoseconds, and the clock is not: half of one is nothing.
	for len(s.running) > 0 && s.running[0].doneAt <= s.clock+0.5 {
		c := s.pop()
		s.fill()
		s.run.answered(c)
	}
	s.schedule()
}

func (s *server) push(c *call) {
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

func (s *server) pop() *call {
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

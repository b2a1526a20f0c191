// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package load

import "sync/atomic"

// PendingRequests is the number of attempts in flight, in proportion to the
// endpoint's weight. It is also known as least request. A stream counts until
// its first response. The metric needs no latencies, so it knows nothing of a
// server that is fast or slow until calls pile up there, and a server that fails
// at once looks idle to it.
//
// Calls do not pile up at a slow server whose attempts are cancelled, such as the
// losers of hedges: it would look idle, and get several times as many calls. So if
// attempts were cancelled that had no answer, two or more since one was last
// answered, the endpoint counts one more as in flight, for the next 16 times that
// its load is asked for, and twice as many times after each further one, up to
// 1,024. Times and not a duration, because then it costs no reading of the clock,
// and an endpoint is tried again after as many calls at any rate.
type PendingRequests struct{ MetricBase }

// NewPendingRequests returns the Metric.
func NewPendingRequests() *PendingRequests { return &PendingRequests{} }

// NewMeter returns the Meter of one more endpoint.
func (*PendingRequests) NewMeter(Endpoint) Meter { return &pendingMeter{} }

const (
	leastShunned = 16
	mostShunned  = 1024
)

type pendingMeter struct {
	MeterBase
	unanswered atomic.Int64 // Cancelled attempts since one was last answered.
	shunned    atomic.Int64 // How many more times one more counts as in flight.
}

func (m *pendingMeter) Load(q Query) Estimate {
	if m.shunned.Load() > 0 {
		m.shunned.Add(-1)
		q.InFlight++
		return Estimate{Cost: q.queue()}
	}
	return Estimate{Cost: q.queue(), Good: forever}
}

func (m *pendingMeter) Start(*Attempt) Ticket { return Ticket{} }

func (m *pendingMeter) Respond(Response) { m.answered() }

func (m *pendingMeter) Finish(s *Sample) bool {
	switch {
	case s.Outcome == Completed:
		m.answered()
	case s.Outcome == Cancelled && !s.Responded:
		if n := m.unanswered.Add(1); n > 1 {
			m.shunned.Store(min(int64(leastShunned)<<min(n-2, 10), mostShunned))
			return true
		}
	}
	return false
}

func (m *pendingMeter) answered() {
	if m.unanswered.Load() != 0 {
		m.unanswered.Store(0)
		m.shunned.Store(0)
	}
}

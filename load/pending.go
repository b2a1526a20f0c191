// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package load

import "sync/atomic"

// PendingRequests is the number of attempts in flight to an endpoint, divided by the
// endpoint's weight. It is also known as least request. A stream counts until its
// first response. The metric measures no latencies: it sees that a server is slow only
// when attempts are waiting there, and a server that fails at once looks idle.
//
// Cancelled attempts, such as the losers of hedges, do not wait at a slow server. The
// server would look idle, and get several times as many calls. So after two attempts in
// a row that were cancelled without an answer, the endpoint counts one attempt more for
// the next 16 calls of Load. Each further one doubles that number, up to 1,024. An
// answer ends it. The metric counts calls of Load and not time, because it reads no
// clock.
type PendingRequests struct{ MetricBase }

// NewPendingRequests returns the Metric.
func NewPendingRequests() *PendingRequests { return &PendingRequests{} }

// NewMeter returns the Meter of one more endpoint.
func (*PendingRequests) NewMeter(Endpoint) Meter { return &pendingMeter{} }

// For how many calls of Load an endpoint counts one attempt more.
const (
	leastShunned = 16
	mostShunned  = 1024
)

type pendingMeter struct {
	MeterBase
	unanswered atomic.Int64 // cancelled attempts since the last answer
	shunned    atomic.Int64 // for how many more calls of Load one attempt more counts
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

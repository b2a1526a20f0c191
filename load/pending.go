// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package load

import "sync/atomic"

// PendingRequests is the number of attempts in flight, also known as least
// request. A stream counts until it ends. It needs no latencies, so it knows
// nothing of a server that is fast or slow until calls pile up there, and a
// server that fails at once looks idle to it.
type PendingRequests struct{}

// NewPendingRequests returns the Metric.
func NewPendingRequests() *PendingRequests { return &PendingRequests{} }

// NewMeter returns the Meter of one more endpoint.
func (*PendingRequests) NewMeter() Meter { return &pendingMeter{} }

type pendingMeter struct {
	pending atomic.Int64
	_       [56]byte // a cache line of its own: neighbours are written by other cores
}

func (m *pendingMeter) Load(Instant) float64 { return float64(m.pending.Load()) }

func (m *pendingMeter) Start(Instant) Ticket {
	m.pending.Add(1)
	return Ticket{}
}

func (m *pendingMeter) Respond(Instant, Ticket) {}

func (m *pendingMeter) Finish(Instant, Sample) { m.pending.Add(-1) }

func (m *pendingMeter) Close() {}

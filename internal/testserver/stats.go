// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package testserver

import (
	"context"
	"fmt"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"google.golang.org/grpc/codes"
)

// numCodes is how many status codes gRPC has. What a request asks for beyond
// them is counted as UNKNOWN, which is what clients make of it.
const numCodes = 17

// Stats is what a server has counted since it was started, through restarts.
// Only calls of TestService count. The numbers of one Stats are read one after
// the other; they fit together exactly when the server is at rest.
//
// A call counts as started before its first message is read, and as finished
// before its status is sent: what a client has seen end has been counted.
type Stats struct {
	// Started is the number of calls that reached the server, rejected ones
	// included.
	Started int64
	// InFlight is the number of calls that have started and not finished.
	InFlight int64
	// Queued is the number of calls in flight that wait for a worker.
	Queued int64
	// Connections is the number of connections accepted and not closed. Their
	// HTTP/2 handshake may still be under way.
	Connections int64
	// Accepted is the number of connections ever accepted.
	Accepted int64
	// Busy is how long workers were occupied, summed over the workers, or over
	// all calls if there are none. The time of a call is added when its work
	// ends.
	Busy time.Duration
	// Workers is the number of workers; 0 if there is no queue.
	Workers int
	// Uptime is how long ago the server was started first.
	Uptime time.Duration

	finished [numCodes]int64
}

// Finished returns the number of calls that ended with one of the given codes,
// or with any if none is given.
func (s Stats) Finished(of ...codes.Code) int64 {
	var n int64
	if len(of) == 0 {
		for _, count := range s.finished {
			n += count
		}
	}
	for _, c := range of {
		if c < numCodes {
			n += s.finished[c]
		}
	}
	return n
}

// String returns the counts in one line.
func (s Stats) String() string {
	var b strings.Builder
	fmt.Fprintf(&b, "started %d, in flight %d, queued %d, connections %d of %d accepted, finished",
		s.Started, s.InFlight, s.Queued, s.Connections, s.Accepted)
	none := true
	for c, count := range s.finished {
		if count > 0 {
			fmt.Fprintf(&b, " %v %d", codes.Code(c), count)
			none = false
		}
	}
	if none {
		b.WriteString(" 0")
	}
	return b.String()
}

// counters are a server's counts, and the event that one has changed. Counting
// takes no lock unless somebody waits.
type counters struct {
	started     atomic.Int64
	inFlight    atomic.Int64
	connections atomic.Int64
	accepted    atomic.Int64
	busy        atomic.Int64 // nanoseconds
	finished    [numCodes]atomic.Int64

	waiters atomic.Int64
	mu      sync.Mutex    // guards event
	event   chan struct{} // closed at the next change; nil if nobody waits
}

// changed tells those who wait that a count has changed. A waiter announces
// itself before it reads the counts and changed looks for waiters after a count
// was written, so that one of the two sees the other.
func (c *counters) changed() {
	if c.waiters.Load() == 0 {
		return
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.event != nil {
		close(c.event)
		c.event = nil
	}
}

// next returns a channel that is closed at the next change. Caller must have
// announced itself in waiters.
func (c *counters) next() <-chan struct{} {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.event == nil {
		c.event = make(chan struct{})
	}
	return c.event
}

// begin counts a call that starts.
func (c *counters) begin() {
	c.started.Add(1)
	c.inFlight.Add(1)
	c.changed()
}

// end counts a call that finishes with a code.
func (c *counters) end(code codes.Code) {
	if code >= numCodes {
		code = codes.Unknown
	}
	c.finished[code].Add(1)
	c.inFlight.Add(-1)
	c.changed()
}

// Stats returns the server's counts.
func (s *Server) Stats() Stats {
	st := Stats{
		Started:     s.counters.started.Load(),
		InFlight:    s.counters.inFlight.Load(),
		Connections: s.counters.connections.Load(),
		Accepted:    s.counters.accepted.Load(),
		Busy:        time.Duration(s.counters.busy.Load()),
		Workers:     s.workers,
		Uptime:      s.clock(),
	}
	if s.queue != nil {
		st.Queued = s.queue.length.Load()
	}
	for i := range st.finished {
		st.finished[i] = s.counters.finished[i].Load()
	}
	return st
}

// Wait returns when cond is true of the server's counts, which it looks at now
// and after every change of a count. A state that lasts is not missed; one that
// passes may be. If ctx ends first, the error says what the counts were and
// unwraps to the context's.
func (s *Server) Wait(ctx context.Context, cond func(Stats) bool) error {
	s.counters.waiters.Add(1)
	defer s.counters.waiters.Add(-1)
	for {
		event := s.counters.next()
		st := s.Stats()
		if cond(st) {
			return nil
		}
		select {
		case <-event:
		case <-ctx.Done():
			return fmt.Errorf("testserver: %s: waited in vain (%v): %w", s.name, st, ctx.Err())
		}
	}
}

// WaitInFlight waits until exactly n calls are in flight.
func (s *Server) WaitInFlight(ctx context.Context, n int64) error {
	return s.Wait(ctx, func(st Stats) bool { return st.InFlight == n })
}

// WaitStarted waits until at least n calls have started.
func (s *Server) WaitStarted(ctx context.Context, n int64) error {
	return s.Wait(ctx, func(st Stats) bool { return st.Started >= n })
}

// WaitConnections waits until exactly n connections are open.
func (s *Server) WaitConnections(ctx context.Context, n int64) error {
	return s.Wait(ctx, func(st Stats) bool { return st.Connections == n })
}

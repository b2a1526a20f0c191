// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package testserver

import (
	"io"
	"net"
	"sync"
	"time"
)

// DropPackets makes the network between the server and its clients lose all packets, until
// Heal. Nothing is refused and nothing closes: what is written gets no answer, and neither
// does a new connection. After Heal all of them continue where they stopped, because TCP sends
// again what was lost.
func (s *Server) DropPackets() { s.change(func(c *condition) { c.drops = true }) }

// HalfOpen makes the connections that are open half-open for good, as a server does that
// loses its power, or a firewall that forgets: what clients write on them is swallowed, and
// nothing comes back. New connections are served. The calls in flight on the old ones end for
// the server, and not for their clients.
func (s *Server) HalfOpen() {
	s.life.Lock()
	r := s.run
	s.life.Unlock()
	if r == nil {
		return
	}
	for _, c := range r.open() {
		c.halve()
	}
}

// conn is a connection that is counted while it is open, and can lose what is sent on it.
type conn struct {
	net.Conn
	run    *run
	closed chan struct{} // when the connection closes
	once   sync.Once
	err    error

	halved    chan struct{} // when it becomes half-open
	half      sync.Once
	swallower sync.Once
}

// Read implements net.Conn.
func (c *conn) Read(b []byte) (n int, err error) {
	if err = c.pass(); err == nil {
		n, err = c.Conn.Read(b)
		// What came while nothing passes is for later.
		if lost := c.pass(); lost != nil {
			n, err = 0, lost
		}
	}
	if c.isHalf() {
		c.swallower.Do(func() { c.run.owned.Go(c.swallow) })
	}
	return n, err
}

// Write implements net.Conn.
func (c *conn) Write(b []byte) (int, error) {
	if err := c.pass(); err != nil {
		return 0, err
	}
	return c.Conn.Write(b)
}

// pass waits while packets are dropped. It fails once the connection is closed or half-open.
func (c *conn) pass() error {
	for {
		now := c.run.server.current.Load()
		if !now.drops && !c.isHalf() {
			return nil
		}
		select {
		case <-now.changed:
		case <-c.halved:
			return net.ErrClosed
		case <-c.closed:
			return net.ErrClosed
		}
	}
}

func (c *conn) isHalf() bool {
	select {
	case <-c.halved:
		return true
	default:
		return false
	}
}

// halve makes the connection half-open. For gRPC, which then reads no more, it breaks.
func (c *conn) halve() {
	c.half.Do(func() {
		close(c.halved)
		_ = c.SetReadDeadline(time.Now())
	})
}

// swallow reads until the client closes the connection, or the run does.
func (c *conn) swallow() {
	_ = c.SetReadDeadline(time.Time{})
	_, _ = io.Copy(io.Discard, c.Conn)
	_ = c.shut()
}

// Close closes the connection for gRPC. The client of one that is half-open does not see it.
func (c *conn) Close() error {
	if c.isHalf() {
		return nil
	}
	return c.shut()
}

// shut closes the connection. It is idempotent.
func (c *conn) shut() error {
	c.once.Do(func() {
		close(c.closed)
		c.err = c.Conn.Close()
		c.run.mu.Lock()
		delete(c.run.conns, c)
		c.run.mu.Unlock()
		c.run.server.counters.connections.Add(-1)
		c.run.server.counters.changed()
	})
	return c.err
}

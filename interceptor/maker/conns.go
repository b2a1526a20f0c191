// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package maker

import (
	"context"
	"fmt"
	"runtime/debug"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/grpclog"
	"google.golang.org/grpc/status"

	"github.com/belfry-go/belfry/interceptor"
	"github.com/belfry-go/belfry/internal/inuse"
	"github.com/belfry-go/belfry/internal/isnil"
	"github.com/belfry-go/belfry/internal/waitlist"
)

var logger = grpclog.Component("belfry")

// An entry is a key that has a connection, or whose calls wait for one. It can have both:
// calls wait for their turn while the connection yields.
type entry struct {
	key  string
	conn *conn                 // Nil if it has none.
	turn *turn                 // Nil if no calls wait.
	node waitlist.Node[*entry] // In the queue, while turn is not nil.
}

// A turn is what the waiting calls of a key wait for together.
type turn struct {
	asked   context.Context // Of the call that came first.
	calls   int
	granted chan struct{} // Closed when conn is set, which all of calls then use.
	conn    *conn
}

// A conn is the connection of a key, from its making until it is closed.
type conn struct {
	key   string
	entry *entry // Nil once it is retired.
	node  waitlist.Node[*conn]
	in    *waitlist.List[*conn]
	refs  int // Calls that use it or wait for it to be made, and streams.

	made    chan struct{}            // Closed when the next three are set, which then do not change.
	conn    Conn                     // Nil while it is being made, and if it could not be.
	streams grpc.ClientConnInterface // conn, for streams.
	err     error

	began interceptor.Instant // When it was made,
	since interceptor.Instant // and when it became idle.
	why   Why                 // Why it is closed.
}

// The names of functions that need m.mu to be held end in Locked.

// takeLocked returns the connection of a key for one call, or nil if the call has to
// wait for its turn.
func (m *Maker) takeLocked(ctx context.Context, key string) *conn {
	e := m.entries[key]
	if e != nil && e.conn != nil && m.isAgedLocked(e.conn) {
		m.retireLocked(e.conn, Aged)
		m.balanceLocked()
		e = m.entries[key]
	}
	switch {
	case e != nil && e.turn != nil:
		return nil // Others came before it.
	case e != nil && e.conn.in == &m.yielding:
		return nil
	case e == nil:
		if m.conns >= m.config.MaxConns && !m.replaceLocked() {
			return nil
		}
		e = m.entryLocked(key)
		m.makeLocked(ctx, e)
	}
	m.useLocked(e.conn)
	return e.conn
}

// entryLocked returns the entry of a key.
func (m *Maker) entryLocked(key string) *entry {
	e := m.entries[key]
	if e == nil {
		e = &entry{key: key}
		e.node.Value = e
		m.entries[key] = e
	}
	return e
}

// tidyLocked drops an entry that nobody needs.
func (m *Maker) tidyLocked(e *entry) {
	if e.conn == nil && e.turn == nil {
		delete(m.entries, e.key)
	}
}

// joinLocked lets a call wait for the turn of its key.
func (m *Maker) joinLocked(ctx context.Context, key string) *turn {
	e := m.entryLocked(key)
	if e.turn != nil {
		e.turn.calls++
		return e.turn
	}
	t := &turn{asked: ctx, calls: 1, granted: make(chan struct{})}
	e.turn = t
	m.queue.Push(&e.node, waitlist.Rank{})
	m.balanceLocked()
	return t
}

// leave ends the wait of a call that gives up.
func (m *Maker) leave(key string, t *turn) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if t.conn != nil { // It was granted meanwhile.
		m.releaseLocked(t.conn)
		return
	}
	t.calls--
	if t.calls > 0 || m.closed {
		return
	}
	e := m.entries[key]
	m.queue.Remove(&e.node)
	e.turn = nil
	m.tidyLocked(e)
	m.balanceLocked()
}

// balanceLocked gives connections to the keys that wait, as far as there are any. For
// each that still waits a connection in use, the one that has been so for longest, takes
// no new calls: that of a key whose calls overlap would never become free otherwise.
func (m *Maker) balanceLocked() {
	for n := m.queue.First(false); n != nil; n = m.queue.First(false) {
		e := n.Value
		if e.conn == nil {
			if m.conns >= m.config.MaxConns && !m.replaceLocked() {
				break
			}
			m.makeLocked(e.turn.asked, e)
		} // Otherwise its own one has yielded to all that came before.
		m.grantLocked(e)
	}
	for m.yielding.Len() > m.queue.Len() {
		for n := range m.yielding.All(true) {
			if n.Value.entry.turn == nil { // At least one has none, because there are more than turns.
				m.moveLocked(n.Value, &m.busy)
				break
			}
		}
	}
	for m.yielding.Len() < m.queue.Len() && m.busy.Len() > 0 {
		m.moveLocked(m.busy.First(false).Value, &m.yielding)
	}
}

// grantLocked lets the calls that wait for the turn of e use its connection.
func (m *Maker) grantLocked(e *entry) {
	t := e.turn
	e.turn = nil
	m.queue.Remove(&e.node)
	t.conn = e.conn
	e.conn.refs += t.calls
	if e.conn.in == &m.yielding {
		m.moveLocked(e.conn, &m.busy)
	}
	close(t.granted)
}

// replaceLocked closes the connection that has been idle for longest. It reports whether
// there was one.
func (m *Maker) replaceLocked() bool {
	c := m.longestIdleLocked()
	if c == nil {
		return false
	}
	m.retireLocked(c, Replaced)
	return true
}

// longestIdleLocked returns the connection that has been idle for longest, or nil.
func (m *Maker) longestIdleLocked() *conn {
	if n := m.idle.First(false); n != nil {
		return n.Value
	}
	return nil
}

// moveLocked moves c to another list, or to none.
func (m *Maker) moveLocked(c *conn, to *waitlist.List[*conn]) {
	if c.in != nil {
		c.in.Remove(&c.node)
	}
	c.in = to
	if to != nil {
		to.Push(&c.node, waitlist.Rank{})
	}
}

// useLocked adds a use to a connection.
func (m *Maker) useLocked(c *conn) {
	c.refs++
	if c.in == &m.idle {
		m.moveLocked(c, &m.busy)
	}
}

// retain adds a use to a connection that is in use.
func (m *Maker) retain(c *conn) {
	m.mu.Lock()
	defer m.mu.Unlock()
	c.refs++
}

// release ends a use of c.
func (m *Maker) release(c *conn) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.releaseLocked(c)
}

func (m *Maker) releaseLocked(c *conn) {
	c.refs--
	if c.refs == 0 && c.conn != nil && !m.closed { // Otherwise settle or Close sees to it.
		m.restLocked(c)
	}
}

// restLocked decides what becomes of a connection that is not in use: it is idle, or
// makes room for others.
func (m *Maker) restLocked(c *conn) {
	switch {
	case c.entry == nil:
		delete(m.retired, c)
		m.closeLocked(c)
	case m.isAgedLocked(c):
		m.retireLocked(c, Aged)
	case m.conns > m.config.MaxConns || m.queue.Len() > 0:
		m.retireLocked(c, Replaced)
	default:
		c.since = interceptor.Now()
		m.moveLocked(c, &m.idle)
		m.armLocked()
		return
	}
	m.balanceLocked()
}

func (m *Maker) isAgedLocked(c *conn) bool {
	return m.config.MaxAge > 0 && c.conn != nil && interceptor.Now().Sub(c.began) >= m.config.MaxAge
}

// retireLocked lets c take no more calls, and makes room for another one. c is closed in
// the background, after its last call.
func (m *Maker) retireLocked(c *conn, why Why) {
	c.why = why
	m.moveLocked(c, nil)
	m.dropLocked(c)
	m.closing++
	if c.refs == 0 && c.conn != nil {
		m.closeLocked(c)
	} else {
		m.retired[c] = struct{}{}
	}
}

// dropLocked parts c from its key.
func (m *Maker) dropLocked(c *conn) {
	c.entry.conn = nil
	m.tidyLocked(c.entry)
	c.entry = nil
	m.conns--
}

// closeLocked closes c, which is made and retired, in the background.
func (m *Maker) closeLocked(c *conn) {
	m.wg.Go(func() {
		err := c.conn.Close()
		m.mu.Lock()
		m.closing--
		if c.why == Closed && err != nil {
			m.errs = append(m.errs, err)
		}
		m.mu.Unlock()
		if m.obs != nil {
			m.obs.Closed(c.key, c.why, err)
		}
	})
}

// makeLocked makes the connection of e.
func (m *Maker) makeLocked(asked context.Context, e *entry) {
	c := &conn{key: e.key, entry: e, made: make(chan struct{})}
	c.node.Value = c
	e.conn = c
	m.conns++
	m.moveLocked(c, &m.busy)
	timeout := m.config.MakeTimeout
	m.wg.Go(func() {
		ctx, cancel := context.WithCancel(context.WithoutCancel(asked))
		defer cancel()
		defer context.AfterFunc(m.life, cancel)()
		if timeout > 0 {
			over := fmt.Errorf("MakeTimeout of %v has passed: %w", timeout, context.DeadlineExceeded)
			ctx, cancel = context.WithTimeoutCause(ctx, timeout, over)
			defer cancel()
		}
		began := interceptor.Now()
		var conn Conn
		err := status.Error(codes.Internal, "make did not return") // For example after runtime.Goexit.
		defer func() { m.settle(c, conn, err, began) }()
		conn, err = m.call(ctx, c.key)
	})
}

// call calls make.
func (m *Maker) call(ctx context.Context, key string) (conn Conn, err error) {
	defer func() {
		if v := recover(); v != nil {
			// The stack is for who runs this program, and the error may go further than that.
			logger.Errorf("maker: make panicked for key %q: %v\n%s", key, v, debug.Stack())
			err = status.Errorf(codes.Internal, "make panicked: %v", v)
		}
	}()
	conn, err = m.make(ctx, key)
	switch {
	case err != nil && err == ctx.Err():
		err = context.Cause(ctx)
	case err == nil && isnil.Value(conn):
		err = status.Error(codes.Internal, "make returned neither a connection nor an error")
	}
	return conn, err
}

// settle records the result of making c.
func (m *Maker) settle(c *conn, conn Conn, err error, began interceptor.Instant) {
	var streams grpc.ClientConnInterface
	if err == nil {
		// The Maker does not ask whether conn is READY, neither for unary calls nor for
		// streams. A stack on conn itself may.
		streams, err = inuse.Streams(conn, func() { m.retain(c) }, func() { m.release(c) })
	}
	if m.obs != nil {
		m.obs.Made(c.key, interceptor.Now().Sub(began), err)
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	defer close(c.made)
	switch {
	case m.closed:
		c.err = m.closedRefusal
	case err != nil:
		c.err = m.refuse("the connection cannot be made", c.key, err, codes.Unavailable)
	}
	if err == nil {
		c.conn, c.streams, c.began = conn, streams, interceptor.Now()
	}
	switch {
	case err != nil && c.entry == nil:
		delete(m.retired, c)
		m.closing--
	case err != nil:
		m.moveLocked(c, nil)
		m.dropLocked(c)
		m.balanceLocked()
	case m.closed:
		m.closeLocked(c)
	case c.refs == 0:
		m.restLocked(c)
	}
}

// armLocked sets the timer for the connection that has been idle for longest.
func (m *Maker) armLocked() {
	c := m.longestIdleLocked()
	if m.timer != nil || c == nil || m.config.IdleTimeout < 0 {
		return
	}
	m.wg.Add(1)
	m.timer = time.AfterFunc(c.since.Add(m.config.IdleTimeout).Sub(interceptor.Now()), m.expire)
}

// disarmLocked stops the timer. If it is too late for that, expire finds out.
func (m *Maker) disarmLocked() {
	if m.timer != nil && m.timer.Stop() {
		m.wg.Done()
	}
	m.timer = nil
}

// expire closes what has been idle for long enough. It is called by the timer. The timer
// is not reset each time a connection is used; it waits for the connection that is the
// longest idle when it fires.
func (m *Maker) expire() {
	defer m.wg.Done()
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.closed {
		return
	}
	m.disarmLocked() // Itself, or one that was set while it waited for the lock.
	now := interceptor.Now()
	for c := m.longestIdleLocked(); c != nil && m.config.IdleTimeout >= 0 && now.Sub(c.since) >= m.config.IdleTimeout; c = m.longestIdleLocked() {
		m.retireLocked(c, Idle)
	}
	m.armLocked()
}

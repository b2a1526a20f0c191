// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package testserver

import (
	"errors"
	"net"
	"sync"
	"time"

	"google.golang.org/grpc"
)

// A run is a server from its start to its stop: one listener, and behind it one
// grpc.Server at a time. A GOAWAY that leaves the port open is a change of
// grpc.Server: the old one stops gracefully with its connections, the new one
// gets those that come.
type run struct {
	server   *Server
	listener net.Listener
	dead     chan struct{} // closed when the run is being killed

	// owned are the goroutines of this run: the accept loop, and of each
	// generation the one that serves and the one that drains.
	owned sync.WaitGroup

	mu      sync.Mutex           // guards what follows; taken after Server.life and before Server.conditions
	current *generation          // gets new connections; nil once the run ends
	live    map[*generation]bool // the current one and those that drain
	conns   map[*conn]bool       // open connections
	killed  bool                 // dead is closed
	ended   bool                 // the listener is closed for good
}

// A generation is one grpc.Server and the listener it believes to have.
type generation struct {
	grpc *grpc.Server
	feed *feed
}

// newRun begins to serve on a listener.
func newRun(s *Server, l net.Listener) *run {
	r := &run{
		server:   s,
		listener: l,
		dead:     make(chan struct{}),
		live:     make(map[*generation]bool),
		conns:    make(map[*conn]bool),
	}
	r.mu.Lock()
	r.current = r.newGenerationLocked()
	r.mu.Unlock()
	r.owned.Go(r.accept)
	return r
}

// newGenerationLocked starts a grpc.Server. Caller must hold r.mu.
func (r *run) newGenerationLocked() *generation {
	g := &generation{
		grpc: r.server.newGRPCServer(r),
		feed: &feed{addr: r.listener.Addr(), conns: make(chan net.Conn), closed: make(chan struct{})},
	}
	r.live[g] = true
	r.owned.Go(func() {
		// Serve returns when the generation is stopped, and only then, for the
		// feed fails in no other way.
		_ = g.grpc.Serve(g.feed)
	})
	return g
}

// accept hands connections to the current generation until the listener closes.
func (r *run) accept() {
	for {
		c, err := r.listener.Accept()
		if err != nil {
			r.mu.Lock()
			ended := r.ended
			r.mu.Unlock()
			if ended {
				return
			}
			// Out of file descriptors, for instance: what a real server does is
			// to try again a little later.
			select {
			case <-time.After(5 * time.Millisecond):
			case <-r.dead:
			}
			continue
		}
		r.serve(c)
	}
}

// serve hands one connection on.
func (r *run) serve(nc net.Conn) {
	c := &conn{Conn: nc, run: r}
	r.mu.Lock()
	if r.current == nil {
		r.mu.Unlock()
		nc.Close()
		return
	}
	// Counted before anybody can close it.
	r.server.counters.accepted.Add(1)
	r.server.counters.connections.Add(1)
	r.conns[c] = true
	r.mu.Unlock()
	r.server.counters.changed()
	for {
		r.mu.Lock()
		g := r.current
		r.mu.Unlock()
		if g == nil {
			_ = c.Close()
			return
		}
		if g.feed.put(c) {
			return
		}
		// This generation has just been told to drain; by now there is another
		// one, or none.
	}
}

// goAway makes a new generation the current one and drains the old one.
func (r *run) goAway() error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.current == nil {
		return errors.New("server is stopping")
	}
	old := r.current
	r.current = r.newGenerationLocked()
	r.owned.Go(func() {
		old.grpc.GracefulStop()
		r.mu.Lock()
		defer r.mu.Unlock()
		delete(r.live, old)
	})
	return nil
}

// closeListener makes the port refuse connections, and ends the run for those
// that have not been handed on.
func (r *run) closeListener() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.current = nil
	if !r.ended {
		r.ended = true
		r.listener.Close()
		r.server.keepPort(r.listener.Addr())
	}
}

// drain stops the run when its calls are over.
func (r *run) drain() {
	r.closeListener()
	r.stopAll((*grpc.Server).GracefulStop)
	r.owned.Wait()
}

// kill stops the run at once. It also hastens a drain.
func (r *run) kill() {
	r.closeListener()
	// The connections go first: a client must see them break, not a status from
	// a call that was told to end.
	r.closeConns()
	r.mu.Lock()
	if !r.killed {
		r.killed = true
		close(r.dead)
	}
	r.mu.Unlock()
	r.stopAll((*grpc.Server).Stop)
	r.owned.Wait()
}

// stopAll stops all generations in one of the two ways.
func (r *run) stopAll(stop func(*grpc.Server)) {
	r.mu.Lock()
	live := make([]*generation, 0, len(r.live))
	for g := range r.live {
		live = append(live, g)
	}
	r.mu.Unlock()
	var wg sync.WaitGroup
	for _, g := range live {
		wg.Go(func() { stop(g.grpc) })
	}
	wg.Wait()
}

// closeConns closes all connections, at the level of TCP.
func (r *run) closeConns() {
	r.mu.Lock()
	conns := make([]*conn, 0, len(r.conns))
	for c := range r.conns {
		conns = append(conns, c)
	}
	r.mu.Unlock()
	for _, c := range conns {
		_ = c.Close()
	}
}

// conn is a connection that is counted while it is open.
type conn struct {
	net.Conn
	run  *run
	once sync.Once
	err  error
}

// Close closes the connection. It is idempotent.
func (c *conn) Close() error {
	c.once.Do(func() {
		c.err = c.Conn.Close()
		c.run.mu.Lock()
		delete(c.run.conns, c)
		c.run.mu.Unlock()
		c.run.server.counters.connections.Add(-1)
		c.run.server.counters.changed()
	})
	return c.err
}

// feed is the listener of a generation: it accepts what a run puts into it.
type feed struct {
	addr   net.Addr
	conns  chan net.Conn
	closed chan struct{}
	once   sync.Once
}

// put hands over a connection, or returns false if the feed is closed.
func (f *feed) put(c net.Conn) bool {
	select {
	case f.conns <- c:
		return true
	case <-f.closed:
		return false
	}
}

// Accept implements net.Listener.
func (f *feed) Accept() (net.Conn, error) {
	select {
	case c := <-f.conns:
		return c, nil
	case <-f.closed:
		return nil, net.ErrClosed
	}
}

// Close implements net.Listener.
func (f *feed) Close() error {
	f.once.Do(func() { close(f.closed) })
	return nil
}

// Addr implements net.Listener.
func (f *feed) Addr() net.Addr { return f.addr }

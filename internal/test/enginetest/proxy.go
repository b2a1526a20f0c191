// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package enginetest

import (
	"net"
	"sync"
	"testing"
	"time"
)

// A Proxy forwards the connections of clients to an engine. Its address stays while the
// engine comes and goes. Its methods may be called concurrently.
type Proxy struct {
	l    net.Listener
	done sync.WaitGroup

	// mu guards the fields below.
	mu      sync.Mutex
	target  string // "": nowhere
	babble  bool   // answer by itself, with nonsense
	delay   time.Duration
	stalled chan struct{} // nil: not
	conns   map[net.Conn]struct{}
}

// NewProxy makes a proxy that forwards to nowhere yet. It ends with the test.
func NewProxy(t *testing.T) *Proxy {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	p := &Proxy{l: l, conns: make(map[net.Conn]struct{})}
	p.done.Go(p.serve)
	t.Cleanup(func() {
		l.Close()
		p.Delay(0)
		p.Resume()
		p.ForwardTo("")
		p.done.Wait()
	})
	return p
}

// Addr returns the address for clients.
func (p *Proxy) Addr() string { return p.l.Addr().String() }

// ForwardTo breaks all connections, and forwards those to come to target, or
// closes them if it is empty.
func (p *Proxy) ForwardTo(target string) { p.cut(target, false) }

// Babble breaks all connections, and answers those to come with nonsense until
// ForwardTo.
func (p *Proxy) Babble() { p.cut("", true) }

func (p *Proxy) cut(target string, babble bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.target, p.babble = target, babble
	for c := range p.conns {
		c.Close()
	}
}

// Delay lets what is read from either side wait for d before it passes on.
func (p *Proxy) Delay(d time.Duration) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.delay = d
}

// Stall lets no byte pass, and closes nothing, until Resume.
func (p *Proxy) Stall() {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.stalled == nil {
		p.stalled = make(chan struct{})
	}
}

// Resume undoes Stall.
func (p *Proxy) Resume() {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.stalled != nil {
		close(p.stalled)
		p.stalled = nil
	}
}

func (p *Proxy) serve() {
	for {
		in, err := p.l.Accept()
		if err != nil {
			return
		}
		p.done.Go(func() { p.forward(in) })
	}
}

func (p *Proxy) forward(in net.Conn) {
	defer in.Close()
	p.mu.Lock()
	target, babble := p.target, p.babble
	p.mu.Unlock()
	if babble {
		_, _ = in.Write([]byte("HTTP/1.1 200 OK\r\nContent-Length: 8\r\n\r\nnonsense"))
	}
	if target == "" {
		return
	}
	out, err := net.Dial("tcp", target)
	if err != nil {
		return
	}
	defer out.Close()
	p.mu.Lock()
	if p.target != target {
		p.mu.Unlock()
		return
	}
	p.conns[in], p.conns[out] = struct{}{}, struct{}{}
	p.mu.Unlock()
	var both sync.WaitGroup
	both.Go(func() { p.copy(out, in) })
	both.Go(func() { p.copy(in, out) })
	both.Wait()
	p.mu.Lock()
	delete(p.conns, in)
	delete(p.conns, out)
	p.mu.Unlock()
}

func (p *Proxy) copy(dst, src net.Conn) {
	// Both, so that the other direction ends too.
	defer dst.Close()
	defer src.Close()
	buf := make([]byte, 32<<10)
	for {
		n, err := src.Read(buf)
		p.mu.Lock()
		stalled, delay := p.stalled, p.delay
		p.mu.Unlock()
		if stalled != nil {
			<-stalled
		}
		time.Sleep(delay)
		if n > 0 {
			if _, err := dst.Write(buf[:n]); err != nil {
				return
			}
		}
		if err != nil {
			return
		}
	}
}

// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package p2c

import (
	"context"
	"encoding/binary"
	"math"
	"net"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"google.golang.org/grpc/balancer"
	"google.golang.org/grpc/balancer/base"
	"google.golang.org/grpc/connectivity"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/resolver"
)

// This file implements the field maxConnectionsPerSubchannel. A server may allow a connection
// only a number of streams at a time (SETTINGS_MAX_CONCURRENT_STREAMS). When the streams of an
// endpoint's connections are used up, the endpoint gets another connection. gRFC A105 gives
// this work to gRPC's subchannels. When grpc-go does it, this file can be deleted.
//
// The policy reads the setting from the decrypted connection: each SubConn has credentials
// that wrap those of the channel, and the connection that they return reads the headers of the
// frames that the server sends. The policy counts the streams in flight itself, from a pick to
// its Done. So it knows for each connection whether one more stream would have to wait, for
// unary calls and streams alike. A pick reserves a stream of an endpoint as it reserves an
// attempt of its endpointLimit.

const (
	maxConnections = 10 // as in gRFC A105

	// A connection without a call for one to two of these intervals is closed, unless it is
	// the last of its endpoint.
	sweepEvery = 30 * time.Second
)

// connections is the child of an endpoint that may have several connections. It has a
// pick_first child for each.
//
// Its methods of balancer.Balancer, and grow, sweep and remove, are called with
// endpoint.childMu held.
type connections struct {
	ep    *endpoint
	most  int                      // the largest number of connections
	state balancer.ClientConnState // the last update, for further connections
	stop  func()                   // stops the timer of sweep; nil if no timer is set

	// free is how many more streams the connections take: the sum of the free streams of
	// joined connections, without the streams that picks have reserved.
	free atomic.Int64
	// full is set when a pick finds no free stream. It is reset when a connection is READY,
	// is removed, or may be added.
	full atomic.Bool

	// mu guards the fields below and those of connection that say so. policy.mu and the
	// locks of the channel may be locked under it. It is locked under the locks of children.
	mu    sync.Mutex
	all   []*connection // the oldest first; childMu is held too when it changes
	links []link        // of the last picker that was reported; nil if there was none
}

// newChild makes the child of the endpoint.
func (ep *endpoint) newChild(cfg *config) {
	room := ep.candidate.meter.Load().room
	if cfg.connections <= 1 {
		ep.connections = nil
		room.connections.Store(nil)
		ep.child = ep.policy.children.Build(ep, ep.policy.opts)
		return
	}
	ep.connections = &connections{ep: ep, most: cfg.connections}
	room.connections.Store(ep.connections)
	ep.child = ep.connections
}

// setConnections sets the largest number of connections of the endpoint. It reports whether
// the endpoint has a new child, which needs an update.
func (ep *endpoint) setConnections(cfg *config) (rebuild bool) {
	ep.childMu.Lock()
	defer ep.childMu.Unlock()
	if (ep.connections != nil) != (cfg.connections > 1) {
		ep.child.Close()
		ep.newChild(cfg)
		return true
	}
	if c := ep.connections; c != nil && c.most != cfg.connections {
		c.most = cfg.connections
		c.full.Store(false)
	}
	return false
}

// UpdateClientConnState implements balancer.Balancer.
func (c *connections) UpdateClientConnState(ccs balancer.ClientConnState) error {
	c.state = ccs
	if len(c.all) == 0 {
		c.add()
	}
	var first error
	for i, k := range c.all {
		if err := k.child.UpdateClientConnState(ccs); i == 0 {
			first = err
		}
	}
	return first
}

// ResolverError implements balancer.Balancer.
func (c *connections) ResolverError(err error) {
	if len(c.all) > 0 {
		c.all[0].child.ResolverError(err)
	}
}

// UpdateSubConnState implements balancer.Balancer. It is never called.
func (c *connections) UpdateSubConnState(sc balancer.SubConn, s balancer.SubConnState) {
	c.ep.policy.UpdateSubConnState(sc, s)
}

// ExitIdle implements balancer.Balancer.
func (c *connections) ExitIdle() {
	for _, k := range c.all {
		k.child.ExitIdle()
	}
}

// Close implements balancer.Balancer.
func (c *connections) Close() {
	if c.stop != nil {
		c.stop()
	}
	c.mu.Lock()
	all := c.all
	c.all = nil
	if len(all) > 1 {
		c.ep.policy.metrics.connected(int64(1 - len(all)))
	}
	for _, k := range all {
		k.closeLocked()
	}
	c.mu.Unlock()
	for _, k := range all {
		k.child.Close()
	}
}

// take reserves a stream.
func (c *connections) take() bool {
	for {
		n := c.free.Load()
		if n <= 0 {
			if !c.full.Load() && !c.full.Swap(true) {
				go c.ep.call(c.grow)
			}
			return false
		}
		if c.free.CompareAndSwap(n, n-1) {
			return true
		}
	}
}

// grow adds a connection, unless there are enough or one is connecting.
func (c *connections) grow() {
	for _, k := range c.all {
		if k.transport() == nil {
			return
		}
	}
	if n := len(c.all); n == 0 || n >= c.most {
		return
	}
	k := c.add()
	c.changed(1, "because the streams of the others are used up")
	if c.stop == nil {
		c.stop = c.ep.policy.after(sweepEvery, c.tick)
	}
	_ = k.child.UpdateClientConnState(c.state) // the state of the child says if it fails
}

func (c *connections) add() *connection {
	k := &connection{ClientConn: c.ep, owner: c, subConns: make(map[balancer.SubConn]*subConn)}
	k.used.Store(true)
	k.state = balancer.State{ConnectivityState: connectivity.Connecting, Picker: base.NewErrPicker(balancer.ErrNoSubConnAvailable)}
	k.child = c.ep.policy.children.Build(k, c.ep.policy.opts)
	c.mu.Lock()
	c.all = append(c.all, k)
	c.mu.Unlock()
	return k
}

// changed records and logs that the number of connections has changed.
func (c *connections) changed(change int64, why string) {
	n := len(c.all)
	c.ep.policy.metrics.connected(change)
	logger.Infof("%s: endpoint %s has %d connections, %s", c.ep.policy.opts.Target.String(), c.ep.addr, n, why)
}

// tick is called by the timer.
func (c *connections) tick() { c.ep.call(c.sweep) }

// sweep closes the connections without a call since the last sweep, but not the oldest one.
func (c *connections) sweep() {
	for i := len(c.all) - 1; i > 0; i-- {
		if k := c.all[i]; k.idle() {
			c.remove(k, "one was idle")
		}
	}
	c.stop = nil
	if len(c.all) > 1 {
		c.stop = c.ep.policy.after(sweepEvery, c.tick)
	}
}

// remove closes a connection, unless it is the last. Its calls may still end on it.
func (c *connections) remove(k *connection, why string) {
	c.mu.Lock()
	i := slices.Index(c.all, k)
	if i < 0 || len(c.all) == 1 {
		c.mu.Unlock()
		if i == 0 {
			k.child.ExitIdle()
		}
		return
	}
	k.closeLocked()
	c.all = slices.Delete(c.all, i, i+1)
	c.full.Store(false)
	c.reportLocked()
	c.mu.Unlock()
	c.changed(-1, why)
	k.child.Close()
}

// reportLocked reports the state of the connections to the endpoint: READY if one is READY,
// else the state of the oldest.
func (c *connections) reportLocked() {
	var links []link
	for _, k := range c.all {
		if k.state.ConnectivityState == connectivity.Ready {
			links = append(links, link{k, k.joined, k.state.Picker})
		}
	}
	switch {
	case len(links) == 0:
		c.links = nil
		c.ep.UpdateState(c.all[0].state)
	case !slices.Equal(links, c.links):
		c.links = links
		c.ep.UpdateState(balancer.State{ConnectivityState: connectivity.Ready, Picker: &linksPicker{c, links}})
	}
}

// ready returns how many connections are READY.
func (c *connections) ready() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return len(c.links)
}

// connection is one connection of an endpoint, and the ClientConn of its pick_first child.
type connection struct {
	balancer.ClientConn // the endpoint
	owner               *connections
	child               balancer.Balancer
	used                atomic.Bool // whether it had a call since the last sweep

	// Guarded by owner.mu.
	closed   bool
	state    balancer.State
	subConns map[balancer.SubConn]*subConn
	joined   *transport // the transport whose free streams count; nil if there is none
}

// subConn holds the transport of a SubConn.
type subConn struct {
	transport *transport // the last one; guarded by connections.mu
}

// transport returns joined.
func (k *connection) transport() *transport {
	k.owner.mu.Lock()
	defer k.owner.mu.Unlock()
	return k.joined
}

// idle reports whether the connection has no call, and had none since the last call of idle.
func (k *connection) idle() bool {
	if w := k.transport(); w != nil && w.open() > 0 {
		return false
	}
	return !k.used.Swap(false)
}

func (k *connection) closeLocked() {
	k.closed = true
	k.partLocked()
}

// partLocked removes the free streams of the connection from those of the endpoint. It is called
// before picks stop using the connection.
func (k *connection) partLocked() {
	if w := k.joined; w != nil {
		k.joined = nil
		open := w.word.Or(apart) // see transport.leave
		k.owner.free.Add(open - w.most.Load())
	}
}

// joinLocked adds the free streams of k.joined to those of the endpoint. It is called after picks
// can use the connection, because a pick that has reserved a stream must find one.
func (k *connection) joinLocked() {
	if w := k.joined; w != nil && w.word.Load()&apart != 0 {
		open := w.word.And(^apart) &^ apart
		k.owner.free.Add(w.most.Load() - open)
		k.owner.ep.policy.queue.admit(k.owner.ep.candidate)
	}
}

// NewSubConn implements balancer.ClientConn.
func (k *connection) NewSubConn(addrs []resolver.Address, opts balancer.NewSubConnOptions) (balancer.SubConn, error) {
	c := k.owner
	s := &subConn{}
	var sc balancer.SubConn
	listener := opts.StateListener
	opts.StateListener = func(state balancer.SubConnState) {
		if state.ConnectivityState == connectivity.Shutdown {
			c.mu.Lock()
			delete(k.subConns, sc)
			c.mu.Unlock()
		}
		listener(state)
	}
	build := c.ep.policy.opts
	if build.DialCreds != nil || build.CredsBundle != nil { // nil only in tests without a network
		//lint:ignore SA1019 attributes, which are to replace it, reach only the credentials of the channel
		opts.CredsBundle = &tap{connection: k, subConn: s, creds: build.DialCreds, bundle: build.CredsBundle}
	}
	//lint:ignore SA1019 grpc has no other way to make one
	sc, err := k.ClientConn.NewSubConn(addrs, opts)
	if err == nil {
		c.mu.Lock()
		k.subConns[sc] = s
		c.mu.Unlock()
	}
	return sc, err
}

// UpdateState implements balancer.ClientConn.
func (k *connection) UpdateState(s balancer.State) {
	c := k.owner
	c.mu.Lock()
	defer c.mu.Unlock()
	if k.closed {
		return
	}
	was := k.state.ConnectivityState
	k.state = s
	switch s.ConnectivityState {
	case connectivity.Ready:
		if w := k.transportLocked(s.Picker); w != k.joined {
			k.partLocked()
			k.joined = w
		}
		defer k.joinLocked()
		c.full.Store(false)
	case connectivity.TransientFailure:
		// A lost connection is IDLE first. So this one is ejected. It is still connected, and the
		// policy may use it if no other endpoint is left.
	default:
		k.partLocked()
	}
	c.reportLocked()
	if was == connectivity.Ready && k.joined == nil && c.links != nil {
		// Others are left. A new one is made when their streams are used up.
		go c.ep.call(func() { c.remove(k, "one was lost") })
	}
}

// transportLocked returns the transport of the SubConn that a READY pick_first picks.
func (k *connection) transportLocked(p balancer.Picker) *transport {
	r, err := p.Pick(balancer.PickInfo{Ctx: context.Background()})
	if err == nil {
		if r.Done != nil {
			r.Done(balancer.DoneInfo{})
		}
		if s := k.subConns[r.SubConn]; s != nil && s.transport != nil {
			return s.transport
		}
	}
	if k.joined != nil {
		return k.joined
	}
	return newTransport(k, nil)
}

// A link is a connection that is READY, for picks.
type link struct {
	connection *connection
	transport  *transport
	picker     balancer.Picker
}

// linksPicker is the picker of an endpoint with connections. A pick has reserved a stream
// before it calls Pick.
type linksPicker struct {
	owner *connections
	links []link // the oldest first
}

// Pick implements balancer.Picker. It takes the oldest connection with a free stream, as
// gRFC A105 says, so that connections that are not needed become idle.
func (p *linksPicker) Pick(info balancer.PickInfo) (balancer.PickResult, error) {
	at := slices.IndexFunc(p.links, func(l link) bool { return l.transport.enter(l.transport.most.Load()) })
	if at < 0 {
		// The server allows fewer streams than before. The call waits in gRPC.
		at = slices.IndexFunc(p.links, func(l link) bool { return l.transport.enter(math.MaxInt64) })
	}
	if at < 0 {
		return balancer.PickResult{}, balancer.ErrNoSubConnAvailable
	}
	l := &p.links[at]
	result, err := l.picker.Pick(info)
	if err != nil {
		l.transport.leave()
		p.owner.free.Add(-1) // the pick still has a stream reserved, which untake frees
		return result, err
	}
	if !l.connection.used.Load() {
		l.connection.used.Store(true)
	}
	if result.Done == nil {
		result.Done = l.transport.done
		return result, nil
	}
	inner := result.Done
	result.Done = func(info balancer.DoneInfo) {
		inner(info)
		l.transport.done(info)
	}
	return result, nil
}

// A transport is one network connection to a server. It reads from the frames that the server
// sends how many streams the server allows.
type transport struct {
	net.Conn
	owner *connections
	most  atomic.Int64 // how many streams the server allows; changes under owner.mu
	word  atomic.Int64 // the number of open streams, and the bit apart
	done  func(balancer.DoneInfo)

	// Used only by Read.
	head     [9]byte // of a frame: its header, or one setting
	have     int     // how many bytes of head are read
	left     int     // how many bytes of the frame are left
	settings bool    // whether the frame has settings
	said     int64   // the number of streams in the frame; -1 if there is none
}

// apart is a bit of transport.word. It is set while the transport is not joined, so that its free
// streams do not count.
const apart = 1 << 62

// unlimited is most if the server sets no limit.
const unlimited = math.MaxUint32

func newTransport(k *connection, conn net.Conn) *transport {
	w := &transport{Conn: conn, owner: k.owner}
	w.most.Store(unlimited)
	w.word.Store(apart)
	w.done = func(balancer.DoneInfo) { w.leave() }
	return w
}

func (w *transport) open() int64 { return w.word.Load() &^ apart }

// enter counts one more stream if there are fewer than most. It reports whether it did.
func (w *transport) enter(most int64) bool {
	for {
		n := w.word.Load()
		if n >= most || n&apart != 0 {
			return false
		}
		if w.word.CompareAndSwap(n, n+1) {
			return true
		}
	}
}

// leave counts one stream less.
func (w *transport) leave() {
	if w.word.Add(-1)&apart == 0 {
		w.owner.free.Add(1)
	}
}

// allow is called when the server allows n streams.
func (w *transport) allow(n int64) {
	c := w.owner
	c.mu.Lock()
	more := n - w.most.Swap(n)
	joined := w.word.Load()&apart == 0
	if joined {
		c.free.Add(more)
	}
	c.mu.Unlock()
	if joined && more > 0 {
		c.ep.policy.queue.admit(c.ep.candidate)
	}
}

// Read implements net.Conn.
func (w *transport) Read(b []byte) (int, error) {
	n, err := w.Conn.Read(b)
	w.see(b[:n])
	return n, err
}

// see reads what the server has sent: frames (RFC 9113, section 4.1), for the settings in them
// (section 6.5).
func (w *transport) see(b []byte) {
	const (
		frameSettings  = 4
		flagAck        = 1
		settingStreams = 3
		settingLen     = 6
	)
	for len(b) > 0 {
		if w.left > 0 && !w.settings {
			n := min(w.left, len(b))
			w.left -= n
			b = b[n:]
			continue
		}
		want := len(w.head)
		if w.left > 0 {
			want = min(settingLen, w.left)
		}
		n := copy(w.head[w.have:want], b)
		b = b[n:]
		if w.have += n; w.have < want {
			return
		}
		w.have = 0
		if w.left == 0 {
			w.left = int(binary.BigEndian.Uint32(w.head[:4]) >> 8)
			w.settings = w.head[3] == frameSettings && w.head[4]&flagAck == 0
			w.said = -1
			continue
		}
		if want == settingLen && binary.BigEndian.Uint16(w.head[:2]) == settingStreams {
			w.said = int64(binary.BigEndian.Uint32(w.head[2:]))
		}
		if w.left -= want; w.left == 0 && w.said >= 0 {
			w.allow(w.said)
		}
	}
}

// A tap is the credentials of a SubConn. It wraps those of the channel, and the connections that
// they return.
type tap struct {
	connection *connection
	subConn    *subConn
	creds      credentials.TransportCredentials // nil if there is a bundle
	bundle     credentials.Bundle
}

// TransportCredentials implements credentials.Bundle.
func (t *tap) TransportCredentials() credentials.TransportCredentials {
	creds := t.creds
	if t.bundle != nil {
		creds = t.bundle.TransportCredentials()
	}
	return &tappedCreds{creds, t}
}

// PerRPCCredentials implements credentials.Bundle.
func (t *tap) PerRPCCredentials() credentials.PerRPCCredentials {
	if t.bundle != nil {
		return t.bundle.PerRPCCredentials()
	}
	return nil
}

// NewWithMode implements credentials.Bundle.
func (t *tap) NewWithMode(mode string) (credentials.Bundle, error) {
	if t.bundle == nil {
		return t, nil
	}
	b, err := t.bundle.NewWithMode(mode)
	if err != nil {
		return nil, err
	}
	return &tap{t.connection, t.subConn, nil, b}, nil
}

type tappedCreds struct {
	credentials.TransportCredentials
	tap *tap
}

// ClientHandshake implements credentials.TransportCredentials.
func (t *tappedCreds) ClientHandshake(ctx context.Context, authority string, raw net.Conn) (net.Conn, credentials.AuthInfo, error) {
	conn, info, err := t.TransportCredentials.ClientHandshake(ctx, authority, raw)
	if err != nil {
		return conn, info, err
	}
	k := t.tap.connection
	w := newTransport(k, conn)
	k.owner.mu.Lock()
	t.tap.subConn.transport = w
	k.owner.mu.Unlock()
	return w, info, nil
}

// Clone implements credentials.TransportCredentials.
func (t *tappedCreds) Clone() credentials.TransportCredentials {
	return &tappedCreds{t.TransportCredentials.Clone(), t.tap}
}

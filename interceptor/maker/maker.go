// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package maker

import (
	"context"
	"errors"
	"iter"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/belfry-go/belfry/interceptor"
	"github.com/belfry-go/belfry/internal/check"
	"github.com/belfry-go/belfry/internal/isnil"
	"github.com/belfry-go/belfry/internal/lazystream"
	"github.com/belfry-go/belfry/internal/waitlist"
)

// ReasonMake is the reason of a call that was refused because its key or connection could
// not be made. The refusal wraps the error. Its code is that of the error if it has a
// gRPC status, else UNAVAILABLE for a connection and INVALID_ARGUMENT for a key. Nothing
// was sent. It names the key if there is one.
const ReasonMake interceptor.Reason = "MAKE_FAILED"

// A Conn is a connection that can be closed, such as a *grpc.ClientConn.
type Conn interface {
	grpc.ClientConnInterface
	Close() error
}

// Config bounds the connections. The zero Config is the default.
type Config struct {
	// MaxConns bounds the connections, including those that are being made. Those that
	// are being closed, or that wait for their last calls before that because of MaxAge
	// or [Maker.Forget], come on top. At least 1; zero means 100.
	MaxConns int

	// IdleTimeout is how long a connection must be unused before it is closed. At least
	// 1 ms; zero means 5 minutes, [None] means never.
	IdleTimeout time.Duration

	// MaxAge is how long a connection takes new calls after it was made. Then the next
	// call of its key makes another one, and the old one is closed when its calls have
	// ended. At least 1 ms; zero means no bound.
	MaxAge time.Duration

	// MaxWait is how long a call may wait for its connection, while all are in use or
	// while its own is being made. Zero means no bound besides the call's own, [None]
	// means not to wait. Every call waits up to 20 ms for its connection to be made,
	// which is far more than grpc.NewClient takes.
	MaxWait time.Duration

	// MakeTimeout is when the context of a [MakeFunc] ends. At least 1 ms; zero means
	// 20 seconds, as long as gRPC gives an attempt to connect; [None] means never.
	MakeTimeout time.Duration
}

// Defaults of [Config].
const (
	DefaultMaxConns    = 100
	DefaultIdleTimeout = 5 * time.Minute
	DefaultMakeTimeout = 20 * time.Second
)

// None as an IdleTimeout means that idle connections are never closed, as a MaxWait that
// calls do not wait, and as a MakeTimeout that a MakeFunc may take for ever.
const None = check.None

// withDefaults checks c and returns it with its defaults filled in.
func (c Config) withDefaults(errs *check.Errors) Config {
	atLeast := check.AtLeast(time.Millisecond)
	check.Default(errs, "MaxConns", &c.MaxConns, check.Positive, DefaultMaxConns)
	check.DefaultOrNone(errs, "IdleTimeout", &c.IdleTimeout, atLeast, DefaultIdleTimeout, "never")
	check.Zero(errs, "MaxAge", c.MaxAge, atLeast, "no bound")
	check.ZeroOrNone(errs, "MaxWait", c.MaxWait, check.Positive, "no bound", "not to wait")
	check.DefaultOrNone(errs, "MakeTimeout", &c.MakeTimeout, atLeast, DefaultMakeTimeout, "never")
	return c
}

// A KeyFunc returns the key of the connection that a call belongs to. args is the
// request of a unary call or of a call whose only stream is that of its responses, and
// nil for other streams. It is called once for each call that arrives here, which behind
// a retry or hedge are attempts, concurrently. An error refuses the call; the error of an
// ended ctx refuses it with DEADLINE_EXCEEDED or CANCELLED.
type KeyFunc func(ctx context.Context, method string, args any) (key string, err error)

// A MakeFunc makes the connection of a key. ctx has the values of the call that asked
// first but not its deadline, because the connection is for all later calls too: if the
// callers give up, the next one finds it made. ctx ends after Config.MakeTimeout and when
// the Maker is closed, and the MakeFunc must then return. It is called concurrently for
// different keys. A panic, and a nil connection without an error, become an error with
// code INTERNAL; the stack of a panic is logged.
type MakeFunc func(ctx context.Context, key string) (Conn, error)

// An Observer sees what becomes of the connections of a Maker. Its methods are called
// concurrently, and what they do delays what they are told of. They may use the Maker,
// but Close.
type Observer interface {
	// Made is called when a MakeFunc has returned after took; err says why there is no
	// connection.
	Made(key string, took time.Duration, err error)
	// Waited is called when a call has waited for d, until another connection became
	// unused or until its own was made, whether it got it or not.
	Waited(key string, d time.Duration)
	// Closed is called when a connection was closed; err is what its Close returned.
	Closed(key string, why Why, err error)
}

// Why says why a connection was closed.
type Why string

// Why connections are closed.
const (
	Idle      Why = "idle"      // It was unused for Config.IdleTimeout.
	Replaced  Why = "replaced"  // Another key needed its place, or MaxConns became smaller.
	Aged      Why = "aged"      // It was older than Config.MaxAge.
	Forgotten Why = "forgotten" // By [Maker.Forget].
	Closed    Why = "closed"    // By [Maker.Close].
)

// An Option configures what is not data.
type Option func(*options)

type options struct {
	name     string
	observer Observer
	errs     *check.Errors
}

// WithName sets the name of the Maker in refusals; by default "maker". It must not
// be empty.
func WithName(name string) Option { return func(o *options) { o.name = name } }

// WithObserver lets an Observer see what becomes of the connections.
func WithObserver(obs Observer) Option {
	return func(o *options) {
		o.errs.NotNil(isnil.Value(obs), "WithObserver", "an observer")
		o.observer = obs
	}
}

// A Maker is a grpc.ClientConnInterface that makes connections on demand. All its
// methods may be called concurrently.
type Maker struct {
	name string
	key  KeyFunc
	make MakeFunc
	obs  Observer // Nil if nobody observes.

	full, making, closedRefusal *interceptor.Refusal

	life context.Context    // Ends when Close begins,
	end  context.CancelFunc // which ends it.
	done chan struct{}      // Closed when Close has finished.
	wg   sync.WaitGroup     // Goroutines, and the timer while it is armed. Added to with mu held.

	// mu guards the fields below and those of entries, turns and conns. Nothing is
	// locked under it, and no function of the user's is called.
	mu      sync.Mutex
	given   Config // As it was given.
	config  Config // With defaults.
	entries map[string]*entry
	conns   int // Made or being made, and not retired.
	closing int // Retired, until they are closed.

	// Each connection that is not retired is in one of these lists.
	idle     waitlist.List[*conn] // Not in use, the longest idle first.
	busy     waitlist.List[*conn] // In use or being made, the longest so first.
	yielding waitlist.List[*conn] // Like busy, but they take no new calls, because keys wait.
	retired  map[*conn]struct{}   // Those that take no calls any more, while some last.

	queue  waitlist.List[*entry] // Keys whose calls wait for a connection, the oldest first.
	timer  *time.Timer           // Closes idle ones; nil if it is not armed.
	closed bool
	errs   []error // Of closing, by Close.
}

// New returns a Maker, which has to be closed. An error is a
// [*interceptor.ConfigError], or several joined.
func New(config Config, key KeyFunc, makeConn MakeFunc, opts ...Option) (*Maker, error) {
	errs := check.Of("maker")
	o := options{name: "maker", errs: errs}
	check.Options(errs, &o, opts)
	errs.Name(o.name)
	filled := config.withDefaults(errs)
	errs.NotNil(key == nil, "key", "a function")
	errs.NotNil(makeConn == nil, "makeConn", "a function")
	if err := errs.Err(); err != nil {
		return nil, err
	}
	m := &Maker{
		name: o.name, key: key, make: makeConn, obs: o.observer, given: config, config: filled,
		entries: map[string]*entry{}, retired: map[*conn]struct{}{}, done: make(chan struct{}),
	}
	m.life, m.end = context.WithCancel(context.Background())
	m.full = interceptor.Refuse(m.name, interceptor.ReasonConcurrency, "all connections are in use")
	m.making = interceptor.Refuse(m.name, interceptor.ReasonNotReady, "the connection is being made")
	m.closedRefusal = interceptor.Refuse(m.name, interceptor.ReasonDrain, "it is closed")
	return m, nil
}

// Update replaces the config while calls run. If MaxConns becomes smaller, idle
// connections are closed at once, and others when they become idle. If it becomes
// larger, waiting calls get connections. A wrong config changes nothing.
func (m *Maker) Update(config Config) error {
	errs := check.Of("maker")
	filled := config.withDefaults(errs)
	if err := errs.Err(); err != nil {
		return err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.closed {
		return nil // The Maker is closed.
	}
	m.given, m.config = config, filled
	m.balanceLocked()
	for c := m.longestIdleLocked(); c != nil && m.conns > filled.MaxConns; c = m.longestIdleLocked() {
		m.retireLocked(c, Replaced)
	}
	m.disarmLocked()
	m.armLocked()
	return nil
}

// Config returns the config as it was given to New or Update.
func (m *Maker) Config() Config {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.given
}

// Stats are how many connections there are, and what waits.
type Stats struct {
	Conns   int // made or being made: at most Config.MaxConns
	Idle    int // of these, the ones that are not in use
	Making  int // of these, the ones that are being made
	Queued  int // keys that wait for one of the others to become idle
	Waiting int // the calls of these keys
	Closing int // being closed, or waiting for their last calls before that, besides Conns
}

// Stats returns the stats. It takes as long as there are keys.
func (m *Maker) Stats() Stats {
	m.mu.Lock()
	defer m.mu.Unlock()
	s := Stats{Conns: m.conns, Idle: m.idle.Len(), Queued: m.queue.Len(), Closing: m.closing}
	for _, e := range m.entries {
		if e.conn != nil && e.conn.conn == nil {
			s.Making++
		}
		if e.turn != nil {
			s.Waiting += e.turn.calls
		}
	}
	return s
}

// Conns returns the connections that take calls now. None is closed while the loop holds
// it. belfry.WaitReady waits for all of them.
func (m *Maker) Conns() iter.Seq[grpc.ClientConnInterface] {
	return func(yield func(grpc.ClientConnInterface) bool) {
		m.mu.Lock()
		var conns []*conn
		for _, e := range m.entries {
			if e.conn != nil && e.conn.conn != nil {
				m.useLocked(e.conn)
				conns = append(conns, e.conn)
			}
		}
		m.mu.Unlock()
		defer func() {
			for _, c := range conns {
				m.release(c)
			}
		}()
		for _, c := range conns {
			if !yield(c.conn) {
				return
			}
		}
	}
}

// Invoke makes a unary call on the connection of its key.
func (m *Maker) Invoke(ctx context.Context, method string, args, reply any, opts ...grpc.CallOption) error {
	c, err := m.acquire(ctx, method, args, opts)
	if err != nil {
		return err
	}
	defer m.release(c)
	return c.conn.Invoke(ctx, method, args, reply, opts...)
}

// NewStream opens a stream on the connection of its key. The connection is in use until
// the stream ends: until it is read to its end or its context ends, one of which gRPC
// requires anyway. A stream that has one request is opened when that is sent, because its
// key may depend on it: until then nothing waits and nothing fails.
func (m *Maker) NewStream(ctx context.Context, desc *grpc.StreamDesc, method string, opts ...grpc.CallOption) (grpc.ClientStream, error) {
	open := func(args any) (grpc.ClientStream, error) {
		c, err := m.acquire(ctx, method, args, opts)
		if err != nil {
			return nil, err
		}
		defer m.release(c) // The stream uses it too, see settle.
		return c.streams.NewStream(ctx, desc, method, opts...)
	}
	if lazystream.Has(desc) {
		return lazystream.New(ctx, open), nil
	}
	return open(nil)
}

// refuse returns the refusal of a call whose key or connection could not be made.
func (m *Maker) refuse(what, key string, err error, code codes.Code) error {
	r := interceptor.Refuse(m.name, ReasonMake, what).ForKey(key).Because(err, false)
	r.Code = code
	if st, ok := status.FromError(err); ok && st.Code() != codes.OK {
		r.Code = st.Code()
	}
	return r
}

// acquire returns the connection of a call, which is then in use until release.
func (m *Maker) acquire(ctx context.Context, method string, args any, opts []grpc.CallOption) (*conn, error) {
	key, err := m.key(ctx, method, args)
	if err != nil {
		if ctx.Err() != nil && errors.Is(err, ctx.Err()) {
			return nil, interceptor.Ended(ctx, m.name)
		}
		return nil, m.refuse("the call has no key", "", err, codes.InvalidArgument)
	}
	m.mu.Lock()
	if m.closed {
		m.mu.Unlock()
		return nil, m.closedRefusal
	}
	c := m.takeLocked(ctx, key)
	maxWait := m.config.MaxWait
	if c != nil && c.conn != nil { // The usual case.
		m.mu.Unlock()
		return c, nil
	}
	w := interceptor.WaitOf(opts)
	switch {
	case maxWait == None:
		w = interceptor.None
	case maxWait > 0:
		w = w.Narrow(interceptor.For(maxWait))
	}
	var t *turn
	if c == nil && w.Remaining() > 0 {
		t = m.joinLocked(ctx, key)
	}
	m.mu.Unlock()
	if c == nil && t == nil {
		return nil, m.full
	}
	return m.await(ctx, key, c, t, w, opts)
}

// grace is how long a call that may not wait waits for a connection to be made.
const grace = 20 * time.Millisecond

// await waits for a turn, unless t is nil, and then until the connection is made.
func (m *Maker) await(ctx context.Context, key string, c *conn, t *turn, w interceptor.Wait, opts []grpc.CallOption) (*conn, error) {
	if m.obs != nil {
		since := interceptor.Now()
		defer func() { m.obs.Waited(key, interceptor.Now().Sub(since)) }()
	}
	parked, done := interceptor.ParkOf(ctx, opts)
	defer done()
	parked, cancel := context.WithCancelCause(parked)
	defer cancel(nil)
	defer context.AfterFunc(m.life, func() { cancel(m.closedRefusal) })()
	if t != nil {
		if err := m.on(parked, w, t.granted, m.full); err != nil {
			m.leave(key, t)
			return nil, err
		}
		c = t.conn
	}
	err := m.on(parked, max(w, interceptor.For(grace)), c.made, m.making)
	if err == nil {
		err = c.err
	}
	if err != nil {
		m.release(c)
		return nil, err
	}
	return c, nil
}

// on waits for ready as long as w allows; over is the refusal if that is not enough.
func (m *Maker) on(ctx context.Context, w interceptor.Wait, ready <-chan struct{}, over *interceptor.Refusal) error {
	switch err := w.On(ctx, ready); err {
	case nil:
		return nil
	case interceptor.ErrWaitOver:
		return over
	}
	return interceptor.Ended(ctx, m.name)
}

// Forget drops the connection of a key: the next call makes another one, and the old one
// is closed when its calls have ended. It is for a connection that the program knows to
// be useless. It reports whether there was one.
func (m *Maker) Forget(key string) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	e := m.entries[key]
	if e == nil || e.conn == nil {
		return false
	}
	m.retireLocked(e.conn, Forgotten)
	m.balanceLocked()
	return true
}

// Close closes all connections, and waits until that is done and no goroutine of the
// Maker runs any more. Calls in flight end as their connection ends them. Calls that
// wait, and later ones, are refused with UNAVAILABLE and reason DRAIN. It returns the
// errors of closing. Called again it waits and returns the same.
func (m *Maker) Close() error {
	m.mu.Lock()
	if m.closed {
		m.mu.Unlock()
		<-m.done
		return errors.Join(m.errs...)
	}
	m.closed = true
	m.end()
	m.disarmLocked()
	for _, e := range m.entries {
		if e.turn != nil {
			m.queue.Remove(&e.node) // Its calls wake because life has ended.
			e.turn = nil
		}
		if e.conn != nil {
			m.retireLocked(e.conn, Closed)
		}
	}
	clear(m.entries)
	for c := range m.retired {
		c.why = Closed
		if c.conn != nil { // Otherwise settle closes it.
			m.closeLocked(c)
		}
	}
	m.mu.Unlock()
	m.wg.Wait()
	close(m.done)
	return errors.Join(m.errs...)
}

// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package maker

import (
	"context"
	"errors"
	"runtime/debug"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/belfry-go/belfry/interceptor"
	"github.com/belfry-go/belfry/internal/check"
	"github.com/belfry-go/belfry/internal/isnil"
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
	// MaxConns bounds the connections, including those that are being made but not those
	// that are being closed. At least 1; zero means 100.
	MaxConns int

	// IdleTimeout is how long a connection must be unused before it is closed. At least
	// 1 ms; zero means 5 minutes, [None] means never.
	IdleTimeout time.Duration

	// MaxWait is how long a call may wait for its connection, while all are in use or
	// while its own is being made. Zero means no bound besides the call's own, [None]
	// means not to wait. Every call waits up to 20 ms for its connection to be made,
	// which is far more than grpc.NewClient takes.
	MaxWait time.Duration
}

// Defaults of [Config].
const (
	DefaultMaxConns    = 100
	DefaultIdleTimeout = 5 * time.Minute
)

// None as an IdleTimeout means that idle connections are never closed, and as a MaxWait
// that calls do not wait.
const None = check.None

// withDefaults checks c and returns it with its defaults filled in.
func (c Config) withDefaults(errs *check.Errors) Config {
	check.Default(errs, "MaxConns", &c.MaxConns, check.Positive, DefaultMaxConns)
	check.DefaultOrNone(errs, "IdleTimeout", &c.IdleTimeout, check.AtLeast(time.Millisecond), DefaultIdleTimeout, "never")
	check.ZeroOrNone(errs, "MaxWait", c.MaxWait, check.Positive, "no bound", "not to wait")
	return c
}

// A KeyFunc returns the key of the connection that a call belongs to. args is the
// request of a unary call, and nil for a stream. It is called once for each call,
// concurrently. An error refuses the call; the error of an ended ctx refuses it with
// DEADLINE_EXCEEDED or CANCELLED.
type KeyFunc func(ctx context.Context, method string, args any) (key string, err error)

// A MakeFunc makes the connection of a key. ctx has the values of the call that asked
// first but not its deadline, because the connection is for all later calls too: if the
// callers give up, the next one finds it made. ctx ends when the Maker is closed, and
// the MakeFunc must then return. It is called concurrently for different keys. A panic
// becomes an error with code INTERNAL.
type MakeFunc func(ctx context.Context, key string) (Conn, error)

// A Maker is a grpc.ClientConnInterface that makes connections on demand. All its
// methods may be called concurrently.
type Maker struct {
	name string
	key  KeyFunc
	make MakeFunc

	full, making, closedRefusal *interceptor.Refusal

	life context.Context    // Ends when Close begins,
	end  context.CancelFunc // which ends it.
	done chan struct{}      // Closed when Close has finished.
	wg   sync.WaitGroup     // Goroutines, and the timer while it is armed. Added to with mu held.

	// mu guards the fields below and those of entries. Nothing is locked under it,
	// and no function of the user's is called.
	mu      sync.Mutex
	given   Config // As it was given.
	config  Config // With defaults.
	entries map[string]*entry
	retired map[*entry]struct{} // Entries that take no new calls, and are closed when their last one ends.
	slots   int                 // Entries whose connection is made or being made.
	closing int                 // Connections that are being closed in the background.
	idle    list                // Entries that are not in use, the longest idle first.
	queue   list                // Entries that have no slot, the oldest first.
	timer   *time.Timer         // Closes idle ones; nil if it is not armed.
	turns   *time.Timer         // Retires one while others wait; nil if it is not armed.
	closed  bool
	errs    []error // Of closing, by Close.
}

// An entry is the connection of a key, from the first call that asks for it until it is
// closed.
type entry struct {
	maker   *Maker
	key     string
	granted chan struct{} // Closed when it has a slot, or err.
	made    chan struct{} // Closed when conn or err is set, which do not change after that.

	conn    Conn                     // Nil while it is being made, and if it could not be.
	streams grpc.ClientConnInterface // conn, with a stack that knows the end of streams.
	err     error

	asked      context.Context    // Of the call that asked first; nil once it is being made.
	cancel     context.CancelFunc // Of making it; nil before and afterwards.
	refs       int                // Calls that use it or wait for it, and streams.
	in         *list              // It is in at most one list.
	prev, next *entry
	began      interceptor.Instant // When it was made,
	since      interceptor.Instant // and when it became idle.
}

// An Option configures what is not data.
type Option func(*options)

type options struct{ name string }

// WithName sets the name of the Maker in refusals; by default "maker". It must not
// be empty.
func WithName(name string) Option { return func(o *options) { o.name = name } }

// New returns a Maker, which has to be closed. An error is a
// [*interceptor.ConfigError], or several joined.
func New(config Config, key KeyFunc, makeConn MakeFunc, opts ...Option) (*Maker, error) {
	o := options{name: "maker"}
	for _, opt := range opts {
		opt(&o)
	}
	errs := check.Of("maker")
	errs.Name(o.name)
	filled := config.withDefaults(errs)
	errs.NotNil(key == nil, "key", "a function")
	errs.NotNil(makeConn == nil, "makeConn", "a function")
	if err := errs.Err(); err != nil {
		return nil, err
	}
	m := &Maker{
		name: o.name, key: key, make: makeConn, given: config, config: filled,
		entries: map[string]*entry{}, retired: map[*entry]struct{}{}, done: make(chan struct{}),
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
	m.grantLocked()
	for m.slots > filled.MaxConns && m.idle.first != nil {
		m.dropLocked(m.idle.first)
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

// Stats are how many connections there are.
type Stats struct {
	Conns   int // made or being made: at most Config.MaxConns
	Idle    int // of these, the ones that are not in use
	Queued  int // keys that wait for one of the others to become idle
	Closing int // being closed, besides Conns
}

// Stats returns the stats.
func (m *Maker) Stats() Stats {
	m.mu.Lock()
	defer m.mu.Unlock()
	return Stats{Conns: m.slots, Idle: m.idle.len, Queued: m.queue.len, Closing: m.closing}
}

// Invoke makes a unary call on the connection of its key.
func (m *Maker) Invoke(ctx context.Context, method string, args, reply any, opts ...grpc.CallOption) error {
	e, err := m.acquire(ctx, method, args, opts)
	if err != nil {
		return err
	}
	defer m.release(e)
	return e.conn.Invoke(ctx, method, args, reply, opts...)
}

// NewStream opens a stream on the connection of its key. The connection is in use until
// the stream ends: until it is read to its end or its context ends, one of which gRPC
// requires anyway.
func (m *Maker) NewStream(ctx context.Context, desc *grpc.StreamDesc, method string, opts ...grpc.CallOption) (grpc.ClientStream, error) {
	e, err := m.acquire(ctx, method, nil, opts)
	if err != nil {
		return nil, err
	}
	defer m.release(e) // The stream has a reference of its own, see inUse.
	return e.streams.NewStream(ctx, desc, method, opts...)
}

// inUse is the layer that keeps a connection while a stream uses it.
type inUse struct {
	interceptor.GateOnly
	entry *entry
}

func (l *inUse) NewLayer() (interceptor.Layer, error) { return l, nil }
func (l *inUse) String() string                       { return "inuse" }
func (l *inUse) Traits() interceptor.Traits           { return 0 }

func (l *inUse) WrapGate(inner interceptor.Gate) interceptor.Gate {
	return interceptor.GateFunc(func(ctx context.Context, a *interceptor.Admission, w interceptor.Wait) error {
		l.entry.maker.retain(l.entry)
		a.Hold(l, 0)
		return inner.Admit(ctx, a, w)
	})
}

// Release is called when the stream has ended.
func (l *inUse) Release(int64, interceptor.End) { l.entry.maker.release(l.entry) }

func (m *Maker) retain(e *entry) {
	m.mu.Lock()
	e.refs++ // It is in use already, by the call that opens the stream.
	m.mu.Unlock()
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
func (m *Maker) acquire(ctx context.Context, method string, args any, opts []grpc.CallOption) (*entry, error) {
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
	e := m.entries[key]
	if e == nil {
		e = m.addLocked(ctx, key)
	}
	e.refs++
	if e.in == &m.idle {
		m.idle.remove(e)
	}
	maxWait := m.config.MaxWait
	m.mu.Unlock()

	select {
	case <-e.made: // The usual case.
	default:
		if err := m.await(ctx, e, maxWait, opts); err != nil {
			m.release(e)
			return nil, err
		}
	}
	if e.err != nil {
		m.release(e)
		return nil, e.err
	}
	return e, nil
}

// grace is how long a call that may not wait waits for a connection to be made.
const grace = 20 * time.Millisecond

// await waits for a slot and then until the connection is made.
func (m *Maker) await(ctx context.Context, e *entry, maxWait time.Duration, opts []grpc.CallOption) error {
	w := interceptor.WaitOf(opts)
	switch {
	case maxWait == None:
		w = interceptor.None
	case maxWait > 0:
		w = w.Narrow(interceptor.For(maxWait))
	}
	parked, done := interceptor.ParkOf(ctx, opts)
	defer done()
	parked, cancel := context.WithCancelCause(parked)
	defer cancel(nil)
	defer context.AfterFunc(m.life, func() { cancel(m.closedRefusal) })()
	if w.Remaining() > 0 {
		m.takeTurns()
	}
	if err := m.on(parked, w, e.granted, m.full); err != nil {
		return err
	}
	return m.on(parked, max(w, interceptor.For(grace)), e.made, m.making)
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

// release ends one use of e.
func (m *Maker) release(e *entry) {
	m.mu.Lock()
	defer m.mu.Unlock()
	e.refs--
	switch {
	case e.refs > 0 || m.closed:
	case e.in == &m.queue: // Nobody waits for it any more.
		m.queue.remove(e)
		delete(m.entries, e.key)
	case e.conn == nil: // It is still being made, or it could not be made.
	default:
		m.restLocked(e)
	}
}

// restLocked makes e, which is made and not in use, idle, or gives its slot away. Caller
// must hold m.mu, as for all functions whose names end in Locked.
func (m *Maker) restLocked(e *entry) {
	if m.isRetiredLocked(e) || m.slots > m.config.MaxConns || m.queue.first != nil {
		m.dropLocked(e)
		return
	}
	e.since = interceptor.Now()
	m.idle.push(e)
	m.armLocked()
}

// addLocked makes the entry of a key and finds it a slot, or a position in the queue.
func (m *Maker) addLocked(ctx context.Context, key string) *entry {
	e := &entry{maker: m, key: key, asked: ctx, granted: make(chan struct{}), made: make(chan struct{})}
	m.entries[key] = e
	if m.slots >= m.config.MaxConns && m.idle.first != nil {
		m.dropLocked(m.idle.first)
	}
	m.queue.push(e)
	m.grantLocked()
	return e
}

// grantLocked gives free slots to those that wait.
func (m *Maker) grantLocked() {
	for m.slots < m.config.MaxConns && m.queue.first != nil {
		e := m.queue.first
		m.queue.remove(e)
		m.slots++
		m.makeLocked(e)
	}
}

// makeLocked makes the connection of e, which has a slot.
func (m *Maker) makeLocked(e *entry) {
	// Do not keep the values of the call longer than needed.
	ctx, cancel := context.WithCancel(context.WithoutCancel(e.asked))
	e.asked, e.cancel = nil, cancel
	close(e.granted)
	m.wg.Go(func() {
		defer cancel()
		var conn Conn
		err := error(status.Error(codes.Internal, "make did not return")) // For example after runtime.Goexit.
		defer func() { m.settle(e, conn, err) }()
		conn, err = m.call(ctx, e.key)
	})
}

// call calls make.
func (m *Maker) call(ctx context.Context, key string) (conn Conn, err error) {
	defer func() {
		if v := recover(); v != nil {
			err = status.Errorf(codes.Internal, "make panicked: %v\n\n%s", v, debug.Stack())
		}
	}()
	conn, err = m.make(ctx, key)
	if err == nil && isnil.Value(conn) {
		err = status.Error(codes.Internal, "make returned neither a connection nor an error")
	}
	return conn, err
}

// settle records the result of making the connection of e.
func (m *Maker) settle(e *entry, conn Conn, err error) {
	var streams grpc.ClientConnInterface
	if err == nil {
		var stack *interceptor.Stack
		if stack, err = interceptor.NewStack(&inUse{entry: e}); err == nil {
			// The Maker does not ask whether conn is READY, neither for unary calls nor for
			// streams. A stack on conn itself may.
			streams = stack.Wrap(struct{ grpc.ClientConnInterface }{conn})
		}
	}
	m.mu.Lock()
	e.cancel = nil
	switch {
	case m.closed:
		e.err = m.closedRefusal
	case err != nil:
		e.err = m.refuse("the connection cannot be made", e.key, err, codes.Unavailable)
		m.forgetLocked(e)
		m.grantLocked()
	default:
		e.conn, e.streams, e.began = conn, streams, interceptor.Now()
		if e.refs == 0 {
			m.restLocked(e)
		}
	}
	close(e.made)
	closed := m.closed
	m.mu.Unlock()
	if closed && err == nil {
		m.closeConn(conn)
	}
}

// closeConn closes a connection on behalf of Close.
func (m *Maker) closeConn(conn Conn) {
	if err := conn.Close(); err != nil {
		m.mu.Lock()
		m.errs = append(m.errs, err)
		m.mu.Unlock()
	}
}

// dropLocked closes the connection of e, which is not in use, in the background, and
// gives its slot away.
func (m *Maker) dropLocked(e *entry) {
	if e.in == &m.idle {
		m.idle.remove(e)
	}
	m.forgetLocked(e)
	m.closing++
	m.wg.Go(func() {
		e.conn.Close() // Its calls are over, so nobody needs the error.
		m.mu.Lock()
		defer m.mu.Unlock()
		m.closing--
	})
	m.grantLocked()
}

// forgetLocked takes the slot of e away.
func (m *Maker) forgetLocked(e *entry) {
	if m.entries[e.key] == e {
		delete(m.entries, e.key)
	}
	delete(m.retired, e)
	m.slots--
}

// retireLocked lets e, which has a slot, take no new calls. It is closed when its last
// call has ended; the next call of its key makes, or waits for, another connection.
func (m *Maker) retireLocked(e *entry) {
	if e.in == &m.idle {
		m.dropLocked(e)
		return
	}
	delete(m.entries, e.key)
	m.retired[e] = struct{}{}
}

func (m *Maker) isRetiredLocked(e *entry) bool {
	_, ok := m.retired[e]
	return ok
}

// Forget drops the connection of a key: the next call makes another one, and the old one
// is closed when its calls have ended. It is for a connection that the program knows to
// be useless. It reports whether there was one.
func (m *Maker) Forget(key string) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	e := m.entries[key]
	if e == nil || e.in == &m.queue {
		return false
	}
	m.retireLocked(e)
	return true
}

// turn is the minimum time that a connection is used while other keys wait.
const turn = time.Second

// takeTurns lets the keys in the queue have a connection even if all are always in use:
// once in a turn the one that was made first is retired.
func (m *Maker) takeTurns() {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.takeTurnsLocked(0)
}

// takeTurnsLocked arms the timer of the next turn, not before after has passed.
func (m *Maker) takeTurnsLocked(after time.Duration) {
	if m.turns != nil || m.queue.first == nil || m.closed {
		return
	}
	if e := m.oldestLocked(); e != nil {
		after = max(after, e.began.Add(turn).Sub(interceptor.Now()))
	} else {
		after = max(after, turn) // All are being made, or retired already.
	}
	m.wg.Add(1)
	m.turns = time.AfterFunc(after, m.nextTurn)
}

// nextTurn is called by the timer.
func (m *Maker) nextTurn() {
	defer m.wg.Done()
	m.mu.Lock()
	defer m.mu.Unlock()
	m.turns = nil
	if m.closed || m.queue.first == nil {
		return
	}
	after := time.Duration(0)
	if e := m.oldestLocked(); e != nil && interceptor.Now() >= e.began.Add(turn) {
		m.retireLocked(e)
		after = turn
	}
	m.takeTurnsLocked(after)
}

// oldestLocked is the entry that was made first of those in use that are not retired.
func (m *Maker) oldestLocked() (oldest *entry) {
	for _, e := range m.entries {
		if e.conn != nil && (oldest == nil || e.began < oldest.began) {
			oldest = e
		}
	}
	return oldest
}

// armLocked sets the timer for the entry that has been idle for longest.
func (m *Maker) armLocked() {
	if m.timer != nil || m.idle.first == nil || m.config.IdleTimeout < 0 {
		return
	}
	at := m.idle.first.since.Add(m.config.IdleTimeout)
	m.wg.Add(1)
	m.timer = time.AfterFunc(at.Sub(interceptor.Now()), m.expire)
}

// disarmLocked stops the timer. If it is too late for that, expire finds out.
func (m *Maker) disarmLocked() {
	if m.timer != nil && m.timer.Stop() {
		m.wg.Done()
	}
	m.timer = nil
}

// expire closes what has been idle for long enough. It is called by the timer. The timer
// is not reset each time a connection is used; it waits for the entry that is the
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
	for e := m.idle.first; e != nil && m.config.IdleTimeout >= 0 && now.Sub(e.since) >= m.config.IdleTimeout; e = m.idle.first {
		m.dropLocked(e)
	}
	m.armLocked()
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
	if m.turns != nil && m.turns.Stop() {
		m.wg.Done()
	}
	end := func(e *entry) {
		switch {
		case e.conn != nil:
			m.wg.Go(func() { m.closeConn(e.conn) })
		case e.cancel != nil:
			e.cancel()
		}
	}
	for _, e := range m.entries {
		end(e)
	}
	for e := range m.retired {
		end(e)
	}
	clear(m.entries)
	clear(m.retired)
	m.idle, m.queue = list{}, list{}
	m.mu.Unlock()
	m.wg.Wait()
	m.mu.Lock()
	m.slots, m.closing = 0, 0
	m.mu.Unlock()
	close(m.done)
	return errors.Join(m.errs...)
}

// A list is a queue of entries from which any can be removed.
type list struct {
	first, last *entry
	len         int
}

func (l *list) push(e *entry) {
	e.in, e.prev, e.next = l, l.last, nil
	if l.last == nil {
		l.first = e
	} else {
		l.last.next = e
	}
	l.last = e
	l.len++
}

func (l *list) remove(e *entry) {
	if e.prev == nil {
		l.first = e.next
	} else {
		e.prev.next = e.next
	}
	if e.next == nil {
		l.last = e.prev
	} else {
		e.next.prev = e.prev
	}
	e.in, e.prev, e.next = nil, nil, nil
	l.len--
}

// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package steer

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"reflect"
	"sync"
	"sync/atomic"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/belfry-go/belfry/interceptor"
	"github.com/belfry-go/belfry/internal/check"
	"github.com/belfry-go/belfry/internal/inuse"
	"github.com/belfry-go/belfry/internal/isnil"
	"github.com/belfry-go/belfry/internal/lazystream"
)

// ReasonNoRoute is the reason of a call that was refused because the [Choose] function
// returned an error or a key without a connection. The refusal wraps the error. Its code
// is that of the error if it has a gRPC status, else INVALID_ARGUMENT. For a key without
// a connection it is INTERNAL, because that is a mistake of the program. Nothing was sent.
const ReasonNoRoute interceptor.Reason = "NO_ROUTE"

// A Choose function returns the key of the connection that a call goes to. args is the
// request of a unary call or of a call whose only stream is that of its responses, and
// nil for other streams. The context that it returns, derived from ctx, replaces the
// call's context; nil keeps it. An error refuses the call; the error of an ended ctx
// refuses it with DEADLINE_EXCEEDED or CANCELLED. It is called once for each call that
// arrives here, which behind a retry or hedge are attempts, concurrently.
type Choose[K comparable] func(ctx context.Context, method string, args any) (context.Context, K, error)

// A Steer is a grpc.ClientConnInterface over several connections. All its methods may be
// called concurrently. It does not own the connections and closes none.
type Steer[K comparable] struct {
	choose Choose[K]
	table  atomic.Pointer[table[K]]
	mu     sync.Mutex // Held by Update, so that one follows the other. Nothing is locked under it.
}

// A table has the connections of the keys. It does not change.
type table[K comparable] map[K]*target

// A target is a connection and the calls on it.
type target struct {
	conn    grpc.ClientConnInterface
	streams grpc.ClientConnInterface // conn, for streams.

	// calls counts calls and streams. replaced is set once an Update has taken the
	// target out. It is one word so that no call comes in between.
	calls atomic.Int64
	free  func() // Called once, when it is replaced and no longer in use. Set before replaced is.
	once  sync.Once
}

const replaced = 1 << 62

// New returns a Steer that sends a call to the connection in conns whose key choose
// returns. conns must not be empty, and is copied. An error is a
// [*interceptor.ConfigError], or several joined.
func New[K comparable](choose Choose[K], conns map[K]grpc.ClientConnInterface) (*Steer[K], error) {
	errs := check.Of("steer")
	errs.NotNil(choose == nil, "choose", "a function")
	t, err := newTable(errs, conns, nil)
	if err != nil {
		return nil, err
	}
	s := &Steer[K]{choose: choose}
	s.table.Store(&t)
	return s, nil
}

// newTable makes the table of conns. Connections that old has too stay the same targets.
func newTable[K comparable](errs *check.Errors, conns map[K]grpc.ClientConnInterface, old table[K]) (table[K], error) {
	errs.Require(len(conns) > 0, "conns", conns, "must hold a connection")
	for k, c := range conns {
		errs.NotNil(isnil.Value(c), fmt.Sprintf("conns[%#v]", k), "a connection")
	}
	if err := errs.Err(); err != nil {
		return nil, err
	}
	known := map[grpc.ClientConnInterface]*target{}
	for _, o := range old {
		if reflect.ValueOf(o.conn).Comparable() {
			known[o.conn] = o
		}
	}
	t := table[K]{}
	for k, c := range conns {
		comparable := reflect.ValueOf(c).Comparable()
		if comparable && known[c] != nil {
			t[k] = known[c]
			continue
		}
		n := &target{conn: c}
		var err error
		if n.streams, err = inuse.Streams(c, func() { n.calls.Add(1) }, n.release); err != nil {
			return nil, err
		}
		t[k] = n
		if comparable {
			known[c] = n
		}
	}
	return t, nil
}

// Update replaces the connections while calls run, by conns, as of New. Calls and
// streams on connections that conns does not have any more continue. free is closed when
// they have ended, which is when these connections may be closed. After an error nothing
// has changed.
func (s *Steer[K]) Update(conns map[K]grpc.ClientConnInterface) (free <-chan struct{}, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	old := s.table.Load()
	if old == nil {
		return nil, &interceptor.ConfigError{Layer: "steer", Field: "Steer", Value: nil, Rule: "must be made by New"}
	}
	t, err := newTable(check.Of("steer"), conns, *old)
	if err != nil {
		return nil, err
	}
	out := map[*target]bool{}
	for _, o := range *old {
		out[o] = true
	}
	for _, n := range t {
		delete(out, n)
	}
	s.table.Store(&t)
	allFree := make(chan struct{})
	var left atomic.Int64
	left.Store(int64(len(out)) + 1)
	done := func() {
		if left.Add(-1) == 0 {
			close(allFree)
		}
	}
	for o := range out {
		o.free = done
		if o.calls.Or(replaced) == 0 {
			o.once.Do(o.free)
		}
	}
	done()
	return allFree, nil
}

// release ends a use of a target.
func (t *target) release() {
	if t.calls.Add(-1) == replaced {
		t.once.Do(t.free)
	}
}

// Conns returns the connections. belfry.WaitReady waits for all of them.
func (s *Steer[K]) Conns() iter.Seq[grpc.ClientConnInterface] {
	return func(yield func(grpc.ClientConnInterface) bool) {
		if t := s.table.Load(); t != nil {
			for _, target := range *t {
				if !yield(target.conn) {
					return
				}
			}
		}
	}
}

// acquire chooses the connection of a call, which is then in use until release.
func (s *Steer[K]) acquire(ctx context.Context, method string, args any) (context.Context, *target, error) {
	t := s.table.Load()
	if t == nil {
		return nil, nil, refuse(codes.Internal, "there are no connections: the Steer was not made by New")
	}
	changed, key, err := s.choose(ctx, method, args)
	if err != nil {
		if ctx.Err() != nil && errors.Is(err, ctx.Err()) {
			return nil, nil, interceptor.Ended(ctx, "steer")
		}
		code := codes.InvalidArgument
		if st, ok := status.FromError(err); ok && st.Code() != codes.OK {
			code = st.Code()
		}
		return nil, nil, refuse(code, "the call has no connection").Because(err, false)
	}
	if changed == nil {
		changed = ctx
	}
	for {
		t = s.table.Load()
		c := (*t)[key]
		if c == nil {
			return nil, nil, refuse(codes.Internal, fmt.Sprintf("%#v was chosen for %s, must be one of %d keys", key, method, len(*t)))
		}
		c.calls.Add(1)
		if s.table.Load() == t {
			return changed, c, nil
		}
		c.release() // An Update may not have seen this call, and not wait for it.
	}
}

func refuse(code codes.Code, message string) *interceptor.Refusal {
	r := interceptor.Refuse("steer", ReasonNoRoute, message)
	r.Code = code
	return r
}

// Invoke makes a unary call on the connection chosen for it.
func (s *Steer[K]) Invoke(ctx context.Context, method string, args, reply any, opts ...grpc.CallOption) error {
	ctx, t, err := s.acquire(ctx, method, args)
	if err != nil {
		return err
	}
	defer t.release()
	return t.conn.Invoke(ctx, method, args, reply, opts...)
}

// NewStream opens a stream on the connection chosen for it. A stream that has one request
// is opened when that is sent, because the choice may depend on it: until then nothing
// fails.
func (s *Steer[K]) NewStream(ctx context.Context, desc *grpc.StreamDesc, method string, opts ...grpc.CallOption) (grpc.ClientStream, error) {
	open := func(args any) (grpc.ClientStream, error) {
		ctx, t, err := s.acquire(ctx, method, args)
		if err != nil {
			return nil, err
		}
		defer t.release() // The stream uses it too, see newTable.
		return t.streams.NewStream(ctx, desc, method, opts...)
	}
	if lazystream.Has(desc) {
		return lazystream.New(ctx, open), nil
	}
	return open(nil)
}

// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package p2c

import (
	"context"
	"errors"
	"math"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"google.golang.org/grpc/balancer"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/belfry-go/belfry/internal/attempt"
	"github.com/belfry-go/belfry/internal/check"
	"github.com/belfry-go/belfry/internal/waitlist"
	"github.com/belfry-go/belfry/limit"
	"github.com/belfry-go/belfry/load"
	configv1 "github.com/belfry-go/belfry/proto/belfry/config/v1"
)

// This file implements the field endpointLimit. An endpoint has a limit of attempts in
// flight, and a call that finds all endpoints full waits in a queue.
//
// A call waits in Pick, on the goroutine that makes it. gRPC documents another way: to
// return ErrNoSubConnAvailable, and to publish a picker whenever an attempt ends. But each
// new picker wakes all calls that wait. With W of them each end of an attempt would cost W
// picks, and their order would be lost. gRPC calls Pick without a lock, and so do the
// parent policies except rls. Below rls calls should not wait (maxWaiting 0).

// defaultMaxWaiting is how many calls may wait at a time.
const defaultMaxWaiting = 1000

// limitConfig is the parsed form of belfry.config.v1.EndpointLimit. Immutable.
type limitConfig struct {
	fixed      int64 // 0 if an algorithm finds the limit
	auto       limit.AutoConfig
	maxWaiting int
}

// newLimitConfig returns nil without an error if there is no limit.
func newLimitConfig(m *configv1.EndpointLimit) (*limitConfig, error) {
	if m == nil {
		return nil, nil
	}
	c := &limitConfig{maxWaiting: defaultMaxWaiting}
	if m.MaxWaiting != nil {
		c.maxWaiting = int(m.GetMaxWaiting())
	}
	switch l := m.GetLimit().(type) {
	case *configv1.EndpointLimit_Fixed:
		if l.Fixed < 1 || l.Fixed > math.MaxInt32 {
			return nil, configError("endpointLimit.fixed", l.Fixed, "between 1 and 2147483647")
		}
		c.fixed = int64(l.Fixed)
		return c, nil
	case *configv1.EndpointLimit_Auto:
		c.auto = limit.AutoConfig{Initial: l.Auto.GetInitial(), Min: l.Auto.GetMin(), Max: l.Auto.GetMax(), NoDrains: l.Auto.GetNoDrains()}
	}
	if _, err := limit.NewAuto(c.auto); err != nil {
		if e := (*check.Error)(nil); errors.As(err, &e) {
			_, field, _ := strings.Cut(e.Field, ".")
			return nil, configError("endpointLimit.auto."+strings.ToLower(field), e.Value, strings.TrimPrefix(e.Rule, "must be "))
		}
		return nil, err
	}
	return c, nil
}

// limited reports whether endpoints can be full.
func (c *config) limited() bool { return c.limit != nil || c.connections > 1 }

// maxWaiting is how many calls may wait for an endpoint that is not full.
func (c *config) maxWaiting() int {
	if c.limit == nil {
		return math.MaxInt // gRPC does not bound it either
	}
	return c.limit.maxWaiting
}

// room is the limit of an endpoint, and other things that do not change when a new metric
// replaces the meter.
type room struct {
	most  atomic.Int64               // how many attempts and open streams there may be
	found atomic.Pointer[foundLimit] // the algorithm that finds most; nil if most is fixed or unlimited

	// connections is where a stream must be free too; nil if the endpoint may only have one
	// connection.
	connections atomic.Pointer[connections]

	leaving leaving

	failures atomic.Uint64           // how many attempts have failed
	failure  atomic.Pointer[failure] // the last failure that was noted; nil if there was none
}

// state returns the limit, 0 if there is none, and the state of its algorithm.
func (r *room) state() (most int64, s limit.State) {
	if most = r.most.Load(); most == math.MaxInt64 {
		return 0, s
	}
	if f := r.found.Load(); f != nil {
		f.mu.Lock()
		defer f.mu.Unlock()
		s = f.auto.Explain()
	}
	return most, s
}

// limitLocked gives the endpoint the limit of a config, or none if cfg is nil. An algorithm
// keeps what it has learnt. The caller holds policy.mu.
func (ep *endpoint) limitLocked(cfg *limitConfig) {
	t := ep.candidate.meter.Load().room
	switch {
	case cfg == nil:
		t.found.Store(nil)
		t.most.Store(math.MaxInt64)
	case cfg.fixed > 0:
		t.found.Store(nil)
		t.most.Store(cfg.fixed)
	default:
		f := t.found.Load()
		if f == nil {
			f = &foundLimit{}
		}
		if f.configure(cfg.auto, ep.policy.wallClock) == nil { // The config was checked.
			t.most.Store(f.limit())
			t.found.Store(f)
		}
	}
}

// foundLimit is a limit that an algorithm finds.
type foundLimit struct {
	limited atomic.Bool // whether the limit has made a call wait or go elsewhere since the last sample

	mu   sync.Mutex // guards auto, except OnStart, which needs no lock; nothing is locked under it
	auto *limit.Auto
}

func (f *foundLimit) configure(cfg limit.AutoConfig, wall func(limit.Instant) time.Time) (err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.auto != nil {
		return f.auto.Update(cfg)
	}
	if f.auto, err = limit.NewAuto(cfg); err == nil && wall != nil {
		f.auto.SetWallClock(wall)
	}
	return err
}

func (f *foundLimit) limit() int64 {
	f.mu.Lock()
	defer f.mu.Unlock()
	return max(f.auto.Limit(), 1)
}

// begin makes the attempt a sample for the algorithm of its endpoint's limit, if there is
// one. A stream is not a sample. Its duration says nothing about the server, and its first
// response may have to wait for an event.
func (k *pick) begin() {
	if f := k.meter.room.found.Load(); f != nil && (k.track == nil || !k.track.stream) {
		k.limit, k.began, k.mark = f, load.Instant(k.picker.policy.now()), f.auto.OnStart()
	}
}

// end gives the sample of a pick to the algorithm.
func (f *foundLimit) end(k *pick, o load.Outcome, err error) {
	now := load.Instant(k.picker.policy.now())
	s := limit.Sample{Start: limit.Instant(k.began), RTT: max(time.Duration(now-k.began), 1), Result: limit.Void, Mark: k.mark}
	switch {
	case o == load.Completed:
		s.Result = limit.Succeeded
	case o == load.Cancelled:
		s.Result = limit.GivenUp
	case o == load.NotSent:
		s.Start, s.RTT = 0, 0
	case overloaded(err):
		s.Result = limit.Dropped
	}
	if s.Result == limit.Void && s.Mark == 0 {
		return
	}
	r := k.meter.room
	s.Limited = f.limited.Load() && f.limited.Swap(false)
	attempts, streams := k.candidate.tally.read()
	s.InFlight = int64(attempts + streams)
	f.mu.Lock()
	defer f.mu.Unlock()
	f.auto.OnSample(s)
	if n := max(f.auto.Limit(), 1); n != r.most.Load() && r.found.Load() == f {
		r.most.Store(n)
	}
}

// overloaded reports whether an error is a sign of overload, as in package
// interceptor/concurrency.
func overloaded(err error) bool {
	switch status.Code(err) {
	case codes.Unavailable, codes.ResourceExhausted, codes.DeadlineExceeded:
		return true
	}
	return false
}

// queue is the calls of a channel that wait for an endpoint with room. An attempt that
// ends gives its room to the first of them. So each end of an attempt wakes one call, and no
// call overtakes another.
type queue struct {
	ready   *readySet    // immutable
	waiting atomic.Int32 // how many calls wait; changes under mu

	mu     sync.Mutex // guards the fields below; nothing is locked under it
	calls  waitlist.List[chan *candidate]
	closed bool
}

// hold counts the attempt at an endpoint that has room for it, and returns that endpoint: c,
// or the cheapest of some others, or the first that gets room. It also returns the time at
// its end, because it may wait.
func (p *picker) hold(ctx context.Context, c *candidate, now load.Instant, track *tracker, tried *attempt.Tried) (*candidate, load.Instant, error) {
	q := &p.policy.queue
	if q.waiting.Load() == 0 {
		if c.take() {
			return c, now, nil
		}
		if other := p.takeOther(now, tried); other != nil {
			return other, now, nil
		}
	}
	c, err := q.wait(ctx, p.config.maxWaiting(), track)
	p.policy.metrics.full(err == errFull)
	return c, p.now(), err
}

// takeOther counts the attempt at the cheapest of choices endpoints with room. It looks for
// them from a random endpoint on. An endpoint that the call has tried is taken only if no
// other has room. It returns nil if all are full.
func (p *picker) takeOther(now load.Instant, tried *attempt.Tried) *candidate {
	slots := p.ready.view().slots
	n := len(slots)
	if n == 0 {
		return nil
	}
	var best, again *candidate
	var least float32
	seen := 0
	r := random(p.policy.random())
	first := int(r.below(uint32(n)))
	for i := 0; i < n && seen < p.config.choices; i++ {
		c := slots[(first+i)%n].Load()
		switch {
		case c == nil || !c.hasRoom():
		case tried != nil && tried.Has(c.id()):
			again = c
		default:
			if cost := p.price(c, now, 1); best == nil || cost < least {
				best, least = c, cost
			}
			seen++
		}
	}
	if best == nil {
		best = again
	}
	if best == nil {
		return nil
	}
	if best.take() {
		return best
	}
	return takeAny(slots) // another call has taken the room of best
}

// takeAny counts the attempt at any endpoint with room. It returns nil if all are full.
func takeAny(slots []atomic.Pointer[candidate]) *candidate {
	for i := range slots {
		if c := slots[i].Load(); c != nil && c.take() {
			return c
		}
	}
	return nil
}

var errFull = status.Error(codes.Unavailable, Name+": every endpoint has as many attempts in flight as endpointLimit, or maxConnectionsPerSubchannel and the server, allow")

// wait waits until an endpoint has room, or the call may not wait any longer. After the error
// ErrNoSubConnAvailable gRPC asks the next picker, or ends the call if its context has ended.
func (q *queue) wait(ctx context.Context, most int, track *tracker) (*candidate, error) {
	var room attempt.RoomOption
	var end <-chan time.Time
	if track != nil {
		room = track.room
	}
	mayWait := true
	if room != nil {
		if t, bounded := room.WaitEnd(); bounded {
			left := time.Until(t)
			if mayWait = left > 0; mayWait {
				timer := time.NewTimer(left)
				defer timer.Stop()
				end = timer.C
			}
		}
	}
	w := &waitlist.Node[chan *candidate]{Value: make(chan *candidate, 1)}
	q.mu.Lock()
	switch {
	case q.closed:
		q.mu.Unlock()
		return nil, balancer.ErrNoSubConnAvailable
	case !mayWait || q.calls.Len() >= most:
		q.mu.Unlock()
		return nil, full(room)
	}
	q.calls.Push(w, waitlist.Rank{})
	q.waiting.Add(1)
	q.admitAnyLocked() // an endpoint may have got room after hold has looked, and before the call was in the queue
	q.mu.Unlock()

	var err error
	select {
	case c := <-w.Value:
		return admitted(c)
	case <-ctx.Done():
		err = balancer.ErrNoSubConnAvailable
	case <-end:
		err = full(room)
	}
	q.mu.Lock()
	defer q.mu.Unlock()
	if !q.calls.Remove(w) {
		return admitted(<-w.Value)
	}
	q.waiting.Add(-1)
	return nil, err
}

func full(room attempt.RoomOption) error {
	if room != nil {
		room.NoRoom()
	}
	return errFull
}

func admitted(c *candidate) (*candidate, error) {
	if c == nil {
		return nil, balancer.ErrNoSubConnAvailable
	}
	return c, nil
}

// admit gives the room of an endpoint to the calls that wait.
func (q *queue) admit(c *candidate) {
	if q.waiting.Load() > 0 {
		q.admitWaiting(c)
	}
}

func (q *queue) admitWaiting(c *candidate) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if f := c.meter.Load().room.found.Load(); f != nil {
		f.limited.Store(true)
	}
	for c.slot.Load() != notReady {
		if first := q.calls.First(false); first == nil || !q.giveLocked(first, c) {
			return
		}
	}
}

// admitAnyLocked gives the room of all endpoints to the calls that wait.
func (q *queue) admitAnyLocked() {
	for first := q.calls.First(false); first != nil; first = q.calls.First(false) {
		c := takeAny(q.ready.view().slots)
		if c == nil {
			return
		}
		q.endLocked(first, c)
	}
}

// giveLocked gives a call room at an endpoint. It reports false if the endpoint is full.
func (q *queue) giveLocked(w *waitlist.Node[chan *candidate], c *candidate) bool {
	if !c.take() {
		return false
	}
	q.endLocked(w, c)
	return true
}

// endLocked ends the wait of a call. c is nil if the call is to ask the next picker.
func (q *queue) endLocked(w *waitlist.Node[chan *candidate], c *candidate) {
	q.calls.Remove(w)
	q.waiting.Add(-1)
	w.Value <- c
}

// dismiss ends the wait of all calls, which then ask the next picker. If closed is set, no
// call waits any more.
func (q *queue) dismiss(closed bool) {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.closed = q.closed || closed
	for first := q.calls.First(false); first != nil; first = q.calls.First(false) {
		q.endLocked(first, nil)
	}
}

// hasRoom reports whether the endpoint has room for one more attempt.
func (c *candidate) hasRoom() bool {
	attempts, streams := c.tally.read()
	r := c.meter.Load().room
	if int64(attempts+streams) >= r.most.Load() {
		return false
	}
	conns := r.connections.Load()
	return conns == nil || conns.free.Load() > 0
}

// take counts an attempt if the endpoint has room for it. It reports whether it did.
func (c *candidate) take() bool {
	r := c.meter.Load().room
	conns := r.connections.Load()
	if conns != nil && !conns.take() {
		return false
	}
	for {
		w := c.tally.word.Load()
		if attempts, streams := tallied(w); int64(attempts+streams) >= r.most.Load() {
			if f := r.found.Load(); f != nil && !f.limited.Load() {
				f.limited.Store(true)
			}
			if conns != nil {
				conns.free.Add(1)
			}
			return false
		}
		if c.tally.word.CompareAndSwap(w, w+oneAttempt) {
			return true
		}
	}
}

// untake undoes take for an attempt that was not made.
func (c *candidate) untake() {
	c.tally.add(-oneAttempt)
	if conns := c.meter.Load().room.connections.Load(); conns != nil {
		conns.free.Add(1)
	}
}

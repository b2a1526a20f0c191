// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package p2c

import (
	"context"
	"errors"
	"sync/atomic"

	"google.golang.org/grpc"
	"google.golang.org/grpc/metadata"

	"github.com/belfry-go/belfry/internal/attempt"
	"github.com/belfry-go/belfry/load"
)

// tracker follows one call, or one attempt of it if an outer interceptor repeats
// the call.
type tracker struct {
	attempt attempt.Context // the context that grpc gets. It holds the caller's, which grpc does not cancel at the end of the call.
	tried   attempt.Tried
	conn    *grpc.ClientConn
	stream  bool
	room    attempt.RoomOption   // bounds the wait for an endpoint with room; nil if only the context does
	used    atomic.Bool          // whether first is in use
	first   pick                 // of the first attempt, to save an allocation
	current atomic.Pointer[pick] // of the last attempt
	err     error                // of the call; set before ended
	ended   atomic.Bool
	leaving atomic.Pointer[leaving] // where a stream with a LeaveOption is noted; nil for others
}

func newTracker(ctx context.Context, method string, cc *grpc.ClientConn) *tracker {
	target := ""
	if cc != nil { // only in tests
		target = cc.Target()
	}
	t := &tracker{conn: cc}
	t.attempt = attempt.Context{Context: ctx, Info: attempt.Info{Method: method, Target: target, Tried: &t.tried, Tracker: t}}
	t.first.track = t
	// If the context has an Info of this method, an outer layer repeats the call. But an Info
	// with a tracker is that of another call, in whose context this one is made.
	if outer := attempt.FromContext(ctx, method, target, 0); outer != nil && outer.Tried != nil && outer.Tracker == nil {
		t.attempt.Info.Tried = outer.Tried
	}
	return t
}

// pick returns the pick for a new attempt.
func (t *tracker) pick() *pick {
	k := &t.first
	if !t.used.CompareAndSwap(false, true) {
		k = &pick{track: t}
	}
	return k
}

// errRetried is the error of an attempt that gRPC retries after it has reported its end
// without an error.
var errRetried = errors.New("gRPC retried the attempt, and does not tell its error")

// begin makes k the pick of the last attempt. If the attempt before still waits for its
// true end, gRPC has retried it, so it failed.
func (t *tracker) begin(k *pick) {
	if last := t.current.Swap(k); last != nil && last.state.Load()&pickAwaiting != 0 {
		last.finish(last.doneAt, load.Failed, errRetried)
	}
}

// await is called when gRPC reports the end of an attempt without an error. That is not
// always true: if the server ends an attempt before it has read the whole request, gRPC
// gets io.EOF, and reports no error. The true status is what the call returns: at once
// after this for a unary call, and when the application reads it for a stream.
//
// If an interceptor below hedges, several attempts are in flight at the same time. The end
// of the call is that of the last. The others count as answered.
func (t *tracker) await(k *pick) {
	k.state.Or(pickAwaiting)
	if t.current.Load() != k {
		k.finish(k.doneAt, load.Completed, nil)
		return
	}
	if t.ended.Load() {
		k.finish(k.doneAt, classify(t.attempt.Context, t.err, k.picker.config.failures), t.err)
	}
}

// follow notes that an open stream is to be told when its endpoint is about to leave.
func (t *tracker) follow(o attempt.LeaveOption) {
	k := t.current.Load()
	if k == nil {
		return
	}
	l := &k.meter.room.leaving
	t.leaving.Store(l)
	l.add(t, o)
	if t.ended.Load() { // It may not have seen leaving.
		l.remove(t)
	}
}

// end is called when the call has ended, with its true status. Only the first call of end
// counts: if a stream cannot be made, both gRPC and the interceptor call it.
func (t *tracker) end(err error) {
	if t.ended.Load() {
		return
	}
	t.err = err
	t.ended.Store(true)
	if l := t.leaving.Load(); l != nil {
		l.remove(t)
	}
	if k := t.current.Load(); k != nil && k.state.Load()&pickAwaiting != 0 {
		k.finish(k.doneAt, classify(t.attempt.Context, err, k.picker.config.failures), err)
	}
}

// interceptors are the interceptors of one channel.
type interceptors struct {
	warned atomic.Bool // whether the warning was logged that another policy balances the calls
}

// check logs a warning, once, if a call was answered for which the policy has made no pick.
func (i *interceptors) check(t *tracker, cc *grpc.ClientConn) {
	if t.current.Load() == nil && !i.warned.Load() && !i.warned.Swap(true) {
		logger.Warningf("%s: calls have p2c.DialOptions, but another policy balances them: the service config in use does not name %s in its loadBalancingConfig", cc.CanonicalTarget(), Name)
	}
}

func (i *interceptors) unary(ctx context.Context, method string, req, reply any, cc *grpc.ClientConn, invoker grpc.UnaryInvoker, opts ...grpc.CallOption) (err error) {
	t := newTracker(ctx, method, cc)
	t.room = attempt.RoomOptionOf(opts)
	defer func() { t.end(err) }()
	if err = invoker(&t.attempt, method, req, reply, cc, opts...); err == nil {
		i.check(t, cc)
	}
	return err
}

func (i *interceptors) stream(ctx context.Context, desc *grpc.StreamDesc, cc *grpc.ClientConn, method string, streamer grpc.Streamer, opts ...grpc.CallOption) (grpc.ClientStream, error) {
	t := newTracker(ctx, method, cc)
	t.stream, t.room = true, attempt.RoomOptionOf(opts)
	// OnFinish is called once, with the true status, also for a stream that is not read to
	// its end. opts is the caller's slice, so append must copy it.
	opts = append(opts[:len(opts):len(opts)], grpc.OnFinish(t.end))
	s, err := streamer(&t.attempt, desc, cc, method, opts...)
	if err != nil {
		t.end(err)
		return nil, err
	}
	i.check(t, cc)
	if o := attempt.LeaveOptionOf(opts); o != nil {
		t.follow(o)
	}
	return &trackedStream{ClientStream: s, track: t, many: desc.ServerStreams}, nil
}

// untracked logs a warning, once, if a call without a tracker is a stream. It is called for
// some of the calls without a tracker.
func (b *policy) untracked(method string) {
	if !b.warned.Load() && attempt.Streams(method) && !b.warned.Swap(true) {
		logger.Warningf("%s: %s is a stream, and the channel has no p2c.DialOptions: all its life counts as its latency", b.opts.Target.String(), method)
	}
}

// trackedStream sees the first response: the headers, or a message.
type trackedStream struct {
	grpc.ClientStream
	track     *tracker
	many      bool // whether the server may send any number of messages
	responded atomic.Bool
	received  bool // whether a message was received; used by RecvMsg only
}

// Context returns the context of the stream without the values of its attempt.
func (s *trackedStream) Context() context.Context { return attempt.Hide(s.ClientStream.Context()) }

func (s *trackedStream) Header() (metadata.MD, error) {
	md, err := s.ClientStream.Header()
	if err == nil && md != nil { // nil if the stream ended without headers
		s.respond()
	}
	return md, err
}

func (s *trackedStream) RecvMsg(m any) error {
	// A server may send the headers at once and its first message hours later, so wait for
	// the headers first. A single response message comes with the headers. If it is missing,
	// gRPC returns an error from RecvMsg, but none from Header.
	if s.many && !s.responded.Load() {
		_, _ = s.Header()
	}
	err := s.ClientStream.RecvMsg(m)
	if err == nil && !s.received {
		s.received = true
		s.respond()
		if k := s.track.current.Load(); k != nil {
			k.message()
		}
	}
	return err
}

func (s *trackedStream) respond() {
	if s.responded.Load() || s.responded.Swap(true) {
		return
	}
	if k := s.track.current.Load(); k != nil {
		k.respond()
	}
}

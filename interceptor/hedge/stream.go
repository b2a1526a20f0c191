// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package hedge

import (
	"context"
	"io"
	"sync/atomic"

	"google.golang.org/grpc"
	"google.golang.org/grpc/status"

	"github.com/belfry-go/belfry/interceptor"
	"github.com/belfry-go/belfry/internal/further"
	"github.com/belfry-go/belfry/internal/message"
	"github.com/belfry-go/belfry/internal/replay"
)

// measured is a stream that is not hedged. It measures the time to the first response
// message.
type measured struct {
	grpc.ClientStream
	plan plan
	done atomic.Bool
}

func (m *measured) RecvMsg(msg any) error {
	if m.done.Load() {
		return m.ClientStream.RecvMsg(msg)
	}
	m.done.Store(true)
	start := interceptor.Now()
	err := m.ClientStream.RecvMsg(msg)
	answer := err
	if err == io.EOF {
		answer = nil
	}
	m.plan.record(start, interceptor.Now(), answer)
	return err
}

// stream is a stream that can be hedged until its first response message. The first
// RecvMsg runs the race. Before that an attempt that fails is followed by another one,
// which takes its place in the race.
type stream struct {
	replay.Stream
	race race

	target any // What the first RecvMsg receives to. Set before the race.
}

// open opens the first attempt.
func (s *stream) open() error {
	first := &s.race.first
	opened := false
	defer func() {
		if !opened {
			first.cancel()
		}
	}()
	c, opts := first.call, first.call.Options()
	c.Internals().Repeatable()
	if err := s.race.next(first.ctx, c); err != nil {
		return err
	}
	opened = true
	l := s.race.layer
	first.lane = lane(first)
	s.Init(replay.Config{Context: s.race.ctx, Call: c, Options: opts, Layer: s, Limit: s.race.set.buffer, Total: &l.kept, Most: s.race.set.total}, first.lane)
	c.SetStream(s)
	return nil
}

// lane returns the open stream of an attempt.
func lane(t *try) *replay.Lane {
	return &replay.Lane{ClientStream: t.call.Stream(), Call: t.call, Cancel: t.cancel}
}

// Race runs the race.
func (s *stream) Race(_ *replay.Lane, m any) (*replay.Lane, error) {
	r := &s.race
	s.target = m
	t, err := r.run(interceptor.Now())
	if t.lane == nil { // An extra attempt that could not be opened was the last to fail.
		t = &r.first
	}
	if err != nil || t.eof {
		if err == nil {
			err = io.EOF
		}
		return t.lane, err
	}
	if t != &r.first {
		message.CopyInto(m, t.reply)
	}
	return t.lane, nil
}

// receive carries out an attempt of the race up to its first response message.
func (s *stream) receive(ctx context.Context, t *try) error {
	r, m := &s.race, s.target
	if t != &r.first {
		if err := r.next(ctx, t.call); err != nil {
			return err
		}
		l := lane(t)
		r.mu.Lock()
		t.lane = l
		r.mu.Unlock()
		m = message.NewLike(s.target)
		t.reply = m
		s.Feed(l)
	}
	err := t.lane.RecvMsg(m)
	if err == io.EOF { // The end of a stream without a message is a success.
		t.eof, err = true, nil
	}
	return err
}

// message returns the first message of an attempt, nil if there was none.
func (s *stream) message(t *try) any {
	switch {
	case t.eof:
		return nil
	case t == &s.race.first:
		return s.target
	}
	return t.reply
}

// Choose ends the race with an attempt.
func (s *stream) Choose(l *replay.Lane) *replay.Lane {
	r := &s.race
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.decided {
		if r.err != nil || l != nil && l != r.best.lane {
			return nil // The end of the race says so.
		}
		return r.best.lane
	}
	t := r.openLocked(l)
	if t == nil {
		return nil
	}
	r.chosen = t
	r.closeLocked(t)
	return t.lane
}

// Running returns an attempt that is open.
func (s *stream) Running() *replay.Lane {
	r := &s.race
	r.mu.Lock()
	defer r.mu.Unlock()
	if t := r.openLocked(nil); t != nil && !r.decided {
		return t.lane
	}
	return nil
}

// openLocked returns the attempt whose stream is l, or the first one if that is nil, if it is
// open and may still win. Caller must hold r.mu.
func (r *race) openLocked(l *replay.Lane) *try {
	for i := -1; i < len(r.extra); i++ {
		t := &r.first
		if i >= 0 {
			t = r.extra[i]
		}
		if t.lane != nil && !t.over && !t.lost && (l == nil || l == t.lane) {
			return t
		}
	}
	return nil
}

// Repeat makes the attempt that follows the first one, before the race.
func (s *stream) Repeat(_ *replay.Lane, err error) (*replay.Lane, error) {
	r := &s.race
	after, again := r.follows(err)
	if !again {
		return nil, err
	}
	failed := r.first
	failed.over = true
	r.extra = append(r.extra, &failed) // It counts.
	var t try
	t.ctx, t.cancel = context.WithCancel(r.ctx)
	a, refused := r.Make(t.ctx, further.Plan{Hedge: true, Delay: after, After: err, Reason: status.Code(err).String(), Run: func(ctx context.Context, c *interceptor.Call) error {
		r.HedgeFired()
		return r.next(ctx, c)
	}})
	switch {
	case refused != nil:
		t.cancel()
		return nil, r.Refused(r.ctx, refused, err)
	case a.Err != nil:
		t.cancel()
		if !a.Outcome.Sent() { // It says less than the server has said.
			return nil, err
		}
		return nil, a.Err
	}
	t.call = a.Call
	r.first = t
	r.first.lane = lane(&r.first)
	return r.first.lane, nil
}

// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package timeout

import (
	"context"
	"io"
	"sync"
	"sync/atomic"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/metadata"

	"github.com/belfry-go/belfry/interceptor"
)

func (l *Layer) stream(ctx context.Context, c *interceptor.Call, next interceptor.Next) error {
	s := l.settings.Load()
	if s.Lifetime == 0 && s.FirstResponse == 0 && s.Message == 0 && s.Idle == 0 {
		err := next(ctx, c)
		if err != nil {
			err = l.explain(ctx, ctx, nil, err, true)
		}
		return err
	}
	beginning, ok := noted(c, &l.beginning)
	if !ok { // The gate had other settings.
		beginning = interceptor.Now()
	}
	st := &stream{
		layer: l, settings: s, kind: c.Kind(), ctx: ctx, end: c.Internals().StreamEnd(), began: c.Internals().AdmittedAt(),
	}
	if s.Idle > 0 {
		st.sends = c.Internals().Sends()
	}
	st.own = ctx
	if s.Lifetime > 0 {
		deadline := beginning.Add(s.Lifetime)
		if t, ok := ctx.Deadline(); !ok || deadline < interceptor.InstantOf(t) {
			st.due.lifetime, st.until = deadline, deadline
			st.own, st.release = context.WithDeadlineCause(ctx, deadline.Time(), s.causes[Lifetime])
		}
	}
	st.own, st.cancel = context.WithCancelCause(st.own)
	if s.FirstResponse > 0 && st.kind == interceptor.ServerStream {
		st.due.first = beginning.Add(s.FirstResponse)
	}
	opened := false
	defer func() {
		if !opened {
			st.stop()
		}
	}()
	now := interceptor.Now()
	st.mu.Lock()
	b, t := st.earliestLocked()
	st.armLocked(now)
	st.mu.Unlock()
	if t != 0 && t <= now { // A gate that cannot be bounded has admitted it too late.
		return s.causes[b].Because(s.causes[b].Err, false)
	}
	if err := next(st.own, c); err != nil {
		return st.explain(err, c.Internals().Outcome(st.own, err).Sent())
	}
	opened = true
	st.ClientStream = c.Stream()
	_ = st.moved(nil, nil)
	c.SetStream(st)
	return nil
}

// A stream is a stream with bounds. Each running bound has a moment when it is due, and
// one timer fires at the earliest of them. Most bounds end before they are due, so the
// timer is not reset when one ends or is extended. When it fires it checks what is due.
// So it is set about once in the length of a bound, and not for each message.
type stream struct {
	grpc.ClientStream // Set when the stream is open.

	layer    *Layer
	settings *settings
	kind     interceptor.Kind
	ctx      context.Context         // The caller's,
	own      context.Context         // and the stream's.
	release  context.CancelFunc      // Frees the deadline in own; nil if there is none.
	cancel   context.CancelCauseFunc // Ends own.
	end      interceptor.StreamEnd
	sends    *atomic.Uint32      // Messages that were sent; nil if Idle is off.
	began    interceptor.Instant // When it was admitted,
	until    interceptor.Instant // and when its lifetime ends; 0 if that is not bounded here.

	// mu guards the fields below. Nothing is called under it but the timer's methods.
	mu        sync.Mutex
	due       dues
	fires     interceptor.Instant // When the timer fires; 0 if it does not.
	timer     *time.Timer
	seen      uint32 // What sends was when idle was extended last.
	responded bool
	over      bool
	cut       *interceptor.Refusal // What has cut it short.
}

// dues are the moments when the bounds are due; 0 for a bound that is not running.
type dues struct {
	lifetime, first, idle interceptor.Instant
	recv, send            interceptor.Instant // Both are Message, because a stream may send and receive at once.
}

// earliestLocked returns what is due first; 0 if nothing is. Caller must hold s.mu.
func (s *stream) earliestLocked() (b Bound, at interceptor.Instant) {
	for _, d := range [...]struct {
		b  Bound
		at interceptor.Instant
	}{
		{Lifetime, s.due.lifetime},
		{FirstResponse, s.due.first},
		{Message, s.due.recv},
		{Message, s.due.send},
		{Idle, s.due.idle},
	} {
		if d.at != 0 && (at == 0 || d.at < at) {
			b, at = d.b, d.at
		}
	}
	return b, at
}

// armLocked makes sure that the timer fires when something is due. Caller must hold s.mu.
func (s *stream) armLocked(now interceptor.Instant) {
	_, at := s.earliestLocked()
	if at == 0 || s.over || s.fires != 0 && s.fires <= at {
		return
	}
	s.fires = at
	d := max(at.Sub(now), 0)
	if s.timer == nil {
		s.timer = time.AfterFunc(d, s.fire)
		return
	}
	s.timer.Reset(d)
}

// fire cuts the stream short if something is due.
func (s *stream) fire() {
	s.mu.Lock()
	s.fires = 0
	now := interceptor.Now()
	if s.due.idle != 0 && s.sentLocked() { // By a layer inside that had kept it.
		s.due.idle = now.Add(s.settings.Idle)
	}
	b, at := s.earliestLocked()
	if s.over || at == 0 || at > now {
		s.armLocked(now)
		s.mu.Unlock()
		return
	}
	cut := s.settings.causes[b]
	s.over, s.cut = true, cut
	s.mu.Unlock()
	s.cancel(cut)
	if s.release != nil {
		s.release()
	}
	s.end.End(cut)
}

// stop frees the timer and the contexts when the stream has ended.
func (s *stream) stop() {
	s.mu.Lock()
	s.over = true
	if s.timer != nil {
		s.timer.Stop()
	}
	s.mu.Unlock()
	s.cancel(nil)
	if s.release != nil {
		s.release()
	}
}

// explain returns err as an Exceeded that says which bound made an operation fail, and
// stops the stream.
func (s *stream) explain(err error, sent bool) error {
	mine, _ := context.Cause(s.own).(*interceptor.Refusal)
	switch {
	case mine != nil && s.settings.caused(mine):
	case s.until != 0 && toldFirst(err, s.began, s.until):
		mine = s.settings.causes[Lifetime]
	default:
		mine = nil
	}
	err = s.layer.explain(s.ctx, s.own, mine, err, sent)
	s.stop()
	return err
}

// caused reports whether r is one of the causes.
func (s *settings) caused(r *interceptor.Refusal) bool {
	for _, c := range s.causes {
		if c == r {
			return true
		}
	}
	return false
}

// begins starts the bound of an operation on a message. at points into s.due.
func (s *stream) begins(at *interceptor.Instant) {
	if s.settings.Message == 0 {
		return
	}
	now := interceptor.Now()
	s.mu.Lock()
	*at = now.Add(s.settings.Message)
	s.armLocked(now)
	s.mu.Unlock()
}

// moved ends an operation on a message, with its bound at. With a nil at it records that
// the stream has started. If the stream was cut short before the first message, which was
// received now, moved returns the error.
func (s *stream) moved(at *interceptor.Instant, err error) (cut *interceptor.Refusal) {
	var now interceptor.Instant
	if s.settings.Idle > 0 && err == nil {
		now = interceptor.Now()
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if at != nil {
		*at = 0
	}
	if at == &s.due.recv {
		if !s.responded {
			cut = s.cut
			if r, ok := context.Cause(s.own).(*interceptor.Refusal); ok && s.settings.caused(r) {
				cut = r // The deadline of the context, which may be sooner than the timer.
			}
		}
		s.responded, s.due.first = true, 0
	}
	if now != 0 && (s.sentLocked() || at != &s.due.send) {
		s.due.idle = now.Add(s.settings.Idle)
		s.armLocked(now)
	}
	return cut
}

// sentLocked reports whether a message was sent since it was called last. What a layer
// inside only keeps was not. Caller must hold s.mu.
func (s *stream) sentLocked() bool {
	n := s.sends.Load()
	sent := n != s.seen
	s.seen = n
	return sent
}

// asked records that there is something to respond to.
func (s *stream) asked() {
	if s.settings.FirstResponse == 0 {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.responded || s.due.first != 0 {
		return
	}
	now := interceptor.Now()
	s.due.first = now.Add(s.settings.FirstResponse)
	s.armLocked(now)
}

func (s *stream) Header() (metadata.MD, error) {
	md, err := s.ClientStream.Header()
	if err != nil {
		err = s.explain(err, true)
	}
	return md, err
}

func (s *stream) CloseSend() error {
	s.asked()
	return s.ClientStream.CloseSend()
}

func (s *stream) SendMsg(m any) error {
	if s.kind == interceptor.BidiStream {
		s.asked()
	}
	s.begins(&s.due.send)
	err := s.ClientStream.SendMsg(m)
	_ = s.moved(&s.due.send, err)
	if err != nil && err != io.EOF { // After io.EOF RecvMsg returns the reason.
		err = s.explain(err, true)
	}
	return err
}

func (s *stream) RecvMsg(m any) error {
	s.begins(&s.due.recv)
	err := s.ClientStream.RecvMsg(m)
	cut := s.moved(&s.due.recv, err)
	switch {
	case err == nil && cut != nil: // No message would follow this one, so a retry would come too late.
		s.stop()
		return cut
	case err == io.EOF || err == nil && s.kind == interceptor.ClientStream:
		s.stop()
	case err != nil:
		err = s.explain(err, true)
	}
	return err
}

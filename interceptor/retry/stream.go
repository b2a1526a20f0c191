// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package retry

import (
	"context"
	"io"

	"google.golang.org/grpc"

	"github.com/belfry-go/belfry/interceptor"
	"github.com/belfry-go/belfry/internal/further"
	"github.com/belfry-go/belfry/internal/replay"
)

// open opens a stream that is repeated until it commits.
func (l *Layer) open(ctx context.Context, c *interceptor.Call, next interceptor.Next, again interceptor.Again) error {
	set := l.set.Load()
	if set.attempts(c) == 1 {
		return next(ctx, c)
	}
	of := further.Call{Call: c, Maker: l.maker, Origin: c.Origin(), Again: again}
	opts := c.Options()
	c.Internals().Repeatable()
	err := next(ctx, c)
	may := l.policy != nil || l.maker.May(&set.methods, c) // A policy may know that it is safe.
	if err == nil && !may {
		c.SetStream(&unrepeatable{ClientStream: c.Stream(), ctx: ctx, series: series{Call: of, layer: l, next: next, made: 1}})
		return nil
	}
	s := &stream{ctx: ctx, series: series{Call: of, layer: l, next: next}}
	first := s.series.first(ctx, err)
	last := &first
	for last.Err != nil {
		again, err := s.series.step(ctx, last)
		if again == nil {
			return err
		}
		last = again
	}
	if last.Call != c {
		c.Adopt(last.Call)
	}
	if !may { // The method may not be repeated, and now it was sent.
		s.series.made = 1
		c.SetStream(&unrepeatable{ClientStream: last.Call.Stream(), ctx: ctx, series: s.series})
		return nil
	}
	s.Init(replay.Config{Context: ctx, Call: c, Options: opts, Layer: s, Limit: set.buffer, Total: &l.kept, Most: set.total}, s.lane(last.Call))
	c.SetStream(s)
	return nil
}

// unrepeatable is a stream whose method may not be repeated. If it fails as one that would
// be, the error says what is missing.
type unrepeatable struct {
	grpc.ClientStream
	ctx      context.Context
	series   series
	received bool // RecvMsg has returned, so nothing would be repeated. Used by RecvMsg alone.
}

func (s *unrepeatable) RecvMsg(m any) error {
	err := s.ClientStream.RecvMsg(m)
	first := !s.received
	s.received = true
	if !first || err == nil || err == io.EOF {
		return err
	}
	last := failureOf(s.series.Call.Call, s.ClientStream, err)
	if v := s.series.judge(s.ctx, last); !v.repeat {
		return v.err
	}
	return err
}

// failureOf is how an attempt whose stream was open has failed.
func failureOf(c *interceptor.Call, s grpc.ClientStream, err error) *failure {
	return &failure{Attempt: further.Attempt{Call: c, Err: err, Outcome: interceptor.Failed}, trailer: s.Trailer()}
}

// stream is a stream that can be repeated.
type stream struct {
	replay.Stream
	ctx    context.Context
	cancel context.CancelFunc // Ends the attempt that is being made.
	series series
}

// lane returns the attempt that is open.
func (s *stream) lane(c *interceptor.Call) *replay.Lane {
	return &replay.Lane{ClientStream: c.Stream(), Call: c, Cancel: s.cancel}
}

// Repeat makes the attempt that follows one that has failed.
func (s *stream) Repeat(l *replay.Lane, err error) (*replay.Lane, error) {
	ctx, cancel := context.WithCancel(s.ctx)
	s.cancel = cancel
	last := failureOf(l.Call, l, err)
	if s.series.layer.policy != nil {
		last.header, _ = l.Header() // There already, if there is one.
	}
	for last.Err != nil {
		next, err := s.series.step(ctx, last)
		if next == nil {
			cancel()
			return nil, err
		}
		last = next
	}
	return s.lane(last.Call), nil
}

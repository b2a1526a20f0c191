// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

// Package lazystream opens a stream when its first message is sent, for connections
// that choose by the request where a call goes.
package lazystream

import (
	"context"
	"sync"
	"sync/atomic"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"github.com/belfry-go/belfry/internal/result"
)

// Has reports whether streams of desc have one request, which is their first message.
func Has(desc *grpc.StreamDesc) bool { return desc.ServerStreams && !desc.ClientStreams }

// New returns a stream that calls open with the first message that is sent, and with nil
// if CloseSend comes before one. Until then RecvMsg and Header wait, as long as ctx. An
// error of open is the stream's: SendMsg returns it, and so does what waits.
func New(ctx context.Context, open func(req any) (grpc.ClientStream, error)) grpc.ClientStream {
	return &stream{ctx: ctx, open: open, opened: make(chan struct{})}
}

type stream struct {
	ctx  context.Context
	open func(req any) (grpc.ClientStream, error)

	once   sync.Once
	begun  atomic.Bool
	opened chan struct{} // Closed when the fields below are set.
	inner  grpc.ClientStream
	err    error
}

// begin opens the stream unless that was done.
func (s *stream) begin(req any) error {
	s.once.Do(func() {
		s.begun.Store(true)
		defer close(s.opened)
		s.err = status.Error(codes.Internal, "belfry: opening the stream panicked") // Stays only then.
		s.inner, s.err = s.open(req)
		s.open = nil
	})
	return s.err
}

// wait waits until the stream is open.
func (s *stream) wait() error {
	select {
	case <-s.opened:
		return s.err
	default:
	}
	select {
	case <-s.opened:
		return s.err
	case <-s.ctx.Done():
	}
	if s.begun.Load() { // Its end is told by the stream, once that has written its results.
		result.Await(s.opened)
		if s.isOpen() {
			return nil
		}
	}
	return status.FromContextError(s.ctx.Err()).Err()
}

// isOpen reports whether the stream is open, without waiting.
func (s *stream) isOpen() bool {
	select {
	case <-s.opened:
		return s.err == nil
	default:
		return false
	}
}

func (s *stream) SendMsg(m any) error {
	if err := s.begin(m); err != nil {
		return err
	}
	return s.inner.SendMsg(m)
}

func (s *stream) CloseSend() error {
	if err := s.begin(nil); err != nil {
		return err
	}
	return s.inner.CloseSend()
}

func (s *stream) RecvMsg(m any) error {
	if err := s.wait(); err != nil {
		return err
	}
	return s.inner.RecvMsg(m)
}

func (s *stream) Header() (metadata.MD, error) {
	if err := s.wait(); err != nil {
		return nil, err
	}
	return s.inner.Header()
}

// Trailer is nil for a stream that was not opened.
func (s *stream) Trailer() metadata.MD {
	if s.isOpen() {
		return s.inner.Trailer()
	}
	return nil
}

// Context is the context that the stream is opened with, until it is open.
func (s *stream) Context() context.Context {
	if s.isOpen() {
		return s.inner.Context()
	}
	return s.ctx
}

// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

// Package mapping has layers that change what is sent, what is received, or the error
// of a call: Tower's map_request, map_response and map_err.
//
//	stack, err := interceptor.NewStack(mapping.Request(
//		func(ctx context.Context, method string, o *orders.Order) (*orders.Order, error) {
//			return withDefaults(o), nil
//		}))
//
// A function sees calls if its layer is outside a retry or hedge, and attempts if it is
// inside. It is called concurrently for different calls.
package mapping

import (
	"context"
	"io"
	"sync/atomic"

	"google.golang.org/grpc"
	"google.golang.org/grpc/metadata"

	"github.com/belfry-go/belfry/interceptor"
	"github.com/belfry-go/belfry/internal/check"
	"github.com/belfry-go/belfry/internal/layercheck"
)

// Request returns a layer that replaces requests of type M with what f returns: the
// request of a unary call, or each message that is sent on a stream. Requests of other
// types pass unchanged. An error of f ends the call: it is returned as it is, and by a
// stream from then on, which is cancelled. Inside a retry f is called once for each
// attempt. It must not modify its message, which belongs to the caller. It costs a
// context for each stream.
func Request[M any](f func(ctx context.Context, method string, m M) (M, error)) interceptor.Spec {
	if f == nil {
		return noFunc("Request")
	}
	return &mapper{
		name: "maprequest",
		request: func(ctx context.Context, method string, m any) (any, error) {
			if m, ok := m.(M); ok {
				return f(ctx, method, m)
			}
			return m, nil
		},
	}
}

// Response returns a layer that lets f read and change responses of type M in place:
// the reply of a unary call, or each message that is received from a stream. An error of
// f is returned instead of the response, and by a stream from then on, which is
// cancelled. It costs a context for each stream.
func Response[M any](f func(ctx context.Context, method string, m M) error) interceptor.Spec {
	if f == nil {
		return noFunc("Response")
	}
	return &mapper{
		name: "mapresponse",
		response: func(ctx context.Context, method string, m any) error {
			if m, ok := m.(M); ok {
				return f(ctx, method, m)
			}
			return nil
		},
	}
}

// Error returns a layer that replaces the errors of calls and streams with what f
// returns. f is not called for io.EOF, the normal end of a stream. If f returns nil for
// the error of a unary call, the call succeeds with whatever the reply holds, and for
// the error of a stream, the stream ends with io.EOF. The error of a stream that could
// not be opened is returned as it is, because there is no stream to return. f does not
// see refusals of gates, because these do not reach the call path; map those in front
// of the stack.
func Error(f func(ctx context.Context, method string, err error) error) interceptor.Spec {
	if f == nil {
		return noFunc("Error")
	}
	return &mapper{name: "maperror", err: f}
}

// mapper is the layer behind all three. A nil field maps nothing.
type mapper struct {
	interceptor.CallOnly
	name     string
	request  func(ctx context.Context, method string, m any) (any, error)
	response func(ctx context.Context, method string, m any) error
	err      func(ctx context.Context, method string, err error) error
}

func (l *mapper) NewLayer() (interceptor.Layer, error) { return l, nil }
func (l *mapper) String() string                       { return l.name }

// noFunc is the Spec of a layer that has no function.
func noFunc(name string) interceptor.Spec {
	errs := check.Of("mapping")
	errs.NotNil(true, name, "a function")
	return layercheck.Spec(errs)
}

func (l *mapper) WrapCall(next interceptor.Next, _ interceptor.Again) interceptor.Next {
	return func(ctx context.Context, c *interceptor.Call) error {
		method := c.Method()
		if c.Kind() != interceptor.Unary {
			return l.open(ctx, c, next)
		}
		if l.request != nil {
			m, err := l.request(ctx, method, c.Request())
			if err != nil {
				return err
			}
			c.SetRequest(m)
		}
		if err := next(ctx, c); err != nil {
			return l.mapErr(ctx, method, err)
		}
		if l.response != nil {
			return l.response(ctx, method, c.Reply())
		}
		return nil
	}
}

// open opens a stream whose messages are mapped.
func (l *mapper) open(ctx context.Context, c *interceptor.Call, next interceptor.Next) error {
	s := &mapStream{layer: l, ctx: ctx, cancel: func() {}, method: c.Method(), single: !c.Desc().ServerStreams}
	if l.err == nil { // The function may end the stream.
		s.ctx, s.cancel = context.WithCancel(ctx)
	}
	if err := next(s.ctx, c); err != nil {
		s.cancel()
		if mapped := l.mapErr(ctx, s.method, err); mapped != nil {
			return mapped
		}
		return err
	}
	s.ClientStream = c.Stream()
	c.SetStream(s)
	return nil
}

func (l *mapper) mapErr(ctx context.Context, method string, err error) error {
	if l.err == nil || err == io.EOF {
		return err
	}
	return l.err(ctx, method, err)
}

type mapStream struct {
	grpc.ClientStream
	layer  *mapper
	ctx    context.Context
	cancel context.CancelFunc
	method string
	single bool                  // The server sends one message.
	ended  atomic.Pointer[error] // What f ended it with.
}

// end ends the stream with an error of f. Callers, like the layers outside, take any
// error of RecvMsg, and any of SendMsg but io.EOF, for the end of the stream.
func (s *mapStream) end(err error) error {
	s.ended.CompareAndSwap(nil, &err)
	// Without a cause: the layers inside see a call that its caller cancelled.
	s.cancel()
	return err
}

func (s *mapStream) SendMsg(m any) error {
	if s.layer.request != nil {
		if e := s.ended.Load(); e != nil {
			return *e
		}
		var err error
		if m, err = s.layer.request(s.ctx, s.method, m); err != nil {
			return s.end(err)
		}
	}
	if err := s.ClientStream.SendMsg(m); err != nil {
		if err != io.EOF { // Of io.EOF RecvMsg says the reason.
			s.cancel()
		}
		return s.layer.mapErr(s.ctx, s.method, err)
	}
	return nil
}

func (s *mapStream) Header() (metadata.MD, error) {
	md, err := s.ClientStream.Header()
	if err != nil {
		s.cancel()
		err = s.layer.mapErr(s.ctx, s.method, err)
	}
	return md, err
}

func (s *mapStream) RecvMsg(m any) error {
	if err := s.ClientStream.RecvMsg(m); err != nil {
		s.cancel()
		if e := s.ended.Load(); e != nil {
			return *e
		}
		if err = s.layer.mapErr(s.ctx, s.method, err); err == nil {
			return io.EOF
		}
		return err
	}
	if s.layer.response != nil {
		if err := s.layer.response(s.ctx, s.method, m); err != nil {
			return s.end(err)
		}
	}
	if s.single {
		s.cancel() // The stream has ended.
	}
	return nil
}

// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package interceptor

import (
	"context"
	"io"

	"google.golang.org/grpc"
)

// MapRequest returns a layer that replaces requests of type M by what f makes of
// them: the request of a unary call, each message that is sent on a stream.
// Requests of other types pass by. An error of f ends the call (for a stream:
// the SendMsg; the stream itself goes on) and is returned as it is. f is called
// once for each attempt if the layer stands inside a retry, and must not modify
// its message, which is the caller's.
func MapRequest[M any](f func(ctx context.Context, method string, m M) (M, error)) Layer {
	if f == nil {
		return nil // NewStack says which layer it is.
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

// MapResponse returns a layer that lets f see, and change in place, responses of
// type M: the reply of a unary call, each message that is received from a stream.
// An error of f is returned instead of the response; a stream is not ended by it.
func MapResponse[M any](f func(ctx context.Context, method string, m M) error) Layer {
	if f == nil {
		return nil
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

// MapError returns a layer that replaces the errors of calls and streams by what
// f makes of them. f is not called for io.EOF, which is how a stream says that
// it has ended well. If f returns nil for the error of a unary call the call
// succeeds, with whatever the reply holds; the end of a stream becomes io.EOF; the
// error of a stream that could not be opened stays, for there is none to return.
// Refusals of gates do not pass through the call path, and so not through f;
// to see those, map them in front of the stack.
func MapError(f func(ctx context.Context, method string, err error) error) Layer {
	if f == nil {
		return nil
	}
	return &mapper{name: "maperror", err: f}
}

// mapper is the one layer behind the three; the fields that are nil map nothing.
type mapper struct {
	CallOnly
	name     string
	request  func(ctx context.Context, method string, m any) (any, error)
	response func(ctx context.Context, method string, m any) error
	err      func(ctx context.Context, method string, err error) error
}

func (l *mapper) String() string { return l.name }

func (l *mapper) WrapCall(next Next, _ Gate) Next {
	return func(ctx context.Context, c *Call) error {
		if c.kind == Unary && l.request != nil {
			m, err := l.request(ctx, c.method, c.req)
			if err != nil {
				return err
			}
			c.req = m
		}
		if err := next(ctx, c); err != nil {
			mapped := l.mapErr(ctx, c.method, err)
			if mapped == nil && c.kind != Unary {
				return err
			}
			return mapped
		}
		if c.kind != Unary {
			c.stream = &mapStream{ClientStream: c.stream, layer: l, ctx: ctx, method: c.method}
			return nil
		}
		if l.response != nil {
			return l.response(ctx, c.method, c.reply)
		}
		return nil
	}
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
	method string
}

func (s *mapStream) SendMsg(m any) error {
	if s.layer.request != nil {
		var err error
		if m, err = s.layer.request(s.ctx, s.method, m); err != nil {
			return err
		}
	}
	if err := s.ClientStream.SendMsg(m); err != nil {
		return s.layer.mapErr(s.ctx, s.method, err)
	}
	return nil
}

func (s *mapStream) RecvMsg(m any) error {
	if err := s.ClientStream.RecvMsg(m); err != nil {
		if err = s.layer.mapErr(s.ctx, s.method, err); err == nil {
			return io.EOF
		}
		return err
	}
	if s.layer.response != nil {
		return s.layer.response(s.ctx, s.method, m)
	}
	return nil
}

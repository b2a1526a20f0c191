// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package interceptor

import (
	"context"
	"sync/atomic"

	"google.golang.org/grpc"
)

// Foreign makes a layer of a pair of interceptors. One of them may be nil: calls of
// that kind pass by. Calls are admitted to the layers inside before the
// interceptor runs; an interceptor that calls its invoker or streamer again, as
// a retry does, has the further attempt admitted with [None], and it fails with
// the refusal if it cannot be.
//
// The interceptor sees the call's own reply and options and is free to pass on
// others. Its *grpc.ClientConn is nil where the stack stands in front of
// something else ([Stack.Wrap]). It costs a closure and a Call for each call.
func Foreign(name string, unary grpc.UnaryClientInterceptor, stream grpc.StreamClientInterceptor) (Layer, error) {
	if err := checkAdapter("Foreign", name, "unary", unary == nil && stream == nil, "an interceptor, or stream must be"); err != nil {
		return nil, err
	}
	return &foreign{name: name, unary: unary, stream: stream}, nil
}

type foreign struct {
	CallOnly
	name   string
	unary  grpc.UnaryClientInterceptor
	stream grpc.StreamClientInterceptor
}

func (f *foreign) String() string { return f.name }

func (f *foreign) WrapCall(next Next, inner Gate) Next {
	return func(ctx context.Context, c *Call) error {
		switch {
		case c.kind == Unary && f.unary != nil:
			return f.callUnary(ctx, c, next, inner)
		case c.kind != Unary && f.stream != nil:
			return f.callStream(ctx, c, next, inner)
		}
		return next(ctx, c)
	}
}

func (f *foreign) callUnary(ctx context.Context, c *Call, next Next, inner Gate) error {
	as := newAttempts(c, inner)
	defer as.close()
	invoker := func(ctx context.Context, method string, req, reply any, cc *grpc.ClientConn, opts ...grpc.CallOption) error {
		a, err := as.next(ctx)
		if err != nil {
			return err
		}
		a.method, a.req, a.reply, a.cc, a.opts = method, req, reply, cc, opts
		return next(ctx, a)
	}
	return f.unary(ctx, c.method, c.req, c.reply, c.cc, invoker, c.opts...)
}

func (f *foreign) callStream(ctx context.Context, c *Call, next Next, inner Gate) error {
	as := newAttempts(c, inner)
	defer as.close()
	streamer := func(ctx context.Context, desc *grpc.StreamDesc, cc *grpc.ClientConn, method string, opts ...grpc.CallOption) (grpc.ClientStream, error) {
		a, err := as.next(ctx)
		if err != nil {
			return nil, err
		}
		a.desc, a.cc, a.method, a.opts = desc, cc, method, opts
		if err := next(ctx, a); err != nil {
			return nil, err
		}
		return a.stream, nil
	}
	s, err := f.stream(ctx, c.desc, c.cc, c.method, streamer, c.opts...)
	if err == nil && s == nil {
		err = errNoStream
	}
	c.stream = s
	return err
}

// attempts makes the Calls of the attempts of one call. Nothing is known of the
// interceptor: it may make attempts concurrently, or after it has returned, so
// none of them runs on the call itself.
type attempts struct {
	origin Origin
	inner  Gate
	first  *Call // Has the call's own admission.
	taken  atomic.Bool
}

func newAttempts(c *Call, inner Gate) *attempts {
	return &attempts{origin: c.Origin(), inner: inner, first: c.detach()}
}

func (as *attempts) next(ctx context.Context) (*Call, error) {
	if as.taken.CompareAndSwap(false, true) {
		return as.first, nil
	}
	a := as.origin.fork()
	a.attempt = int(a.root.attempts.Add(1))
	if err := as.inner.Admit(ctx, a, None); err != nil {
		return nil, err
	}
	return a, nil
}

// close gives the admission back if the interceptor answered without it.
func (as *attempts) close() {
	if as.taken.CompareAndSwap(false, true) {
		as.first.Rollback(0, nil)
	}
}

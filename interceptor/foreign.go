// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package interceptor

import (
	"context"
	"sync/atomic"

	"google.golang.org/grpc"
	"google.golang.org/grpc/metadata"
)

// Foreign makes a layer of a pair of interceptors. One of them may be nil: calls of
// that kind pass by. The layers inside admit a call before the interceptor runs. If it
// calls its invoker or streamer again, as a retry does, the further attempt is admitted
// as [Again] says, with [Forever]. If that is refused, the invoker returns the refusal,
// with the status of the last unary attempt that failed ([RefusedAgain]).
//
// The interceptor sees the call's own reply and options and may pass on different
// ones. Its *grpc.ClientConn is nil if the stack wraps something else ([Stack.Wrap]).
// It costs a closure and a Call for each call.
func Foreign(name string, unary grpc.UnaryClientInterceptor, stream grpc.StreamClientInterceptor) Spec {
	switch {
	case name == "":
		return failed{&ConfigError{Layer: "interceptor", Field: "Foreign.name", Value: name, Rule: "must not be empty"}}
	case unary == nil && stream == nil:
		return failed{&ConfigError{Layer: "interceptor", Field: "Foreign.unary", Rule: "must be an interceptor, or stream must be"}}
	}
	return &foreign{name: name, unary: unary, stream: stream}
}

type foreign struct {
	CallOnly
	name   string
	unary  grpc.UnaryClientInterceptor
	stream grpc.StreamClientInterceptor
}

func (f *foreign) NewLayer() (Layer, error) { return f, nil }
func (f *foreign) String() string           { return f.name }
func (f *foreign) Traits() Traits           { return 0 }

// WrapCall is not called: the stack calls wrap instead.
func (f *foreign) WrapCall(next Next, _ Again) Next { return next }

func (f *foreign) wrap(next Next, inside *boundary) Next {
	return func(ctx context.Context, c *Call) error {
		switch {
		case c.kind == Unary && f.unary != nil:
			return f.callUnary(ctx, c, next, inside)
		case c.kind != Unary && f.stream != nil:
			return f.callStream(ctx, c, next, inside)
		}
		return next(ctx, c)
	}
}

func (f *foreign) callUnary(ctx context.Context, c *Call, next Next, inside *boundary) error {
	as := newAttempts(c, inside)
	defer as.close()
	invoker := func(ctx context.Context, method string, req, reply any, cc *grpc.ClientConn, opts ...grpc.CallOption) error {
		a, err := as.next(ctx)
		if err != nil {
			return err
		}
		a.method, a.req, a.reply, a.cc, a.opts = method, req, reply, cc, opts
		err = next(ctx, a)
		as.last.Store(&ending{err, a.trailer})
		return err
	}
	err := f.unary(ctx, c.method, c.req, c.reply, c.cc, invoker, c.opts...)
	if last := as.last.Load(); last != nil {
		c.trailer = last.trailer
	}
	return err
}

func (f *foreign) callStream(ctx context.Context, c *Call, next Next, inside *boundary) error {
	as := newAttempts(c, inside)
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

// attempts makes the Calls of the attempts of one call. A third-party interceptor may
// make attempts concurrently, or after it has returned, so none of them runs on the
// call itself.
type attempts struct {
	origin Origin
	inside *boundary
	first  *Call // Has the call's own admission.
	taken  atomic.Bool
	last   atomic.Pointer[ending]
}

// ending is how the unary attempt that ended last did.
type ending struct {
	err     error
	trailer metadata.MD
}

func newAttempts(c *Call, inside *boundary) *attempts {
	o := c.Origin()
	return &attempts{origin: o, inside: inside, first: inside.detach(&o)}
}

func (as *attempts) next(ctx context.Context) (*Call, error) {
	if as.taken.CompareAndSwap(false, true) {
		return as.first, nil
	}
	a := as.inside.fork(&as.origin)
	if err := as.inside.readmit(ctx, a, Forever); err != nil {
		if last := as.last.Load(); last != nil && last.err != nil {
			err = RefusedAgain(err, last.err)
		}
		return nil, err
	}
	return a, nil
}

// close gives the admission back if the interceptor answered without an attempt.
func (as *attempts) close() {
	if as.taken.CompareAndSwap(false, true) {
		as.first.GiveUp()
	}
}

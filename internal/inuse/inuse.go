// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

// Package inuse tells how long a connection is used by its streams.
package inuse

import (
	"context"

	"google.golang.org/grpc"

	"github.com/belfry-go/belfry/interceptor"
)

// Streams returns conn with begin called before it opens a stream, and end called once
// when the stream has ended or could not be opened.
func Streams(conn grpc.ClientConnInterface, begin, end func()) (grpc.ClientConnInterface, error) {
	stack, err := interceptor.NewStack(&layer{begin: begin, end: end})
	if err != nil {
		return nil, err
	}
	// The struct hides what conn is, so that this stack does not ask whether it is READY.
	return stack.Wrap(struct{ grpc.ClientConnInterface }{conn}), nil
}

type layer struct {
	interceptor.GateOnly
	begin, end func()
}

func (l *layer) NewLayer() (interceptor.Layer, error) { return l, nil }
func (l *layer) String() string                       { return "inuse" }
func (l *layer) Traits() interceptor.Traits           { return 0 }

func (l *layer) WrapGate(inner interceptor.Gate) interceptor.Gate {
	return interceptor.GateFunc(func(ctx context.Context, a *interceptor.Admission, w interceptor.Wait) error {
		l.begin()
		a.Hold(l, 0)
		return inner.Admit(ctx, a, w)
	})
}

// Release is called when the stream has ended.
func (l *layer) Release(int64, interceptor.End) { l.end() }

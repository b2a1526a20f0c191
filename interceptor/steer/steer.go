// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package steer

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"sync/atomic"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"

	"github.com/belfry-go/belfry/interceptor"
	"github.com/belfry-go/belfry/internal/check"
	"github.com/belfry-go/belfry/internal/isnil"
)

// ReasonNoRoute is the reason of a call that was refused because the function chose a
// connection that does not exist. Its code is INTERNAL, because that is a mistake of the
// program, which a retry does not correct. Nothing was sent.
const ReasonNoRoute interceptor.Reason = "NO_ROUTE"

// A Steer is a grpc.ClientConnInterface over several connections. It is safe for
// concurrent use. It does not own the connections and closes none.
type Steer struct {
	route atomic.Pointer[route]
}

// route finds the connection of a call.
type route func(ctx context.Context, method string, args any) (grpc.ClientConnInterface, error)

// New returns a Steer that sends a call to conns[choose(…)]. args is the request of a
// unary call, and nil for a stream. choose is called once for each call, concurrently. An
// error is a [*interceptor.ConfigError], or several joined.
func New(choose func(ctx context.Context, method string, args any) int, conns ...grpc.ClientConnInterface) (*Steer, error) {
	errs := newErrors(choose == nil, conns, len(conns))
	for i, c := range conns {
		errs.NotNil(isnil.Value(c), fmt.Sprintf("conns[%d]", i), "a connection")
	}
	if err := errs.Err(); err != nil {
		return nil, err
	}
	conns = slices.Clone(conns)
	return newSteer(func(ctx context.Context, method string, args any) (grpc.ClientConnInterface, error) {
		i := choose(ctx, method, args)
		if i < 0 || i >= len(conns) {
			return nil, refuse("%d was chosen for %s, must be between 0 and %d", i, method, len(conns)-1)
		}
		return conns[i], nil
	}), nil
}

// NewKeyed is New for connections that have names, or keys of any kind, instead of
// numbers.
func NewKeyed[K comparable](choose func(ctx context.Context, method string, args any) K, conns map[K]grpc.ClientConnInterface) (*Steer, error) {
	errs := newErrors(choose == nil, conns, len(conns))
	for k, c := range conns {
		errs.NotNil(isnil.Value(c), fmt.Sprintf("conns[%#v]", k), "a connection")
	}
	if err := errs.Err(); err != nil {
		return nil, err
	}
	conns = maps.Clone(conns)
	return newSteer(func(ctx context.Context, method string, args any) (grpc.ClientConnInterface, error) {
		k := choose(ctx, method, args)
		c, ok := conns[k]
		if !ok {
			return nil, refuse("%#v was chosen for %s, must be one of %d keys", k, method, len(conns))
		}
		return c, nil
	}), nil
}

// newErrors checks what New and NewKeyed have in common.
func newErrors(noChoose bool, conns any, n int) *check.Errors {
	errs := check.Of("steer")
	errs.NotNil(noChoose, "choose", "a function")
	errs.Require(n > 0, "conns", conns, "must hold a connection")
	return errs
}

func newSteer(r route) *Steer {
	s := &Steer{}
	s.route.Store(&r)
	return s
}

func refuse(format string, args ...any) error {
	r := interceptor.Refuse("steer", ReasonNoRoute, fmt.Sprintf(format, args...))
	r.Code = codes.Internal
	return r
}

// Replace sends new calls where by sends them. Calls in flight stay where they are, so
// an old connection may be closed when its calls have ended. It is an error if by is nil
// or was not made by New.
func (s *Steer) Replace(by *Steer) error {
	if by == nil || by.route.Load() == nil {
		return &interceptor.ConfigError{Layer: "steer", Field: "by", Value: nil, Rule: "must be a Steer that New or NewKeyed has made"}
	}
	s.route.Store(by.route.Load())
	return nil
}

// of returns the connection of a call.
func (s *Steer) of(ctx context.Context, method string, args any) (grpc.ClientConnInterface, error) {
	r := s.route.Load()
	if r == nil {
		return nil, refuse("there are no connections: the Steer was not made by New")
	}
	return (*r)(ctx, method, args)
}

// Invoke makes a unary call on the connection chosen for it.
func (s *Steer) Invoke(ctx context.Context, method string, args, reply any, opts ...grpc.CallOption) error {
	c, err := s.of(ctx, method, args)
	if err != nil {
		return err
	}
	return c.Invoke(ctx, method, args, reply, opts...)
}

// NewStream opens a stream on the connection chosen for it.
func (s *Steer) NewStream(ctx context.Context, desc *grpc.StreamDesc, method string, opts ...grpc.CallOption) (grpc.ClientStream, error) {
	c, err := s.of(ctx, method, nil)
	if err != nil {
		return nil, err
	}
	return c.NewStream(ctx, desc, method, opts...)
}

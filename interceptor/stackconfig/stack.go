// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package stackconfig

import (
	"context"
	"strings"
	"sync"
	"sync/atomic"

	"google.golang.org/grpc"
	"google.golang.org/grpc/grpclog"
	"google.golang.org/protobuf/proto"

	"github.com/belfry-go/belfry/interceptor"
	"github.com/belfry-go/belfry/interceptor/budget"
	"github.com/belfry-go/belfry/internal/check"
	configv1 "github.com/belfry-go/belfry/proto/belfry/config/v1"
)

var logger = grpclog.Component("belfry")

// A Stack is an [interceptor.Stack] that is made from a config, and changed with other
// configs. Its methods may be called concurrently.
type Stack struct {
	stack *interceptor.Stack
	opts  options
	built atomic.Pointer[built]

	// mu serialises Update. The locks of layers are taken under it.
	mu sync.Mutex
}

// NewStackFromConfig makes a Stack. If the config is wrong, the error is an [*Error] that
// names the field. If an option is wrong, it is an [*interceptor.ConfigError].
func NewStackFromConfig(config *configv1.Stack, opts ...Option) (*Stack, error) {
	s := &Stack{opts: options{errs: check.Of("stackconfig"), supplied: map[supply]any{}}}
	check.Options(s.opts.errs, &s.opts, opts)
	err := s.opts.errs.Err()
	if err != nil {
		return nil, err
	}
	if s.stack, err = interceptor.NewStack(); err != nil {
		return nil, err
	}
	s.built.Store(&built{})
	if _, err := s.Update(config); err != nil {
		return nil, err
	}
	return s, nil
}

// Changes lists the layers and budgets whose state an update started or ended, by their
// paths in the config. What is in neither list kept its state. A layer in both, under its
// old and its new path, starts from scratch, because it was renamed or because a field
// changed that cannot be updated.
type Changes struct {
	Began []string // paths in the new config, such as methodConfig[0].layers[2]
	Ended []string // paths in the previous config
}

// Update applies a new config without disturbing calls in flight. Layers keep their
// state, as belfry.config.v1.Layer in the schema says. New calls go through the new
// layers, and calls in flight end with the layers they began with. New settings of a
// layer that stays apply to them too, and calls that wait in a limit that is in no list
// any more are admitted. After an error, an [*Error], nothing has changed.
//
// The new settings of layers that stay take effect one after the other, shortly before
// the new lists of layers.
func (s *Stack) Update(config *configv1.Stack) (Changes, error) {
	if config == nil {
		return Changes{}, wrong("", "the config is nil")
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	old := s.built.Load()
	b := &built{config: proto.CloneOf(config)}
	if err := b.build(&s.opts); err != nil {
		return Changes{}, err
	}
	b.takeOver(old)
	lists, err := b.lists(s.opts.observer)
	if err != nil {
		return Changes{}, err
	}
	nowhere := len(b.entries)
	commit, err := s.stack.PrepareByMethod(func(method string) int {
		if i := b.routes.choose(method); i >= 0 {
			return i
		}
		return nowhere
	}, lists...)
	if err != nil {
		return Changes{}, &Error{Err: err}
	}
	// Nothing can fail after this.
	b.apply()
	commit()
	s.built.Store(b)
	return b.retire(old), nil
}

// Config returns a copy of the current config.
func (s *Stack) Config() *configv1.Stack { return proto.CloneOf(s.built.Load().config) }

// DialOptions returns the options for grpc.NewClient, see
// [interceptor.Stack.DialOptions].
func (s *Stack) DialOptions() []grpc.DialOption { return s.stack.DialOptions() }

// UnaryClientInterceptor returns the unary interceptor, for a chain of interceptors.
func (s *Stack) UnaryClientInterceptor() grpc.UnaryClientInterceptor {
	return s.stack.UnaryClientInterceptor()
}

// StreamClientInterceptor returns the streaming interceptor, for a chain of
// interceptors.
func (s *Stack) StreamClientInterceptor() grpc.StreamClientInterceptor {
	return s.stack.StreamClientInterceptor()
}

// Wrap returns conn with the stack in front, see [interceptor.Stack.Wrap].
func (s *Stack) Wrap(conn grpc.ClientConnInterface) grpc.ClientConnInterface {
	return s.stack.Wrap(conn)
}

// Advice returns what is legal in the config and rarely meant, see
// [interceptor.Stack.Advice].
func (s *Stack) Advice() []string { return s.stack.Advice() }

// InFlight returns how many calls are in the stack: waiting, running, or streams
// that have not ended.
func (s *Stack) InFlight() int { return s.stack.InFlight() }

// Drain refuses new calls from now on and waits until those in flight have ended,
// see [interceptor.Stack.Drain].
func (s *Stack) Drain(ctx context.Context) error { return s.stack.Drain(ctx) }

// String prints the methods and the order of their layers, the outermost first,
// one entry a line. A shared layer is printed by its name.
func (s *Stack) String() string {
	b := s.built.Load()
	lines := make([]string, len(b.entries))
	for i, e := range b.entries {
		patterns := make([]string, len(e.patterns))
		for j, p := range e.patterns {
			patterns[j] = shown(p)
		}
		lines[i] = strings.Join(patterns, ", ") + ": " + e.order
	}
	return strings.Join(lines, "\n")
}

// Layer returns a layer of the current config, to look at its state: the shared layer of
// the name if there is one, else the first layer with the name in any entry, else nil.
//
//	limit, ok := stack.Layer("all").(*concurrency.Layer)
func (s *Stack) Layer(name string) interceptor.Layer {
	b := s.built.Load()
	if l := b.shared[name]; l != nil {
		return l.value
	}
	for _, e := range b.entries {
		for _, l := range e.layers {
			if name != "" && l.name == name {
				return l.value
			}
		}
	}
	return nil
}

// Budget returns a budget of the current config, the one for all if name is empty; nil if
// there is none of that name.
func (s *Stack) Budget(name string) *budget.Budget {
	if b := s.built.Load().budgets[name]; b != nil {
		return b.value
	}
	return nil
}

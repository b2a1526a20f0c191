// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package stackconfig

import (
	"context"
	"fmt"

	"github.com/belfry-go/belfry/interceptor"
	"github.com/belfry-go/belfry/interceptor/breaker"
	"github.com/belfry-go/belfry/interceptor/hedge"
	"github.com/belfry-go/belfry/interceptor/retry"
	"github.com/belfry-go/belfry/internal/check"
	"github.com/belfry-go/belfry/internal/isnil"
)

// An Option supplies what is not data.
type Option func(*options)

type options struct {
	errs          *check.Errors
	observer      interceptor.Layer // Nil if there is none.
	supplied      map[supply]any
	breakerChange func(layer string, c breaker.Change)
}

// A supply is the name of something that an option supplies.
type supply struct{ option, name string }

// supplies returns an option that supplies v under a name, which may be used once.
func supplies(option, name string, v any) Option {
	return func(o *options) {
		key := supply{option, name}
		o.errs.Require(name != "", option, name, "must not be empty")
		o.errs.Require(!isnil.Value(v), fmt.Sprintf("%s[%q]", option, name), nil, "must not be nil")
		o.errs.Require(o.supplied[key] == nil, option, name, "must be given once")
		o.supplied[key] = v
	}
}

// WithObserver lets o see all calls, including those without layers.
func WithObserver(o interceptor.Observer) Option {
	return func(opts *options) {
		var err error
		if opts.observer, err = interceptor.Observe(o).NewLayer(); err != nil {
			opts.errs.NotNil(true, "WithObserver", "an observer")
		}
	}
}

// WithLayer supplies a layer that configs refer to with {"provided": NAME}, for what is
// not data, such as a filter.
func WithLayer(name string, s interceptor.Spec) Option {
	if isnil.Value(s) {
		return supplies("WithLayer", name, nil)
	}
	l, err := s.NewLayer()
	return func(o *options) {
		if o.errs.Nested(fmt.Sprintf("WithLayer[%q]", name), err); err == nil {
			supplies("WithLayer", name, l)(o)
		}
	}
}

// WithKeyFunc supplies a function that layers refer to with "keyFunc".
func WithKeyFunc(name string, f interceptor.KeyFunc) Option { return supplies("WithKeyFunc", name, f) }

// WithCostFunc supplies a function that concurrency limits refer to with
// "costFunc"; see WithCost of package concurrency.
func WithCostFunc(name string, f func(ctx context.Context, a *interceptor.Admission) int64) Option {
	return supplies("WithCostFunc", name, f)
}

// WithPriorityFunc supplies a function that buffers and concurrency and rate limits
// refer to with "priorityFunc"; see WithPriority of their packages.
func WithPriorityFunc(name string, f interceptor.PriorityFunc) Option {
	return supplies("WithPriorityFunc", name, f)
}

// WithIdempotentFunc supplies a function that retries and hedges refer to with
// "idempotentFunc"; see [retry.WithIdempotent].
func WithIdempotentFunc(name string, f func(method string) bool) Option {
	return supplies("WithIdempotentFunc", name, f)
}

// WithRetryPolicy supplies a policy that retries refer to with "policy"; see
// [retry.WithPolicy].
func WithRetryPolicy(name string, p retry.Policy) Option {
	return supplies("WithRetryPolicy", name, p)
}

// WithHedgePolicy supplies a policy that hedges refer to with "policy"; see
// [hedge.WithPolicy].
func WithHedgePolicy(name string, p hedge.Policy) Option {
	return supplies("WithHedgePolicy", name, p)
}

// WithBreakerChange calls f at each change of a breaker's state, with the name of the
// layer; see [breaker.WithOnStateChange].
func WithBreakerChange(f func(layer string, c breaker.Change)) Option {
	return func(o *options) {
		o.errs.NotNil(f == nil, "WithBreakerChange", "a function")
		o.breakerChange = f
	}
}

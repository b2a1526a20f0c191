// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package filter

import (
	"context"
	"errors"
	"reflect"
	"sync/atomic"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/belfry-go/belfry/interceptor"
	"github.com/belfry-go/belfry/interceptor/mapping"
	"github.com/belfry-go/belfry/internal/check"
	"github.com/belfry-go/belfry/internal/codeset"
)

// Config is the part of a filter that is data. The zero Config is the default.
type Config struct {
	// Code is the status code of a rejection whose predicate's error has no status
	// of its own. Any code of an error; zero means PERMISSION_DENIED. The errors of
	// package context are DEADLINE_EXCEEDED and CANCELLED, whatever Code is.
	Code codes.Code
}

func (c Config) check(errs *check.Errors) {
	errs.Require(c.Code <= codeset.Last, "Code", c.Code, "%s, or 0 for %v", codeset.Rule, codes.PermissionDenied)
}

// A Predicate decides over a call: nil lets it pass, an error rejects it. req is the
// request of a unary call, which c.SetRequest replaces; nil for a stream. The context
// that it returns, derived from ctx, replaces the call's context; nil keeps it. It must
// not modify req, which belongs to the caller, and must not keep c. It is called
// concurrently. To wait, use the context of c.Park, which also ends when the stack
// drains.
//
// A Predicate is a [interceptor.Spec] of a [Filter] with the zero Config.
type Predicate func(ctx context.Context, c *interceptor.Call, req any) (context.Context, error)

// NewLayer makes a [Filter] of p.
func (p Predicate) NewLayer() (interceptor.Layer, error) { return New(Config{}, p) }

// A GatePredicate decides over a call before the layers inside are asked: nil lets it
// pass, an error rejects it. req is the request of a unary call, nil for a stream. It
// must change neither req nor a, must not keep a, and is called concurrently. It may take
// its time even where the call must not wait for capacity, but no longer than its context
// lives, which ends with the call's deadline, those of layers outside included, and when
// the call must not wait any longer. If it takes a millisecond or more, that is reported to
// the observer as waiting. To wait, use the context of a.Park, which also ends when the
// stack drains.
//
// A GatePredicate is a [interceptor.Spec] of a [Gate] with the zero Config.
type GatePredicate func(ctx context.Context, a *interceptor.Admission, req any) error

// NewLayer makes a [Gate] of p.
func (p GatePredicate) NewLayer() (interceptor.Layer, error) { return NewGate(Config{}, p) }

// A MessagePredicate decides over a message that is to be sent on a stream. It returns
// what to send instead, nil for m itself, or an error, which ends the stream. It must not
// modify m. It is called for one message of a stream after the other, and concurrently
// for different streams.
type MessagePredicate func(ctx context.Context, method string, m any) (any, error)

// core is what both forms share.
type core struct {
	name   string
	config atomic.Pointer[Config]
	last   atomic.Pointer[rejection]
}

// A rejection is a refusal and what it was made from.
type rejection struct {
	err     error
	code    codes.Code
	refusal *interceptor.Refusal
}

// Update replaces the config while calls run. A bad config changes nothing. It may
// be called concurrently.
func (f *core) Update(config Config) error {
	errs := check.Of("filter")
	config.check(errs)
	if err := errs.Err(); err != nil {
		return err
	}
	f.config.Store(&config)
	return nil
}

// Config returns the config as it was given to New or Update.
func (f *core) Config() Config { return *f.config.Load() }

// String returns the layer's name.
func (f *core) String() string { return f.name }

// refuse makes a refusal of a predicate's error. If the predicate returns the same error
// value each time, such as a variable, the refusal is made once.
func (f *core) refuse(err error, sent bool) error {
	code := f.config.Load().Code
	keep := !sent && reflect.TypeOf(err).Kind() == reflect.Pointer // So that == is safe, and cheap.
	if keep {
		if l := f.last.Load(); l != nil && l.err == err && l.code == code {
			return l.refusal
		}
	}
	if _, ok := interceptor.AsRefusal(err); ok && !sent {
		return err
	}
	r := interceptor.Refuse(f.name, interceptor.ReasonFilter, "rejected").Because(err, sent)
	if st, ok := status.FromError(err); !ok || st.Code() == codes.OK {
		r.Code = code
		switch c := status.FromContextError(err).Code(); {
		case c != codes.Unknown:
			r.Code = c
		case code == codes.OK:
			r.Code = codes.PermissionDenied
		}
	}
	if keep {
		f.last.Store(&rejection{err, code, r})
	}
	return r
}

// isEnd reports whether a predicate returned the error of its context.
func isEnd(err error) bool {
	return errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded)
}

// A Filter is the layer in the call path. It may be used in any number of stacks.
type Filter struct {
	interceptor.CallOnly
	core
	predicate Predicate
	messages  interceptor.Layer // Filters the messages of streams; nil if none are filtered.
}

// An Option configures what is not data.
type Option func(*options)

type options struct {
	errs     *check.Errors
	name     string
	messages MessagePredicate
}

// WithName sets the name of the layer in refusals and in the stack's String; by
// default "filter"; it must not be empty. It tells several filters apart.
func WithName(name string) Option { return func(o *options) { o.name = name } }

// WithMessages lets p decide over each message that is sent on a stream. If it rejects
// one, SendMsg returns the refusal, and so does RecvMsg from then on; the stream is
// cancelled. It costs a context for each stream. It is for a [Filter]; a [Gate] sees no
// messages.
func WithMessages(p MessagePredicate) Option {
	return func(o *options) {
		o.errs.NotNil(p == nil, "WithMessages", "a function")
		o.messages = p
	}
}

// optionsOf checks what New and NewGate have in common.
func optionsOf(config Config, noPredicate bool, opts []Option) options {
	o := options{errs: check.Of("filter"), name: "filter"}
	check.Options(o.errs, &o, opts)
	o.errs.Name(o.name)
	config.check(o.errs)
	o.errs.NotNil(noPredicate, "predicate", "a function")
	return o
}

// New returns a Filter. An error is a [*interceptor.ConfigError], or several joined.
func New(config Config, predicate Predicate, opts ...Option) (*Filter, error) {
	o := optionsOf(config, predicate == nil, opts)
	if err := o.errs.Err(); err != nil {
		return nil, err
	}
	f := &Filter{predicate: predicate}
	f.name = o.name
	f.config.Store(&config)
	if o.messages != nil {
		var err error
		if f.messages, err = mapping.Request(f.mapper(o.messages)).NewLayer(); err != nil {
			return nil, err
		}
	}
	return f, nil
}

// mapper returns what p makes of a message.
func (f *Filter) mapper(p MessagePredicate) func(ctx context.Context, method string, m any) (any, error) {
	return func(ctx context.Context, method string, m any) (any, error) {
		replaced, err := p(ctx, method, m)
		if err != nil {
			return nil, f.refuse(err, true)
		}
		if replaced != nil {
			return replaced, nil
		}
		return m, nil
	}
}

// NewLayer returns f.
func (f *Filter) NewLayer() (interceptor.Layer, error) { return f, nil }

// Traits returns 0: a filter is always ready.
func (f *Filter) Traits() interceptor.Traits { return 0 }

// WrapCall returns the call path.
func (f *Filter) WrapCall(next interceptor.Next, again interceptor.Again) interceptor.Next {
	stream := next
	if f.messages != nil {
		stream = f.messages.WrapCall(next, again)
	}
	return func(ctx context.Context, c *interceptor.Call) error {
		changed, err := f.predicate(ctx, c, c.Request())
		switch {
		case err == nil:
		case ctx.Err() != nil && isEnd(err):
			return interceptor.Ended(ctx, f.name)
		default:
			return f.refuse(err, false)
		}
		if changed != nil {
			ctx = changed
		}
		if c.Kind() == interceptor.Unary {
			return next(ctx, c)
		}
		return stream(ctx, c)
	}
}

// A Gate is the layer in the admission. It may be used in any number of stacks.
type Gate struct {
	interceptor.GateOnly
	core
	predicate GatePredicate
}

// NewGate returns a Gate. An error is a [*interceptor.ConfigError], or several joined.
func NewGate(config Config, predicate GatePredicate, opts ...Option) (*Gate, error) {
	o := optionsOf(config, predicate == nil, opts)
	o.errs.Require(o.messages == nil, "WithMessages", check.Set, "must not be used with NewGate, which sees no messages")
	if err := o.errs.Err(); err != nil {
		return nil, err
	}
	g := &Gate{predicate: predicate}
	g.name = o.name
	g.config.Store(&config)
	return g, nil
}

// NewLayer returns g.
func (g *Gate) NewLayer() (interceptor.Layer, error) { return g, nil }

// Traits returns 0: a Gate does not wait for capacity.
func (g *Gate) Traits() interceptor.Traits { return 0 }

// WrapGate returns the gate.
func (g *Gate) WrapGate(inner interceptor.Gate) interceptor.Gate {
	return interceptor.GateFunc(func(ctx context.Context, a *interceptor.Admission, w interceptor.Wait) error {
		err, ended := a.Internals().Consult(ctx, g.name, w, false, func(ctx context.Context) error {
			return g.predicate(ctx, a, a.Request())
		})
		if r, ok := interceptor.AsRefusal(ended); ok && isEnd(err) {
			return r
		}
		if err != nil {
			return g.refuse(err, false)
		}
		return inner.Admit(ctx, a, w)
	})
}

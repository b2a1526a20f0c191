// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package timeout

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/belfry-go/belfry/interceptor"
	"github.com/belfry-go/belfry/internal/attempt"
	"github.com/belfry-go/belfry/internal/check"
	"github.com/belfry-go/belfry/internal/quantile"
)

// Config bounds how long calls may take. It is plain data. A bound of 0 is off, and none
// may be negative; at least one must be on.
type Config struct {
	// Timeout bounds a unary call, or an attempt of one, waiting included. With
	// Adaptive it is the greatest timeout.
	Timeout time.Duration
	// Adaptive lets the timeout of unary calls follow their latency. Nil is off.
	Adaptive *Adaptive

	// Lifetime bounds a stream as Timeout bounds a unary call.
	Lifetime time.Duration
	// FirstResponse bounds how long the first response message of a stream may take
	// from when there is something to respond to. For a server stream that is the
	// beginning, waiting included; for a client stream when it is closed for
	// sending; for a bidirectional stream the first message that is sent. Headers
	// are not a response.
	FirstResponse time.Duration
	// Message bounds how long one RecvMsg may wait for a message, and one SendMsg for
	// room to send one.
	Message time.Duration
	// Idle bounds how long a stream may be without a message received or sent. A message
	// that a retry inside keeps until it makes another attempt is not sent before that. It
	// also counts while nobody reads from the stream, and so ends streams that were
	// abandoned.
	Idle time.Duration
}

// Adaptive is a timeout of Multiple times a percentile of the latencies of a method's
// successful calls of the last Window, at least Min and at most [Config.Timeout]. Each
// method has its own; beyond 1,000 methods the others share one.
//
// A call that this timeout cuts short counts as if it had taken [Config.Timeout], because
// nobody knows how long it would have taken. So the timeout cannot hold on to a percentile
// that was right once: when more calls are cut short than the percentile leaves out, the
// timeout is Config.Timeout, until those calls are older than Window. By default that is
// so after a hundredth of the calls that the method had in the last Window, and those in
// flight meanwhile. Calls of a method that are always slower than its timeout, and fewer
// than the percentile leaves out, are cut short for good; if they are wanted, Percentile
// must be higher.
type Adaptive struct {
	// Percentile is a share of the calls, above 0 and below 1; 0 is the default, 0.99.
	Percentile float64
	// Multiple is from 1 to 100; 0 is the default, 3: a call that takes three times as
	// long as all but the slowest hundredth is not going to be answered.
	Multiple float64
	// Min is the least timeout, above 0 and at most Timeout. Required, because a fast
	// server would otherwise get a timeout that an ordinary pause exceeds.
	Min time.Duration
	// Window is how long latencies count, from 1 s to 1 h; 0 is the default, 1 min.
	Window time.Duration
	// MinSamples is how many latencies of the method must be known; with fewer the
	// timeout is Timeout.
	// From 1 to 1e6; 0 is the default, 100, because with fewer the 99th percentile is
	// the slowest call.
	MinSamples int
}

const (
	defaultPercentile = 0.99
	defaultMultiple   = 3
	defaultWindow     = time.Minute
	defaultSamples    = 100
)

// A Bound says what cut a call short.
type Bound uint8

// The bounds.
const (
	Caller        Bound = iota // the caller's deadline, or that of an interceptor outside the stack
	Timeout                    // Config.Timeout, or the adaptive one
	Lifetime                   // Config.Lifetime
	FirstResponse              // Config.FirstResponse
	Message                    // Config.Message
	Idle                       // Config.Idle
	bounds
)

// String says what happened when the bound was exceeded.
func (b Bound) String() string {
	switch b {
	case Caller:
		return "the caller's deadline has passed"
	case Timeout:
		return "the call's timeout has passed"
	case Lifetime:
		return "the stream's lifetime has passed"
	case FirstResponse:
		return "there was no response"
	case Message:
		return "no message could be received or sent"
	case Idle:
		return "the stream was idle"
	}
	return fmt.Sprintf("Bound(%d)", uint8(b))
}

// Exceeded is wrapped by the [interceptor.Refusal] of a call that was cut short, where
// errors.As finds it. It is [context.DeadlineExceeded] to errors.Is.
type Exceeded struct {
	Bound Bound
	// Limit is how long the bound allowed; 0 if it was the caller's.
	Limit time.Duration
	// Err is what the call returned, or the gate that it waited at; may be nil.
	Err error
}

// Error says what has happened.
func (e *Exceeded) Error() string {
	s := e.Bound.String()
	if e.Limit > 0 {
		s += " (" + e.Limit.String() + ")"
	}
	if e.Err != nil {
		s += ": " + e.Err.Error()
	}
	return s
}

// Unwrap returns Err.
func (e *Exceeded) Unwrap() error { return e.Err }

// Is reports whether target is [context.DeadlineExceeded].
func (e *Exceeded) Is(target error) bool { return target == context.DeadlineExceeded }

// settings is a valid Config with its defaults filled in, and values computed from it.
// It is immutable.
type settings struct {
	Config
	adaptive Adaptive // What Config.Adaptive points to, if it is not nil.
	given    Adaptive // The same without defaults.
	// causes are what contexts are cancelled with, for each bound: errors of calls that
	// were sent.
	causes [bounds]*interceptor.Refusal
}

func (cfg Config) settings(errs *check.Errors, name string) *settings {
	s := &settings{Config: cfg}
	limits := [bounds]time.Duration{
		Timeout: cfg.Timeout, Lifetime: cfg.Lifetime, FirstResponse: cfg.FirstResponse, Message: cfg.Message, Idle: cfg.Idle,
	}
	fields := [bounds]string{
		Timeout: "Timeout", Lifetime: "Lifetime", FirstResponse: "FirstResponse", Message: "Message", Idle: "Idle",
	}
	for b, d := range limits {
		check.Zero(errs, fields[b], d, check.Positive, "no bound")
		s.causes[b] = exceeded(name, Bound(b), d, nil, true)
	}
	if cfg.Adaptive != nil {
		s.adaptive = *cfg.Adaptive
		s.given = *cfg.Adaptive
		s.Adaptive = &s.adaptive
		errs.Require(cfg.Timeout != 0, "Timeout", cfg.Timeout, "must be positive if Adaptive is set")
		s.adaptive.setDefaults(errs.In("Adaptive"), cfg.Timeout)
	} else {
		errs.Require(limits != [bounds]time.Duration{}, "Timeout", cfg.Timeout,
			"must be positive unless Lifetime, FirstResponse, Message or Idle is")
	}
	return s
}

// setDefaults checks a and fills in its defaults.
func (a *Adaptive) setDefaults(errs *check.Errors, most time.Duration) {
	check.Default(errs, "Percentile", &a.Percentile, check.Between(0.0, 1), defaultPercentile)
	check.Default(errs, "Multiple", &a.Multiple, check.From(1.0, 100), defaultMultiple)
	errs.Require(a.Min > 0 && (a.Min <= most || most <= 0), "Min", a.Min, "must be positive and not more than Timeout, %v", most)
	check.Default(errs, "Window", &a.Window, check.From(time.Second, time.Hour), defaultWindow)
	check.Default(errs, "MinSamples", &a.MinSamples, check.From(1, 1_000_000), defaultSamples)
}

// exceeded is the error of a call that was cut short.
func exceeded(layer string, b Bound, limit time.Duration, err error, sent bool) *interceptor.Refusal {
	return &interceptor.Refusal{
		Layer: layer, Reason: interceptor.ReasonDeadline, Sent: sent,
		Err: &Exceeded{Bound: b, Limit: limit, Err: err},
	}
}

// NewLayer makes the layer as New does without options.
func (cfg Config) NewLayer() (interceptor.Layer, error) {
	l, err := New(cfg)
	if err != nil {
		return nil, err
	}
	return l, nil
}

// An Option changes what a layer is besides its Config.
type Option func(*options)

type options struct{ name string }

// WithName names the layer in errors, metrics and Stack.String, to tell a timeout for the
// call from one for each attempt. The default is "timeout"; it must not be empty.
func WithName(name string) Option { return func(o *options) { o.name = name } }

// A Layer is a timeout. It may be used in any number of stacks.
type Layer struct {
	name     string
	settings atomic.Pointer[settings]
	// methods are the latencies for an adaptive timeout, by method; nil until there was
	// one.
	methods atomic.Pointer[quantile.Methods]

	// The gate leaves these notes for the call path.
	beginning noteKey // When the call reached the gate, if a bound counts from then.
	deadline  noteKey // When a unary call has to be over, if that is before its caller's deadline.

	mu sync.Mutex // Held by Update. The locks of methods are taken under it.
}

// noteKey is the key of a note by its address, and so it has a size.
type noteKey struct{ _ byte }

// New makes a layer. An error is a [*interceptor.ConfigError], or several joined.
func New(cfg Config, opts ...Option) (*Layer, error) {
	o := options{name: "timeout"}
	errs := check.Of("timeout")
	check.Options(errs, &o, opts)
	errs.Name(o.name)
	l := &Layer{name: o.name}
	if err := l.update(cfg, errs); err != nil {
		return nil, err
	}
	return l, nil
}

// Update changes the configuration while calls run. Admitted calls keep their deadline,
// and open streams all their bounds. Latencies for an adaptive timeout are kept. After an
// error nothing has changed.
func (l *Layer) Update(cfg Config) error { return l.update(cfg, check.Of("timeout")) }

func (l *Layer) update(cfg Config, errs *check.Errors) error {
	s := cfg.settings(errs, l.name)
	if err := errs.Err(); err != nil {
		return err
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if s.Adaptive != nil {
		if m := l.methods.Load(); m != nil {
			m.SetWindow(s.adaptive.Window)
		} else {
			l.methods.Store(quantile.NewMethods(s.adaptive.Window))
		}
	}
	l.settings.Store(s)
	return nil
}

// Config returns the configuration as it was given to New or Update.
func (l *Layer) Config() Config {
	s := l.settings.Load()
	cfg := s.Config
	if cfg.Adaptive != nil {
		a := s.given
		cfg.Adaptive = &a
	}
	return cfg
}

// Timeout returns the timeout of a unary call of the method, such as
// "/pkg.Service/Method", that starts now; 0 if it has none.
func (l *Layer) Timeout(method string) time.Duration {
	s := l.settings.Load()
	if s.Adaptive == nil {
		return s.Timeout
	}
	w, ok := l.methods.Load().Peek(method)
	if !ok {
		return s.Timeout
	}
	return s.timeout(w, interceptor.Now())
}

// timeout returns the adaptive timeout of a method with the latencies w.
func (s *settings) timeout(w *quantile.Window, now interceptor.Instant) time.Duration {
	d, n := w.QuantileAt(now, s.adaptive.Percentile)
	if n < s.adaptive.MinSamples {
		return s.Timeout
	}
	return min(max(time.Duration(float64(d)*s.adaptive.Multiple), s.adaptive.Min), s.Timeout)
}

// String returns the layer's name.
func (l *Layer) String() string { return l.name }

// NewLayer returns l.
func (l *Layer) NewLayer() (interceptor.Layer, error) { return l, nil }

// Traits returns 0: a timeout is always ready.
func (l *Layer) Traits() interceptor.Traits { return 0 }

// WrapGate returns the gate that bounds the time spent in the gates inside.
func (l *Layer) WrapGate(inner interceptor.Gate) interceptor.Gate {
	return &gate{layer: l, inner: inner}
}

type gate struct {
	layer *Layer
	inner interceptor.Gate
}

// Admit lets the gates inside wait no longer than the call may take. It makes no
// context, because the call may be refused.
func (g *gate) Admit(ctx context.Context, a *interceptor.Admission, w interceptor.Wait) error {
	l := g.layer
	s := l.settings.Load()
	b, limit, counts := Timeout, s.Timeout, false
	if a.Kind() == interceptor.Unary {
		if counts = s.Adaptive != nil; counts {
			limit = s.timeout(l.window(a.Method(), a.Now()), a.Now())
		}
	} else {
		b, limit = s.untilOpen(a.Kind())
		counts = s.startCounts(a.Kind())
	}
	if counts {
		a.Note(&l.beginning, int64(a.Now()))
	}
	if limit == 0 {
		return l.explainWait(ctx, g.inner.Admit(ctx, a, w))
	}
	deadline := a.Now().Add(limit)
	if t, ok := ctx.Deadline(); ok && interceptor.InstantOf(t) <= deadline {
		return l.explainWait(ctx, g.inner.Admit(ctx, a, w))
	}
	if a.Kind() == interceptor.Unary {
		a.Note(&l.deadline, int64(deadline))
	}
	before := a.Internals().Bound(deadline)
	err := g.inner.Admit(ctx, a, w.Narrow(deadline.Wait()))
	a.Internals().SetBound(before)
	if err == nil || isExceeded(err) {
		return err
	}
	// The gate that refused may have waited without telling a, so a's clock may be old.
	if ctx.Err() == nil && interceptor.Now() >= deadline {
		return exceeded(l.name, b, limit, err, false)
	}
	return l.explainWait(ctx, err)
}

// untilOpen returns the shortest bound on opening a stream, waiting included; 0 if there
// is none.
func (s *settings) untilOpen(k interceptor.Kind) (Bound, time.Duration) {
	if k == interceptor.ServerStream && s.FirstResponse > 0 && (s.Lifetime == 0 || s.FirstResponse < s.Lifetime) {
		return FirstResponse, s.FirstResponse
	}
	return Lifetime, s.Lifetime
}

// startCounts reports whether a bound of a stream counts from its start.
func (s *settings) startCounts(k interceptor.Kind) bool {
	return s.Lifetime > 0 || k == interceptor.ServerStream && s.FirstResponse > 0
}

// isExceeded reports whether err already says whose deadline it is.
func isExceeded(err error) bool {
	r, ok := interceptor.AsRefusal(err)
	if ok {
		_, ok = r.Err.(*Exceeded)
	}
	return ok
}

// explainWait returns err as an Exceeded of the caller's deadline, if that ended the wait
// in a gate.
func (l *Layer) explainWait(ctx context.Context, err error) error {
	if err == nil || ctx.Err() != context.DeadlineExceeded || isExceeded(err) {
		return err
	}
	if r, ok := interceptor.AsRefusal(err); !ok || r.Reason != interceptor.ReasonDeadline {
		return err
	}
	if _, ok := interceptor.AsRefusal(context.Cause(ctx)); ok { // It is not the caller's.
		return err
	}
	return exceeded(l.name, Caller, 0, err, false)
}

// window returns the latencies of a method.
func (l *Layer) window(method string, now interceptor.Instant) *quantile.Window {
	return l.methods.Load().Get(method, now)
}

// WrapCall returns the call path that bounds the time of the call itself.
func (l *Layer) WrapCall(next interceptor.Next, _ interceptor.Again) interceptor.Next {
	return func(ctx context.Context, c *interceptor.Call) error {
		if c.Kind() == interceptor.Unary {
			return l.unary(ctx, c, next)
		}
		return l.stream(ctx, c, next)
	}
}

// noted returns the moment that the gate noted under key.
func noted(c *interceptor.Call, key *noteKey) (interceptor.Instant, bool) {
	at, ok := c.Noted(key)
	return interceptor.Instant(at), ok
}

func (l *Layer) unary(ctx context.Context, c *interceptor.Call, next interceptor.Next) error {
	beginning, adaptive := noted(c, &l.beginning)
	deadline, tightens := noted(c, &l.deadline)
	if tightens { // Unless a layer outside has made the context's deadline earlier.
		t, ok := ctx.Deadline()
		tightens = !ok || deadline < interceptor.InstantOf(t)
	}
	if !tightens {
		err := next(ctx, c)
		if err != nil {
			return l.explain(ctx, ctx, nil, err, true)
		}
		if adaptive {
			l.record(c, beginning)
		}
		return nil
	}
	cause := l.settings.Load().causes[Timeout]
	if adaptive {
		cause = exceeded(l.name, Timeout, deadline.Sub(beginning), nil, true)
	}
	own, cancel := context.WithDeadlineCause(ctx, deadline.Time(), cause)
	defer cancel()
	if context.Cause(own) == error(cause) { // A gate that cannot be bounded has admitted it too late.
		return interceptor.Ended(own, l.name)
	}
	began := c.Internals().AdmittedAt()
	err := next(own, c)
	if err == nil {
		if adaptive {
			l.record(c, beginning)
		}
		return nil
	}
	mine := cause
	if context.Cause(own) != error(cause) && !toldFirst(err, began, deadline) {
		mine = nil
	}
	err = l.explain(ctx, own, mine, err, c.Internals().Outcome(own, err).Sent())
	if adaptive && mine != nil && isExceeded(err) {
		l.recordCut(c)
	}
	return err
}

// record records the latency of a call that succeeded.
func (l *Layer) record(c *interceptor.Call, beginning interceptor.Instant) {
	now := interceptor.Now()
	l.window(c.Method(), now).RecordAt(now, now.Sub(beginning))
}

// recordCut records a call that the timeout has cut short. All that is known of its
// latency is a lower bound: statistics call such an observation censored. The estimate of
// Kaplan and Meier moves the weight of one to the latencies above its bound, and says
// nothing of a percentile when too many are cut. We move it to the greatest latency that
// the layer would let a call have, which is simpler and errs on the side of the calls.
// TCP, which doubles its timeout for each one that is exceeded in a row, is no model: a
// success would undo what the timeout has learnt of the slower calls beside it.
func (l *Layer) recordCut(c *interceptor.Call) {
	now := interceptor.Now()
	w := l.window(c.Method(), now)
	w.RecordAt(now, l.settings.Load().Timeout)
	w.Refresh()
}

// toldFirst is attempt.ToldFirst for a call that had its time from began to deadline.
func toldFirst(err error, began, deadline interceptor.Instant) bool {
	return attempt.ToldFirst(err, deadline.Sub(began), deadline.Sub(interceptor.Now()))
}

// explain returns err as an Exceeded that says whose deadline ended a call, or an
// operation on a stream, if a deadline did. own is the context that the layer gave the
// call, possibly ctx itself. If a bound of this layer has ended it, mine is its cause. If
// the call was not sent, err is of what waited to send it, such as credentials, and may
// have any code.
func (l *Layer) explain(ctx, own context.Context, mine *interceptor.Refusal, err error, sent bool) error {
	if _, ok := interceptor.AsRefusal(err); ok {
		return err
	}
	deadline := errors.Is(err, context.DeadlineExceeded) || status.Code(err) == codes.DeadlineExceeded
	cancelled := errors.Is(err, context.Canceled) || status.Code(err) == codes.Canceled
	if !deadline && !cancelled && (sent || mine == nil) {
		return err
	}
	if mine != nil {
		e := mine.Err.(*Exceeded)
		return exceeded(l.name, e.Bound, e.Limit, err, true)
	}
	if deadline && ctx.Err() == context.DeadlineExceeded {
		if _, ok := interceptor.AsRefusal(context.Cause(own)); !ok { // Otherwise a layer outside explains it.
			return exceeded(l.name, Caller, 0, err, true)
		}
	}
	return err
}

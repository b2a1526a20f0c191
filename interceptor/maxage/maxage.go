// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package maxage

import (
	"context"
	"fmt"
	"io"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"

	"github.com/belfry-go/belfry/interceptor"
	"github.com/belfry-go/belfry/internal/attempt"
	"github.com/belfry-go/belfry/internal/check"
)

// Reason is the reason of the refusal that ends a stream.
const Reason interceptor.Reason = "MAX_AGE"

// Config says when streams end. It is plain data.
type Config struct {
	// Age is how old a stream becomes. At least 1 s; 0 is the default, 30 min, after which
	// a rollout is forgotten.
	Age time.Duration
	// Jitter is the part of Age by which a stream ends earlier or later, drawn evenly.
	// From 0 to 1; None (-1) is none, 0 is the default, 0.2.
	Jitter float64
	// Drain is how long it takes until the streams of an endpoint that is about to leave
	// are due, spread evenly. Positive; 0 is the default, 10 s, which most servers have
	// before they are stopped. None (-1) leaves them until they are as old as Age.
	Drain time.Duration
	// Grace is how long a bidirectional stream that is due has for the answers of the
	// server. Positive; 0 is the default, 5 s.
	Grace time.Duration
}

// None is none, for settings whose 0 is the default.
const None = check.None

const (
	defaultAge    = 30 * time.Minute
	defaultJitter = 0.2
	defaultDrain  = 10 * time.Second
	defaultGrace  = 5 * time.Second
)

// A Cause is why a stream was ended.
type Cause uint8

// The causes.
const (
	Age      Cause = iota // it was as old as [Config.Age] allows
	Draining              // its endpoint is about to leave
)

// Ended is wrapped by the [interceptor.Refusal] of a stream that the layer has ended, where
// errors.As finds it. Open the stream again.
type Ended struct {
	Cause Cause
	// Age is how old the stream was when it was due.
	Age time.Duration
	// Complete is whether the server has ended the stream by itself, with OK, after it was
	// closed for sending: every request has been answered.
	Complete bool
}

// Error says what has happened.
func (e *Ended) Error() string {
	if e.Cause == Draining {
		return fmt.Sprintf("the stream's endpoint is about to leave (after %v): open it again", e.Age)
	}
	return fmt.Sprintf("the stream has reached its greatest age (%v): open it again", e.Age)
}

// settings is a Config with its defaults filled in. Immutable.
type settings struct {
	Config
	given Config
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

// WithName names the layer in errors and Stack.String. The default is "maxage"; it must not
// be empty.
func WithName(name string) Option { return func(o *options) { o.name = name } }

// A Layer ends streams that are too old. It may be used in any number of stacks, and is
// safe for concurrent use.
type Layer struct {
	interceptor.CallOnly
	name     string
	settings atomic.Pointer[settings]
}

// New makes a layer. An error is a [*interceptor.ConfigError], or several joined.
func New(cfg Config, opts ...Option) (*Layer, error) {
	o := options{name: "maxage"}
	errs := check.Of("maxage")
	check.Options(errs, &o, opts)
	errs.Name(o.name)
	l := &Layer{name: o.name}
	if err := l.update(cfg, errs); err != nil {
		return nil, err
	}
	return l, nil
}

// Update changes the configuration while streams are open, which keep when they end. After
// an error nothing has changed.
func (l *Layer) Update(cfg Config) error { return l.update(cfg, check.Of("maxage")) }

func (l *Layer) update(cfg Config, errs *check.Errors) error {
	s := &settings{Config: cfg, given: cfg}
	check.Default(errs, "Age", &s.Age, check.AtLeast(time.Second), defaultAge)
	check.DefaultOrNone(errs, "Jitter", &s.Jitter, check.From(0.0, 1), defaultJitter, "none")
	check.DefaultOrNone(errs, "Drain", &s.Drain, check.Positive, defaultDrain, "never")
	check.Default(errs, "Grace", &s.Grace, check.Positive, defaultGrace)
	if err := errs.Err(); err != nil {
		return err
	}
	l.settings.Store(s)
	return nil
}

// Config returns the configuration as it was given to New or Update.
func (l *Layer) Config() Config { return l.settings.Load().given }

// String returns the layer's name.
func (l *Layer) String() string { return l.name }

// NewLayer returns l.
func (l *Layer) NewLayer() (interceptor.Layer, error) { return l, nil }

// WrapCall returns the call path that bounds the age of streams.
func (l *Layer) WrapCall(next interceptor.Next, _ interceptor.Again) interceptor.Next {
	return func(ctx context.Context, c *interceptor.Call) error {
		if k := c.Kind(); k != interceptor.ServerStream && k != interceptor.BidiStream {
			return next(ctx, c)
		}
		return l.open(ctx, c, next)
	}
}

func (l *Layer) open(ctx context.Context, c *interceptor.Call, next interceptor.Next) error {
	cfg := l.settings.Load()
	s := &stream{layer: l, settings: cfg, bidi: c.Kind() == interceptor.BidiStream, end: c.Internals().StreamEnd()}
	if cfg.Drain != None {
		s.leave.of = s
		c.AddOptions(&s.leave)
	}
	ctx, s.cancel = context.WithCancelCause(ctx)
	if err := next(ctx, c); err != nil {
		s.stop()
		return err
	}
	s.ClientStream = c.Stream()
	c.SetStream(s)
	c.Internals().AtStreamEnd(s)
	age := cfg.Age
	if cfg.Jitter != None {
		age += time.Duration((2*rand.Float64() - 1) * cfg.Jitter * float64(age))
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.opened = time.Now()
	left := age
	if s.leaves {
		left = min(left, s.drainLocked())
	}
	s.timer = time.AfterFunc(left, s.fire)
	return nil
}

// A stream is a stream that ends when it is due.
type stream struct {
	grpc.ClientStream // set when it is open

	layer    *Layer
	settings *settings
	bidi     bool
	cancel   context.CancelCauseFunc
	end      interceptor.StreamEnd
	leave    leave

	// sendMu is held while a message is sent and while the stream is closed for sending,
	// which gRPC does not allow at once. mu may be locked under it.
	sendMu sync.Mutex

	// mu guards the fields below. Nothing is called under it but the timer's methods.
	mu        sync.Mutex
	opened    time.Time // zero before
	timer     *time.Timer
	leaves    bool // the endpoint is about to leave
	receiving bool
	over      bool
	due       *Ended // nil before it is due
	cut       bool   // the context was cancelled, because of due
}

// leave is the call option by which the balancing policy says that an endpoint leaves.
type leave struct {
	grpc.EmptyCallOption
	of *stream
}

// Leaves implements attempt.LeaveOption.
func (l *leave) Leaves() {
	s := l.of
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.leaves || s.over || s.due != nil {
		return
	}
	s.leaves = true
	if !s.opened.IsZero() {
		s.timer.Reset(s.drainLocked())
	}
}

var _ attempt.LeaveOption = (*leave)(nil)

// drainLocked draws when the stream is due because its endpoint leaves.
func (s *stream) drainLocked() time.Duration {
	return time.Duration(rand.Float64() * float64(s.settings.Drain))
}

// fire makes the stream due, or ends it if it was due for long enough.
func (s *stream) fire() {
	s.mu.Lock()
	if s.over || s.cut {
		s.mu.Unlock()
		return
	}
	first := s.due == nil
	if first {
		s.due = &Ended{Age: time.Since(s.opened)}
		if s.leaves {
			s.due.Cause = Draining
		}
	}
	if s.bidi && first {
		s.timer.Reset(s.settings.Grace)
		s.mu.Unlock()
		s.sendMu.Lock()
		defer s.sendMu.Unlock()
		_ = s.ClientStream.CloseSend()
		return
	}
	cut := s.bidi || s.receiving
	s.cut = cut
	s.mu.Unlock()
	if cut {
		s.interrupt()
	}
}

// refusal returns the error of a stream that is due.
func (s *stream) refusal() *interceptor.Refusal {
	return &interceptor.Refusal{Layer: s.layer.name, Reason: Reason, Code: codes.Aborted, Sent: true, Err: s.due}
}

// interrupt ends what runs on the stream.
func (s *stream) interrupt() {
	r := s.refusal()
	s.cancel(r)
	s.end.End(r)
}

func (s *stream) stop() {
	s.mu.Lock()
	s.over = true
	if s.timer != nil {
		s.timer.Stop()
	}
	s.mu.Unlock()
	s.cancel(nil)
}

// StreamEnded is called when the stream has ended for the layers outside.
func (s *stream) StreamEnded() { s.stop() }

func (s *stream) SendMsg(m any) error {
	s.sendMu.Lock()
	defer s.sendMu.Unlock()
	if s.bidi && s.isDue() {
		return io.EOF // RecvMsg says why.
	}
	return s.ClientStream.SendMsg(m)
}

func (s *stream) CloseSend() error {
	s.sendMu.Lock()
	defer s.sendMu.Unlock()
	if s.bidi && s.isDue() {
		return nil
	}
	return s.ClientStream.CloseSend()
}

func (s *stream) isDue() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.due != nil
}

func (s *stream) RecvMsg(m any) error {
	s.mu.Lock()
	if s.due != nil && (!s.bidi || s.cut) && !s.over {
		s.cut = true
		s.mu.Unlock()
		s.interrupt()
		return s.refusal()
	}
	s.receiving = true
	s.mu.Unlock()
	err := s.ClientStream.RecvMsg(m)
	s.mu.Lock()
	s.receiving = false
	due, cut := s.due, s.cut
	s.mu.Unlock()
	if err == nil {
		return nil
	}
	s.stop()
	switch {
	case cut:
		return s.refusal()
	case due != nil && s.bidi && err == io.EOF:
		// It ended because it was closed for sending, which its caller did not do.
		due.Complete = true
		return s.refusal()
	}
	return err
}

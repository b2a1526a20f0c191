// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package ratelimit

import (
	"context"
	"reflect"
	"time"

	"google.golang.org/grpc/codes"

	"github.com/belfry-go/belfry/interceptor"
	"github.com/belfry-go/belfry/internal/layercheck"
)

// A Limiter decides elsewhere, such as in a store that many processes share. It
// is safe for concurrent use. [FromLimiter] makes a layer of it.
type Limiter interface {
	// Take takes a token for key if there is one. It does not wait for one, but may use
	// the time of ctx to find out. An error means that it could not find out and took no
	// token.
	Take(ctx context.Context, key string) (Decision, error)
	// Refund gives back a token that Take took for key and that was not used. It must not
	// block: a limiter across a network gives it back in the background, or not at all.
	Refund(key string)
}

// A Decision is the answer of a [Limiter].
type Decision struct {
	// OK says that a token was taken.
	OK bool
	// RetryAfter is when to ask again if none was taken. If it is not positive, a call
	// that may wait asks again every 100 ms. No call asks more often than once in a
	// millisecond.
	RetryAfter time.Duration
}

// unknownRetry is when to ask a limiter again that does not say when.
const unknownRetry = 100 * time.Millisecond

// leastRetry is how long a call waits at least before it asks a limiter again, so
// that one that says "at once", and means it, is not asked in a loop.
const leastRetry = time.Millisecond

// WithFailOpen lets calls pass while a [Limiter] cannot decide. By default they are
// refused with UNAVAILABLE and reason RATE_LIMIT, and the refusal wraps the
// limiter's error.
func WithFailOpen() Option { return func(o *options) { o.open = true } }

// FromLimiter returns a layer of a limiter that decides elsewhere. by gives the key of a
// call; with the zero KeyBy all calls have the empty key. A refusal names the key. A call
// waits by asking again when the limiter said, as long as its Wait and its deadline
// allow. The limiter chooses among those that wait, so [WithPriority] has no effect. An
// error of NewStack is a [*interceptor.ConfigError], or several joined.
func FromLimiter(limiter Limiter, by interceptor.KeyBy, opts ...Option) interceptor.Spec {
	o := optionsOf(opts)
	isNil := limiter == nil || reflect.ValueOf(limiter).Kind() == reflect.Pointer && reflect.ValueOf(limiter).IsNil()
	o.errs.NotNil(isNil, "FromLimiter.limiter", "a limiter")
	layercheck.KeyBy(o.errs.In("FromLimiter"), "by", by)
	if wrong := layercheck.Spec(o.errs); wrong != nil {
		return wrong
	}
	failed := interceptor.Refuse(o.name, interceptor.ReasonRateLimit, "the limiter cannot decide")
	failed.Code = codes.Unavailable
	return &elsewhere{
		name: o.name, by: by, open: o.open, limiter: limiter, over: newRefusals(o.name, "", "no token"), failed: failed,
	}
}

type elsewhere struct {
	interceptor.GateOnly
	name    string
	by      interceptor.KeyBy
	open    bool
	limiter Limiter
	over    *refusals
	failed  *interceptor.Refusal
}

func (l *elsewhere) NewLayer() (interceptor.Layer, error) { return l, nil }
func (l *elsewhere) String() string                       { return l.name }
func (l *elsewhere) Traits() interceptor.Traits           { return traits }

func (l *elsewhere) WrapGate(inner interceptor.Gate) interceptor.Gate {
	return interceptor.GateFunc(func(ctx context.Context, a *interceptor.Admission, w interceptor.Wait) error {
		key := l.by.Key(ctx, a)
		taken, err := l.take(ctx, a, key, w)
		if err != nil {
			if r, ok := err.(*interceptor.Refusal); ok && key != "" && r.Reason == interceptor.ReasonRateLimit {
				err = r.ForKey(key)
			}
			return err
		}
		a.Internals().Pass()
		if taken {
			a.Hold(&token{limiter: l.limiter, key: key}, 0)
		}
		return inner.Admit(ctx, a, w)
	})
}

// take reports whether the call passes with a token, or without because the
// limiter has failed.
func (l *elsewhere) take(ctx context.Context, a *interceptor.Admission, key string, w interceptor.Wait) (taken bool, err error) {
	latest, since, parks := latestOf(ctx, w), interceptor.Now(), false
	defer func() {
		if parks {
			a.Waited(l.name, since)
		} else {
			a.Internals().Consulted(l.name, since)
		}
	}()
	for {
		d, err := l.ask(ctx, a, key)
		switch {
		case err == nil && d.OK:
			return true, nil
		case ctx.Err() != nil:
			return false, interceptor.Ended(ctx, l.name)
		case err != nil && l.open:
			return false, nil
		case err != nil:
			return false, l.failed.Because(err, false)
		}
		now := interceptor.Now()
		turn, again := never, now.Add(unknownRetry)
		if d.RetryAfter > 0 {
			turn = now.Add(d.RetryAfter)
			again = now.Add(max(d.RetryAfter, leastRetry))
		}
		if again > latest {
			return false, l.over.after(turn, now)
		}
		if !parks {
			parks = true
			parked, done := a.Park(ctx)
			defer done()
			ctx = parked
		}
		if w.Sleep(ctx, again) != nil {
			return false, interceptor.Ended(ctx, l.name)
		}
	}
}

// ask asks the limiter. It may take as long as the deadlines of the layers outside allow,
// however long the call may wait.
func (l *elsewhere) ask(ctx context.Context, a *interceptor.Admission, key string) (Decision, error) {
	in := a.Internals()
	if end, ok := in.Widen(interceptor.None, interceptor.Forever).End(); ok && !in.NeverWaits() {
		within, cancel := context.WithDeadline(ctx, end.Time())
		defer cancel()
		ctx = within
	}
	return l.limiter.Take(ctx, key)
}

// token is a token of a Limiter.
type token struct {
	limiter Limiter
	key     string
}

// Release gives back the token of a call that was not sent.
func (t *token) Release(_ int64, e interceptor.End) {
	if !e.Outcome.Sent() {
		t.limiter.Refund(t.key)
	}
}

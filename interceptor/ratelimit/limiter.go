// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package ratelimit

import (
	"context"
	"reflect"
	"time"

	"google.golang.org/grpc/codes"

	"github.com/belfry-go/belfry/interceptor"
)

// A Limiter decides elsewhere, such as in a store that many processes share. It
// is safe for concurrent use. [FromLimiter] makes a layer of it.
type Limiter interface {
	// Take takes a token for key if there is one. It does not wait for one, but may
	// take as long as ctx to find out. An error says that it could not find out; no
	// token has been taken then.
	Take(ctx context.Context, key string) (Decision, error)
	// Refund gives a token back that Take took for key and that was not used. It
	// must not block: a limiter across a network gives it back in the background, or
	// not at all.
	Refund(key string)
}

// A Decision is what a [Limiter] says.
type Decision struct {
	// OK says that a token was taken.
	OK bool
	// RetryAfter is when to ask again if none was; not positive if that is not
	// known. A call that may wait then asks again every 100 ms.
	RetryAfter time.Duration
}

// unknownRetry is when to ask a limiter again that does not say when.
const unknownRetry = 100 * time.Millisecond

// WithFailOpen lets calls pass while a [Limiter] cannot decide. By default they are
// refused with UNAVAILABLE and reason RATE_LIMIT, and the refusal wraps the
// limiter's error.
func WithFailOpen() Option { return func(o *options) { o.open = true } }

// FromLimiter makes a layer of a limiter that decides elsewhere. The key of a call
// is what [WithKey] says, and otherwise empty. A call waits by asking again when
// it was told to, as long as its Wait and its deadline allow; among those who wait
// the limiter chooses.
func FromLimiter(limiter Limiter, opts ...Option) (interceptor.Layer, error) {
	o := optionsOf(opts)
	isNil := limiter == nil || reflect.ValueOf(limiter).Kind() == reflect.Pointer && reflect.ValueOf(limiter).IsNil()
	o.errs.NotNil(isNil, "FromLimiter.limiter", "a limiter")
	if err := o.errs.Err(); err != nil {
		return nil, err
	}
	if o.key == nil {
		o.key = func(context.Context, *interceptor.Call) string { return "" }
	}
	failed := interceptor.Refuse(o.name, interceptor.ReasonRateLimit, "the limiter cannot decide")
	failed.Code = codes.Unavailable
	return &elsewhere{
		name: o.name, key: o.key, open: o.open, limiter: limiter, over: newRefusals(o.name, "no token"), failed: failed,
	}, nil
}

type elsewhere struct {
	interceptor.GateOnly
	name    string
	key     KeyFunc
	open    bool
	limiter Limiter
	over    *refusals
	failed  *interceptor.Refusal
}

func (l *elsewhere) String() string { return l.name }

func (l *elsewhere) WrapGate(inner interceptor.Gate) interceptor.Gate {
	return interceptor.GateFunc(func(ctx context.Context, c *interceptor.Call, w interceptor.Wait) error {
		key := l.key(ctx, c)
		taken, err := l.take(ctx, c, key, w)
		if err != nil {
			return err
		}
		if taken {
			c.Hold(&token{limiter: l.limiter, key: key}, 0)
		}
		return inner.Admit(ctx, c, w)
	})
}

// take reports whether the call passes with a token, or without because the
// limiter has failed.
func (l *elsewhere) take(ctx context.Context, c *interceptor.Call, key string, w interceptor.Wait) (taken bool, err error) {
	var since interceptor.Instant
	for {
		d, err := l.ask(ctx, c, key)
		if err != nil || d.OK {
			if since != 0 {
				c.Waited(l.name, since)
			}
			switch {
			case err == nil:
				return true, nil
			case ctx.Err() != nil:
				return false, interceptor.Ended(ctx, l.name)
			case l.open:
				return false, nil
			}
			return false, l.failed.Because(err, false)
		}
		if ctx.Err() != nil {
			return false, interceptor.Ended(ctx, l.name)
		}
		now := interceptor.Now()
		turn, again := interceptor.Instant(never), now.Add(unknownRetry)
		if d.RetryAfter > 0 {
			turn = now.Add(d.RetryAfter)
			again = turn
		}
		if again > latestOf(ctx, w) {
			err = l.over.after(turn, now)
		} else {
			if since == 0 {
				since = now
			}
			if w.Sleep(ctx, again) == nil {
				continue
			}
			err = interceptor.Ended(ctx, l.name)
		}
		if since != 0 {
			c.Waited(l.name, since)
		}
		return false, err
	}
}

// ask asks the limiter. To find out may take as long as the deadlines of the layers
// outside allow, however long the call may wait.
func (l *elsewhere) ask(ctx context.Context, c *interceptor.Call, key string) (Decision, error) {
	if end, ok := c.Widen(interceptor.None, interceptor.Forever).End(); ok {
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

// Release gives the token back if it was not used.
func (t *token) Release(_ int64, o interceptor.Outcome, _ error) {
	if o == interceptor.NotSent {
		t.limiter.Refund(t.key)
	}
}

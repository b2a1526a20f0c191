// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package ratelimit

import (
	"math"
	"time"

	"golang.org/x/time/rate"

	"github.com/belfry-go/belfry/interceptor"
	"github.com/belfry-go/belfry/internal/check"
)

// FromRate makes a layer of a limiter of golang.org/x/time/rate, which may be used
// elsewhere at the same time. Calls wait, are refused and give tokens back as with
// [New]. The limiter may be changed by its methods: calls that wait see it
// when the next token was expected to come, or within a second.
//
// A token is given back by reserving minus one, since the limiter takes
// reservations back only before their time.
func FromRate(limiter *rate.Limiter, opts ...Option) (interceptor.Layer, error) {
	o := optionsOf(opts)
	o.errs.NotNil(limiter == nil, "FromRate.limiter", "a limiter")
	o.errs.Require(o.key == nil, "WithKey", check.Set, "must not be used with FromRate, whose limiter has no keys")
	o.notOpen()
	if err := o.errs.Err(); err != nil {
		return nil, err
	}
	q := newQueue(o.name, rateSource{limiter}, newRefusals(o.name, "no token"))
	return &rateLayer{queue: q}, nil
}

type rateLayer struct {
	interceptor.GateOnly
	queue *queue
}

func (l *rateLayer) String() string { return l.queue.name }

func (l *rateLayer) WrapGate(inner interceptor.Gate) interceptor.Gate {
	return &gate{queue: l.queue, inner: inner}
}

// rateSource is a rate.Limiter as a source.
type rateSource struct{ l *rate.Limiter }

// take reads the clock, for a reading that is shared by the gates of a call may be
// older than the limiter's last one, and a limiter of this kind would turn back its
// own clock and give out the tokens since then a second time.
func (s rateSource) take(interceptor.Instant) (interceptor.Instant, bool) {
	now := interceptor.Now()
	return now, s.l.AllowN(now.Time(), 1)
}

func (s rateSource) next(now interceptor.Instant, ahead int) interceptor.Instant {
	limit, burst := s.l.Limit(), s.l.Burst()
	if limit == rate.Inf {
		return now
	}
	if limit <= 0 || burst < 1 {
		return never
	}
	wait := (float64(ahead) + 1 - s.l.TokensAt(now.Time())) / float64(limit) * float64(time.Second)
	if wait >= math.MaxInt64 {
		return never
	}
	return now.Add(time.Duration(math.Ceil(max(wait, 0))))
}

func (s rateSource) refund(interceptor.Instant) { s.l.ReserveN(interceptor.Now().Time(), -1) }

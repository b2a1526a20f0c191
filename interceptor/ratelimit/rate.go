// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package ratelimit

import (
	"fmt"
	"math"
	"time"

	"golang.org/x/time/rate"

	"github.com/belfry-go/belfry/interceptor"
)

// FromRate makes a layer of a limiter of golang.org/x/time/rate, which may be used
// elsewhere at the same time. Calls wait, are refused and give tokens back as with
// [New]. The limiter may be changed by its methods: calls that wait see it
// when the next token was expected to come, or within a second.
//
// A token is given back by reserving minus one, since the limiter takes
// reservations back only before their time.
func FromRate(l *rate.Limiter, opts ...Option) (interceptor.Layer, error) {
	if l == nil {
		return nil, fmt.Errorf("ratelimit: FromRate: the limiter is nil")
	}
	o, err := optionsOf(opts)
	if err != nil {
		return nil, err
	}
	if o.key != nil {
		return nil, fmt.Errorf("ratelimit: FromRate: WithKey is used, but a limiter of this kind has no keys")
	}
	if o.open {
		return nil, errOpen
	}
	q := newQueue(o.name, rateSource{l}, newRefusals(o.name, "no token"))
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

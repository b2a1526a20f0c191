// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package ratelimit

import (
	"math"
	"time"

	"golang.org/x/time/rate"

	"github.com/belfry-go/belfry/interceptor"
	"github.com/belfry-go/belfry/internal/layercheck"
)

// FromRate returns a layer of a limiter of golang.org/x/time/rate, which may be used
// elsewhere at the same time. Calls wait and are refused as with [New]. The methods of the
// limiter may change it: waiting calls notice when the next token was expected, or within
// a second. An error of NewStack is a [*interceptor.ConfigError], or several joined.
//
// A call that was not sent gives its token back by reserving minus one, because the
// limiter takes reservations back only before their time. That happens only within the
// time in which the limiter makes a whole burst of tokens. So calls may be sent in bursts
// of up to twice the limiter's burst, at the same average rate.
func FromRate(limiter *rate.Limiter, opts ...Option) interceptor.Spec {
	o := optionsOf(opts)
	o.errs.NotNil(limiter == nil, "FromRate.limiter", "a limiter")
	o.notOpen()
	if wrong := layercheck.Spec(o.errs); wrong != nil {
		return wrong
	}
	return &rateLayer{queue: newQueue(o.name, "", rateSource{limiter}, o.priority, "no token")}
}

type rateLayer struct {
	interceptor.GateOnly
	queue *queue
}

func (l *rateLayer) NewLayer() (interceptor.Layer, error) { return l, nil }
func (l *rateLayer) String() string                       { return l.queue.name }
func (l *rateLayer) Traits() interceptor.Traits           { return traits }

func (l *rateLayer) WrapGate(inner interceptor.Gate) interceptor.Gate {
	return &gate{queue: l.queue, inner: inner}
}

// rateSource is a rate.Limiter as a source.
type rateSource struct{ l *rate.Limiter }

// take reads the clock, because the reading that the gates of a call share may be older
// than the limiter's last one. A limiter of this kind would turn back its own clock, and
// give out the tokens since then a second time.
func (s rateSource) take(interceptor.Instant) (at int64, ok bool) {
	now := interceptor.Now()
	return int64(now), s.l.AllowN(now.Time(), 1)
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

func (s rateSource) refund(at int64) {
	now := interceptor.Now()
	age, full := now.Sub(interceptor.Instant(at)).Seconds(), float64(s.l.Burst())
	if age*float64(s.l.Limit()) < full {
		s.l.ReserveN(now.Time(), -1)
	}
}

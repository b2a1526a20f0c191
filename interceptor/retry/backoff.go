// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package retry

import (
	"fmt"
	"math"
	"math/rand/v2"
	"time"

	"github.com/belfry-go/belfry/internal/check"
)

// Jitter spreads back-offs, so that calls that failed together do not come back
// together.
type Jitter uint8

// The jitters, as in "Exponential Backoff And Jitter" (Brooker, 2015), which
// measured that full jitter causes the least load and decorrelated jitter the
// least delay.
const (
	// FullJitter draws between zero and the exponential delay. It is the default.
	FullJitter Jitter = iota
	// EqualJitter keeps half of the exponential delay and draws the other half.
	EqualJitter
	// DecorrelatedJitter draws between Initial and three times the last delay. It
	// ignores Multiplier.
	DecorrelatedJitter
	// NoJitter takes the exponential delay itself, so calls that fail together come back
	// together.
	NoJitter
)

// String returns the jitter's name: full, equal, decorrelated, none.
func (j Jitter) String() string {
	switch j {
	case FullJitter:
		return "full"
	case EqualJitter:
		return "equal"
	case DecorrelatedJitter:
		return "decorrelated"
	case NoJitter:
		return "none"
	}
	return fmt.Sprintf("Jitter(%d)", uint8(j))
}

const (
	// DefaultInitialBackoff and DefaultMaxBackoff bound the back-offs.
	DefaultInitialBackoff = 50 * time.Millisecond
	DefaultMaxBackoff     = 5 * time.Second
	// DefaultMultiplier is the ratio of a back-off to the previous one.
	DefaultMultiplier = 2
)

// A Backoff says how long a call waits before each further attempt: before the i-th
// retry, counted from 0, Initial·Multiplierⁱ, at most Max, with jitter. The zero value is
// the default. Each delay of each call is drawn independently.
type Backoff struct {
	// Initial is the delay before the first retry, and the least delay with decorrelated
	// jitter. Zero means 50 ms; negative is an error.
	Initial time.Duration
	// Max is the longest delay, jitter included. Zero means 5 s, or Initial if
	// that is longer; less than Initial is an error.
	Max time.Duration
	// Multiplier is at least 1; zero means 2.
	Multiplier float64
	// Jitter is FullJitter by default.
	Jitter Jitter
}

// withDefaults checks b and returns it with all fields set.
func (b Backoff) withDefaults(errs *check.Errors) Backoff {
	check.Default(errs, "Initial", &b.Initial, check.Positive, DefaultInitialBackoff)
	if b.Max == 0 {
		b.Max = max(DefaultMaxBackoff, b.Initial)
	}
	errs.Require(b.Max >= b.Initial, "Max", b.Max, "must be at least Initial, %v", b.Initial)
	check.Default(errs, "Multiplier", &b.Multiplier, check.AtLeast(1.0), DefaultMultiplier)
	errs.Require(b.Jitter <= NoJitter, "Jitter", b.Jitter, "must be FullJitter, EqualJitter, DecorrelatedJitter or NoJitter")
	return b
}

// base returns the delay before retry n without jitter.
func (b *Backoff) base(n int) time.Duration {
	// If it overflows a float64 it is infinite, and so more than Max.
	d := float64(b.Initial) * math.Pow(b.Multiplier, float64(n))
	if d >= float64(b.Max) {
		return b.Max
	}
	return time.Duration(d)
}

// delays is the state of a call's back-offs.
type delays struct {
	n    int           // Retries delayed since the start or since a server's pushback.
	last time.Duration // The last delay.
}

// next draws the delay before the next retry.
func (d *delays) next(b *Backoff) time.Duration {
	base := b.base(d.n)
	switch b.Jitter {
	case FullJitter:
		base = between(0, base)
	case EqualJitter:
		base = between(base/2, base)
	case DecorrelatedJitter:
		last := max(d.last, b.Initial)
		most := b.Max
		if last < b.Max/3 {
			most = 3 * last
		}
		base = between(b.Initial, most)
	}
	d.n++
	d.last = base
	return base
}

// atLeast draws the delay before the next retry, of which the server asks for the first
// part, least. Clients that were told the same come back spread over half of it, as Envoy's
// rate_limited_retry_back_off has it, unless there is no jitter.
func (d *delays) atLeast(b *Backoff, least time.Duration) time.Duration {
	wait := d.next(b)
	if b.Jitter != NoJitter {
		least = between(least, least+least/2)
	}
	return max(wait, least)
}

// reset starts over, as gRFC A6 requires after a pushback.
func (d *delays) reset() { *d = delays{} }

// between draws from lo to hi, both included. The generator is the runtime's, so
// no two calls draw the same sequence.
func between(lo, hi time.Duration) time.Duration {
	if hi <= lo {
		return lo
	}
	n := uint64(hi-lo) + 1 // At most 2⁶³, which an int64 would not hold.
	return lo + time.Duration(rand.Uint64N(n))
}

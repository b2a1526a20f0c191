// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package ratelimit

import (
	"math/bits"
	"sync/atomic"
	"time"

	"github.com/belfry-go/belfry/interceptor"
)

const (
	// step is the finest difference between two RetryAfters.
	step = 100 * time.Microsecond
	// steps is how many of them there are to each doubling, beyond the first few.
	steps = 16
	// times is how many there are: up to 2^63 ns.
	times = 2*steps + steps*48
)

// refusals holds one refusal for each length of time after which to try again,
// so that refusing costs no allocation once it has been made. Times are rounded
// up to one of these lengths, by less than a sixteenth or step, whichever is
// more: who comes back then finds the token.
type refusals struct {
	unknown *interceptor.Refusal // Without a time.
	made    [times]atomic.Pointer[interceptor.Refusal]
}

func newRefusals(name, message string) *refusals {
	return &refusals{unknown: interceptor.Refuse(name, interceptor.ReasonRateLimit, message)}
}

// after returns the refusal of a call whose token comes at turn.
func (r *refusals) after(turn, now interceptor.Instant) *interceptor.Refusal {
	if turn == never {
		return r.unknown
	}
	i, d := roundUp(max(turn.Sub(now), 1))
	if e := r.made[i].Load(); e != nil {
		return e
	}
	r.made[i].CompareAndSwap(nil, r.unknown.After(d))
	return r.made[i].Load()
}

// roundUp returns the least length that is not less than d, and its number.
func roundUp(d time.Duration) (i int, up time.Duration) {
	n := uint64((min(d, 1<<62)-1)/step + 1) // A length near the end of the scale could not be rounded up.
	shift := max(bits.Len64(n-1)-5, 0)      // So that the rest of n has five bits, or is 32.
	m := (n + 1<<shift - 1) >> shift
	return int(m) + steps*shift, time.Duration(m<<shift) * step
}

// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package ratelimit

import (
	"github.com/belfry-go/belfry/interceptor"
	"github.com/belfry-go/belfry/internal/retryafter"
)

// refusals holds ready-made refusals, so that refusing allocates nothing.
type refusals struct {
	unknown *interceptor.Refusal // Without a time.
	timed   *retryafter.Cache[interceptor.Refusal]
}

func newRefusals(name, key, message string) *refusals {
	unknown := interceptor.Refuse(name, interceptor.ReasonRateLimit, message)
	// Calls arrive at any time before the next token, so the times differ. There may be
	// many keys, so each keeps fewer refusals.
	size := 2 * retryafter.PerDecade
	if key != "" {
		unknown = unknown.ForKey(key)
		size = retryafter.PerDecade
	}
	return &refusals{unknown, retryafter.New(size, unknown.After)}
}

// after returns the refusal of a call whose token comes at turn.
func (r *refusals) after(turn, now interceptor.Instant) *interceptor.Refusal {
	if turn == never {
		return r.unknown
	}
	return r.timed.Get(turn.Sub(now))
}

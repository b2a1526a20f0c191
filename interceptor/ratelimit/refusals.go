// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package ratelimit

import (
	"github.com/belfry-go/belfry/interceptor"
	"github.com/belfry-go/belfry/internal/retryafter"
)

// refusals holds what calls are refused with, so that refusing costs no allocation.
type refusals struct {
	unknown *interceptor.Refusal // Without a time.
	timed   *retryafter.Cache[interceptor.Refusal]
}

func newRefusals(name, message string) *refusals {
	unknown := interceptor.Refuse(name, interceptor.ReasonRateLimit, message)
	// When tokens are missing, calls come at any time before the next one.
	return &refusals{unknown, retryafter.New(2*retryafter.PerDecade, unknown.After)}
}

// after returns the refusal of a call whose token comes at turn.
func (r *refusals) after(turn, now interceptor.Instant) *interceptor.Refusal {
	if turn == never {
		return r.unknown
	}
	return r.timed.Get(turn.Sub(now))
}

// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package ratelimit

import (
	"context"
	"time"

	"google.golang.org/grpc/metadata"

	"github.com/belfry-go/belfry/interceptor"
	"github.com/belfry-go/belfry/internal/keyed"
)

// A KeyFunc says which key a call belongs to. It is called for each admission,
// concurrently, and must not block. Calls for which it returns the same key,
// such as the empty one, share a rate.
type KeyFunc func(ctx context.Context, c *interceptor.Call) string

// byMethod is the key of [KeyMethod].
func byMethod(_ context.Context, c *interceptor.Call) string { return c.Method() }

// byMetadata is the key of [KeyMetadata].
func byMetadata(name string) KeyFunc {
	return func(ctx context.Context, _ *interceptor.Call) string {
		md, _ := metadata.FromOutgoingContext(ctx)
		if v := md.Get(name); len(v) > 0 {
			return v[0]
		}
		return ""
	}
}

// newKeys returns a queue for each key, up to MaxKeys; the keys beyond share one.
//
// A queue may be dropped if no call is about to take its token and its bucket is
// full. Then a new bucket is as good, so nothing is forgiven, and a token that a
// call gives back later would not have fitted in anyway.
func newKeys(l *Layer) *keyed.Map[*queue] {
	return keyed.New(
		func() int { return l.rate.Load().maxKeys },
		func(string) *queue { return l.rate.Load().newQueue(l.name) },
		func(q *queue, _ time.Duration, now int64) bool { return q.full(interceptor.Instant(now)) })
}

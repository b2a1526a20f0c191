// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package ratelimit

import (
	"context"
	"hash/maphash"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"google.golang.org/grpc/metadata"

	"github.com/belfry-go/belfry/interceptor"
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

// shards is how many parts the keys are in, so that new keys do not stop calls
// of all others.
const shards = 16

// keys is a queue for each key, up to a number.
//
// A key is idle if no call is about to take its token and its bucket is full.
// Then a new bucket is as good, so it is dropped without forgiving anything, and
// a token that a call gives back later would not have fitted in anyway. Each new
// key looks at two others of its shard, so the keys that are kept are about those in
// use without anyone going over all of them; that is done only when the number is
// reached, and at most once in sweepEvery.
type keys struct {
	layer *Layer
	seed  maphash.Seed
	shard [shards]shard
	n     atomic.Int64 // How many keys there are.
	max   atomic.Int64
	swept atomic.Int64 // When all were last gone over, as an Instant.
	rest  *queue       // Shared by the keys that found no place.
}

type shard struct {
	// mu guards m, and against it that the users of its queues grow: whoever reads
	// may add a user, whoever writes may drop a queue that has none. A queue's own
	// locks may be taken under it.
	mu sync.RWMutex
	m  map[string]*queue
}

// sweepEvery is how long after looking for idle keys in vain it is not done again.
const sweepEvery = 100 * time.Millisecond

func newKeys(l *Layer, p *params) *keys {
	k := &keys{layer: l, seed: maphash.MakeSeed(), rest: p.newQueue(l.name)}
	k.max.Store(int64(p.maxKeys))
	for i := range k.shard {
		k.shard[i].m = make(map[string]*queue)
	}
	return k
}

// get returns the queue of key with one more user, who takes itself off when it
// has its token.
func (k *keys) get(key string, now interceptor.Instant) *queue {
	s := &k.shard[maphash.String(k.seed, key)%shards]
	s.mu.RLock()
	q := s.m[key]
	if q != nil {
		q.users.Add(1)
	}
	s.mu.RUnlock()
	if q != nil {
		return q
	}
	if q = k.add(s, key, now); q == nil && k.sweep(now) {
		q = k.add(s, key, now)
	}
	if q == nil {
		q = k.rest
		q.users.Add(1)
	}
	return q
}

// add makes the queue of a new key; nil if there is no place for it.
func (k *keys) add(s *shard, key string, now interceptor.Instant) *queue {
	s.mu.Lock()
	defer s.mu.Unlock()
	q := s.m[key]
	if q == nil {
		seen := 0
		for other, o := range s.m { // In random order.
			if seen++; seen > 2 {
				break
			}
			k.dropLocked(s, other, o, now)
		}
		if k.n.Add(1) > k.max.Load() {
			k.n.Add(-1)
			return nil
		}
		q = k.layer.rate.Load().newQueue(k.layer.name)
		s.m[strings.Clone(key)] = q // The key may be a part of something greater.
	}
	q.users.Add(1)
	return q
}

// sweep drops all idle keys. It reports whether there is a place now.
func (k *keys) sweep(now interceptor.Instant) bool {
	last := k.swept.Load()
	if now.Sub(interceptor.Instant(last)) < sweepEvery || !k.swept.CompareAndSwap(last, int64(now)) {
		return false
	}
	for i := range k.shard {
		s := &k.shard[i]
		s.mu.Lock()
		for key, q := range s.m {
			k.dropLocked(s, key, q, now)
		}
		s.mu.Unlock()
	}
	return k.n.Load() < k.max.Load()
}

// dropLocked drops a key if it is idle. Caller must hold s.mu for writing.
func (k *keys) dropLocked(s *shard, key string, q *queue, now interceptor.Instant) {
	if q.idle(now) {
		delete(s.m, key)
		k.n.Add(-1)
	}
}

// update changes the rate of all keys. k.layer.rate has been changed already, so
// keys that are new meanwhile have it.
func (k *keys) update(p *params) {
	k.max.Store(int64(p.maxKeys))
	k.each(func(q *queue) { q.update(p) })
}

// each calls f for all queues.
func (k *keys) each(f func(*queue)) {
	f(k.rest)
	for i := range k.shard {
		s := &k.shard[i]
		s.mu.RLock()
		for _, q := range s.m {
			f(q)
		}
		s.mu.RUnlock()
	}
}

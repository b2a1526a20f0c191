// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package debug

import (
	"cmp"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/belfry-go/belfry/interceptor"
)

// A refusal is one that is shown.
type refusal struct {
	Time    time.Time `json:"time"`
	Stack   string    `json:"stack"`
	Layer   string    `json:"layer"`
	Reason  string    `json:"reason"`
	Method  string    `json:"method"`
	Key     string    `json:"key,omitempty"`
	Message string    `json:"message"`
}

// A count is how many refusals there were.
type count struct {
	Stack  string `json:"stack"`
	Layer  string `json:"layer"`
	Reason string `json:"reason"`
	Count  int64  `json:"count"`
}

type countKey struct{ stack, layer, reason string }

// refusals counts refusals, and keeps the last.
type refusals struct {
	counts sync.Map // of countKey to *atomic.Int64
	kinds  atomic.Int64

	mu   sync.Mutex // guards last and next; nothing is locked under it
	last []refusal  // a ring
	next int
}

func (rs *refusals) add(c interceptor.Observed, r *interceptor.Refusal) {
	rs.counter(countKey{c.Stack, r.Layer, string(r.Reason)}).Add(1)
	if !rs.mu.TryLock() {
		return // Another is noted at this moment, and one is enough to see.
	}
	defer rs.mu.Unlock()
	seen := refusal{
		Time: time.Now(), Stack: short(c.Stack), Layer: short(r.Layer), Reason: short(string(r.Reason)),
		Method: short(c.Method), Key: short(r.Key), Message: short(r.Message),
	}
	if len(rs.last) < MaxRefusals {
		rs.last = append(rs.last, seen)
		return
	}
	rs.last[rs.next] = seen
	rs.next = (rs.next + 1) % MaxRefusals
}

func (rs *refusals) counter(k countKey) *atomic.Int64 {
	if n, ok := rs.counts.Load(k); ok {
		return n.(*atomic.Int64)
	}
	if rs.kinds.Add(1) > MaxCounts {
		rs.kinds.Add(-1)
		k = countKey{"(others)", "(others)", "(others)"}
	}
	n, _ := rs.counts.LoadOrStore(k, new(atomic.Int64))
	return n.(*atomic.Int64)
}

// read returns the counts, the greatest first, and the last refusals, the newest first.
func (rs *refusals) read() ([]count, []refusal) {
	counts := []count{}
	rs.counts.Range(func(k, n any) bool {
		key := k.(countKey)
		counts = append(counts, count{short(key.stack), short(key.layer), short(key.reason), n.(*atomic.Int64).Load()})
		return true
	})
	slices.SortFunc(counts, func(a, b count) int {
		return cmp.Or(cmp.Compare(b.Count, a.Count), cmp.Compare(a.Stack, b.Stack), cmp.Compare(a.Layer, b.Layer), cmp.Compare(a.Reason, b.Reason))
	})
	counts = counts[:min(len(counts), MaxRefusals)]
	rs.mu.Lock()
	defer rs.mu.Unlock()
	last := append(append([]refusal{}, rs.last[rs.next:]...), rs.last[:rs.next]...)
	slices.Reverse(last)
	return counts, last
}

// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package discover

import (
	"cmp"
	"slices"
	"sync"
	"time"
)

// A SourceState says how the source of a channel is doing.
type SourceState struct {
	Target string // of the channel, with its scheme
	// Err is why the watch failed, nil if it has not or a later one is Synced. The last
	// complete set stays meanwhile.
	Err   error
	Since time.Time // of the first failure, zero if Err is nil
}

// live is the bridges that are not closed: *bridge → nothing.
var live sync.Map

// Sources returns the state of the source of each channel in the process that this package
// resolves, in the order of their targets. A channel that is idle has none. It is safe for
// concurrent use.
func Sources() []SourceState {
	var all []SourceState
	live.Range(func(k, _ any) bool {
		b := k.(*bridge)
		s := SourceState{Target: b.name}
		if failing := b.failing.Load(); failing != nil {
			s = *failing
		}
		all = append(all, s)
		return true
	})
	slices.SortStableFunc(all, func(a, b SourceState) int { return cmp.Compare(a.Target, b.Target) })
	return all
}

// note notes what is new of the source.
func (b *bridge) note(n news, now time.Time) {
	switch {
	case n.err != nil:
		s := &SourceState{Target: b.name, Err: n.err, Since: now}
		if before := b.failing.Load(); before != nil {
			s.Since = before.Since
		}
		b.failing.Store(s)
	case n.synced:
		b.failing.Store(nil)
	}
}

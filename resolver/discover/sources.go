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
	// Err is the last error of the source, whether it ended the watch or not. It is nil
	// if there was none since the source last said Synced. The last complete set stays
	// in use.
	Err   error
	Since time.Time // of the first failure, zero if Err is nil
}

// live is the set of the bridges that are not closed. Its keys are of type *bridge.
var live sync.Map

// Sources returns how the source of each channel in this process is doing, sorted by
// target. It lists the channels that this package resolves, except those that are idle. It
// is safe for concurrent use.
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

// note updates the state that [Sources] returns.
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

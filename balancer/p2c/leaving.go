// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package p2c

import (
	"maps"
	"slices"
	"sync"

	"github.com/belfry-go/belfry/internal/attempt"
)

// leaving is the streams of an endpoint that are told when the endpoint is about to leave:
// when discovery marks it as draining, or does not list it any more. Only streams with a
// LeaveOption use it.
type leaving struct {
	mu      sync.Mutex // guards the fields below; nothing is called under it
	leaves  bool       // whether the endpoint is about to leave
	streams map[*tracker]attempt.LeaveOption
}

// add notes a stream, and tells it at once if the endpoint leaves.
func (l *leaving) add(t *tracker, o attempt.LeaveOption) {
	l.mu.Lock()
	leaves := l.leaves
	if !leaves {
		if l.streams == nil {
			l.streams = make(map[*tracker]attempt.LeaveOption)
		}
		l.streams[t] = o
	}
	l.mu.Unlock()
	if leaves {
		o.Leaves()
	}
}

func (l *leaving) remove(t *tracker) {
	l.mu.Lock()
	defer l.mu.Unlock()
	delete(l.streams, t)
}

// set sets whether the endpoint is about to leave, and tells the streams if it is.
func (l *leaving) set(leaves bool) {
	l.mu.Lock()
	l.leaves = leaves
	var told []attempt.LeaveOption
	if leaves {
		told = slices.Collect(maps.Values(l.streams))
		l.streams = nil
	}
	l.mu.Unlock()
	for _, o := range told {
		o.Leaves()
	}
}

// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package discover

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"sync"
	"time"
)

// Settle returns a source for one that yields changes but cannot tell where its
// first set ends, and so never says [Synced]: each watch counts as synced once
// it has inserted an endpoint and then yielded nothing for the time quiet. What
// comes later are changes. If the source says Synced by itself, that holds.
//
// A source that inserts nothing never settles, because an empty set cannot be
// told from one that has not arrived; what happens then is up to
// [WithSyncTimeout].
//
// It returns an error if src is nil or quiet is not positive. It may be used by
// as many channels as src may.
func Settle(src Source, quiet time.Duration) (Source, error) {
	if src == nil {
		return nil, errors.New("discover: Settle: the source is nil")
	}
	if quiet <= 0 {
		return nil, fmt.Errorf("discover: Settle: quiet %v: must be positive", quiet)
	}
	return settled{src: src, quiet: quiet}, nil
}

// settled is immutable.
type settled struct {
	src   Source
	quiet time.Duration
}

// Watch implements [Source].
func (s settled) Watch(ctx context.Context) iter.Seq2[Change, error] {
	return func(yield func(Change, error) bool) {
		ctx, cancel := context.WithCancel(ctx)
		var wg sync.WaitGroup
		defer wg.Wait()
		defer cancel()
		events := make(chan watchEvent)
		over := make(chan struct{}) // the sequence has ended
		wg.Go(func() {
			defer close(over)
			watchOnce(ctx, s.src, func(ev watchEvent) bool {
				select {
				case events <- ev:
					return true
				case <-ctx.Done():
					return false
				}
			})
		})

		timer := time.NewTimer(0)
		defer timer.Stop()
		// After an error the source may be about to end: a Synced behind it would
		// make that look like success.
		inserted, synced, failing := false, false, false
		for {
			if inserted && !synced && !failing {
				timer.Reset(s.quiet)
			} else {
				timer.Stop()
			}
			var c Change
			var err error
			select {
			case <-ctx.Done():
				return
			case <-over:
				return
			case <-timer.C:
				c = Synced()
			case ev := <-events:
				if ev.kind == eventStart {
					continue
				}
				c, err = ev.change, ev.err
			}
			if failing = err != nil; !failing {
				inserted = inserted || c.Op == OpInsert
				synced = synced || c.Op == OpSynced
			}
			if !yield(c, err) {
				return
			}
		}
	}
}

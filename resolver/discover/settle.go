// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package discover

import (
	"errors"
	"fmt"
	"time"

	"github.com/belfry-go/belfry/internal/isnil"
)

// Settle makes a source usable that yields changes but cannot tell where its
// first set ends, and so never says [Synced]. Each watch counts as synced once
// it has inserted an endpoint and then yielded no change for the time quiet. If
// the source says Synced by itself, it is synced at once. Errors do not start
// the time again.
//
// While its set is empty a watch never settles, because an empty set looks the
// same as one that has not arrived yet. [WithSyncTimeout] then decides what
// happens.
//
// After a failure, the set of the new watch replaces the old one when the watch
// has been quiet, even if the source has only paused in the middle of its
// snapshot. So choose quiet longer than any pause in a snapshot. It has no
// default.
//
// Settle returns an error if src is nil or quiet is not positive. The source may
// be used by as many channels as src may.
func Settle(src Source, quiet time.Duration) (Source, error) {
	if isnil.Value(src) {
		return nil, errors.New("discover: Settle: the source is nil")
	}
	if quiet <= 0 {
		return nil, fmt.Errorf("discover: Settle: quiet %v: must be positive", quiet)
	}
	return merged{{src: src, quiet: quiet}}, nil
}

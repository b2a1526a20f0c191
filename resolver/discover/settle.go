// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package discover

import (
	"errors"
	"fmt"
	"time"

	"github.com/belfry-go/belfry/internal/isnil"
)

// Settle returns a source for one that yields changes but cannot tell where its
// first set ends, and so never says [Synced]: each watch counts as synced once
// it has inserted an endpoint and then changed nothing for the time quiet. What
// comes later are changes. If the source says Synced by itself, that holds.
// Errors do not put it off.
//
// While its set is empty a watch never settles, because an empty set cannot be
// told from one that has not arrived; what happens then is up to
// [WithSyncTimeout].
//
// After a failure, the set of the new watch replaces the old one when it is
// quiet, even if the source stalls half-way: choose quiet longer than any pause
// in a snapshot.
//
// It returns an error if src is nil or quiet is not positive. It may be used by
// as many channels as src may.
func Settle(src Source, quiet time.Duration) (Source, error) {
	if isnil.Value(src) {
		return nil, errors.New("discover: Settle: the source is nil")
	}
	if quiet <= 0 {
		return nil, fmt.Errorf("discover: Settle: quiet %v: must be positive", quiet)
	}
	return merged{{src: src, quiet: quiet}}, nil
}

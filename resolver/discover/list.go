// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package discover

import (
	"context"
	"fmt"
	"iter"
	"maps"
	"slices"

	"google.golang.org/grpc/resolver"
)

// List returns a source of a fixed set of endpoints. The key of each is the one
// it was given with [Key], or else its addresses. An endpoint listed twice
// counts once. Without arguments the set is empty, and is published as empty.
//
// List returns an error if an endpoint has no address, or if two different
// endpoints have the same key. The source may be used by any number of channels.
func List(endpoints ...resolver.Endpoint) (Source, error) {
	for i, ep := range endpoints {
		if err := checkEndpoint(ep); err != nil {
			return nil, fmt.Errorf("discover: List: endpoint %d: %w", i, err)
		}
	}
	set, err := keyed(endpoints)
	if err != nil {
		return nil, fmt.Errorf("discover: List: %w", err)
	}
	changes := make([]Change, 0, len(set)+1)
	for _, k := range slices.Sorted(maps.Keys(set)) {
		changes = append(changes, Insert(k, set[k]))
	}
	return list{Batch(append(changes, Final())...)}, nil
}

// list is immutable.
type list struct{ all Change }

// Watch implements [Source].
func (l list) Watch(context.Context) iter.Seq2[Change, error] {
	return func(yield func(Change, error) bool) { yield(l.all, nil) }
}

// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package discover

import (
	"errors"
	"testing"
	"time"
)

func TestSources(t *testing.T) {
	b := &bridge{name: "belfry:///orders"}
	live.Store(b, nil)
	defer live.Delete(b)
	state := func() SourceState {
		for _, s := range Sources() {
			if s.Target == b.name {
				return s
			}
		}
		t.Fatal("the source is not listed")
		return SourceState{}
	}
	down, first := errors.New("down"), time.Unix(1, 0)
	b.note(news{err: errors.New("first")}, first)
	b.note(news{err: down}, first.Add(time.Hour))
	b.note(news{}, first.Add(2*time.Hour)) // Changes of a watch that is not synced say nothing.
	if s := state(); s.Err != down || !s.Since.Equal(first) {
		t.Errorf("state %+v after two failures, want the last error and the time of the first", s)
	}
	b.note(news{synced: true}, first.Add(3*time.Hour))
	if s := state(); s.Err != nil || !s.Since.IsZero() {
		t.Errorf("state %+v after a complete set, want no error", s)
	}
}

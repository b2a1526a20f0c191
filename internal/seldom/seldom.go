// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

// Package seldom bounds how many lines are logged about something that may happen often.
package seldom

import (
	"fmt"
	"sync"
	"time"
)

const (
	// Burst is how many lines there may be at once.
	Burst = 10
	// Every is how long it takes until there may be one more.
	Every = time.Second
)

// A Log bounds lines. The zero Log is ready for use. It is safe for concurrent use.
type Log struct {
	mu   sync.Mutex // guards the fields below; nothing is locked under it
	full int64      // when there may be Burst lines again, in nanoseconds
	left int        // out since the last line
}

// May reports whether a line may be logged at a moment, in nanoseconds of any monotonic
// clock. more says how many lines were left out since the last one, for the end of this
// line; it is empty if there were none.
func (l *Log) May(now int64) (more string, ok bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	full := max(l.full, now) + int64(Every)
	if full > now+Burst*int64(Every) {
		l.left++
		return "", false
	}
	l.full = full
	if n := l.left; n > 0 {
		l.left = 0
		return fmt.Sprintf(" (%d such lines before this one were left out)", n), true
	}
	return "", true
}

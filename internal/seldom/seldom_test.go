// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package seldom_test

import (
	"testing"

	"github.com/belfry-go/belfry/internal/seldom"
)

func TestLog(t *testing.T) {
	var l seldom.Log
	at := func(now int64) (logged int, more string) {
		for range 3 * seldom.Burst {
			if m, ok := l.May(now); ok {
				logged, more = logged+1, more+m
			}
		}
		return logged, more
	}
	second := int64(seldom.Every)
	for _, step := range []struct {
		now    int64
		logged int
		more   string
	}{
		{100 * second, 10, ""},
		{100*second + 1, 0, ""},
		{102 * second, 2, " (50 such lines before this one were left out)"},
		{200 * second, 10, " (28 such lines before this one were left out)"},
	} {
		if logged, more := at(step.now); logged != step.logged || more != step.more {
			t.Errorf("at %v: %d lines, %q; want %d, %q", step.now, logged, more, step.logged, step.more)
		}
	}
}

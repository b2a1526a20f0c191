// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package attempt

import (
	"context"
	"testing"
)

type other struct{}

func TestInfo(t *testing.T) {
	base := context.WithValue(t.Context(), other{}, "value")
	var s Series
	first, second := s.Context(base, "/s/m", "target"), s.Context(base, "/s/m", "")
	t.Run("is_for_its_call_alone", func(t *testing.T) {
		for _, tc := range []struct {
			ctx            *Context
			method, target string
			found          bool
		}{
			{first, "/s/m", "target", true},
			{first, "/s/m", "another", false},
			{first, "/s/other", "target", false},
			{second, "/s/m", "any", true},
			{second, "/s/other", "any", false},
		} {
			info := FromContext(context.WithValue(tc.ctx, other{}, 1), tc.method, tc.target, 0)
			if tc.found && info != &tc.ctx.Info || !tc.found && info != nil {
				t.Errorf("a call of %s to %s found %+v of a call of %s to %q", tc.method, tc.target, info, tc.ctx.Info.Method, tc.ctx.Info.Target)
			}
		}
	})
	t.Run("belongs_to_the_policy_that_picked", func(t *testing.T) {
		c := s.Context(base, "/s/m", "target")
		c.Info.Own(7)
		c.Info.Own(8)
		if FromContext(c, "/s/m", "target", 7) == nil {
			t.Error("its policy does not find it")
		}
		for _, policy := range []uint64{0, 8} {
			if FromContext(c, "/s/m", "target", policy) != nil {
				t.Errorf("%d found the Info of 7", policy)
			}
		}
	})
	t.Run("shares_what_was_tried", func(t *testing.T) {
		if first == second || first.Info.Tried != second.Info.Tried {
			t.Error("two attempts have one context, or do not share what they tried")
		}
	})
	t.Run("hides", func(t *testing.T) {
		hidden := Hide(first)
		if FromContext(hidden, "/s/m", "target", 0) != nil || hidden.Value(other{}) != "value" {
			t.Error("the hidden Info is found, or another value is not")
		}
		if Hide(base) != base || Hide(hidden) != hidden {
			t.Error("a context without an Info is not returned as it is")
		}
	})
	t.Run("costs_one_allocation", func(t *testing.T) {
		if got := testing.AllocsPerRun(100, func() { new(Series).Context(base, "/s/m", "target") }); got > 1 {
			t.Errorf("the first attempt of a series allocates %v times, want once", got)
		}
	})
}

func TestSeriesCounts(t *testing.T) {
	var s Series
	for want := range 3 {
		if got := s.Begin(); got != want {
			t.Errorf("%d attempts before, want %d", got, want)
		}
	}
	s.NotSent()
	if got := s.Begin(); got != 2 {
		t.Errorf("%d attempts before, want 2, because one was not sent", got)
	}
}

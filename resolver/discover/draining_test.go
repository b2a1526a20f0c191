// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package discover

import "testing"

func TestDraining(t *testing.T) {
	stays := MustEndpoint("a:1", Zone("z"))
	leaves := MustEndpoint("a:1", Zone("z"), Draining())
	if IsDraining(stays) || !IsDraining(leaves) {
		t.Errorf("draining: %v and %v, want false and true", IsDraining(stays), IsDraining(leaves))
	}
	if equalEndpoints(stays, leaves) {
		t.Error("an endpoint that is draining is the same as one that is not")
	}
	back := SetDraining(leaves, false)
	if IsDraining(back) || ZoneOf(back) != "z" {
		t.Errorf("draining %v in zone %q, want false and z", IsDraining(back), ZoneOf(back))
	}
	if again := SetDraining(leaves, true); again.Attributes != leaves.Attributes {
		t.Error("setting what is set makes new attributes")
	}
}

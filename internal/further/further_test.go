// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package further

import (
	"testing"

	"github.com/belfry-go/belfry/internal/check"
)

func TestCheckMethods(t *testing.T) {
	for name, want := range map[string]bool{
		"/a.A/M": true, "/a.A/": true, "/A/M": true,
		"": false, "/": false, "//": false, "a.A/M": false, "/a.A": false, "/a.A/M/": false,
		"/a.A/*": false, "/a.*/": false, "*": false, "/*/*": false, "/a.A/ M": false,
	} {
		errs := check.Of("retry")
		CheckMethods(errs, false, []string{name})
		if err := errs.Err(); (err == nil) != want {
			t.Errorf("%q: %v, want that it is right: %v", name, err, want)
		}
	}
}

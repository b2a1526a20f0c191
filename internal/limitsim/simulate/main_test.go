// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"strings"
	"testing"
)

func TestRun(t *testing.T) {
	var out, errs strings.Builder
	if err := run([]string{"-rows", "^2 workers", "-seeds", "1"}, &out, &errs); err != nil {
		t.Fatal(err)
	}
	if got := out.String(); !strings.HasPrefix(got, "| goodput") || strings.Count(got, "\n") != 3 || !strings.Contains(got, "| 2 workers, 1.2 x | 9") {
		t.Errorf("got\n%s", got)
	}
	for _, tc := range []struct{ args, want string }{
		{"-seeds=0", "-seeds 0"},
		{"-parallel=0", "-parallel 0"},
		{"-rows=(", "-rows"},
		{"-algorithms=x", `-algorithms: "x", must be one of ideal, auto`},
	} {
		if err := run([]string{tc.args}, &out, &errs); err == nil || !strings.Contains(err.Error(), tc.want) {
			t.Errorf("%s: %v, want an error that says %q", tc.args, err, tc.want)
		}
	}
}

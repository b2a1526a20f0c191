// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"regexp"
	"testing"

	"github.com/belfry-go/belfry/internal/test/leaktest"
)

func TestMain(m *testing.M) { leaktest.Main(m) }

func TestRun(t *testing.T) {
	var out bytes.Buffer
	if err := run(t.Context(), &out); err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{
		`near and far, 3 to 1 +calls by region: map\[far:\d+ near:\d+\]`,
		`near is drained +calls by region: map\[far:400\]`,
		`far is drained too +calls by region: map\[spare:400\]`,
		`both are back +calls by region: map\[far:\d+ near:\d+\]`,
	} {
		if !regexp.MustCompile(want).Match(out.Bytes()) {
			t.Errorf("the output lacks %s:\n%s", want, &out)
		}
	}
}

// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package told_test

import (
	"fmt"
	"testing"

	"github.com/belfry-go/belfry/internal/told"
)

func TestErrors(t *testing.T) {
	var e told.Errors
	got := ""
	for _, text := range []string{"a", "a", "b", "a", "b", "", "a", "b"} {
		if text == "" {
			e.Forget()
		} else if e.First(text) {
			got += text
		}
	}
	if got != "abab" {
		t.Errorf("reported %q, want each once before and once after all was well", got)
	}
	for i := range 1000 {
		if !e.First(fmt.Sprint(i)) {
			t.Errorf("error %d was not reported", i)
		}
	}
}

// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"strings"
	"testing"
	"time"

	"github.com/belfry-go/belfry/internal/test/leaktest"
	"github.com/belfry-go/belfry/internal/test/signaltest"
)

func TestMain(m *testing.M) {
	signaltest.Main(main)
	leaktest.Main(m)
}

func TestSignals(t *testing.T) { signaltest.Run(t, "ten calls at a time", "-step", "1h") }

// Each config changes what happens to calls.
func TestEachConfigShows(t *testing.T) {
	// On a busy machine 400 ms may be too short for as many calls as a step needs.
	for step := 400 * time.Millisecond; ; step *= 2 {
		var out bytes.Buffer
		if err := run(t.Context(), &out, step); err != nil {
			t.Fatal(err)
		}
		var missing []string
		for _, want := range []string{
			"*: [limit]\n",
			"*: [timeout > limit]\n", "DEADLINE by timeout",
			"nothing has changed: stackconfig: methodConfig[0].layers[3].concurrency.limit: -20, must be",
			"*: [loadshed > timeout > buffer > limit]\n", "QUEUE_FULL by buffer",
		} {
			if !strings.Contains(out.String(), want) {
				missing = append(missing, want)
			}
		}
		if len(missing) == 0 {
			return
		}
		if step > 5*time.Second {
			t.Fatalf("the output lacks %q:\n%s", missing, &out)
		}
	}
}

// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"regexp"
	"testing"
	"time"

	"github.com/belfry-go/belfry/internal/test/leaktest"
	"github.com/belfry-go/belfry/internal/test/signaltest"
)

func TestMain(m *testing.M) {
	signaltest.Main(main)
	leaktest.Main(m)
}

func TestSignals(t *testing.T) { signaltest.Run(t, "servers, each stalls", "-for", "1h") }

func TestBothClientsAreInTheTable(t *testing.T) {
	// On a busy machine a second may be too short for latencies to take a percentile of.
	for d := time.Second; ; d *= 2 {
		var out bytes.Buffer
		if err := run(t.Context(), &out, d, 0.05); err != nil {
			t.Fatal(err)
		}
		if want := `(?m)^without a hedge +\d+ +0 .* 0\.0%$`; !regexp.MustCompile(want).MatchString(out.String()) {
			t.Fatalf("the output does not match %s:\n%s", want, &out)
		}
		want := `(?m)^with a hedge +\d+ +0 .* (\d*[1-9]\d*\.\d|0\.[1-9])%$`
		if regexp.MustCompile(want).MatchString(out.String()) {
			return
		}
		if d > 10*time.Second {
			t.Fatalf("the output does not match %s:\n%s", want, &out)
		}
	}
}

func TestABadShareIsAnError(t *testing.T) {
	if err := run(t.Context(), &bytes.Buffer{}, time.Second, 2); err == nil {
		t.Errorf("run returned no error")
	}
}

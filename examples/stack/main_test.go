// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"context"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func TestEveryLayerDoesSomething(t *testing.T) {
	var out bytes.Buffer
	if err := run(t.Context(), &out, 600*time.Millisecond); err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{
		"[observe > loadshed > timeout > hedge > retry > breaker > buffer > concurrency]\n",
		"all servers are well\n", "ten times as many calls\n",
		" OK\n", "Unavailable", "further attempts sent", "hedge       extra attempts", "breaker     refused, BREAKER_OPEN",
	} {
		if !strings.Contains(out.String(), want) {
			t.Errorf("the output lacks %q:\n%s", want, &out)
		}
	}
}

func TestAnInterruptEndsTheRun(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	var out bytes.Buffer
	if err := run(ctx, &out, time.Hour); err != nil {
		t.Errorf("run: %v, want no error", err)
	}
}

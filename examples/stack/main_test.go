// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"context"
	"errors"
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

func TestSignals(t *testing.T) { signaltest.Run(t, "[observe", "-phase", "1h") }

func TestRun(t *testing.T) {
	// On a busy machine as many calls take longer.
	for phase, usual := 600*time.Millisecond, 300; ; phase, usual = 2*phase, usual/2 {
		var out bytes.Buffer
		if err := run(t.Context(), &out, phase, usual); err != nil {
			t.Fatal(err)
		}
		var missing []string
		for _, want := range []string{
			"[observe > loadshed > timeout > hedge > retry > buffer > concurrency > breaker]\n",
			"all servers are well\n", "ten times as many calls\n",
			" OK\n", "Unavailable", "further attempts sent", "hedge       extra attempts", "breaker     refused, BREAKER_OPEN",
		} {
			if !strings.Contains(out.String(), want) {
				missing = append(missing, want)
			}
		}
		if len(missing) == 0 {
			return
		}
		if phase > 5*time.Second {
			t.Fatalf("the output lacks %q:\n%s", missing, &out)
		}
	}
}

func TestInterrupt(t *testing.T) {
	// As signal.NotifyContext does it.
	interrupted := errors.New("interrupt signal received")
	ctx, cancel := context.WithCancelCause(t.Context())
	var out bytes.Buffer
	time.AfterFunc(100*time.Millisecond, func() { cancel(interrupted) })
	if err := run(ctx, &out, time.Hour, 300); !errors.Is(err, interrupted) {
		t.Errorf("run: %v, want the cause of the interrupt", err)
	}
	if strings.Contains(out.String(), "server-0 stalls") {
		t.Errorf("the run went on after the interrupt:\n%s", &out)
	}
}

// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"strings"
	"sync"
	"testing"

	"github.com/belfry-go/belfry/internal/test/leaktest"
)

func TestMain(m *testing.M) { leaktest.Main(m) }

// buffer may be written concurrently.
type buffer struct {
	mu sync.Mutex // guards bytes.Buffer
	bytes.Buffer
}

func (b *buffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.Buffer.Write(p)
}

func TestLocal(t *testing.T) {
	var out buffer
	if err := runLocal(t.Context(), &out); err != nil {
		t.Fatalf("%v\n%s", err, &out)
	}
	for _, want := range []string{
		"ready, with the stack *: [loadshed > timeout > retry > buffer > backends]\n",
		"server-3 was added, and answers\n", "the config has changed\n", "leaving\n", "none failed\n",
		// Metrics of the stack, of gRPC and of the policy.
		`"belfry.call.duration"`, `"grpc.client.call.duration"`, `"belfry.lb.p2c.picks"`,
	} {
		if !strings.Contains(out.String(), want) {
			t.Errorf("the output lacks %q:\n%s", want, &out)
		}
	}
}

// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package sim

import (
	"testing"

	"github.com/belfry-go/belfry/internal/test/leaktest"
)

func TestMain(m *testing.M) { leaktest.Main(m) }

// policy returns the policy of the name.
func policy(t *testing.T, name string) Policy {
	t.Helper()
	for _, p := range Policies() {
		if p.Name == name {
			return p
		}
	}
	t.Fatalf("no policy %q", name)
	panic("unreachable")
}

// scenario returns the scenario of the name.
func scenario(t *testing.T, name string) Scenario {
	t.Helper()
	for _, s := range Scenarios() {
		if s.Name == name {
			return s
		}
	}
	t.Fatalf("no scenario %q", name)
	panic("unreachable")
}

func mustRun(t *testing.T, s Scenario, p Policy, o Options) *Result {
	t.Helper()
	r, err := Run(s, p, o)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

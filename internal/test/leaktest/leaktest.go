// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

// Package leaktest fails the tests of a package that leave goroutines behind:
//
//	func TestMain(m *testing.M) { leaktest.Main(m) }
package leaktest

import (
	"fmt"
	"os"
	"testing"
	"time"

	"go.uber.org/goleak"
)

// patience is how long goroutines may take to end after the tests. It is long because
// gRPC's end some time after Close has returned, which takes a while on a busy machine;
// goleak alone waits less than half a second.
const patience = 30 * time.Second

// Main runs the tests and exits: with code 1 if they pass and goroutines are left, but for
// those that options ignore.
func Main(m *testing.M, options ...goleak.Option) {
	code := m.Run()
	if code == 0 {
		if err := find(patience, options...); err != nil {
			fmt.Fprintf(os.Stderr, "leaktest: %v\n", err)
			code = 1
		}
	}
	os.Exit(code)
}

// find returns an error if goroutines are left after d.
func find(d time.Duration, options ...goleak.Option) error {
	for end := time.Now().Add(d); ; {
		if err := goleak.Find(options...); err == nil || time.Now().After(end) {
			return err
		}
	}
}

// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

// Package acceptance holds the tests and benchmarks of layers, policy and discovery
// together: what a user of the whole sees, where the tests of a package see that
// package. It has no code of its own.
//
//	go test ./internal/acceptance
//	go test -run='^$' -bench=. -benchmem ./internal/acceptance
package acceptance

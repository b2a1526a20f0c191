// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

//go:build race

// Package race tells tests whether the race detector is on, which allocates, makes
// pools forget and takes its time.
package race

// Enabled reports whether the race detector is on.
const Enabled = true

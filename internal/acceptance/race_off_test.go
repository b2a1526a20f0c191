// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

//go:build !race

package acceptance

// raceEnabled reports whether the race detector is on.
const raceEnabled = false

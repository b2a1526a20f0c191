// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

//go:build !unix

package main

import "math"

// cpu says that nothing is known.
func cpu() cpuTimes { return cpuTimes{own: math.NaN(), used: math.NaN(), had: math.NaN()} }

// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

//go:build unix

package main

import (
	"math"
	"syscall"
	"time"
)

// cpu reads how much of the processors was used so far.
func cpu() cpuTimes {
	c := cpuTimes{own: math.NaN(), used: math.NaN(), had: math.NaN()}
	var u syscall.Rusage
	if syscall.Getrusage(syscall.RUSAGE_SELF, &u) == nil {
		c.own = time.Duration(u.Utime.Nano() + u.Stime.Nano()).Seconds()
	}
	if used, had, err := machineTimes(); err == nil {
		c.used, c.had = used, had
	}
	return c
}

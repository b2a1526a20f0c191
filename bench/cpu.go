// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package main

import "fmt"

// A cpuTimes is how much of the processors was used at a moment.
type cpuTimes struct {
	own       float64 // seconds of this program's, NaN if not known
	used, had float64 // by all programs of the machine, and in all; in any unit; NaN if not known
}

// busy returns the share of the machine's processors that was used between before and c.
func (c cpuTimes) busy(before cpuTimes) float64 { return (c.used - before.used) / (c.had - before.had) }

// machineTimes reads what all programs have used since the machine started.
func machineTimes() (used, had float64, err error) {
	var name string
	var t [8]float64 // user nice system idle iowait irq softirq steal
	_, err = fmt.Sscan(firstLine("/proc/stat"), &name, &t[0], &t[1], &t[2], &t[3], &t[4], &t[5], &t[6], &t[7])
	for _, v := range t {
		had += v
	}
	return had - t[3] - t[4], had, err
}

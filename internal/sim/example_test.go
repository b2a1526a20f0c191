// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package sim_test

import (
	"fmt"
	"time"

	"github.com/belfry-go/belfry/internal/sim"
)

func Example() {
	s, p := sim.Scenarios()[1], sim.Policies()[1]
	s.WarmUp = 2 * time.Second
	r, err := sim.Run(s, p, sim.Options{Calls: 10_000, Seed: 1})
	if err != nil {
		fmt.Println(err)
		return
	}
	fmt.Printf("%s, %s: p99 below 50 ms: %t\n", s.Name, p.Name, r.Percentile(0.99) < 50*time.Millisecond)
	// Output: homogeneous 90 %, default: p99 below 50 ms: true
}

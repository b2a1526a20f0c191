// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package limit_test

import (
	"fmt"
	"log"
	"time"

	"github.com/belfry-go/belfry/limit"
)

// learn tells an algorithm of calls that take so long with as many in flight as its limit
// allows, and returns the limit after them.
func learn(a limit.Algorithm, calls int, took time.Duration, result limit.Result) int64 {
	now := limit.Instant(1)
	for range calls {
		now += limit.Instant(took)
		a.OnSample(limit.Sample{Start: now - limit.Instant(took), RTT: took, InFlight: a.Limit(), Limited: true, Result: result})
	}
	return a.Limit()
}

// AIMD raises its limit by one when as many calls as it allows have succeeded, and lowers
// it by a tenth on a drop.
func ExampleNewAIMD() {
	a, err := limit.NewAIMD(limit.AIMDConfig{Initial: 10})
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println(learn(a, 11, 5*time.Millisecond, limit.Succeeded))
	fmt.Println(learn(a, 1, 5*time.Millisecond, limit.Dropped))
	// Output:
	// 11
	// 9
}

// Vegas compares latencies with the lowest it has seen, and grows while they are alike.
func ExampleNewVegas() {
	v, err := limit.NewVegas(limit.VegasConfig{})
	if err != nil {
		log.Fatal(err)
	}
	before := v.Limit()
	fmt.Println("grows:", learn(v, 1000, 5*time.Millisecond, limit.Succeeded) > before)
	// Output: grows: true
}

// Gradient2 compares short and long means of the latency, and grows while they are alike.
func ExampleNewGradient2() {
	g, err := limit.NewGradient2(limit.Gradient2Config{})
	if err != nil {
		log.Fatal(err)
	}
	before := g.Limit()
	fmt.Println("grows:", learn(g, 1000, 5*time.Millisecond, limit.Succeeded) > before)
	// Output: grows: true
}

// Auto, the default of package concurrency, needs no setting.
func ExampleNewAuto() {
	a, err := limit.NewAuto(limit.AutoConfig{})
	if err != nil {
		log.Fatal(err)
	}
	before := a.Limit()
	learn(a, 1000, 5*time.Millisecond, limit.Succeeded)
	fmt.Println("lower after a drop:", learn(a, 1, 5*time.Millisecond, limit.Dropped) < before)
	// Output: lower after a drop: true
}

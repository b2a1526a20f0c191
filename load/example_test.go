// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package load_test

import (
	"fmt"
	"time"

	"github.com/belfry-go/belfry/load"
)

// A Meter is told when attempts start and end, and says how busy its endpoint is.
func Example() {
	metric := load.NewPendingRequests()
	meter := metric.NewMeter()

	start := time.Now()
	now := func() load.Instant { return load.Instant(time.Since(start)) }

	ticket := meter.Start(now())
	fmt.Println("in flight:", meter.Load(now()))
	meter.Finish(now(), load.Sample{Ticket: ticket, Outcome: load.Completed})
	fmt.Println("at rest:", meter.Load(now()))
	// Output:
	// in flight: 1
	// at rest: 0
}

// A latency above the estimate replaces it at once; a lower one does so over the
// decay time.
func ExamplePeakEWMA() {
	metric, err := load.NewPeakEWMA(load.DefaultPeakEWMAConfig())
	if err != nil {
		fmt.Println(err)
		return
	}
	meter := metric.NewMeter()
	at := func(d time.Duration) load.Instant { return load.Instant(d) }

	fmt.Println("before the first sample:", time.Duration(meter.Load(at(0))))
	ticket := meter.Start(at(0))
	meter.Finish(at(3*time.Second), load.Sample{Ticket: ticket})
	fmt.Println("after a peak of 3s:", time.Duration(meter.Load(at(3*time.Second))))
	meter.Start(at(3 * time.Second))
	fmt.Println("with an attempt in flight:", time.Duration(meter.Load(at(3*time.Second))))
	fmt.Println("10s later:", time.Duration(meter.Load(at(13*time.Second))).Round(time.Millisecond))
	// Output:
	// before the first sample: 1s
	// after a peak of 3s: 3s
	// with an attempt in flight: 6s
	// 10s later: 2.207s
}

// An endpoint that does not answer costs more by the moment, and a newcomer costs
// what the average endpoint does.
func ExampleExpectedLatency() {
	metric, err := load.NewExpectedLatency(load.DefaultExpectedLatencyConfig())
	if err != nil {
		fmt.Println(err)
		return
	}
	a, b := metric.NewMeter(), metric.NewMeter()
	at := func(d time.Duration) load.Instant { return load.Instant(d) }
	print := func(what string, l float64) { fmt.Println(what, time.Duration(l).Round(time.Millisecond)) }

	ticket := a.Start(at(0))
	a.Finish(at(10*time.Millisecond), load.Sample{Ticket: ticket})
	print("a, which took 10ms:", a.Load(at(10*time.Millisecond)))
	print("b, of which nothing is known:", b.Load(at(10*time.Millisecond)))
	b.Start(at(10 * time.Millisecond))
	print("b, with an attempt in flight:", b.Load(at(10*time.Millisecond)))
	print("b, silent for 90ms:", b.Load(at(100*time.Millisecond)))
	// Output:
	// a, which took 10ms: 10ms
	// b, of which nothing is known: 10ms
	// b, with an attempt in flight: 20ms
	// b, silent for 90ms: 200ms
}

func ExampleNewPeakEWMA_badConfig() {
	config := load.DefaultPeakEWMAConfig()
	config.Decay = -time.Second
	_, err := load.NewPeakEWMA(config)
	fmt.Println(err)
	// Output: load: decay: -1s, must be above 0s
}

// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package load_test

import (
	"fmt"
	"time"

	"github.com/belfry-go/belfry/load"
)

// A Meter is told when attempts start and end, and says what one more would cost. The
// policy counts the attempts in flight.
func Example() {
	metric := load.NewPendingRequests()
	meter := metric.NewMeter(load.Endpoint{Address: "10.0.0.1:443"})

	query := load.Query{InFlight: 0, Weight: 1}
	ticket := meter.Start(&load.Attempt{Query: query, Method: "/shop.Orders/Get"})
	query.InFlight++
	fmt.Println("in flight:", meter.Load(query).Cost)
	query.InFlight--
	meter.Finish(&load.Sample{Ticket: ticket, Outcome: load.Completed})
	fmt.Println("at rest:", meter.Load(query).Cost)
	// Output:
	// in flight: 1
	// at rest: 0
}

// at returns the Query of an endpoint of average weight.
func at(d time.Duration, inFlight int) load.Query {
	return load.Query{Now: load.Instant(d), InFlight: inFlight, Weight: 1}
}

// A latency above the estimate replaces it at once; a lower one does so over the
// decay time.
func ExamplePeakEWMA() {
	metric, err := load.NewPeakEWMA(load.DefaultPeakEWMAConfig())
	if err != nil {
		fmt.Println(err)
		return
	}
	meter := metric.NewMeter(load.Endpoint{})
	cost := func(q load.Query) time.Duration { return time.Duration(meter.Load(q).Cost) }

	fmt.Println("before the first sample:", cost(at(0, 0)))
	ticket := meter.Start(&load.Attempt{Query: at(0, 0)})
	meter.Finish(&load.Sample{Now: load.Instant(3 * time.Second), Ticket: ticket})
	fmt.Println("after a peak of 3s:", cost(at(3*time.Second, 0)))
	meter.Start(&load.Attempt{Query: at(3*time.Second, 0)})
	fmt.Println("with an attempt in flight:", cost(at(3*time.Second, 1)))
	fmt.Println("10s later:", cost(at(13*time.Second, 1)).Round(time.Millisecond))
	// Output:
	// before the first sample: 1s
	// after a peak of 3s: 3s
	// with an attempt in flight: 6s
	// 10s later: 2.207s
}

// An endpoint that does not answer costs more and more, and a new endpoint costs what the
// average endpoint costs.
func ExampleExpectedLatency() {
	metric, err := load.NewExpectedLatency(load.DefaultExpectedLatencyConfig())
	if err != nil {
		fmt.Println(err)
		return
	}
	a, b := metric.NewMeter(load.Endpoint{}), metric.NewMeter(load.Endpoint{})
	const ms = time.Millisecond
	print := func(what string, e load.Estimate) { fmt.Println(what, time.Duration(e.Cost).Round(ms)) }

	ticket := a.Start(&load.Attempt{Query: at(0, 0)})
	a.Finish(&load.Sample{Now: load.Instant(10 * ms), Ticket: ticket})
	print("a, which took 10ms:", a.Load(at(10*ms, 0)))
	print("b, of which nothing is known:", b.Load(at(10*ms, 0)))
	b.Start(&load.Attempt{Query: at(10*ms, 0)})
	print("b, with an attempt in flight:", b.Load(at(10*ms, 1)))
	print("b, silent for 90ms:", b.Load(at(100*ms, 1)))
	// Output:
	// a, which took 10ms: 10ms
	// b, of which nothing is known: 10ms
	// b, with an attempt in flight: 20ms
	// b, silent for 90ms: 180ms
}

func ExampleNewPeakEWMA_badConfig() {
	config := load.DefaultPeakEWMAConfig()
	config.Decay = -time.Second
	_, err := load.NewPeakEWMA(config)
	fmt.Println(err)
	// Output: load: decay: -1s, must be above 0s
}

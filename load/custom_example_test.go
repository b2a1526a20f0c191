// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package load_test

import (
	"encoding/json"
	"fmt"
	"math"
	"strings"
	"sync/atomic"

	"github.com/belfry-go/belfry/load"
)

// lastLatency is a custom metric: an endpoint costs the latency of its last answer,
// times the attempts in flight plus one. Calls of some methods do not count.
type lastLatency struct {
	load.MetricBase
	ignored string // prefix of their names
}

func init() {
	load.Register("lastLatency", func(config json.RawMessage) (load.Metric, error) {
		var c struct{ Ignore string }
		if err := json.Unmarshal(config, &c); err != nil {
			return nil, fmt.Errorf("lastLatency: %w", err)
		}
		return &lastLatency{ignored: c.Ignore}, nil
	})
}

func (m *lastLatency) NewMeter(load.Endpoint) load.Meter { return &lastMeter{metric: m} }

type lastMeter struct {
	load.MeterBase
	metric *lastLatency
	last   atomic.Uint64 // nanoseconds
}

func (m *lastMeter) Load(q load.Query) load.Estimate {
	return load.Estimate{
		Cost: float64(m.last.Load()) * (float64(q.InFlight)/q.Weight + 1),
		Good: math.MaxInt64, // only answers change it
	}
}

func (m *lastMeter) Start(a *load.Attempt) load.Ticket {
	t := load.Ticket{Started: a.Now}
	if m.metric.ignored != "" && strings.HasPrefix(a.Method, m.metric.ignored) {
		t.A = 1
	}
	return t
}

func (m *lastMeter) Finish(s *load.Sample) bool {
	if s.Outcome == load.Completed && !s.Responded && s.Ticket.A == 0 {
		m.last.Store(uint64(s.Now - s.Ticket.Started))
		return true
	}
	return false
}

// A program that imports the package of this metric can name it in its service
// config:
//
//	{"loadBalancingConfig":[{"belfry.p2c":{
//	  "load":{"custom":{"name":"lastLatency","config":{"ignore":"/grpc.health."}}}
//	}}]}
func ExampleRegister() {
	metric, err := load.New("lastLatency", json.RawMessage(`{"ignore":"/grpc.health."}`))
	if err != nil {
		fmt.Println(err)
		return
	}
	meter := metric.NewMeter(load.Endpoint{Address: "10.0.0.1:443"})
	for _, call := range []struct {
		method string
		took   load.Instant
	}{{"/shop.Orders/Get", 30}, {"/grpc.health.v1.Health/Check", 1}} {
		ticket := meter.Start(&load.Attempt{Query: load.Query{Weight: 1}, Method: call.method})
		meter.Finish(&load.Sample{Now: call.took, Ticket: ticket, Outcome: load.Completed})
	}
	fmt.Println("cost at rest:", meter.Load(load.Query{Weight: 1}).Cost)
	fmt.Println("with one in flight:", meter.Load(load.Query{InFlight: 1, Weight: 1}).Cost)

	_, err = load.New("lastLatencie", nil)
	fmt.Println(err)
	// Output:
	// cost at rest: 30
	// with one in flight: 60
	// load: name: lastLatencie, must be one of the registered metrics ["lastLatency"]
}

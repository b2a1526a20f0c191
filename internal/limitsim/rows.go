// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package limitsim

import (
	"fmt"
	"strings"
	"time"

	"github.com/belfry-go/belfry/limit"
)

// A Row is a scenario and what an algorithm must make of it. What is zero of the demands
// is not demanded.
type Row struct {
	Name string
	Scenario
	Ideal    int64   // the static limit of each client that knows the server
	Capacity float64 // of the server while it is measured, in parts of that of Workers; 1 if 0
	Slower   float64 // by how much the work is slower while it is measured; 1 if 0
	Other    string  // the algorithm of every other client
	Long     bool    // it takes much time

	MinGoodput, MaxLatency, MaxRefused, MaxRejected, MinServed, MinJain float64
}

// Run runs the row under an algorithm.
func (row Row) Run(algorithm string, seed uint64) (Result, error) {
	makers := [2]Maker{}
	for i, name := range []string{algorithm, row.Other} {
		if name == "" {
			name = algorithm
		}
		m, err := row.maker(name)
		if err != nil {
			return Result{}, err
		}
		makers[i] = m
	}
	r := Run(row.Scenario, func(i int, wall func(limit.Instant) time.Time) limit.Algorithm {
		return makers[i%2](i, wall)
	}, seed)
	if row.Capacity > 0 {
		r.Goodput /= row.Capacity
	}
	if row.Slower > 0 {
		r.Latency /= row.Slower
	}
	return r, nil
}

// Static is a limit that does not change.
type Static int64

// Limit returns the limit.
func (s Static) Limit() int64 { return int64(s) }

// OnSample learns nothing.
func (Static) OnSample(limit.Sample) {}

// Algorithms are the names of the algorithms.
func Algorithms() []string {
	return []string{"ideal", "auto", "auto-no-drains", "aimd", "aimd-50ms", "gradient2", "vegas"}
}

func (row Row) maker(name string) (Maker, error) {
	plain := func(l limit.Algorithm, err error) limit.Algorithm {
		if err != nil {
			panic(err) // The configurations below are right.
		}
		return l
	}
	auto := func(cfg limit.AutoConfig) Maker {
		return func(_ int, wall func(limit.Instant) time.Time) limit.Algorithm {
			a, err := limit.NewAuto(cfg)
			if err == nil {
				a.SetWallClock(wall)
			}
			return plain(a, err)
		}
	}
	var make func() limit.Algorithm
	switch name {
	case "ideal":
		make = func() limit.Algorithm { return Static(row.Ideal) }
	case "auto":
		return auto(limit.AutoConfig{}), nil
	case "auto-no-drains":
		return auto(limit.AutoConfig{NoDrains: true}), nil
	case "aimd":
		make = func() limit.Algorithm { return plain(limit.NewAIMD(limit.AIMDConfig{})) }
	case "aimd-50ms":
		make = func() limit.Algorithm {
			return plain(limit.NewAIMD(limit.AIMDConfig{Timeout: 50 * time.Millisecond}))
		}
	case "gradient2":
		make = func() limit.Algorithm { return plain(limit.NewGradient2(limit.Gradient2Config{})) }
	case "vegas":
		make = func() limit.Algorithm { return plain(limit.NewVegas(limit.VegasConfig{})) }
	default:
		return nil, fmt.Errorf("%q, must be one of %s", name, strings.Join(Algorithms(), ", "))
	}
	return func(int, func(limit.Instant) time.Time) limit.Algorithm { return make() }, nil
}

// Broken returns which demands a result does not meet, empty if it meets all.
func (row Row) Broken(r Result) (broken []string) {
	demand := func(ok bool, format string, bound float64) {
		if !ok {
			broken = append(broken, fmt.Sprintf(format, bound))
		}
	}
	demand(r.Goodput >= row.MinGoodput, "goodput < %.3g", row.MinGoodput)
	demand(row.MaxLatency == 0 || r.Latency <= row.MaxLatency, "latency > %.3g", row.MaxLatency)
	demand(row.MaxRefused == 0 || r.Refused <= row.MaxRefused, "refused > %.3g", row.MaxRefused)
	demand(row.MaxRejected == 0 || r.Rejected <= row.MaxRejected, "rejected > %.3g", row.MaxRejected)
	demand(r.Served >= row.MinServed, "served < %.3g", row.MinServed)
	demand(r.Jain >= row.MinJain, "Jain < %.3g", row.MinJain)
	return broken
}

// Rows are the rows of the table.
func Rows() []Row {
	const (
		s = time.Second
		m = time.Minute
	)
	var rows []Row
	add := func(row Row) {
		if row.WarmUp == 0 {
			row.WarmUp = m
		}
		if row.Length == 0 {
			row.Length = 5 * m
		}
		rows = append(rows, row)
	}
	for _, w := range []struct {
		workers int
		ideal   [4]int64
	}{{20, [4]int64{30, 40, 32, 28}}, {200, [4]int64{260, 260, 260, 250}}} {
		sc := func(load float64) Scenario {
			// As many calls are enough of either.
			return Scenario{Workers: w.workers, Load: load, Length: max(m, 5*m*20/time.Duration(w.workers))}
		}
		name := fmt.Sprintf("%d workers, ", w.workers)
		add(Row{Name: name + "0.5 x", Scenario: sc(0.5), Ideal: w.ideal[0], MaxRefused: 0.001, MaxLatency: 1.02})
		add(Row{Name: name + "0.9 x", Scenario: sc(0.9), Ideal: w.ideal[1], MinGoodput: 0.89, MaxLatency: 1.5})
		for i, load := range []float64{1.2, 3} {
			row := Row{Name: fmt.Sprintf("%s%v x", name, load), Scenario: sc(load), Ideal: w.ideal[2+i], MinGoodput: 0.99, MaxLatency: 1.8}
			add(row)
			row.Name += ", after 30 minutes"
			row.WarmUp = 30 * m
			row.Long = w.workers > 20
			add(row)
		}
	}
	add(Row{Name: "2 workers, 1.2 x", Scenario: Scenario{Workers: 2, Load: 1.2}, Ideal: 6, MinGoodput: 0.91, MaxLatency: 2.6})
	add(Row{Name: "4 workers, 4 clients, 100 ms, 1.2 x", Scenario: Scenario{Workers: 4, Clients: 4, Mean: 100 * time.Millisecond, Load: 1.2}, Ideal: 4, MinGoodput: 0.95, MaxLatency: 2.6})
	for _, shared := range []bool{false, true} {
		row := Row{Name: "20 clients, 20 workers, 1.2 x", Scenario: Scenario{Workers: 20, Clients: 20, Shared: shared, Load: 1.2}, Ideal: 4, MinGoodput: 0.985, MaxLatency: 2.6, MinJain: 0.98}
		if shared {
			row.Name = "20 clients, 20 shared cores, 1.2 x"
		}
		add(row)
		row.Name += ", after 30 minutes"
		row.WarmUp, row.MaxLatency = 30*m, 2.3
		add(row)
	}
	many := Scenario{Workers: 20, Clients: 20, Load: 1.2}
	clocks := many
	clocks.ClockError = s / 2
	add(Row{Name: "the same, clocks off by up to 500 ms", Scenario: clocks, Ideal: 4, MinGoodput: 0.97, MaxLatency: 2.7})
	many.WarmUp = 30 * m
	for _, other := range []string{"ideal", "aimd-50ms", "gradient2"} {
		add(Row{Name: "the same, half with " + other + ", after 30 minutes", Scenario: many, Ideal: 4, Other: other, MinGoodput: 0.97, MaxLatency: 2.7})
	}
	add(Row{Name: "100 clients, 200 workers, 1.2 x", Scenario: Scenario{Workers: 200, Clients: 100, Load: 1.2, Length: m}, Ideal: 5, MinGoodput: 0.985, MaxLatency: 2.6})
	add(Row{Name: "20 clients with 50 callers each, a closed loop", Scenario: Scenario{Workers: 20, Clients: 20, Callers: 50}, Ideal: 2, MinGoodput: 0.985})
	add(Row{Name: "one client with 1,000 callers, a closed loop, constant work", Scenario: Scenario{Workers: 10, Callers: 1000, Law: Constant, WarmUp: 30 * m, Length: m}, Ideal: 12, MinGoodput: 0.985, MaxLatency: 2})
	for _, l := range []struct {
		name string
		law  Law
	}{{"constant", Constant}, {"lognormal (cv 2)", Lognormal}, {"5 % cost 20 times", Bimodal}} {
		add(Row{Name: l.name + ", 20 workers, 0.9 x", Scenario: Scenario{Workers: 20, Load: 0.9, Law: l.law}, Ideal: 40, MinGoodput: 0.884, MaxLatency: 1.5})
		add(Row{Name: l.name + ", 20 workers, 1.2 x", Scenario: Scenario{Workers: 20, Load: 1.2, Law: l.law}, Ideal: 32, MinGoodput: 0.985, MaxLatency: 1.8})
	}
	ago := -10 * s
	change := func(load float64, c Change) Scenario {
		c.At = ago
		return Scenario{Workers: 20, Load: load, Length: m, Changes: []Change{c}}
	}
	add(Row{Name: "workers halve at 1.2 x, 10 s later", Scenario: change(1.2, Change{Workers: 10}), Ideal: 18, Capacity: 0.5, MinGoodput: 0.985, MaxLatency: 2.1})
	add(Row{Name: "workers double at 2.4 x, 10 s later", Scenario: change(2.4, Change{Workers: 40}), Ideal: 60, Capacity: 2, MinGoodput: 0.99, MaxLatency: 1.8})
	add(Row{Name: "workers x 4 at 3 x, 10 s later", Scenario: change(3, Change{Workers: 80}), Ideal: 110, MinGoodput: 2.97, MaxLatency: 1.5})
	add(Row{Name: "the work is twice as slow at 1.2 x, 10 s later", Scenario: change(1.2, Change{Speed: 0.5}), Ideal: 32, Capacity: 0.5, Slower: 2, MinGoodput: 0.985, MaxLatency: 1.8})
	slow := change(1.2, Change{Speed: 0.5})
	slow.Clients = 20
	add(Row{Name: "the same, 20 clients", Scenario: slow, Ideal: 4, Capacity: 0.5, Slower: 2, MinGoodput: 0.98, MaxLatency: 2.6})
	stall := Scenario{Workers: 20, Load: 0.9, Length: 10 * s, Changes: []Change{{At: -7 * s, Stalled: true}, {At: -2 * s}}}
	add(Row{Name: "stalled for 5 s at 0.9 x, 2 s later", Scenario: stall, Ideal: 40, MinServed: 0.99})
	across := Scenario{Workers: 20, Load: 0.9, Length: 20 * s, Changes: []Change{{At: -5 * s, Stalled: true}, {At: 0}}}
	add(Row{Name: "stalled for 5 s, until a drain, 20 s from its end", Scenario: across, Ideal: 40, MinServed: 0.96})
	for _, load := range []float64{1.2, 3} {
		add(Row{Name: fmt.Sprintf("refuses at a queue of 20, %v x", load), Scenario: Scenario{Workers: 20, Queue: 20, Load: load}, Ideal: 32, MinGoodput: 0.99, MaxRejected: 0.005})
	}
	return rows
}

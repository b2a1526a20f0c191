// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package limitsim

import (
	"fmt"
	"strings"
	"time"

	"github.com/belfry-go/belfry/limit"
)

// A Row is a scenario and what an algorithm must make of it.
type Row struct {
	Name string
	Scenario
	Phases   int     // how many phases of the wall clock it is the mean of, over 30 s; 1 if 0
	Ideal    int64   // the static limit of each client that knows the server
	Capacity float64 // of the server while it is measured, in parts of that of Workers; 1 if 0
	Slower   float64 // by how much the work is slower while it is measured; 1 if 0
	Other    string  // the algorithm of every other client
	Long     bool    // it takes much time

	Demands         // of the first measurement
	Later   Demands // of the second
}

// Demands are what an algorithm must do. What is zero is not demanded.
type Demands struct {
	MinGoodput, MaxLatency, MaxRefused, MaxRejected, MinServed, MinJain float64
}

// Run runs the row under an algorithm, and returns one or two measurements.
func (row Row) Run(algorithm string, seed uint64) ([]Result, error) {
	makers := [2]Maker{}
	for i, name := range []string{algorithm, row.Other} {
		if name == "" {
			name = algorithm
		}
		m, err := row.maker(name)
		if err != nil {
			return nil, err
		}
		makers[i] = m
	}
	maker := func(i int, wall func(limit.Instant) time.Time) limit.Algorithm { return makers[i%2](i, wall) }
	var phases [2][]Result
	n := max(row.Phases, 1)
	for i := range n {
		sc := row.Scenario
		sc.Phase += time.Duration(i) * 30 * time.Second / time.Duration(n)
		for j, r := range Run(sc, maker, seed*100+uint64(i)) {
			if row.Capacity > 0 {
				r.Goodput /= row.Capacity
			}
			if row.Slower > 0 {
				r.Latency /= row.Slower
			}
			phases[j] = append(phases[j], r)
		}
	}
	results := []Result{Mean(phases[0])}
	if len(phases[1]) > 0 {
		results = append(results, Mean(phases[1]))
	}
	return results, nil
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
func (d Demands) Broken(r Result) (broken []string) {
	demand := func(ok bool, format string, bound float64) {
		if !ok {
			broken = append(broken, fmt.Sprintf(format, bound))
		}
	}
	demand(r.Goodput >= d.MinGoodput, "goodput < %.3g", d.MinGoodput)
	demand(d.MaxLatency == 0 || r.Latency <= d.MaxLatency, "latency > %.3g", d.MaxLatency)
	demand(d.MaxRefused == 0 || r.Refused <= d.MaxRefused, "refused > %.3g", d.MaxRefused)
	demand(d.MaxRejected == 0 || r.Rejected <= d.MaxRejected, "rejected > %.3g", d.MaxRejected)
	demand(r.Served >= d.MinServed, "served < %.3g", d.MinServed)
	demand(r.Jain >= d.MinJain, "Jain < %.3g", d.MinJain)
	return broken
}

// Rows are the rows of the table.
func Rows() []Row {
	const (
		s = time.Second
		m = time.Minute
	)
	var rows []Row
	add := func(name string, sc Scenario, ideal int64, d Demands) *Row {
		row := Row{Name: name, Scenario: sc, Ideal: ideal, Demands: d}
		if row.WarmUp == 0 {
			row.WarmUp = m
		}
		if row.Length == 0 {
			row.Length = 5 * m
		}
		rows = append(rows, row)
		return &rows[len(rows)-1]
	}
	again := func(row *Row, d Demands) { row.Again, row.Later = 30*m, d }
	overload := Demands{MinGoodput: 0.99, MaxLatency: 1.8}
	for _, w := range []struct {
		workers int
		ideal   [4]int64
	}{{20, [4]int64{30, 40, 32, 28}}, {200, [4]int64{260, 260, 260, 250}}} {
		sc := func(load float64) Scenario {
			// As many calls are enough of either.
			return Scenario{Workers: w.workers, Load: load, Length: max(m, 5*m*20/time.Duration(w.workers))}
		}
		name := fmt.Sprintf("%d workers, ", w.workers)
		add(name+"0.5 x", sc(0.5), w.ideal[0], Demands{MaxRefused: 0.001, MaxLatency: 1.02})
		add(name+"0.9 x", sc(0.9), w.ideal[1], Demands{MinGoodput: 0.89, MaxLatency: 1.5})
		for i, load := range []float64{1.2, 3} {
			row := add(fmt.Sprintf("%s%v x", name, load), sc(load), w.ideal[2+i], overload)
			if w.workers == 20 {
				again(row, overload)
				continue
			}
			row = add(row.Name, sc(load), w.ideal[2+i], overload)
			again(row, overload)
			row.Long = true
		}
	}
	add("2 workers, 1.2 x", Scenario{Workers: 2, Load: 1.2}, 6, Demands{MinGoodput: 0.91, MaxLatency: 2.6})
	add("4 workers, 4 clients, 100 ms, 1.2 x", Scenario{Workers: 4, Clients: 4, Mean: 100 * time.Millisecond, Load: 1.2}, 4, Demands{MinGoodput: 0.95, MaxLatency: 2.6})
	together := Demands{MinGoodput: 0.985, MaxLatency: 2.6, MinJain: 0.98}
	later := together
	later.MaxLatency = 2.3
	many := Scenario{Workers: 20, Clients: 20, Load: 1.2}
	again(add("20 clients, 20 workers, 1.2 x", many, 4, together), later)
	doubled := many
	doubled.Load = 2.4
	row := add("20 clients, 20 workers, 2.4 x", doubled, 2, Demands{MinGoodput: 0.985})
	row.Long = true
	again(row, row.Demands)
	shared := many
	shared.Shared = true
	again(add("20 clients, 20 shared cores, 1.2 x", shared, 4, together), later)
	clocks := many
	clocks.ClockError = s / 2
	add("the same, clocks off by up to 500 ms", clocks, 4, Demands{MinGoodput: 0.97, MaxLatency: 2.7})
	many.WarmUp = 30 * m
	for _, other := range []string{"ideal", "aimd-50ms", "gradient2"} {
		add("the same, half with "+other+", after 30 minutes", many, 4, Demands{MinGoodput: 0.97, MaxLatency: 2.7}).Other = other
	}
	add("100 clients, 200 workers, 1.2 x", Scenario{Workers: 200, Clients: 100, Load: 1.2, Length: m}, 5, Demands{MinGoodput: 0.985, MaxLatency: 2.6})
	add("20 clients with 50 callers each, a closed loop", Scenario{Workers: 20, Clients: 20, Callers: 50}, 2, Demands{MinGoodput: 0.985})
	add("one client with 1,000 callers, a closed loop, constant work", Scenario{Workers: 10, Callers: 1000, Law: Constant, WarmUp: 30 * m, Length: m}, 12, Demands{MinGoodput: 0.985, MaxLatency: 2})
	for _, l := range []struct {
		name string
		law  Law
	}{{"constant", Constant}, {"lognormal (cv 2)", Lognormal}, {"5 % cost 20 times", Bimodal}} {
		add(l.name+", 20 workers, 0.9 x", Scenario{Workers: 20, Load: 0.9, Law: l.law}, 40, Demands{MinGoodput: 0.883, MaxLatency: 1.5})
		add(l.name+", 20 workers, 1.2 x", Scenario{Workers: 20, Load: 1.2, Law: l.law}, 32, Demands{MinGoodput: 0.983, MaxLatency: 1.8})
	}
	change := func(name string, load float64, c Change, ideal int64, d Demands) *Row {
		c.At = -10 * s
		row := add(name+", 10 s later", Scenario{Workers: 20, Load: load, Changes: []Change{c}}, ideal, d)
		row.Phases = 3
		return row
	}
	change("workers halve at 1.2 x", 1.2, Change{Workers: 10}, 18, overload).Capacity = 0.5
	change("workers double at 2.4 x", 2.4, Change{Workers: 40}, 60, overload).Capacity = 2
	change("workers x 4 at 3 x", 3, Change{Workers: 80}, 110, Demands{MinGoodput: 2.97, MaxLatency: 1.5})
	slow := change("the work is twice as slow at 1.2 x", 1.2, Change{Speed: 0.5}, 32, overload)
	slow.Capacity, slow.Slower = 0.5, 2
	slow = change("the same, 20 clients", 1.2, Change{Speed: 0.5}, 4, together)
	slow.Clients, slow.Capacity, slow.Slower = 20, 0.5, 2
	stall := Scenario{Workers: 20, Load: 0.9, Length: 10 * s, Changes: []Change{{At: -7 * s, Stalled: true}, {At: -2 * s}}}
	add("stalled for 5 s at 0.9 x, 2 s later", stall, 40, Demands{MinServed: 0.999}).Phases = 6
	across := Scenario{Workers: 20, Load: 0.9, Length: 20 * s, Changes: []Change{{At: -5 * s, Stalled: true}, {At: 0}}}
	add("stalled for 5 s, until a drain, 20 s from its end", across, 40, Demands{MinServed: 0.96})
	for _, load := range []float64{1.2, 3} {
		add(fmt.Sprintf("refuses at a queue of 20, %v x", load), Scenario{Workers: 20, Queue: 20, Load: load}, 32, Demands{MinGoodput: 0.99, MaxRejected: 0.005})
	}
	return rows
}

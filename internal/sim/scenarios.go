// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package sim

import (
	"errors"
	"fmt"
	"math"
	"math/rand/v2"
	"time"
)

// A Scenario is a cluster, what its clients want of it, and what goes wrong. The
// work of a call is lognormal, but for Tower's example.
type Scenario struct {
	Name    string
	Clients int // each with a policy of its own
	Servers int
	// Workers is the number of calls that a server serves side by side; more wait
	// in one queue in the order of their arrival. 0 is no limit.
	Workers int
	// Sharing makes the calls of a server share the workers evenly instead of
	// waiting.
	Sharing bool
	// Speeds are given to the servers in turn. Default all 1.
	Speeds []float64
	// Sizes are the numbers of workers of the servers in turn, in the place of Workers.
	Sizes []int
	// Weights are the servers' weights in turn. Default all 1.
	Weights []uint32
	// Zones are the numbers of servers in each zone, which are the servers in order. The
	// clients are in the zones in turn. Default one zone.
	Zones []int
	// Demand is the shares of the calls that come from each zone; they make 1. Default
	// equal.
	Demand []float64
	// Between is what the one-way delay is longer between zones.
	Between time.Duration
	// Methods are what is called. Default one unary method.
	Methods []Method
	// Mean is the mean service time at speed 1.
	Mean time.Duration
	// Network and Jitter are the constant part of the one-way delay and the mean
	// of its exponential part.
	Network, Jitter time.Duration
	// Deadline is when a client gives a call up; the server continues. 0 is never.
	Deadline time.Duration
	// WarmUp passes before calls are measured, or WarmUpCalls are sent, whichever
	// comes first if WarmUpCalls is not 0.
	WarmUp      time.Duration
	WarmUpCalls int
	// Load is the rate of the calls, Poisson, as a share of what the servers can
	// do at most in the long run, with what goes wrong. Only if InFlight is 0.
	Load float64
	// InFlight is the number of calls that are always in flight, a closed loop.
	InFlight int
	// Period is that of what goes wrong; the measurement covers whole ones.
	Period time.Duration
	// Calls, if not 0, is how many calls are measured, whatever Options.Calls says.
	Calls int

	// Show is what the table has besides percentiles.
	Show Show

	capacity float64 // the share of the servers' speeds that the faults leave, 0 for 1
	faults   func(*cluster)
	law      func(*rand.Rand) float64 // of the service time, with mean 1; nil for lognormal
}

// A Method is a kind of call.
type Method struct {
	Name  string
	Share float64 // of the calls; the shares of all methods make 1
	Work  float64 // its mean, in units of Scenario.Mean
	// Stream makes a stream of each call, which is answered once after its work and is
	// then open until the run ends. A policy is told of it as the dial options of p2c do.
	// Servers must not fail then.
	Stream bool
}

// Show is what a scenario is about besides percentiles.
type Show uint8

const (
	ShowMean   Show = 1 << iota // the mean latency
	ShowShares                  // the least and the greatest share of a server, fair = 1
	ShowHome                    // the share of the calls that stay in their zone, of those of zone 0, and of all
	ShowBeside                  // how calls of the last method crowd on a server, and whether others avoid it; latencies are those of the others
)

func (s *Scenario) validate() error {
	switch {
	case s.Clients < 1:
		return fmt.Errorf("sim: Scenario.Clients: %d, must be at least 1", s.Clients)
	case s.Servers < 1:
		return fmt.Errorf("sim: Scenario.Servers: %d, must be at least 1", s.Servers)
	case s.Workers < 0:
		return fmt.Errorf("sim: Scenario.Workers: %d, must not be negative", s.Workers)
	case s.Mean <= 0:
		return fmt.Errorf("sim: Scenario.Mean: %v, must be above 0s", s.Mean)
	case s.Network < 0:
		return fmt.Errorf("sim: Scenario.Network: %v, must not be negative", s.Network)
	case s.Jitter < 0:
		return fmt.Errorf("sim: Scenario.Jitter: %v, must not be negative", s.Jitter)
	case s.WarmUp < 0:
		return fmt.Errorf("sim: Scenario.WarmUp: %v, must not be negative", s.WarmUp)
	case s.Deadline < 0:
		return fmt.Errorf("sim: Scenario.Deadline: %v, must not be negative", s.Deadline)
	case s.Calls < 0:
		return fmt.Errorf("sim: Scenario.Calls: %d, must not be negative", s.Calls)
	case s.InFlight < 0:
		return fmt.Errorf("sim: Scenario.InFlight: %d, must not be negative", s.InFlight)
	case s.InFlight == 0 && !(s.Load > 0 && s.Workers > 0):
		return fmt.Errorf("sim: Scenario.Load: %v with %d workers, both must be above 0 without InFlight", s.Load, s.Workers)
	case s.Sharing && s.Workers == 0:
		return errors.New("sim: Scenario.Workers: 0, must be above 0 to be shared")
	}
	servers := 0
	for _, n := range s.Zones {
		servers += n
	}
	switch {
	case len(s.Zones) > 0 && servers != s.Servers:
		return fmt.Errorf("sim: Scenario.Zones: %v, must make %d servers", s.Zones, s.Servers)
	case len(s.Zones) > s.Clients:
		return fmt.Errorf("sim: Scenario.Clients: %d, must be at least one for each of %d zones", s.Clients, len(s.Zones))
	case len(s.Demand) > 0 && len(s.Demand) != len(s.Zones):
		return fmt.Errorf("sim: Scenario.Demand: %v, must be one number for each of %d zones", s.Demand, len(s.Zones))
	case s.Between < 0:
		return fmt.Errorf("sim: Scenario.Between: %v, must not be negative", s.Between)
	}
	for i, speed := range s.Speeds {
		if !(speed > 0) {
			return fmt.Errorf("sim: Scenario.Speeds[%d]: %v, must be above 0", i, speed)
		}
	}
	return nil
}

// workers returns the workers of the i-th server.
func (s *Scenario) workers(i int) int {
	if len(s.Sizes) > 0 {
		return s.Sizes[i%len(s.Sizes)]
	}
	return s.Workers
}

// weight returns the weight of the i-th server.
func (s *Scenario) weight(i int) uint32 {
	if len(s.Weights) > 0 {
		return s.Weights[i%len(s.Weights)]
	}
	return 1
}

// zone returns the zone of the i-th server.
func (s *Scenario) zone(i int) int {
	for z, n := range s.Zones {
		if i < n {
			return z
		}
		i -= n
	}
	return 0
}

// transit returns the mean one-way delay.
func (s *Scenario) transit() time.Duration { return s.Network + s.Jitter }

// rate returns the arrivals per nanosecond of an open loop.
func (s *Scenario) rate() float64 {
	var speeds float64
	for i := range s.Servers {
		speed := float64(s.workers(i))
		if len(s.Speeds) > 0 {
			speed *= s.Speeds[i%len(s.Speeds)]
		}
		speeds += speed
	}
	if s.capacity > 0 {
		speeds *= s.capacity
	}
	work := 1.0
	if len(s.Methods) > 0 {
		work = 0
		for _, m := range s.Methods {
			work += m.Share * m.Work
		}
	}
	return s.Load * speeds / float64(s.Mean) / work
}

// lognormal has a mean of 1 and a 99th percentile of 3.4.
func lognormal(r *rand.Rand) float64 { return math.Exp(0.6*r.NormFloat64() - 0.18) }

// heavy has a mean of 1 and a 99th percentile of 10.6.
func heavy(r *rand.Rand) float64 { return math.Exp(1.5*r.NormFloat64() - 1.125) }

// uniform is uniform up to 2.
func uniform(r *rand.Rand) float64 { return 2 * r.Float64() }

// oneSlowInTen is the speeds of servers every tenth of which is slow.
var oneSlowInTen = []float64{1, 1, 1, 1, 1, 1, 1, 1, 1, 0.2}

// base is what the scenarios have in common.
func base() Scenario {
	return Scenario{
		Clients:  10,
		Servers:  20,
		Workers:  4,
		Mean:     10 * time.Millisecond,
		Network:  250 * time.Microsecond,
		Jitter:   50 * time.Microsecond,
		Deadline: time.Second,
		WarmUp:   30 * time.Second,
		Load:     0.7,
	}
}

// Scenarios returns all scenarios.
func Scenarios() []Scenario {
	var all []Scenario
	add := func(name string, change func(*Scenario)) {
		s := base()
		s.Name = name
		change(&s)
		all = append(all, s)
	}
	add("homogeneous 70 %", func(*Scenario) {})
	add("homogeneous 90 %", func(s *Scenario) { s.Load = 0.9 })
	add("2 of 20 servers 5× slower", func(s *Scenario) { s.Speeds = oneSlowInTen })
	add("speeds 1:2:4", func(s *Scenario) { s.Speeds = []float64{0.5, 1, 2} })
	add("antagonists", func(s *Scenario) { s.antagonists() })
	add("brownout", func(s *Scenario) {
		s.Load, s.capacity = 0.75, 0.9
		s.Period = 20 * time.Second
		s.faults = brownout
	})
	add("one server stops", func(s *Scenario) {
		s.capacity = 0.99
		s.Period = 5 * time.Second
		s.faults = stopOne
	})
	add("every server stops (GC)", func(s *Scenario) {
		s.capacity = 0.975
		s.faults = collectGarbage
	})
	add("6 of 20 never answer at times", func(s *Scenario) {
		s.Load, s.capacity = 0.5, 0.95
		s.Period = 30 * time.Second
		s.faults = blackHoles
	})
	add("2 of 20 replaced by cold ones", func(s *Scenario) {
		s.capacity = 0.98
		s.Period = 10 * time.Second
		s.faults = restart
	})
	add("2 clients, 100 servers, 10 slow", func(s *Scenario) {
		s.Clients, s.Servers, s.Speeds = 2, 100, oneSlowInTen
	})
	add("processor sharing, 2 slow", func(s *Scenario) {
		s.Sharing, s.Load, s.Speeds = true, 0.8, oneSlowInTen
	})
	add("processor sharing, antagonists", func(s *Scenario) {
		s.Sharing = true
		s.antagonists()
	})
	add("100 clients, 100 servers", func(s *Scenario) { s.hundred() })
	add("100 clients, 100 servers, 10 slow", func(s *Scenario) {
		s.hundred()
		s.Speeds = oneSlowInTen
	})
	add("Prequal's case", func(s *Scenario) {
		s.hundred()
		s.Mean = 20 * time.Millisecond
		s.Sharing = true
		s.antagonists()
	})
	add("Tower's example", func(s *Scenario) {
		// No queues, so a server that takes uniform up to 1 ms at speed 1 takes
		// up to 1 s at speed 1/1000.
		s.Clients, s.Servers, s.Workers = 1, 10, 0
		s.InFlight = 500
		s.Mean, s.law = 500*time.Microsecond, uniform
		s.Speeds = []float64{1, 1. / 5, 1. / 10, 1. / 10, 1. / 10, 1. / 100, 1. / 100, 1. / 100, 1. / 500, 1. / 1000}
		s.Network, s.Jitter = 10*time.Microsecond, 0
		s.Deadline = 0
		// A policy that finds the fast ones sends half a million calls a second.
		s.WarmUpCalls = 1_000_000
	})
	add("one server fails at once", func(s *Scenario) { s.failing(fails) })
	add("one server fails half its calls", func(s *Scenario) { s.failing(failsHalf) })
	add("all servers fail a quarter of their calls", func(s *Scenario) {
		// Not the fault of any of them, and no reason to load the others more.
		s.Period = 20 * time.Second
		s.faults = func(c *cluster) {
			c.every(s.Period, func() {
				for _, srv := range c.servers {
					srv.behaviour = failsQuarter
					c.after(10*time.Second, func() { srv.behaviour = answers })
				}
			})
		}
	})
	add("surge", func(s *Scenario) {
		s.Load = 0.6
		s.Period = 3 * time.Second
		s.faults = surge
	})
	for _, n := range []int{4, 20} {
		add(fmt.Sprintf("one caller, %d servers", n), func(s *Scenario) {
			s.idle(n)
			s.Show = ShowShares
		})
	}
	add("one caller, 10 servers, one 30× faster", func(s *Scenario) {
		s.idle(10)
		s.Mean, s.Speeds = 30*time.Millisecond, []float64{1, 1, 1, 1, 1, 1, 1, 30, 1, 1}
	})
	add("one caller, 20 servers, 2 slow", func(s *Scenario) {
		s.idle(20)
		s.Speeds = oneSlowInTen
	})
	add("10 calls/s, one server stops once for 10 s", func(s *Scenario) {
		s.Clients, s.Servers = 1, 10
		s.Load = 0.0025 // of 4,000 calls/s
		s.Show = ShowShares
		s.faults = func(c *cluster) {
			c.after(s.WarmUp, func() { c.servers[3].stop(true) })
			c.after(s.WarmUp+10*time.Second, func() { c.servers[3].stop(false) })
		}
	})
	add("10 % of calls cost 20 times", func(s *Scenario) {
		s.Clients, s.Servers = 1, 10
		s.methods(0.1, 20)
	})
	add("10 % of calls cost 20 times, 2 of 20 slow", func(s *Scenario) {
		s.Speeds = oneSlowInTen
		s.methods(0.1, 20)
	})
	add("1 % of calls cost 100 times", func(s *Scenario) { s.methods(0.01, 100) })
	add("Get of 1 ms beside 1 % Export of 10 s", func(s *Scenario) {
		s.Clients, s.Servers, s.Workers = 1, 10, 100 // No call waits for a worker.
		s.Mean, s.Load = time.Millisecond, 0.02      // Some 200 calls/s.
		s.Methods = []Method{{Name: "/belfry.sim/Get", Share: 0.99, Work: 1}, {Name: "/belfry.sim/Export", Share: 0.01, Work: 10_000}}
		s.Deadline = 0
		s.Calls = 1_000_000 // Few servers have no Export, and Gets come in runs.
		s.Show = ShowBeside
	})
	add("2,000 long streams, 10 servers", func(s *Scenario) {
		s.Clients, s.Servers, s.Load = 1, 10, 0.25
		s.Methods = []Method{{Name: watch, Share: 1, Work: 1, Stream: true}}
		s.WarmUp, s.Calls = 0, 2000
		s.Show = ShowShares
	})
	for _, streams := range []int{0, 100} {
		add(fmt.Sprintf("a server comes back beside 3 with %d streams each", streams), func(s *Scenario) {
			s.Clients, s.Servers, s.Mean = 1, 3, 5*time.Millisecond
			s.Load, s.capacity = 0.5, 4./3
			s.Show = ShowShares
			s.faults = func(c *cluster) {
				for i := range 3 * streams {
					c.after(c.scenario.WarmUp/2+time.Duration(i)*time.Millisecond, func() { c.open(true) })
				}
				c.after(c.scenario.WarmUp, func() {
					c.addServer(1)
					c.update()
				})
			}
		})
	}
	add("10 servers, 75 %", func(s *Scenario) { s.Clients, s.Servers, s.Load = 1, 10, 0.75 })
	add("10 servers, 75 %, 3 with a silent stream", func(s *Scenario) {
		s.Clients, s.Servers, s.Load = 1, 10, 0.75
		s.faults = func(c *cluster) {
			holders := make(map[*server]bool)
			var hold func()
			hold = func() {
				if holders[c.open(false)] = true; len(holders) < 3 {
					c.after(10*time.Millisecond, hold)
				}
			}
			c.after(c.scenario.WarmUp/2, hold)
		}
	})
	add("heavy tails, 1 client, 10 servers", func(s *Scenario) {
		s.Clients, s.Servers, s.law, s.Show = 1, 10, heavy, ShowMean
	})
	add("heavy tails, 2 of 20 slow", func(s *Scenario) {
		s.Speeds, s.law, s.Show = oneSlowInTen, heavy, ShowMean
	})
	add("20 clients, 3 servers, one 3× slower", func(s *Scenario) {
		s.Clients, s.Servers, s.Speeds = 20, 3, []float64{1, 1, 1. / 3}
	})
	for _, n := range []int{1, 4, 32, 500} {
		add(fmt.Sprintf("canary of 1 beside nine of 10, %d in flight", n), func(s *Scenario) {
			s.idle(10)
			s.InFlight, s.Workers = n, 0
			s.Weights = []uint32{1, 10, 10, 10, 10, 10, 10, 10, 10, 10}
			s.Show = ShowShares
		})
	}
	for _, percent := range []float64{30, 75, 90} {
		add(fmt.Sprintf("sizes and weights 1:2, %v %%", percent), func(s *Scenario) {
			s.Sizes, s.Weights = []int{4, 8}, []uint32{1, 2}
			s.Load = percent / 100
			s.Show = ShowMean | ShowShares
		})
	}
	add("subsets of 100 servers for 100 clients", func(s *Scenario) {
		s.hundred()
		s.Show = ShowShares
	})
	add("subsets of 100 servers for 10 clients", func(s *Scenario) {
		s.Servers = 100
		s.Show = ShowShares
	})
	for _, percent := range []float64{30, 70, 90} {
		add(fmt.Sprintf("3 zones, %v %%", percent), func(s *Scenario) {
			s.zoned(7, 7, 7)
			s.Load = percent / 100
		})
	}
	for _, percent := range []float64{100, 140} {
		add(fmt.Sprintf("3 zones, one asked for %v %%", percent), func(s *Scenario) {
			s.zoned(7, 7, 7)
			s.ask(percent/100, 0.35)
		})
	}
	for _, percent := range []float64{70, 140} {
		add(fmt.Sprintf("3 zones, one client alone asks its own for %v %%", percent), func(s *Scenario) {
			s.zoned(7, 7, 7)
			s.Clients = 3
			s.ask(percent/100, 0)
		})
	}
	add("3 zones, one silent at times", func(s *Scenario) {
		s.zoned(7, 7, 7)
		s.Load, s.capacity = 0.5, 1-5./30/3
		s.Period = 30 * time.Second
		s.faults = func(c *cluster) {
			c.every(s.Period, func() {
				for _, srv := range c.servers[:7] {
					srv.behaviour = silent
					c.after(5*time.Second, func() { srv.behaviour = answers })
				}
			})
		}
	})
	add("3 zones, no further apart, 70 %", func(s *Scenario) {
		s.zoned(7, 7, 7)
		s.Between = 0
	})
	add("3 zones of 2, 7 and 12, equal demand, 50 %", func(s *Scenario) {
		s.zoned(2, 7, 12)
		s.Load = 0.5 // the first is asked for 175 %
	})
	add("3 zones of 2, 7 and 12, demand alike, 70 %", func(s *Scenario) {
		s.zoned(2, 7, 12)
		s.Demand = []float64{2. / 21, 7. / 21, 12. / 21}
	})
	add("3 zones of 1, 10 and 10, demand alike, 70 %", func(s *Scenario) {
		s.zoned(1, 10, 10)
		s.Demand = []float64{1. / 21, 10. / 21, 10. / 21}
	})
	return all
}

// zoned is zones of so many servers, with calls of 5 ms.
func (s *Scenario) zoned(servers ...int) {
	s.Clients, s.Servers, s.Zones = 9, 0, servers
	for _, n := range servers {
		s.Servers += n
	}
	s.Mean, s.Between = 5*time.Millisecond, time.Millisecond
	s.Show = ShowHome
}

// ask sets the load of the first of zones of equal size, and that of the others.
func (s *Scenario) ask(first, others float64) {
	n := float64(len(s.Zones))
	sum := first + (n-1)*others
	s.Load = sum / n
	s.Demand = []float64{first / sum}
	for range len(s.Zones) - 1 {
		s.Demand = append(s.Demand, others/sum)
	}
}

// idle is one caller that calls n servers, one call after the other.
func (s *Scenario) idle(n int) {
	s.Clients, s.Servers, s.InFlight = 1, n, 1
	s.WarmUp = 0
}

// methods makes a share of the calls cost as many times as much as the others. The
// mean of all stays what it is.
func (s *Scenario) methods(share, times float64) {
	other := 1 / (1 - share + share*times)
	s.Methods = []Method{{Name: "/belfry.sim/Get", Share: 1 - share, Work: other}, {Name: "/belfry.sim/Export", Share: share, Work: other * times}}
	s.Deadline = 10 * time.Second
	s.Show = ShowMean
}

// hundred is many clients of few calls each.
func (s *Scenario) hundred() {
	s.Clients, s.Servers = 100, 100
	s.Mean = 50 * time.Millisecond
	s.Deadline = 5 * time.Second
	s.WarmUp = time.Minute
}

// antagonists share the machines of the servers: each server redraws its speed
// after exponential 1 s.
func (s *Scenario) antagonists() {
	s.Load, s.capacity = 0.75, 0.82
	s.faults = func(c *cluster) {
		for _, srv := range c.servers {
			var redraw func()
			redraw = func() {
				speed := 1.0
				if c.faults.Float64() >= 0.7 {
					speed = 0.2 + 0.4*c.faults.Float64()
				}
				srv.setSpeed(speed)
				c.after(time.Duration(c.faults.ExpFloat64()*float64(time.Second)), redraw)
			}
			redraw()
		}
	}
}

// every calls f each period, for the first time after one.
func (c *cluster) every(period time.Duration, f func()) {
	c.after(period, func() {
		f()
		c.every(period, f)
	})
}

// some returns n servers at random.
func (c *cluster) some(n int) []*server {
	chosen := make([]*server, n)
	for i, k := range c.faults.Perm(len(c.servers))[:n] {
		chosen[i] = c.servers[k]
	}
	return chosen
}

// brownout slows 6 servers down to a third for 10 s of every 20.
func brownout(c *cluster) {
	c.every(20*time.Second, func() {
		for _, s := range c.some(6) {
			s.setSpeed(1. / 3)
			c.after(10*time.Second, func() { s.setSpeed(1) })
		}
	})
}

// stopOne stops one server for 1 s of every 5.
func stopOne(c *cluster) {
	c.every(5*time.Second, func() {
		s := c.some(1)[0]
		s.stop(true)
		c.after(time.Second, func() { s.stop(false) })
	})
}

// collectGarbage stops each server for 50 to 150 ms, every 4 s on average.
func collectGarbage(c *cluster) {
	for _, s := range c.servers {
		var run func()
		run = func() {
			// With the 100 ms of the pause that makes 4 s.
			c.after(time.Duration(c.faults.ExpFloat64()*float64(3900*time.Millisecond)), func() {
				s.stop(true)
				pause := 50*time.Millisecond + time.Duration(c.faults.Float64()*float64(100*time.Millisecond))
				c.after(pause, func() {
					s.stop(false)
					run()
				})
			})
		}
		run()
	}
}

// blackHoles makes the first 6 servers silent for 5 s of every 30.
func blackHoles(c *cluster) {
	c.every(30*time.Second, func() {
		for _, s := range c.servers[:6] {
			s.behaviour = silent
			c.after(5*time.Second, func() { s.behaviour = answers })
		}
	})
}

// restart replaces the 2 oldest servers every 10 s by cold ones.
func restart(c *cluster) {
	c.every(10*time.Second, func() {
		for range 2 {
			c.removeOldest()
			c.warm(c.addServer(coldSpeed))
			c.update()
		}
	})
}

const coldSpeed = 0.2

// warm brings a cold server up to speed 1 in 5 s.
func (c *cluster) warm(s *server) {
	const steps = 50
	for i := range steps {
		c.after(time.Duration(i+1)*5*time.Second/steps, func() {
			s.setSpeed(coldSpeed + (1-coldSpeed)*float64(i+1)/steps)
		})
	}
}

// failing makes one server fail for 10 s of every 20.
func (s *Scenario) failing(how behaviour) {
	s.Load = 0.6
	s.Period = 20 * time.Second
	s.faults = func(c *cluster) {
		c.every(s.Period, func() {
			srv := c.some(1)[0]
			srv.behaviour = how
			c.after(10*time.Second, func() { srv.behaviour = answers })
		})
	}
}

// surge doubles the rate for 300 ms of every 3 s.
func surge(c *cluster) {
	normal := c.scenario.rate()
	c.every(3*time.Second, func() {
		c.setRate(2 * normal)
		c.after(300*time.Millisecond, func() { c.setRate(normal) })
	})
}

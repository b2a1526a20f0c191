// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

// Package loadgen makes calls and measures how long they take: as many at a time as asked
// (a closed loop), or at times that are set before the first call (an open loop).
package loadgen

import (
	"context"
	"math"
	"math/rand/v2"
	"runtime"
	"runtime/metrics"
	"slices"
	"sync"
	"sync/atomic"
	"time"
)

// A Result is what came of the calls of a load.
type Result struct {
	Latencies []time.Duration // of the calls that were answered, ascending
	Errors    int             // calls that failed
	Example   error           // the error of one of them
	Elapsed   time.Duration   // from the first call to the last answer
}

// unanswered is the latency of a call that failed or was not made.
const unanswered = -1

// collector gathers the ends of calls.
type collector struct {
	latencies []time.Duration // each written by one goroutine

	mu      sync.Mutex // guards what follows
	errors  int
	example error
}

func newCollector(calls int) *collector {
	return &collector{latencies: slices.Repeat([]time.Duration{unanswered}, calls)}
}

func (c *collector) end(i int, latency time.Duration, err error) {
	if err == nil {
		c.latencies[i] = latency
		return
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.errors++
	c.example = err
}

// result returns what was gathered. All calls must have ended.
func (c *collector) result(elapsed time.Duration) Result {
	c.mu.Lock()
	defer c.mu.Unlock()
	answered := slices.DeleteFunc(c.latencies, func(l time.Duration) bool { return l == unanswered })
	slices.Sort(answered)
	return Result{Latencies: answered, Errors: c.errors, Example: c.example, Elapsed: elapsed}
}

// Closed keeps inFlight calls in flight until so many calls have been made, or ctx ends: a
// goroutine for each call in flight, which makes the next one as soon as the last has ended.
// It returns when all calls have ended. Errors of calls that end after ctx do not count, so
// whoever ends ctx may end the calls as well. done counts the others as they end, if it is
// not nil.
//
// A latency counts from the moment at which the call is made. So a closed loop waits for a
// slow server with fewer calls than its users would make; where that matters use [Open].
func Closed(ctx context.Context, inFlight, calls int, done *atomic.Int64, call func() error) Result {
	if done == nil {
		done = new(atomic.Int64)
	}
	c := newCollector(calls)
	var next atomic.Int64
	var running sync.WaitGroup
	began := time.Now()
	for range min(inFlight, calls) {
		running.Go(func() {
			for {
				i := int(next.Add(1)) - 1
				if i >= calls || ctx.Err() != nil {
					return
				}
				sent := time.Now()
				err := call()
				latency := time.Since(sent)
				if err != nil && ctx.Err() != nil {
					return
				}
				c.end(i, latency, err)
				done.Add(1)
			}
		})
	}
	running.Wait()
	return c.result(time.Since(began))
}

// Poisson returns the times of calls that arrive at a mean rate per second, independently of
// each other, from 0 until the end, ascending. The seed determines them.
func Poisson(rate float64, end time.Duration, seed uint64) []time.Duration {
	r := rand.New(rand.NewPCG(seed, 0))
	var times []time.Duration
	at := 0.0
	for {
		at += r.ExpFloat64() / rate
		if t := time.Duration(at * float64(time.Second)); t < end {
			times = append(times, t)
			continue
		}
		return times
	}
}

// Open makes a call at each of the times, which are ascending and count from now, whether
// others have ended or not, each on a goroutine of its own. call is given its number. Open
// returns when all calls have ended. Calls whose time is before warmUp are made but do not
// count.
//
// A latency counts from the time at which the call should have been made. So what is late
// because the machine is busy, or because of the calls before it, is in the latencies
// (coordinated omission is not).
func Open(times []time.Duration, warmUp time.Duration, call func(i int) error) Result {
	first, _ := slices.BinarySearch(times, warmUp)
	c := newCollector(len(times) - first)
	var running sync.WaitGroup
	began := time.Now()
	for i, at := range times {
		due := began.Add(at)
		if wait := time.Until(due); wait > 0 {
			time.Sleep(wait)
		}
		running.Go(func() {
			err := call(i)
			latency := time.Since(due)
			if i >= first {
				c.end(i-first, latency, err)
			}
		})
	}
	running.Wait()
	return c.result(time.Since(began) - min(warmUp, time.Since(began)))
}

// Percentile returns the q-quantile of ascending latencies by the nearest-rank
// method: an observed value, that at least the share q of all does not exceed.
// It is 0 if there are none.
func Percentile(ascending []time.Duration, q float64) time.Duration {
	if len(ascending) == 0 {
		return 0
	}
	// A product such as 0.999*100000 may come out a little above the whole number.
	rank := int(math.Ceil(q*float64(len(ascending)) - 1e-6))
	return ascending[max(rank, 1)-1]
}

// Median returns the median of values, the mean of the middle two if they are even in
// number, and 0 if there are none. It leaves values as they are.
func Median(values []float64) float64 {
	n := len(values)
	if n == 0 {
		return 0
	}
	sorted := slices.Sorted(slices.Values(values))
	return (sorted[(n-1)/2] + sorted[n/2]) / 2
}

// Processors returns how many seconds of processors the program has used and had since
// it began. Go counts them when it collects garbage, so it does that; what one run leaves
// behind is not the next one's to clear away anyway. A goroutine that waits for the
// processor of a busy machine counts as using it.
func Processors() (used, had float64) {
	runtime.GC()
	s := []metrics.Sample{{Name: "/cpu/classes/total:cpu-seconds"}, {Name: "/cpu/classes/idle:cpu-seconds"}}
	metrics.Read(s)
	had = s[0].Value.Float64()
	return had - s[1].Value.Float64(), had
}

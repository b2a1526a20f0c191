// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package limitsim

import (
	"math"
	"math/rand/v2"
	"time"

	"github.com/belfry-go/belfry/internal/agenda"
	"github.com/belfry-go/belfry/limit"
)

// A Law is a law of service times with mean 1.
type Law func(r *rand.Rand) float64

// Constant is always 1.
func Constant(*rand.Rand) float64 { return 1 }

// Exponential has a coefficient of variation of 1.
func Exponential(r *rand.Rand) float64 { return r.ExpFloat64() }

// Lognormal has a coefficient of variation of 2.
func Lognormal(r *rand.Rand) float64 {
	v := math.Log(1 + 2*2) // The variance of the logarithm.
	return math.Exp(math.Sqrt(v)*r.NormFloat64() - v/2)
}

// Bimodal gives one call in twenty twenty times the work of the others.
func Bimodal(r *rand.Rand) float64 {
	const usual = 1 / (0.95 + 0.05*20)
	if r.Float64() < 0.05 {
		return 20 * usual
	}
	return usual
}

// A Scenario is a server and the load on it.
type Scenario struct {
	Workers int
	Shared  bool          // the workers are cores that all calls share; else they serve a FIFO queue
	Queue   int           // calls that may wait in the server, which refuses the others; 0: no bound
	Law     Law           // of the work of a call; Exponential if nil
	Mean    time.Duration // of the work; 10 ms if 0

	Clients int     // 1 if 0
	Load    float64 // calls that arrive, in parts of the capacity of Workers: an open loop
	// Callers makes it a closed loop: as many of each client call, one call after the other.
	// One that is refused thinks for ten times Mean before the next.
	Callers int

	Changes []Change
	// Phase is what the wall clock shows when the first measurement begins, after a
	// multiple of a minute.
	Phase time.Duration
	// ClockError is how far the clock of a client may be off, either way.
	ClockError time.Duration
	WarmUp     time.Duration
	Length     time.Duration // of what is measured after the WarmUp
	Again      time.Duration // when as long a time is measured again, after WarmUp and Length; 0: it is not
}

// A Change changes the server at a time after the first warm-up.
type Change struct {
	At      time.Duration
	Workers int     // 0: as they are
	Speed   float64 // 0: as it is
	Stalled bool
}

// A Maker makes the limit of client i.
type Maker func(i int, wall func(limit.Instant) time.Time) limit.Algorithm

// A Result is what was measured.
type Result struct {
	Goodput  float64 // calls served in time, in parts of the capacity of Workers
	Latency  float64 // their mean latency, in means of the work
	Refused  float64 // part of the calls refused by limits
	Rejected float64 // part of the calls refused by the server
	Late     float64 // part of the calls that took longer than the deadline
	Served   float64 // part of the calls served in time
	Jain     float64 // Jain's index of fairness of what clients were served
	Limit    float64 // mean of the sum of all limits
}

// deadline is when a client gives up. The server does the work all the same.
const deadline = time.Second

// rejection is how long the server takes to refuse a call.
const rejection = 100 * time.Microsecond

// start keeps times away from 0, which means none.
const start = int64(time.Hour)

type call struct {
	client *client
	work   float64
	sent   int64
	doneAt float64
	mark   uint8
	over   bool // The client has given up.
}

type client struct {
	limit    limit.Algorithm
	starter  limit.Starter // May be nil.
	inFlight int64
	limited  bool
	served   float64
	again    func(uint64)
}

type run struct {
	sc       *Scenario
	rng      *rand.Rand
	mean     float64
	now      int64
	agenda   agenda.Agenda[func(number uint64)]
	sent     agenda.Queue[*call] // In order of their deadlines.
	server   server
	clients  []client
	free     []*call
	from, to int64 // what is measured
	measured
}

// measured is what is counted.
type measured struct {
	arrived, refused, rejected, late, served float64
	latency                                  float64
	limits, looks                            float64
}

// Run runs a scenario and returns what was measured, once or twice. It depends on nothing
// but its arguments.
func Run(sc Scenario, maker Maker, seed uint64) (results []Result) {
	if sc.Law == nil {
		sc.Law = Exponential
	}
	if sc.Mean == 0 {
		sc.Mean = 10 * time.Millisecond
	}
	sc.Clients = max(sc.Clients, 1)
	r := &run{sc: &sc, rng: rand.New(rand.NewPCG(seed, 1)), mean: float64(sc.Mean), now: start}
	r.from = start + int64(sc.WarmUp)
	r.to = r.from + int64(sc.Length)
	r.server = server{run: r, workers: sc.Workers, shared: sc.Shared, queue: sc.Queue, speed: 1, clockAt: start}
	r.server.complete = r.server.done
	r.clients = make([]client, sc.Clients)
	for i := range r.clients {
		c := &r.clients[i]
		off := sc.Phase + time.Duration((2*r.rng.Float64()-1)*float64(sc.ClockError)) - time.Duration(r.from)
		c.limit = maker(i, func(at limit.Instant) time.Time { return time.Unix(0, int64(at)).Add(off) })
		c.starter, _ = c.limit.(limit.Starter)
		c.again = func(uint64) { r.call(c) }
		for range sc.Callers {
			r.agenda.Add(start+int64(r.rng.Float64()*r.mean), c.again)
		}
	}
	if sc.Load > 0 {
		between := r.mean / (sc.Load * float64(sc.Workers))
		var arrive func(uint64)
		arrive = func(uint64) {
			r.agenda.Add(r.now+int64(r.rng.ExpFloat64()*between), arrive)
			r.call(&r.clients[r.rng.IntN(len(r.clients))])
		}
		r.agenda.Add(start, arrive)
	}
	for _, ch := range sc.Changes {
		r.agenda.Add(r.from+int64(ch.At), func(uint64) {
			r.server.change(func(s *server) {
				s.stalled = ch.Stalled
				if ch.Workers > 0 {
					s.workers = ch.Workers
				}
				if ch.Speed > 0 {
					s.speed = ch.Speed
				}
			})
		})
	}
	var look func(uint64)
	look = func(uint64) {
		r.agenda.Add(r.now+int64(100*time.Millisecond), look)
		if r.counts() {
			r.looks++
			for i := range r.clients {
				r.limits += float64(r.clients[i].limit.Limit())
			}
		}
	}
	r.agenda.Add(start+1, look)
	for {
		next := r.agenda.Next().At
		for r.sent.Len() > 0 && (*r.sent.Front()).sent+int64(deadline) <= next {
			r.expire(r.sent.Pop())
		}
		if next = r.agenda.Next().At; next > r.to {
			results = append(results, r.result())
			if sc.Again == 0 || len(results) == 2 {
				return results
			}
			r.from = start + int64(sc.Again)
			r.to = r.from + int64(sc.Length)
		}
		e := r.agenda.Pop()
		r.now = e.At
		e.Do(e.Number)
	}
}

// expire gives up a call, unless it has ended. Calls are kept for as long, so that none is
// used again before that.
func (r *run) expire(c *call) {
	if c.client == nil { // It has ended.
		r.free = append(r.free, c)
		return
	}
	r.now = max(r.now, c.sent+int64(deadline))
	if r.counts() {
		r.late++
	}
	c.over = true
	r.end(c, limit.Dropped)
}

func (r *run) counts() bool { return r.now >= r.from && r.now < r.to }

// call makes a call of a client.
func (r *run) call(cl *client) {
	if r.counts() {
		r.arrived++
	}
	if cl.inFlight >= max(cl.limit.Limit(), 1) {
		cl.limited = true
		if r.counts() {
			r.refused++
		}
		if r.sc.Callers > 0 {
			r.agenda.Add(r.now+int64(r.rng.ExpFloat64()*10*r.mean), cl.again)
		}
		return
	}
	cl.inFlight++
	c := &call{}
	if n := len(r.free); n > 0 {
		c, r.free = r.free[n-1], r.free[:n-1]
	}
	*c = call{client: cl, work: r.sc.Law(r.rng) * r.mean, sent: r.now}
	if cl.starter != nil {
		c.mark = cl.starter.OnStart()
	}
	if !r.server.receive(c) {
		if r.counts() {
			r.rejected++
		}
		r.agenda.Add(r.now+int64(rejection), func(uint64) {
			r.end(c, limit.Dropped)
			r.free = append(r.free, c)
		})
		return
	}
	r.sent.Push(c)
}

// answered takes a call that the server has done.
func (r *run) answered(c *call) {
	if c.over {
		r.free = append(r.free, c)
		return
	}
	if r.counts() {
		r.served++
		r.latency += float64(r.now - c.sent)
		c.client.served++
	}
	r.end(c, limit.Succeeded)
}

// end tells the client how a call has ended.
func (r *run) end(c *call, result limit.Result) {
	cl := c.client
	cl.limit.OnSample(limit.Sample{
		Start: limit.Instant(c.sent), RTT: max(time.Duration(r.now-c.sent), 1), InFlight: cl.inFlight,
		Limited: cl.limited, Result: result, Mark: c.mark,
	})
	cl.inFlight--
	cl.limited = false
	c.client = nil
	if r.sc.Callers > 0 {
		r.agenda.Add(r.now, cl.again)
	}
}

// result returns what was measured, and starts again.
func (r *run) result() Result {
	seconds := time.Duration(r.to - r.from).Seconds()
	res := Result{
		Goodput: r.served / seconds * r.sc.Mean.Seconds() / float64(r.sc.Workers),
		Latency: r.latency / max(r.served, 1) / r.mean,
		Refused: r.refused / max(r.arrived, 1), Rejected: r.rejected / max(r.arrived, 1),
		Late: r.late / max(r.arrived, 1), Served: r.served / max(r.arrived, 1), Limit: r.limits / max(r.looks, 1),
	}
	sum, squares := 0.0, 0.0
	for i := range r.clients {
		n := r.clients[i].served
		r.clients[i].served = 0
		sum, squares = sum+n, squares+n*n
	}
	res.Jain = sum * sum / max(float64(len(r.clients))*squares, 1)
	r.measured = measured{}
	return res
}

// Mean returns the mean of results.
func Mean(results []Result) (m Result) {
	n := float64(len(results))
	for _, r := range results {
		m.Goodput += r.Goodput / n
		m.Latency += r.Latency / n
		m.Refused += r.Refused / n
		m.Rejected += r.Rejected / n
		m.Late += r.Late / n
		m.Served += r.Served / n
		m.Jain += r.Jain / n
		m.Limit += r.Limit / n
	}
	return m
}

// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package sim

import (
	"errors"
	"fmt"
	"math"
	"math/rand/v2"
	"slices"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/belfry-go/belfry/internal/agenda"
)

// Options are what a run has besides its scenario and its policy.
type Options struct {
	// Calls is the number of measured calls, at least 1. A scenario whose faults
	// come periodically is measured for whole periods, which makes it more.
	Calls int
	// Seed determines the run. Runs of one scenario with one seed have the same
	// arrivals, the same work in each call and the same faults, whatever the
	// policy.
	Seed uint64

	// span, if not 0, is how long calls are measured, however many they are.
	span time.Duration
	// observe, if not nil, is told of each call when it is sent, warm-up included.
	observe func(now time.Duration, s *server)
	// called is observe with the zone of the client.
	called func(now time.Duration, zone int, s *server)
}

// Result is what the measured calls of a run met with.
type Result struct {
	Calls   int // measured
	Failed  int // of these, answered with an error; they have no latency
	Expired int // of these, given up at the deadline, which is their latency

	// Least and Most are the least and the greatest share of the calls that a server
	// got of those that are listed at the end, in units of its fair share, which is in
	// proportion to its weight.
	Least, Most float64
	// Home is the share of the calls that stayed in their zone, and HomeOf that of the
	// calls from each zone. They are 0 where a scenario has no zones.
	Home   float64
	HomeOf []float64
	// Crowd is the most calls of the last method that a server had in flight, in units of
	// the mean. Beside is how often another call went to a server that had one, in ratio to
	// one that had none. They are 0 unless the scenario shows them.
	Crowd, Beside float64

	// Elapsed is the time in which they were sent.
	Elapsed time.Duration

	latencies []int64 // sorted
}

// Percentile returns the latency that the share p of the calls did not exceed,
// p from 0 to 1. It is exact. It returns 0 if there was no call with a latency.
func (r *Result) Percentile(p float64) time.Duration {
	if len(r.latencies) == 0 {
		return 0
	}
	i := int(math.Ceil(p*float64(len(r.latencies)))) - 1
	return time.Duration(r.latencies[min(max(i, 0), len(r.latencies)-1)])
}

// Mean returns the mean latency.
func (r *Result) Mean() time.Duration {
	var sum float64
	for _, l := range r.latencies {
		sum += float64(l)
	}
	return time.Duration(sum / float64(max(len(r.latencies), 1)))
}

// Run simulates the scenario under the policy.
func Run(s Scenario, p Policy, o Options) (*Result, error) {
	if s.Calls > 0 {
		o.Calls = s.Calls
	}
	if o.Calls < 1 && o.span == 0 {
		return nil, fmt.Errorf("sim: Options.Calls: %d, must be at least 1", o.Calls)
	}
	if err := s.validate(); err != nil {
		return nil, err
	}
	c := newCluster(s, o)
	defer c.close()
	if err := c.start(p); err != nil {
		return nil, fmt.Errorf("sim: %s under %s: %w", s.Name, p.Name, err)
	}
	if err := c.run(); err != nil {
		return nil, fmt.Errorf("sim: %s under %s: %w", s.Name, p.Name, err)
	}
	c.result.Elapsed = time.Duration(c.end - c.begin)
	c.shares()
	c.stayed()
	c.crowd.result(&c.result)
	slices.Sort(c.result.latencies)
	return &c.result, nil
}

// shares sets what the servers got.
func (c *cluster) shares() {
	var weights float64
	for _, s := range c.servers {
		weights += float64(s.weight)
	}
	c.result.Least = math.Inf(1)
	for _, s := range c.servers {
		share := float64(s.sent) / float64(c.result.Calls) * weights / float64(s.weight)
		c.result.Least, c.result.Most = min(c.result.Least, share), max(c.result.Most, share)
	}
}

// stayed sets what stayed in its zone.
func (c *cluster) stayed() {
	if len(c.scenario.Zones) == 0 {
		return
	}
	home, all := 0, 0
	for _, z := range c.zones {
		c.result.HomeOf = append(c.result.HomeOf, float64(z.home)/float64(max(z.sent, 1)))
		home, all = home+z.home, all+z.sent
	}
	c.result.Home = float64(home) / float64(max(all, 1))
}

// zone counts the measured calls of a zone, and those of them that stayed.
type zone struct{ sent, home int }

// crowd is what measured calls met of the calls of the last method.
type crowd struct {
	most, sum, servers float64
	// Of calls of other methods, by whether a server has a call of the last: those that were
	// sent to one that has, and how many they could have been sent to.
	sent, chances [2]float64
}

// meet looks at the servers when a call is sent to one of them.
func (w *crowd) meet(k *call, all []*server) {
	for _, s := range all {
		n := float64(s.last)
		w.most, w.sum, w.servers = max(w.most, n), w.sum+n, w.servers+1
		if !k.last {
			w.chances[min(s.last, 1)]++
		}
	}
	if !k.last {
		w.sent[min(k.server.last, 1)]++
	}
}

func (w *crowd) result(r *Result) {
	if w.sum > 0 {
		r.Crowd = w.most / (w.sum / w.servers)
		r.Beside = w.sent[1] / w.chances[1] / (w.sent[0] / w.chances[0])
	}
}

const (
	defaultMethod = "/belfry.sim/Call" // where a scenario has no methods
	watch         = "/belfry.sim/Watch"
)

// cluster is a run: the servers, the clients, the calls between them, and the
// clock. A single goroutine uses it.
type cluster struct {
	scenario Scenario
	options  Options
	now      int64
	agenda   agenda.Agenda[handler]
	err      error // ends the run

	// Streams of random numbers apart, so that what a policy draws changes
	// neither the calls nor the faults.
	calls, faults, choice *rand.Rand

	servers []*server          // those that are listed, the oldest first
	byAddr  map[string]*server // those that ever were
	clients []*client
	zones   []zone
	crowd   crowd
	expiry  agenda.Queue[expiry] // the deadlines of the calls in flight, in order
	idle    []*call              // to be used again
	callID  uint64

	rate    float64 // arrivals per nanosecond, of an open loop
	arrival uint64  // the number of the valid arrival event

	sent     int   // calls so far
	begin    int64 // when calls begin to be measured
	end      int64 // and when no more are; math.MaxInt64 while not known
	measured int   // measured calls in flight
	result   Result
}

// client is a client with a policy of its own. The oracle is one for all.
type client struct {
	chooser
	zone int
}

// expiry is the time at which a client gives a call up.
type expiry struct {
	at   int64
	call *call
	id   uint64
}

// call is a call from its beginning until neither the client nor a server knows
// of it any more. One whose reply arrives is used again.
type call struct {
	cluster *cluster
	id      uint64
	client  *client
	server  *server
	sentAt  int64
	there   int64 // time on the network to the server
	back    int64 // and from it
	method  string
	last    bool    // it is the last of the scenario's methods
	work    float64 // nanoseconds at speed 1
	coins   uint64  // decide for a server that fails a part of its calls
	doneAt  float64 // reading of the server's clock at which it is done

	measured bool
	arrived  bool // at the server
	failed   bool // by the server
	lost     bool // there will be no reply
	over     bool // for the client
	done     doneFunc
	requests int // others at the server when it replied
	context  callContext

	stream bool
	silent bool              // a stream that is never answered
	opened grpc.ClientStream // nil if the policy is not told that it is a stream
}

func newCluster(s Scenario, o Options) *cluster {
	stream := func(n uint64) *rand.Rand { return rand.New(rand.NewPCG(o.Seed, n)) }
	c := &cluster{
		scenario: s,
		options:  o,
		calls:    stream(1),
		faults:   stream(2),
		choice:   stream(3),
		byAddr:   make(map[string]*server),
		begin:    int64(s.WarmUp),
		end:      math.MaxInt64,
	}
	if s.law == nil {
		c.scenario.law = lognormal
	}
	c.zones = make([]zone, max(len(s.Zones), 1))
	for i := range s.Servers {
		speed := 1.0
		if len(s.Speeds) > 0 {
			speed = s.Speeds[i%len(s.Speeds)]
		}
		c.addServer(speed)
	}
	return c
}

// addServer makes a server and lists it. The clients hear of it at their next
// update.
func (c *cluster) addServer(speed float64) *server {
	workers := c.scenario.workers(len(c.byAddr))
	s := &server{
		zone:    c.scenario.zone(len(c.byAddr)),
		cluster: c,
		addr:    fmt.Sprintf("server-%d", len(c.byAddr)),
		workers: workers,
		sharing: c.scenario.Sharing,
		speed:   speed,
		clockAt: c.now,
		free:    make([]float64, workers),
		weight:  c.scenario.weight(len(c.byAddr)),
	}
	c.servers = append(c.servers, s)
	c.byAddr[s.addr] = s
	return s
}

// removeOldest takes the oldest server off the list. It finishes what it has.
func (c *cluster) removeOldest() { c.servers = slices.Delete(c.servers, 0, 1) }

// update tells the clients which servers are listed. Between two updates at most
// one should leave: a policy may take leave of several in any order, and the run
// would depend on it.
func (c *cluster) update() {
	for _, cl := range c.clients {
		if err := cl.update(); err != nil && c.err == nil {
			c.err = err
		}
	}
}

// after schedules f.
func (c *cluster) after(d time.Duration, f func()) { c.agenda.Add(c.now+int64(d), action(f)) }

// start makes the clients, and schedules the faults and the first calls.
func (c *cluster) start(p Policy) error {
	shared := &oracle{cluster: c}
	for i := range c.scenario.Clients {
		zone := i % len(c.zones)
		if p.Balancer == "" {
			c.clients = append(c.clients, &client{shared, zone})
			continue
		}
		b, err := newBalanced(c, p, i)
		if err != nil {
			return err
		}
		c.clients = append(c.clients, &client{b, zone})
	}
	if c.scenario.faults != nil {
		c.scenario.faults(c)
	}
	if c.options.span > 0 {
		c.end = c.begin + int64(c.options.span)
	}
	if n := c.scenario.InFlight; n > 0 {
		for i := range n {
			c.send(c.clients[i%len(c.clients)])
		}
		return nil
	}
	c.setRate(c.scenario.rate())
	if c.options.span > 0 {
		return nil
	}
	span := float64(c.options.Calls) / c.rate
	if period := float64(c.scenario.Period); period > 0 {
		span = math.Ceil(span/period) * period
	}
	c.end = c.begin + int64(span)
	return nil
}

func (c *cluster) close() {
	for _, cl := range c.clients {
		cl.close()
	}
}

// run lets time pass until the last measured call is over.
func (c *cluster) run() error {
	for c.err == nil && (c.now < c.end || c.measured > 0) {
		switch {
		case c.expiry.Len() > 0 && (c.agenda.Len() == 0 || c.expiry.Front().at <= c.agenda.Next().At):
			e := c.expiry.Pop()
			if e.call.id == e.id && !e.call.over {
				c.now = e.at
				e.call.finish(errDeadline)
			}
		case c.agenda.Len() > 0:
			e := c.agenda.Pop()
			c.now = e.At
			e.Do.fire(e.Number)
		default:
			return errors.New("all calls wait for ever: they need a deadline")
		}
	}
	return c.err
}

// setRate changes the rate of an open loop. Waiting for the next arrival starts
// again, which is the same for an exponential law.
func (c *cluster) setRate(perNanosecond float64) {
	c.rate = perNanosecond
	c.arrival = c.agenda.Add(c.now+c.exponential(1/c.rate), c)
}

// fire is the next arrival of an open loop.
func (c *cluster) fire(number uint64) {
	if number != c.arrival {
		return
	}
	cl := c.caller()
	c.arrival = c.agenda.Add(c.now+c.exponential(1/c.rate), c)
	c.send(cl)
}

// caller returns the client of a call.
func (c *cluster) caller() *client {
	n, zones := len(c.clients), len(c.zones)
	if len(c.scenario.Demand) == 0 {
		return c.clients[c.calls.IntN(n)]
	}
	z, u := 0, c.calls.Float64()
	for ; z < zones-1; z++ {
		if u -= c.scenario.Demand[z]; u < 0 {
			break
		}
	}
	in := (n - z + zones - 1) / zones // clients z, z+zones, …
	return c.clients[z+zones*c.calls.IntN(in)]
}

func (c *cluster) exponential(mean float64) int64 {
	return int64(math.Round(c.calls.ExpFloat64() * mean))
}

// newCall returns a call of a client.
func (c *cluster) newCall(cl *client) *call {
	var k *call
	if n := len(c.idle); n > 0 {
		k = c.idle[n-1]
		c.idle = c.idle[:n-1]
	} else {
		k = &call{}
	}
	c.callID++
	*k = call{cluster: c, id: c.callID, client: cl, sentAt: c.now}
	return k
}

// open opens a stream of the first client, which is not measured, and returns its server.
// It draws no numbers, because how many streams a scenario opens may depend on the policy.
// It is for open loops only.
func (c *cluster) open(answered bool) *server {
	k := c.newCall(c.clients[0])
	k.method, k.stream, k.silent = watch, true, !answered
	if answered {
		k.work = float64(c.scenario.Mean)
	}
	k.there, k.back = int64(c.scenario.Network), int64(c.scenario.Network)
	c.dispatch(k)
	return k.server
}

// send begins a call.
func (c *cluster) send(cl *client) {
	k := c.newCall(cl)
	sc := &c.scenario
	k.work = sc.law(c.calls) * float64(sc.Mean)
	if k.method = defaultMethod; len(sc.Methods) > 0 {
		last := len(sc.Methods) - 1
		m := &sc.Methods[last]
		for i, u := 0, c.calls.Float64(); i < len(sc.Methods); i++ {
			if u -= sc.Methods[i].Share; u < 0 {
				m = &sc.Methods[i]
				break
			}
		}
		k.method, k.work, k.stream, k.last = m.Name, k.work*m.Work, m.Stream, m == &sc.Methods[last]
	}
	k.there = int64(sc.Network) + c.exponential(float64(sc.Jitter))
	k.back = int64(sc.Network) + c.exponential(float64(sc.Jitter))
	k.coins = c.calls.Uint64()

	c.sent++
	if sc.WarmUpCalls > 0 && c.sent == sc.WarmUpCalls {
		c.begin = min(c.begin, c.now)
	}
	if k.measured = c.now >= c.begin && c.now < c.end; k.measured {
		c.measured++
		c.result.Calls++
		if sc.InFlight > 0 && c.options.span == 0 && c.result.Calls == c.options.Calls {
			c.end = c.now
		}
	}
	c.dispatch(k)
}

// dispatch sends the call to a server of its client's choice.
func (c *cluster) dispatch(k *call) {
	sc, cl := &c.scenario, k.client
	s, err := cl.choose(k)
	if err != nil {
		c.err = err
		return
	}
	k.server = s
	if k.measured && sc.Show&ShowBeside != 0 {
		c.crowd.meet(k, c.servers)
	}
	if k.last {
		s.last++
	}
	if k.stream {
		s.streams++
	}
	if s.zone != cl.zone {
		k.there += int64(sc.Between)
		k.back += int64(sc.Between)
	}
	s.onWire++
	if k.measured {
		s.sent++
		z := &c.zones[cl.zone]
		z.sent++
		if s.zone == cl.zone {
			z.home++
		}
	}
	if c.options.observe != nil {
		c.options.observe(time.Duration(c.now), s)
	}
	if c.options.called != nil {
		c.options.called(time.Duration(c.now), cl.zone, s)
	}
	c.agenda.Add(c.now+k.there, k)
	if sc.Deadline > 0 && !k.stream {
		c.expiry.Push(expiry{c.now + int64(sc.Deadline), k, k.id})
	}
}

// fire is the call's arrival at the server, or that of the reply at the client.
func (k *call) fire(uint64) {
	if !k.arrived {
		k.arrived = true
		k.server.receive(k)
		return
	}
	switch {
	case k.over:
	case k.failed:
		k.finish(errUnavailable)
	default:
		k.finish(nil)
	}
	if !k.stream { // A stream is still open.
		k.cluster.idle = append(k.cluster.idle, k)
	}
}

// reply sends the reply off, with a report of the server's load.
func (k *call) reply() {
	k.requests = len(k.server.running) + k.server.waiting.Len()
	k.cluster.agenda.Add(k.cluster.now+k.back, k)
}

// What a policy gets to see of calls that fail.
var (
	errUnavailable = status.Error(codes.Unavailable, "the server fails at once")
	errDeadline    = status.Error(codes.DeadlineExceeded, "the client gave up")
)

// finish ends the call for the client, or is the first response of a stream.
func (k *call) finish(err error) {
	c := k.cluster
	k.over = true
	k.client.finished(k, err)
	if k.last && !k.stream {
		k.server.last--
	}
	if k.measured {
		c.measured--
		if k.failed && err != errDeadline {
			c.result.Failed++
		} else if !k.last || c.scenario.Show&ShowBeside == 0 {
			c.result.latencies = append(c.result.latencies, c.now-k.sentAt)
		}
		if err == errDeadline {
			c.result.Expired++
		}
	}
	if c.scenario.InFlight > 0 {
		c.send(k.client)
	}
}

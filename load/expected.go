// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package load

import (
	"cmp"
	"math"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/belfry-go/belfry/internal/slab"
)

// ExpectedLatencyConfig are the parameters of [ExpectedLatency]. Start from
// [DefaultExpectedLatencyConfig].
type ExpectedLatencyConfig struct {
	// PriorSamples (n0) is how many samples the mean of all endpoints counts as
	// beside an endpoint's own, where latencies do not vary. Default 1, above 0, at
	// most 1000.
	PriorSamples float64
	// SpreadPrior is how much more the prior counts where latencies vary: n0 times
	// 1 + SpreadPrior*v, with v the variance of the latencies of one endpoint, divided
	// by the square of their mean. Default 0.5, from 0 to 100.
	SpreadPrior float64
	// MinSpread is the least v that is believed. Default 0.25, from 0 to 100.
	MinSpread float64
	// QueueExponent (theta) says how much of a latency is owed to the attempts that
	// were in flight when it began: it is divided by (pending+1)^theta, so that
	// queueing is not counted twice. Default 0.5, from 0 (none) to 1 (all).
	QueueExponent float64
	// KeepSamples (keep) is the number of samples in which the weight of older
	// ones falls to 1/e. Default 32, from 1 to 1e6.
	KeepSamples float64
	// ForgetRounds (ticks) is the number of rounds, of one sample per endpoint of
	// the channel each, in which an endpoint without samples of its own is
	// forgotten to 1/e. Default 40, above 0, at most 1e6.
	ForgetRounds float64
	// ForgetAfter (tau) is the time in which an endpoint without samples is
	// forgotten to 1/e, resolved to about a millisecond. Default 60 s, must be
	// above 0.
	ForgetAfter time.Duration
	// FailurePenalty (fail) is what a failed attempt counts as, however fast it
	// failed, as a multiple of what an average endpoint costs. Default 10, from 1
	// to 1e6.
	FailurePenalty float64
	// FirstFailure is what a failed attempt counts as at least while no latency is
	// known yet. Default 1 s, must be above 0.
	FirstFailure time.Duration
	// SampleLimit bounds the latency of one attempt, as a multiple of the average,
	// so that one answer after an hour is forgotten in minutes. Default 20, from 1
	// to 1e6.
	SampleLimit float64
	// AgeLimit (old) bounds the age at which an attempt in flight counts, as a
	// multiple of the mean latency. Default 20, from 1 to 1e6.
	AgeLimit float64
	// StreamAgeLimit bounds it for streams that have no response yet: a stream may
	// have nothing to say. Default 1, from 0 to 1e6. A stream that is older than
	// AgeLimit counts as one that is open.
	StreamAgeLimit float64
	// SlowMethod is how many times the average latency a method takes whose attempts
	// in flight do not count for others: an upload of ten seconds does not make a
	// server busy for lookups of a millisecond. Default 64, from 1 to 1e6.
	SlowMethod float64
	// MaxMethods is the number of methods that have a mean of their own. All others
	// share one. Default 100, from 0 to 10,000.
	MaxMethods int
	// Reports says what is taken from the reports of servers. Default the zero value:
	// nothing.
	Reports ReportsConfig
}

// DefaultExpectedLatencyConfig returns the defaults. They were chosen by
// simulation over some forty kinds of clusters and faults.
func DefaultExpectedLatencyConfig() ExpectedLatencyConfig {
	return ExpectedLatencyConfig{
		PriorSamples:   1,
		SpreadPrior:    0.5,
		MinSpread:      0.25,
		QueueExponent:  0.5,
		KeepSamples:    32,
		ForgetRounds:   40,
		ForgetAfter:    time.Minute,
		FailurePenalty: defaultFailurePenalty,
		FirstFailure:   time.Second,
		SampleLimit:    20,
		AgeLimit:       20,
		StreamAgeLimit: 1,
		SlowMethod:     64,
		MaxMethods:     100,
	}
}

func (c ExpectedLatencyConfig) validate() error {
	return cmp.Or(
		checkPositive("priorSamples", c.PriorSamples, 1000),
		checkRange("spreadPrior", c.SpreadPrior, 0, 100),
		checkRange("minSpread", c.MinSpread, 0, 100),
		checkRange("queueExponent", c.QueueExponent, 0, 1),
		checkRange("keepSamples", c.KeepSamples, 1, 1e6),
		checkPositive("forgetRounds", c.ForgetRounds, 1e6),
		checkDuration("forgetAfter", c.ForgetAfter),
		checkFailurePenalty(c.FailurePenalty),
		checkDuration("firstFailure", c.FirstFailure),
		checkRange("sampleLimit", c.SampleLimit, 1, 1e6),
		checkRange("ageLimit", c.AgeLimit, 1, 1e6),
		checkRange("streamAgeLimit", c.StreamAgeLimit, 0, 1e6),
		checkRange("slowMethod", c.SlowMethod, 1, 1e6),
		checkRange("maxMethods", float64(c.MaxMethods), 0, 10_000),
		c.Reports.validate(),
	)
}

// ExpectedLatency is what one more attempt to an endpoint is expected to take:
//
//	load = L * (q + 1)
//	L    = (S*f + A + n*G) / (N*f + n)
//
// Per endpoint:
//
//   - q is the number of attempts in flight to the endpoint, divided by its weight. If
//     servers report the requests that they have, those of other clients are added: see
//     [ReportsConfig]. What a server reports drifts to the mean of all within half a
//     latency. Latencies are divided for one's own attempts alone.
//   - S and N are the sum and the number of its latencies. Each latency is
//     divided by (q+1)^theta, with the attempts in flight when it began: the
//     price of a latency per attempt in flight. And it is multiplied by G/g, with g
//     the mean of such divided latencies of its method: a slow method does not make
//     its endpoint look slow. It counts up to SampleLimit times G.
//   - A is the sum of the ages of its attempts in flight, each divided and
//     multiplied alike. They have no latency yet, but they took that long already,
//     so an endpoint that answers nothing costs more by the moment; nothing has to
//     time out first. An age counts up to old times the mean latency, the undivided
//     one, and of a method that takes more than SlowMethod times G only from that mean
//     on.
//   - G is the latency of the average call of the channel: the geometric mean of
//     the methods' means g, each weighed by how often the method is called. They are
//     moving means of at most 200 samples. A newcomer costs what the average
//     endpoint does, so it is neither flooded nor starved.
//   - n = n0*(1 + SpreadPrior*v), with v the variance of the latencies of one
//     endpoint, divided by the square of their mean: where single latencies say little,
//     the prior counts more. It is the same for all endpoints, and learnt from those of
//     at least four samples. How much endpoints differ from each other is not in it.
//   - f forgets: exp(-t/tau - c/(ticks*n)), t after and c samples of the whole
//     channel after the endpoint's last sample, with n endpoints. At each sample
//     S and N are multiplied by f*(1-1/keep). An endpoint that is not heard of
//     drifts back to the average and is tried again.
//
// The standard error of L, as a part of it, is sqrt(v/(N*f + n)). Costs that differ
// by less are equal, see [Estimate].
//
// A failure counts as a latency of at least fail times what an average endpoint
// costs, its attempts in flight included. An attempt never sent counts as none.
//
// Of an attempt cancelled by its caller, or whose caller's deadline passed, only
// the age is known. It counts as a latency, up to the same limit as the ages in
// flight, if it is above the L that the samples alone make, and as none otherwise:
// to be given up early says nothing, and to be given up late must not undo what
// the age said a moment before. Where calls are hedged, the attempts at a server
// that stalls end no other way.
//
// A stream is an attempt in flight until its first response, and that is its
// latency. Until then its age counts up to StreamAgeLimit; when it has waited for
// longer than AgeLimit it says nothing any more.
//
// Attempts of a method that takes more than SlowMethod times G do not count in the
// q of others. For such a method itself, the class 1, all attempts count.
//
// L is the posterior mean of an exponential law under a conjugate prior, with
// right-censored observations. The formula and its constants are belfry's own.
type ExpectedLatency struct {
	MetricBase

	// These are read at every pick, and written now and then.
	params    atomic.Pointer[expectedParams]
	methods   atomic.Pointer[methods]
	anySlow   atomic.Bool
	unit      atomic.Uint64        // G as float64 bits, 0 before the first latency
	spread    atomic.Uint64        // v, and the number of samples that it covers, two float32
	queue     fleet                // its second mean is that of the attempts in flight
	undivided [kinds]atomic.Uint64 // the mean latencies as they are, as float64 bits
	reporting reporting
	// samples counts the samples of the channel.
	samples atomic.Uint64
	// perSample is 1/(ticks*n) as float64 bits: what one sample of the channel
	// takes from the memory of each endpoint.
	perSample atomic.Uint64

	// mu guards meters, setting params and perSample by size, which belong
	// together, and replacing methods.
	mu     sync.Mutex
	size   int // endpoints of the channel
	meters slab.Slab[expectedMeter]
}

// Kinds of attempts, by how their ages are bounded.
const (
	usual   = iota
	slow    // of a slow method
	streams // streams without a response
	unknown // of a method that was not answered yet, when others were
	kinds
)

// slowClass is the class of calls of a slow method.
const slowClass Class = 1

// expectedParams are the parameters in the form in which the hot path needs
// them. Immutable.
type expectedParams struct {
	prior        float64 // n0
	spreadPrior  float64
	minSpread    float64
	keep         float64 // 1 - 1/keep
	rate         float64 // 1/tau, per unit of heard
	rounds       float64 // 1/ticks
	penalty      float64 // fail
	firstFailure float64
	sampleLimit  float64
	ageLimit     float64 // old
	streamLimit  float64
	slowMethod   float64
	methods      int     // and the one of all others
	exponent     float64 // theta
	inFlight     string  // what reports have it in; none if empty
	reportsKeep  float64 // keep where all that servers have is from others
	expiry       float64 // of reports, in ticks
	blackout     float64
	discounts    [256]float32
}

// discount returns (queue+1)^-theta.
func (p *expectedParams) discount(queue float64) float64 {
	i := int(queue)
	if i >= len(p.discounts)-1 {
		return math.Pow(queue+1, -p.exponent)
	}
	d := float64(p.discounts[i])
	if f := queue - float64(i); f != 0 {
		d += (float64(p.discounts[i+1]) - d) * f
	}
	return d
}

// NewExpectedLatency returns the Metric, or an error that names the field, its
// value and the rule it breaks.
func NewExpectedLatency(c ExpectedLatencyConfig) (*ExpectedLatency, error) {
	e := &ExpectedLatency{}
	e.methods.Store(&methods{all: []*method{{}}})
	if err := e.Reconfigure(c); err != nil {
		return nil, err
	}
	return e, nil
}

// Reconfigure changes the parameters while attempts run. The Meters keep what
// they know. On error nothing changes. Methods that have a mean of their own keep
// it.
func (e *ExpectedLatency) Reconfigure(c ExpectedLatencyConfig) error {
	if err := c.validate(); err != nil {
		return err
	}
	p := &expectedParams{
		prior:        c.PriorSamples,
		spreadPrior:  c.SpreadPrior,
		minSpread:    c.MinSpread,
		keep:         1 - 1/c.KeepSamples,
		rate:         (1 << heardUnitBits) / float64(c.ForgetAfter),
		rounds:       1 / c.ForgetRounds,
		penalty:      c.FailurePenalty,
		firstFailure: float64(c.FirstFailure),
		sampleLimit:  c.SampleLimit,
		ageLimit:     c.AgeLimit,
		streamLimit:  c.StreamAgeLimit,
		slowMethod:   c.SlowMethod,
		methods:      c.MaxMethods + 1,
		exponent:     c.QueueExponent,
	}
	if r := c.Reports; r.InFlight != "" {
		p.inFlight, p.exponent, p.reportsKeep = r.InFlight, r.QueueExponent, 1-1/r.KeepSamples
		p.expiry, p.blackout = float64(r.Expiry>>tickBits), float64(r.Blackout>>tickBits)
	}
	for q := range p.discounts {
		p.discounts[q] = float32(math.Pow(float64(q)+1, -p.exponent))
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	e.params.Store(p)
	e.resizeLocked(0)
	return nil
}

// resizeLocked counts d more endpoints.
func (e *ExpectedLatency) resizeLocked(d int) {
	e.size += d
	perSample := e.params.Load().rounds / float64(max(e.size, 1))
	e.perSample.Store(math.Float64bits(perSample))
}

// NewMeter returns the Meter of one more endpoint.
func (e *ExpectedLatency) NewMeter(Endpoint) Meter {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.resizeLocked(1)
	m := e.meters.New()
	m.metric = e
	return m
}

// Class returns 1 for a method that is slow, see ExpectedLatency, and else 0.
func (e *ExpectedLatency) Class(name string, stream bool) Class {
	if !stream && e.special(name) {
		return slowClass
	}
	return 0
}

// special reports whether the method is slow, or may be, because it was not
// answered yet.
func (e *ExpectedLatency) special(name string) bool {
	m := e.methods.Load().find(name)
	return m == nil || m.fleet.means.Load() == 0 || e.anySlow.Load() && e.slow(m)
}

func (e *ExpectedLatency) slow(m *method) bool {
	return m.fleet.mean() > e.params.Load().slowMethod*math.Float64frombits(e.unit.Load())
}

// g returns G, at least 1: before the first latency the prior is one nanosecond,
// so that every endpoint costs as many as it has attempts in flight.
func (e *ExpectedLatency) g() float64 { return max(math.Float64frombits(e.unit.Load()), 1) }

// v returns the variance of latencies in units of their mean squared.
func (e *ExpectedLatency) v(p *expectedParams) float64 {
	v, _ := floats32(e.spread.Load())
	return max(v, p.minSpread)
}

// expectedMeter is the state of one endpoint. A call to one that has nothing else in flight needs
// the first of its four cache lines.
//
// What is in flight is counted exactly: it is zero when nothing is. The rest may
// lose an update to a race, which costs one sample or misjudges one pick, and is
// overwritten soon.
type expectedMeter struct {
	MeterBase
	metric *ExpectedLatency
	mean   atomic.Uint64 // S and N, two float32
	heard  atomic.Uint64 // the last sample: when, in heardUnitBits, and which of the channel's, 32 bits each
	ages   [kinds]ages

	reported  atomic.Uint64 // requests of others per weight, and the tick of the report; 0 before the first
	reporting atomic.Uint32 // the tick of the first report
	weight    atomic.Uint32 // that of the last attempt as float32 bits, 0 before the first; only with reports
	_         [24]byte
}

// Times of samples are kept in units of about a millisecond. They wrap: after 26
// days without a sample an endpoint's last one counts as new.
const heardUnitBits = 20

// Load implements [Meter].
func (m *expectedMeter) Load(q Query) Estimate {
	e := m.metric
	p := e.params.Load()
	sum, number, waiting := m.latency(p, &q)
	others := 0.0
	if p.inFlight != "" {
		others = m.others(p, q.Now)
	}
	estimate := Estimate{
		Cost:  sum / number * (m.queue(&q, waiting.left) + others + 1),
		Error: math.Sqrt(e.v(p) / number),
		Queue: m.queue(&q, waiting.old) + others,
		Heard: Instant(m.heard.Load() >> 32 << heardUnitBits),
		Good:  restGood,
	}
	if p.inFlight != "" {
		estimate.Good = reportGood
	}
	if waiting.weight > 0 {
		// Ages add up to a fiftieth of the cost in this time.
		estimate.Good = min(max(time.Duration(sum/(50*waiting.weight)), 1<<tickBits), estimate.Good)
	}
	return estimate
}

// queue returns the attempts in flight that count for a call, per weight, without
// those of slow methods and so many that are left out.
func (m *expectedMeter) queue(q *Query, left int) float64 {
	if q.Class == slowClass || q.InFlight == 0 { // what is in flight stands in other cache lines
		return q.queue()
	}
	_, slow := split(m.ages[slow].total())
	left += slow
	return perWeight(max(q.InFlight-left, 0), q.Weight)
}

// restGood is how long an Estimate is good with nothing in flight. Then it changes
// by what others do, and by what is forgotten.
const restGood = 16 * time.Millisecond

// reportGood is how long an Estimate is good while reports are forgotten.
const reportGood = time.Millisecond / 2

// Inspect implements [Meter].
func (m *expectedMeter) Inspect(q Query) Details {
	p := m.metric.params.Load()
	sum, number, _ := m.latency(p, &q)
	_, n := floats32(m.mean.Load())
	n *= expNeg(m.metric.unheard(p.rate, q.Now, m.heard.Load()))
	if number == 0 || m.metric.unit.Load() == 0 {
		return Details{Samples: n}
	}
	return Details{Latency: time.Duration(sum / number), Samples: n}
}

// latency returns L as a sum of times and a number of samples, and what of it is of
// the attempts in flight.
func (m *expectedMeter) latency(p *expectedParams, q *Query) (sum, number float64, w waiting) {
	e := m.metric
	prior := p.prior * (1 + p.spreadPrior*e.v(p))
	sum, number = prior*e.g(), prior
	if mean := m.mean.Load(); mean != 0 {
		s, n := floats32(mean)
		f := expNeg(e.unheard(p.rate, q.Now, m.heard.Load()))
		sum += s * f
		number += n * f
	}
	if q.InFlight == 0 {
		return sum, number, w
	}
	w = m.waiting(p, q.Now)
	return sum + w.sum, number, w
}

// waiting is what the attempts in flight say of their endpoint.
type waiting struct {
	sum    float64 // of their ages
	weight float64 // of those whose ages are in it
	old    int     // the number of old ones
	left   int     // the number of those that are left out
}

func (m *expectedMeter) waiting(p *expectedParams, now Instant) (w waiting) {
	e := m.metric
	heard := Instant(m.heard.Load() >> 32 << heardUnitBits)
	for kind := range m.ages {
		a := &m.ages[kind]
		if a.total() == 0 {
			continue
		}
		generation := e.maxAge(p, kind)
		limit := generation
		sign := kind == usual || kind == slow
		if !sign {
			limit *= p.streamLimit / p.ageLimit
		}
		sum, weight, old, left := a.sum(now, heard, limit, generation, sign)
		if kind == slow {
			// What little they say before that would keep the many calls of other
			// methods away.
			sum = max(sum-weight*generation/p.ageLimit, 0)
		}
		w.sum += sum
		w.weight += weight
		if kind != slow { // those are left out anyway
			w.old += old
			w.left += left
		}
	}
	return w
}

// maxAge returns the age up to which an attempt in flight counts, in nanoseconds.
// What is not known of a kind is taken from the usual one. While no latency is known
// there is no limit.
func (e *ExpectedLatency) maxAge(p *expectedParams, kind int) float64 {
	for _, u := range []*atomic.Uint64{&e.undivided[kind], &e.undivided[usual]} {
		if mean := math.Float64frombits(u.Load()); mean > 0 {
			return p.ageLimit * mean
		}
	}
	return math.MaxInt64
}

// unheard returns how much is gone of the memory of an endpoint that was heard of
// last at heard, because then f = exp(-unheard). The two are apart so that each can
// be inlined.
func (e *ExpectedLatency) unheard(rate float64, now Instant, heard uint64) float64 {
	t := since32(uint32(now>>heardUnitBits), uint32(heard>>32))
	c := since32(uint32(e.samples.Load()), uint32(heard))
	return t*rate + c*math.Float64frombits(e.perSample.Load())
}

// since32 returns a-b modulo 2^32 if that is below 2^31, and otherwise 0, because
// then a was read a little before b.
func since32(a, b uint32) float64 { return float64(max(int32(a-b), 0)) }

// Start implements [Meter].
func (m *expectedMeter) Start(a *Attempt) Ticket {
	e := m.metric
	p := e.params.Load()
	queue := 0.0
	if a.InFlight > 0 {
		queue = m.queue(&a.Query, m.waiting(p, a.Now).old)
	}
	if w := math.Float32bits(float32(a.Weight)); p.inFlight != "" && m.weight.Load() != w {
		m.weight.Store(w)
	}
	method := e.method(a.Method)
	kind := usual
	switch {
	case a.Stream:
		kind = streams
	case a.Class == slowClass && e.slow(method):
		kind = slow
	case method.fleet.means.Load() == 0 && e.unit.Load() != 0:
		kind = unknown
	}
	weight := max(uint32(min(weightOne*p.discount(queue)*method.scaled()+0.5, maxWeight)), 1)
	epoch := m.ages[kind].add(weight, a.Now, e.maxAge(p, kind))
	return Ticket{
		Started: a.Now,
		A:       uint64(math.Float32bits(float32(queue)))<<32 | uint64(weight),
		B:       uint64(epoch)<<32 | uint64(method.index)<<2 | uint64(kind),
	}
}

// What Start put into a Ticket.
func (t Ticket) queue() float64 { return float64(math.Float32frombits(uint32(t.A >> 32))) }
func (t Ticket) weight() uint32 { return uint32(t.A) }
func (t Ticket) epoch() uint32  { return uint32(t.B >> 32) }
func (t Ticket) method() int    { return int(uint32(t.B) >> 2) }
func (t Ticket) kind() int      { return int(t.B & 3) }

// answered ends the age of an attempt.
func (m *expectedMeter) answered(t Ticket) {
	m.ages[t.kind()].remove(t.epoch(), t.weight(), t.Started)
}

// Respond implements [Meter].
func (m *expectedMeter) Respond(r Response) {
	m.answered(r.Ticket)
	m.completed(r.Now, r.Ticket)
}

// Finish implements [Meter].
func (m *expectedMeter) Finish(s *Sample) (changed bool) {
	if !s.Responded {
		m.answered(s.Ticket)
	}
	m.report(m.metric.params.Load(), s.Now, s.Report, s.InFlight)
	switch {
	case s.Outcome == Failed:
		changed = m.failed(s)
	case s.Outcome == Completed && !s.Responded:
		changed = m.completed(s.Now, s.Ticket)
	case (s.Outcome == Cancelled || s.Outcome == Expired) && !s.Responded:
		changed = m.givenUp(s.Now, s.Ticket)
	}
	return changed || s.Report != nil
}

// Report implements [Meter].
func (m *expectedMeter) Report(r OutOfBand) {
	m.report(m.metric.params.Load(), r.Now, r.Report, r.InFlight)
}

// Close implements [Meter].
func (m *expectedMeter) Close() {
	m.metric.mu.Lock()
	defer m.metric.mu.Unlock()
	m.metric.resizeLocked(-1)
}

func (m *expectedMeter) completed(now Instant, t Ticket) bool {
	e := m.metric
	p := e.params.Load()
	method := e.methods.Load().all[t.method()]
	latency := t.latency(now)
	divided := latency * p.discount(t.queue())
	n := method.fleet.turn(now)
	if n > 0 {
		m.spread(p, now, min(divided*method.scaled(), p.sampleLimit*e.g()))
		e.learn(method, t, latency, divided, n)
	}
	return m.sample(p, now, min(divided*method.scaled(), p.sampleLimit*e.g()), n)
}

// learn takes a latency, which stands for n, into what all endpoints share.
func (e *ExpectedLatency) learn(method *method, t Ticket, latency, divided float64, n int) {
	method.fleet.observe(divided, t.queue())
	all := e.methods.Load()
	all.called(method, n)
	unit := all.unit()
	e.unit.Store(math.Float64bits(unit))
	all.rescale(unit)
	share := e.queue.observe(divided, t.queue())
	if e.slow(method) != e.anySlow.Load() {
		e.anySlow.Store(slices.ContainsFunc(all.all, e.slow))
	}
	if t.kind() == unknown {
		return // how its method compares to others is known from now on
	}
	u := &e.undivided[t.kind()]
	mean := math.Float64frombits(u.Load())
	if mean == 0 {
		share = 1
	}
	u.Store(math.Float64bits(mean + (latency-mean)*share))
}

// spread takes a latency of the endpoint into the variance v of all. The mean of the c
// samples before is off by v/c itself.
func (m *expectedMeter) spread(p *expectedParams, now Instant, latency float64) {
	e := m.metric
	s, c := floats32(m.mean.Load())
	known := c * expNeg(e.unheard(p.rate, now, m.heard.Load()))
	if known < spreadSamples || s <= 0 {
		return
	}
	d := min(latency*c/s, spreadLimit) - 1
	v, covered := floats32(e.spread.Load())
	covered = min(covered+1, fleetWindow)
	e.spread.Store(bits32(v+(d*d/(1+1/known)-v)/covered, covered))
}

const (
	spreadSamples = 4  // what must be known of an endpoint
	spreadLimit   = 20 // a latency counts up to so many times the endpoint's mean
)

func (m *expectedMeter) failed(s *Sample) bool {
	e := m.metric
	p := e.params.Load()
	latency := p.penalty * e.cost(p, s.Now)
	if latency == 0 {
		latency = p.firstFailure
	}
	method := e.methods.Load().all[s.Ticket.method()]
	if !s.Responded { // the life of a stream after its first response is no latency
		waited := s.Ticket.latency(s.Now) * p.discount(s.Ticket.queue()) * method.scaled()
		if g := math.Float64frombits(e.unit.Load()); g > 0 {
			waited = min(waited, p.sampleLimit*g)
		}
		latency = max(latency, waited)
	}
	return m.sample(p, s.Now, latency, method.fleet.turn(s.Now))
}

func (m *expectedMeter) givenUp(now Instant, t Ticket) bool {
	e := m.metric
	p := e.params.Load()
	g := math.Float64frombits(e.unit.Load())
	if g == 0 {
		return false // no latency is known yet, so none is late
	}
	method := e.methods.Load().all[t.method()]
	limit := e.maxAge(p, t.kind())
	if k := t.kind(); k == streams || k == unknown {
		limit = p.streamLimit / p.ageLimit * limit
	}
	age := min(min(t.latency(now), limit)*p.discount(t.queue())*method.scaled(), p.sampleLimit*g)
	s, n := floats32(m.mean.Load())
	f := expNeg(e.unheard(p.rate, now, m.heard.Load()))
	prior := p.prior * (1 + p.spreadPrior*e.v(p))
	if age*(n*f+prior) > s*f+prior*g {
		return m.sample(p, now, age, method.fleet.turn(now))
	}
	return false
}

// cost returns what the average endpoint costs. Its q attempts in flight are, on
// average, half a latency old, and with many of them their ages outweigh the
// samples that it has, of which it keeps 1/(1-keep).
func (e *ExpectedLatency) cost(p *expectedParams, now Instant) float64 {
	_, queue := fleetMeans(e.queue.means.Load())
	samples := 1/(1-e.keep(p, now)) + 1
	return math.Float64frombits(e.unit.Load()) * (queue + 1) * (1 + queue/2/samples)
}

// sample takes in a latency of the endpoint, which stands for n of the channel, and returns
// whether that changed the mean by more than a fiftieth.
func (m *expectedMeter) sample(p *expectedParams, now Instant, latency float64, n int) (changed bool) {
	f := expNeg(m.metric.unheard(p.rate, now, m.heard.Load())) * m.metric.keep(p, now)
	for {
		old := m.mean.Load()
		s, n := floats32(old)
		if m.mean.CompareAndSwap(old, bits32(s*f+latency, n*f+1)) {
			changed = n < fewSamples || math.Abs(latency*n-s) > s*n/50
			break
		}
	}
	count := m.metric.samples.Load()
	if n > 0 {
		count = m.metric.samples.Add(uint64(n))
	}
	if heard := uint64(now)>>heardUnitBits<<32 | uint64(uint32(count)); m.heard.Load() != heard {
		m.heard.Store(heard)
	}
	return changed
}

// With less than fewSamples each one changes what an endpoint costs.
const fewSamples = 4

// expNeg returns exp(-x) for x >= 0 within 0.02 %: 2^y with the integer part of
// y as the exponent and a polynomial for the fraction. It is several times
// faster than math.Exp, which is exact to the last bit.
func expNeg(x float64) float64 {
	y := x * math.Log2E
	if !(y < 1000) {
		return 0
	}
	whole := int64(y)
	f := float64(whole) + 1 - y // in (0, 1]: 2^-y = 2^f * 2^-(whole+1)
	// A cubic for 2^f that is exact at both ends, so that the result is continuous.
	p := 1 + f*(0.6957+f*(0.2251+f*0.0792))
	return p * math.Float64frombits(uint64(1022-whole)<<52)
}

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
	// PriorSamples (n0) is the weight of the mean of all endpoints in the estimate of one
	// endpoint, in samples, where latencies do not vary. Default 1, above 0, at most
	// 1000.
	PriorSamples float64
	// SpreadPrior is how much this weight grows where latencies vary: it is n0 times
	// 1 + SpreadPrior*v, with v the variance of the latencies of one endpoint, divided
	// by the square of their mean. Default 0.5, from 0 to 100.
	SpreadPrior float64
	// MinSpread is the least v: a smaller measured one counts as this. Default 0.25,
	// from 0 to 100.
	MinSpread float64
	// QueueExponent (theta) is how much of a latency is due to the attempts that were in
	// flight when it began. The latency is divided by (pending+1)^theta, so that waiting
	// behind them is not counted twice. Default 0.5, from 0 (nothing) to 1 (all).
	QueueExponent float64
	// KeepSamples (keep) is the number of samples in which the weight of older ones
	// falls to 1/e. Default 32, from 1 to 1e6.
	KeepSamples float64
	// ForgetRounds (ticks) is the number of rounds after which the weight of an
	// endpoint's samples has fallen to 1/e, if it gets no new ones. A round is as many
	// samples of the channel as it has endpoints. Default 40, above 0, at most 1e6.
	ForgetRounds float64
	// ForgetAfter (tau) is the time after which the weight of an endpoint's samples has
	// fallen to 1/e, if it gets no new ones. It is measured to about a millisecond.
	// Default 60 s, must be above 0.
	ForgetAfter time.Duration
	// FailurePenalty (fail) is the latency that a failed attempt counts as at least, as
	// a multiple of what an average endpoint costs. Default 10, from 1 to 1e6.
	FailurePenalty float64
	// FirstFailure is the latency that a failed attempt counts as at least while no
	// latency is known. Default 1 s, must be above 0.
	FirstFailure time.Duration
	// SampleLimit bounds the latency of one attempt, as a multiple of the latency of the
	// average call, so that one answer after an hour is forgotten in minutes. Default
	// 20, from 1 to 1e6.
	SampleLimit float64
	// AgeLimit (old) bounds the age of an attempt in flight, as a multiple of the mean
	// latency. Default 20, from 1 to 1e6.
	AgeLimit float64
	// StreamAgeLimit bounds the age of streams without a response, because a server may
	// have nothing to send, and of attempts of a method that was never answered. It is a
	// multiple of the mean time to a first response. A stream older than AgeLimit counts
	// as an open stream. Default 1, from 0 to 1e6.
	StreamAgeLimit float64
	// SlowMethod is the multiple of the latency of the average call above which a method
	// is slow. The attempts in flight of slow methods do not count for other calls: an
	// upload of ten seconds does not make a server busy for lookups of a millisecond.
	// Default 64, from 1 to 1e6.
	SlowMethod float64
	// MaxMethods is the number of methods that have a mean of their own. All others
	// share one. Default 100, from 0 to 10,000.
	MaxMethods int
	// Reports says how the reports of servers are used. The default, the zero value, is
	// not at all.
	Reports ReportsConfig
}

// DefaultExpectedLatencyConfig returns the defaults. They were chosen in a simulation
// of some forty kinds of clusters and faults.
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

// ExpectedLatency is how long one more attempt to an endpoint is expected to take, in
// nanoseconds:
//
//	load = L * (q + 1)
//	L    = (S*f + A + n*G) / (N*f + n)
//
// For each endpoint:
//
//   - q is the number of attempts in flight to the endpoint, divided by its weight. If
//     servers report their requests in flight, those of other clients are added: see
//     [ReportsConfig]. A reported number approaches the mean of all servers: its distance
//     falls to 1/e in half a latency.
//   - S and N are the sum and the number of its latencies. Each latency is divided by
//     (q+1)^theta, where q counts this client's attempts that were in flight when the
//     latency began. So waiting behind them is not counted twice. Then it is multiplied
//     by G/g, with g the mean of the divided latencies of its method. So a slow method
//     does not make its endpoint look slow. It counts up to SampleLimit times G.
//   - A is the sum of the ages of its attempts in flight, divided and multiplied in the
//     same way. They have no latency yet, but they took that long already. So an
//     endpoint that does not answer costs more and more, before any timeout. An age
//     counts up to old times the mean latency, which is not divided. That of an attempt of
//     a slow method counts only from this mean on. An attempt of about twice the age up to
//     which it counts does not count at all, not in q either, once the endpoint has
//     answered another one.
//   - G is the latency of the average call of the channel: the geometric mean of
//     the methods' means g, each weighted by how often the method is called. They are
//     moving means of at most 200 samples. A new endpoint costs what the average
//     endpoint costs, so it gets neither too many nor too few calls.
//   - n = n0*(1 + SpreadPrior*v), with v the variance of the latencies of one
//     endpoint, divided by the square of their mean. Where single latencies say little,
//     the prior G counts more. v is the same for all endpoints. It is learnt from
//     endpoints with at least four samples, and does not include how much endpoints
//     differ from each other.
//   - f = exp(-t/tau - c/(ticks*m)) forgets, where t is the time since the endpoint's
//     last sample, c the number of samples of the whole channel since then, and m the
//     number of endpoints. At each sample S and N are multiplied by f*(1-1/keep). An
//     endpoint without samples approaches the average, and is tried again.
//
// The standard error of L, divided by L, is sqrt(v/(N*f + n)). The policy treats costs
// as equal that differ by no more than a few errors, see [Estimate].
//
// A failure counts as a latency of at least fail times what an average endpoint
// costs, its attempts in flight included. An attempt that was not sent does not count.
//
// Of an attempt that its caller cancelled, or whose deadline passed, only the age is
// known. The age counts as a latency, up to the same limit as the ages in flight, if it
// is above the L of the samples alone. Otherwise it does not count. So a call that is
// given up early changes nothing, and one that is given up late does not make the
// endpoint cheaper than its age made it a moment before. Where calls are hedged, all
// attempts to a server that stalls end like this.
//
// A stream is an attempt in flight until its first response, and the time until then is
// its latency. Until then its age counts up to StreamAgeLimit. A stream that has waited
// for longer than AgeLimit does not count.
//
// Attempts of a slow method, which takes more than SlowMethod times G, do not count in
// the q of other calls. For calls of class 1 all attempts count. These are the unary
// calls of slow methods, and of methods that were never answered.
//
// L is the posterior mean of an exponential law under a conjugate prior, with
// right-censored observations. The formula and its constants are belfry's own.
type ExpectedLatency struct {
	MetricBase

	// These are read at every pick, and written much less often.
	params    atomic.Pointer[expectedParams]
	methods   atomic.Pointer[methods]
	anySlow   atomic.Bool
	unit      atomic.Uint64        // G as float64 bits, 0 before the first latency
	spread    atomic.Uint64        // v, and the number of samples that it covers, two float32
	queue     fleet                // only the mean of the attempts in flight is used
	undivided [kinds]atomic.Uint64 // the mean latencies, not divided, as float64 bits
	reporting reporting
	// samples counts the samples of the channel.
	samples atomic.Uint64
	// perSample is 1/(ticks*m) as float64 bits: how much each endpoint forgets at one
	// sample of the channel.
	perSample atomic.Uint64

	// mu guards size and meters, writing params and perSample, which must fit together,
	// and replacing methods.
	mu     sync.Mutex
	size   int // m
	meters slab.Slab[expectedMeter]
}

// Kinds of attempts in flight. Their ages have different bounds.
const (
	usual   = iota // all others
	slow           // of a slow method
	streams        // streams without a response
	unknown        // of a method that was never answered, while other methods were
	kinds
)

// slowClass is the class of unary calls of methods that are slow or may be.
const slowClass Class = 1

// expectedParams are the parameters in the form in which the hot path needs
// them. Immutable.
type expectedParams struct {
	prior        float64 // n0
	spreadPrior  float64
	minSpread    float64
	keep         float64 // 1 - 1/keep
	rate         float64 // 1/tau, per 2^heardUnitBits ns
	rounds       float64 // 1/ticks
	penalty      float64 // fail
	firstFailure float64
	sampleLimit  float64
	ageLimit     float64 // old
	streamLimit  float64
	slowMethod   float64
	methods      int          // MaxMethods, and one more for all other methods
	exponent     float64      // theta
	inFlight     string       // the metric of a report that has the requests in flight; "" without reports
	reportsKeep  float64      // keep where all requests of the servers are from other clients
	expiry       float64      // in ticks
	blackout     float64      // in ticks
	discounts    [256]float32 // discounts[q] is (q+1)^-theta
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

// NewExpectedLatency returns the Metric. If a field is out of its range the error is a
// *[ConfigError].
func NewExpectedLatency(c ExpectedLatencyConfig) (*ExpectedLatency, error) {
	e := &ExpectedLatency{}
	e.methods.Store(&methods{all: []*method{{}}})
	if err := e.Reconfigure(c); err != nil {
		return nil, err
	}
	return e, nil
}

// Reconfigure changes the parameters while attempts are in flight. The Meters keep what
// they know, and methods that have a mean of their own keep it. If a field is out of its
// range the error is a *[ConfigError], and nothing changes.
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

// resizeLocked adds d to the number of endpoints, and sets perSample.
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

// Class returns 1 for a unary call of a method that is slow, or that was never answered
// and so may be slow. For other calls it returns 0. See [ExpectedLatency].
func (e *ExpectedLatency) Class(name string, stream bool) Class {
	if !stream && e.special(name) {
		return slowClass
	}
	return 0
}

// special reports whether the method is slow, or was never answered and so may be slow.
func (e *ExpectedLatency) special(name string) bool {
	m := e.methods.Load().find(name)
	return m == nil || m.fleet.means.Load() == 0 || e.anySlow.Load() && e.slow(m)
}

func (e *ExpectedLatency) slow(m *method) bool {
	return m.fleet.mean() > e.params.Load().slowMethod*math.Float64frombits(e.unit.Load())
}

// g returns G, at least 1. Before the first latency it is one nanosecond, so that the cost
// of an endpoint is its number of attempts in flight plus one.
func (e *ExpectedLatency) g() float64 { return max(math.Float64frombits(e.unit.Load()), 1) }

// v returns the variance of latencies, divided by the square of their mean.
func (e *ExpectedLatency) v(p *expectedParams) float64 {
	v, _ := floats32(e.spread.Load())
	return max(v, p.minSpread)
}

// expectedMeter is the state of one endpoint, in four cache lines. An attempt to an
// endpoint with nothing else in flight uses only the first.
//
// The weights of attempts in flight are exact. An update of another field may be lost in a
// race. That costs one sample or makes one pick worse, and the next update replaces it.
type expectedMeter struct {
	MeterBase
	metric *ExpectedLatency
	mean   atomic.Uint64 // S and N, two float32
	heard  atomic.Uint64 // the last sample: its time in units of 2^heardUnitBits ns, and its number in the channel, 32 bits each
	ages   [kinds]ages

	reported  atomic.Uint64 // requests of other clients per weight, and the tick of the report; 0 before the first
	reporting atomic.Uint32 // the tick of the first report
	weight    atomic.Uint32 // the weight at the last attempt as float32 bits, 0 before the first; set only with reports
	_         [24]byte
}

// Times of samples are kept in units of about a millisecond. They wrap: after 26 days
// without a sample the last one of an endpoint counts as new.
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
		// In this time the ages grow by a fiftieth of the cost.
		estimate.Good = min(max(time.Duration(sum/(50*waiting.weight)), 1<<tickBits), estimate.Good)
	}
	return estimate
}

// queue returns the number of attempts in flight that count for a call, per weight. For
// calls of class 0 that is without attempts of slow methods, and without left others.
func (m *expectedMeter) queue(q *Query, left int) float64 {
	if q.Class == slowClass || q.InFlight == 0 { // does not read the other cache lines
		return q.queue()
	}
	_, slow := split(m.ages[slow].total())
	left += slow
	return perWeight(max(q.InFlight-left, 0), q.Weight)
}

// restGood is how long an Estimate is good at most. Without attempts in flight it changes
// by the samples of other endpoints, and because samples are forgotten.
const restGood = 16 * time.Millisecond

// reportGood is how long an Estimate is good at most if reports are used.
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

// latency returns L as a sum of times and a number of samples, L = sum/number, and the part
// that comes from the attempts in flight.
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

// waiting is what follows from the attempts in flight. See ages.sum.
type waiting struct {
	sum    float64 // of the weighted ages, in nanoseconds
	weight float64 // of the attempts in sum
	old    int     // the number of old attempts
	left   int     // how many of the old attempts are left out
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
			// The ages count only from the mean latency on. Before, they would keep the many
			// calls of other methods away.
			sum = max(sum-weight*generation/p.ageLimit, 0)
		}
		w.sum += sum
		w.weight += weight
		if kind != slow { // queue leaves all of these out
			w.old += old
			w.left += left
		}
	}
	return w
}

// maxAge returns the age up to which an attempt in flight counts, in nanoseconds. A kind
// without a mean latency has the limit of the usual one. While no latency is known there
// is no limit.
func (e *ExpectedLatency) maxAge(p *expectedParams, kind int) float64 {
	for _, u := range []*atomic.Uint64{&e.undivided[kind], &e.undivided[usual]} {
		if mean := math.Float64frombits(u.Load()); mean > 0 {
			return p.ageLimit * mean
		}
	}
	return math.MaxInt64
}

// unheard returns -ln(f) of an endpoint whose last sample is heard. It is a function
// without the exponential so that it can be inlined.
func (e *ExpectedLatency) unheard(rate float64, now Instant, heard uint64) float64 {
	t := since32(uint32(now>>heardUnitBits), uint32(heard>>32))
	c := since32(uint32(e.samples.Load()), uint32(heard))
	return t*rate + c*math.Float64frombits(e.perSample.Load())
}

// since32 returns a-b modulo 2^32 if that is below 2^31. Otherwise a was read a little
// before b, and it returns 0.
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

// The parts of a Ticket, as Start has set them.
func (t Ticket) queue() float64 { return float64(math.Float32frombits(uint32(t.A >> 32))) }
func (t Ticket) weight() uint32 { return uint32(t.A) }
func (t Ticket) epoch() uint32  { return uint32(t.B >> 32) }
func (t Ticket) method() int    { return int(uint32(t.B) >> 2) }
func (t Ticket) kind() int      { return int(t.B & 3) }

// answered removes the age of an attempt that has an answer or has ended.
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
	n := method.fleet.countOf(now)
	if n > 0 {
		m.spread(p, now, min(divided*method.scaled(), p.sampleLimit*e.g()))
		e.learn(method, t, latency, divided, n)
	}
	return m.sample(p, now, min(divided*method.scaled(), p.sampleLimit*e.g()), n)
}

// learn adds a latency, which counts for n samples, to what all endpoints share.
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
		return // this kind has no mean: the next attempts of the method are of another kind
	}
	u := &e.undivided[t.kind()]
	mean := math.Float64frombits(u.Load())
	if mean == 0 {
		share = 1
	}
	u.Store(math.Float64bits(mean + (latency-mean)*share))
}

// spread adds a latency of the endpoint to the variance v of all endpoints. The mean of the
// known samples before it has a variance of v/known itself, which is divided out.
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
	spreadSamples = 4  // how many samples an endpoint must have
	spreadLimit   = 20 // a latency counts up to this many times the endpoint's mean
)

func (m *expectedMeter) failed(s *Sample) bool {
	e := m.metric
	p := e.params.Load()
	latency := p.penalty * e.cost(p, s.Now)
	if latency == 0 {
		latency = p.firstFailure
	}
	method := e.methods.Load().all[s.Ticket.method()]
	if !s.Responded { // after its first response the duration of a stream is not a latency
		waited := s.Ticket.latency(s.Now) * p.discount(s.Ticket.queue()) * method.scaled()
		if g := math.Float64frombits(e.unit.Load()); g > 0 {
			waited = min(waited, p.sampleLimit*g)
		}
		latency = max(latency, waited)
	}
	return m.sample(p, s.Now, latency, method.fleet.countOf(s.Now))
}

func (m *expectedMeter) givenUp(now Instant, t Ticket) bool {
	e := m.metric
	p := e.params.Load()
	g := math.Float64frombits(e.unit.Load())
	if g == 0 {
		return false // no latency is known that this one could exceed
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
		return m.sample(p, now, age, method.fleet.countOf(now))
	}
	return false
}

// cost returns what the average endpoint costs, in nanoseconds. Its attempts in flight are
// half a latency old on average. If there are many, their ages weigh more than the samples
// that it keeps, which are 1/(1-keep).
func (e *ExpectedLatency) cost(p *expectedParams, now Instant) float64 {
	_, queue := fleetMeans(e.queue.means.Load())
	samples := 1/(1-e.keep(p, now)) + 1
	return math.Float64frombits(e.unit.Load()) * (queue + 1) * (1 + queue/2/samples)
}

// sample adds a latency to the samples of the endpoint. It counts for n samples of the
// channel. sample reports whether it changed the mean by more than a fiftieth.
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

// Of an endpoint with less than fewSamples, each sample counts as a change of the mean.
const fewSamples = 4

// expNeg returns exp(-x) for x >= 0 within 0.02 %. It computes 2^-y: the integer part of y
// is the exponent, and a polynomial gives the fraction. It is several times faster than
// math.Exp, which is exact to the last bit.
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

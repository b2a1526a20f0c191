// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package load

import (
	"math"
	"sync"
	"sync/atomic"
	"time"

	"github.com/belfry-go/belfry/internal/slab"
)

// ExpectedLatencyConfig are the parameters of [ExpectedLatency]. Start from
// [DefaultExpectedLatencyConfig].
type ExpectedLatencyConfig struct {
	// PriorSamples (n0) is how many samples the mean of all endpoints counts as
	// beside an endpoint's own. Default 1, above 0, at most 1000.
	PriorSamples float64
	// QueueExponent (theta) says how much of a latency is owed to the attempts that
	// were in flight when it began: it is divided by (pending+1)^theta, so that
	// queueing is not counted twice. Default 0.5, from 0 (none) to 1 (all).
	QueueExponent float64
	// KeepSamples (keep) is the number of samples in which the weight of older
	// ones falls to 1/e. Default 32, from 1 to 1e6.
	KeepSamples float64
	// ForgetRounds (ticks) is the number of rounds, of one sample per endpoint of
	// the channel each, in which an endpoint without samples of its own is
	// forgotten to 1/e. Default 32, above 0, at most 1e6.
	ForgetRounds float64
	// ForgetAfter (tau) is the time in which an endpoint without samples is
	// forgotten to 1/e, resolved to about a millisecond. Default 60 s, must be
	// above 0.
	ForgetAfter time.Duration
	// FailurePenalty (fail) is what a failed attempt counts as, however fast it
	// failed, as a multiple of what an average endpoint costs. Default 10, from 1
	// to 1e6.
	FailurePenalty float64
	// AgeLimit (old) bounds the age at which an attempt in flight counts, as a
	// multiple of the mean latency, so that a stream that says nothing for an
	// hour does not make its server look dead. Default 20, from 1 to 1e6.
	AgeLimit float64
}

// DefaultExpectedLatencyConfig returns the defaults. They were chosen by
// simulation over some thirty kinds of clusters and faults.
func DefaultExpectedLatencyConfig() ExpectedLatencyConfig {
	return ExpectedLatencyConfig{
		PriorSamples:   1,
		QueueExponent:  0.5,
		KeepSamples:    32,
		ForgetRounds:   32,
		ForgetAfter:    time.Minute,
		FailurePenalty: defaultFailurePenalty,
		AgeLimit:       20,
	}
}

func (c ExpectedLatencyConfig) validate() error {
	if err := checkPositive("priorSamples", c.PriorSamples, 1000); err != nil {
		return err
	}
	if err := checkRange("queueExponent", c.QueueExponent, 0, 1); err != nil {
		return err
	}
	if err := checkRange("keepSamples", c.KeepSamples, 1, 1e6); err != nil {
		return err
	}
	if err := checkPositive("forgetRounds", c.ForgetRounds, 1e6); err != nil {
		return err
	}
	if err := checkDuration("forgetAfter", c.ForgetAfter); err != nil {
		return err
	}
	if err := checkFailurePenalty(c.FailurePenalty); err != nil {
		return err
	}
	return checkRange("ageLimit", c.AgeLimit, 1, 1e6)
}

// ExpectedLatency is what one more attempt to an endpoint is expected to take:
//
//	load = L * (q + 1)
//	L    = (S*f + A + n0*G) / (N*f + n0)
//
// Per endpoint:
//
//   - q is the number of attempts in flight to the endpoint.
//   - S and N are the sum and the number of its latencies. Each latency is
//     divided by (pending+1)^theta, the attempts in flight when it began: the
//     price of a latency per attempt in flight.
//   - A is the sum of the ages of its attempts in flight, each divided alike.
//     They have no latency yet, but they took that long already, so an endpoint
//     that answers nothing costs more by the moment; nothing has to time out
//     first. An age counts up to old times the mean latency, the undivided one.
//   - G is the mean of the divided latencies over all endpoints of the channel,
//     a moving mean of at most 200 samples. A newcomer costs what the average
//     endpoint does, so it is neither flooded nor starved.
//   - f forgets: exp(-t/tau - c/(ticks*n)), t after and c samples of the whole
//     channel after the endpoint's last sample, with n endpoints. At each sample
//     S and N are multiplied by f*(1-1/keep). An endpoint that is not heard of
//     drifts back to the average and is tried again.
//
// A failure counts as a latency of at least fail times what an average endpoint
// costs, its attempts in flight included. An attempt never sent counts as none.
//
// Of an attempt cancelled by its caller only the age is known. It counts as a
// latency, up to the same limit as the ages in flight, if it is above the L that
// the samples alone make, and as none otherwise: to be cancelled early says
// nothing, and to be cancelled late must not undo what the age said a moment
// before. Where calls are hedged, the attempts at a server that stalls end no
// other way.
//
// L is the posterior mean of an exponential law under a conjugate prior, with
// right-censored observations. The formula and its constants are belfry's own.
type ExpectedLatency struct {
	MetricBase
	params atomic.Pointer[expectedParams]
	_      [56]byte // params are read at every pick, fleet is written at every finish
	fleet  fleet
	// undivided is the mean of the latencies as they are, as float64 bits; fleet
	// has that of the divided ones.
	undivided atomic.Uint64
	// samples counts the samples of the channel.
	samples atomic.Uint64
	_       [40]byte
	// perSample is 1/(ticks*n) as float64 bits: what one sample of the channel
	// takes from the memory of each endpoint.
	perSample atomic.Uint64

	// mu guards meters, and setting params and perSample by size, which belong
	// together.
	mu     sync.Mutex
	size   int // endpoints of the channel
	meters slab.Slab[expectedMeter]
}

// expectedParams are the parameters in the form in which the hot path needs
// them. Immutable.
type expectedParams struct {
	prior     float64 // n0
	keep      float64 // 1 - 1/keep
	rate      float64 // 1/tau, per unit of heard
	rounds    float64 // 1/ticks
	penalty   float64 // fail
	ageLimit  float64 // old
	exponent  float64 // theta
	weightsAt [256]uint32
}

// weightOne is the weight of 1 in fixed point. What is added to the sum of ages
// at the start of an attempt is subtracted at its end, so both must be integers.
const weightOne = 1 << 12

// Ages are summed in units of 1024 ns: the sum of weight times start time then
// lasts for 70 years of weighted age before it could overflow.
const ageUnitBits = 10

// weight returns (queue+1)^-theta in fixed point, at least one unit.
func (p *expectedParams) weight(queue float64) uint32 {
	if i := int(queue); i < len(p.weightsAt) && float64(i) == queue {
		return p.weightsAt[i]
	}
	return weightFor(queue, p.exponent)
}

func weightFor(queue, exponent float64) uint32 {
	return uint32(max(math.Round(weightOne*math.Pow(queue+1, -exponent)), 1))
}

// NewExpectedLatency returns the Metric, or an error that names the field, its
// value and the rule it breaks.
func NewExpectedLatency(c ExpectedLatencyConfig) (*ExpectedLatency, error) {
	e := &ExpectedLatency{}
	if err := e.Reconfigure(c); err != nil {
		return nil, err
	}
	return e, nil
}

// Reconfigure changes the parameters while attempts run. The Meters keep what
// they know. On error nothing changes.
func (e *ExpectedLatency) Reconfigure(c ExpectedLatencyConfig) error {
	if err := c.validate(); err != nil {
		return err
	}
	p := &expectedParams{
		prior:    c.PriorSamples,
		keep:     1 - 1/c.KeepSamples,
		rate:     (1 << heardUnitBits) / float64(c.ForgetAfter),
		rounds:   1 / c.ForgetRounds,
		penalty:  c.FailurePenalty,
		ageLimit: c.AgeLimit,
		exponent: c.QueueExponent,
	}
	for q := range p.weightsAt {
		p.weightsAt[q] = weightFor(float64(q), c.QueueExponent)
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

// expectedMeter is the state of one endpoint. It fills one cache line, for with
// many endpoints a pick spends its time on fetching these.
//
// waiting is exact: it is zero when nothing is in flight. The rest may lose an
// update to a race, which costs one sample or misjudges one pick, and is
// overwritten soon.
type expectedMeter struct {
	MeterBase
	metric *ExpectedLatency
	// waiting is the sum of the weights of the attempts in flight.
	waiting atomic.Int64
	mean    atomic.Uint64 // S and N, two float32
	heard   atomic.Uint64 // the last sample: when, in heardUnitBits, and which of the channel's, 32 bits each
	ages    ages
}

// Times of samples are kept in units of about a millisecond. They wrap: after 26
// days without a sample an endpoint's last one counts as new.
const heardUnitBits = 20

// Load implements [Meter].
func (m *expectedMeter) Load(q Query) Estimate {
	sum, number := m.latency(q.Now)
	return Estimate{Cost: sum / number * (q.queue() + 1)}
}

// Inspect implements [Meter].
func (m *expectedMeter) Inspect(q Query) Details {
	sum, number := m.latency(q.Now)
	return Details{Latency: time.Duration(sum / number), Samples: number - m.metric.params.Load().prior}
}

// latency returns L as a sum of times and a number of samples.
func (m *expectedMeter) latency(now Instant) (sum, number float64) {
	p := m.metric.params.Load()
	g := m.metric.fleet.mean()
	// Before the first sample of the channel the prior is one nanosecond: every
	// endpoint then costs as many as it has attempts in flight.
	if g < 1 {
		g = 1
	}
	sum, number = p.prior*g, p.prior
	if w := m.mean.Load(); w != 0 {
		s, n := floats32(w)
		f := expNeg(m.metric.unheard(p.rate, now, m.heard.Load()))
		sum += s * f
		number += n * f
	}
	if w := m.waiting.Load(); w > 0 {
		sum += m.ages.sum(now, w, m.metric.maxAge(p))
	}
	return sum, number
}

// maxAge returns the age up to which an attempt in flight counts, in
// nanoseconds. While no latency is known there is no limit.
func (e *ExpectedLatency) maxAge(p *expectedParams) float64 {
	if mean := math.Float64frombits(e.undivided.Load()); mean > 0 {
		return p.ageLimit * mean
	}
	return math.MaxInt64
}

// unheard returns how much is gone of the memory of an endpoint that was heard of
// last at heard, for then f = exp(-unheard). The two are apart so that each can be
// inlined.
func (e *ExpectedLatency) unheard(rate float64, now Instant, heard uint64) float64 {
	t := since32(uint32(now>>heardUnitBits), uint32(heard>>32))
	c := since32(uint32(e.samples.Load()), uint32(heard))
	return t*rate + c*math.Float64frombits(e.perSample.Load())
}

// since32 returns a-b modulo 2^32 if that is below 2^31, and otherwise 0, for then a
// was read a little before b.
func since32(a, b uint32) float64 { return float64(max(int32(a-b), 0)) }

// Start implements [Meter].
func (m *expectedMeter) Start(a Attempt) Ticket {
	p := m.metric.params.Load()
	queue := a.queue()
	weight := p.weight(queue)
	epoch := m.ages.add(weight, a.Now, m.metric.maxAge(p))
	m.waiting.Add(int64(weight))
	return Ticket{a.Now, uint64(math.Float32bits(float32(queue)))<<32 | uint64(weight), uint64(epoch)}
}

// queue returns the attempts in flight when the attempt was sent.
func (t Ticket) queue() float64 { return float64(math.Float32frombits(uint32(t.A >> 32))) }

// weight returns what the latency is multiplied by, in fixed point, see weightOne.
func (t Ticket) weight() uint32 { return uint32(t.A) }

// epoch returns the generation of ages that the attempt was counted in.
func (t Ticket) epoch() uint32 { return uint32(t.B) }

// Respond implements [Meter].
func (m *expectedMeter) Respond(r Response) {
	m.forget(r.Ticket)
	m.completed(r.Now, r.Ticket)
}

// forget ends the age of an attempt.
func (m *expectedMeter) forget(t Ticket) {
	m.ages.remove(t)
	m.waiting.Add(-int64(t.weight()))
}

// Finish implements [Meter].
func (m *expectedMeter) Finish(s Sample) {
	now := s.Now
	if !s.Responded {
		m.forget(s.Ticket)
	}
	switch {
	case s.Outcome == Failed:
		latency := m.metric.params.Load().penalty * m.metric.cost()
		if !s.Responded { // the life of a stream after its first response is no latency
			latency = max(latency, s.Ticket.latency(now)*s.Ticket.discount())
		}
		m.sample(now, latency)
	case s.Outcome == Completed && !s.Responded:
		m.completed(now, s.Ticket)
	case (s.Outcome == Cancelled || s.Outcome == Expired) && !s.Responded:
		m.cancelled(now, s.Ticket)
	}
}

// Close implements [Meter].
func (m *expectedMeter) Close() {
	m.metric.mu.Lock()
	defer m.metric.mu.Unlock()
	m.metric.resizeLocked(-1)
}

func (m *expectedMeter) completed(now Instant, t Ticket) {
	latency := t.latency(now)
	divided := latency * t.discount()
	share := m.metric.fleet.observe(divided, t.queue())
	count := m.sample(now, divided)
	// The undivided mean only bounds ages. Once it covers its window, one sample in
	// undividedEvery, taken for so many, is enough for it.
	if share > 1.0/fleetWindow || count%undividedEvery == 0 {
		if share == 1.0/fleetWindow {
			share *= undividedEvery
		}
		mean := math.Float64frombits(m.metric.undivided.Load())
		m.metric.undivided.Store(math.Float64bits(mean + (latency-mean)*share))
	}
}

func (m *expectedMeter) cancelled(now Instant, t Ticket) {
	p := m.metric.params.Load()
	g := m.metric.fleet.mean()
	if g == 0 {
		return // no latency is known yet, so none is late
	}
	age := min(t.latency(now), m.metric.maxAge(p)) * t.discount()
	s, n := floats32(m.mean.Load())
	f := expNeg(m.metric.unheard(p.rate, now, m.heard.Load()))
	if age*(n*f+p.prior) > s*f+p.prior*g {
		m.sample(now, age)
	}
}

// cost returns what the average endpoint costs. Its q attempts in flight are, on
// average, half a latency old, and with many of them their ages outweigh the
// samples that it has, of which it keeps 1/(1-keep).
func (e *ExpectedLatency) cost() float64 {
	mean, queue := fleetMeans(e.fleet.means.Load())
	samples := 1/(1-e.params.Load().keep) + 1
	return mean * (queue + 1) * (1 + queue/2/samples)
}

// discount returns the weight of the latency as a number.
func (t Ticket) discount() float64 { return float64(t.weight()) / weightOne }

const undividedEvery = 8

// sample takes in a latency and returns the number of samples of the channel.
func (m *expectedMeter) sample(now Instant, latency float64) uint64 {
	p := m.metric.params.Load()
	f := expNeg(m.metric.unheard(p.rate, now, m.heard.Load())) * p.keep
	for {
		old := m.mean.Load()
		s, n := floats32(old)
		if m.mean.CompareAndSwap(old, bits32(s*f+latency, n*f+1)) {
			break
		}
	}
	count := m.metric.samples.Add(1)
	m.heard.Store(uint64(now)>>heardUnitBits<<32 | uint64(uint32(count)))
	return count
}

// ages sums how long the attempts in flight have taken so far, each up to a
// limit, without a list of them.
//
// For attempts of weight w_i that started at s_i the sum of the weighted ages at
// time t is t*W - T with W the sum of w_i and T the sum of w_i*s_i. To bound
// single ages, the attempts are kept in two such sums by generation: the current
// one and the one before. When the current generation is as old as the limit, a
// new one begins in the place of the older. The attempts that were in it are not
// moved anywhere: they are the ones that the total weight knows and the two sums
// do not, and each counts as the limit.
//
// A race between a new generation and the start or end of an attempt may leave
// a sum a little off. It counts wrong by at most one limit, and is cleared when
// its generation is reused.
type ages struct {
	starts  [2]atomic.Int64 // weight times start, in age units
	weights [2]atomic.Int32
	epoch   atomic.Uint32 // number of the current generation
	began   atomic.Uint32 // when it began, in epochUnitBits
}

// The beginning of a generation is kept in units of 65 microseconds. They wrap
// after 78 hours, and what comes of that is one generation that ends too late.
const epochUnitBits = 16

// add counts an attempt and returns its generation.
func (a *ages) add(weight uint32, started Instant, limit float64) uint32 {
	began, now := a.began.Load(), uint32(uint64(started)>>epochUnitBits)
	const little = 1 << 16 // A start that was read a little before began is not past it.
	if d := now - began; d < math.MaxUint32-little && float64(d)*(1<<epochUnitBits) > limit && a.began.CompareAndSwap(began, now) {
		next := a.epoch.Load() + 1
		a.weights[next&1].Store(0)
		a.starts[next&1].Store(0)
		a.epoch.Store(next)
	}
	epoch := a.epoch.Load()
	// In this order, and in remove in the other, an attempt half counted has a
	// negative age, which counts as none, and not an enormous one.
	a.starts[epoch&1].Add(int64(weight) * (int64(started) >> ageUnitBits))
	a.weights[epoch&1].Add(int32(weight))
	return epoch
}

// remove takes an attempt out again.
func (a *ages) remove(t Ticket) {
	epoch, weight := t.epoch(), t.weight()
	if a.epoch.Load()-epoch > 1 {
		return // its generation is gone
	}
	a.weights[epoch&1].Add(-int32(weight))
	a.starts[epoch&1].Add(-int64(weight) * (int64(t.Started) >> ageUnitBits))
}

// sum returns the weighted ages in nanoseconds of attempts that weigh total.
func (a *ages) sum(now Instant, total int64, limit float64) float64 {
	const unit = float64(1<<ageUnitBits) / weightOne
	t := int64(now) >> ageUnitBits
	var sum float64
	for i := range a.weights {
		w := int64(a.weights[i].Load())
		if w <= 0 {
			continue
		}
		total -= w
		age := float64(t*w-a.starts[i].Load()) * unit
		sum += min(max(age, 0), limit*float64(w)/weightOne)
	}
	return sum + max(float64(total), 0)*limit/weightOne
}

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

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

// PeakEWMAConfig are the parameters of [PeakEWMA]. Start from
// [DefaultPeakEWMAConfig].
type PeakEWMAConfig struct {
	// Decay is the time in which the weight of what was seen falls to 1/e.
	// Default 10 s, must be above 0.
	Decay time.Duration
	// DefaultRTT is the latency of an endpoint before its first sample. It decays
	// like any other. Default 1 s, must be above 0.
	DefaultRTT time.Duration
	// FailurePenalty is what a failed attempt counts as, however fast it failed,
	// as a multiple of what an average endpoint costs. Default 10, at least 1, at
	// most 1e6.
	FailurePenalty float64
}

// DefaultPeakEWMAConfig returns the defaults: 10 s, 1 s and 10.
func DefaultPeakEWMAConfig() PeakEWMAConfig {
	return PeakEWMAConfig{Decay: 10 * time.Second, DefaultRTT: time.Second, FailurePenalty: defaultFailurePenalty}
}

func (c PeakEWMAConfig) validate() error {
	if err := checkDuration("decay", c.Decay); err != nil {
		return err
	}
	if err := checkDuration("defaultRtt", c.DefaultRTT); err != nil {
		return err
	}
	return checkFailurePenalty(c.FailurePenalty)
}

// PeakEWMA is the peak-sensitive, exponentially weighted moving average of the
// latency, times the attempts in flight, in proportion to the weight, and one more:
//
//	load = estimate * (pending/weight + 1)
//
// A latency above the estimate replaces it at once. Any other is averaged in by
// the time since the estimate was last read or updated:
//
//	estimate = estimate*d + latency*(1-d),  d = exp(-elapsed/decay)
//
// Reading lets the estimate decay towards zero, so an endpoint that is not heard
// of is tried again.
//
// It is Tower's metric, which is Finagle's, with one repair: there, an attempt
// that fails at once is a fast one, and the endpoint that fails draws the
// traffic of all. Here a failure counts as a latency of at least FailurePenalty
// times what an average endpoint costs, its queue included. Of an attempt that its
// caller cancelled only is known how long it took at least: such times are summed
// until an attempt is answered, and their sum counts as a latency if it is above
// the estimate. Without failures and cancellations the two agree.
type PeakEWMA struct {
	MetricBase
	params atomic.Pointer[peakParams]
	_      [56]byte // params are read at every pick, fleet is written at every finish
	fleet  fleet

	mu     sync.Mutex // guards meters
	meters slab.Slab[peakMeter]
}

// NewPeakEWMA returns the Metric, or an error that names the field, its value
// and the rule it breaks.
func NewPeakEWMA(c PeakEWMAConfig) (*PeakEWMA, error) {
	p := &PeakEWMA{}
	if err := p.Reconfigure(c); err != nil {
		return nil, err
	}
	return p, nil
}

// Reconfigure changes the parameters while attempts run. The Meters keep what
// they know. On error nothing changes.
func (p *PeakEWMA) Reconfigure(c PeakEWMAConfig) error {
	if err := c.validate(); err != nil {
		return err
	}
	p.params.Store(&peakParams{
		rate:       1 / float64(c.Decay),
		defaultRTT: float64(c.DefaultRTT),
		penalty:    c.FailurePenalty,
		good:       c.Decay >> goodBits,
	})
	return nil
}

// peakParams are the parameters in the form in which the hot path needs them.
// Immutable.
type peakParams struct {
	rate       float64 // 1/decay, per nanosecond
	defaultRTT float64 // nanoseconds
	penalty    float64
	good       time.Duration
}

// An estimate loses one part in 16,000 while it is not read again, which is less
// than anyone could tell.
const goodBits = 14

// NewMeter returns the Meter of one more endpoint.
func (p *PeakEWMA) NewMeter(Endpoint) Meter {
	p.mu.Lock()
	m := p.meters.New()
	p.mu.Unlock()
	m.metric = p
	m.estimate.Store(math.Float64bits(p.params.Load().defaultRTT) &^ tagMask)
	return m
}

// The estimate and its time are two words that must be seen together. Each write
// puts the same tag into both. A reader that sees two tags stands between the two
// stores of a writer: the estimate was written just now, so it takes the elapsed
// time as zero. Or it comes after two writers whose second stores changed places,
// and then the tags stay apart; therefore Load, which otherwise would never again
// let the estimate decay, writes it anew. The tag costs the estimate its last 8 of
// 52 bits, and the time its first: it wraps after 2.3 years.
const (
	tagBits = 8
	tagMask = 1<<tagBits - 1
)

// stillBits: a reading less than decay/2^stillBits after the last one that was
// noted is not noted. It changes the average of the next latency by less than one
// millionth, and saves the write on the pick path.
const stillBits = 20

// peakMeter is the state of one endpoint, one cache line.
//
// Tower lets each reading of an estimate store what is left of it. What is left
// after two readings is what is left after the time of both, so here the estimate
// stays as the last sample left it, and a reading notes its time alone.
type peakMeter struct {
	MeterBase
	metric   *PeakEWMA
	estimate atomic.Uint64 // nanoseconds as float64 bits, tag in the low bits
	stamp    atomic.Uint64 // Instant << tagBits | tag: when estimate was written; 0 before
	read     atomic.Int64  // Instant of the last reading
	// penalized is whether the estimate is what a failure was charged. What a
	// failure is charged follows from the estimates of all endpoints, and must not
	// follow from itself, or it would grow with each. They are estimates and not
	// latencies because they are peaks: the mean latency is several times less.
	penalized atomic.Bool
	_         [4]byte
	// unanswered is how long, in nanoseconds, cancelled attempts have waited together
	// since an attempt was last answered.
	unanswered atomic.Int64
	_          [16]byte
}

// current returns the estimate word and, in nanoseconds, its value and its age.
func (m *peakMeter) current(now Instant) (word uint64, value, age float64) {
	word = m.estimate.Load()
	stamp := m.stamp.Load()
	value = math.Float64frombits(word &^ tagMask)
	if word&tagMask != stamp&tagMask || stamp == 0 {
		return word, value, 0
	}
	return word, value, float64(max(int64(uint64(now)<<tagBits-stamp&^tagMask)>>tagBits, 0))
}

// stamped reports whether it is known when the estimate was written.
func (m *peakMeter) stamped(word uint64) bool {
	stamp := m.stamp.Load()
	return stamp != 0 && word&tagMask == stamp&tagMask
}

// write replaces the estimate unless another goroutine did so since it was read.
func (m *peakMeter) write(word uint64, value float64, now Instant) bool {
	tag := (word + 1) & tagMask
	if !m.estimate.CompareAndSwap(word, math.Float64bits(value)&^tagMask|tag) {
		return false
	}
	m.stamp.Store(uint64(now)<<tagBits | tag)
	return true
}

func (m *peakMeter) Load(q Query) Estimate {
	now := q.Now
	p := m.metric.params.Load()
	rate := p.rate
	word, value, age := m.current(now)
	switch {
	case age > 0:
		value *= expSmall(age * rate)
	case !m.stamped(word):
		m.write(word, value, now) // the first reading starts the clock
	}
	if float64(int64(now)-m.read.Load())*rate >= 1.0/(1<<stillBits) {
		m.read.Store(int64(now))
	}
	queue := q.queue()
	return Estimate{Cost: value * (queue + 1), Queue: queue, Good: p.good}
}

func (m *peakMeter) Start(a *Attempt) Ticket {
	return Ticket{Started: a.Now, A: math.Float64bits(a.queue())}
}

func (m *peakMeter) Respond(r Response) { m.completed(r.Now, r.Ticket) }

func (m *peakMeter) Inspect(q Query) Details {
	_, value, age := m.current(q.Now)
	return Details{Latency: time.Duration(value * expSmall(age*m.metric.params.Load().rate))}
}

func (m *peakMeter) Finish(s *Sample) bool {
	now := s.Now
	switch {
	case s.Outcome == Completed && !s.Responded:
		return m.completed(now, s.Ticket)
	case s.Outcome == Failed:
		latency := m.metric.params.Load().penalty * m.metric.fleet.cost()
		if !s.Responded { // the life of a stream after its first response is no latency
			latency = max(latency, s.Ticket.latency(now))
		}
		return m.sample(now, latency, s.Ticket, true)
	case (s.Outcome == Cancelled || s.Outcome == Expired) && !s.Responded:
		return m.cancelled(now, s.Ticket)
	}
	return false
}

// cancelled takes in that an attempt would have taken longer than it has. Of latencies
// that are known from below, the best estimate of their mean is the sum of what is known
// over the number of those that ended, so each cancelled attempt adds its time until one
// is answered.
func (m *peakMeter) cancelled(now Instant, t Ticket) bool {
	waited := float64(m.unanswered.Add(max(int64(now-t.Started), 1)))
	if _, value, age := m.current(now); waited > value*expSmall(age*m.metric.params.Load().rate) {
		return m.sample(now, waited, t, false)
	}
	return false
}

func (m *peakMeter) completed(now Instant, t Ticket) bool {
	if m.unanswered.Load() != 0 {
		m.unanswered.Store(0)
	}
	return m.sample(now, t.latency(now), t, false)
}

// sample adds a latency to the estimate, and returns whether that changed it by more
// than a fiftieth.
func (m *peakMeter) sample(now Instant, latency float64, t Ticket, failed bool) bool {
	rate := m.metric.params.Load().rate
	for {
		word, value, age := m.current(now)
		// The estimate as the last reading left it, and the time since.
		unread := float64(max(int64(now)-m.read.Load(), 0))
		if unread > age {
			unread = age
		}
		value *= expSmall((age - unread) * rate)
		next := latency
		if latency <= value {
			d := expSmall(unread * rate)
			next = value*d + latency*(1-d)
		}
		if m.write(word, next, now) {
			penalized := m.penalized.Load()
			if latency > value && penalized != failed {
				penalized = failed
				m.penalized.Store(failed)
			}
			if !failed && m.metric.fleet.turn(now) > 0 {
				if penalized {
					next = latency
				}
				m.metric.fleet.observe(next, math.Float64frombits(t.A))
			}
			return next > value*(1+1.0/50) || next < value*(1-1.0/50)
		}
	}
}

// expSmall returns exp(-x) for x >= 0. Between two readings of an endpoint in use
// x is small, and the first terms of the series are exact to nine digits, faster,
// and short enough to be inlined.
func expSmall(x float64) float64 {
	if x < 1.0/1024 {
		return 1 - x*(1-x/2)
	}
	return math.Exp(-x)
}

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
	// Decay is the time in which the weight of earlier latencies falls to 1/e.
	// Default 10 s, must be above 0.
	Decay time.Duration
	// DefaultRTT is the estimate of an endpoint before its first sample. It decays
	// like any other. Default 1 s, must be above 0.
	DefaultRTT time.Duration
	// FailurePenalty is the latency that a failed attempt counts as at least, as a
	// multiple of what an average endpoint costs. Default 10, from 1 to 1e6.
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
// latency, in nanoseconds, times the attempts in flight per weight and one more:
//
//	load = estimate * (pending/weight + 1)
//
// A latency above the estimate replaces it at once. A lower one is averaged with it,
// by the time since the estimate was last read or updated:
//
//	estimate = estimate*d + latency*(1-d),  d = exp(-elapsed/decay)
//
// The estimate decays towards zero between readings, so an endpoint that gets no calls
// is tried again.
//
// It is Tower's metric, which is Finagle's, with two changes. In Tower an attempt that
// fails at once is a fast one, and the endpoint that fails gets most calls. Here a
// failure counts as a latency of at least FailurePenalty times what an average endpoint
// costs, its attempts in flight included. And of an attempt that its caller cancelled,
// or whose deadline passed, only the time that it took is known: the latency would have
// been longer. These times are summed until an attempt is answered, and the sum counts
// as a latency if it is above the estimate. Without such attempts the two metrics agree.
type PeakEWMA struct {
	MetricBase
	params atomic.Pointer[peakParams]
	_      [56]byte // keeps params, which every pick reads, in another cache line than fleet, which ends of attempts write
	fleet  fleet

	mu     sync.Mutex // guards meters
	meters slab.Slab[peakMeter]
}

// NewPeakEWMA returns the Metric. If a field is out of its range the error is a
// *[ConfigError].
func NewPeakEWMA(c PeakEWMAConfig) (*PeakEWMA, error) {
	p := &PeakEWMA{}
	if err := p.Reconfigure(c); err != nil {
		return nil, err
	}
	return p, nil
}

// Reconfigure changes the parameters while attempts are in flight. The Meters keep what
// they know. If a field is out of its range the error is a *[ConfigError], and nothing
// changes.
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

// An Estimate is good for decay/2^goodBits. In that time it decays by one part in 16,000,
// which makes no difference to a pick.
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

// The estimate and its time are two words that a reader must see together. Each write
// puts the same tag into both. There are two reasons why a reader may see two different
// tags. It may read between the two stores of a writer. Then the estimate was written
// just now, and the elapsed time is zero. Or two writers have stored their times in the
// other order than their estimates. Then the tags would stay different, and the estimate
// would never decay again; so Load writes it again. The tag takes the last 8 of the 52
// bits of the estimate, and the first 8 of the time, which wraps after 2.3 years.
const (
	tagBits = 8
	tagMask = 1<<tagBits - 1
)

// A reading less than decay/2^stillBits after the last noted one is not noted. That
// changes the estimate after the next latency by less than one millionth, and saves a
// write in the pick.
const stillBits = 20

// peakMeter is the state of one endpoint, one cache line.
//
// In Tower each reading stores the decayed estimate. To decay twice is the same as to
// decay once for the sum of both times. So here the estimate stays as the last sample
// left it, and a reading only notes its time.
type peakMeter struct {
	MeterBase
	metric   *PeakEWMA
	estimate atomic.Uint64 // nanoseconds as float64 bits, tag in the low bits
	stamp    atomic.Uint64 // when estimate was written: Instant << tagBits | tag; 0 before the first write
	read     atomic.Int64  // the Instant of the last reading that was noted
	// penalized is whether the estimate comes from a failure. Such an estimate must not
	// count in fleet: the latency that a failure counts as is a multiple of the means in
	// fleet, and would grow with each failure. fleet averages estimates and not
	// latencies because an estimate is a peak, several times the mean latency.
	penalized atomic.Bool
	_         [4]byte
	// unanswered is the sum of the times, in nanoseconds, of the attempts that were
	// cancelled or expired since an attempt was last answered.
	unanswered atomic.Int64
	_          [16]byte
}

// current returns the estimate as a word, its value in nanoseconds, and its age in
// nanoseconds, 0 if that is not known.
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

// write replaces the estimate, unless another goroutine has replaced word since it was
// read. It reports whether it did.
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
		if !s.Responded { // after its first response the duration of a stream is not a latency
			latency = max(latency, s.Ticket.latency(now))
		}
		return m.sample(now, latency, s.Ticket, true)
	case (s.Outcome == Cancelled || s.Outcome == Expired) && !s.Responded:
		return m.cancelled(now, s.Ticket)
	}
	return false
}

// cancelled is told of an attempt whose latency would have been longer than it took. If
// only lower bounds of some latencies are known, the best estimate of the mean is the sum
// of all times divided by the number of answers. So the times of such attempts are summed
// until one is answered.
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

// sample adds a latency to the estimate. It reports whether that changed the estimate by
// more than a fiftieth.
func (m *peakMeter) sample(now Instant, latency float64, t Ticket, failed bool) bool {
	rate := m.metric.params.Load().rate
	for {
		word, value, age := m.current(now)
		// value becomes the estimate at the last reading, and unread the time since then.
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
			if !failed && m.metric.fleet.countOf(now) > 0 {
				if penalized {
					next = latency
				}
				m.metric.fleet.observe(next, math.Float64frombits(t.A))
			}
			return next > value*(1+1.0/50) || next < value*(1-1.0/50)
		}
	}
}

// expSmall returns exp(-x) for x >= 0. Between two readings of an endpoint in use x is
// small. Then the first terms of the series are exact to nine digits, and are faster and
// short enough to be inlined.
func expSmall(x float64) float64 {
	if x < 1.0/1024 {
		return 1 - x*(1-x/2)
	}
	return math.Exp(-x)
}

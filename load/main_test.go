// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package load

import (
	"flag"
	"math"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/belfry-go/belfry/internal/test/leaktest"
)

func TestMain(m *testing.M) { leaktest.Main(m) }

var seedFlag = flag.Uint64("seed", 0, "seed of the randomised tests; 0 draws one")

// newRand returns a generator whose seed is logged, for a failure to be repeated
// with -seed.
func newRand(t *testing.T) *rand.Rand {
	t.Helper()
	seed := *seedFlag
	if seed == 0 {
		seed = rand.Uint64()
	}
	t.Logf("seed %d", seed)
	return rand.New(rand.NewPCG(seed, 0))
}

const (
	ms  = Instant(time.Millisecond)
	sec = Instant(time.Second)
)

// interval returns a duration between lo and hi, evenly distributed in its
// logarithm.
func interval(r *rand.Rand, lo, hi time.Duration) Instant {
	return Instant(float64(lo) * math.Pow(float64(hi)/float64(lo), r.Float64()))
}

// relative returns how far got is from want, as a part of want.
func relative(got, want float64) float64 {
	if got == want {
		return 0
	}
	return math.Abs(got-want) / math.Abs(want)
}

// near fails the test unless got is want but for a relative error.
func near(t *testing.T, what string, got, want, tolerance float64) {
	t.Helper()
	if !(relative(got, want) <= tolerance) {
		t.Errorf("%s: got %v, want %v within %v", what, got, want, tolerance)
	}
}

// counted is a Meter with the counts that the policy keeps for it. Its methods are those
// of the Meter, with the arguments that most tests need.
type counted struct {
	Meter
	of                Metric
	inFlight, streams atomic.Int64
	weight            float64
}

func newMeter(m Metric) *counted { return &counted{Meter: m.NewMeter(Endpoint{}), of: m, weight: 1} }

func (m *counted) query(now Instant) Query {
	return Query{Now: now, InFlight: int(m.inFlight.Load()), Streams: int(m.streams.Load()), Weight: m.weight}
}

func (m *counted) Load(now Instant) float64 { return m.Meter.Load(m.query(now)).Cost }

func (m *counted) Start(now Instant) Ticket {
	return m.start(Attempt{Query: m.query(now), Method: "/test/Call"})
}

func (m *counted) start(a Attempt) Ticket {
	k := told.Get().(*telling)
	k.attempt = a
	t := m.Meter.Start(&k.attempt)
	told.Put(k)
	m.inFlight.Add(1)
	return t
}

// A telling holds the arguments of Start and Finish, which would be allocated otherwise
// because the methods are those of an interface.
type telling struct {
	attempt Attempt
	sample  Sample
}

var told = sync.Pool{New: func() any { return &telling{} }}

func (m *counted) Respond(now Instant, t Ticket) {
	m.inFlight.Add(-1)
	m.streams.Add(1)
	m.Meter.Respond(Response{now, t})
}

func (m *counted) Finish(now Instant, s Sample) {
	if s.Responded {
		m.streams.Add(-1)
	} else {
		m.inFlight.Add(-1)
	}
	s.Now = now
	k := told.Get().(*telling)
	k.sample = s
	m.Meter.Finish(&k.sample)
	told.Put(k)
}

// run is an attempt that takes d and ends with an outcome.
func run(m *counted, start Instant, d time.Duration, o Outcome) {
	ticket := m.Start(start)
	m.Finish(start+Instant(d), Sample{Ticket: ticket, Outcome: o})
}

// metrics makes one of each kind with its defaults.
var metrics = []struct {
	name string
	make func() (Metric, error)
}{
	{"constant", func() (Metric, error) { return NewConstant(1) }},
	{"pendingRequests", func() (Metric, error) { return NewPendingRequests(), nil }},
	{"peakEwma", func() (Metric, error) { return NewPeakEWMA(DefaultPeakEWMAConfig()) }},
	{"expectedLatency", func() (Metric, error) { return NewExpectedLatency(DefaultExpectedLatencyConfig()) }},
}

// forEachMetric runs a subtest with a new Metric of each kind.
func forEachMetric(t *testing.T, f func(t *testing.T, m Metric)) {
	for _, kind := range metrics {
		t.Run(kind.name, func(t *testing.T) {
			m, err := kind.make()
			if err != nil {
				t.Fatal(err)
			}
			f(t, m)
		})
	}
}

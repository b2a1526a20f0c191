// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package load

import (
	"math"
	"testing"
	"time"
)

func newPeak(t *testing.T, rtt, decay time.Duration) *counted {
	t.Helper()
	p, err := NewPeakEWMA(PeakEWMAConfig{Decay: decay, DefaultRTT: rtt, FailurePenalty: 10})
	if err != nil {
		t.Fatal(err)
	}
	return newMeter(p)
}

// Tower's test default_decay.
func TestPeakEWMADefaultLatencyDecays(t *testing.T) {
	m := newPeak(t, 10*time.Millisecond, time.Second)
	if got := m.Load(0); got != 10e6 {
		t.Errorf("load at first is %v, want exactly 10e6", got)
	}
	if got := m.Load(100 * ms); !(got > 9e6 && got < 10e6) {
		t.Errorf("load after 100ms is %v, want between 9e6 and 10e6", got)
	} else {
		near(t, "load after 100ms", got, 10e6*math.Exp(-0.1), 1e-9)
	}
	if got := m.Load(200 * ms); !(got > 8e6 && got < 9e6) {
		t.Errorf("load after 200ms is %v, want between 8e6 and 9e6", got)
	} else {
		near(t, "load after 200ms", got, 10e6*math.Exp(-0.2), 1e-9)
	}
}

// Tower's test compound_decay.
func TestPeakEWMAPendingAndPeaksCompound(t *testing.T) {
	m := newPeak(t, 20*time.Millisecond, time.Second)
	if got := m.Load(0); got != 20e6 {
		t.Errorf("load at first is %v, want exactly 20e6", got)
	}
	first := m.Start(100 * ms)
	if got := m.Load(100 * ms); !(got > 20e6) {
		t.Errorf("load with one attempt in flight is %v, want above 20e6", got)
	}
	second := m.Start(200 * ms)
	if got := m.Load(200 * ms); !(got > 40e6) {
		t.Errorf("load with two attempts in flight is %v, want above 40e6", got)
	}
	m.Finish(300*ms, Sample{Ticket: first})
	if got := m.Load(300 * ms); got != 400e6 {
		t.Errorf("load after the first took 200ms is %v, want exactly 400e6", got)
	}
	m.Finish(400*ms, Sample{Ticket: second})
	if got := m.Load(400 * ms); got != 200e6 {
		t.Errorf("load after the second took 200ms is %v, want exactly 200e6", got)
	}
	if got := m.Load(1400 * ms); !(got < 100e6) {
		t.Errorf("load 1s later is %v, want below 100e6", got)
	}
	if got := m.Load(11400 * ms); !(got < 100e3) {
		t.Errorf("load 10s later is %v, want below 100e3", got)
	}
}

// Tower's test nanos: durations become numbers of nanoseconds exactly.
func TestPeakEWMALatenciesAreExactInNanoseconds(t *testing.T) {
	for _, test := range []struct {
		latency time.Duration
		want    float64
	}{{123, 123}, {time.Second + 23, 1_000_000_023}} {
		m := newPeak(t, 1, time.Second)
		m.Load(0)
		run(m, 0, test.latency, Completed)
		if got := m.Load(Instant(test.latency)); got != test.want {
			t.Errorf("load after a latency of %d ns is %v, want exactly %v", test.latency, got, test.want)
		}
	}
	m := newPeak(t, 1, time.Second)
	m.Load(0)
	run(m, 0, math.MaxInt64, Completed)
	near(t, "load after the longest latency there is", m.Load(math.MaxInt64), math.MaxInt64, 1e-12)
}

func TestPeakEWMAFollowsARiseAtOnceAndAFallOverTheDecayTime(t *testing.T) {
	m := newPeak(t, time.Millisecond, time.Second)
	m.Load(0)
	run(m, 0, 100*time.Millisecond, Completed)
	if got := m.Load(100 * ms); got != 100e6 {
		t.Errorf("load after a peak of 100ms is %v, want exactly 100e6", got)
	}
	// The attempt starts and ends 300 ms after the peak but for its 10 ms.
	ticket := m.Start(390 * ms)
	m.Finish(400*ms, Sample{Ticket: ticket})
	d := math.Exp(-0.3)
	near(t, "load after a latency of 10ms, 300ms later", m.Load(400*ms), 100e6*d+10e6*(1-d), 1e-9)
}

func TestPeakEWMAReadingDecaysTowardsZeroAndMovesTheTime(t *testing.T) {
	m := newPeak(t, time.Second, time.Second)
	m.Load(0)
	m.Load(sec)
	// Since the reading, not since the start, the estimate falls for one second
	// more, and the sample counts by that second.
	ticket := m.Start(2*sec - 50*ms)
	m.Finish(2*sec, Sample{Ticket: ticket})
	d := math.Exp(-1)
	near(t, "load after reading at 1s and a latency of 50ms at 2s", m.Load(2*sec), 1e9*d*d+50e6*(1-d), 1e-9)
}

func TestPeakEWMAFailureCountsAsAMultipleOfTheAverageCost(t *testing.T) {
	p := must(NewPeakEWMA(PeakEWMAConfig{Decay: time.Second, DefaultRTT: 1, FailurePenalty: 7}))
	other, m := newMeter(p), newMeter(p)
	other.Load(0)
	m.Load(0)
	// Each sent beside two others: the mean cost is 10 ms times (2 + 1).
	a, b := other.Start(0), other.Start(0)
	run(other, 0, 10*time.Millisecond, Completed)
	run(m, 10*ms, time.Microsecond, Failed)
	near(t, "load after a failure within 1us", m.Load(10*ms+1000), 7*10e6*3, 1e-3)
	other.Finish(10*ms, Sample{Ticket: a, Outcome: Cancelled})
	other.Finish(10*ms, Sample{Ticket: b, Outcome: Cancelled})
}

// towerPeakEWMA is Tower's algorithm, as written there: every reading and every
// sample updates the estimate, a reading with a latency of zero.
type towerPeakEWMA struct {
	estimate, decay float64
	updated         Instant
	pending         int
}

func (m *towerPeakEWMA) update(now Instant, rtt float64) {
	if m.estimate < rtt {
		m.estimate = rtt
	} else {
		d := math.Exp(-float64(now-m.updated) / m.decay)
		m.estimate = m.estimate*d + rtt*(1-d)
	}
	m.updated = now
}

func (m *towerPeakEWMA) load(now Instant) float64 {
	m.update(now, 0)
	return m.estimate * float64(m.pending+1)
}

// Without failures PeakEWMA is Tower's, to a relative error of 1e-5. What
// differs is that an estimate read less than decay/2^20 ago is not written again,
// so that a sample right after such a reading is averaged in by a time up to
// decay/2^20 longer, which moves the estimate by at most a millionth of the
// sample; and the last 8 of 52 bits of the mantissa, which are the tag. Samples
// in such haste add up until the next pause. The test mixes intervals from 1 us to
// 1 s; the worst error of 300 runs was 3e-6, and larger ones fall off so fast that
// fewer than one false failure in a million runs is to be expected.
func TestPeakEWMAIsTowersToTheNumber(t *testing.T) {
	r := newRand(t)
	var worst float64
	for range 50 {
		decay := time.Duration(interval(r, 10*time.Millisecond, 100*time.Second))
		rtt := time.Duration(interval(r, time.Millisecond, 10*time.Second))
		m := newPeak(t, rtt, decay)
		want := &towerPeakEWMA{estimate: float64(rtt), decay: float64(decay)}
		now := interval(r, 1, time.Hour)
		want.updated = now // Tower's clock starts when the endpoint is made, this one's when it is first read
		m.Load(now)
		var flying []Ticket
		for i := range 1000 {
			now += interval(r, time.Microsecond, time.Second)
			switch k := r.IntN(4); {
			case k < 2:
				got, want := m.Load(now), want.load(now)
				worst = max(worst, relative(got, want))
				if want > 1e-100 && relative(got, want) > 1e-5 {
					t.Fatalf("decay %v, operation %d: load is %v, Tower's %v, relative error %v", decay, i, got, want, relative(got, want))
				}
			case k == 2 || len(flying) == 0:
				flying = append(flying, m.Start(now))
				want.pending++
			default:
				j := r.IntN(len(flying))
				m.Finish(now, Sample{Ticket: flying[j]})
				want.pending--
				want.update(now, flying[j].latency(now))
				flying[j] = flying[len(flying)-1]
				flying = flying[:len(flying)-1]
			}
		}
	}
	t.Logf("worst relative error %.1e", worst)
}

func TestPeakEWMAKeepsItsEstimateWhenReconfigured(t *testing.T) {
	p := must(NewPeakEWMA(DefaultPeakEWMAConfig()))
	m := newMeter(p)
	m.Load(0)
	run(m, 0, 3*time.Second, Completed)
	if err := p.Reconfigure(PeakEWMAConfig{Decay: 2 * time.Second, DefaultRTT: time.Millisecond, FailurePenalty: 1}); err != nil {
		t.Fatal(err)
	}
	if got := m.Load(3 * sec); got != 3e9 {
		t.Errorf("load after a new config is %v, want 3e9 as before", got)
	}
	near(t, "load 2s later, with a decay of 2s", m.Load(5*sec), 3e9*math.Exp(-1), 1e-9)
	if got := newMeter(p).Load(0); got != 1e6 {
		t.Errorf("load of a newcomer is %v, want the new default of 1e6", got)
	}
}

// Two attempts end at once: the first writes its estimate, and its time only after
// the second has written both.
func TestPeakEWMADecaysAfterTwoWritersOvertookEachOther(t *testing.T) {
	m := newPeak(t, time.Millisecond, time.Second)
	m.Load(0)
	run(m, 0, 100*time.Millisecond, Completed)
	stamp := &m.Meter.(*peakMeter).stamp
	late := stamp.Load()
	run(m, 0, 200*time.Millisecond, Completed)
	stamp.Store(late)
	if got := m.Load(200 * ms); got != 200e6 {
		t.Errorf("load is %v, want exactly 200e6", got)
	}
	near(t, "load 1s later", m.Load(1200*ms), 200e6*math.Exp(-1), 1e-9)
}

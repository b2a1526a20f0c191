// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package load

import "sync/atomic"

// fleetWindow is the largest number of samples that a moving mean covers.
const fleetWindow = 200

// A fleet is what the endpoints of one channel share: a moving mean of their
// latencies, as the metric scales them, and a moving mean of the attempts in flight
// when those attempts were sent.
//
// Together they give what an average endpoint costs. A failure counts as a multiple of
// that cost and not of a latency, because an endpoint that fails at once has nothing
// in flight. Where the others have Q attempts in flight each, it would still look Q
// times cheaper.
type fleet struct {
	// means holds three numbers in one word, so that they change together: the mean
	// latency in nanoseconds as a float32, the mean of the attempts in flight as a
	// float32 without its last 8 bits, and in these 8 bits the number of samples that
	// the means cover.
	means atomic.Uint64

	every  atomic.Uint32 // one sample in 1<<every is learnt from
	learnt atomic.Uint32 // the tick of the last one, and in the bits above how many there were in that tick
}

// Numbers that all endpoints share are written only a few times in a tick of 131 us.
// Otherwise all cores would wait for each other at each call.
const (
	tickBits = 17
	inTick   = 8
	maxEvery = 10

	learntBits = 24
	learntMask = 1<<learntBits - 1
)

// countOf returns for how many samples the current one counts: 1<<every, or 0 if nothing is
// learnt from it. A hash of the time decides which samples are learnt from (Knuth, "The
// art of computer programming", 6.4).
func (f *fleet) countOf(now Instant) int {
	every := f.every.Load()
	if every > 0 && uint64(now)*0x9e3779b97f4a7c15>>(64-every) != 0 {
		return 0
	}
	tick, learnt := uint32(uint64(now)>>tickBits)&learntMask, f.learnt.Load()
	switch d := (tick - learnt) & learntMask; {
	case d == 0 && learnt>>learntBits < inTick-1:
		f.learnt.Store(learnt + 1<<learntBits)
	case d == 0:
		f.every.Store(min(every+1, maxEvery))
		f.learnt.Store(tick)
	default:
		if d > 1 && every > 0 && learnt>>learntBits < inTick/4 {
			f.every.Store(every - 1)
		}
		f.learnt.Store(tick)
	}
	return 1 << every
}

const fleetCountMask = 0xff

// observe adds the latency of a completed attempt, and the attempts that were pending
// when it was sent, to the means. It returns the share of the new sample in the means.
func (f *fleet) observe(latency, pending float64) (share float64) {
	for {
		old := f.means.Load()
		mean, queue := fleetMeans(old)
		count := min(old&fleetCountMask+1, fleetWindow)
		share = fleetShare[count]
		mean += (latency - mean) * share
		queue += (pending - queue) * share
		if f.means.CompareAndSwap(old, bits32(mean, queue)&^fleetCountMask|count) {
			return share
		}
	}
}

// fleetShare[k] is 1/k, the share of a new sample in a mean over k.
var fleetShare = func() (share [fleetWindow + 1]float64) {
	for k := 1; k < len(share); k++ {
		share[k] = 1 / float64(k)
	}
	return share
}()

func fleetMeans(w uint64) (mean, queue float64) { return floats32(w &^ fleetCountMask) }

// mean returns the mean latency in nanoseconds, 0 before the first sample.
func (f *fleet) mean() float64 {
	mean, _ := fleetMeans(f.means.Load())
	return mean
}

// cost returns what the average endpoint costs, in nanoseconds: its latency times the
// number of its attempts in flight plus one.
func (f *fleet) cost() float64 {
	mean, queue := fleetMeans(f.means.Load())
	return mean * (queue + 1)
}

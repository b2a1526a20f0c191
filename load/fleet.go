// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package load

import "sync/atomic"

// fleetWindow bounds the moving means: they cover at most so many samples.
const fleetWindow = 200

// A fleet is what the endpoints of one channel share: the mean of their
// latencies, or of what the metric makes of them, and of the attempts that were
// in flight when those were sent.
//
// It serves as the measure of what an average endpoint costs. A failure is
// charged a multiple of that cost, and not of a latency alone, because an
// endpoint that fails at once has no pending attempts: where the others carry
// Q attempts each, an endpoint without any would still look Q times cheaper.
type fleet struct {
	// means holds three numbers in one word so that they change together: the
	// mean latency in nanoseconds as a float32, the mean of the attempts in flight
	// as a float32 without its last 8 bits, and in their place the number of
	// samples that the means cover.
	means atomic.Uint64
}

const fleetCountMask = 0xff

// observe adds the latency of a completed attempt to the means, and returns its
// share in them.
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

// cost returns what the average endpoint costs: its latency times its attempts
// in flight and one more.
func (f *fleet) cost() float64 {
	mean, queue := fleetMeans(f.means.Load())
	return mean * (queue + 1)
}

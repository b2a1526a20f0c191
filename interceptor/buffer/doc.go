// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

// Package buffer lets a bounded number of calls wait for the layers inside. It is
// Tower's buffer, without its queue and worker: what waits is the call's own
// goroutine. Use it inside a load shed, to absorb bursts that a limit would refuse,
// and outside a limit, to bound how many calls wait there.
//
//	stack, err := interceptor.NewStack(
//		loadshed.Config{},
//		buffer.Config{Size: 100},
//		concurrency.Config{Limit: 10},
//	)
//
// A call that the layers inside admit at once takes no slot. One that they do not
// takes a slot and waits, even if a layer outside had narrowed how long it may, as a
// load shed does: within the bound that is what the buffer is for. It keeps the slot
// until the last gate inside that can wait has passed it, so the buffer bounds what
// waits at all of them together; a call that runs has none. If all slots are taken
// the call is refused with code UNAVAILABLE and reason QUEUE_FULL. A call that waits
// in vain, because its context or [Config.MaxWait] has ended, returns what the layer
// it waited for says.
//
// # Who waits
//
// Which of the waiting calls is admitted next is for the layer that they wait for.
// Who may wait at all, if there are more calls than slots, goes by the same order: the
// higher priority ([WithPriority]), then further attempts of a retry before first
// attempts, because work has been spent on these calls already, then the earlier
// call. A call that ranks higher than one that waits takes its slot, and that one is
// refused. The extra attempts of a hedge wait in what slots are left: any call takes
// the slot of one.
//
// # Order
//
// It stands outside of the limits it queues for and inside the load shed. Counted
// in calls:
//
//	Buffer(100) > Limit(10)          10 run, 100 wait, the next is refused: 110 in all
//	Shed > Buffer(2) > Limit(1)      1 runs, 2 wait, the fourth is refused
//	Buffer(5) > Limit(10) > Rate     5 wait at both together
//	Buffer(100) > Shed > Limit(10)   10 run, the next is refused: the shed takes away
//	                                 the waiting that the buffer allows
//	Limit(10) > Buffer(100) > Rate   10 in all; the others wait at the limit, unbounded
//
// The deadline of a layer outside, and that of the caller, end the waiting.
package buffer

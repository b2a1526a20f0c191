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
// A call that the layers inside admit at once takes no slot. Any other call takes a slot
// and waits, even if a layer outside, such as a load shed, does not let it wait. It keeps
// the slot until the last gate inside that can wait has admitted it, so the buffer bounds
// what waits at all of them together. A call that runs has no slot. If all slots are
// taken the call is refused with code UNAVAILABLE and reason QUEUE_FULL. If its context or
// [Config.MaxWait] ends while it waits, it returns the refusal of the layer that it
// waited for.
//
// # Who waits
//
// The layer that calls wait for decides which of them is admitted next. If there are more
// calls than slots, the buffer decides by the same order which of them may wait: the
// higher priority ([WithPriority]), then further attempts of a retry before first
// attempts, because work was already spent on those calls, then the earlier call. A call
// that ranks higher than a waiting one takes its slot, and that one is refused. The extra
// attempts of a hedge are expendable: they take only free slots, and any call takes
// theirs.
//
// # Order
//
// Put it outside the limits that calls wait for, and inside the load shed. Counted in
// calls:
//
//	Buffer(100) > Limit(10)          10 run, 100 wait, the next is refused: 110 in all
//	Shed > Buffer(2) > Limit(1)      1 runs, 2 wait, the fourth is refused
//	Buffer(5) > Limit(10) > Rate     5 wait at both together
//	Buffer(100) > Shed > Limit(10)   10 run, the next is refused: the shed takes away
//	                                 the waiting that the buffer allows
//	Limit(10) > Buffer(100) > Rate   10 in all; the others wait at the limit, unbounded
//
// The deadline of a layer outside, and that of the caller, end the wait. While no endpoint
// is READY, calls wait in the buffer too.
package buffer

// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

// Package buffer is a bounded number of places in which calls may wait for the
// layers inside. It is Tower's buffer, without its queue and worker: what waits is
// the call's own goroutine. Use it inside a load shed, to absorb bursts that a
// limit would refuse, and outside a limit, to bound how many calls wait there.
//
//	buffer, err := buffer.New(buffer.Config{Size: 100})
//	…
//	stack, err := interceptor.NewStack(loadshed, buffer, limit)
//
// A call that the layers inside admit at once takes no place. One that they do
// not takes a place and waits in it, even if a layer outside had narrowed how
// long it may, as a load shed does: within the bound that is what the buffer is
// for. A place is held while the call waits, not while it runs, and is free again
// the moment a permit is handed to the call. If all places are taken the call is
// refused with code UNAVAILABLE and reason QUEUE_FULL. A call that waits in vain,
// because its context or [Config.MaxWait] has ended, leaves nothing behind and
// returns what the layer it waited for says.
//
// In which order waiting calls are admitted is for the layer that they wait for.
//
// # Order
//
// It stands outside of the limits it queues for and inside the load shed. Counted
// in calls:
//
//	Buffer(100) > Limit(10)        10 run, 100 wait, the next is refused: 110 in all
//	Limit(10) > Buffer(100)        10 in all; none waits in the buffer
//	Shed > Buffer(2) > Limit(1)    1 runs, 2 wait, the fourth is refused
//	Buffer(100) > Shed > Limit(10) 10 run, the next is refused: the shed takes away
//	                               the waiting that the buffer allows
//
// The deadline of a layer outside, and that of the caller, end the waiting. The
// further attempts of a retry or hedge do not wait here either: they pass if there
// is capacity, and are refused otherwise.
package buffer

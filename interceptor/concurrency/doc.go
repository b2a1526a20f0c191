// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

// Package concurrency limits how many calls run at a time. It is Tower's
// concurrency limit, and Netflix's adaptive one, for all four kinds of call. Use
// it to bound what one client asks of a server at once, and to keep a slow server
// from collecting every goroutine of its callers.
//
//	limit, err := concurrency.New(concurrency.Config{Limit: 100})
//	…
//	stack, err := interceptor.NewStack(loadshed, limit)
//
// A call takes a permit before it is sent and holds it until it is over; a stream
// holds it for its whole life, not until it was opened. A call that finds no
// permit free waits as long as its [interceptor.Wait] allows: outermost or in a
// buffer it queues, inside a load shed it is refused at once, with code
// UNAVAILABLE and reason CONCURRENCY, or QUEUE_FULL if the queue is bounded
// ([Config.MaxWaiters]) and full.
//
// # Sharing
//
// A [Layer] has one state. In the stacks of several connections it is a limit for
// all of them together, Tower's global limit; a limit for each connection is a
// Layer for each.
//
// # Order
//
// Outside a retry or hedge it counts calls, and a call keeps its permit while it
// backs off; inside it counts attempts. It usually stands innermost, behind the
// rate limit, so that a permit is held for nothing but the call:
//
//	Buffer(100) > Limit(10)   10 calls run and 100 wait, 110 in all
//	Limit(10) > Buffer(100)   10 calls in all that have passed the limit; the others
//	                          wait at the limit, without bound
//
// # Static and adaptive
//
// [Config.Limit] is a fixed number, which [Layer.SetLimit] changes while calls run.
// Instead, an algorithm may look for the number: [AIMD], [Gradient2] and
// [Vegas] learn from how calls end and how long they took. Success is a sample;
// a failure that speaks of overload ([Config.DropCodes]) is a drop; a call that
// was cancelled, was never sent or failed for reasons of its own teaches nothing.
package concurrency

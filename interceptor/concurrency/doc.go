// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

// Package concurrency limits how many calls run at a time. It is Tower's concurrency
// limit, and Netflix's adaptive one, for all four kinds of call. Use it to bound what
// one client asks of a server at once, and to keep a slow server from collecting every
// goroutine of its callers.
//
//	stack, err := interceptor.NewStack(
//		loadshed.Config{},
//		concurrency.Config{Limit: 100},
//	)
//
// A call takes a permit before it is sent and holds it until it is over; a stream
// holds it for its whole life, not until it was opened. A call that finds no permit
// free waits as long as its [interceptor.Wait] allows: outermost or in a buffer it
// queues, inside a load shed it is refused at once, with code UNAVAILABLE and reason
// CONCURRENCY, or QUEUE_FULL if the queue is bounded ([Config.MaxWaiters]) and full.
// Where the limit is adaptive, a call does not wait until its deadline: when what is left is
// four times the latency of the server without a queue, or half of what was left when it came,
// it is refused. Otherwise a queue would send calls with too little time, which the
// server works on in vain.
//
// # Who goes first
//
// Of the calls that wait, the higher priority ([WithPriority]) is admitted first. Within
// a priority, further attempts of a retry or hedge go before first attempts, and then
// [Config.Discipline] decides. The same order decides who is refused when the queue is
// full. Where calls may not wait, permits are kept free for higher priorities. At three
// times the capacity, with a tenth of the calls at a high priority:
//
//	Shed > Buffer(100) > Limit(10)   high loses less than 1 %, low uses all the rest
//	Shed > Limit(10)                 high loses 3 to 4 %, low uses two thirds of the rest
//
// # Sharing
//
// A [Layer] has one state. In the stacks of several connections it limits all of them
// together, like Tower's global limit; for a limit per connection make a Layer for each.
// [Config.KeyBy] gives each method, tenant or other key its own limit, for up to
// [Config.MaxKeys] keys (1,000 by default). A limit per endpoint must know the endpoint
// before the call is sent: it is the field endpointLimit of the balancer belfry.p2c.
//
// What each limit does and thinks is shown by [Layer.Stats], by [interceptor.Limits], and
// as metrics by package otelobserver: permits, calls that wait, the latency that is
// compared with which, and why the limit went down.
//
// # Order
//
// Outside a retry or hedge it counts calls, and a call keeps its permit while it backs
// off; inside it counts attempts. Put it inside the buffer, and outside the rate and the
// breaker, which must decide when a call is sent and not when it starts to wait:
//
//	Buffer(100) > Limit(10)   10 calls run and 100 wait, 110 in all
//	Limit(10) > Rate          a permit is held while its call waits for the rate
//	Rate > Limit(10)          what has passed the rate waits, and is sent in a burst
//
// # Static and adaptive
//
// [Config.Limit] is a fixed number, which [Layer.SetLimit] changes while calls run.
// Without it an algorithm finds the number. It learns from how calls end and how long they
// took since they were sent, without the wait before. Success is a sample. A failure that
// is a sign of overload ([Config.DropCodes]) is a drop. A call that its caller gave up
// would have taken at least as long as it did. A call that was not sent, or failed with
// another code, teaches nothing. Outside a retry or hedge the algorithm learns from the
// whole call, not from its first attempt.
//
//	Auto        the default, for every server; it lowers the limit for a moment now and then
//	AIMD        for a server that refuses what it cannot do; with a Timeout, for one of which
//	            you know how long a call may take
//	Gradient2   for a server that refuses, behind clients that are rarely at their limit
//	Vegas       for one client of a server whose latencies vary little
//
// Simulated, with exponential service of 10 ms: goodput in % of the capacity, and mean
// latency in units of the unloaded one. AIMD has a Timeout of 50 ms, the others have their
// defaults. Load is in units of the capacity.
//
//	                                   Auto         AIMD         Gradient2    Vegas
//	20 workers, load 0.9               90 / 1.3     89 / 1.2     90 / 1.3     88 / 1.1
//	20 workers, load 1.2               99 / 1.6    100 / 1.8    100 / 2.6     96 / 1.2
//	200 workers, load 0.5              50 / 1.0     36 / 1.0     42 / 1.0     50 / 1.0
//	200 workers, load 1.2              99 / 1.3     37 / 1.0     45 / 1.0     98 / 1.1
//	2 workers, load 1.2                91 / 2.1     96 / 3.7    100 / 21      95 / 3.0
//	20 workers, 20 clients, load 1.2   99 / 2.3    100 / 4.6    100 / 47     100 / 6.2
//	refuses at a queue of 20, load 3   99 / 1.6    100 / 1.9    100 / 1.9     98 / 1.2
//
// The commands are, in the source of this module,
//
//	go run ./internal/limitsim/simulate
//	go run ./internal/limitsim/simulate -algorithms aimd-50ms,gradient2,vegas -seeds 1
//	go test ./internal/limitsim -run TestWire -v -wire 5m        # the same through real gRPC
//	go test ./interceptor/concurrency -run '^$' -bench BesideFixed  # what a call costs under Auto
//
// With the last, a call that costs nothing itself takes 1.7 times as long under Auto as
// under a fixed limit (221 and 133 ns), and neither allocates.
//
// Where half of 20 clients have a fixed limit, AIMD or Gradient2 instead, the latency is 2.5
// to 2.7 times the unloaded one, and those clients get more than their share (Jain's index
// is 0.95 with AIMD and Gradient2). When the work takes twice as long, one client
// that gave 1.2 times the load has 99 % of the new goodput from ten seconds later on. 20 clients
// have that, too, but are unequal in the five minutes after (0.75), because each learns it from
// a few calls. Where they give 2.4 times the load from the beginning they are less so (0.92,
// and 0.97 after 30 minutes; with -long).
//
// Auto does not share a server well where a client for each worker or more want all of it:
// each may have one call at a time at least. With 100 clients for 20 workers the latency is
// six times the unloaded one.
package concurrency

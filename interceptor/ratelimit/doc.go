// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

// Package ratelimit is a layer that limits the rate at which calls are sent. Use
// it to stay within a quota, or to spare a server that says how much it can bear.
// To bound how many calls run at a time, use a concurrency limit instead, which
// follows a server that gets slower.
//
//	stack, err := interceptor.NewStack(
//		concurrency.Config{Limit: 50},
//		ratelimit.Config{Limit: 100, Per: time.Second, Burst: 20},
//	)
//
// # What it does to a call
//
// Each call, or each attempt if the layer is inside a retry or a hedge, takes a token
// when it is admitted. A stream takes one token, however many messages it has. A call
// that finds no token waits for one if its [interceptor.Wait] and its deadline allow
// that. Otherwise it is refused at once with RESOURCE_EXHAUSTED, reason RATE_LIMIT, and a
// RetryInfo that says when its token would have come.
//
// Calls that wait are served by priority ([WithPriority]). Within a priority, further
// attempts go before first attempts, and then the earlier call goes first.
//
// A call that was not sent gives its token back: a layer inside refused it, there
// was no connection, or gRPC could not marshal the request. The token goes to the first
// call that waits. The next section says when it comes too late.
//
// One Layer has one rate, shared by all stacks, connections and methods that use it. For
// one limit of the whole program, put one value into all stacks. With [Config.KeyBy] each
// key has its own rate, up to [Config.MaxKeys] keys (10,000 by default), and a refusal
// names the key.
//
// # Algorithms
//
// [Smooth], the default, is the generic cell rate algorithm: a bucket of at most
// Burst tokens, and a new token every Per/Limit. In any interval of length t at
// most
//
//	Burst + t·Limit/Per
//
// calls are admitted, not counting those that give their token back. A token that comes
// back too late is lost: if the bucket could have been refilled without it meanwhile,
// calls that hold many tokens and then give them back would let others exceed the bound.
// A token is in time for at most Burst·Per/Limit after it was taken.
//
// [Window] admits at most Limit calls in any interval of length Per. It has the semantics
// of Tower's rate limit (Limit calls at once, and then none until Per has passed), but
// with a window that slides with each call. Windows with fixed edges admit up to twice
// the limit around an edge. A token is in time until Per has passed.
//
// # Order
//
// Put the rate inside a concurrency limit:
//
//	buffer > concurrency > ratelimit
//
// Then a call takes its token directly before it is sent, and the bound above is one
// on what the server sees. In the order ratelimit > concurrency, tokens are taken
// before the wait for a permit: with 100 calls a second and a server that hangs for
// 10 s, the 1,000 calls that have their token are all sent in the second after.
// The price of the recommended order is that a call holds its permit while it waits
// for a token.
//
// Outside a retry the layer counts calls; inside it counts attempts, as a server's quota
// does. Put a load shed or a buffer outside the rate.
//
// # Third-party limiters
//
// [FromRate] makes a layer of a limiter of golang.org/x/time/rate. [FromLimiter] makes
// one of a [Limiter] that decides elsewhere, such as in a store that many processes share.
package ratelimit

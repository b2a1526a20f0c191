// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

// Package ratelimit is a layer that lets calls begin at a limited rate. Use it
// to stay within a quota, or to spare a server that says how much it can bear; to
// bound how many calls run at a time, use a concurrency limit instead, which
// follows a server that gets slower.
//
//	limit, err := ratelimit.New(ratelimit.Config{Limit: 100, Per: time.Second, Burst: 20})
//	…
//	stack, err := interceptor.NewStack(limit)
//
// # What it does to a call
//
// Each call, or each attempt if the layer stands inside a retry or a hedge, takes
// a token when it is admitted; a stream takes one, not one for each message.
// Without a token the call waits its turn, first come, first served, or is
// refused: as its [interceptor.Wait] says. A call whose turn would come after the end of its Wait
// or after its deadline is refused at once, with RESOURCE_EXHAUSTED, reason
// RATE_LIMIT, and a RetryInfo that says when its turn would have come. A call
// that is refused further in, or that is not sent for another reason, gives its
// token back, to the first in the queue if there is one.
//
// One Layer has one rate, shared by all stacks, connections and methods that it
// stands in: a limit for the whole program is one value in all stacks. With a key
// ([Config.KeyBy], [WithKey]) each key has that rate.
//
// # Algorithms
//
// [Smooth], the default, is the generic cell rate algorithm: Burst tokens at most,
// and one more every Per/Limit. In any interval of length t at most
// Burst + t·Limit/Per calls begin. It is one atomic word.
//
// [Window] has the semantics of Tower's rate limit, Limit calls at once and then
// none until Per has passed, but over a window that slides with each call: in no
// interval of length Per do more than Limit calls begin, where windows that
// begin anew let twice the limit pass around their edges.
//
// # Order
//
// Outside a retry the layer counts calls, inside it attempts, which is what a
// server's quota counts. A queue that bounds the number of calls that wait
// stands outside it, as does a load shed; a concurrency limit stands inside it, so
// that no permit is held while waiting for a token.
//
// # Other limiters
//
// [FromRate] makes a layer of a limiter of golang.org/x/time/rate, [FromLimiter]
// of a [Limiter] that asks elsewhere, such as one that many processes share.
package ratelimit

// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

// Package budget bounds the further attempts that retries and hedges make, in
// proportion to the calls. It is Tower's TpsBudget and Finagle's RetryBudget,
// with exact arithmetic.
//
// Why a budget and not only a maximal number of attempts? Three attempts for each
// call are three times the load on servers that fail because of their load, which
// keeps them failing: a retry storm. With a budget a client whose calls all fail
// sends 1.2 times the calls, not three times, and repeats nearly every call when
// few fail.
//
// Every retry and hedge layer has a budget of its own unless it is given one. It
// makes sense to share one among all the layers and stacks that call the same
// servers, for it is they who must not be flooded:
//
//	b, err := budget.New(budget.Config{Ratio: 0.1})
//	…
//	r, err := retry.New(retry.Config{}, retry.WithBudget(b))
//	h, err := hedge.New(hedge.Config{}, hedge.WithBudget(b))
//
// The balance at any moment is
//
//	MinPerSecond·TTL + Ratio·(calls of the last TTL) − (further attempts of the last TTL)
//
// and an attempt needs a balance of one. That is a bound for every stretch of
// one TTL, wherever it begins, not an average. A call that was not sent
// ([interceptor.Outcome.Sent]) pays for nothing, and a further attempt that was not
// sent costs nothing: one that a layer refused, that gRPC refused, or that found no
// connection.
//
// The package stands by itself because retry and hedge, which know nothing of
// each other, spend the same budget. It takes part in calls only through them.
package budget

// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

// Package budget bounds the further attempts that retries and hedges make, in
// proportion to the calls. It is Tower's TpsBudget and Finagle's RetryBudget,
// with exact arithmetic.
//
// Why a budget, and not only a maximum of attempts? Three attempts for each call are
// three times the load on servers that fail because of their load, which keeps them
// failing: a retry storm. With a budget a client whose calls all fail sends 1.2 times
// the calls and not three times, and it still repeats nearly every call when few fail.
//
// Every retry and hedge layer has its own budget unless it is given one. Share one among
// all the layers and stacks that call the same servers, because the servers see the sum:
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
// and an attempt needs a balance of one. That bounds every interval of one TTL; it is
// not an average. A call that was not sent ([interceptor.Outcome.Sent]) pays nothing, and
// a further attempt that was not sent costs nothing: one that a layer refused, that gRPC
// refused, or that found no connection.
//
// Config.MaxConcurrent bounds also how many further attempts there are at a moment.
//
// When a budget is spent, no further attempt is made. The call ends with the server's
// last error, in which errors.As finds a refusal with reason BUDGET.
//
// A budget is no layer: it takes part in calls only through retries and hedges.
package budget

// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

// Package limitsim simulates clients with concurrency limits in front of one server, to
// see what an algorithm of package limit makes of the server: how much of its
// capacity is used, and how long the calls take that it serves.
//
// The algorithms are the real ones; only time and chance are not. A run depends on nothing
// but its seed, and takes about a second for five minutes of 2,000 calls a second.
//
//	go run ./internal/limitsim/simulate
//
// # The model
//
// Unless a scenario says otherwise, calls arrive as a Poisson process, belong to the
// clients at random, and take the server an exponential time of mean 10 ms. The server has
// workers and one queue before them, first come first served, or cores that all its calls
// share. A call that finds its client's limit reached is refused at once. A client gives
// up after 1 s with DEADLINE_EXCEEDED, and the server does the work anyway. There is
// no network. The clients begin at the same moment, with limits of 20.
//
// Goodput is what was served in time, in parts of the capacity. Latency is the mean of
// what was served, in units of the mean work.
package limitsim

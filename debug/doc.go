// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

// Package debug has a page that shows what channels and stacks are doing, live: endpoints
// with their state, latency, share and why they get no calls; layers with their limits,
// circuits, budgets and waiting calls; and the last refusals with their reason.
//
//	page := debug.New()
//	stack, err := interceptor.NewStack(interceptor.Named("orders"), interceptor.Observe(page), …)
//	…
//	http.Handle("/debug/belfry", page)
//
// It shows every channel with the policy belfry.p2c in the process, and the stacks that it
// observes. Another observer goes beside it: interceptor.Observe(page, obs).
//
// The page needs nothing from elsewhere, and nothing on it changes anything. With "?json" after
// its address it is JSON, with "?events" a stream of the same, once a second, as server-sent
// events. It shows addresses, method names and error texts, so mount it where only operators
// come.
//
// Whatever the size of the program, the page shows at most [MaxEndpoints] endpoints of a policy,
// the ones in trouble first, and says how many more there are; [MaxFigures] figures of a
// stack's layers; and [MaxRefusals] refusals.
package debug

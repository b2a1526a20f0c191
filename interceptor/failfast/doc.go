// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

// Package failfast keeps calls from queueing for a server that has stopped
// answering. It is linkerd's fail-fast. Use it around limits and rates that calls may
// wait for, and inside a buffer if there is one: it is worth waiting in a queue that
// moves, and not in one that does not.
//
//	stack, err := interceptor.NewStack(
//		buffer.Config{Size: 100},
//		failfast.Config{After: 300 * time.Millisecond},
//		concurrency.Config{Limit: 10},
//	)
//
// A call waits at most [Config.After], for capacity and for a READY endpoint. If calls
// wait and none is admitted for that time, all of them fail at once, and new calls fail
// at once until one finds capacity. Calls refused by either rule end with code
// UNAVAILABLE and reason FAIL_FAST. Nothing was sent for them, so another server may be
// tried.
//
// # How readiness is found
//
// While the layer fails fast, every call asks the layers inside for capacity but does not
// wait for it. The first call that gets some is admitted, and later calls may wait again.
// So the layer never refuses capacity that is there, needs no probe, and runs nothing in
// the background. Its only timer ends the waits, and exists only while calls wait.
//
// # Order
//
// It acts on what is inside it, so put it outside the limits. NewStack rejects it if
// nothing inside makes calls wait. A buffer inside it lets calls wait as long as the
// buffer allows, so put the buffer outside:
//
//	Buffer(100) > FailFast(300ms) > Limit(10)   100 wait, none for longer than 300ms
//	FailFast(300ms) > Buffer(100) > Limit(10)   100 wait, for as long as it takes
//	Shed > FailFast(300ms) > Limit(10)          none waits
//
// Outside a retry it bounds how long calls and further attempts wait.
package failfast

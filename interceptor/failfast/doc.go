// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

// Package failfast keeps calls from queueing for a server that has stopped
// answering. It is linkerd's fail-fast. Use it around limits and rates that calls may
// wait for, inside a buffer if there is one: a queue that moves is worth waiting in,
// one that stands is not.
//
//	stack, err := interceptor.NewStack(
//		buffer.Config{Size: 100},
//		failfast.Config{After: 300 * time.Millisecond},
//		concurrency.Config{Limit: 10},
//	)
//
// A call waits for [Config.After] at most, for capacity and for a READY endpoint. And
// if no call has been admitted at all for that time, although calls were waiting, all
// calls that wait fail at once, and from then on new calls fail at once, until one
// finds capacity. Calls refused by either rule end with code UNAVAILABLE and reason
// FAIL_FAST; nothing was sent for them, so another server may be tried.
//
// # How readiness is found
//
// While the layer fails fast every call asks the layers inside for capacity, but does
// not wait for it. The first one that gets it is admitted and ends the failing: the
// calls after it may wait again. So readiness is never refused, there is no probe that
// takes capacity away, and nothing runs in the background. The only timer is the one
// that ends the waiting of those that wait, and it lives as long as they do.
//
// # Order
//
// It acts on what is inside it, so it stands outside of the limits; NewStack rejects
// it where nothing inside can be not ready. A buffer inside it lets calls wait for as
// long as the buffer allows, so the buffer belongs outside:
//
//	Buffer(100) > FailFast(300ms) > Limit(10)   100 wait, none for longer than 300ms
//	FailFast(300ms) > Buffer(100) > Limit(10)   100 wait, for as long as it takes
//	Shed > FailFast(300ms) > Limit(10)          none waits
//
// Outside a retry it bounds how long calls and further attempts wait.
package failfast

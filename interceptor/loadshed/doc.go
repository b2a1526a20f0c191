// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

// Package loadshed turns waiting into refusal: a call for which the layers inside
// have no capacity now is refused at once. It is Tower's load_shed. Use it where
// a caller is better served by a fast error than by a place in a queue, and to
// keep queues from building up in front of a limit.
//
//	stack, err := interceptor.NewStack(loadshed, limit) // refuses what limit would let wait
//
// It sheds for whatever reason the layers inside are not ready (a concurrency or
// rate limit, a full buffer) and for no other: capacity that is there is never
// refused, and it has no state of its own that could be wrong about it. The
// refusal is the one of the layer that was not ready, with its name, reason, code
// and retry-after, so that an error or a metric says what was short. Whatever
// other layers have taken for a call that is shed they get back.
//
// # Order
//
// It acts on what is inside it, so it stands outside of the limits, and is useless
// as the innermost layer. A buffer inside it waits on behalf of its calls:
//
//	Shed > Limit(10)               10 calls run, the next is refused
//	Shed > Buffer(100) > Limit(10) 10 calls run, 100 wait, the next is refused
//	Limit(10) > Shed               10 calls run, the others wait
//
// Outside a retry or hedge it refuses calls; further attempts never wait anyway.
package loadshed

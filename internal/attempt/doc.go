// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

// Package attempt is about one attempt of a call: what a server says about further
// attempts and is told about them ([WishOf], [WithPrevious]), which methods are
// declared idempotent ([Declared]), what became of it at the connection ([Fate]), and
// what layers and balancing policies tell each other.
//
// A picker sees only the method and the context of a call, so what it has to know travels
// in one context value, the [Info], which it looks up once.
package attempt

// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

// Package attempt is what can be said of one attempt of a call: what a server says
// about further attempts and what it is told ([WishOf], [WithPrevious]), which
// methods may be sent more than once ([May]), and what layers and balancing
// policies tell each other.
//
// A picker sees nothing of a call but its method and its context, so what it has
// to know travels in one context value, the [Info], which it looks up once.
package attempt

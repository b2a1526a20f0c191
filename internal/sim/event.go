// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package sim

// A handler is what happens at an event. It gets the event's number, by which it
// can tell an event that was overtaken by a later one.
type handler interface{ fire(number uint64) }

// action is a handler for what happens rarely enough to be a closure.
type action func()

func (a action) fire(uint64) { a() }

// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

// Package told remembers which errors were reported, so that an outage is
// reported once however often something is tried while it lasts.
package told

// most bounds what is remembered of errors that differ each time.
const most = 32

// Errors are those that were reported since all was well. The zero value has none.
// It is not safe for concurrent use.
type Errors struct{ texts map[string]struct{} }

// First reports whether an error with this text is to be reported, and remembers it.
func (e *Errors) First(text string) bool {
	if _, ok := e.texts[text]; ok {
		return false
	}
	if e.texts == nil || len(e.texts) == most {
		e.texts = make(map[string]struct{})
	}
	e.texts[text] = struct{}{}
	return true
}

// Forget is called when all is well again.
func (e *Errors) Forget() { e.texts = nil }

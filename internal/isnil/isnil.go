// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

// Package isnil tells what is nil in an interface.
package isnil

import "reflect"

// Value reports whether v is nil, or an interface that holds a nil pointer, map,
// function, slice or channel.
func Value(v any) bool {
	if v == nil {
		return true
	}
	switch r := reflect.ValueOf(v); r.Kind() {
	case reflect.Pointer, reflect.Func, reflect.Map, reflect.Slice, reflect.Chan:
		return r.IsNil()
	}
	return false
}

// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

// Package message makes and copies messages of any type that a codec can fill, so that
// each attempt of a call has its own reply.
package message

import (
	"reflect"

	"google.golang.org/protobuf/proto"
)

// NewLike returns a new, empty message of m's type, as the reply of an attempt. m is a
// protocol buffer message, or whatever the call's codec can fill, which is a pointer or a
// map. It does not read what m holds, because an attempt may be writing to it.
func NewLike(m any) any {
	v := reflect.ValueOf(m)
	switch v.Kind() {
	case reflect.Pointer:
		n := reflect.New(v.Type().Elem()).Interface()
		if p, ok := n.(proto.Message); ok && p.ProtoReflect().Descriptor() == nil {
			// A dynamic message, whose type is an immutable part of it.
			return m.(proto.Message).ProtoReflect().New().Interface()
		}
		return n
	case reflect.Map:
		return reflect.MakeMap(v.Type()).Interface()
	}
	return m // A codec could not write to it.
}

// CopyInto makes dst equal to src, which is of the same type and not used again.
func CopyInto(dst, src any) {
	if p, ok := dst.(proto.Message); ok {
		proto.Reset(p)
		proto.Merge(p, src.(proto.Message))
		return
	}
	d, s := reflect.ValueOf(dst), reflect.ValueOf(src)
	switch d.Kind() {
	case reflect.Pointer:
		if !d.IsNil() {
			d.Elem().Set(s.Elem())
		}
	case reflect.Map:
		d.Clear()
		for it := s.MapRange(); it.Next(); {
			d.SetMapIndex(it.Key(), it.Value())
		}
	}
}

// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

// Package message makes and copies messages of any type that a codec can fill, so that
// each attempt of a call has its own reply, and sends messages of its own.
//
// A wrapper is a struct that is a protocol buffer because one is embedded in it, by
// pointer or interface. Its zero value is none, so what is embedded is made anew.
package message

import (
	"reflect"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
)

// NewLike returns a new, empty message of m's type, as the reply of an attempt. m is a
// protocol buffer message, or whatever the call's codec can fill. It does not read what a
// codec writes to m, because an attempt may be writing to it. What can be neither made nor
// copied, such as a function, is returned as it is.
func NewLike(m any) any {
	v := reflect.ValueOf(m)
	if s, i := wrapper(v); i >= 0 {
		n := reflect.New(s.Type()).Elem()
		if !n.Field(i).CanSet() {
			return m.(proto.Message).ProtoReflect().New().Interface()
		}
		if in := s.Field(i); !in.IsNil() {
			n.Field(i).Set(reflect.ValueOf(NewLike(in.Interface())))
		}
		if v.Kind() == reflect.Pointer {
			n = n.Addr()
		}
		return n.Interface()
	}
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
	case reflect.Slice:
		return reflect.MakeSlice(v.Type(), v.Len(), v.Len()).Interface()
	}
	return m
}

var protoMessage = reflect.TypeFor[proto.Message]()

// wrapper returns the struct that v is or points at, and the index of the protocol buffer
// that is embedded in it. The index is negative if v is no wrapper.
func wrapper(v reflect.Value) (s reflect.Value, i int) {
	if !v.IsValid() || !v.Type().Implements(protoMessage) {
		return s, -1
	}
	s = v
	if v.Kind() == reflect.Pointer {
		s = v.Elem()
	}
	if s.Kind() != reflect.Struct {
		return s, -1
	}
	for i := range s.NumField() {
		if f := s.Type().Field(i); f.Anonymous && f.Type.Implements(protoMessage) {
			return s, i
		}
	}
	return s, -1
}

// CopyInto makes dst equal to src, which NewLike has made of dst and which is not used
// again.
func CopyInto(dst, src any) {
	d, s := reflect.ValueOf(dst), reflect.ValueOf(src)
	if dw, i := wrapper(d); i >= 0 && dw.Field(i).CanInterface() {
		sw, _ := wrapper(s)
		in := dw.Field(i).Interface()
		if d.Kind() == reflect.Pointer { // Of a value only what is embedded can have been filled.
			dw.Set(sw)
			dw.Field(i).Set(reflect.ValueOf(in)) // The caller may have it, too.
		}
		if in != nil {
			CopyInto(in, sw.Field(i).Interface())
		}
		return
	}
	if p, ok := dst.(proto.Message); ok {
		proto.Reset(p)
		move(p.ProtoReflect(), src.(proto.Message).ProtoReflect())
		return
	}
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
	case reflect.Slice:
		reflect.Copy(d, s)
	}
}

// move gives dst, which is empty, what src has. It does not copy what that refers to, so a
// large message costs no more than a small one.
func move(dst, src protoreflect.Message) {
	src.Range(func(f protoreflect.FieldDescriptor, v protoreflect.Value) bool {
		dst.Set(f, v)
		return true
	})
	if unknown := src.GetUnknown(); len(unknown) > 0 {
		dst.SetUnknown(unknown)
	}
}

// A Type is the type of a message, that of a dynamic one included. It keeps nothing of the
// message that it was taken from. The zero Type is that of nothing.
type Type struct {
	of   reflect.Type
	like any // An empty message that is not changed, if the type is a pointer or a wrapper.
}

// TypeOf returns the type of m, which a codec can encode.
func TypeOf(m any) Type {
	t := Type{of: reflect.TypeOf(m)}
	if _, ok := m.(proto.Message); ok || t.of.Kind() == reflect.Pointer {
		t.like = NewLike(m)
	}
	return t
}

// Is reports whether m is of type t.
func (t Type) Is(m any) bool {
	if t.of == nil || reflect.TypeOf(m) != t.of {
		return false
	}
	p, ok := m.(proto.Message)
	return !ok || descriptor(p) == descriptor(t.like.(proto.Message))
}

func descriptor(m proto.Message) protoreflect.MessageDescriptor { return m.ProtoReflect().Descriptor() }

// Decode returns a new message of type t. fill decodes what was encoded into what it is
// given, as the Unmarshal method of a codec does.
func (t Type) Decode(fill func(any) error) (any, error) {
	if t.like != nil {
		m := NewLike(t.like)
		return m, fill(m)
	}
	p := reflect.New(t.of)
	err := fill(p.Interface())
	return p.Elem().Interface(), err
}

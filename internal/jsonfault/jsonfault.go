// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

// Package jsonfault finds the field of a config that does not fit its message, and says
// what its value should look like. protojson says only at which line and column.
package jsonfault

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"

	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/types/dynamicpb"
)

// A Fault is a field that does not fit.
type Fault struct {
	Path string // By JSON names, such as layers[2].concurrency.limit; empty for the whole.
	Err  error  // The value and the rule.
}

func fault(path, format string, args ...any) *Fault { return &Fault{path, fmt.Errorf(format, args...)} }

// Find returns the first field of the proto3 JSON form of a message that does not fit, nil
// if it finds none. It calls unknown for each field that the message in does not have; an
// error that it returns makes the field the fault.
func Find(js []byte, md protoreflect.MessageDescriptor, unknown func(path string, in protoreflect.MessageDescriptor) error) *Fault {
	return finder{unknown}.message(js, md, "")
}

type finder struct {
	unknown func(path string, in protoreflect.MessageDescriptor) error
}

func (f finder) message(js []byte, md protoreflect.MessageDescriptor, path string) *Fault {
	var fields map[string]json.RawMessage
	if err := json.Unmarshal(js, &fields); err != nil {
		if syntax := (*json.SyntaxError)(nil); errors.As(err, &syntax) {
			return fault(path, "%w at byte %d", err, syntax.Offset)
		}
		return fault(path, "%s, must be an object", brief(js))
	}
	set := map[protoreflect.FullName]string{}
	for _, key := range slices.Sorted(maps.Keys(fields)) {
		value := fields[key]
		field := Join(path, key)
		fd := md.Fields().ByJSONName(key)
		if fd == nil {
			fd = md.Fields().ByTextName(key)
		}
		if fd == nil {
			if err := f.unknown(field, md); err != nil {
				return &Fault{field, err}
			}
			continue
		}
		if isNull(value) {
			continue
		}
		if o := fd.ContainingOneof(); o != nil && !o.IsSynthetic() {
			if other, ok := set[o.FullName()]; ok {
				return fault(field, "set beside %s, must be set alone", other)
			}
			set[o.FullName()] = key
		}
		if e := f.value(value, fd, field); e != nil {
			return e
		}
	}
	return nil
}

func (f finder) value(js json.RawMessage, fd protoreflect.FieldDescriptor, field string) *Fault {
	switch {
	case fd.IsMap():
		var entries map[string]json.RawMessage
		if json.Unmarshal(js, &entries) != nil {
			return fault(field, "%s, must be an object", brief(js))
		}
		for _, key := range slices.Sorted(maps.Keys(entries)) {
			if e := f.one(entries[key], fd.MapValue(), fmt.Sprintf("%s[%q]", field, key)); e != nil {
				return e
			}
		}
		return nil
	case fd.IsList():
		var entries []json.RawMessage
		if json.Unmarshal(js, &entries) != nil {
			return fault(field, "%s, must be an array", brief(js))
		}
		for i, entry := range entries {
			if e := f.one(entry, fd, fmt.Sprintf("%s[%d]", field, i)); e != nil {
				return e
			}
		}
		return nil
	}
	return f.one(js, fd, field)
}

// one looks at one value of a field, even if the field is a list.
func (f finder) one(js json.RawMessage, fd protoreflect.FieldDescriptor, field string) *Fault {
	// The well-known types have JSON forms of their own.
	if m := fd.Message(); m != nil && m.FullName().Parent() != "google.protobuf" {
		if isNull(js) {
			return fault(field, "null, must be an object")
		}
		return f.message(js, m, field)
	}
	value := []byte(js)
	if fd.IsList() {
		value = slices.Concat([]byte("["), js, []byte("]"))
	}
	object := slices.Concat([]byte(`{"`+fd.JSONName()+`":`), value, []byte("}"))
	if protojson.Unmarshal(object, dynamicpb.NewMessage(fd.ContainingMessage())) != nil {
		return fault(field, "%s, must be %s", brief(js), describe(fd))
	}
	return nil
}

// describe returns what a value of the field looks like.
func describe(fd protoreflect.FieldDescriptor) string {
	switch fd.Kind() {
	case protoreflect.BoolKind:
		return "true or false"
	case protoreflect.StringKind:
		return "a string"
	case protoreflect.DoubleKind:
		return "a number"
	case protoreflect.EnumKind:
		return "one of " + EnumNames(fd.Enum())
	case protoreflect.MessageKind:
		if fd.Message().Name() == "Duration" {
			return `a duration in seconds, such as "1.5s"`
		}
		return "an object"
	case protoreflect.Uint32Kind, protoreflect.Uint64Kind:
		return "an integer of at least 0"
	}
	return "an integer"
}

// Names returns the JSON names of fields, or "none".
func Names(fields interface {
	Len() int
	Get(int) protoreflect.FieldDescriptor
}) string {
	var names []string
	for i := range fields.Len() {
		names = append(names, fields.Get(i).JSONName())
	}
	if names == nil {
		return "none"
	}
	return strings.Join(names, ", ")
}

func isNull(js json.RawMessage) bool { return string(bytes.TrimSpace(js)) == "null" }

// brief returns a piece of JSON, shortened for an error message.
func brief(js []byte) string {
	const most = 60
	s := strings.ToValidUTF8(string(bytes.TrimSpace(js)), "?")
	if len(s) > most {
		s = strings.ToValidUTF8(s[:most], "") + "…"
	}
	return s
}

// Join returns the path of a field of the message at path.
func Join(path, field string) string {
	if path == "" || field == "" {
		return path + field
	}
	return path + "." + field
}

// EnumNames returns the names of the values of an enum.
func EnumNames(ed protoreflect.EnumDescriptor) string {
	var names []string
	for i := range ed.Values().Len() {
		names = append(names, string(ed.Values().Get(i).Name()))
	}
	return strings.Join(names, ", ")
}

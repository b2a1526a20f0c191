// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package stackconfig

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

	"github.com/belfry-go/belfry/interceptor"
	"github.com/belfry-go/belfry/internal/check"
	configv1 "github.com/belfry-go/belfry/proto/belfry/config/v1"
)

// An Error says which field of a config is wrong, and why. errors.As finds it in
// what this package returns.
type Error struct {
	// Field is the path of the field by its JSON names, such as
	// methodConfig[1].layers[2].concurrency.limit. It is empty if the config as a
	// whole is wrong.
	Field string
	// Err has the value and the rule. If a layer rejected the value, errors.As finds the
	// [interceptor.ConfigError] of the layer in it.
	Err error
}

// Error names the field, the value and the rule.
func (e *Error) Error() string {
	if e.Field == "" {
		return "stackconfig: " + e.Err.Error()
	}
	return "stackconfig: " + e.Field + ": " + e.Err.Error()
}

// Unwrap returns e.Err.
func (e *Error) Unwrap() error { return e.Err }

func wrong(field, format string, args ...any) *Error {
	return &Error{Field: field, Err: fmt.Errorf(format, args...)}
}

// Parse reads the JSON form of a config: proto3 JSON, except that an unknown field is an
// error. It checks only the form; [NewStackFromConfig] and [Stack.Update] check the
// values. The error is an [*Error].
func Parse(js []byte) (*configv1.Stack, error) {
	m := new(configv1.Stack)
	err := protojson.Unmarshal(js, m)
	if err == nil {
		return m, nil
	}
	if e := locate(js, m.ProtoReflect().Descriptor(), ""); e != nil {
		return nil, e
	}
	return nil, &Error{Err: err}
}

// locate finds the first field of a JSON message that cannot be parsed, because protojson
// says at which line and column but not in which entry. It returns nil if it finds none.
func locate(js []byte, md protoreflect.MessageDescriptor, path string) *Error {
	var fields map[string]json.RawMessage
	if err := json.Unmarshal(js, &fields); err != nil {
		if syntax := (*json.SyntaxError)(nil); errors.As(err, &syntax) {
			return wrong(path, "%w at byte %d", err, syntax.Offset)
		}
		return wrong(path, "%s, must be an object", brief(js))
	}
	set := map[protoreflect.FullName]string{}
	for _, key := range slices.Sorted(maps.Keys(fields)) {
		value := fields[key]
		field := join(path, key)
		fd := md.Fields().ByJSONName(key)
		if fd == nil {
			fd = md.Fields().ByTextName(key)
		}
		if fd == nil {
			hint := ""
			if md.Name() == "MethodConfig" {
				hint = " (a setting of gRPC's own service config, such as timeout, is a layer here or is set there)"
			}
			return wrong(field, "unknown field, must be one of %s%s", fieldNames(md.Fields()), hint)
		}
		if isNull(value) {
			continue
		}
		if o := fd.ContainingOneof(); o != nil && !o.IsSynthetic() {
			if other, ok := set[o.FullName()]; ok {
				return wrong(field, "set beside %s, must be set alone", other)
			}
			set[o.FullName()] = key
		}
		if e := locateValue(value, fd, field); e != nil {
			return e
		}
	}
	return nil
}

func locateValue(js json.RawMessage, fd protoreflect.FieldDescriptor, field string) *Error {
	switch {
	case fd.IsMap():
		var entries map[string]json.RawMessage
		if json.Unmarshal(js, &entries) != nil {
			return wrong(field, "%s, must be an object", brief(js))
		}
		for _, key := range slices.Sorted(maps.Keys(entries)) {
			if e := locateOne(entries[key], fd.MapValue(), fmt.Sprintf("%s[%q]", field, key)); e != nil {
				return e
			}
		}
		return nil
	case fd.IsList():
		var entries []json.RawMessage
		if json.Unmarshal(js, &entries) != nil {
			return wrong(field, "%s, must be an array", brief(js))
		}
		for i, entry := range entries {
			if e := locateOne(entry, fd, fmt.Sprintf("%s[%d]", field, i)); e != nil {
				return e
			}
		}
		return nil
	}
	return locateOne(js, fd, field)
}

const durationName = "google.protobuf.Duration"

// locateOne looks at one value of a field, even if the field is a list.
func locateOne(js json.RawMessage, fd protoreflect.FieldDescriptor, field string) *Error {
	if m := fd.Message(); m != nil && m.FullName() != durationName {
		if isNull(js) {
			return wrong(field, "null, must be an object")
		}
		return locate(js, m, field)
	}
	value := []byte(js)
	if fd.IsList() {
		value = slices.Concat([]byte("["), js, []byte("]"))
	}
	object := slices.Concat([]byte(`{"`+fd.JSONName()+`":`), value, []byte("}"))
	if protojson.Unmarshal(object, dynamicpb.NewMessage(fd.ContainingMessage())) != nil {
		return wrong(field, "%s, must be %s", brief(js), describe(fd))
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
		return "one of " + enumNames(fd.Enum())
	case protoreflect.MessageKind:
		return `a duration in seconds, such as "1.5s"`
	}
	return "an integer"
}

func fieldNames(fields interface {
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

func join(path, field string) string {
	if path == "" || field == "" {
		return path + field
	}
	return path + "." + field
}

// inLayer translates an error of the package of a layer or a budget into the names of the
// data. md is the layer's message, which is at path.
func inLayer(path string, md protoreflect.MessageDescriptor, err error) *Error {
	var c *interceptor.ConfigError
	if !errors.As(err, &c) {
		return &Error{Field: path, Err: err}
	}
	rule := c.Rule
	around := []protoreflect.MessageDescriptor{md} // The messages around the field, the innermost first.
	for name := range strings.SplitSeq(c.Field, ".") {
		name, index, _ := strings.Cut(name, "[")
		fd := fieldOf(around[0], name)
		if fd == nil {
			break
		}
		path = join(path, fd.JSONName())
		if index != "" {
			path += "[" + index
		}
		if fd.HasOptionalKeyword() {
			rule = check.ZeroIsNone(rule)
		}
		if fd.Message() == nil {
			break
		}
		around = slices.Insert(around, 0, fd.Message())
	}
	return &Error{Field: path, Err: &layerError{config: c, rule: renamed(rule, around)}}
}

// A layerError is a ConfigError in the names of the data, without the path.
type layerError struct {
	config *interceptor.ConfigError
	rule   string
}

func (e *layerError) Error() string { return fmt.Sprintf("%v, %s", e.config.Value, e.rule) }

func (e *layerError) Unwrap() error { return e.config }

// renamed replaces the names of fields in a rule, which are those of a Config, with their
// names in the data.
func renamed(rule string, around []protoreflect.MessageDescriptor) string {
	words := strings.Split(rule, " ")
	for i, word := range words {
		name := strings.TrimRight(word, ",")
		for _, md := range around {
			if path := pathOf(md, name); path != "" {
				words[i] = path + word[len(name):]
				break
			}
		}
	}
	return strings.Join(words, " ")
}

// pathOf returns the path in the data of the field that a Config calls name, such as
// Backoff.Max; empty if there is none.
func pathOf(md protoreflect.MessageDescriptor, name string) (path string) {
	for name := range strings.SplitSeq(name, ".") {
		if md == nil {
			return ""
		}
		fd := fieldOf(md, name)
		if fd == nil {
			return ""
		}
		path, md = join(path, fd.JSONName()), fd.Message()
	}
	return path
}

// jsonNames has the fields of Configs whose names in the schema differ in more than
// the case of the first letter, by the message and the field.
var jsonNames = map[string]string{
	"Timeout.Timeout":           "call",
	"Concurrency.AIMD":          "aimd",
	"Concurrency.CoDelTarget":   "codelTarget",
	"Concurrency.CoDelInterval": "codelInterval",
	"Budget.TTL":                "ttl",
}

// fieldOf returns the field of a message that a Config calls name; nil if there is
// none.
func fieldOf(md protoreflect.MessageDescriptor, name string) protoreflect.FieldDescriptor {
	if name == "" {
		return nil
	}
	field, ok := jsonNames[string(md.Name())+"."+name]
	if !ok {
		field = strings.ToLower(name[:1]) + name[1:]
	}
	return md.Fields().ByJSONName(field)
}

func enumNames(ed protoreflect.EnumDescriptor) string {
	var names []string
	for i := range ed.Values().Len() {
		names = append(names, string(ed.Values().Get(i).Name()))
	}
	return strings.Join(names, ", ")
}

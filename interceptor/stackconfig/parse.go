// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package stackconfig

import (
	"errors"
	"fmt"
	"slices"
	"strings"

	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/reflect/protoreflect"

	"github.com/belfry-go/belfry/interceptor"
	"github.com/belfry-go/belfry/internal/check"
	"github.com/belfry-go/belfry/internal/jsonfault"
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
	if f := jsonfault.Find(js, m.ProtoReflect().Descriptor(), unknown); f != nil {
		return nil, &Error{Field: f.Path, Err: f.Err}
	}
	return nil, &Error{Err: err}
}

// unknown returns the error of a field that the message does not have.
func unknown(_ string, in protoreflect.MessageDescriptor) error {
	hint := ""
	if in.Name() == "MethodConfig" {
		hint = " (a setting of gRPC's own service config, such as timeout, is a layer here or is set there)"
	}
	return fmt.Errorf("unknown field, must be one of %s%s", jsonfault.Names(in.Fields()), hint)
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
		path = jsonfault.Join(path, fd.JSONName())
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
		path, md = jsonfault.Join(path, fd.JSONName()), fd.Message()
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

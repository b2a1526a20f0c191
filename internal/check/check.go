// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

// Package check checks the settings of belfry's layers. Each layer lists its
// settings once, with their ranges and defaults, and gets an [Error] for each that is
// wrong:
//
//	errs := check.Of("retry")
//	errs.Name(o.name)
//	check.Default(errs, "MaxAttempts", &c.MaxAttempts, check.From(1, 100), DefaultMaxAttempts)
//	check.Default(errs, "BufferBytes", &c.BufferBytes, check.From(1, maxBuffer), DefaultBufferBytes)
//	return errs.Err()
package check

import (
	"errors"
	"fmt"
	"math"
	"strconv"
	"strings"
	"time"

	"google.golang.org/grpc/codes"

	"github.com/belfry-go/belfry/internal/codeset"
)

// An Error says which setting of which layer is wrong. Users know it as
// [interceptor.ConfigError].
//
// [interceptor.ConfigError]: https://pkg.go.dev/github.com/belfry-go/belfry/interceptor#ConfigError
type Error struct {
	Layer string // the package of the layer, such as "retry"
	Field string // the field's Go path, such as "Backoff.Max" or "Codes[2]"; of an option "WithName"
	Value any    // what it is; nil for a function or a pointer that is nil
	Rule  string // what it must be, such as "must be from 1 to 100, or 0 for 3"
}

// Error names the layer, the field, the value and the rule.
func (e *Error) Error() string {
	return e.Layer + ": " + e.Field + " is " + shown(e.Value) + ", " + e.Rule
}

// shown returns v as an error prints it.
func shown(v any) string {
	switch v := v.(type) {
	case nil:
		return "nil"
	case string:
		return fmt.Sprintf("%q", v)
	}
	return fmt.Sprintf("%+v", v)
}

// Errors collects what is wrong with the settings of one layer.
type Errors struct {
	layer  string
	prefix string // Of fields.
	list   *[]error
}

// Of returns Errors of the layer of a package.
func Of(layer string) *Errors { return &Errors{layer: layer, list: new([]error)} }

// In returns an Errors for the fields of a field. It adds to e.
func (e *Errors) In(field string) *Errors {
	return &Errors{layer: e.layer, prefix: e.prefix + field + ".", list: e.list}
}

// Add adds an error. The rule is a format if there are args.
func (e *Errors) Add(field string, value any, rule string, args ...any) {
	if len(args) > 0 {
		rule = fmt.Sprintf(rule, args...)
	}
	*e.list = append(*e.list, &Error{Layer: e.layer, Field: e.prefix + field, Value: value, Rule: rule})
}

// Require adds an error unless ok is true.
func (e *Errors) Require(ok bool, field string, value any, rule string, args ...any) {
	if !ok {
		e.Add(field, value, rule, args...)
	}
}

// NotNil adds an error if an argument or the value of an option is nil.
func (e *Errors) NotNil(isNil bool, field, what string) {
	e.Require(!isNil, field, nil, "must be "+what)
}

// Set is the value in an error that says that an option must not be used.
const Set = set("set")

type set string

func (s set) String() string { return string(s) }

// Name adds an error if the name that WithName gives a layer is empty.
func (e *Errors) Name(name string) { e.Require(name != "", "WithName", name, "must not be empty") }

// Options applies the options of a constructor to o. A nil one is an error.
func Options[O any, F ~func(*O)](e *Errors, o *O, opts []F) {
	for i, opt := range opts {
		if opt == nil {
			e.Add(fmt.Sprintf("opts[%d]", i), nil, "must be an option")
			continue
		}
		opt(o)
	}
}

// Nested adds the errors in err, which another package has found in a field. If the field
// is empty, their fields are those of e.
func (e *Errors) Nested(field string, err error) {
	switch err := err.(type) {
	case nil:
	case *Error:
		if field != "" {
			field += "."
		}
		e.Add(field+err.Field, err.Value, err.Rule)
	case interface{ Unwrap() []error }:
		for _, err := range err.Unwrap() {
			e.Nested(field, err)
		}
	default:
		*e.list = append(*e.list, fmt.Errorf("%s: %s: %w", e.layer, e.prefix+field, err))
	}
}

// Err returns nil, the only error, or all errors joined.
func (e *Errors) Err() error {
	if len(*e.list) == 1 {
		return (*e.list)[0]
	}
	return errors.Join(*e.list...)
}

// A Number is the type of a setting that has a range.
type Number interface{ ~int | ~int64 | ~float64 }

// A Range reports whether it contains v, and describes itself in words.
type Range[T Number] func(v T) (ok bool, text string)

// From is the range from lo to hi, both included.
func From[T Number](lo, hi T) Range[T] {
	return func(v T) (bool, string) { return v >= lo && v <= hi, "from " + text(lo) + " to " + text(hi) }
}

// Between is the range from lo to hi, neither included.
func Between[T Number](lo, hi T) Range[T] {
	return func(v T) (bool, string) { return v > lo && v < hi, "above " + text(lo) + " and below " + text(hi) }
}

// Above is the range from lo, which is not included, to hi, which is.
func Above[T Number](lo, hi T) Range[T] {
	return func(v T) (bool, string) { return v > lo && v <= hi, "above " + text(lo) + " and at most " + text(hi) }
}

// Below is the range from lo, which is included, to hi, which is not.
func Below[T Number](lo, hi T) Range[T] {
	return func(v T) (bool, string) { return v >= lo && v < hi, "at least " + text(lo) + " and below " + text(hi) }
}

// AtLeast is the range of finite numbers from lo, which is included.
func AtLeast[T Number](lo T) Range[T] {
	return func(v T) (bool, string) {
		finite := ""
		if _, ok := any(lo).(float64); ok {
			finite = "a finite number of "
		}
		return v >= lo && !math.IsInf(float64(v), 0), finite + "at least " + text(lo)
	}
}

// Positive is the range of numbers above 0.
func Positive[T Number](v T) (bool, string) { return v > 0, "positive" }

// Required checks a setting that has no default.
func Required[T Number](e *Errors, field string, v T, in Range[T]) {
	if ok, text := in(v); !ok {
		e.Add(field, v, "must be "+text)
	}
}

// Zero checks a setting for which 0 has a meaning of its own, such as "no bound".
func Zero[T Number](e *Errors, field string, v T, in Range[T], meaning string) {
	if v != 0 {
		Required(e, field, v, or(in, ", or 0 for "+meaning))
	}
}

// Default checks a setting, and sets it to its default if it is 0. It is the
// default also after an error, so that the checks of other settings can continue.
func Default[T Number](e *Errors, field string, v *T, in Range[T], def T) {
	DefaultText(e, field, v, in, def, text(def))
}

// DefaultText is Default for a default that depends on other settings; an error
// calls it meaning.
func DefaultText[T Number](e *Errors, field string, v *T, in Range[T], def T, meaning string) {
	Zero(e, field, *v, in, meaning)
	if ok, _ := in(*v); !ok || *v == 0 {
		*v = def
	}
}

// None means none, or never, for settings whose 0 is the default. Packages with such a
// setting export it under this name.
const None = -1

const orNone = ", None (-1) for "

// DefaultOrNone is Default for a setting that may be None, which meaning says.
func DefaultOrNone[T Number](e *Errors, field string, v *T, in Range[T], def T, meaning string) {
	if *v != None {
		Default(e, field, v, or(in, orNone+meaning), def)
	}
}

// ZeroOrNone is Zero for a setting that may be None.
func ZeroOrNone[T Number](e *Errors, field string, v T, in Range[T], zero, none string) {
	if v != None {
		Zero(e, field, v, or(in, orNone+none), zero)
	}
}

// ZeroIsNone returns a rule of DefaultOrNone for data in which a setting can be unset, so
// that 0 means none. It returns other rules unchanged.
func ZeroIsNone(rule string) string {
	if before, after, ok := strings.Cut(rule, orNone); ok {
		meaning, _, _ := strings.Cut(after, ", ")
		return before + ", or 0 for " + meaning
	}
	return rule
}

func or[T Number](in Range[T], alternative string) Range[T] {
	return func(v T) (bool, string) {
		ok, text := in(v)
		return ok, text + alternative
	}
}

// Codes returns the set of a list of codes, or of def if the list is nil.
func Codes(e *Errors, field string, list []codes.Code, def ...codes.Code) codeset.Set {
	if list == nil {
		list = def
	}
	s, bad := codeset.Of(list...)
	if bad >= 0 {
		e.Add(fmt.Sprintf("%s[%d]", field, bad), list[bad], codeset.Rule)
	}
	return s
}

// text prints a limit for a rule: without an exponent, and 1h for 1h0m0s.
func text[T Number](v T) string {
	switch v := any(v).(type) {
	case time.Duration:
		s := v.String()
		if strings.HasSuffix(s, "m0s") {
			s = strings.TrimSuffix(s, "0s")
		}
		if strings.HasSuffix(s, "h0m") {
			s = strings.TrimSuffix(s, "0m")
		}
		return s
	case float64:
		return strconv.FormatFloat(v, 'f', -1, 64)
	}
	return fmt.Sprint(v)
}

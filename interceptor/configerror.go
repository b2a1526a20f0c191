// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package interceptor

import "fmt"

// A ConfigError says which setting of which layer is wrong. All packages below this
// one return it for a Config, an option or an argument that they reject. If several
// are wrong, [errors.Join] joins them, and errors.As finds the first.
type ConfigError struct {
	Layer string // the package of the layer, such as "retry"
	Field string // the field's Go path, such as "Backoff.Max" or "Codes[2]"; of an option "WithName"
	Value any    // what it is; nil for a function or a pointer that is nil
	Rule  string // what it must be, such as "must be from 1 to 100, or 0 for 3"
}

// Error names the layer, the field, the value and the rule.
func (e *ConfigError) Error() string {
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

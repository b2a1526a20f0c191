// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package interceptor

import "github.com/belfry-go/belfry/internal/check"

// A ConfigError says which setting of which layer is wrong. All packages below this
// one return a *ConfigError for a Config, an option or an argument that they reject. If
// several are wrong, [errors.Join] joins them, and errors.As finds the first. Its fields are
//
//	Layer string // the package of the layer, such as "retry"
//	Field string // the field's Go path, such as "Backoff.Max" or "Codes[2]"; of an option "WithName"
//	Value any    // what it is; nil for a function or a pointer that is nil
//	Rule  string // what it must be, such as "must be from 1 to 100, or 0 for 3"
type ConfigError = check.Error

// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

// Package layercheck checks what only settings of layers have, as package check checks
// numbers: keys, and whether there is a layer at all.
package layercheck

import (
	"errors"
	"time"

	"github.com/belfry-go/belfry/interceptor"
	"github.com/belfry-go/belfry/internal/check"
)

// Spec returns a Spec that cannot become a layer because of the errors. It is nil if there
// are none.
func Spec(e *check.Errors) interceptor.Spec {
	if err := e.Err(); err != nil {
		return failed{err}
	}
	return nil
}

type failed struct{ err error }

func (f failed) NewLayer() (interceptor.Layer, error) { return nil, f.err }

// KeyBy adds an error if more than one field of a KeyBy is set.
func KeyBy(e *check.Errors, field string, by interceptor.KeyBy) {
	var c *interceptor.ConfigError
	if errors.As(by.Check(""), &c) {
		e.Add(field, c.Value, c.Rule)
	}
}

// The defaults of layers that tell calls apart by key.
const (
	maxKeys        = 1_000_000
	DefaultMaxKeys = 10_000
	DefaultKeyIdle = 10 * time.Minute
)

// Keys checks the settings KeyBy, MaxKeys and KeyIdle of a layer that tells calls
// apart; idle is nil if it has no KeyIdle. old is the KeyBy that the layer was made
// with, which an update may not change; nil for a new layer.
func Keys(e *check.Errors, by interceptor.KeyBy, old *interceptor.KeyBy, most *int, idle *time.Duration) {
	KeyBy(e, "KeyBy", by)
	if old != nil && by.Check("") == nil {
		e.Require(by.Same(*old), "KeyBy", by, "must stay %v: make a new layer", *old)
	}
	check.Default(e, "MaxKeys", most, check.From(1, maxKeys), DefaultMaxKeys)
	if idle != nil {
		check.Default(e, "KeyIdle", idle, check.AtLeast(time.Second), DefaultKeyIdle)
	}
}

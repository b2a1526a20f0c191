// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package layertest_test

import (
	"errors"
	"testing"

	"golang.org/x/sync/semaphore"

	"github.com/belfry-go/belfry/interceptor"
	"github.com/belfry-go/belfry/interceptor/adapt"
	"github.com/belfry-go/belfry/interceptor/layertest"
)

// The body of a test of a layer.
func ExampleRun() {
	var t *testing.T // The test's own.

	layertest.Run(t, func() (interceptor.Spec, func() error) {
		sem := semaphore.NewWeighted(10)
		return adapt.FromSemaphore("limit", sem), func() error {
			if !sem.TryAcquire(10) {
				return errors.New("a permit is held")
			}
			return nil
		}
	})
}

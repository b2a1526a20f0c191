// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package concurrency_test

import (
	"testing"

	"github.com/belfry-go/belfry/internal/test/leaktest"
)

func TestMain(m *testing.M) { leaktest.Main(m) }

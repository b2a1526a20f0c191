// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package adapt_test

import (
	"testing"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

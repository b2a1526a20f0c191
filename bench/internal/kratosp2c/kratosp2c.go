// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

// Package kratosp2c chooses kratos's p2c for its policy "selector".
//
// kratos reads its global selector while its package transport/grpc is
// initialized, so whoever chooses one must come before. Go initializes packages
// in the order of their import paths once what they import is ready, and this
// one's path is before that of kratos. It must not import transport/grpc.
package kratosp2c

import (
	"github.com/go-kratos/kratos/v2/selector"
	"github.com/go-kratos/kratos/v2/selector/p2c"
)

// Name is that of the policy in gRPC's registry.
const Name = "selector"

func init() { selector.SetGlobalSelector(p2c.NewBuilder()) }

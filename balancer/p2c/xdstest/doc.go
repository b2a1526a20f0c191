// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

// Package xdstest holds the tests of belfry.p2c below the policies that grpc
// brings with its xDS client: outlier_detection, and the tree that a control
// plane builds (gRFC A52). It has no API.
//
// It is a module of its own because that client and the messages of a control
// plane need much that the policy does not. The tests see the policy from
// outside, as a program does: by its calls, its config and its metrics.
//
//	cd balancer/p2c/xdstest && go test ./...
package xdstest

// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

// Package proto holds belfry's schemas and the Go code generated from them:
//
//   - belfry/config/v1 is what is configured with data. Its messages, in proto3
//     JSON, are the sections of a gRPC service config that belong to belfry.
//   - belfry/testing/v1 is the service that belfry's tests, benchmarks and
//     examples call.
//
// The package itself is empty. Run `go generate ./proto` after a change to a
// schema; the generators and their versions are in tools/go.mod.
package proto

//go:generate go -C .. tool -modfile=tools/go.mod buf generate

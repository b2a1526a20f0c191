// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

// Package chaos holds the tests of what callers see while servers, networks and registries
// fail: calls that keep coming at 70 % of what the servers can do, through layers, policy and
// discovery to real gRPC servers. It has no code of its own.
//
// The tests run in virtual time, so a busy machine changes nothing. They bound how many calls
// fail. Flags make them ask for more:
//
//	go test ./internal/chaos -chaos.full          # ten times the calls, and bounds on the p99
//	go test ./internal/chaos -chaos.tcp           # over loopback, in real time
//	go test ./internal/chaos -run Soak -soak.calls 10000000
package chaos

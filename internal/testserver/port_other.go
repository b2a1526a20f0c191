// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

//go:build !linux

package testserver

import "net"

// bind is for systems on which nobody can listen where another is bound.
func bind(*net.TCPAddr) (free func()) { return nil }

// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package calltest

import (
	"context"
	"sync/atomic"
)

// SlowToken is a credential that the first attempt waits for until its context ends. It is
// there at once for the others. It is safe for concurrent use.
type SlowToken struct {
	Asked atomic.Int32 // How many times gRPC has asked for it.
}

// GetRequestMetadata implements credentials.PerRPCCredentials.
func (s *SlowToken) GetRequestMetadata(ctx context.Context, _ ...string) (map[string]string, error) {
	if s.Asked.Add(1) == 1 {
		<-ctx.Done()
		return nil, ctx.Err()
	}
	return nil, nil
}

// RequireTransportSecurity implements credentials.PerRPCCredentials.
func (*SlowToken) RequireTransportSecurity() bool { return false }

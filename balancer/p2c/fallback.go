// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package p2c

import (
	"errors"
	"sync/atomic"

	"google.golang.org/grpc/balancer"
	"google.golang.org/grpc/connectivity"
)

// errNoEndpoints is the error of calls while the resolver lists no endpoints. The text is
// grpc-go's, so that a search for it finds the same cause.
var errNoEndpoints = errors.New("no children to pick from")

// fallbackPicker is the picker of a channel that has no READY endpoint. It asks the children
// whose state is the channel's, in turn. Those that failed return the reason as an error.
// Those that connect make the call wait.
type fallbackPicker struct {
	endpoints []*endpoint
	state     connectivity.State
	next      atomic.Uint32
}

func (p *fallbackPicker) Pick(info balancer.PickInfo) (balancer.PickResult, error) {
	n := uint32(len(p.endpoints))
	first := p.next.Add(1)
	for i := range n {
		s := p.endpoints[(first+i)%n].reported.Load()
		if s.ConnectivityState == p.state {
			return s.Picker.Pick(info)
		}
	}
	return balancer.PickResult{}, balancer.ErrNoSubConnAvailable
}

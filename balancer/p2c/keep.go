// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package p2c

import (
	"slices"
	"strings"
	"sync"
	"time"

	"google.golang.org/grpc/channelz"
	"google.golang.org/grpc/resolver"

	"github.com/belfry-go/belfry/load"
)

// This file keeps the meters of a channel when its policy is closed. gRPC closes the policy
// when the channel goes idle, and makes another for the next call. Without what is kept, the
// new policy would not know which endpoints fail or are slow.

const (
	keepFor  = 10 * time.Minute // after the policy is closed
	keepMost = 100_000          // meters of all channels together
)

var kept keeper

// keeper holds the meters of the closed policies of all channels.
type keeper struct {
	mu      sync.Mutex // guards parcels
	parcels []*parcel  // the oldest first
}

// A parcel is the meters of a closed policy.
type parcel struct {
	channel channelz.Identifier
	closed  time.Time
	metric  load.Metric
	now     func() int64        // the clock of the metric
	meters  map[string]*measure // by addressKey
}

// keep adds a parcel. It removes parcels that are too old, and the oldest ones while there are
// too many meters.
func (k *keeper) keep(p *parcel) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.parcels = append(k.parcels, p)
	meters := 0
	for _, p := range k.parcels {
		meters += len(p.meters)
	}
	k.parcels = slices.DeleteFunc(k.parcels, func(old *parcel) bool {
		if meters <= keepMost && p.closed.Sub(old.closed) < keepFor {
			return false
		}
		meters -= len(old.meters)
		return true
	})
}

// take removes and returns the parcel of the channel that has the most of the endpoints, nil
// if none has any. A channel may have several policies, such as one for each locality.
func (k *keeper) take(channel channelz.Identifier, endpoints []resolver.Endpoint) *parcel {
	k.mu.Lock()
	defer k.mu.Unlock()
	now := time.Now()
	most, best := 0, -1
	for i, p := range k.parcels {
		if p.channel != channel || now.Sub(p.closed) >= keepFor {
			continue
		}
		known := 0
		for _, e := range endpoints {
			if p.meters[addressKey(e)] != nil {
				known++
			}
		}
		if known > most {
			most, best = known, i
		}
	}
	if best < 0 {
		return nil
	}
	p := k.parcels[best]
	k.parcels = slices.Delete(k.parcels, best, best+1)
	return p
}

// addressKey returns a string that identifies an endpoint: its set of addresses.
func addressKey(e resolver.Endpoint) string {
	if len(e.Addresses) == 1 {
		return e.Addresses[0].Addr
	}
	var addrs []string
	for _, a := range e.Addresses {
		addrs = append(addrs, a.Addr)
	}
	slices.Sort(addrs)
	return strings.Join(addrs, "\x00")
}

// keepMeters keeps the meters of a policy that is closed. Without an identity of the channel,
// as in tests without a network, it keeps nothing.
func (b *policy) keepMeters() {
	if b.opts.ChannelzParent == nil || b.endpoints.Len() == 0 {
		return
	}
	p := &parcel{channel: b.opts.ChannelzParent, closed: time.Now(), metric: b.metric, now: b.now, meters: make(map[string]*measure, b.endpoints.Len())}
	for e, ep := range b.endpoints.All() {
		p.meters[addressKey(e)] = ep.candidate.meter.Load()
	}
	kept.keep(p)
}

// recallMeters takes the meters that were kept for the channel, at the first update with
// endpoints.
func (b *policy) recallMeters(cfg *config, endpoints []resolver.Endpoint) {
	if b.opts.ChannelzParent == nil || b.started || len(endpoints) == 0 {
		return
	}
	b.started = true
	if p := kept.take(b.opts.ChannelzParent, endpoints); p != nil && cfg.metric.adopt(p.metric) {
		b.mu.Lock() // A snapshot may be made already, and looks at the clock.
		defer b.mu.Unlock()
		b.metric, b.now, b.recalled = p.metric, p.now, p.meters
	}
}

// recallLocked returns the meter that was kept for the endpoint, nil if there is none.
func (b *policy) recallLocked(e resolver.Endpoint) *measure {
	if b.recalled == nil {
		return nil
	}
	k := addressKey(e)
	m := b.recalled[k]
	delete(b.recalled, k)
	return m
}

// forgetRecalled closes the kept meters of endpoints that are not listed any more.
func (b *policy) forgetRecalled() {
	for _, m := range b.recalled {
		m.Close()
	}
	b.recalled = nil
}

// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"math"
	"math/rand/v2"
	"sync"

	"google.golang.org/grpc/attributes"
	"google.golang.org/grpc/balancer"
	grpcbase "google.golang.org/grpc/balancer/base"
	"google.golang.org/grpc/resolver"
)

// oracleName is that of the oracle in gRPC's registry.
const oracleName = "bench_oracle"

func init() {
	balancer.Register(grpcbase.NewBalancerBuilder(oracleName, oracleBuilder{}, grpcbase.Config{}))
}

// A ledger is what the oracle knows of the servers of a cluster, at any moment: what all
// clients have in flight there, at what speed they work and whether they do. The channels of
// all clients share it.
type ledger struct {
	workers int

	mu      sync.Mutex // guards what follows
	servers []entry
}

// An entry is what is known of one server.
type entry struct {
	inFlight int
	speed    float64
	down     bool // it fails or stands still
}

func newLedger(servers, workers int) *ledger {
	l := &ledger{workers: workers, servers: make([]entry, servers)}
	for i := range l.servers {
		l.servers[i].speed = 1
	}
	return l
}

// set changes what is known of server i.
func (l *ledger) set(i int, f func(*entry)) {
	l.mu.Lock()
	defer l.mu.Unlock()
	f(&l.servers[i])
}

// choose returns the server among some at which a call is expected to end first, and counts
// the call there. It does not know how much work a call is.
func (l *ledger) choose(among []place) place {
	l.mu.Lock()
	defer l.mu.Unlock()
	var best place
	least, equals := math.Inf(1), 0
	for _, p := range among {
		cost := l.cost(p.server)
		switch {
		case equals == 0 || cost < least:
			best, least, equals = p, cost, 1
		case cost == least:
			if equals++; rand.IntN(equals) == 0 {
				best = p
			}
		}
	}
	l.servers[best.server].inFlight++
	return best
}

// cost is how long one more call is expected to take at server i, in units of the mean
// service time at speed 1.
func (l *ledger) cost(i int) float64 {
	e := l.servers[i]
	if e.down {
		return math.Inf(1)
	}
	ahead := max(e.inFlight+1-l.workers, 0)
	return (1 + float64(ahead)/float64(l.workers)) / e.speed
}

// A place is a connection to a server of a ledger.
type place struct {
	server int
	sc     balancer.SubConn
}

// A ledgerPage is where an address stands in a ledger.
type ledgerPage struct {
	ledger *ledger
	server int
}

type ledgerKey struct{}

// mark writes into the addresses of endpoints where they stand in the ledger.
func (l *ledger) mark(endpoints []resolver.Endpoint) []resolver.Endpoint {
	marked := make([]resolver.Endpoint, len(endpoints))
	for i, e := range endpoints {
		a := e.Addresses[0]
		a.Attributes = attributes.New(ledgerKey{}, ledgerPage{l, i})
		marked[i] = resolver.Endpoint{Addresses: []resolver.Address{a}}
	}
	return marked
}

// oracleBuilder makes the pickers of the oracle.
type oracleBuilder struct{}

// Build implements grpcbase.PickerBuilder.
func (oracleBuilder) Build(info grpcbase.PickerBuildInfo) balancer.Picker {
	p := &oracle{}
	for sc, c := range info.ReadySCs {
		at, ok := c.Address.Attributes.Value(ledgerKey{}).(ledgerPage)
		if !ok {
			continue
		}
		p.ledger = at.ledger
		p.places = append(p.places, place{at.server, sc})
	}
	if len(p.places) == 0 {
		return grpcbase.NewErrPicker(balancer.ErrNoSubConnAvailable)
	}
	return p
}

// oracle is a picker that asks the ledger.
type oracle struct {
	ledger *ledger
	places []place
}

// Pick implements balancer.Picker.
func (o *oracle) Pick(balancer.PickInfo) (balancer.PickResult, error) {
	p := o.ledger.choose(o.places)
	return balancer.PickResult{SubConn: p.sc, Done: func(balancer.DoneInfo) {
		o.ledger.set(p.server, func(e *entry) { e.inFlight-- })
	}}, nil
}

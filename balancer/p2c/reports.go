// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package p2c

import (
	"time"

	orcapb "github.com/cncf/xds/go/xds/data/orca/v3"
	"google.golang.org/grpc/balancer"
	"google.golang.org/grpc/connectivity"
	"google.golang.org/grpc/orca" // registers the parser of reports in trailers too
	"google.golang.org/grpc/resolver"

	"github.com/belfry-go/belfry/load"
)

// This file receives the reports of servers by the ORCA protocol (gRFC A51, A64).

// reportOf returns the report that came with the end of an attempt.
func reportOf(serverLoad any) (load.Report, bool) {
	r, ok := serverLoad.(*orcapb.OrcaLoadReport)
	if !ok || r == nil {
		return load.Report{}, false
	}
	return load.Report{
		CPU:         r.CpuUtilization,
		Memory:      r.MemUtilization,
		Application: r.ApplicationUtilization,
		QPS:         r.RpsFractional,
		EPS:         r.Eps,
		Named:       r.NamedMetrics,
	}, true
}

// NewSubConn makes a SubConn that asks its server for reports out of band when it is READY, if
// the config has an interval for them.
func (ep *endpoint) NewSubConn(addrs []resolver.Address, opts balancer.NewSubConnOptions) (balancer.SubConn, error) {
	if ep.policy.outOfBand.Load() == 0 {
		//lint:ignore SA1019 the child gives it one address
		return ep.ClientConn.NewSubConn(addrs, opts)
	}
	o := &outOfBand{ep: ep}
	listener := opts.StateListener
	opts.StateListener = func(s balancer.SubConnState) {
		o.moved(s.ConnectivityState)
		listener(s)
	}
	//lint:ignore SA1019 the child gives it one address
	sc, err := ep.ClientConn.NewSubConn(addrs, opts)
	o.subConn = sc
	return sc, err
}

// outOfBand listens to the reports of one connection. Its fields are used only by the
// listener of the SubConn, whose calls are serialized.
type outOfBand struct {
	ep      *endpoint
	subConn balancer.SubConn
	stop    func() // stops listening; nil while it does not listen
}

func (o *outOfBand) moved(to connectivity.State) {
	if o.stop != nil {
		o.stop()
		o.stop = nil
	}
	if every := time.Duration(o.ep.policy.outOfBand.Load()); to == connectivity.Ready && every > 0 {
		o.stop = o.ep.policy.reports(o.subConn, o, orca.OOBListenerOptions{ReportInterval: every})
	}
}

// OnLoadReport implements orca.OOBListener.
func (o *outOfBand) OnLoadReport(report *orcapb.OrcaLoadReport) {
	r, ok := reportOf(report)
	if !ok {
		return
	}
	c := o.ep.candidate
	attempts, _ := c.tally.read()
	c.meter.Load().Report(load.OutOfBand{Now: load.Instant(o.ep.policy.now()), Report: &r, InFlight: attempts})
	c.changed()
}

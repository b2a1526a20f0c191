// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

// Package orca makes a gRPC server report its load to its clients, by the ORCA protocol
// (gRFC A51), so that the policy belfry.p2c knows the requests that a server has from other
// clients:
//
//	s := grpc.NewServer(orca.ServerOptions()...)
//
// The clients make use of it with the config
//
//	{"load": {"expectedLatency": {"reports": {}}}}
//
// The reports are those of grpc's own package of this name, which sends them. A client that
// does not know them ignores them. A server that calls
// [google.golang.org/grpc/orca.CallMetricsRecorderFromContext] adds to them.
package orca

import (
	"context"
	"slices"
	"sync/atomic"

	"google.golang.org/grpc"
	"google.golang.org/grpc/orca"
)

// InFlight is the name of the metric that has the number of requests that the server works
// on, the one that is answered not counted, and streams not counted that have sent a
// response.
const InFlight = "belfry.in_flight"

// A Reporter counts the requests of a server, and reports them. One Reporter may serve
// several servers that share a machine. The zero value is ready for use, and its methods are
// safe for concurrent use.
type Reporter struct {
	requests atomic.Int64
}

// ServerOptions returns the options for grpc.NewServer that report with the answer to each
// call. They are interceptors: give them first, so that the time in other interceptors
// counts.
func ServerOptions() []grpc.ServerOption { return new(Reporter).ServerOptions() }

// ServerOptions is the function of that name for this Reporter.
func (r *Reporter) ServerOptions() []grpc.ServerOption {
	return []grpc.ServerOption{
		orca.CallMetricsServerOption(r),
		grpc.ChainUnaryInterceptor(r.unary),
		grpc.ChainStreamInterceptor(r.stream),
	}
}

// Register makes the server report out of band too, to clients that ask for it. grpc sends
// such a report at once and then every 30 s at most.
func (r *Reporter) Register(s grpc.ServiceRegistrar) error {
	return orca.Register(s, orca.ServiceOptions{ServerMetricsProvider: r})
}

// ServerMetrics returns the report. It makes a Reporter a provider for grpc's package.
func (r *Reporter) ServerMetrics() *orca.ServerMetrics {
	return &orca.ServerMetrics{
		CPUUtilization: -1,
		MemUtilization: -1,
		AppUtilization: -1,
		QPS:            -1,
		EPS:            -1,
		Utilization:    map[string]float64{},
		RequestCost:    map[string]float64{},
		NamedMetrics:   map[string]float64{InFlight: float64(max(r.requests.Load(), 0))},
	}
}

func (r *Reporter) unary(ctx context.Context, req any, _ *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (any, error) {
	orca.CallMetricsRecorderFromContext(ctx) // grpc sends a report only if somebody asked for this
	r.requests.Add(1)
	defer r.requests.Add(-1)
	return handler(ctx, req)
}

// own are the services whose streams are reports, and are no requests.
var own = []string{"/xds.service.orca.v3.OpenRcaService/StreamCoreMetrics"}

func (r *Reporter) stream(srv any, ss grpc.ServerStream, info *grpc.StreamServerInfo, handler grpc.StreamHandler) error {
	if slices.Contains(own, info.FullMethod) {
		return handler(srv, ss)
	}
	orca.CallMetricsRecorderFromContext(ss.Context())
	r.requests.Add(1)
	s := &stream{ServerStream: ss, reporter: r}
	defer s.answered()
	return handler(srv, s)
}

// stream sees the first response.
type stream struct {
	grpc.ServerStream
	reporter *Reporter
	done     atomic.Bool
}

func (s *stream) answered() {
	if !s.done.Load() && !s.done.Swap(true) {
		s.reporter.requests.Add(-1)
	}
}

func (s *stream) SendMsg(m any) error {
	s.answered()
	return s.ServerStream.SendMsg(m)
}

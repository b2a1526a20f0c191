// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package testserver

import (
	"sync"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/orca"
)

// reporter gives gRPC the load report of a server.
type reporter struct{ server *Server }

// ServerMetrics implements orca.ServerMetricsProvider.
func (r reporter) ServerMetrics() *orca.ServerMetrics {
	m := r.server.report(r.server.Stats())
	return &m
}

// measuredWindow is over what time MeasuredLoad measures. It is short beside
// the blackout period and the update interval of weighted_round_robin.
const measuredWindow = time.Second

// MeasuredLoad returns a report for ReportLoad of what one server really did in
// the last full second: calls finished and failed per second, and, if it has
// workers, the share of their time in which they were occupied as application
// utilization. Each server needs a MeasuredLoad of its own.
func MeasuredLoad() func(Stats) orca.ServerMetrics {
	var (
		mu     sync.Mutex // guards the rest
		begin  Stats
		report = orca.ServerMetrics{CPUUtilization: -1, MemUtilization: -1, AppUtilization: -1, QPS: -1, EPS: -1}
	)
	return func(st Stats) orca.ServerMetrics {
		mu.Lock()
		defer mu.Unlock()
		elapsed := st.Uptime - begin.Uptime
		if elapsed >= measuredWindow {
			ended, ok := st.Finished()-begin.Finished(), st.Finished(codes.OK)-begin.Finished(codes.OK)
			report.QPS = float64(ended) / elapsed.Seconds()
			report.EPS = float64(ended-ok) / elapsed.Seconds()
			if st.Workers > 0 {
				report.AppUtilization = (st.Busy - begin.Busy).Seconds() / (elapsed.Seconds() * float64(st.Workers))
			}
			begin = st
		}
		return report
	}
}

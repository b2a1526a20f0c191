// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package sim

import (
	"slices"
	"testing"
	"time"

	orcapb "github.com/cncf/xds/go/xds/data/orca/v3"
	"google.golang.org/grpc/orca"
	"google.golang.org/grpc/resolver"

	"github.com/belfry-go/belfry/internal/test/lbtest"
	"github.com/belfry-go/belfry/internal/test/race"
)

func TestReportsDoNoHarmToAClientThatIsAlone(t *testing.T) {
	if race.Enabled {
		t.Skip("a run is one goroutine: the race detector finds nothing in it, and makes it 20 times as long")
	}
	// p99 is that of the first seeds, on average.
	p99 := func(t *testing.T, s Scenario, name string) (sum time.Duration) {
		t.Helper()
		const seeds = 12
		for seed := range uint64(seeds) {
			sum += mustRun(t, s, policy(t, name), Options{Calls: 10_000, Seed: seed + 1}).Percentile(0.99)
		}
		return sum / seeds
	}
	s := scenario(t, "one caller, 10 servers, one 30× faster")
	if with, without := p99(t, s, "reports"), p99(t, s, "default"); with > without*103/100 {
		t.Errorf("p99 is %v with reports and %v without, want at most 3 %% more", with, without)
	}
}

// reported is the requests in the reports that it was told of.
type reported []float64

func (r *reported) OnLoadReport(report *orcapb.OrcaLoadReport) {
	*r = append(*r, report.NamedMetrics["belfry.in_flight"])
}

func TestReportsOutOfBand(t *testing.T) {
	c := newCluster(few(2), Options{})
	c.servers[0].running = make([]*call, 2)
	c.servers[0].waiting.Push(&call{})
	b := &balanced{cluster: c}
	var got reported
	stop := b.listen(&lbtest.SubConn{Address: resolver.Address{Addr: "server-0"}}, &got, orca.OOBListenerOptions{ReportInterval: 100 * time.Millisecond})
	c.end = int64(time.Second)
	if err := c.run(); err != nil {
		t.Fatal(err)
	}
	if n := len(got); n < 9 || n > 11 || slices.ContainsFunc(got, func(n float64) bool { return n != 3 }) {
		t.Errorf("the policy was told %v in a second, want 3 about 10 times", got)
	}
	stop()
	told := len(got)
	c.end = int64(2 * time.Second)
	c.after(2*time.Second, func() {})
	if err := c.run(); err != nil {
		t.Fatal(err)
	}
	if len(got) != told {
		t.Errorf("the policy was told %v after it stopped to listen, want nothing", got[told:])
	}
}

// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package sim

import (
	"math"
	"testing"
	"time"

	"github.com/belfry-go/belfry/internal/test/race"
)

// The figures that package p2c promises of its field zones. Without zones 64 % stay at
// 70 % load.
func TestZonesInFigures(t *testing.T) {
	if race.Enabled {
		t.Skip("a run is one goroutine: the race detector finds nothing in it, and makes it 20 times as long")
	}
	type figures struct {
		home, first float64 // shares that stay, at least: of all, of the first zone
		p99         float64 // in ratio to that without zones, at most
	}
	for name, want := range map[string]figures{
		"3 zones, 30 %":                {0.97, 0.97, 1},
		"3 zones, 70 %":                {0.95, 0.95, 1},
		"3 zones, 90 %":                {0.93, 0.93, 1},
		"3 zones, one asked for 100 %": {0.95, 0.93, 1.2},
		"3 zones, one client alone asks its own for 70 %": {0.95, 0.95, 1},
		"3 zones, no further apart, 70 %":                 {0.93, 0.93, 1.02},
		"3 zones of 2, 7 and 12, demand alike, 70 %":      {0.95, 0.85, 1},
		"3 zones of 1, 10 and 10, demand alike, 70 %":     {0.95, 0.80, 1},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := scenario(t, name)
			s.WarmUp = 5 * time.Second
			blind := mustRun(t, s, policy(t, "default"), Options{Calls: 20_000, Seed: 1})
			zones := mustRun(t, s, policy(t, "zones"), Options{Calls: 20_000, Seed: 1})
			ratio := zones.Percentile(0.99).Seconds() / blind.Percentile(0.99).Seconds()
			t.Logf("%.3f stay, %.3f of the first zone, p99 in ratio to that without zones %.3f", zones.Home, zones.HomeOf[0], ratio)
			if zones.Home < want.home || zones.HomeOf[0] < want.first || ratio > want.p99 {
				t.Errorf("%.3f stay, %.3f of the first zone, p99 ratio %.3f, want at least %v and %v, and at most %v",
					zones.Home, zones.HomeOf[0], ratio, want.home, want.first, want.p99)
			}
		})
	}
}

func TestOnlyTheOverflowLeavesAZone(t *testing.T) {
	if race.Enabled {
		t.Skip("a run is one goroutine: the race detector finds nothing in it, and makes it 20 times as long")
	}
	for name, asked := range map[string]float64{
		"3 zones, one asked for 140 %":                     1.4,
		"3 zones, one client alone asks its own for 140 %": 1.4,
		"3 zones of 2, 7 and 12, equal demand, 50 %":       1.75,
	} {
		s := scenario(t, name)
		s.WarmUp = 5 * time.Second
		r := mustRun(t, s, policy(t, "zones"), Options{Calls: 20_000, Seed: 1})
		if got, want := 1-r.HomeOf[0], 1-1/asked; math.Abs(got-want) > 0.05 {
			t.Errorf("%s: %.3f of the calls leave the first zone, want %.3f within 0.05", name, got, want)
		}
	}
}

// All servers of a zone stop answering, with nothing that says so.
func TestLostZoneGetsNoCalls(t *testing.T) {
	if race.Enabled {
		t.Skip("a run is one goroutine: the race detector finds nothing in it, and makes it 20 times as long")
	}
	const lost = 3 * time.Second
	for _, load := range []float64{0.1, 0.5} {
		s := base()
		s.zoned(7, 7, 7)
		s.Load, s.WarmUp = load, time.Second
		s.faults = func(c *cluster) {
			c.after(lost, func() {
				for _, srv := range c.servers[:7] {
					srv.behaviour = silent
				}
			})
		}
		var sent, stayed int
		mustRun(t, s, policy(t, "zones"), Options{Seed: 1, span: lost + time.Second, called: func(now time.Duration, zone int, srv *server) {
			if zone == 0 && now >= lost+200*time.Millisecond {
				sent++
				if srv.zone == 0 {
					stayed++
				}
			}
		}})
		if sent < 200 || float64(stayed) > 0.03*float64(sent) {
			t.Errorf("load %v: %d of %d calls from the lost zone were sent to it after 200 ms, want at most 3 %%", load, stayed, sent)
		}
	}
}

// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package sim

import (
	"testing"
	"time"

	"github.com/belfry-go/belfry/internal/test/race"
)

func TestStreamsAndLongCalls(t *testing.T) {
	if race.Enabled {
		t.Skip("a run is one goroutine: the race detector finds nothing in it, and makes it 20 times as long")
	}
	standard, oracle := policy(t, "default"), policy(t, "oracle")
	p99 := func(t *testing.T, s Scenario, p Policy, calls int) time.Duration {
		t.Helper()
		return mustRun(t, s, p, Options{Calls: calls, Seed: 1}).Percentile(0.99)
	}
	t.Run("a_Get_does_not_care_for_an_Export", func(t *testing.T) {
		t.Parallel()
		s := scenario(t, "Get of 1 ms beside 1 % Export of 10 s")
		s.Calls = 0 // of Options
		var beside, crowd float64
		const seeds = 3
		for seed := range uint64(seeds) {
			r := mustRun(t, s, standard, Options{Calls: 100_000, Seed: seed + 1})
			beside, crowd = beside+r.Beside/seeds, crowd+r.Crowd/seeds
		}
		// In 5,000 s it is 1.1. Few servers have no Export, and most Gets of a second go to one
		// server, so these runs tell it to 0.2.
		if !(beside >= 0.75 && beside <= 1.6) {
			t.Errorf("a Get goes to a server with an Export %.2f times as often as to one without, want 0.75 to 1.6", beside)
		}
		// As a rule 4 at most, of a mean of 2, and 5 for a moment of some runs.
		if !(crowd <= 2.3) {
			t.Errorf("a server had %.2f times the mean of Exports at once, want at most 2.3", crowd)
		}
	})
	t.Run("streams_alone_are_even", func(t *testing.T) {
		t.Parallel()
		for _, name := range []string{"default", "peakEwma"} {
			s := scenario(t, "2,000 long streams, 10 servers")
			r := mustRun(t, s, policy(t, name), Options{Seed: 1})
			if r.Calls < 1900 || r.Most > 1.1 {
				t.Errorf("%s: of %d streams a server has %.2f times its share, want some 2000 and at most 1.1", name, r.Calls, r.Most)
			}
		}
	})
	t.Run("a_server_without_streams_gets_its_share_of_calls", func(t *testing.T) {
		t.Parallel()
		s := scenario(t, "a server comes back beside 3 with 100 streams each")
		s.WarmUp = 2 * time.Second
		r := mustRun(t, s, standard, Options{Calls: 20_000, Seed: 1})
		if r.Least < 0.9 || r.Most > 1.1 {
			t.Errorf("the servers get %.2f to %.2f times their shares, want 0.9 to 1.1", r.Least, r.Most)
		}
		// At this load round_robin's is the oracle's, too.
		if got, most := r.Percentile(0.99), p99(t, s, oracle, 20_000)*102/100; got > most {
			t.Errorf("p99 is %v, want at most %v", got, most)
		}
	})
	t.Run("a_silent_stream_takes_no_calls_from_its_server", func(t *testing.T) {
		t.Parallel()
		with, without := scenario(t, "10 servers, 75 %, 3 with a silent stream"), scenario(t, "10 servers, 75 %")
		with.WarmUp, without.WarmUp = 2*time.Second, 2*time.Second
		if got, most := p99(t, with, standard, 30_000), p99(t, without, standard, 30_000)*110/100; got > most {
			t.Errorf("p99 with silent streams is %v, want at most %v, 10 %% above that without", got, most)
		}
	})
}

// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package acceptance

import (
	"fmt"
	"math"
	"math/rand/v2"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc"

	"github.com/belfry-go/belfry/balancer/p2c"
	"github.com/belfry-go/belfry/interceptor"
	"github.com/belfry-go/belfry/interceptor/retry"
	"github.com/belfry-go/belfry/internal/test/race"
	"github.com/belfry-go/belfry/internal/testserver"
	testingv1 "github.com/belfry-go/belfry/proto/belfry/testing/v1"
	"github.com/belfry-go/belfry/resolver/discover"
)

// A caller in the first of three zones of five servers with four workers each, in virtual
// time. Which servers it picks is not seeded: the bounds are ten standard errors wide.
func TestZones(t *testing.T) {
	const (
		servers, workers = 5, 4
		mean             = 5 * time.Millisecond
	)
	type call struct {
		sent, took time.Duration
		server     string
		err        error
	}
	// load makes calls for a time at a part of what home can do, and returns them. after
	// does something in the middle.
	load := func(t *testing.T, part float64, span time.Duration, after func(home []*testserver.Server)) (calls []call) {
		synctest.Test(t, func(t *testing.T) {
			c := testserver.NewCluster(t, 3*servers, func(i int) []testserver.Option {
				return []testserver.Option{
					testserver.InMemory(), testserver.Name(fmt.Sprintf("%c%d", 'a'+i/servers, i)),
					testserver.ServiceTime(testserver.Exponential(mean)), testserver.Workers(workers),
				}
			})
			defer c.Close()
			endpoints := c.Endpoints()
			for i := range endpoints {
				endpoints[i] = discover.SetZone(endpoints[i], string(rune('a'+i/servers)))
			}
			source, err := discover.List(endpoints...)
			if err != nil {
				t.Fatal(err)
			}
			stack, err := interceptor.NewStack(retry.Config{AllMethods: true})
			if err != nil {
				t.Fatal(err)
			}
			opts := append(append(c.DialOptions(), stack.DialOptions()...), p2c.DialOptions()...)
			conn, err := grpc.NewClient("belfry:///zones", append(opts, grpc.WithNoProxy(),
				discover.WithSource(source, discover.WithZone("a")),
				grpc.WithDefaultServiceConfig(`{"loadBalancingConfig":[{"belfry.p2c":{"zones":{}}}]}`))...)
			if err != nil {
				t.Fatal(err)
			}
			defer conn.Close()
			conn.Connect()
			for _, s := range c.Servers() {
				if err := s.WaitConnections(t.Context(), 1); err != nil {
					t.Fatal(err)
				}
			}
			synctest.Wait()
			client := testingv1.NewTestServiceClient(conn)
			r := rand.New(rand.NewPCG(1, 2))
			var mu sync.Mutex // guards calls
			var wg sync.WaitGroup
			if after != nil {
				wg.Go(func() {
					time.Sleep(span / 2)
					after(c.Servers()[:servers])
				})
			}
			start := time.Now()
			for time.Since(start) < span {
				time.Sleep(time.Duration(r.ExpFloat64() / part * float64(mean) / (servers * workers)))
				wg.Go(func() {
					sent := time.Since(start)
					reply, err := client.Unary(t.Context(), &testingv1.UnaryRequest{})
					mu.Lock()
					defer mu.Unlock()
					calls = append(calls, call{sent, time.Since(start) - sent, reply.GetObserved().GetServer(), err})
				})
			}
			wg.Wait()
		})
		return calls
	}
	// home returns which part of the calls was answered at home, of those sent after a time.
	home := func(t *testing.T, calls []call, after time.Duration) float64 {
		home, all := 0, 0
		for _, c := range calls {
			if c.err != nil {
				t.Fatalf("a call failed: %v", c.err)
			}
			if c.sent < after {
				continue
			}
			all++
			if strings.HasPrefix(c.server, "a") {
				home++
			}
		}
		return float64(home) / float64(all)
	}
	skipRace := func(t *testing.T) {
		if race.Enabled {
			t.Skip("thousands of calls take long with the race detector; the lost zone is tested with it")
		}
	}
	t.Run("home_takes_the_calls_at_70_percent", func(t *testing.T) {
		skipRace(t)
		got := home(t, load(t, 0.7, time.Second, nil), 200*time.Millisecond)
		t.Logf("%.3f of the calls stay at home", got)
		if got < 0.93 {
			t.Errorf("%.3f of the calls stay at home, want at least 0.93", got)
		}
	})
	t.Run("only_the_overflow_leaves_at_140_percent", func(t *testing.T) {
		skipRace(t)
		got := home(t, load(t, 1.4, time.Second, nil), 200*time.Millisecond)
		t.Logf("%.3f of the calls stay at home", got)
		if want := 1 / 1.4; math.Abs(got-want) > 0.05 {
			t.Errorf("%.3f of the calls stay at home, want %.3f within 0.05", got, want)
		}
	})
	t.Run("a_lost_zone_loses_no_call", func(t *testing.T) {
		calls := load(t, 0.5, 600*time.Millisecond, func(home []*testserver.Server) {
			for _, s := range home {
				s.Stop()
			}
		})
		if got := home(t, calls, 301*time.Millisecond); got != 0 {
			t.Errorf("%.3f of the calls were answered at home after it was lost", got)
		}
		for _, c := range calls {
			if c.took > 200*time.Millisecond {
				t.Errorf("a call sent at %v took %v, want at most 200ms", c.sent, c.took)
			}
		}
	})
}

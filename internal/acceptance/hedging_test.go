// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package acceptance

import (
	"context"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc"

	"github.com/belfry-go/belfry/interceptor"
	"github.com/belfry-go/belfry/interceptor/stackconfig"
	"github.com/belfry-go/belfry/internal/test/race"
	"github.com/belfry-go/belfry/internal/testserver"
	testingv1 "github.com/belfry-go/belfry/proto/belfry/testing/v1"
)

const (
	stallFor   = 100 * time.Millisecond
	stallEvery = 4 * time.Second
)

// tails are two clients of servers that each stall for 100 ms every 4 s, which call
// them at the same time through stacks that differ in the hedge alone: they meet
// the same stalls.
type tails struct{ without, with *client }

func newTails(t *testing.T, cluster *testserver.Cluster, hedge string) tails {
	const plain = `{"timeout": {"call": "5s"}}, {"concurrency": {"limit": 1000}}`
	return tails{
		without: newClient(t, cluster, `{"methodConfig": [{"name": [{}], "layers": [`+plain+`]}]}`),
		with:    newClient(t, cluster, `{"methodConfig": [{"name": [{}], "layers": [`+hedge+`, `+plain+`]}]}`),
	}
}

// warmUp makes calls for d while nothing stalls, for connections and for latencies to
// take a percentile of.
func (c tails) warmUp(t *testing.T, d time.Duration) {
	c.both(t.Context(), t, d)
	c.without.reset()
	c.with.reset()
}

func (c tails) both(ctx context.Context, t *testing.T, d time.Duration) {
	var wg sync.WaitGroup
	wg.Go(func() { c.without.load(ctx, t, d) })
	wg.Go(func() { c.with.load(ctx, t, d) })
	wg.Wait()
}

// stalled makes calls for d while the servers stall, each at its own time, and
// returns p99.9 of both clients since the warm-up. It checks that there were no more
// than 6 % further attempts since the start.
func (c tails) stalled(t *testing.T, cluster *testserver.Cluster, d time.Duration) (base, hedged time.Duration) {
	ctx, cancel := context.WithCancel(t.Context())
	var all sync.WaitGroup
	defer all.Wait()
	defer cancel()
	for i, srv := range cluster.Servers() {
		all.Go(func() {
			begin := time.Now()
			for next := time.Duration(i) * stallEvery / time.Duration(len(cluster.Servers())); ; next += stallEvery {
				select {
				case <-time.After(time.Until(begin.Add(next))):
				case <-ctx.Done():
					return
				}
				if err := srv.StallFor(stallFor); err != nil {
					t.Error(err)
				}
			}
		})
	}
	c.both(ctx, t, d)
	base, hedged = c.without.p999(), c.with.p999()
	extra := float64(c.with.attempts.Load())/float64(c.with.calls.Load()) - 1
	t.Logf("p99.9 without hedges %v, with them %v, in ratio %.1f; %.2f %% more calls", base, hedged, float64(base)/float64(hedged), 100*extra)
	if extra > 0.06 {
		t.Errorf("hedges made %.2f %% more calls, want at most 6 %%", 100*extra)
	}
	return base, hedged
}

func newStalling(t *testing.T, opts ...testserver.Option) *testserver.Cluster {
	return testserver.NewCluster(t, 5, func(int) []testserver.Option {
		return append([]testserver.Option{testserver.ServiceTime(testserver.Lognormal(2*time.Millisecond, 0.3))}, opts...)
	})
}

// hedges are a hedge at p95, for 5.4 % more calls and one a second, which is 0.4 % here,
// and one as it is by default:
// for the slowest 4 %, and for 4.75 % at most.
var hedges = map[string]string{
	"p95":     `{"hedge": {"allMethods": true, "percentile": 0.95, "maxExtraLoad": 0.057}}`,
	"default": `{"hedge": {"allMethods": true}}`,
}

// In virtual time nothing but the servers takes any, so the numbers are theirs. How
// many calls a stall catches is a matter of chance still. Stalls of each server every 2 s
// would use up the budget, and then p99.9 is that of the stalls in some rounds. Every 4 s
// they use half of it: of 100 rounds none lowered p99.9 by less than 2.0, and half of them
// by 15. The calls of all rounds count together, and up to five are made, of which all
// would have to be worse than the worst of those.
func TestHedgingHalvesTail(t *testing.T) {
	if race.Enabled {
		t.Skip("takes minutes under the race detector, which has TestStress")
	}
	for name, hedge := range hedges {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				cluster := newStalling(t, testserver.InMemory())
				c := newTails(t, cluster, hedge)
				c.warmUp(t, 10*time.Second)
				for round := 1; ; round++ {
					base, hedged := c.stalled(t, cluster, 20*time.Second)
					if base < stallFor/2 {
						t.Errorf("without hedges p99.9 is %v, want that of the stalls of %v", base, stallFor)
					}
					if hedged*2 <= base {
						break
					}
					if round == 5 {
						t.Errorf("with hedges p99.9 is %v, without %v, want it lowered at least twofold", hedged, base)
						break
					}
				}
			})
		})
	}
}

// client is a channel with counts of what went through it.
type client struct {
	interceptor.NopObserver
	conn            *grpc.ClientConn
	calls, attempts atomic.Int64

	mu        sync.Mutex // Guards latencies.
	latencies []time.Duration
}

func newClient(t *testing.T, cluster *testserver.Cluster, config string) *client {
	c := new(client)
	c.conn = dial(t, newStackOf(t, config, stackconfig.WithObserver(c)), cluster.Endpoints(), cluster.DialOptions()...)
	return c
}

// Attempt counts an attempt.
func (c *client) Attempt(interceptor.Observed) { c.attempts.Add(1) }

// load makes 250 calls a second for d, however long they take.
func (c *client) load(ctx context.Context, t *testing.T, d time.Duration) {
	stub := testingv1.NewTestServiceClient(c.conn)
	ticker := time.NewTicker(4 * time.Millisecond)
	defer ticker.Stop()
	var wg sync.WaitGroup
	for begin := time.Now(); time.Since(begin) < d; <-ticker.C {
		c.calls.Add(1)
		wg.Go(func() {
			begin := time.Now()
			if _, err := stub.Unary(ctx, &testingv1.UnaryRequest{}); err != nil {
				t.Errorf("a call: %v", err)
			}
			took := time.Since(begin)
			c.mu.Lock()
			defer c.mu.Unlock()
			c.latencies = append(c.latencies, took)
		})
	}
	wg.Wait()
}

func (c *client) reset() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.latencies = nil
}

// p999 is the latency that no more than one in a thousand calls exceeds.
func (c *client) p999() time.Duration {
	c.mu.Lock()
	defer c.mu.Unlock()
	slices.Sort(c.latencies)
	return c.latencies[(len(c.latencies)*999+999)/1000-1]
}

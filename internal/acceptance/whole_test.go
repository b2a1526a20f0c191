// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package acceptance

import (
	"context"
	"fmt"
	"io"
	"math/rand/v2"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"

	"github.com/belfry-go/belfry"
	"github.com/belfry-go/belfry/balancer/p2c"
	"github.com/belfry-go/belfry/interceptor"
	"github.com/belfry-go/belfry/interceptor/breaker"
	"github.com/belfry-go/belfry/interceptor/budget"
	"github.com/belfry-go/belfry/interceptor/buffer"
	"github.com/belfry-go/belfry/interceptor/concurrency"
	"github.com/belfry-go/belfry/interceptor/hedge"
	"github.com/belfry-go/belfry/interceptor/loadshed"
	"github.com/belfry-go/belfry/interceptor/ratelimit"
	"github.com/belfry-go/belfry/interceptor/retry"
	"github.com/belfry-go/belfry/interceptor/timeout"
	"github.com/belfry-go/belfry/internal/test/race"
	"github.com/belfry-go/belfry/internal/testserver"
	testingv1 "github.com/belfry-go/belfry/proto/belfry/testing/v1"
	"github.com/belfry-go/belfry/resolver/discover"
)

// whole is the whole recommended stack, and what it says about itself.
type whole struct {
	stack   *interceptor.Stack
	buffer  *buffer.Layer
	limit   *concurrency.Layer
	breaker *breaker.Layer
	retry   *retry.Layer

	mu      sync.Mutex
	sends   []time.Time // Attempts that were handed to the connection.
	changes []change    // Of the circuit.
	most    int         // Calls in the stack beside those that run, wait in a slot or were paid for as retries.
}

type change struct {
	at time.Time
	to breaker.State
}

// wholeBudget pays for 10 retries a second, and for one for each ten calls.
var wholeBudget = budget.Config{TTL: time.Second, Ratio: 0.1, MinPerSecond: 10}

const (
	wholeLimit   = 40
	wholeBuffer  = 50
	wholeRate    = 3000
	wholeBurst   = 300
	wholeProbes  = 2
	wholeOpenFor = 400 * time.Millisecond
)

func newWhole(t *testing.T) *whole {
	w := &whole{}
	var err error
	add := func(l interceptor.Layer, e error) interceptor.Layer {
		if e != nil {
			err = e
		}
		return l
	}
	w.buffer = add(buffer.New(buffer.Config{Size: wholeBuffer})).(*buffer.Layer)
	w.limit = add(concurrency.New(concurrency.Config{Limit: wholeLimit})).(*concurrency.Layer)
	w.breaker = add(breaker.New(breaker.Config{
		Window: time.Second, MinCalls: 20, OpenFor: wholeOpenFor, OpenGrowth: 1, Probes: wholeProbes,
	}, breaker.WithOnStateChange(func(c breaker.Change) {
		w.mu.Lock()
		defer w.mu.Unlock()
		w.changes = append(w.changes, change{time.Now(), c.To})
	}))).(*breaker.Layer)
	w.retry = add(retry.New(retry.Config{
		AllMethods: true,
		Budget:     wholeBudget,
		Backoff:    retry.Backoff{Initial: 10 * time.Millisecond, Max: 100 * time.Millisecond},
	})).(*retry.Layer)
	if err != nil {
		t.Fatal(err)
	}
	w.stack, err = interceptor.NewStack(
		loadshed.Config{}, timeout.Config{Timeout: time.Second, FirstResponse: time.Second}, hedge.Config{AllMethods: true}, w.retry,
		w.buffer, w.limit, ratelimit.Config{Limit: wholeRate, Burst: wholeBurst}, w.breaker,
	)
	if err != nil {
		t.Fatal(err)
	}
	if a := w.stack.Advice(); len(a) != 0 {
		t.Errorf("the recommended stack needs advice: %q", a)
	}
	return w
}

// dial returns a channel whose attempts are counted behind the stack.
func (w *whole) dial(t *testing.T, cluster *testserver.Cluster) testingv1.TestServiceClient {
	return dialStack(t, w.stack, cluster,
		grpc.WithChainUnaryInterceptor(func(ctx context.Context, method string, req, reply any, cc *grpc.ClientConn, next grpc.UnaryInvoker, opts ...grpc.CallOption) error {
			if len(req.(*testingv1.UnaryRequest).Payload) == 0 { // gRPC sends none that is too large.
				w.sent()
			}
			return next(ctx, method, req, reply, cc, opts...)
		}),
		grpc.WithChainStreamInterceptor(func(ctx context.Context, desc *grpc.StreamDesc, cc *grpc.ClientConn, method string, next grpc.Streamer, opts ...grpc.CallOption) (grpc.ClientStream, error) {
			w.sent()
			return next(ctx, desc, cc, method, opts...)
		}))
}

func (w *whole) sent() {
	// Calls in the stack that neither run nor wait in a slot are between two layers,
	// or back off for a retry that the budget paid for.
	rest := w.stack.InFlight() - int(w.limit.InUse()) - w.buffer.Waiting()
	w.mu.Lock()
	defer w.mu.Unlock()
	w.sends = append(w.sends, time.Now())
	w.most = max(w.most, rest)
}

// phase is a part of the load, all of it in the same state of the servers.
type phase struct {
	name    string
	begin   func(*testserver.Server) error
	lasts   time.Duration
	well    bool // Calls succeed,
	settled time.Duration
}

func fine(s *testserver.Server) error { s.Resume(); s.Heal(); return nil }

var phases = []phase{
	{name: "well", begin: fine, lasts: 3 * time.Second, well: true},
	{name: "hang", begin: func(s *testserver.Server) error { s.Stall(); return nil }, lasts: 10 * time.Second},
	{name: "after the hang", begin: fine, lasts: 4 * time.Second, well: true, settled: time.Second},
	{name: "fail", begin: func(s *testserver.Server) error { return s.Fail(codes.Unavailable, 1) }, lasts: 10 * time.Second},
	{name: "after the failures", begin: fine, lasts: 4 * time.Second, well: true, settled: time.Second},
}

// result is what became of the calls that began in a phase after it had settled.
type result struct{ calls, failed [2]int64 } // By priority.

// run puts perSecond calls through the stack in all phases, where half the callers
// cancel, a tenth has high priority and is patient, and some calls come expired or
// are too large.
func (w *whole) run(t *testing.T, client testingv1.TestServiceClient, cluster *testserver.Cluster, perSecond int, shorter time.Duration) map[string]*result {
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	rng := rand.New(rand.NewPCG(seed, 0))
	large := &testingv1.UnaryRequest{Payload: make([]byte, 2000)}
	results := map[string]*result{}
	var wg sync.WaitGroup
	for _, p := range phases {
		for _, s := range cluster.Servers() {
			if err := p.begin(s); err != nil {
				t.Fatal(err)
			}
		}
		r := &result{}
		results[p.name] = r
		begin := time.Now()
		lasts := p.lasts / shorter
		if p.well && shorter > 1 {
			lasts = p.settled + time.Second
		}
		for time.Since(begin) < lasts {
			// A call that is not over when the next phase begins belongs to neither.
			at := time.Since(begin)
			counts := p.well && at >= p.settled && at < lasts-100*time.Millisecond
			how, stream, wait := rng.IntN(20), rng.IntN(5) == 0, time.Duration(rng.IntN(200))*time.Millisecond
			wg.Go(func() {
				ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
				defer cancel()
				priority := 0
				switch {
				case how < 2:
					priority = 1
					ctx = interceptor.ContextWithPriority(ctx, 1)
				case how < 12 && !p.well:
					ctx, cancel = context.WithTimeout(ctx, wait)
					defer cancel()
				case how == 12:
					ctx, cancel = context.WithTimeout(ctx, -1)
					defer cancel()
					client.Unary(ctx, &testingv1.UnaryRequest{})
					return
				case how == 13:
					client.Unary(ctx, large, grpc.MaxCallSendMsgSize(1000))
					return
				}
				err := call(ctx, client, stream)
				if counts {
					atomic.AddInt64(&r.calls[priority], 1)
					if err != nil {
						atomic.AddInt64(&r.failed[priority], 1)
						if n := atomic.LoadInt64(&r.failed[priority]); n < 4 {
							t.Logf("%s: %v", p.name, err)
						}
					}
				}
			})
			time.Sleep(time.Second / time.Duration(perSecond))
		}
	}
	wg.Wait()
	return results
}

func call(ctx context.Context, client testingv1.TestServiceClient, stream bool) error {
	if !stream {
		_, err := client.Unary(ctx, &testingv1.UnaryRequest{})
		return err
	}
	s, err := client.ServerStream(ctx, &testingv1.ServerStreamRequest{})
	for err == nil {
		_, err = s.Recv()
	}
	if err == io.EOF {
		return nil
	}
	return err
}

// check compares what was seen with what the configuration says, and tolerates a share
// of failed calls, and a number of attempts that were admitted before the circuit
// changed and counted after it.
func (w *whole) check(t *testing.T, results map[string]*result, perSecond int, failures float64, late int) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for name, r := range results {
		for priority, calls := range r.calls {
			if failed := r.failed[priority]; float64(failed) > failures*float64(calls) {
				t.Errorf("%s: %d of %d calls of priority %d failed", name, failed, calls, priority)
			}
		}
	}
	// The others back off, and the budget has paid for that.
	if most := int(wholeBudget.TTL.Seconds() * (wholeBudget.MinPerSecond + wholeBudget.Ratio*float64(perSecond))); w.most > most {
		t.Errorf("%d calls were in the stack beside those that ran or waited in a slot, want at most %d", w.most, most)
	}
	slices.SortFunc(w.sends, time.Time.Compare)
	for _, window := range []time.Duration{10 * time.Millisecond, 100 * time.Millisecond, time.Second} {
		most := wholeBurst + int(wholeRate*window.Seconds()) + 1
		for i, from := 0, 0; i < len(w.sends); i++ {
			for w.sends[i].Sub(w.sends[from]) > window {
				from++
			}
			if n := i - from + 1; n > most {
				t.Errorf("%d attempts were sent within %v, want at most %d", n, window, most)
				break
			}
		}
	}
	w.checkCircuit(t, late)
}

// checkCircuit counts what was sent while the circuit was open or half-open.
func (w *whole) checkCircuit(t *testing.T, late int) {
	for i, c := range w.changes {
		if c.to == breaker.Closed {
			continue
		}
		end := time.Now()
		if i+1 < len(w.changes) {
			end = w.changes[i+1].at
		}
		n := 0
		for _, at := range w.sends {
			if at.After(c.at) && at.Before(end) {
				n++
			}
		}
		most := late
		if c.to == breaker.HalfOpen {
			most += wholeProbes * (1 + int(end.Sub(c.at)/wholeOpenFor))
		}
		if n > most {
			t.Errorf("%d attempts were sent while the circuit was %v for %v, want at most %d", n, c.to, end.Sub(c.at), most)
		}
	}
	if len(w.changes) == 0 {
		t.Errorf("the circuit never opened")
	}
}

// atRest checks that nothing is left.
func (w *whole) atRest(t *testing.T) {
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Minute)
	defer cancel()
	if err := w.stack.Drain(ctx); err != nil {
		t.Error(err)
	}
	if n := w.limit.InUse(); n != 0 {
		t.Errorf("%d permits are in use at the end", n)
	}
	if n := w.limit.Waiting() + w.buffer.Waiting() + w.stack.InFlight(); n != 0 {
		t.Errorf("%d calls are left at the end", n)
	}
}

// A server hangs for ten seconds, recovers, fails for ten seconds, and recovers,
// under the whole recommended stack.
func TestWholeStack(t *testing.T) {
	for _, perSecond := range []int{20, 2000} {
		shorter := time.Duration(1)
		if race.Enabled && perSecond > 1000 { // Ten times slower.
			shorter = 4
		}
		t.Run(fmt.Sprintf("%d_calls_a_second", perSecond), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := newWhole(t)
				cluster := testserver.NewCluster(t, 3, func(int) []testserver.Option {
					return []testserver.Option{testserver.InMemory(), testserver.ServiceTime(testserver.Fixed(10 * time.Millisecond))}
				})
				client := w.dial(t, cluster)
				results := w.run(t, client, cluster, perSecond, shorter)
				w.check(t, results, perSecond, 0, 0)
				w.atRest(t)
			})
		})
	}
	t.Run("on_the_wire", func(t *testing.T) {
		if testing.Short() {
			t.Skip("takes seconds of real time; run without -short")
		}
		w := newWhole(t)
		cluster := testserver.NewCluster(t, 3, func(int) []testserver.Option {
			return []testserver.Option{testserver.ServiceTime(testserver.Fixed(10 * time.Millisecond))}
		})
		client := w.dial(t, cluster)
		results := w.run(t, client, cluster, 200, 4)
		// Nothing but a machine that is late fails a call, of which there are 15 of the
		// higher priority in a phase: what is not given back fails all. An attempt comes
		// every 5 ms, so few can be between the breaker and the count, and an open circuit
		// that lets calls pass lets 80.
		w.check(t, results, 200, 0.25, 10)
		w.atRest(t)
	})
}

// Retries under load: a closed loop of callers, a limit that is busy, and servers
// that fail a share of the calls.
func TestRetriesWhileCallsWait(t *testing.T) {
	for _, tc := range []struct{ failing, most float64 }{{0.05, 0.001}, {0.20, 0.01}} {
		counts := []int{10, 25, 40, 60}
		if race.Enabled { // Ten times slower.
			counts = []int{40}
		}
		for _, callers := range counts {
			t.Run(fmt.Sprintf("%v_fail/%d_callers", tc.failing, callers), func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					stack, err := interceptor.NewStack(
						loadshed.Config{}, timeout.Config{Timeout: time.Second}, hedge.Config{AllMethods: true},
						retry.Config{AllMethods: true, Budget: budget.Config{Ratio: 10, MinPerSecond: 1000}},
						buffer.Config{Size: 50}, concurrency.Config{Limit: 20},
					)
					if err != nil {
						t.Fatal(err)
					}
					cluster := testserver.NewCluster(t, 3, func(int) []testserver.Option {
						return []testserver.Option{testserver.InMemory(), testserver.ServiceTime(testserver.Fixed(10 * time.Millisecond))}
					})
					client := dialStack(t, stack, cluster)
					for _, s := range cluster.Servers() {
						if err := s.Fail(codes.Unavailable, tc.failing); err != nil {
							t.Fatal(err)
						}
					}
					calls, failed := closedLoop(client, callers, 3*time.Second)
					t.Logf("%d calls, %d failed", calls, failed)
					if float64(failed) > tc.most*float64(calls) {
						t.Errorf("%d of %d calls failed, want at most %v", failed, calls, tc.most)
					}
				})
			})
		}
	}
}

// dialStack returns a client of the cluster through a stack and, behind that, opts.
func dialStack(t *testing.T, stack *interceptor.Stack, cluster *testserver.Cluster, opts ...grpc.DialOption) testingv1.TestServiceClient {
	source, err := discover.List(cluster.Endpoints()...)
	if err != nil {
		t.Fatal(err)
	}
	all := append(stack.DialOptions(), opts...)
	all = append(append(all, p2c.DialOptions()...), cluster.DialOptions()...)
	conn, err := grpc.NewClient("belfry:///acceptance", append(all, discover.WithSource(source), grpc.WithNoProxy(),
		grpc.WithDefaultServiceConfig(`{"loadBalancingConfig":[{"belfry.p2c":{}}]}`))...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	if err := belfry.WaitReady(testContext(t), conn); err != nil {
		t.Fatal(err)
	}
	return testingv1.NewTestServiceClient(conn)
}

// closedLoop has callers make one call after the other for a time.
func closedLoop(client testingv1.TestServiceClient, callers int, d time.Duration) (calls, failed int64) {
	var wg sync.WaitGroup
	end := time.Now().Add(d)
	for range callers {
		wg.Go(func() {
			for time.Now().Before(end) {
				_, err := client.Unary(context.Background(), &testingv1.UnaryRequest{})
				atomic.AddInt64(&calls, 1)
				if err != nil {
					atomic.AddInt64(&failed, 1)
				}
			}
		})
	}
	wg.Wait()
	return calls, failed
}

// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package chaos

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"iter"
	"math/rand/v2"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/connectivity"
	"google.golang.org/grpc/resolver"
	"google.golang.org/grpc/status"

	"github.com/belfry-go/belfry/balancer/p2c"
	"github.com/belfry-go/belfry/interceptor"
	"github.com/belfry-go/belfry/internal/test/leaktest"
	"github.com/belfry-go/belfry/internal/testserver"
	testingv1 "github.com/belfry-go/belfry/proto/belfry/testing/v1"
	"github.com/belfry-go/belfry/resolver/discover"
)

var (
	full = flag.Bool("chaos.full", false, "make 1,400 calls a second, and bound latencies too")
	tcp  = flag.Bool("chaos.tcp", false, "use loopback and real time")
)

func TestMain(m *testing.M) { leaktest.Main(m) }

const (
	servers = 10
	load    = 0.7 // of what the servers can do
)

// mean is what a call takes. Each server works on one call at a time.
func mean() time.Duration {
	if *full {
		return 5 * time.Millisecond
	}
	return 70 * time.Millisecond
}

// setup is what a test has of its own.
type setup struct {
	policy  string             // the config of belfry.p2c; default {}
	stack   []interceptor.Spec // of each client; default none
	load    float64            // default load
	clients int                // default 1
	timeout time.Duration      // the deadline that callers set; default 10 s
	dial    []grpc.DialOption
	server  []testserver.Option
}

// world is clients that call servers through everything.
type world struct {
	setup
	t       *testing.T
	cluster *testserver.Cluster
	source  *source
	conns   []*grpc.ClientConn
	stacks  []*interceptor.Stack
	rand    *rand.Rand
	calls   sync.WaitGroup
}

// run runs a test in virtual time. Arrivals and the work of the calls are always the same;
// which servers the policy picks is chance.
func run(t *testing.T, s setup, test func(w *world)) {
	t.Helper()
	if s.policy == "" {
		s.policy = "{}"
	}
	if s.load == 0 {
		s.load = load
	}
	s.clients = max(s.clients, 1)
	if s.timeout == 0 {
		s.timeout = 10 * time.Second
	}
	body := func(t *testing.T) {
		w := &world{setup: s, t: t, rand: rand.New(rand.NewPCG(1, 2))}
		w.cluster = testserver.NewCluster(t, servers, func(int) []testserver.Option { return w.serverOptions() })
		defer w.cluster.Close()
		w.source = &source{set: w.cluster.Endpoints(), changed: make(chan struct{})}
		defer w.close()
		for range s.clients {
			w.dial()
		}
		w.ready()
		test(w)
		w.rest()
	}
	if *tcp {
		body(t)
		return
	}
	synctest.Test(t, body)
}

func (w *world) serverOptions() []testserver.Option {
	// With the few calls of the short form, one that takes long by itself must not look like
	// a fault.
	work := testserver.Uniform(mean()/2, mean()*3/2)
	if *full {
		work = testserver.Exponential(mean())
	}
	o := []testserver.Option{testserver.ServiceTime(work), testserver.Workers(1)}
	if !*tcp {
		o = append(o, testserver.InMemory())
	}
	return append(o, w.server...)
}

// add starts one more server, which discovery does not know yet.
func (w *world) add() *testserver.Server {
	w.t.Helper()
	s, err := w.cluster.Add(w.serverOptions()...)
	if err != nil {
		w.t.Fatal(err)
	}
	return s
}

func (w *world) dial() {
	w.t.Helper()
	stack, err := interceptor.NewStack(w.setup.stack...)
	if err != nil {
		w.t.Fatal(err)
	}
	src, err := discover.FullSets(w.source.watch)
	if err != nil {
		w.t.Fatal(err)
	}
	opts := append(w.cluster.DialOptions(), stack.DialOptions()...)
	opts = append(opts, p2c.DialOptions()...)
	opts = append(opts, discover.WithSource(src), grpc.WithNoProxy(),
		grpc.WithDefaultServiceConfig(`{"loadBalancingConfig":[{"belfry.p2c":`+w.policy+`}]}`))
	conn, err := grpc.NewClient("belfry:///chaos", append(opts, w.setup.dial...)...)
	if err != nil {
		w.t.Fatal(err)
	}
	conn.Connect()
	w.conns, w.stacks = append(w.conns, conn), append(w.stacks, stack)
}

// ready waits until all listed servers are READY for all clients.
func (w *world) ready() {
	w.t.Helper()
	for _, conn := range w.conns {
		w.until("all servers are READY", func() bool {
			endpoints := endpointsOf(conn)
			if len(endpoints) < len(w.source.list()) {
				return false
			}
			for _, e := range endpoints {
				if e.State != connectivity.Ready {
					return false
				}
			}
			return true
		})
	}
}

// until waits for something, for five minutes at most.
func (w *world) until(what string, done func() bool) {
	w.t.Helper()
	for begin := time.Now(); !done(); time.Sleep(time.Millisecond) {
		if time.Since(begin) > 5*time.Minute {
			w.t.Fatalf("waiting until %s", what)
		}
	}
}

// endpointsOf returns what the policy of a channel knows.
func endpointsOf(conn *grpc.ClientConn) (all []p2c.EndpointSnapshot) {
	for _, s := range p2c.SnapshotsOf(conn) {
		all = append(all, s.Endpoints...)
	}
	return all
}

// sent returns how many attempts were sent to a server, and how many of them are in flight.
func (w *world) sent(s *testserver.Server) (n, inFlight int) {
	for _, conn := range w.conns {
		for _, e := range endpointsOf(conn) {
			if e.Addresses[0] == s.Addr() {
				n += int(e.Picks)
				inFlight += e.InFlight
			}
		}
	}
	return n, inFlight
}

// phase is the calls that were sent in a time.
type phase struct {
	w    *world
	name string

	mu     sync.Mutex // guards what follows
	took   []time.Duration
	failed map[codes.Code]int
}

// serve makes calls for a time and returns them. They may end later.
func (w *world) serve(name string, d time.Duration) *phase {
	p := &phase{w: w, name: name, failed: make(map[codes.Code]int)}
	rate := w.load * servers / float64(mean())
	for begin := time.Now(); ; {
		// The calls are under way when time has passed, and so before serve returns.
		time.Sleep(time.Duration(w.rand.ExpFloat64() / rate))
		if time.Since(begin) >= d {
			return p
		}
		client := testingv1.NewTestServiceClient(w.conns[w.rand.IntN(len(w.conns))])
		w.calls.Go(func() {
			ctx, cancel := context.WithTimeout(context.Background(), w.timeout)
			defer cancel()
			sent := time.Now()
			_, err := client.Unary(ctx, &testingv1.UnaryRequest{})
			p.mu.Lock()
			defer p.mu.Unlock()
			p.took = append(p.took, time.Since(sent))
			if err != nil {
				p.failed[status.Code(err)]++
			}
		})
	}
}

// rest waits for all calls, and checks that the clients are at rest.
func (w *world) rest() {
	w.t.Helper()
	w.calls.Wait()
	for i, conn := range w.conns {
		w.until("nothing is in flight", func() bool {
			for _, e := range endpointsOf(conn) {
				if e.InFlight != 0 || e.Streams != 0 {
					return false
				}
			}
			return true
		})
		ctx, cancel := context.WithTimeout(context.Background(), 5*time.Minute)
		defer cancel()
		if err := w.stacks[i].Drain(ctx); err != nil {
			w.t.Errorf("the stack is not at rest: %v", err)
		}
	}
}

func (w *world) close() {
	w.t.Helper()
	w.calls.Wait()
	for _, conn := range w.conns {
		if err := conn.Close(); err != nil {
			w.t.Errorf("closing a channel: %v", err)
		}
	}
}

// want checks, once all calls are over, that at most so many failed, and with -chaos.full the
// 99th percentile.
func (p *phase) want(failed int, p99 time.Duration) {
	t := p.w.t
	t.Helper()
	p.w.calls.Wait()
	n := 0
	for _, k := range p.failed {
		n += k
	}
	slices.Sort(p.took)
	if len(p.took) == 0 {
		t.Fatalf("%s: no calls", p.name)
	}
	got := p.took[(len(p.took)*99+99)/100-1]
	t.Logf("%s: %d calls, %d failed %v, p99 %v", p.name, len(p.took), n, p.failed, got.Round(100*time.Microsecond))
	if *tcp && p.name == "before" {
		failed++ // a call was on its way when the fault began
	}
	if n > failed {
		t.Errorf("%s: %d of %d calls failed, want at most %d: %v", p.name, n, len(p.took), failed, p.failed)
	}
	if *full && got > p99 {
		t.Errorf("%s: the p99 is %v, want at most %v", p.name, got, p99)
	}
}

// source is a registry.
type source struct {
	mu      sync.Mutex // guards what follows
	set     []resolver.Endpoint
	down    bool
	changed chan struct{} // closed at the next change
}

func (s *source) change(f func()) {
	s.mu.Lock()
	defer s.mu.Unlock()
	f()
	close(s.changed)
	s.changed = make(chan struct{})
}

// put replaces the set.
func (s *source) put(set []resolver.Endpoint) { s.change(func() { s.set = set }) }

func (s *source) list() []resolver.Endpoint {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.set
}

func (s *source) watch(ctx context.Context) iter.Seq2[[]resolver.Endpoint, error] {
	return func(yield func([]resolver.Endpoint, error) bool) {
		for {
			s.mu.Lock()
			set, down, changed := s.set, s.down, s.changed
			s.mu.Unlock()
			if down {
				yield(nil, errors.New("the registry is down"))
				return
			}
			if !yield(set, nil) {
				return
			}
			select {
			case <-changed:
			case <-ctx.Done():
				yield(nil, fmt.Errorf("watching the registry: %w", ctx.Err()))
				return
			}
		}
	}
}

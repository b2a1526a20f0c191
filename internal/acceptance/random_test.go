// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package acceptance

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"math/rand/v2"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	mwretry "github.com/grpc-ecosystem/go-grpc-middleware/v2/interceptors/retry"
	"golang.org/x/sync/semaphore"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/stats"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/grpc-ecosystem/go-grpc-middleware/v2/interceptors"
	"github.com/grpc-ecosystem/go-grpc-middleware/v2/interceptors/selector"

	"github.com/belfry-go/belfry"
	"github.com/belfry-go/belfry/balancer/p2c"
	"github.com/belfry-go/belfry/interceptor"
	"github.com/belfry-go/belfry/interceptor/adapt"
	"github.com/belfry-go/belfry/interceptor/breaker"
	"github.com/belfry-go/belfry/interceptor/budget"
	"github.com/belfry-go/belfry/interceptor/buffer"
	"github.com/belfry-go/belfry/interceptor/concurrency"
	"github.com/belfry-go/belfry/interceptor/failfast"
	"github.com/belfry-go/belfry/interceptor/filter"
	"github.com/belfry-go/belfry/interceptor/hedge"
	"github.com/belfry-go/belfry/interceptor/loadshed"
	"github.com/belfry-go/belfry/interceptor/ratelimit"
	"github.com/belfry-go/belfry/interceptor/retry"
	"github.com/belfry-go/belfry/interceptor/throttle"
	"github.com/belfry-go/belfry/interceptor/timeout"
	"github.com/belfry-go/belfry/internal/testserver"
	"github.com/belfry-go/belfry/limit"
	testingv1 "github.com/belfry-go/belfry/proto/belfry/testing/v1"
	"github.com/belfry-go/belfry/resolver/discover"
)

var (
	randomSeed   = flag.Uint64("random.seed", 0, "run TestRandomStacks with this seed alone; 0 is one of the clock")
	randomRounds = flag.Int("random.rounds", 0, "how many stacks TestRandomStacks makes; 0 is 25")
)

const (
	callIDKey    = "call-id"    // One for each call of a client,
	attemptIDKey = "attempt-id" // and for each attempt.
)

// Stacks of random layers, in front of servers that fail in random ways, are called by
// clients that behave at random. At the end nothing may be left of it, and what gates
// were told must be what the servers saw.
func TestRandomStacks(t *testing.T) {
	seed, rounds := *randomSeed, *randomRounds
	if rounds == 0 {
		rounds = 25
	}
	if seed != 0 {
		rounds = 1
	} else {
		seed = rand.Uint64()>>1 + 1
	}
	for i := range uint64(rounds) {
		t.Run(fmt.Sprintf("seed_%d", seed+i), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) { newWorld(t, seed+i, true).run() })
		})
	}
	t.Run(fmt.Sprintf("on_the_wire/seed_%d", seed), func(t *testing.T) {
		if testing.Short() {
			t.Skip("takes seconds of real time; run without -short")
		}
		newWorld(t, seed, false).run()
	})
}

// world is one round.
type world struct {
	t       *testing.T
	rng     *rand.Rand // Of the goroutine of the test.
	cluster *testserver.Cluster
	changes chan discover.Change
	stacks  []*interceptor.Stack
	records []*record
	bounds  []bound
	seen    sightings
	calm    atomic.Bool // Nothing is made to fail any more.
	nextID  atomic.Int64
	virtual bool // Time is.

	mu     sync.Mutex
	probes []func() string // Say what is left, or nothing. Guarded by mu.
	// unasked are the calls whose message is too large to be sent. A server sees their
	// headers, and nothing to do. Guarded by mu.
	unasked map[string]bool
}

func newWorld(t *testing.T, seed uint64, virtual bool) *world {
	w := &world{t: t, rng: rand.New(rand.NewPCG(seed, 0)), changes: make(chan discover.Change, 1000), virtual: virtual, unasked: map[string]bool{}}
	w.cluster = testserver.NewCluster(t, 1+w.rng.IntN(3), func(int) []testserver.Option {
		opts := []testserver.Option{
			testserver.ServiceTime(testserver.Fixed(time.Duration(1+w.rng.IntN(20)) * time.Millisecond)),
			testserver.GRPC(grpc.StatsHandler(&w.seen)),
		}
		if virtual {
			opts = append(opts, testserver.InMemory())
		}
		if w.rng.IntN(2) == 0 {
			opts = append(opts, testserver.Workers(1+w.rng.IntN(10)))
		}
		return opts
	})
	for _, s := range w.cluster.Servers() {
		w.changes <- discover.Insert(s.Name(), s.Endpoint())
	}
	w.changes <- discover.Synced()
	return w
}

func (w *world) leave(format string, probe func() int64) {
	w.probes = append(w.probes, func() string {
		if n := probe(); n != 0 {
			return fmt.Sprintf(format, n)
		}
		return ""
	})
}

func (w *world) run() {
	t, rng := w.t, w.rng
	var shared []interceptor.Spec
	if rng.IntN(2) == 0 {
		shared = []interceptor.Spec{w.limit(), w.rate()}[:1+rng.IntN(2)]
	}
	source, err := discover.Channel(w.changes)
	if err != nil {
		t.Fatal(err)
	}
	var conns []*grpc.ClientConn
	for range 1 + rng.IntN(2) {
		stack := w.stack(shared)
		w.stacks = append(w.stacks, stack)
		for range 1 + rng.IntN(2) {
			all := append(stack.DialOptions(), p2c.DialOptions()...)
			all = append(append(all, w.cluster.DialOptions()...), discover.WithSource(source), grpc.WithNoProxy(),
				grpc.WithConnectParams(grpc.ConnectParams{
					Backoff: backoff.Config{BaseDelay: 50 * time.Millisecond, Multiplier: 1.6, MaxDelay: time.Second}, MinConnectTimeout: time.Second,
				}),
				grpc.WithDefaultServiceConfig(`{"loadBalancingConfig":[{"belfry.p2c":{}}]}`))
			conn, err := grpc.NewClient("belfry:///random", all...)
			if err != nil {
				t.Fatal(err)
			}
			defer conn.Close()
			conns = append(conns, conn)
		}
		t.Logf("%v", stack)
	}
	if rng.IntN(4) != 0 {
		for _, conn := range conns {
			if err := belfry.WaitReady(testContext(t), conn); err != nil {
				t.Fatal(err)
			}
		}
	}

	// The load, with the servers failing meanwhile.
	lasts := time.Duration(1+rng.IntN(4)) * time.Second
	end := time.Now().Add(lasts)
	var busy sync.WaitGroup
	troubles := rand.New(rand.NewPCG(rng.Uint64(), 1))
	busy.Go(func() { w.trouble(troubles, end) })
	every := time.Duration(1+rng.IntN(20)) * time.Millisecond
	drains := rng.IntN(4) == 0 // In the middle of the load.
	early := end
	if drains {
		early = time.Now().Add(time.Duration(rng.Int64N(int64(lasts))))
	}
	drained := false
	for time.Now().Before(end) {
		if !drained && drains && time.Now().After(early) {
			drained = true
			busy.Go(func() { w.drain() })
			if rng.IntN(2) == 0 {
				for _, conn := range conns {
					conn.Close()
				}
			}
		}
		for range 1 + rng.IntN(3) {
			conn, r := conns[rng.IntN(len(conns))], rand.New(rand.NewPCG(rng.Uint64(), 2))
			busy.Go(func() { w.call(conn, r) })
		}
		time.Sleep(every)
		w.now()
	}
	busy.Wait()

	w.calm.Store(true)
	w.heal()
	if !drains {
		if w.virtual {
			time.Sleep(2 * time.Minute)
		} else {
			time.Sleep(3 * time.Second)
		}
		w.recovers(conns)
	}
	switch rng.IntN(3) {
	case 0:
		for _, conn := range conns {
			conn.Close()
		}
		w.drain()
	default:
		w.drain()
	}
	w.atRest()
	w.truth()
}

// now checks what holds at any time.
func (w *world) now() {
	for _, b := range w.bounds {
		if n := b.n(); n > b.most {
			w.t.Errorf(b.format, n, b.most)
		}
	}
}

// bound is how much of something there may be at any time.
type bound struct {
	format string
	n      func() int64
	most   int64
}

func (w *world) drain() {
	for _, s := range w.stacks {
		ctx, cancel := context.WithTimeout(context.Background(), 5*time.Minute)
		if err := s.Drain(ctx); err != nil {
			w.t.Errorf("%v: %v", s, err)
		}
		cancel()
	}
}

// atRest checks that nothing is left.
func (w *world) atRest() {
	for _, s := range w.stacks {
		if n := s.InFlight(); n != 0 {
			w.t.Errorf("%d calls are left in %v", n, s)
		}
	}
	for _, p := range w.probes {
		if left := p(); left != "" {
			w.t.Error(left)
		}
	}
}

// recovers checks that calls succeed once nothing fails any more.
func (w *world) recovers(conns []*grpc.ClientConn) {
	for i, conn := range conns {
		conn.Connect()
		well, last, pause := 0, error(nil), 250*time.Millisecond
		if w.virtual {
			pause = 2 * time.Second
		}
		for n := 0; n < 40 && well < 5; n++ {
			ctx, cancel := context.WithTimeout(w.identified(), 10*time.Second)
			_, err := testingv1.NewTestServiceClient(conn).Unary(ctx, &testingv1.UnaryRequest{}, grpc.WaitForReady(true))
			cancel()
			if well++; err != nil {
				// Calls that are hedged and repeated may be too many for a rate.
				well, last, pause = 0, err, min(2*pause, 2*time.Second)
			}
			time.Sleep(pause)
		}
		if well < 5 {
			w.t.Errorf("connection %d: calls fail still after minutes without faults: %v", i, last)
		}
	}
}

// truth compares what gates were told with what servers saw.
func (w *world) truth() {
	w.seen.mu.Lock()
	defer w.seen.mu.Unlock()
	for _, r := range w.records {
		r.mu.Lock()
		for _, err := range r.wrong {
			w.t.Errorf("%s: %s", r.name, err)
		}
		counts := map[interceptor.Outcome]int{}
		for id, told := range r.told {
			sent, ok := 0, 0
			for _, e := range told {
				counts[e.Outcome]++
				if e.Outcome.Sent() {
					sent++
				}
				if e.Outcome == interceptor.OK {
					ok++
				}
			}
			switch n := w.seen.ids[id]; {
			case r.whole && sent > 1:
				w.t.Errorf("%s: call %s was sent %d times, as the gate was told", r.name, id, sent)
			case r.exact && n > 0 && sent == 0 && !w.unasked[id]:
				w.t.Errorf("%s: %s was seen by a server, and the gate was told %v", r.name, id, told)
			case r.exact && n == 0 && ok > 0:
				w.t.Errorf("%s: %s was seen by no server, and the gate was told %v", r.name, id, told)
			}
		}
		if n := r.open.Load(); n != 0 {
			w.t.Errorf("%s: %d tickets are left", r.name, n)
		}
		w.t.Logf("%s: %v", r.name, counts)
		r.mu.Unlock()
	}
}

// sightings are the calls and attempts that reached servers. It is a stats.Handler.
type sightings struct {
	mu  sync.Mutex
	ids map[string]int
}

func (s *sightings) TagRPC(ctx context.Context, _ *stats.RPCTagInfo) context.Context {
	md, _ := metadata.FromIncomingContext(ctx)
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.ids == nil {
		s.ids = map[string]int{}
	}
	for _, key := range []string{callIDKey, attemptIDKey} {
		for _, id := range md[key] {
			s.ids[id]++
		}
	}
	return ctx
}
func (*sightings) HandleRPC(context.Context, stats.RPCStats)                         {}
func (*sightings) TagConn(ctx context.Context, _ *stats.ConnTagInfo) context.Context { return ctx }
func (*sightings) HandleConn(context.Context, stats.ConnStats)                       {}

// record is a gate that keeps what it is told. Its call half, if it has one, marks
// attempts.
type record struct {
	name  string
	whole bool // It stands outside of all that makes further attempts.
	exact bool // All that it admits has an ID of its own.
	w     *world

	open atomic.Int64
	next atomic.Int64

	mu    sync.Mutex
	held  map[int64]string // IDs by token.
	heard map[int64]bool   // Responses.
	told  map[string][]interceptor.End
	wrong []string
}

func (w *world) record(name string) *record {
	r := &record{name: fmt.Sprintf("record %d (%s)", len(w.records), name), w: w,
		held: map[int64]string{}, heard: map[int64]bool{}, told: map[string][]interceptor.End{}}
	w.records = append(w.records, r)
	return r
}

func (r *record) String() string             { return r.name }
func (r *record) Traits() interceptor.Traits { return 0 }
func (r *record) hold(a *interceptor.Admission, id string) {
	token := r.next.Add(1)
	r.open.Add(1)
	r.mu.Lock()
	r.held[token] = id
	r.mu.Unlock()
	a.Hold(r, token)
}

func (r *record) Respond(token int64, e interceptor.End) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if _, ok := r.held[token]; !ok || r.heard[token] || e.Outcome != interceptor.OK {
		r.wrong = append(r.wrong, fmt.Sprintf("Respond(%d, %v), held %v, heard %v", token, e, ok, r.heard[token]))
	}
	r.heard[token] = true
}

func (r *record) Release(token int64, e interceptor.End) {
	r.mu.Lock()
	defer r.mu.Unlock()
	id, ok := r.held[token]
	if !ok {
		r.wrong = append(r.wrong, fmt.Sprintf("token %d was released and not held: %v", token, e))
		return
	}
	if e.Responded != r.heard[token] {
		r.wrong = append(r.wrong, fmt.Sprintf("%s: Responded is %v: %v", id, e.Responded, e))
	}
	if e.Responded && !e.Outcome.Sent() {
		r.wrong = append(r.wrong, fmt.Sprintf("%s: has responded and was not sent: %v", id, e))
	}
	if (e.Err == nil) != (e.Outcome == interceptor.OK) && e.Outcome != interceptor.OK && e.Outcome != interceptor.NotSent {
		r.wrong = append(r.wrong, fmt.Sprintf("%s: %v with error %v", id, e.Outcome, e.Err))
	}
	delete(r.held, token)
	r.told[id] = append(r.told[id], e)
	r.open.Add(-1)
}

// gateRecord is a record of calls.
type gateRecord struct {
	interceptor.GateOnly
	*record
}

func (g gateRecord) NewLayer() (interceptor.Layer, error) { return g, nil }
func (g gateRecord) WrapGate(inner interceptor.Gate) interceptor.Gate {
	return interceptor.GateFunc(func(ctx context.Context, a *interceptor.Admission, w interceptor.Wait) error {
		md, _ := metadata.FromOutgoingContext(ctx)
		id := strings.Join(md[callIDKey], ",")
		if g.next.Load()%2 == 0 { // Before or after.
			g.hold(a, id)
			return inner.Admit(ctx, a, w)
		}
		if err := inner.Admit(ctx, a, w); err != nil {
			return err
		}
		g.hold(a, id)
		return nil
	})
}

// attemptRecord is a record of attempts, which marks them for the servers.
type attemptRecord struct{ *record }

func (g attemptRecord) NewLayer() (interceptor.Layer, error) { return g, nil }
func (g attemptRecord) WrapGate(inner interceptor.Gate) interceptor.Gate {
	return interceptor.GateFunc(func(ctx context.Context, a *interceptor.Admission, w interceptor.Wait) error {
		n := g.w.nextID.Add(1)
		md, _ := metadata.FromOutgoingContext(ctx)
		g.w.mu.Lock()
		if g.w.unasked[strings.Join(md[callIDKey], ",")] {
			g.w.unasked[attemptID(n)] = true
		}
		g.w.mu.Unlock()
		a.Note(g.record, n)
		g.hold(a, attemptID(n))
		return inner.Admit(ctx, a, w)
	})
}
func attemptID(n int64) string { return "attempt-" + strconv.FormatInt(n, 10) }
func (g attemptRecord) WrapCall(next interceptor.Next, _ interceptor.Again) interceptor.Next {
	return func(ctx context.Context, c *interceptor.Call) error {
		n, ok := c.Noted(g.record)
		if !ok {
			return errors.New("an attempt without a note")
		}
		return next(metadata.AppendToOutgoingContext(ctx, attemptIDKey, attemptID(n)), c)
	}
}

// A bomb panics now and then, in its gate, in the call or in its Releaser.
type bomb struct{ w *world }

func (bomb) String() string                         { return "bomb" }
func (bomb) Traits() interceptor.Traits             { return 0 }
func (b bomb) NewLayer() (interceptor.Layer, error) { return b, nil }
func (b bomb) goesOff(place int) {
	if !b.w.calm.Load() && rand.IntN(150) == 0 {
		panic(fmt.Sprintf("bomb at %d", place))
	}
}
func (b bomb) WrapGate(inner interceptor.Gate) interceptor.Gate {
	return interceptor.GateFunc(func(ctx context.Context, a *interceptor.Admission, w interceptor.Wait) error {
		if a.Kind() == interceptor.Unary { // Streams release on goroutines of gRPC's.
			a.Hold(b, 0)
		}
		b.goesOff(0)
		err := inner.Admit(ctx, a, w)
		b.goesOff(1)
		return err
	})
}
func (b bomb) Release(int64, interceptor.End) { b.goesOff(2) }
func (b bomb) WrapCall(next interceptor.Next, _ interceptor.Again) interceptor.Next {
	return func(ctx context.Context, c *interceptor.Call) error {
		b.goesOff(3)
		err := next(ctx, c)
		b.goesOff(4)
		return err
	}
}

// stack makes a random stack, in an order that NewStack takes.
func (w *world) stack(shared []interceptor.Spec) *interceptor.Stack {
	for {
		probes, records := len(w.probes), len(w.records)
		specs := w.specs(shared)
		if s, err := interceptor.NewStack(specs...); err == nil {
			return s
		}
		w.probes, w.records = w.probes[:probes], w.records[:records]
	}
}

func (w *world) specs(shared []interceptor.Spec) (specs []interceptor.Spec) {
	rng := w.rng
	one := func(percent int, make func() interceptor.Spec) {
		if rng.IntN(100) < percent {
			s := make()
			if rng.IntN(8) == 0 {
				s = interceptor.Only(selector.MatchFunc(func(_ context.Context, m interceptors.CallMeta) bool { return m.Method != "Bidi" }), s)
			}
			specs = append(specs, s)
		}
	}
	rec := func(name string) {
		if rng.IntN(3) == 0 {
			specs = append(specs, gateRecord{record: w.record(name)})
		}
	}
	if rng.IntN(2) == 0 {
		specs = append(specs, interceptor.Observe(&tally{}))
	}
	outermost := w.record("outermost")
	outermost.whole, outermost.exact = true, true
	specs = append(specs, gateRecord{record: outermost})
	one(10, func() interceptor.Spec { return bomb{w} })
	one(40, func() interceptor.Spec { return loadshed.Config{} })
	one(15, w.failfast)
	one(40, w.timeout)
	rec("outside of hedge")
	one(40, w.hedge)
	rec("in hedge")
	one(50, w.retry)
	one(10, w.foreign)
	rec("in retry")
	one(20, func() interceptor.Spec { return w.timeout() })
	one(40, w.buffer)
	one(15, w.buffer)
	one(15, w.failfast)
	one(10, func() interceptor.Spec { return bomb{w} })
	one(50, w.limit)
	one(10, w.semaphore)
	one(10, w.permit)
	one(15, w.limit)
	rec("in limit")
	one(40, w.rate)
	one(10, func() interceptor.Spec { return w.filter() })
	one(40, w.breaker)
	one(20, w.throttle)
	one(10, w.allow)
	specs = append(specs, shared...)
	if rng.IntN(4) == 0 { // Some other order.
		for range 1 + rng.IntN(4) {
			i, j := 1+rng.IntN(len(specs)-1), 1+rng.IntN(len(specs)-1)
			specs[i], specs[j] = specs[j], specs[i]
		}
		outermost.whole = false
	}
	attempts := w.record("attempts")
	attempts.whole, attempts.exact = true, true
	return append(specs, attemptRecord{attempts})
}

func must[L any](l L, err error) L {
	if err != nil {
		panic(err)
	}
	return l
}

func (w *world) ms(from, to int) time.Duration {
	return time.Duration(from+w.rng.IntN(to-from)) * time.Millisecond
}

func (w *world) keyBy() interceptor.KeyBy {
	switch w.rng.IntN(6) {
	case 0:
		return interceptor.KeyBy{Method: true}
	case 1:
		return interceptor.KeyBy{Metadata: "tenant"}
	}
	return interceptor.KeyBy{}
}

func (w *world) failfast() interceptor.Spec {
	l := must(failfast.New(failfast.Config{After: w.ms(10, 500)}))
	w.leave("%d calls wait in a fail-fast", func() int64 { return int64(l.Waiting()) })
	return l
}

// bound is a time in which a server that is well answers, whose calls take up to 20 ms. On
// the wire a busy machine may take much longer.
func (w *world) bound(most int) time.Duration {
	d := w.ms(30, most)
	if !w.virtual {
		d *= 50
	}
	return d
}

func (w *world) timeout() interceptor.Spec {
	c := timeout.Config{Timeout: w.bound(2000)}
	if w.rng.IntN(2) == 0 {
		c.FirstResponse = w.bound(1000)
	}
	if w.rng.IntN(4) == 0 {
		c.Message = w.bound(1000)
	}
	if w.rng.IntN(4) == 0 {
		c.Idle = w.bound(1000)
	}
	if w.rng.IntN(4) == 0 {
		c.Lifetime = w.bound(3000)
	}
	return must(timeout.New(c))
}

func (w *world) budget() budget.Config {
	return budget.Config{TTL: time.Second, Ratio: []float64{0.1, 1, 10}[w.rng.IntN(3)], MinPerSecond: []float64{1, 10, 100}[w.rng.IntN(3)]}
}

// balance checks that a budget has its reserve when nothing has happened for long.
func (w *world) balance(name string, b *budget.Budget) {
	want := b.Config().MinPerSecond * b.Config().TTL.Seconds()
	w.probes = append(w.probes, func() string {
		time.Sleep(3 * time.Second)
		now := interceptor.Now() // Balance tells of the last change.
		if b.Withdraw(now) {
			b.Refund(now)
		}
		if got := b.Balance(); got != want {
			return fmt.Sprintf("the budget of a %s has %v at the end, want %v", name, got, want)
		}
		return ""
	})
}

func (w *world) hedge() interceptor.Spec {
	c := hedge.Config{AllMethods: true, Delay: w.ms(1, 50), MaxAttempts: 2 + w.rng.IntN(2), Budget: w.budget(), BufferBytes: 1 + w.rng.IntN(2000)}
	l := must(hedge.New(c))
	w.balance("hedge", l.Budget())
	return l
}

func (w *world) retry() interceptor.Spec {
	c := retry.Config{
		AllMethods:  true,
		MaxAttempts: 2 + w.rng.IntN(4), Budget: w.budget(), BufferBytes: 1 + w.rng.IntN(2000),
		Backoff: retry.Backoff{Initial: w.ms(1, 50), Max: w.ms(50, 300)}, MaxServerDelay: w.ms(1, 1000),
	}
	l := must(retry.New(c))
	w.balance("retry", l.Budget())
	return l
}

func (w *world) foreign() interceptor.Spec {
	opts := []mwretry.CallOption{
		mwretry.WithMax(3), mwretry.WithBackoff(mwretry.BackoffLinear(10 * time.Millisecond)), mwretry.WithCodes(codes.Unavailable),
	}
	again := mwretry.StreamClientInterceptor(opts...)
	return interceptor.Foreign("foreign retry", mwretry.UnaryClientInterceptor(opts...),
		func(ctx context.Context, desc *grpc.StreamDesc, cc *grpc.ClientConn, method string, next grpc.Streamer, opts ...grpc.CallOption) (grpc.ClientStream, error) {
			if desc.ClientStreams {
				return next(ctx, desc, cc, method, opts...)
			}
			return again(ctx, desc, cc, method, next, opts...)
		})
}

func (w *world) buffer() interceptor.Spec {
	c := buffer.Config{Size: 1 + w.rng.IntN(20)}
	if w.rng.IntN(2) == 0 {
		c.MaxWait = w.ms(5, 500)
	}
	l := must(buffer.New(c))
	waiting := func() int64 { return int64(l.Waiting()) }
	w.leave("%d calls wait in a buffer", waiting)
	w.bounds = append(w.bounds, bound{"%d calls wait in a buffer of %d", waiting, int64(c.Size)})
	return l
}

func (w *world) limit() interceptor.Spec {
	rng := w.rng
	c := concurrency.Config{Discipline: []concurrency.Discipline{concurrency.FIFO, concurrency.LIFO, concurrency.CoDel}[rng.IntN(3)], KeyBy: w.keyBy()}
	if c.KeyBy.IsSet() {
		c.MaxKeys = 1 + rng.IntN(3)
	}
	switch rng.IntN(6) {
	case 0:
		c.AIMD = &limit.AIMDConfig{Initial: 5, Min: 1, Max: 20}
	case 1:
		c.Gradient2 = &limit.Gradient2Config{Initial: 5, Min: 1, Max: 20}
	case 2:
		c.Vegas = &limit.VegasConfig{Initial: 5, Min: 1, Max: 20}
	default:
		c.Limit = 1 + rng.Int64N(10)
	}
	c.SampleStreams = rng.IntN(2) == 0 && c.Limit == 0
	if rng.IntN(2) == 0 {
		c.MaxWaiters = 1 + rng.IntN(10)
	}
	if rng.IntN(2) == 0 {
		c.MaxWait = w.ms(5, 500)
	}
	var opts []concurrency.Option
	if rng.IntN(4) == 0 {
		opts = append(opts, concurrency.WithCost(func(_ context.Context, a *interceptor.Admission) int64 { return 1 + int64(a.Kind()) }))
	}
	l, err := concurrency.New(c, opts...)
	if err != nil {
		c.SampleStreams = false
		l = must(concurrency.New(c, opts...))
	}
	w.leave("%d permits of a limit are taken", l.InUse)
	if c.Limit > 0 && !c.KeyBy.IsSet() {
		most := c.Limit
		if opts != nil { // A call that costs more runs alone.
			most = max(most, 1+int64(interceptor.BidiStream))
		}
		w.bounds = append(w.bounds, bound{"%d permits are taken of a limit of %d", l.InUse, most})
	}
	w.leave("%d calls wait in a limit", func() int64 { return int64(l.Waiting()) })
	return l
}

func (w *world) semaphore() interceptor.Spec {
	const n = 5
	sem := semaphore.NewWeighted(n)
	w.leave("%d if permits of a semaphore are taken", func() int64 {
		if sem.TryAcquire(n) {
			sem.Release(n)
			return 0
		}
		return 1
	})
	return adapt.FromSemaphore("semaphore", sem)
}

// permit is a limiter of objects.
func (w *world) permit() interceptor.Spec {
	p := &permits{room: make(chan struct{}, 5)}
	w.leave("%d permit objects are taken", func() int64 { return int64(len(p.room)) })
	return adapt.FromPermit("permits", interceptor.ReasonConcurrency, p.acquire)
}

type permits struct{ room chan struct{} }

func (p *permits) acquire(ctx context.Context, wait bool) (adapt.Permit, error) {
	select {
	case p.room <- struct{}{}:
		return p, nil
	default:
	}
	if !wait {
		return nil, errors.New("no permit")
	}
	select {
	case p.room <- struct{}{}:
		return p, nil
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}
func (p *permits) Success() { <-p.room }
func (p *permits) Drop()    { <-p.room }
func (p *permits) Ignore()  { <-p.room }

func (w *world) allow() interceptor.Spec {
	var open atomic.Int64
	w.leave("%d calls were allowed and are not done", open.Load)
	return adapt.FromAllow("allow", interceptor.ReasonQuota, func(context.Context) (func(interceptor.Outcome, error), error) {
		if !w.calm.Load() && rand.IntN(10) == 0 {
			return nil, errors.New("not allowed")
		}
		open.Add(1)
		return func(interceptor.Outcome, error) { open.Add(-1) }, nil
	})
}

func (w *world) filter() interceptor.Spec {
	return must(filter.NewGate(filter.Config{}, func(context.Context, *interceptor.Admission, any) error {
		if !w.calm.Load() && rand.IntN(10) == 0 {
			return errors.New("filtered")
		}
		return nil
	}))
}

func (w *world) rate() interceptor.Spec {
	c := ratelimit.Config{Limit: []int{5, 50, 500}[w.rng.IntN(3)], KeyBy: w.keyBy()}
	if w.rng.IntN(2) == 0 {
		c.Algorithm = ratelimit.Window
	}
	if c.KeyBy.IsSet() {
		c.MaxKeys = 1 + w.rng.IntN(3)
	}
	l := must(ratelimit.New(c))
	w.leave("%d calls wait in a rate", func() int64 { return int64(l.Waiting()) })
	return l
}

func (w *world) breaker() interceptor.Spec {
	c := breaker.Config{
		Window: time.Second, MinCalls: 1 + w.rng.IntN(10), OpenFor: w.ms(20, 300), MaxOpenFor: time.Second,
		Probes: 1 + w.rng.IntN(3), KeyBy: w.keyBy(),
	}
	switch w.rng.IntN(3) {
	case 0:
		c.ConsecutiveFailures = 1 + w.rng.IntN(5)
	case 1:
		c.FailureRatio = 0.5
	default:
		c.SlowCallRatio, c.SlowCall = 0.5, w.ms(5, 100)
		if w.rng.IntN(2) == 0 {
			c.FailureRatio = 0.5
		}
	}
	if c.SlowCall > 0 {
		c.SlowCall += w.bound(31) // Calls of a server that is well are not slow.
	}
	if c.KeyBy.IsSet() {
		c.MaxKeys = 1 + w.rng.IntN(3)
	}
	return must(breaker.New(c))
}

func (w *world) throttle() interceptor.Spec {
	return must(throttle.New(throttle.Config{Window: time.Second, KeyBy: w.keyBy()}))
}

// tally is an observer that counts.
type tally struct {
	interceptor.NopObserver
}

// trouble makes servers fail until end.
func (w *world) trouble(rng *rand.Rand, end time.Time) {
	gone := map[string]bool{}
	for time.Now().Before(end) {
		time.Sleep(time.Duration(rng.IntN(200)) * time.Millisecond)
		servers := w.cluster.Servers()
		s := servers[rng.IntN(len(servers))]
		code := []codes.Code{codes.Unavailable, codes.Internal, codes.ResourceExhausted, codes.DeadlineExceeded, codes.Canceled, codes.Unknown}[rng.IntN(6)]
		ctx, cancel := context.WithTimeout(context.Background(), time.Duration(rng.IntN(100))*time.Millisecond)
		switch rng.IntN(18) {
		case 0:
			s.Stall()
		case 1:
			s.StallFor(time.Duration(1+rng.IntN(500)) * time.Millisecond)
		case 2:
			s.Fail(code, 1)
		case 3:
			s.Fail(code, 0.5)
		case 4:
			s.FailAfterHeaders(code, 0.5)
		case 5:
			s.Reject(code, 0.5)
		case 6:
			s.BlackHole()
		case 7:
			s.SetSpeed(0.1 + rng.Float64())
		case 8:
			s.CloseConnections()
		case 9:
			s.GoAway()
		case 10:
			s.Stop()
		case 11:
			s.GracefulStop(ctx)
		case 12:
			s.Restart(context.Background())
		case 13:
			gone[s.Name()] = true
			w.changes <- discover.Remove(s.Name())
		case 14:
			w.changes <- discover.Insert(s.Name(), s.Endpoint())
			delete(gone, s.Name())
		default:
			s.Heal()
			s.Resume()
			s.Restart(context.Background())
		}
		cancel()
	}
	for _, s := range w.cluster.Servers() {
		if gone[s.Name()] {
			w.changes <- discover.Insert(s.Name(), s.Endpoint())
		}
	}
}

func (w *world) heal() {
	for _, s := range w.cluster.Servers() {
		s.Heal()
		s.Resume()
		s.SetSpeed(1)
		s.Restart(context.Background())
	}
}

// badCredentials fail.
type badCredentials struct{}

func (badCredentials) GetRequestMetadata(context.Context, ...string) (map[string]string, error) {
	return nil, status.Error(codes.Unauthenticated, "no token")
}
func (badCredentials) RequireTransportSecurity() bool { return false }

// identified returns a context with a new ID for a call.
func (w *world) identified() context.Context {
	return metadata.AppendToOutgoingContext(context.Background(), callIDKey, "call-"+strconv.FormatInt(w.nextID.Add(1), 10))
}

// call makes one call of some kind, and checks how it ends.
func (w *world) call(conn *grpc.ClientConn, rng *rand.Rand) {
	ctx := metadata.AppendToOutgoingContext(w.identified(), "tenant", strconv.Itoa(rng.IntN(4)))
	md, _ := metadata.FromOutgoingContext(ctx)
	id := md[callIDKey][0]
	for range rng.IntN(3) {
		ctx = interceptor.ContextWithPriority(ctx, rng.IntN(3)-1)
	}
	patience := 5 * time.Second
	if rng.IntN(2) == 0 {
		patience = time.Duration(rng.IntN(300)) * time.Millisecond
	}
	begin := time.Now()
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	if rng.IntN(6) == 0 {
		patience = min(patience, time.Duration(rng.IntN(100))*time.Millisecond)
		stop := time.AfterFunc(patience, cancel)
		defer stop.Stop()
	}
	var opts []grpc.CallOption
	var size int
	switch rng.IntN(20) {
	case 0:
		opts, size = append(opts, grpc.MaxCallSendMsgSize(100)), 1000
		w.mu.Lock()
		w.unasked[id] = true
		w.mu.Unlock()
	case 1:
		opts, size = append(opts, grpc.MaxCallRecvMsgSize(100)), 1000
	case 2:
		ctx = metadata.AppendToOutgoingContext(ctx, "bad", "\x01")
	case 3:
		opts = append(opts, grpc.PerRPCCredentials(badCredentials{}))
	case 4:
		var cancelled context.CancelFunc
		ctx, cancelled = context.WithCancel(ctx)
		cancelled()
	case 5:
		opts = append(opts, interceptor.WithWait(interceptor.None))
	case 6:
		size = 3000 // More than some buffers keep.
	}
	if rng.IntN(4) == 0 {
		opts = append(opts, grpc.WaitForReady(true))
	}
	var header, trailer metadata.MD
	var from peer.Peer
	if rng.IntN(4) == 0 {
		opts = append(opts, grpc.Header(&header), grpc.Trailer(&trailer), grpc.Peer(&from))
	}
	var finished atomic.Int64
	opts = append(opts, grpc.OnFinish(func(error) { finished.Add(1) }))
	// in checks that something ends with the patience of the caller.
	tolerated := 5 * time.Millisecond
	if !w.virtual {
		tolerated = 30 * time.Second
	}
	in := func(what string, f func() error) error {
		from := time.Now()
		defer func() {
			late := time.Since(from)
			if over := begin.Add(patience); over.After(from) {
				late = time.Since(over)
			}
			if late > tolerated {
				w.t.Errorf("%s of %s took %v longer than its caller had patience", what, id, late)
			}
		}()
		return f()
	}
	client := testingv1.NewTestServiceClient(conn)
	func() {
		defer func() {
			if p := recover(); p != nil {
				if s, ok := p.(string); !ok || !strings.HasPrefix(s, "bomb") {
					panic(p)
				}
			}
		}()
		b := randomBehaviour(rng)
		switch kind := rng.IntN(7); kind {
		case 0, 1, 2, 3:
			in("Unary", func() error {
				_, err := client.Unary(ctx, &testingv1.UnaryRequest{Behaviour: b, Payload: make([]byte, size)}, opts...)
				return err
			})
		case 4:
			var s testingv1.TestService_ServerStreamClient
			err := in("ServerStream", func() (err error) {
				s, err = client.ServerStream(ctx, &testingv1.ServerStreamRequest{Behaviour: b, Payload: make([]byte, size)}, opts...)
				return err
			})
			if err == nil {
				use(in, w.virtual, rng, s, nil, func() error { _, err := s.Recv(); return err })
			}
		case 5:
			var s testingv1.TestService_BidiClient
			err := in("Bidi", func() (err error) {
				s, err = client.Bidi(ctx, opts...)
				return err
			})
			if err == nil {
				use(in, w.virtual, rng, s, func() error {
					return s.Send(&testingv1.BidiRequest{Behaviour: b, Payload: make([]byte, size)})
				}, func() error { _, err := s.Recv(); return err })
			}
		default:
			var s testingv1.TestService_ClientStreamClient
			err := in("ClientStream", func() (err error) {
				s, err = client.ClientStream(ctx, opts...)
				return err
			})
			if err == nil {
				use(in, w.virtual, rng, s, func() error {
					return s.Send(&testingv1.ClientStreamRequest{Behaviour: b, Payload: make([]byte, size)})
				}, func() error { return s.RecvMsg(new(testingv1.ClientStreamResponse)) })
			}
		}
	}()
	w.mu.Lock()
	defer w.mu.Unlock()
	w.probes = append(w.probes, func() string {
		if n := finished.Load(); n != 1 {
			return fmt.Sprintf("%s: OnFinish was called %d times", id, n)
		}
		return ""
	})
}

func randomBehaviour(rng *rand.Rand) *testingv1.Behaviour {
	if rng.IntN(2) == 0 {
		return nil
	}
	b := &testingv1.Behaviour{HeadersBeforeFailure: rng.IntN(3) == 0}
	if rng.IntN(3) == 0 {
		b.Delay = durationpb.New(time.Duration(rng.IntN(200)) * time.Millisecond)
	}
	if n := int32(rng.IntN(4)); n != 3 {
		b.ResponseCount = &n
	}
	switch rng.IntN(6) {
	case 0:
		b.Status = &testingv1.Status{Code: int32(codes.Unavailable)}
	case 1:
		info := must(anypb.New(&errdetails.RetryInfo{RetryDelay: durationpb.New(time.Duration(rng.IntN(100)) * time.Millisecond)}))
		b.Status = &testingv1.Status{Code: int32(codes.ResourceExhausted), Details: []*anypb.Any{info}}
	case 2:
		b.Status = &testingv1.Status{Code: int32(rng.IntN(17))}
		b.ResponseTrailers = map[string]string{"grpc-retry-pushback-ms": strconv.Itoa(rng.IntN(50) - 10)}
	}
	return b
}

// use uses a stream in some order, to its end or not. In virtual time one goroutine
// uses it: gRPC holds a mutex of a stream while it waits for a connection, and time
// stands still while another goroutine waits for the mutex.
func use(in func(string, func() error) error, virtual bool, rng *rand.Rand, s grpc.ClientStream, send, recv func() error) {
	plainSend, plainRecv := send, recv
	if send != nil {
		send = func() error { return in("Send", plainSend) }
	}
	recv = func() error { return in("Recv", plainRecv) }
	var sender sync.WaitGroup
	defer sender.Wait()
	sends := rng.IntN(5)
	if send != nil && !virtual && rng.IntN(2) == 0 {
		r, apart := rand.New(rand.NewPCG(rng.Uint64(), 3)), send
		sender.Go(func() {
			for range sends {
				if apart() != nil {
					break
				}
				time.Sleep(time.Duration(r.IntN(20)) * time.Millisecond)
			}
			if r.IntN(4) != 0 {
				s.CloseSend()
			}
		})
		send = nil
	}
	closed := false
	for range rng.IntN(12) {
		switch rng.IntN(6) {
		case 0:
			in("Header", func() error { _, err := s.Header(); return err })
		case 1:
			_ = s.Context().Err()
		case 2:
			if send != nil && !closed {
				send()
			}
		case 3:
			if send != nil {
				closed = true
				s.CloseSend()
			}
		case 4:
			if recv() != nil {
				s.Trailer()
				return
			}
		default:
			time.Sleep(time.Duration(rng.IntN(30)) * time.Millisecond)
		}
	}
	if send != nil && !closed {
		s.CloseSend()
	}
	if rng.IntN(3) != 0 {
		for recv() == nil {
		}
		s.Trailer()
	}
}

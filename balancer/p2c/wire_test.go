// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package p2c

import (
	"context"
	"fmt"
	"io"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	_ "google.golang.org/grpc/balancer/roundrobin"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/connectivity"
	"google.golang.org/grpc/credentials/insecure"
	_ "google.golang.org/grpc/health" // client-side health checks
	"google.golang.org/grpc/resolver"
	"google.golang.org/grpc/resolver/manual"
	"google.golang.org/grpc/serviceconfig"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/belfry-go/belfry/internal/test/race"
	"github.com/belfry-go/belfry/internal/testserver"
	"github.com/belfry-go/belfry/load"
	testingv1 "github.com/belfry-go/belfry/proto/belfry/testing/v1"
)

// wire is a real channel with the policy, to real servers on loopback.
type wire struct {
	t       *testing.T
	servers []*testserver.Server
	r       *manual.Resolver
	conn    *grpc.ClientConn
	client  testingv1.TestServiceClient
	o       *observer
	target  string
	pending bool // the metric is pendingRequests
}

type wireConfig struct {
	policy    string // fields of the policy's config
	service   string // the service config, %s for the policy's entry; default the policy alone
	untracked bool   // without DialOptions
	endpoints []resolver.Endpoint
	opts      []grpc.DialOption
}

// newServers starts n servers.
func newServers(t *testing.T, n int, opts ...testserver.Option) []*testserver.Server {
	t.Helper()
	return testserver.NewCluster(t, n, func(int) []testserver.Option { return opts }).Servers()
}

// targets numbers channels, so that each has a target of its own.
var targets atomic.Int64

// newWire opens a channel to the servers.
func newWire(t *testing.T, servers []*testserver.Server, c wireConfig) *wire {
	t.Helper()
	o, recorder := newObserver(t)
	w := &wire{t: t, servers: servers, o: o, r: manual.NewBuilderWithScheme("belfrytest"), target: fmt.Sprintf("%s/%d", t.Name(), targets.Add(1)),
		pending: strings.Contains(c.policy, "pendingRequests")}
	if c.service == "" {
		c.service = `{"loadBalancingConfig":[%s]}`
	}
	if c.policy != "" {
		recorder += "," + c.policy
	}
	if c.endpoints == nil {
		c.endpoints = w.endpoints(servers...)
	}
	w.r.InitialState(resolver.State{Endpoints: c.endpoints})
	opts := append([]grpc.DialOption{
		grpc.WithResolvers(w.r),
		grpc.WithTransportCredentials(insecure.NewCredentials()),
	}, c.opts...)
	if !c.untracked {
		opts = append(opts, DialOptions()...)
	}
	opts = append(opts, grpc.WithDefaultServiceConfig(fmt.Sprintf(c.service, fmt.Sprintf(`{"belfry.p2c":{%s}}`, recorder))))
	conn, err := grpc.NewClient("belfrytest:///"+w.target, opts...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	w.conn, w.client = conn, testingv1.NewTestServiceClient(conn)
	return w
}

func (w *wire) endpoints(servers ...*testserver.Server) []resolver.Endpoint {
	var es []resolver.Endpoint
	for _, s := range servers {
		es = append(es, s.Endpoint())
	}
	return es
}

// call makes a unary call and returns the name of the server.
func (w *wire) call(ctx context.Context, b *testingv1.Behaviour, opts ...grpc.CallOption) (string, error) {
	r, err := w.client.Unary(ctx, &testingv1.UnaryRequest{Behaviour: b}, opts...)
	return r.GetObserved().GetServer(), err
}

// counts makes n calls, one after the other, and returns how many each server
// answered. It fails the test if one fails.
func (w *wire) counts(n int) map[string]int {
	w.t.Helper()
	ctx := testContext(w.t)
	m := make(map[string]int)
	for range n {
		name, err := w.call(ctx, nil)
		if err != nil {
			w.t.Fatalf("call: %v", err)
		}
		m[name]++
	}
	return m
}

// until makes calls until cond holds for a batch of n; failing calls are allowed
// and count under "".
func (w *wire) until(what string, n int, cond func(map[string]int) bool) {
	w.t.Helper()
	ctx := testContext(w.t)
	for {
		m := make(map[string]int)
		for range n {
			name, _ := w.call(ctx, nil)
			m[name]++
		}
		if cond(m) {
			return
		}
		if ctx.Err() != nil {
			w.t.Fatalf("waiting until %s: last %d calls by server were %v", what, n, m)
		}
	}
}

// allReady waits until every server answers.
func (w *wire) allReady() {
	w.t.Helper()
	w.until("all servers answer", 50, func(m map[string]int) bool { return len(m) == len(w.servers) && m[""] == 0 })
}

// wantRest waits until nothing is in flight and checks that the meters say so.
func (w *wire) wantRest(attempts int) {
	w.t.Helper()
	w.o.rest(w.t, attempts)
	for _, p := range policiesOf(w.target) {
		if got := p.totalLoad(); w.pending && got != 0 {
			w.t.Errorf("%v attempts in flight at rest, want 0", got)
		}
	}
}

// background makes calls from several goroutines until stop is called, which
// returns how many were made; a call that fails fails the test.
func (w *wire) background(workers int, opts ...grpc.CallOption) (stop func() int64) {
	ctx, cancel := context.WithCancel(testContext(w.t))
	var n atomic.Int64
	var ended atomic.Bool
	var wg sync.WaitGroup
	for range workers {
		wg.Go(func() {
			for !ended.Load() {
				if _, err := w.call(ctx, nil, opts...); err != nil {
					w.t.Errorf("a call failed: %v", err)
					return
				}
				n.Add(1)
			}
		})
	}
	return func() int64 {
		ended.Store(true)
		wg.Wait()
		cancel()
		return n.Load()
	}
}

// after waits until n more calls than now were counted.
func (w *wire) after(n int) {
	w.t.Helper()
	w.o.mu.Lock()
	goal := len(w.o.finished) + n
	w.o.mu.Unlock()
	w.o.wait(w.t, "more calls have been made", func() bool { return len(w.o.finished) >= goal })
}

func code(c codes.Code) *testingv1.Behaviour {
	return &testingv1.Behaviour{Status: &testingv1.Status{Code: int32(c)}}
}

func delayed(d time.Duration) *testingv1.Behaviour {
	return &testingv1.Behaviour{Delay: durationpb.New(d)}
}

// pastDeadline makes a call that does not end by itself. Its deadline passes once the
// server has the call.
func (w *wire) pastDeadline(ctx context.Context, call func(context.Context) error) error {
	d := &deadline{ctx, make(chan struct{})}
	go func() {
		if err := w.servers[0].WaitInFlight(ctx, 1); err != nil {
			w.t.Error(err)
		}
		close(d.passed)
	}()
	return call(d)
}

// deadline is a context whose deadline passes when passed is closed.
type deadline struct {
	context.Context
	passed chan struct{}
}

func (d *deadline) Done() <-chan struct{} { return d.passed }

func (d *deadline) Err() error {
	select {
	case <-d.passed:
		return context.DeadlineExceeded
	default:
		return nil
	}
}

// drain reads a stream to its end.
func drain(recv func() error) error {
	for {
		if err := recv(); err == io.EOF {
			return nil
		} else if err != nil {
			return err
		}
	}
}

// After every kind of call and end nothing is in flight, and the outcome is what happened.
func TestWireAtRestNothingIsInFlightAndOutcomesAreTrue(t *testing.T) {
	forever := delayed(time.Hour)
	type kind struct {
		name string
		do   func(ctx context.Context, w *wire) error // ends the call
		code codes.Code
		want load.Outcome
	}
	kinds := []kind{
		{"unary", func(ctx context.Context, w *wire) error { _, err := w.call(ctx, nil); return err }, codes.OK, load.Completed},
		{"unary answered with an error", func(ctx context.Context, w *wire) error {
			_, err := w.call(ctx, code(codes.NotFound))
			return err
		}, codes.NotFound, load.Completed},
		{"unary failed by the server", func(ctx context.Context, w *wire) error {
			_, err := w.call(ctx, code(codes.Internal))
			return err
		}, codes.Internal, load.Failed},
		{"unary cancelled by the server", func(ctx context.Context, w *wire) error {
			_, err := w.call(ctx, code(codes.Canceled))
			return err
		}, codes.Canceled, load.Failed},
		{"unary past its deadline", func(ctx context.Context, w *wire) error {
			return w.pastDeadline(ctx, func(ctx context.Context) error { _, err := w.call(ctx, forever); return err })
		}, codes.DeadlineExceeded, load.Expired},
		{"unary cancelled", func(ctx context.Context, w *wire) error {
			ctx, cancel := context.WithCancel(ctx)
			go func() {
				if err := w.servers[0].WaitInFlight(ctx, 1); err != nil {
					t.Error(err)
				}
				cancel()
			}()
			_, err := w.call(ctx, forever)
			return err
		}, codes.Canceled, load.Cancelled},
		{"server stream", func(ctx context.Context, w *wire) error {
			s, err := w.client.ServerStream(ctx, &testingv1.ServerStreamRequest{Behaviour: &testingv1.Behaviour{ResponseCount: proto.Int32(3)}})
			if err != nil {
				return err
			}
			return drain(func() error { _, err := s.Recv(); return err })
		}, codes.OK, load.Completed},
		{"server stream failed after its messages", func(ctx context.Context, w *wire) error {
			b := code(codes.Unavailable)
			b.ResponseCount = proto.Int32(3)
			s, err := w.client.ServerStream(ctx, &testingv1.ServerStreamRequest{Behaviour: b})
			if err != nil {
				return err
			}
			return drain(func() error { _, err := s.Recv(); return err })
		}, codes.Unavailable, load.Failed},
		{"server stream cancelled after a message", func(ctx context.Context, w *wire) error {
			ctx, cancel := context.WithCancel(ctx)
			defer cancel()
			s, err := w.client.ServerStream(ctx, &testingv1.ServerStreamRequest{Behaviour: &testingv1.Behaviour{
				ResponseCount: proto.Int32(1000), Delay: durationpb.New(20 * time.Millisecond),
			}})
			if err != nil {
				return err
			}
			if _, err := s.Recv(); err != nil {
				return err
			}
			cancel()
			return drain(func() error { _, err := s.Recv(); return err })
		}, codes.Canceled, load.Cancelled},
		{"server stream abandoned", func(ctx context.Context, w *wire) error {
			ctx, cancel := context.WithCancel(ctx)
			defer cancel()
			_, err := w.client.ServerStream(ctx, &testingv1.ServerStreamRequest{Behaviour: forever})
			return err
		}, codes.OK, load.Cancelled},
		{"client stream", func(ctx context.Context, w *wire) error {
			s, err := w.client.ClientStream(ctx)
			if err != nil {
				return err
			}
			for range 3 {
				if err := s.Send(&testingv1.ClientStreamRequest{}); err != nil {
					return err
				}
			}
			_, err = s.CloseAndRecv()
			return err
		}, codes.OK, load.Completed},
		{"client stream failed by the server", func(ctx context.Context, w *wire) error {
			s, err := w.client.ClientStream(ctx)
			if err != nil {
				return err
			}
			if err := s.Send(&testingv1.ClientStreamRequest{Behaviour: code(codes.DataLoss)}); err != nil {
				return err
			}
			_, err = s.CloseAndRecv()
			return err
		}, codes.DataLoss, load.Failed},
		{"bidi", func(ctx context.Context, w *wire) error {
			s, err := w.client.Bidi(ctx)
			if err != nil {
				return err
			}
			for range 3 {
				if err := s.Send(&testingv1.BidiRequest{}); err != nil {
					return err
				}
				if _, err := s.Recv(); err != nil {
					return err
				}
			}
			if err := s.CloseSend(); err != nil {
				return err
			}
			return drain(func() error { _, err := s.Recv(); return err })
		}, codes.OK, load.Completed},
		{"bidi past its deadline", func(ctx context.Context, w *wire) error {
			return w.pastDeadline(ctx, func(ctx context.Context) error {
				s, err := w.client.Bidi(ctx)
				if err != nil {
					return err
				}
				return drain(func() error { _, err := s.Recv(); return err })
			})
		}, codes.DeadlineExceeded, load.Expired},
	}
	for _, untracked := range []bool{false, true} {
		for _, k := range kinds {
			t.Run(fmt.Sprintf("%s/untracked=%v", k.name, untracked), func(t *testing.T) {
				t.Parallel()
				w := newWire(t, newServers(t, 1), wireConfig{policy: `"load":{"pendingRequests":{}}`, untracked: untracked})
				if err := k.do(testContext(t), w); status.Code(err) != k.code {
					t.Errorf("the call ended with %v, want %v", err, k.code)
				}
				w.wantRest(1)
				if got := w.o.ended(); len(got) != 1 || got[0] != k.want {
					t.Errorf("outcomes are %v, want [%v]", got, k.want)
				}
			})
		}
	}
}

// gRPC reports no error to the balancer if the server ends a call before it has read the
// request. With DialOptions the policy sees the error.
func TestWireEarlyRejectionsAreFailures(t *testing.T) {
	t.Run("bidi ended with RESOURCE_EXHAUSTED", func(t *testing.T) {
		t.Parallel()
		w := newWire(t, newServers(t, 1), wireConfig{policy: `"load":{"pendingRequests":{}}`})
		if err := w.servers[0].Reject(codes.ResourceExhausted, 1); err != nil {
			t.Fatal(err)
		}
		const n = 20
		for range n {
			s, err := w.client.Bidi(testContext(t))
			if err == nil {
				for err == nil { // until grpc says io.EOF, upon which it calls Done with a nil error
					err = s.Send(&testingv1.BidiRequest{Payload: make([]byte, 1000)})
				}
				_, err = s.Recv()
			}
			if status.Code(err) != codes.ResourceExhausted {
				t.Fatalf("the call ended with %v, want RESOURCE_EXHAUSTED", err)
			}
		}
		w.wantRest(n)
		for i, got := range w.o.ended() {
			if got != load.Failed {
				t.Errorf("call %d: outcome is %v, want failed", i, got)
			}
		}
	})
	t.Run("unary to a method that does not exist, large request", func(t *testing.T) {
		t.Parallel()
		w := newWire(t, newServers(t, 1), wireConfig{policy: `"load":{"pendingRequests":{}}`})
		n := 300 // some 10 % of them with a nil error
		if race.Enabled {
			n = 100
		}
		for range n {
			err := w.conn.Invoke(testContext(t), "/belfry.testing.v1.TestService/Nope",
				&testingv1.UnaryRequest{Payload: make([]byte, 300_000)}, &testingv1.UnaryResponse{})
			if status.Code(err) != codes.Unimplemented {
				t.Fatalf("the call ended with %v, want UNIMPLEMENTED", err)
			}
		}
		w.wantRest(n)
		for i, got := range w.o.ended() {
			if got != load.Failed {
				t.Errorf("call %d: outcome is %v, want failed", i, got)
			}
		}
	})
	t.Run("unary cancelled by the server, large request", func(t *testing.T) {
		t.Parallel()
		w := newWire(t, newServers(t, 1), wireConfig{policy: `"load":{"pendingRequests":{}}`})
		if err := w.servers[0].Reject(codes.Canceled, 1); err != nil {
			t.Fatal(err)
		}
		n := 300
		if race.Enabled {
			n = 100
		}
		for range n {
			_, err := w.client.Unary(testContext(t), &testingv1.UnaryRequest{Payload: make([]byte, 300_000)})
			if status.Code(err) != codes.Canceled {
				t.Fatalf("the call ended with %v, want CANCELLED", err)
			}
		}
		w.wantRest(n)
		for i, got := range w.o.ended() {
			if got != load.Failed {
				t.Errorf("call %d: outcome is %v, want failed: the client did not cancel it", i, got)
			}
		}
	})
}

func TestWireAStreamIsAnAttemptInFlightUntilItsFirstResponse(t *testing.T) {
	t.Parallel()
	w := newWire(t, newServers(t, 1), wireConfig{policy: `"load":{"pendingRequests":{}}`})
	s, err := w.client.Bidi(testContext(t))
	if err != nil {
		t.Fatal(err)
	}
	for range 3 {
		if err := s.Send(&testingv1.BidiRequest{}); err != nil {
			t.Fatal(err)
		}
		if _, err := s.Recv(); err != nil {
			t.Fatal(err)
		}
	}
	p := policiesOf(w.target)[0]
	if attempts, streams := p.inFlight(); attempts != 0 || streams != 1 {
		t.Errorf("%d attempts in flight and %d open streams while the stream is open, want 0 and 1", attempts, streams)
	}
	if err := s.CloseSend(); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Recv(); err != io.EOF {
		t.Fatalf("the stream ended with %v, want io.EOF", err)
	}
	w.wantRest(1)
	if w.o.responds != 1 || !w.o.finished[0].responded {
		t.Errorf("%d first responses, and the end says %v, want one and true", w.o.responds, w.o.finished[0].responded)
	}
}

func TestWireHeadersAreAFirstResponse(t *testing.T) {
	t.Parallel()
	t.Run("also for who reads messages only", func(t *testing.T) {
		t.Parallel()
		w := newWire(t, newServers(t, 1), wireConfig{policy: `"load":{"pendingRequests":{}}`})
		ctx, cancel := context.WithCancel(testContext(t))
		defer cancel()
		s, err := w.client.ServerStream(ctx, &testingv1.ServerStreamRequest{Behaviour: &testingv1.Behaviour{
			HeadersBeforeFailure: true, Delay: durationpb.New(time.Hour),
		}})
		if err != nil {
			t.Fatal(err)
		}
		received := make(chan error)
		go func() {
			_, err := s.Recv()
			received <- err
		}()
		w.o.wait(t, "the headers have been seen", func() bool { return w.o.responds == 1 })
		cancel()
		if err := <-received; status.Code(err) != codes.Canceled {
			t.Errorf("the stream ended with %v, want CANCELLED", err)
		}
		w.wantRest(1)
		if !w.o.finished[0].responded {
			t.Error("at its end the stream had no response, want one")
		}
	})
	t.Run("but no answer", func(t *testing.T) {
		t.Parallel()
		w := newWire(t, newServers(t, 1), wireConfig{})
		if err := w.servers[0].FailAfterHeaders(codes.Unavailable, 1); err != nil {
			t.Fatal(err)
		}
		open := func() error {
			s, err := w.client.ServerStream(testContext(t), &testingv1.ServerStreamRequest{})
			if err == nil {
				_, err = s.Recv()
			}
			return err
		}
		if err := open(); status.Code(err) != codes.Unavailable {
			t.Fatalf("the stream ended with %v, want UNAVAILABLE", err)
		}
		w.wantRest(1)
		if got := SnapshotsOf(w.conn)[0].Endpoints[0].PassedOver; w.o.responds != 1 || got != OnlyFailed {
			t.Errorf("after headers and a failure: %d responses, passed over %q, want 1 and %q", w.o.responds, got, OnlyFailed)
		}
		w.servers[0].Heal()
		if err := open(); err != nil {
			t.Fatal(err)
		}
		if got := SnapshotsOf(w.conn)[0].Endpoints[0].PassedOver; got != "" {
			t.Errorf("after a message: passed over %q, want not", got)
		}
	})
}

const retryService = `{"loadBalancingConfig":[%s],"methodConfig":[{"name":[{}],"retryPolicy":{"maxAttempts":2,
	"initialBackoff":"0.001s","maxBackoff":"0.001s","backoffMultiplier":1,"retryableStatusCodes":["UNAVAILABLE"]}}]}`

// grpc's own retry picks again; with DialOptions it does not go where the call
// has just failed. With two attempts and one bad server no call fails.
func TestWireARetryGoesToAnotherEndpoint(t *testing.T) {
	t.Parallel()
	w := newWire(t, newServers(t, 3), wireConfig{policy: `"load":{"constant":{}}`, service: retryService})
	w.allReady()
	if err := w.servers[0].Fail(codes.Unavailable, 1); err != nil {
		t.Fatal(err)
	}
	before := w.servers[0].Stats().Started
	w.counts(100)
	if got := w.servers[0].Stats().Started - before; got == 0 {
		t.Error("no call went to the failing server first; 100 calls miss it with a probability of 2e-18")
	}
	w.wantRest(100)
	failed := 0
	for _, o := range w.o.ended() {
		if o == load.Failed {
			failed++
		}
	}
	if got := int(w.servers[0].Stats().Finished(codes.Unavailable)); failed != got {
		t.Errorf("%d attempts failed, want %d: every one that the server failed", failed, got)
	}
}

func TestWireClosingTheChannelInMidCallLeavesNothingInFlight(t *testing.T) {
	t.Parallel()
	w := newWire(t, newServers(t, 1), wireConfig{policy: `"load":{"pendingRequests":{}}`})
	ctx := testContext(t)
	var wg sync.WaitGroup
	for i := range 10 {
		wg.Go(func() {
			if i%2 == 0 {
				if _, err := w.call(ctx, delayed(time.Hour)); err == nil {
					t.Error("a call succeeded after its channel was closed")
				}
				return
			}
			s, err := w.client.Bidi(ctx)
			if err != nil {
				t.Errorf("opening a stream: %v", err)
				return
			}
			if _, err := s.Recv(); err == nil {
				t.Error("a stream went on after its channel was closed")
			}
		})
	}
	if err := w.servers[0].WaitInFlight(ctx, 10); err != nil {
		t.Fatal(err)
	}
	w.conn.Close()
	wg.Wait()
	w.wantRest(10)
}

func TestWireAServerThatStopsInMidCallFailedIt(t *testing.T) {
	t.Parallel()
	w := newWire(t, newServers(t, 1), wireConfig{policy: `"load":{"pendingRequests":{}}`})
	ctx := testContext(t)
	errs := make(chan error)
	go func() {
		_, err := w.call(ctx, delayed(time.Hour))
		errs <- err
	}()
	if err := w.servers[0].WaitInFlight(ctx, 1); err != nil {
		t.Fatal(err)
	}
	w.servers[0].Stop()
	if err := <-errs; status.Code(err) != codes.Unavailable {
		t.Errorf("the call ended with %v, want UNAVAILABLE", err)
	}
	w.wantRest(1)
	if got := w.o.ended(); got[0] != load.Failed {
		t.Errorf("outcome is %v, want failed", got[0])
	}
}

func TestWireDualstackEndpointWhoseFirstAddressIsDead(t *testing.T) {
	t.Parallel()
	servers := newServers(t, 2)
	dead := testserver.New(t)
	dead.Stop()
	w := newWire(t, servers, wireConfig{policy: `"load":{"pendingRequests":{}}`, endpoints: []resolver.Endpoint{
		one(dead.Addr(), servers[0].Addr()), one(servers[1].Addr()),
	}})
	w.allReady()
	if got := w.counts(100); len(got) != 2 {
		t.Errorf("calls by server are %v, want both", got)
	}
}

func TestWireHealthChecks(t *testing.T) {
	t.Parallel()
	w := newWire(t, newServers(t, 3), wireConfig{policy: `"load":{"constant":{}}`,
		service: `{"loadBalancingConfig":[%s],"healthCheckConfig":{"serviceName":""}}`})
	w.allReady()
	for round := range 2 {
		w.servers[0].SetServing(false)
		// While it is healthy still, 60 calls miss it with a probability of 3e-11.
		w.until("the server that is not healthy gets no calls", 60, func(m map[string]int) bool { return m["server-0"] == 0 && m[""] == 0 })
		if got := w.counts(100); got["server-0"] != 0 {
			t.Errorf("round %d: calls by server are %v, want none to server-0", round, got)
		}
		w.servers[0].SetServing(true)
		w.allReady()
	}
	for _, s := range w.servers {
		s.SetServing(false)
	}
	w.until("all calls fail", 10, func(m map[string]int) bool { return m[""] == 10 })
	if _, err := w.call(testContext(t), nil); status.Code(err) != codes.Unavailable {
		t.Errorf("with no healthy server a call ends with %v, want UNAVAILABLE", err)
	}
	w.servers[1].SetServing(true)
	if name, err := w.call(testContext(t), nil, grpc.WaitForReady(true)); err != nil || name != "server-1" {
		t.Errorf("a call that waits got %q, %v, want server-1", name, err)
	}
}

func TestWireOneDownAllDownRecover(t *testing.T) {
	t.Parallel()
	// Reconnect quickly.
	w := newWire(t, newServers(t, 3), wireConfig{policy: `"load":{"constant":{}}`, opts: []grpc.DialOption{fastReconnect}})
	w.allReady()
	w.servers[0].Stop()
	// While its connection counts as READY still, 60 calls miss it with a probability of 3e-11.
	w.until("the others answer", 60, func(m map[string]int) bool { return m[""] == 0 })
	if got := w.counts(100); got["server-0"] != 0 || len(got) != 2 {
		t.Errorf("calls by server are %v, want the two others", got)
	}
	w.servers[1].Stop()
	w.servers[2].Stop()
	w.until("all calls fail", 10, func(m map[string]int) bool { return m[""] == 10 })
	ctx := testContext(t)
	for s := w.conn.GetState(); s != connectivity.TransientFailure; s = w.conn.GetState() {
		if !w.conn.WaitForStateChange(ctx, s) {
			t.Fatalf("state of the channel is %v, want TRANSIENT_FAILURE", s)
		}
	}
	if _, err := w.call(ctx, nil); status.Code(err) != codes.Unavailable {
		t.Errorf("with all servers down a call ends with %v, want UNAVAILABLE", err)
	}
	waiting := make(chan error)
	go func() {
		_, err := w.call(ctx, nil, grpc.WaitForReady(true))
		waiting <- err
	}()
	for _, s := range w.servers {
		if err := s.Restart(ctx); err != nil {
			t.Fatal(err)
		}
	}
	if err := <-waiting; err != nil {
		t.Errorf("a call that waited for a server: %v", err)
	}
	w.allReady()
	w.wantRest(100)
}

func TestWireGoAwayFailsNoCall(t *testing.T) {
	t.Parallel()
	w := newWire(t, newServers(t, 2), wireConfig{policy: `"load":{"pendingRequests":{}}`})
	w.allReady()
	stop := w.background(8)
	for i := range 6 {
		w.after(50)
		if err := w.servers[i%2].GoAway(); err != nil {
			t.Error(err)
		}
	}
	w.after(50)
	stop()
	w.wantRest(300)
}

func TestWireEndpointsThatComeAndGoFailNoCall(t *testing.T) {
	t.Parallel()
	w := newWire(t, newServers(t, 5), wireConfig{policy: `"load":{"pendingRequests":{}}`})
	w.allReady()
	stop := w.background(8)
	es := w.endpoints(w.servers...)
	for i := range 40 {
		w.after(20)
		k := i % 4
		w.r.UpdateState(resolver.State{Endpoints: append(es[:k:k], es[k+1+i%2:]...)})
	}
	w.after(50)
	n := stop()
	t.Logf("%d calls", n)
	w.wantRest(800)
}

// A server that accepts calls and never answers gets few calls, because of the age of its
// attempts in flight, long before these time out.
func TestWireABlackHoleGetsAlmostNothing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) { // in real time the others may look slow too
		c := testserver.NewCluster(t, 3, func(int) []testserver.Option {
			return []testserver.Option{testserver.InMemory(), testserver.ServiceTime(testserver.Fixed(2 * time.Millisecond))}
		})
		w := newWire(t, c.Servers(), wireConfig{opts: c.DialOptions()})
		w.allReady()
		w.servers[0].BlackHole()
		before := w.servers[0].Stats().Started
		const calls = 1500
		var made atomic.Int64
		var wg sync.WaitGroup
		for range 10 { // callers
			wg.Go(func() {
				for made.Add(1) <= calls {
					ctx, cancel := context.WithTimeout(t.Context(), 250*time.Millisecond)
					w.call(ctx, nil) // fails if the black hole gets it
					cancel()
				}
			})
		}
		wg.Wait()
		got := w.servers[0].Stats().Started - before
		t.Logf("the black hole got %d of %d calls", got, calls)
		// A fair share is 500. It gets 4 to 6.
		if got > 50 {
			t.Errorf("the black hole got %d of %d calls, want at most a tenth of its share of 500", got, calls)
		}
		w.wantRest(calls)
	})
}

func TestWireACallWaitsForTheFirstResolverResult(t *testing.T) {
	t.Parallel()
	servers := newServers(t, 1)
	r := manual.NewBuilderWithScheme("belfrytest")
	conn, err := grpc.NewClient("belfrytest:///"+t.Name(), grpc.WithResolvers(r), grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithDefaultServiceConfig(`{"loadBalancingConfig":[{"belfry.p2c":{}}]}`))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	client := testingv1.NewTestServiceClient(conn)
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if _, err := client.Unary(ctx, &testingv1.UnaryRequest{}); status.Code(err) != codes.DeadlineExceeded {
		t.Errorf("before any result a call ended with %v, want DEADLINE_EXCEEDED", err)
	}
	r.UpdateState(resolver.State{Endpoints: []resolver.Endpoint{servers[0].Endpoint()}})
	if _, err := client.Unary(testContext(t), &testingv1.UnaryRequest{}); err != nil {
		t.Errorf("after the first result: %v", err)
	}
}

func TestWireAnEmptyResultFailsCallsUntilThereIsAnEndpoint(t *testing.T) {
	t.Parallel()
	w := newWire(t, newServers(t, 1), wireConfig{})
	w.allReady()
	w.r.UpdateState(resolver.State{Endpoints: []resolver.Endpoint{}})
	ctx := testContext(t)
	_, err := w.call(ctx, nil)
	if status.Code(err) != codes.Unavailable || status.Convert(err).Message() != "no children to pick from" {
		t.Errorf("without endpoints a call ended with %v, want UNAVAILABLE: no children to pick from", err)
	}
	waiting := make(chan error)
	go func() {
		_, err := w.call(ctx, nil, grpc.WaitForReady(true))
		waiting <- err
	}()
	w.r.UpdateState(resolver.State{Endpoints: w.endpoints(w.servers...)})
	if err := <-waiting; err != nil {
		t.Errorf("a call that waited for an endpoint: %v", err)
	}
	w.wantRest(1)
}

// serviceConfig parses a service config for a resolver's update.
func (w *wire) serviceConfig(js string) *serviceconfig.ParseResult {
	w.t.Helper()
	sc := w.r.CC().ParseServiceConfig(js)
	if sc.Err != nil {
		w.t.Fatal(sc.Err)
	}
	return sc
}

func TestWireSwitchingToAndFromThePolicyFailsNoCall(t *testing.T) {
	t.Parallel()
	w := newWire(t, newServers(t, 3), wireConfig{})
	w.allReady()
	stop := w.background(4)
	es := w.endpoints(w.servers...)
	for range 3 {
		for _, config := range []string{
			`{"loadBalancingConfig":[{"round_robin":{}}]}`,
			`{"loadBalancingConfig":[{"belfry.p2c":{}}]}`,
			`{"loadBalancingConfig":[{"belfry.p2c":{"load":{"peakEwma":{}}}}]}`,
			`{"loadBalancingPolicy":"belfry.p2c"}`,
			`{"loadBalancingConfig":[{"pick_first":{}}]}`,
		} {
			w.r.UpdateState(resolver.State{Endpoints: es, ServiceConfig: w.serviceConfig(config)})
			w.counts(50)
		}
	}
	stop()
}

func TestWireABadConfigKeepsTheGoodOne(t *testing.T) {
	t.Parallel()
	w := newWire(t, newServers(t, 2), wireConfig{policy: `"load":{"constant":{}}`})
	w.allReady()
	bad := w.r.CC().ParseServiceConfig(`{"loadBalancingConfig":[{"belfry.p2c":{"choiceCount":1}}]}`)
	if bad.Err == nil {
		t.Fatal("a bad config was accepted")
	}
	w.r.UpdateState(resolver.State{Endpoints: w.endpoints(w.servers...), ServiceConfig: bad})
	if got := w.counts(50); len(got) != 2 {
		t.Errorf("calls by server are %v, want both", got)
	}
}

func TestWireIdleAndBack(t *testing.T) {
	t.Parallel()
	w := newWire(t, newServers(t, 2), wireConfig{policy: `"load":{"pendingRequests":{}}`, opts: []grpc.DialOption{grpc.WithIdleTimeout(100 * time.Millisecond)}})
	ctx := testContext(t)
	for round := range 3 {
		w.counts(1) // After a second one it may have been IDLE in between.
		for s := w.conn.GetState(); s != connectivity.Idle; s = w.conn.GetState() {
			if !w.conn.WaitForStateChange(ctx, s) {
				t.Fatalf("round %d: state of the channel is %v, want IDLE", round, s)
			}
		}
	}
	w.wantRest(3)
	if got := len(policiesOf(w.target)); got != 3 {
		t.Errorf("%d policies were built, want 3: one after each idle time", got)
	}
}

// fastReconnect makes a lost server be tried again soon.
var fastReconnect = grpc.WithConnectParams(grpc.ConnectParams{
	Backoff:           backoff.Config{BaseDelay: 10 * time.Millisecond, Multiplier: 1, MaxDelay: 10 * time.Millisecond},
	MinConnectTimeout: time.Second,
})

func TestWireMeterSurvivesARestartOfItsServer(t *testing.T) {
	t.Parallel()
	w := newWire(t, newServers(t, 2), wireConfig{policy: `"load":{"constant":{}}`, opts: []grpc.DialOption{fastReconnect}})
	w.allReady()
	before := w.meterOf(w.servers[0])
	ctx := testContext(t)
	w.servers[0].Stop()
	w.until("the other answers", 20, func(m map[string]int) bool { return m[""] == 0 && m["server-0"] == 0 })
	if err := w.servers[0].Restart(ctx); err != nil {
		t.Fatal(err)
	}
	w.allReady()
	if after := w.meterOf(w.servers[0]); after != before {
		t.Errorf("meter after the restart is %p, want %p as before", after, before)
	}
}

// tokens is per-RPC credentials that get their token by a call of their own, in the
// context of the one that needs it.
type tokens struct{ from *wire }

func (c tokens) GetRequestMetadata(ctx context.Context, _ ...string) (map[string]string, error) {
	_, err := c.from.call(ctx, nil)
	return nil, err
}

func (tokens) RequireTransportSecurity() bool { return false }

func TestWireCallsOfCredentialsLeaveNothingInFlight(t *testing.T) {
	t.Parallel()
	for _, untracked := range []bool{false, true} {
		from := newWire(t, newServers(t, 1), wireConfig{policy: `"load":{"pendingRequests":{}}`, untracked: untracked})
		w := newWire(t, newServers(t, 1), wireConfig{policy: `"load":{"pendingRequests":{}}`,
			opts: []grpc.DialOption{grpc.WithPerRPCCredentials(tokens{from})}})
		w.counts(3)
		for what, w := range map[string]*wire{"calls": w, "calls for tokens": from} {
			if got := policiesOf(w.target)[0].totalLoad(); got != 0 {
				t.Errorf("untracked=%v: %v %s in flight at rest, want 0", untracked, got, what)
			}
		}
	}
}

// meterOf returns the meter of a server's endpoint.
func (w *wire) meterOf(s *testserver.Server) load.Meter {
	w.t.Helper()
	ps := policiesOf(w.target)
	p := ps[len(ps)-1]
	// Written before the first call, and not again where no update follows.
	ep, ok := p.endpoints.Get(s.Endpoint())
	if !ok {
		w.t.Fatalf("the policy has no endpoint %s", s.Addr())
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	return ep.candidate.meter.Load().Meter
}

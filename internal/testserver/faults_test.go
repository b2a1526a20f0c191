// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package testserver

import (
	"context"
	"errors"
	"io"
	"math"
	"math/rand/v2"
	"net"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/health/grpc_health_v1"

	testingv1 "github.com/belfry-go/belfry/proto/belfry/testing/v1"
)

// Fail answers at once and spares the queue.
func TestFailSparesQueue(t *testing.T) {
	inVirtualTime(t, func(t *testing.T, c *calls) {
		begin := time.Now()
		c.start(t.Context())
		synctest.Wait()
		must(t, c.server.Fail(codes.ResourceExhausted, 1))
		c.start(t.Context())
		r := c.wait(1)
		wantCode(t, r.err, codes.ResourceExhausted)
		if got := r.at.Sub(begin); got != 0 {
			t.Errorf("failure took %v, want no time", got)
		}
		c.server.Heal()
		c.start(t.Context())
		c.results = []chan result{c.results[0], c.results[2]}
		c.wantEnds(begin, 10*ms, 20*ms)
	}, Workers(1), ServiceTime(Fixed(10*ms)))
}

// A fraction f of n calls fails within 6.2 standard deviations of f*n, but for a
// chance below 1e-9; two fractions are tried.
func TestFailFraction(t *testing.T) {
	const n = 1500
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	synctest.Test(t, func(t *testing.T) {
		s := New(t, InMemory(), Seed(seed))
		client := dial(t, s)
		count := func() (failed int) {
			for range n {
				if err := unary(t.Context(), client, nil); err != nil {
					wantCode(t, err, codes.Unavailable)
					failed++
				}
			}
			return failed
		}
		check := func(name string, got int, f float64) {
			if tolerance := 6.2 * math.Sqrt(n*f*(1-f)); math.Abs(float64(got)-n*f) > tolerance {
				t.Errorf("%s: got %d of %d failed, want %v within %.0f", name, got, n, n*f, tolerance)
			}
		}
		must(t, s.Fail(codes.Unavailable, 0.3))
		check("Fail", count(), 0.3)
		s.Heal()
		must(t, s.Reject(codes.Unavailable, 0.5))
		check("Reject", count(), 0.5)
	})
}

// A call with response headers is committed and not retried by gRPC.
func TestFailAfterHeadersEndsRetries(t *testing.T) {
	s := New(t)
	client := testingv1.NewTestServiceClient(Dial(t, s, grpc.WithDefaultServiceConfig(`{"methodConfig": [{
		"name": [{}],
		"retryPolicy": {"maxAttempts": 3, "initialBackoff": "0.001s", "maxBackoff": "0.001s",
			"backoffMultiplier": 1, "retryableStatusCodes": ["UNAVAILABLE"]}
	}]}`)))
	ctx := testContext(t)

	must(t, s.FailAfterHeaders(codes.Unavailable, 1))
	wantCode(t, unary(ctx, client, nil), codes.Unavailable)
	if got := s.Stats().Started; got != 1 {
		t.Errorf("attempts at a call that fails after headers: got %d, want 1", got)
	}
	must(t, s.Fail(codes.Unavailable, 1))
	wantCode(t, unary(ctx, client, nil), codes.Unavailable)
	if got := s.Stats().Started; got != 4 {
		t.Errorf("attempts at a call that fails without headers: got %d, want 3", got-1)
	}
	if got := s.Stats().Finished(codes.Unavailable); got != 4 {
		t.Errorf("finished with UNAVAILABLE: got %d, want 4", got)
	}
}

// A request above the server's limit is RESOURCE_EXHAUSTED to a server that
// reads it.
func TestRejectBeforeRequest(t *testing.T) {
	s := New(t, GRPC(grpc.MaxRecvMsgSize(1024)))
	client := dial(t, s)
	ctx := testContext(t)
	big := &testingv1.UnaryRequest{Payload: make([]byte, 1<<20)}

	_, err := client.Unary(ctx, big)
	wantCode(t, err, codes.ResourceExhausted)

	must(t, s.Reject(codes.Unavailable, 1))
	_, err = client.Unary(ctx, big)
	wantCode(t, err, codes.Unavailable)

	stream, err := client.Bidi(ctx)
	must(t, err)
	_, err = stream.Recv()
	wantCode(t, err, codes.Unavailable)
	if got := s.Stats(); got.Finished(codes.Unavailable) != 2 || got.InFlight != 0 {
		t.Errorf("after two rejections: got %v, want 2 finished with UNAVAILABLE, none in flight", got)
	}

	s.Heal()
	must(t, unary(ctx, client, nil))
}

// Unknown method is unimplemented and not counted.
func TestUnknownMethod(t *testing.T) {
	s := New(t)
	conn := Dial(t, s)
	err := conn.Invoke(testContext(t), methodPrefix+"Unknown", &testingv1.UnaryRequest{}, &testingv1.UnaryResponse{})
	wantCode(t, err, codes.Unimplemented)
	if got := s.Stats().Started; got != 0 {
		t.Errorf("started: got %d, want 0", got)
	}
}

// BlackHole answers nothing until healed.
func TestBlackHoleUntilHealed(t *testing.T) {
	inVirtualTime(t, func(t *testing.T, c *calls) {
		begin := time.Now()
		c.start(t.Context()) // in progress when the black hole opens
		time.Sleep(5 * ms)
		c.server.BlackHole()
		must(t, c.server.Reject(codes.Internal, 1))
		impatient, cancel := context.WithTimeout(t.Context(), 45*ms)
		defer cancel()
		c.start(impatient)
		c.start(t.Context())
		r := c.wait(1)
		wantCode(t, r.err, codes.DeadlineExceeded)
		time.Sleep(50 * ms)
		if got := c.server.Stats().InFlight; got != 2 {
			t.Errorf("in flight in the black hole: got %d, want 2", got)
		}
		c.server.Heal()
		c.results = []chan result{c.results[0], c.results[2]}
		c.wantEnds(begin, 100*ms, 110*ms)
	}, ServiceTime(Fixed(10*ms)))
}

// BlackHole holds headers of calls in progress.
func TestBlackHoleHoldsHeaders(t *testing.T) {
	inVirtualTime(t, func(t *testing.T, c *calls) {
		begin := time.Now()
		stream, err := c.client.ServerStream(t.Context(), &testingv1.ServerStreamRequest{Behaviour: &testingv1.Behaviour{HeadersBeforeFailure: true}})
		must(t, err)
		must(t, c.server.WaitStarted(t.Context(), 1))
		c.server.BlackHole()
		time.AfterFunc(time.Second, c.server.Heal)
		_, err = stream.Header()
		must(t, err)
		if got := time.Since(begin); got != time.Second {
			t.Errorf("headers after: got %v, want 1s", got)
		}
		_, err = stream.Recv()
		must(t, err)
	}, ServiceTime(Fixed(10*ms)))
}

func TestFaultsHitStreamsOfEveryKind(t *testing.T) {
	s := New(t)
	client := dial(t, s)
	ctx := testContext(t)
	must(t, s.Fail(codes.Aborted, 1))

	up, err := client.ClientStream(ctx)
	must(t, err)
	_, err = up.CloseAndRecv()
	wantCode(t, err, codes.Aborted)

	down, err := client.ServerStream(ctx, &testingv1.ServerStreamRequest{})
	must(t, err)
	_, err = down.Recv()
	wantCode(t, err, codes.Aborted)

	both, err := client.Bidi(ctx)
	must(t, err)
	_, err = both.Recv()
	wantCode(t, err, codes.Aborted)
}

func TestHealthChecksFollowSetServing(t *testing.T) {
	s := New(t)
	conn := Dial(t, s)
	ctx := testContext(t)
	health := grpc_health_v1.NewHealthClient(conn)
	for _, service := range []string{"", "belfry.testing.v1.TestService"} {
		s.SetServing(true)
		watch, err := health.Watch(ctx, &grpc_health_v1.HealthCheckRequest{Service: service})
		must(t, err)
		for _, serving := range []bool{true, false, true} {
			want := grpc_health_v1.HealthCheckResponse_NOT_SERVING
			if serving {
				want = grpc_health_v1.HealthCheckResponse_SERVING
			}
			s.SetServing(serving)
			r, err := watch.Recv()
			must(t, err)
			if got := r.GetStatus(); got != want {
				t.Errorf("health of %q: got %v, want %v", service, got, want)
			}
		}
	}
	if got := s.Stats().Started; got != 0 {
		t.Errorf("calls started by health checks: got %d, want 0", got)
	}
}

// Bad faults name field value and rule.
func TestFaultsBad(t *testing.T) {
	s := New(t)
	tests := []struct {
		err  error
		want string
	}{
		{s.SetSpeed(0), "SetSpeed: f is 0, must be positive and finite"},
		{s.SetSpeed(-1), "f is -1, must be"},
		{s.SetSpeed(math.NaN()), "f is NaN, must be"},
		{s.SetSpeed(math.Inf(1)), "f is +Inf, must be"},
		{s.StallFor(0), "StallFor: d is 0s, must be positive"},
		{s.Fail(codes.OK, 1), "Fail: code is OK, must be"},
		{s.Fail(17, 1), "Fail: code is Code(17), must be"},
		{s.Fail(codes.Unavailable, 0), "Fail: fraction is 0, must be in (0, 1]"},
		{s.FailAfterHeaders(codes.Unavailable, 1.5), "FailAfterHeaders: fraction is 1.5, must be in (0, 1]"},
		{s.Reject(codes.Unavailable, math.NaN()), "Reject: fraction is NaN, must be in (0, 1]"},
	}
	for _, tt := range tests {
		if tt.err == nil || !strings.Contains(tt.err.Error(), tt.want) {
			t.Errorf("bad fault: got error %v, want one with %q", tt.err, tt.want)
		}
	}
	must(t, unary(testContext(t), dial(t, s), nil))
}

// GOAWAY moves new calls and leaves those in flight.
func TestGoAwayMovesNewCalls(t *testing.T) {
	for _, option := range []Option{InMemory(), Listen("127.0.0.1:0")} {
		s := New(t, option)
		client := dial(t, s)
		ctx := testContext(t)
		stream, err := client.Bidi(ctx)
		must(t, err)
		must(t, s.WaitInFlight(ctx, 1))

		must(t, s.GoAway())
		// A call may still be sent on the old connection until the GOAWAY
		// arrives there.
		for s.Stats().Accepted < 2 {
			must(t, unary(ctx, client, nil))
		}
		must(t, s.WaitConnections(ctx, 2))
		must(t, stream.Send(&testingv1.BidiRequest{}))
		_, err = stream.Recv()
		must(t, err)
		must(t, stream.CloseSend())
		if _, err = stream.Recv(); !errors.Is(err, io.EOF) {
			t.Errorf("end of a stream that outlived GOAWAY: got %v, want EOF", err)
		}
		must(t, s.WaitConnections(ctx, 1))
		must(t, unary(ctx, client, nil))
		if got := s.Stats().Finished() - s.Stats().Finished(codes.OK); got != 0 {
			t.Errorf("calls that GOAWAY made fail: got %d, want 0", got)
		}
	}
}

func TestGoAwayDuringCallsLosesNone(t *testing.T) {
	s := New(t, ServiceTime(Uniform(0, ms)))
	client := dial(t, s)
	ctx := testContext(t)
	errs := make(chan error)
	for range 20 {
		go func() {
			var err error
			for i := 0; i < 100 && err == nil; i++ {
				err = unary(ctx, client, nil)
			}
			errs <- err
		}()
	}
	for i := range 10 {
		must(t, s.WaitStarted(ctx, int64(i+1)*150))
		must(t, s.GoAway())
	}
	for range 20 {
		must(t, <-errs)
	}
}

// CloseConnections loses calls in flight.
func TestCloseConnections(t *testing.T) {
	s := New(t)
	client := dial(t, s)
	ctx := testContext(t)
	stream, err := client.Bidi(ctx)
	must(t, err)
	must(t, s.WaitInFlight(ctx, 1))
	s.CloseConnections()
	_, err = stream.Recv()
	wantCode(t, err, codes.Unavailable)
	must(t, s.WaitInFlight(ctx, 0))
	_, err = client.Unary(ctx, &testingv1.UnaryRequest{}, grpc.WaitForReady(true))
	must(t, err)
}

// quickReconnect spares a test gRPC's first second of backoff.
var quickReconnect = grpc.WithConnectParams(grpc.ConnectParams{
	Backoff:           backoff.Config{BaseDelay: 10 * ms, Multiplier: 1, MaxDelay: 10 * ms},
	MinConnectTimeout: time.Second,
})

// Stop refuses and restart serves on the same address.
func TestStopAndRestart(t *testing.T) {
	for _, option := range []Option{InMemory(), Listen("127.0.0.1:0"), Listen("localhost:0")} {
		s := New(t, option)
		client := testingv1.NewTestServiceClient(Dial(t, s, quickReconnect))
		ctx := testContext(t)
		addr := s.Addr()
		must(t, s.SetSpeed(2))
		stream, err := client.Bidi(ctx)
		must(t, err)
		must(t, s.WaitInFlight(ctx, 1))

		s.Stop()
		if st := s.Stats(); st.InFlight != 0 || st.Connections != 0 {
			t.Errorf("after Stop: got %v, want no call in flight and no connection", st)
		}
		_, err = stream.Recv()
		wantCode(t, err, codes.Unavailable)
		wantCode(t, unary(ctx, client, nil), codes.Unavailable)
		if err := s.GoAway(); err == nil || !strings.Contains(err.Error(), "server is stopped") {
			t.Errorf("GoAway of a stopped server: got %v, want an error", err)
		}

		must(t, s.Restart(ctx))
		if got := s.Addr(); got != addr {
			t.Errorf("address after Restart: got %s, want %s", got, addr)
		}
		_, err = client.Unary(ctx, &testingv1.UnaryRequest{}, grpc.WaitForReady(true))
		must(t, err)
		if got := s.Stats().Started; got != 2 {
			t.Errorf("started, counted through a restart: got %d, want 2", got)
		}
		if err := s.Restart(ctx); err == nil || !strings.Contains(err.Error(), "server is running") {
			t.Errorf("Restart of a running server: got %v, want an error", err)
		}
		s.Close()
		s.Close()
		if err := s.Restart(ctx); err == nil || !strings.Contains(err.Error(), "server is closed") {
			t.Errorf("Restart of a closed server: got %v, want an error", err)
		}
	}
}

// An outgoing connection that asks for the port of a stopped server, as one to
// which the system gives a port does, does not get it.
func TestAStoppedServerKeepsItsPort(t *testing.T) {
	if runtime.GOOS != "linux" {
		t.Skip("only Linux lets a server listen where something is bound")
	}
	other := New(t)
	for _, address := range []string{"127.0.0.1:0", "localhost:0"} {
		s := New(t, Listen(address))
		stop := []func(){s.Stop, func() { must(t, s.GracefulStop(testContext(t))) }}
		for _, stop := range stop {
			stop()
			from, err := net.ResolveTCPAddr("tcp", s.Addr())
			must(t, err)
			d := net.Dialer{LocalAddr: from}
			if c, err := d.DialContext(testContext(t), "tcp", other.Addr()); !errors.Is(err, syscall.EADDRINUSE) {
				if err == nil {
					c.Close()
				}
				t.Errorf("a connection from the port of a stopped server: got %v, want EADDRINUSE", err)
			}
			must(t, s.Restart(testContext(t)))
		}
	}
}

// Restart waits for its port as long as it may.
func TestRestartWaitsForPort(t *testing.T) {
	s := New(t)
	s.Stop()
	squatter := New(t, Listen(s.Addr()))
	ctx, cancel := context.WithTimeout(testContext(t), 20*ms)
	defer cancel()
	if err := s.Restart(ctx); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("Restart while the port is taken: got %v, want a deadline exceeded", err)
	}
	squatter.Close()
	must(t, s.Restart(testContext(t)))
}

func TestGracefulStopWaitsForCallsInFlight(t *testing.T) {
	inVirtualTime(t, func(t *testing.T, c *calls) {
		begin := time.Now()
		c.start(t.Context())
		time.Sleep(3 * ms)
		must(t, c.server.GracefulStop(t.Context()))
		if got := time.Since(begin); got != 10*ms {
			t.Errorf("GracefulStop returned after: got %v, want 10ms", got)
		}
		c.wantEnds(begin, 10*ms)
		must(t, c.server.GracefulStop(t.Context())) // nothing to stop
	}, ServiceTime(Fixed(10*ms)))
}

func TestGracefulStopEndsWithItsContext(t *testing.T) {
	inVirtualTime(t, func(t *testing.T, c *calls) {
		c.start(t.Context())
		ctx, cancel := context.WithTimeout(t.Context(), 10*ms)
		defer cancel()
		if err := c.server.GracefulStop(ctx); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("GracefulStop beyond its context: got %v, want a deadline exceeded", err)
		}
		wantCode(t, c.wait(0).err, codes.Unavailable)
		must(t, c.server.Restart(t.Context()))
	}, ServiceTime(Fixed(time.Hour)))
}

// Stop hastens a GracefulStop and a GOAWAY.
func TestStopDuringGracefulStop(t *testing.T) {
	inVirtualTime(t, func(t *testing.T, c *calls) {
		c.start(t.Context())
		must(t, c.server.GoAway())
		c.start(t.Context())
		graceful := make(chan error)
		go func() { graceful <- c.server.GracefulStop(t.Context()) }()
		synctest.Wait()
		c.server.Stop()
		must(t, <-graceful)
		for i := range 2 {
			wantCode(t, c.wait(i).err, codes.Unavailable)
		}
	}, ServiceTime(Fixed(time.Hour)))
}

// Whatever happens to a server while calls run, at rest its books balance. The
// check holds for every interleaving.
func TestBooksBalanceAfterChaos(t *testing.T) {
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	s := New(t, Workers(3), ServiceTime(Exponential(ms/2)), Seed(seed))
	client := dial(t, s)
	ctx := testContext(t)

	stop := make(chan struct{})
	done := make(chan struct{})
	const clients = 30
	for i := range clients {
		go func() {
			defer func() { done <- struct{}{} }()
			r := rand.New(rand.NewPCG(seed, uint64(i)))
			for range 60 {
				callCtx, cancel := context.WithTimeout(ctx, time.Duration(r.IntN(20))*ms)
				if r.IntN(2) == 0 {
					_ = unary(callCtx, client, nil)
				} else if stream, err := client.Bidi(callCtx); err == nil {
					for range 3 {
						if stream.Send(&testingv1.BidiRequest{}) != nil {
							break
						}
					}
					_ = stream.CloseSend()
					for err == nil {
						_, err = stream.Recv()
					}
				}
				cancel()
			}
		}()
	}
	go func() {
		defer func() { done <- struct{}{} }()
		r := rand.New(rand.NewPCG(seed, clients))
		timer := time.NewTicker(ms)
		defer timer.Stop()
		for {
			select {
			case <-stop:
				return
			case <-timer.C:
			}
			var err error
			switch r.IntN(10) {
			case 0:
				err = s.SetSpeed(0.2 + r.Float64())
			case 1:
				err = s.StallFor(time.Duration(1 + r.IntN(int(5*ms))))
			case 2:
				s.Stall()
			case 3:
				s.Resume()
			case 4:
				err = s.Fail(codes.Internal, 0.5)
			case 5:
				err = s.Reject(codes.Internal, 0.5)
			case 6:
				s.BlackHole()
			case 7:
				s.Heal()
			case 8:
				err = s.GoAway()
			case 9:
				s.CloseConnections()
			}
			if err != nil {
				t.Errorf("changing the server: %v", err)
			}
		}
	}()
	for range clients {
		<-done
	}
	close(stop)
	<-done
	s.Resume()
	s.Heal()
	must(t, s.WaitInFlight(ctx, 0))
	st := s.Stats()
	if st.Started != st.Finished() || st.Queued != 0 {
		t.Errorf("at rest: got %v, want as many finished as started and none queued", st)
	}
	s.queue.mu.Lock()
	defer s.queue.mu.Unlock()
	if got := s.queue.idle; got != 3 {
		t.Errorf("idle workers at rest: got %d, want 3", got)
	}
	if got := s.queue.waiting.Len(); got != 0 {
		t.Errorf("waiting at rest: got %d, want 0", got)
	}
}

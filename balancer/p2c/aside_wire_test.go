// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package p2c

import (
	"io"
	"testing"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/resolver"
	"google.golang.org/protobuf/proto"

	"github.com/belfry-go/belfry/internal/place"
	"github.com/belfry-go/belfry/internal/testserver"
	testingv1 "github.com/belfry-go/belfry/proto/belfry/testing/v1"
)

// With these fields a server that fails is aside for longer than a test takes, so that no test
// depends on the time.
const accrualFields = `"load":{"constant":{}},"exploreEvery":0,"failureAccrual":{"baseTime":"600s","maxTime":"600s","window":"600s"}`

// passedOver returns why the endpoint of a server is passed over.
func (w *wire) passedOver(s *testserver.Server) PassedOver {
	w.t.Helper()
	for _, snapshot := range SnapshotsOf(w.conn) {
		for _, e := range snapshot.Endpoints {
			if e.Addresses[0] == s.Addr() {
				return e.PassedOver
			}
		}
	}
	w.t.Fatalf("no snapshot has %s", s.Addr())
	return ""
}

// fail makes a server fail a part of its calls.
func (w *wire) fail(s *testserver.Server, part float64) {
	w.t.Helper()
	if err := s.Fail(codes.Unavailable, part); err != nil {
		w.t.Fatal(err)
	}
}

func TestWireAccrual(t *testing.T) {
	t.Parallel()

	t.Run("one of ten that fails at once fails five calls", func(t *testing.T) {
		w := newWire(t, newServers(t, 10), wireConfig{policy: accrualFields})
		w.allReady()
		w.fail(w.servers[0], 1)
		ctx := testContext(t)
		failed := 0
		for range 500 {
			if _, err := w.call(ctx, nil); err != nil {
				failed++
			}
		}
		if failed > 5 || w.passedOver(w.servers[0]) != Aside {
			t.Errorf("%d calls failed and the server is passed over for %q, want at most 5 and %q", failed, w.passedOver(w.servers[0]), Aside)
		}
	})

	t.Run("and none with retries", func(t *testing.T) {
		w := newWire(t, newServers(t, 10), wireConfig{policy: accrualFields, service: `{"loadBalancingConfig":[%s],"methodConfig":[{"name":[{}],
			"retryPolicy":{"maxAttempts":3,"initialBackoff":"0.001s","maxBackoff":"0.001s","backoffMultiplier":1,"retryableStatusCodes":["UNAVAILABLE"]}}]}`})
		w.allReady()
		w.fail(w.servers[0], 1)
		if got := w.counts(500); got[w.servers[0].Name()] != 0 {
			t.Errorf("calls by server are %v, want none by the one that fails", got)
		}
		if n := w.servers[0].Stats().Finished(codes.Unavailable); w.passedOver(w.servers[0]) != Aside || n > 5 {
			t.Errorf("the server failed %d attempts and is passed over for %q, want at most 5 and %q", n, w.passedOver(w.servers[0]), Aside)
		}
	})

	// Each call fails with probability 1/2. The server is aside within 20 of them in 99.7 % of
	// all runs, and not within 40 in 3 of 1e6.
	t.Run("one that fails half its calls is put aside", func(t *testing.T) {
		w := newWire(t, newServers(t, 4), wireConfig{policy: accrualFields})
		w.allReady()
		w.fail(w.servers[0], 0.5)
		before := w.servers[0].Stats().Started
		ctx := testContext(t)
		for w.passedOver(w.servers[0]) != Aside && ctx.Err() == nil {
			_, _ = w.call(ctx, nil)
		}
		if n := w.servers[0].Stats().Started - before; n > 40 {
			t.Errorf("aside after %d of its calls, want at most 40", n)
		}
	})

	t.Run("all that fail are all used and back at once", func(t *testing.T) {
		w := newWire(t, newServers(t, 10), wireConfig{policy: accrualFields})
		w.allReady()
		for _, s := range w.servers {
			w.fail(s, 1)
		}
		ctx := testContext(t)
		for !SnapshotsOf(w.conn)[0].Panic && ctx.Err() == nil {
			_, _ = w.call(ctx, nil)
		}
		for _, s := range w.servers {
			s.Heal()
		}
		if got := w.counts(200); len(got) != 10 { // it fails the test if a call fails
			t.Errorf("calls by server are %v, want all ten servers", got)
		}
		for _, s := range w.servers {
			if p := w.passedOver(s); p == Aside {
				t.Errorf("%s is passed over for %q after 200 answers", s.Name(), p)
			}
		}
	})

	t.Run("streams count by their first message", func(t *testing.T) {
		w := newWire(t, newServers(t, 4), wireConfig{policy: accrualFields})
		w.allReady()
		ctx := testContext(t)
		stream := func(b *testingv1.Behaviour) error {
			s, err := w.client.ServerStream(ctx, &testingv1.ServerStreamRequest{Behaviour: b})
			if err != nil {
				return err
			}
			return drain(func() error { _, err := s.Recv(); return err })
		}
		// These streams fail after a message, so the server has answered.
		late := code(codes.Unavailable)
		late.ResponseCount = proto.Int32(1)
		for range 100 {
			_ = stream(late)
		}
		for _, s := range w.servers {
			if p := w.passedOver(s); p == Aside {
				t.Errorf("%s is put aside for streams that it had answered", s.Name())
			}
		}
		if err := w.servers[0].FailAfterHeaders(codes.Unavailable, 1); err != nil {
			t.Fatal(err)
		}
		failed := 0
		for range 200 {
			if stream(nil) != nil {
				failed++
			}
		}
		if p := w.passedOver(w.servers[0]); p != Aside || failed != 5 {
			t.Errorf("%d streams failed after their headers and the server is passed over for %q, want 5 and %q", failed, p, Aside)
		}
	})
}

func TestWireDraining(t *testing.T) {
	t.Parallel()
	w := newWire(t, newServers(t, 2), wireConfig{policy: `"load":{"constant":{}}`})
	w.allReady()
	list := func(drains ...bool) {
		es := w.endpoints(w.servers...)
		for i := range drains {
			es[i] = place.SetDraining(es[i], drains[i])
		}
		w.r.UpdateState(resolver.State{Endpoints: es[:len(drains)]})
	}
	// A stream is open to the first server.
	ctx := testContext(t)
	open := func() testingv1.TestService_BidiClient {
		for {
			s, err := w.client.Bidi(ctx)
			if err != nil {
				t.Fatal(err)
			}
			if echo(t, s) == w.servers[0].Name() {
				return s
			}
			if err := s.CloseSend(); err != nil {
				t.Fatal(err)
			}
			if err := drain(func() error { _, err := s.Recv(); return err }); err != nil {
				t.Fatal(err)
			}
		}
	}
	s := open()
	list(true, false)
	w.until("the draining server gets no calls", 50, func(m map[string]int) bool { return m[w.servers[0].Name()] == 0 })
	if got := w.counts(100); got[w.servers[0].Name()] != 0 {
		t.Errorf("calls by server are %v, want none to the draining one", got)
	}
	if got := echo(t, s); got != w.servers[0].Name() {
		t.Errorf("a message on the open stream was answered by %q, want %q", got, w.servers[0].Name())
	}
	list(true, true)
	w.until("both serve, which leave both", 50, func(m map[string]int) bool { return len(m) == 2 && m[""] == 0 })
	list(true)
	w.until("the last one serves", 20, func(m map[string]int) bool { return m[w.servers[0].Name()] == 20 })
	// It is gone, and its stream lives on.
	es := w.endpoints(w.servers...)
	w.r.UpdateState(resolver.State{Endpoints: es[1:]})
	w.until("the other serves", 20, func(m map[string]int) bool { return m[w.servers[1].Name()] == 20 })
	if got := echo(t, s); got != w.servers[0].Name() {
		t.Errorf("a message on the open stream was answered by %q, want %q", got, w.servers[0].Name())
	}
	if err := s.CloseSend(); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Recv(); err != io.EOF {
		t.Errorf("the stream ended with %v, want io.EOF", err)
	}
}

// echo sends a message and returns who answers.
func echo(t *testing.T, s testingv1.TestService_BidiClient) string {
	t.Helper()
	if err := s.Send(&testingv1.BidiRequest{Behaviour: &testingv1.Behaviour{ResponseCount: proto.Int32(1)}}); err != nil {
		t.Fatal(err)
	}
	r, err := s.Recv()
	if err != nil {
		t.Fatal(err)
	}
	return r.GetObserved().GetServer()
}

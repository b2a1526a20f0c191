// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package p2c

import (
	"context"
	"testing"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/balancer"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/belfry-go/belfry/internal/testserver"
	"github.com/belfry-go/belfry/load"
	"github.com/belfry-go/belfry/orca"
	testingv1 "github.com/belfry-go/belfry/proto/belfry/testing/v1"
)

func TestPushback(t *testing.T) {
	const asked = 10 * time.Second
	detailed, err := status.New(codes.ResourceExhausted, "slow down").WithDetails(&errdetails.RetryInfo{RetryDelay: durationpb.New(asked)})
	if err != nil {
		t.Fatal(err)
	}
	for name, end := range map[string]struct {
		done balancer.DoneInfo
		left time.Duration
	}{
		"RetryInfo": {balancer.DoneInfo{BytesSent: true, Err: detailed.Err()}, asked},
		"trailer":   {balancer.DoneInfo{BytesSent: true, Err: statusError("UNAVAILABLE"), Trailer: metadata.Pairs("grpc-retry-pushback-ms", "10000")}, asked},
		// An hour is too long to be believed.
		"bound": {balancer.DoneInfo{BytesSent: true, Err: statusError("UNAVAILABLE"), Trailer: metadata.Pairs("grpc-retry-pushback-ms", "3600000")}, mostPushback},
	} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(t *testing.T, w *world) {
				w.start(`{"exploreEvery":0,"load":{"pendingRequests":{}}}`, some("a", "b")...)
				for range 2 { // both have answered, so that none is one that has only failed
					_, done := w.mustPick()
					_, other := w.mustPick()
					done(success)
					other(success)
				}
				bad, done := w.mustPick()
				done(end.done)
				time.Sleep(end.left - time.Second)
				if n := w.counts(50)[bad]; n != 0 {
					t.Errorf("%d of 50 calls went to the endpoint before its time", n)
				}
				time.Sleep(2 * time.Second)
				if n := w.counts(50)[bad]; n == 0 {
					t.Error("no call went to the endpoint after its time; one run in 1e15 fails falsely")
				}
			})
		})
	}
}

// Another client has three calls at the server, of which this one learns from reports.
func TestReports(t *testing.T) {
	for _, outOfBand := range []bool{false, true} {
		name, config := "with each call", `"load":{"expectedLatency":{"reports":{}}}`
		if outOfBand {
			name, config = "out of band", `"load":{"expectedLatency":{"reports":{"outOfBand":"30s"}}}`
		}
		t.Run(name, func(t *testing.T) {
			r := new(orca.Reporter)
			begun, release := make(chan struct{}, 3), make(chan struct{})
			block := grpc.ChainUnaryInterceptor(func(ctx context.Context, req any, _ *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (any, error) {
				if md, _ := metadata.FromIncomingContext(ctx); len(md.Get("block")) > 0 {
					begun <- struct{}{}
					<-release
				}
				return handler(ctx, req)
			})
			server := testserver.New(t, testserver.GRPC(append(r.ServerOptions(), block)...),
				testserver.Register(func(s grpc.ServiceRegistrar) { must(0, r.Register(s)) }))
			other := newWire(t, []*testserver.Server{server}, wireConfig{})
			ended := make(chan error)
			for range 3 {
				go func() {
					_, err := other.call(metadata.AppendToOutgoingContext(testContext(t), "block", "1"), nil)
					ended <- err
				}()
				<-begun
			}

			w := newWire(t, []*testserver.Server{server}, wireConfig{policy: config})
			if outOfBand {
				w.conn.Connect()
				w.o.wait(t, "a report has come", func() bool { return w.o.outOfBand != nil })
				if got := *w.o.outOfBand; got.Named[orca.InFlight] != 3 {
					t.Errorf("report %+v, want 3 in flight", got)
				}
			} else {
				if _, err := w.client.Unary(testContext(t), &testingv1.UnaryRequest{}, grpc.WaitForReady(true)); err != nil {
					t.Fatal(err)
				}
				w.o.rest(t, 1)
				p := policiesOf(w.target)[0]
				c := (*p.all.Load())[0].candidate
				e := c.meter.Load().Load(load.Query{Now: load.Instant(p.now()), Weight: 1})
				if e.Queue < 2.99 || e.Queue > 3.01 {
					t.Errorf("the queue is %v, want 3", e.Queue)
				}
			}
			close(release)
			for range 3 {
				if err := <-ended; err != nil {
					t.Error(err)
				}
			}
		})
	}
}

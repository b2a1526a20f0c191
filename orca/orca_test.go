// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package orca_test

import (
	"context"
	"fmt"
	"log"
	"net"
	"testing"
	"time"

	orcapb "github.com/cncf/xds/go/xds/data/orca/v3"
	"go.uber.org/goleak"
	"google.golang.org/grpc"
	"google.golang.org/grpc/metadata"
	"google.golang.org/protobuf/proto"

	"github.com/belfry-go/belfry/internal/testserver"
	"github.com/belfry-go/belfry/orca"
	testingv1 "github.com/belfry-go/belfry/proto/belfry/testing/v1"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// A server that reports its load needs one line.
func ExampleServerOptions() {
	s := grpc.NewServer(orca.ServerOptions()...)
	// Register services.
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		log.Fatal(err)
	}
	go func() { _ = s.Serve(l) }()
	s.Stop()
	fmt.Println("named_metrics." + orca.InFlight)
	// Output: named_metrics.belfry.in_flight
}

func TestReporter(t *testing.T) {
	r := new(orca.Reporter)
	server := testserver.New(t, testserver.GRPC(r.ServerOptions()...))
	client := testingv1.NewTestServiceClient(testserver.Dial(t, server))
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	requests := func(trailer metadata.MD) float64 {
		t.Helper()
		report := new(orcapb.OrcaLoadReport)
		if v := trailer.Get("endpoint-load-metrics-bin"); len(v) != 1 || proto.Unmarshal([]byte(v[0]), report) != nil {
			t.Fatalf("trailer %v, want one report", trailer)
		}
		n, ok := report.NamedMetrics[orca.InFlight]
		if !ok {
			t.Fatalf("report %v, want %s", report, orca.InFlight)
		}
		return n
	}
	call := func() float64 {
		t.Helper()
		var trailer metadata.MD
		if _, err := client.Unary(ctx, &testingv1.UnaryRequest{}, grpc.Trailer(&trailer)); err != nil {
			t.Fatal(err)
		}
		return requests(trailer)
	}

	if got := call(); got != 0 {
		t.Errorf("%v requests in flight beside a call that is alone, want 0", got)
	}
	stream, err := client.Bidi(ctx)
	if err != nil {
		t.Fatal(err)
	}
	if err := stream.Send(&testingv1.BidiRequest{}); err != nil {
		t.Fatal(err)
	}
	if _, err := stream.Recv(); err != nil {
		t.Fatal(err)
	}
	if got := call(); got != 0 {
		t.Errorf("%v requests in flight beside a stream that was answered, want 0", got)
	}
	if got := r.ServerMetrics().NamedMetrics[orca.InFlight]; got != 0 {
		t.Errorf("%v requests in flight at rest, want 0", got)
	}
	if err := stream.CloseSend(); err != nil {
		t.Fatal(err)
	}
	for err == nil {
		_, err = stream.Recv()
	}
	if got := requests(stream.Trailer()); got != 0 {
		t.Errorf("%v requests in flight when the stream ended, want 0", got)
	}
}

// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package otelobserver_test

import (
	"context"
	"net"
	"runtime"
	"slices"
	"testing"
	"time"

	sdk "go.opentelemetry.io/otel/sdk/metric"
	sdktrace "go.opentelemetry.io/otel/sdk/trace"
	"go.opentelemetry.io/otel/sdk/trace/tracetest"
	"google.golang.org/grpc"
	"google.golang.org/grpc/connectivity"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/belfry-go/belfry/balancer/p2c"
	"github.com/belfry-go/belfry/interceptor"
	"github.com/belfry-go/belfry/interceptor/breaker"
	"github.com/belfry-go/belfry/interceptor/buffer"
	"github.com/belfry-go/belfry/interceptor/concurrency"
	"github.com/belfry-go/belfry/interceptor/otelobserver"
	"github.com/belfry-go/belfry/interceptor/retry"
	"github.com/belfry-go/belfry/interceptor/throttle"
)

func TestTwoStacksDoNotOverwriteEachOther(t *testing.T) {
	obs, reader := newObserver(t)
	a := newStack(t, interceptor.Named("a"), interceptor.Observe(obs), concurrency.Config{Limit: 5})
	b := newStack(t, interceptor.Named("b"), interceptor.Observe(obs), concurrency.Config{Limit: 50})
	got := points(t, reader)
	for name, want := range map[string]float64{
		"belfry.limit{belfry.layer=concurrency,belfry.stack=a}": 5,
		"belfry.limit{belfry.layer=concurrency,belfry.stack=b}": 50,
	} {
		if got[name] != want {
			t.Errorf("%s = %v, want %v", name, got[name], want)
		}
	}
	runtime.KeepAlive(a)
	runtime.KeepAlive(b)
}

func TestReadings(t *testing.T) {
	obs, reader := newObserver(t)
	circuits, err := breaker.New(breaker.Config{KeyBy: interceptor.KeyBy{Method: true}})
	if err != nil {
		t.Fatal(err)
	}
	circuits.Trip("/s/a", time.Hour)
	stack := newStack(t, interceptor.Observe(obs), retry.Config{}, buffer.Config{Size: 7}, concurrency.Config{Limit: 1}, throttle.Config{}, circuits)
	twin := newStack(t, interceptor.Observe(obs), circuits) // Its circuits are not counted twice.
	got := points(t, reader)
	for name, want := range map[string]float64{
		"belfry.circuits{belfry.layer=breaker,belfry.stack=stack,belfry.state=open}":      1,
		"belfry.circuits{belfry.layer=breaker,belfry.stack=stack,belfry.state=half-open}": 0,
		"belfry.circuits{belfry.layer=breaker,belfry.stack=stack,belfry.state=closed}":    0,
		"belfry.throttle.probability{belfry.layer=throttle,belfry.stack=stack}":           0,
		"belfry.budget.balance{belfry.layer=retry,belfry.stack=stack}":                    100,
		"belfry.layer.waiting{belfry.layer=buffer,belfry.stack=stack}":                    0,
	} {
		if v, ok := got[name]; !ok || v != want {
			t.Errorf("%s = %v (present: %v), want %v", name, v, ok, want)
		}
	}
	runtime.KeepAlive(stack)
	runtime.KeepAlive(twin)
}

// serve starts a server without services, and returns its address.
func serve(t *testing.T) string {
	t.Helper()
	lis, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s := grpc.NewServer()
	done := make(chan struct{})
	go func() { defer close(done); s.Serve(lis) }()
	t.Cleanup(func() { s.Stop(); <-done })
	return lis.Addr().String()
}

func dial(t *testing.T, target string, opts ...grpc.DialOption) *grpc.ClientConn {
	t.Helper()
	conn, err := grpc.NewClient(target, append(append(opts, p2c.DialOptions()...), grpc.WithTransportCredentials(insecure.NewCredentials()))...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	conn.Connect()
	for s := conn.GetState(); s != connectivity.Ready; s = conn.GetState() {
		if !conn.WaitForStateChange(t.Context(), s) {
			t.Fatal("not connected")
		}
	}
	return conn
}

func TestEndpoints(t *testing.T) {
	reader := sdk.NewManualReader()
	obs, err := otelobserver.New(sdk.NewMeterProvider(sdk.WithReader(reader)), otelobserver.WithEndpoints(1))
	if err != nil {
		t.Fatal(err)
	}
	addr := serve(t)
	stack := newStack(t, interceptor.Observe(obs))
	conn := dial(t, "passthrough:///"+addr, stack.DialOptions()...)
	conn.Invoke(t.Context(), "/s/m", nil, nil, grpc.StaticMethod())
	got := points(t, reader)
	target := "grpc.target=passthrough:///" + addr
	for name, want := range map[string]float64{
		"belfry.endpoints{belfry.state=READY,grpc.lb.locality=," + target + "}":                          1,
		"belfry.endpoint.aside{belfry.endpoint=" + addr + ",grpc.lb.locality=," + target + "}":           0,
		"belfry.endpoint.in_flight{belfry.endpoint=" + addr + ",grpc.lb.locality=," + target + "}":       0,
		"belfry.attempt.started{belfry.attempt=first,belfry.stack=stack,grpc.method=s/m," + target + "}": 1,
	} {
		if v, ok := got[name]; !ok || v != want {
			t.Errorf("%s = %v (present: %v), want %v; points %v", name, v, ok, want, got)
		}
	}
	if _, err := otelobserver.New(sdk.NewMeterProvider(), otelobserver.WithEndpoints(0)); err == nil {
		t.Error("WithEndpoints(0) is accepted")
	}
}

func TestSpanEvents(t *testing.T) {
	spans := tracetest.NewSpanRecorder()
	tracer := sdktrace.NewTracerProvider(sdktrace.WithSpanProcessor(spans)).Tracer("test")
	obs, _ := newObserver(t)
	addr := serve(t)
	stack := newStack(t, interceptor.Observe(obs))
	conn := dial(t, "passthrough:///"+addr, stack.DialOptions()...)
	ctx, span := tracer.Start(t.Context(), "call")
	conn.Invoke(ctx, "/s/m", nil, nil)
	c := interceptor.Observed{Context: ctx, Stack: "s", Method: "/s/m"}
	obs.Waited(c, "limit", time.Second)
	obs.Refused(c, interceptor.Refuse("limit", interceptor.ReasonQueueFull, ""))
	obs.Further(c, "retry", interceptor.FurtherAttempt{Attempt: 1, Reason: "Unavailable"})
	obs.Further(c, "hedge", interceptor.FurtherAttempt{Hedge: true, Attempt: 2, Reason: "SLOW"})
	span.End()
	obs.Waited(interceptor.Observed{Context: context.Background()}, "limit", time.Second) // No span.
	var got []string
	for _, e := range spans.Ended()[0].Events() {
		got = append(got, e.Name)
		if e.Name == "belfry.picked" && e.Attributes[0].Value.AsString() != addr {
			t.Errorf("the endpoint picked is %v, want %s", e.Attributes, addr)
		}
	}
	if want := []string{"belfry.picked", "belfry.waited", "belfry.refused", "belfry.retried", "belfry.hedged"}; !slices.Equal(got, want) {
		t.Errorf("events %q, want %q", got, want)
	}
}

// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package otelobserver_test

import (
	"context"
	"errors"
	"fmt"
	"testing"
	"time"

	"go.opentelemetry.io/otel/attribute"
	sdk "go.opentelemetry.io/otel/sdk/metric"
	"go.opentelemetry.io/otel/sdk/metric/metricdata"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/belfry-go/belfry/interceptor"
	"github.com/belfry-go/belfry/interceptor/adapt"
	"github.com/belfry-go/belfry/interceptor/otelobserver"
	"github.com/belfry-go/belfry/internal/test/leaktest"
)

func TestMain(m *testing.M) { leaktest.Main(m) }

// points reads every point as "instrument{attribute=value,…}".
func points(t *testing.T, r sdk.Reader) map[string]float64 {
	t.Helper()
	var rm metricdata.ResourceMetrics
	if err := r.Collect(context.Background(), &rm); err != nil {
		t.Fatal(err)
	}
	got := map[string]float64{}
	put := func(name string, set attribute.Set, v float64) {
		got[name+"{"+set.Encoded(attribute.DefaultEncoder())+"}"] = v
	}
	for _, sm := range rm.ScopeMetrics {
		for _, m := range sm.Metrics {
			switch d := m.Data.(type) {
			case metricdata.Sum[int64]:
				for _, p := range d.DataPoints {
					put(m.Name, p.Attributes, float64(p.Value))
				}
			case metricdata.Gauge[int64]:
				for _, p := range d.DataPoints {
					put(m.Name, p.Attributes, float64(p.Value))
				}
			case metricdata.Gauge[float64]:
				for _, p := range d.DataPoints {
					put(m.Name, p.Attributes, p.Value)
				}
			case metricdata.Histogram[float64]:
				for _, p := range d.DataPoints {
					put(m.Name, p.Attributes, p.Sum)
				}
			default:
				t.Fatalf("%s: data of type %T", m.Name, d)
			}
		}
	}
	return got
}

func TestInstruments(t *testing.T) {
	reader := sdk.NewManualReader()
	provider := sdk.NewMeterProvider(sdk.WithReader(reader))
	obs, err := otelobserver.New(provider)
	if err != nil {
		t.Fatal(err)
	}
	allow := adapt.FromAllow("breaker", interceptor.ReasonBreakerOpen, func(ctx context.Context) (func(interceptor.Outcome, error), error) {
		if ctx.Value(open{}) != nil {
			return nil, errors.New("open")
		}
		return nil, nil
	})
	stack, err := interceptor.NewStack(interceptor.Observe(obs), allow)
	if err != nil {
		t.Fatal(err)
	}
	results := map[string]error{"/s/ok": nil, "/s/bad": status.Error(codes.NotFound, "")}
	invoker := func(_ context.Context, method string, _, _ any, _ *grpc.ClientConn, _ ...grpc.CallOption) error {
		return results[method]
	}
	unary := stack.UnaryClientInterceptor()
	ctx := context.Background()
	for _, method := range []string{"/s/ok", "/s/ok", "/s/bad"} {
		unary(ctx, method, nil, nil, nil, invoker)
	}
	unary(context.WithValue(ctx, open{}, true), "/s/ok", nil, nil, nil, invoker)
	obs.Waited("/s/ok", "limit", 1500*time.Millisecond)
	obs.Budget("retry", 12.5)
	obs.HedgeFired(t.Context(), "/s/ok", "hedge")
	obs.HedgeWon(t.Context(), "/s/ok", "hedge")
	obs.Further(t.Context(), "/s/ok", "retry", interceptor.FurtherAttempt{Attempt: 1, Reason: "Unavailable"})
	obs.Attempt("/s/ok", 2)

	got := points(t, reader)
	want := map[string]float64{
		"belfry.admitted{belfry.attempt=first,belfry.kind=unary,rpc.method=/s/ok}":                         2,
		"belfry.admitted{belfry.attempt=first,belfry.kind=unary,rpc.method=/s/bad}":                        1,
		"belfry.attempts{belfry.attempt=first,rpc.method=/s/ok}":                                           2,
		"belfry.attempts{belfry.attempt=further,rpc.method=/s/ok}":                                         1,
		"belfry.attempts{belfry.attempt=first,rpc.method=/s/bad}":                                          1,
		"belfry.calls{belfry.kind=unary,belfry.outcome=ok,rpc.grpc.status=OK,rpc.method=/s/ok}":            2,
		"belfry.calls{belfry.kind=unary,belfry.outcome=failed,rpc.grpc.status=NotFound,rpc.method=/s/bad}": 1,
		"belfry.refused{belfry.layer=breaker,belfry.reason=BREAKER_OPEN,rpc.method=/s/ok}":                 1,
		"belfry.in_flight{}": 0,
		"belfry.wait{belfry.layer=limit,rpc.method=/s/ok}":                                       1.5,
		"belfry.budget.balance{belfry.layer=retry}":                                              12.5,
		"belfry.hedges.fired{belfry.layer=hedge,rpc.method=/s/ok}":                               1,
		"belfry.further_attempts{belfry.layer=retry,belfry.reason=Unavailable,rpc.method=/s/ok}": 1,
		"belfry.hedges.won{belfry.layer=hedge,rpc.method=/s/ok}":                                 1,
	}
	for k, v := range want {
		if g, ok := got[k]; !ok || g != v {
			t.Errorf("%s = %v (present: %v), want %v", k, g, ok, v)
		}
	}
	for k := range got {
		if _, ok := want[k]; !ok {
			t.Errorf("unexpected point %s", k)
		}
	}
}

type open struct{}

func TestMaxMethods(t *testing.T) {
	reader := sdk.NewManualReader()
	obs, err := otelobserver.New(sdk.NewMeterProvider(sdk.WithReader(reader)))
	if err != nil {
		t.Fatal(err)
	}
	const further = 50
	for range 2 {
		for i := range otelobserver.MaxMethods + further {
			obs.Attempt(fmt.Sprintf("/s/m%d", i), 0)
		}
	}
	obs.Refused("/s/m0", "limit", interceptor.ReasonConcurrency)
	obs.Refused("/s/new", "limit", interceptor.ReasonConcurrency)
	got := points(t, reader)
	for name, want := range map[string]float64{
		"belfry.attempts{belfry.attempt=first,rpc.method=/s/m0}":                        2,
		"belfry.attempts{belfry.attempt=first,rpc.method=other}":                        2 * further,
		"belfry.refused{belfry.layer=limit,belfry.reason=CONCURRENCY,rpc.method=/s/m0}": 1,
		"belfry.refused{belfry.layer=limit,belfry.reason=CONCURRENCY,rpc.method=other}": 1,
	} {
		if got[name] != want {
			t.Errorf("%s = %v, want %v", name, got[name], want)
		}
	}
	if n := len(got); n != otelobserver.MaxMethods+3 {
		t.Errorf("%d points, want %d", n, otelobserver.MaxMethods+3)
	}
}

func TestNilProvider(t *testing.T) {
	if _, err := otelobserver.New(nil); err == nil {
		t.Error("New(nil) returned no error")
	}
}

// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package otelobserver_test

import (
	"context"
	"errors"
	"fmt"
	"runtime"
	"strings"
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
					put(m.Name+".count", p.Attributes, float64(p.Count))
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
	stack, err := interceptor.NewStack(interceptor.Named("orders"), interceptor.Observe(obs), allow)
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
		unary(ctx, method, nil, nil, nil, invoker, grpc.StaticMethod())
	}
	unary(ctx, "/s/ok", nil, nil, nil, invoker) // Not by generated code.
	unary(context.WithValue(ctx, open{}, true), "/s/ok", nil, nil, nil, invoker, grpc.StaticMethod())
	c := interceptor.Observed{Context: ctx, Stack: "orders", Method: "/s/ok", Static: true, Attempt: 1}
	obs.Waited(c, "limit", 1500*time.Millisecond)
	obs.HedgeWon(c, "hedge")
	obs.Further(c, "retry", interceptor.FurtherAttempt{Attempt: 1, Reason: "Unavailable", Delay: 250 * time.Millisecond})
	obs.Further(c, "hedge", interceptor.FurtherAttempt{Hedge: true, Attempt: 2, Reason: "SLOW"})
	obs.Attempt(c)

	got := points(t, reader)
	const ok, bad, unknown = ",grpc.method=s/ok", ",grpc.method=s/bad", ",grpc.method=other"
	want := map[string]float64{
		"belfry.attempt.started{belfry.attempt=first,belfry.stack=orders" + ok + "}":                                                     2,
		"belfry.attempt.started{belfry.attempt=further,belfry.stack=orders" + ok + "}":                                                   1,
		"belfry.attempt.started{belfry.attempt=first,belfry.stack=orders" + bad + "}":                                                    1,
		"belfry.attempt.started{belfry.attempt=first,belfry.stack=orders" + unknown + "}":                                                1,
		"belfry.attempt.duration.count{belfry.attempt=first,belfry.outcome=ok,belfry.stack=orders" + ok + ",grpc.status=OK}":             2,
		"belfry.attempt.duration.count{belfry.attempt=first,belfry.outcome=ok,belfry.stack=orders" + unknown + ",grpc.status=OK}":        1,
		"belfry.attempt.duration.count{belfry.attempt=first,belfry.outcome=failed,belfry.stack=orders" + bad + ",grpc.status=NOT_FOUND}": 1,
		"belfry.call.duration.count{belfry.kind=unary,belfry.outcome=ok,belfry.stack=orders" + ok + ",grpc.status=OK}":                   2,
		"belfry.call.duration.count{belfry.kind=unary,belfry.outcome=ok,belfry.stack=orders" + unknown + ",grpc.status=OK}":              1,
		"belfry.call.duration.count{belfry.kind=unary,belfry.outcome=failed,belfry.stack=orders" + bad + ",grpc.status=NOT_FOUND}":       1,
		"belfry.call.duration.count{belfry.kind=unary,belfry.outcome=not_sent,belfry.stack=orders" + ok + ",grpc.status=UNAVAILABLE}":    1,
		"belfry.refused{belfry.layer=breaker,belfry.reason=BREAKER_OPEN,belfry.stack=orders" + ok + "}":                                  1,
		"belfry.in_flight{belfry.stack=orders}":                                                           0,
		"belfry.wait{belfry.layer=limit,belfry.stack=orders" + ok + "}":                                   1.5,
		"belfry.wait.count{belfry.layer=limit,belfry.stack=orders" + ok + "}":                             1,
		"belfry.call.retries{belfry.layer=retry,belfry.reason=Unavailable,belfry.stack=orders" + ok + "}": 1,
		"belfry.call.retry_delay{belfry.layer=retry,belfry.stack=orders" + ok + "}":                       0.25,
		"belfry.call.retry_delay.count{belfry.layer=retry,belfry.stack=orders" + ok + "}":                 1,
		"belfry.call.hedges{belfry.layer=hedge,belfry.reason=SLOW,belfry.stack=orders" + ok + "}":         1,
		"belfry.call.hedges_won{belfry.layer=hedge,belfry.stack=orders" + ok + "}":                        1,
	}
	for k, v := range want {
		if g, ok := got[k]; !ok || g != v {
			t.Errorf("%s = %v (present: %v), want %v", k, g, ok, v)
		}
	}
	for k := range got {
		if _, ok := want[k]; !ok && !strings.Contains(k, ".duration{") {
			t.Errorf("unexpected point %s", k)
		}
	}
	runtime.KeepAlive(stack)
}

type open struct{}

func TestMaxMethods(t *testing.T) {
	reader := sdk.NewManualReader()
	obs, err := otelobserver.New(sdk.NewMeterProvider(sdk.WithReader(reader)))
	if err != nil {
		t.Fatal(err)
	}
	const further = 50
	call := func(i int) interceptor.Observed {
		return interceptor.Observed{Context: t.Context(), Stack: "s", Method: fmt.Sprintf("/s/m%d", i), Static: true}
	}
	for range 2 {
		for i := range otelobserver.MaxMethods + further {
			obs.Attempt(call(i))
		}
	}
	r := interceptor.Refuse("limit", interceptor.ReasonConcurrency, "")
	obs.Refused(call(0), r)
	obs.Refused(call(otelobserver.MaxMethods+further), r)
	got := points(t, reader)
	for name, want := range map[string]float64{
		"belfry.attempt.started{belfry.attempt=first,belfry.stack=s,grpc.method=s/m0}":                  2,
		"belfry.attempt.started{belfry.attempt=first,belfry.stack=s,grpc.method=other}":                 2 * further,
		"belfry.refused{belfry.layer=limit,belfry.reason=CONCURRENCY,belfry.stack=s,grpc.method=s/m0}":  1,
		"belfry.refused{belfry.layer=limit,belfry.reason=CONCURRENCY,belfry.stack=s,grpc.method=other}": 1,
	} {
		if got[name] != want {
			t.Errorf("%s = %v, want %v", name, got[name], want)
		}
	}
	if n := len(got); n != otelobserver.MaxMethods+3 {
		t.Errorf("%d points, want %d", n, otelobserver.MaxMethods+3)
	}
}

// Fifty thousand names that no generated code has cost what one costs.
func TestForwardedMethodsAreOne(t *testing.T) {
	obs, reader := newObserver(t)
	for i := range 50_000 {
		c := interceptor.Observed{Context: t.Context(), Stack: "proxy", Method: fmt.Sprintf("/s/m%d", i)}
		obs.Attempt(c)
		obs.Ended(c, interceptor.ObservedEnd{})
	}
	got := points(t, reader)
	if n := got["belfry.attempt.started{belfry.attempt=first,belfry.stack=proxy,grpc.method=other}"]; n != 50_000 || len(got) != 3 {
		t.Errorf("%d points, %v attempts of other methods, want 3 points and 50000", len(got), n)
	}
}

func TestNilProvider(t *testing.T) {
	if _, err := otelobserver.New(nil); err == nil {
		t.Error("New(nil) returned no error")
	}
}

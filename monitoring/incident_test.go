// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package monitoring

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	otelprom "go.opentelemetry.io/otel/exporters/prometheus"
	sdk "go.opentelemetry.io/otel/sdk/metric"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/grpclog"
	"google.golang.org/grpc/resolver"
	"google.golang.org/grpc/status"

	"github.com/belfry-go/belfry"
	"github.com/belfry-go/belfry/debug"
	"github.com/belfry-go/belfry/interceptor"
	"github.com/belfry-go/belfry/interceptor/breaker"
	"github.com/belfry-go/belfry/interceptor/budget"
	"github.com/belfry-go/belfry/interceptor/buffer"
	"github.com/belfry-go/belfry/interceptor/concurrency"
	"github.com/belfry-go/belfry/interceptor/otelobserver"
	"github.com/belfry-go/belfry/interceptor/retry"
	"github.com/belfry-go/belfry/internal/testserver"
	testingv1 "github.com/belfry-go/belfry/proto/belfry/testing/v1"
	"github.com/belfry-go/belfry/resolver/discover"
)

// logged is what was logged.
type logged struct {
	mu   sync.Mutex
	text bytes.Buffer
}

func (l *logged) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.Write(p)
}

func (l *logged) has(pattern string) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return regexp.MustCompile(pattern).Match(l.text.Bytes())
}

var log logged

func TestMain(m *testing.M) {
	grpclog.SetLoggerV2(grpclog.NewLoggerV2(io.Discard, &log, &log))
	os.Exit(m.Run())
}

func dial(t *testing.T, target string, stack *interceptor.Stack, src discover.Source) testingv1.TestServiceClient {
	t.Helper()
	conn, err := grpc.NewClient(target, append(belfry.DialOptions(stack), discover.WithSource(src),
		grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithDefaultServiceConfig(`{"loadBalancingConfig":[{"belfry.p2c":{"failureAccrual":{"baseTime":"300s","maxTime":"300s","slow":5}}}]}`))...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	conn.Connect()
	return testingv1.NewTestServiceClient(conn)
}

// One endpoint is slow, one fails, a limit is too low, and the source of another channel is
// down. The page, the metrics, the log and the alerts each name all four.
func TestIncident(t *testing.T) {
	registry, obs := observer(t)
	page := debug.New()
	newStack := func(name string, specs ...interceptor.Spec) *interceptor.Stack {
		s, err := interceptor.NewStack(append(specs, interceptor.Named(name), interceptor.Observe(obs, page))...)
		if err != nil {
			t.Fatal(err)
		}
		return s
	}
	var servers []*testserver.Server
	var eps []resolver.Endpoint
	for range 5 {
		s := testserver.New(t, testserver.ServiceTime(testserver.Fixed(4*time.Millisecond)))
		servers = append(servers, s)
		eps = append(eps, discover.MustEndpoint(s.Addr()))
	}
	slow, failing := servers[0], servers[1]
	src, err := discover.List(eps...)
	if err != nil {
		t.Fatal(err)
	}
	down, err := discover.Poll(func(context.Context) ([]resolver.Endpoint, error) { return nil, errors.New("registry is down") }, time.Minute)
	if err != nil {
		t.Fatal(err)
	}
	orders := dial(t, "belfry:///orders", newStack("orders"), src)
	tight := dial(t, "belfry:///tight", newStack("tight", buffer.Config{Size: 1}, concurrency.Config{Limit: 1}), src)
	dial(t, "belfry:///users", newStack("users"), down)

	ctx, stop := context.WithCancel(t.Context())
	var callers sync.WaitGroup
	defer callers.Wait()
	defer stop()
	for i := range 8 {
		client := orders
		if i%2 == 0 {
			client = tight
		}
		callers.Go(func() {
			for ctx.Err() == nil {
				client.Unary(ctx, &testingv1.UnaryRequest{})
				select {
				case <-time.After(5 * time.Millisecond):
				case <-ctx.Done():
				}
			}
		})
	}
	shown := func() (s struct {
		FailingSources []struct{ Target, Error string }
		Policies       []struct {
			Target    string
			Endpoints []struct {
				Address, State, AsideWhy string
				Samples, Latency         float64
				Picks                    uint64
			}
		}
		Stacks  []struct{ Name string }
		Refused []struct{ Stack, Layer, Reason string }
	}) {
		w := httptest.NewRecorder()
		page.ServeHTTP(w, httptest.NewRequest("GET", "/?json", nil))
		if err := json.Unmarshal(w.Body.Bytes(), &s); err != nil {
			t.Fatal(err)
		}
		return s
	}
	until := func(what string, ok func() bool) {
		t.Helper()
		for end := time.Now().Add(2 * time.Minute); !ok(); time.Sleep(20 * time.Millisecond) {
			if time.Now().After(end) {
				t.Fatalf("the page does not show %s: %+v", what, shown())
			}
		}
	}
	endpoint := func(addr string, ok func(state, why string, picks uint64) bool) func() bool {
		return func() bool {
			for _, p := range shown().Policies {
				for _, e := range p.Endpoints {
					if p.Target == "belfry:///orders" && e.Address == addr && ok(e.State, e.AsideWhy, e.Picks) {
						return true
					}
				}
			}
			return false
		}
	}
	for _, s := range servers {
		until("calls at every endpoint", endpoint(s.Addr(), func(_, _ string, picks uint64) bool { return picks >= 20 }))
	}
	if err := errors.Join(slow.SetSpeed(0.02), failing.Fail(codes.Unavailable, 1)); err != nil {
		t.Fatal(err)
	}
	until("the failing endpoint", endpoint(failing.Addr(), func(state, why string, _ uint64) bool {
		return state == "ASIDE" && strings.Contains(why, "in a row failed")
	}))
	until("the slow endpoint", endpoint(slow.Addr(), func(state, why string, _ uint64) bool {
		return state == "ASIDE" && strings.Contains(why, "took longer than")
	}))
	until("the limit that is too low", func() bool {
		for _, r := range shown().Refused {
			if r.Stack == "tight" && r.Reason == "QUEUE_FULL" {
				return true
			}
		}
		return false
	})
	until("the source that is down", func() bool {
		f := shown().FailingSources
		return len(f) == 1 && f[0].Target == "belfry:///users" && strings.Contains(f[0].Error, "registry is down")
	})

	metrics := scrape(registry)
	for _, want := range []string{
		`(?m)^belfry_endpoint_aside(_ratio)?\{belfry_endpoint="` + failing.Addr() + `".*target="belfry:///orders".*\} 1$`,
		`(?m)^belfry_endpoint_latency_seconds\{belfry_endpoint="` + slow.Addr() + `"`,
		`(?m)^belfry_endpoints\{belfry_state="ASIDE".*target="belfry:///orders"\} 2$`,
		`(?m)^belfry_refused_total\{belfry_layer="buffer",belfry_reason="QUEUE_FULL",belfry_stack="tight"`,
		`(?m)^belfry_limit\{belfry_layer="concurrency",belfry_stack="tight"\} 1$`,
		`(?m)^belfry_source_failing\{grpc_target="belfry:///users"\} 1$`,
	} {
		if !regexp.MustCompile(want).MatchString(metrics) {
			t.Errorf("no metric matches %s in\n%s", want, metrics)
		}
	}
	for _, want := range []string{
		`WARNING.*orders: endpoint ` + failing.Addr() + ` is put aside .* in a row failed`,
		`WARNING.*orders: endpoint ` + slow.Addr() + ` is put aside .* took longer than`,
		`WARNING.*watching belfry:///users: .*registry is down`,
	} {
		if !log.has(want) {
			t.Errorf("no line of the log matches %s", want)
		}
	}

	dashboardKnows(t, metrics)
	fires(t, metrics, map[string]string{
		"BelfryEndpointsDown": `grpc_target="belfry:///orders"`,
		"BelfryEndpointSlow":  `belfry_endpoint="` + slow.Addr() + `"`,
		"BelfryRefusing":      `belfry_stack="tight",belfry_reason="QUEUE_FULL"`,
		"BelfrySourceFailing": `grpc_target="belfry:///users"`,
	}, "BelfryCircuitOpen", "BelfryBudgetSpent")
}

// held is a connection whose calls end when it is closed, and fail at once if it is nil.
type held chan struct{}

func (h held) Invoke(context.Context, string, any, any, ...grpc.CallOption) error {
	if h == nil {
		return status.Error(codes.Unavailable, "down")
	}
	<-h
	return nil
}

func (h held) NewStream(context.Context, *grpc.StreamDesc, string, ...grpc.CallOption) (grpc.ClientStream, error) {
	return nil, status.Error(codes.Unimplemented, "no streams")
}

// Calls wait for a limit, a circuit is open, and a budget is spent.
func TestAlertsOfLayers(t *testing.T) {
	var metrics string
	synctest.Test(t, func(t *testing.T) {
		registry, obs := observer(t)
		wrap := func(name string, conn held, specs ...interceptor.Spec) grpc.ClientConnInterface {
			s, err := interceptor.NewStack(append(specs, interceptor.Named(name), interceptor.Observe(obs))...)
			if err != nil {
				t.Fatal(err)
			}
			return s.Wrap(conn)
		}
		ctx := t.Context()
		conn := make(held)
		waits := wrap("waits", conn, concurrency.Config{Limit: 1})
		var callers sync.WaitGroup
		for range 2 {
			callers.Go(func() { waits.Invoke(ctx, "/s/m", nil, nil) })
		}
		open := wrap("open", nil, breaker.Config{ConsecutiveFailures: 1})
		spent := wrap("spent", nil, retry.Config{MaxAttempts: 2, AllMethods: true, Budget: budget.Config{TTL: time.Minute, Ratio: 0.001, MinPerSecond: 1}})
		for range 100 {
			open.Invoke(ctx, "/s/m", nil, nil)
			spent.Invoke(ctx, "/s/m", nil, nil)
		}
		synctest.Wait()
		metrics = scrape(registry)
		close(conn)
		callers.Wait()
		runtime.KeepAlive([]any{waits, open, spent})
	})
	fires(t, metrics, map[string]string{
		"BelfryCallsWait":   `belfry_stack="waits"`,
		"BelfryCircuitOpen": `belfry_stack="open"`,
		"BelfryBudgetSpent": `belfry_stack="spent"`,
	}, "BelfryEndpointsDown", "BelfryEndpointSlow", "BelfrySourceFailing")
}

// observer returns an observer, and where Prometheus has its metrics from.
func observer(t *testing.T) (*prometheus.Registry, *otelobserver.Observer) {
	t.Helper()
	registry := prometheus.NewRegistry()
	exporter, err := otelprom.New(otelprom.WithRegisterer(registry), otelprom.WithoutScopeInfo())
	if err != nil {
		t.Fatal(err)
	}
	obs, err := otelobserver.New(sdk.NewMeterProvider(sdk.WithReader(exporter)), otelobserver.WithEndpoints(100))
	if err != nil {
		t.Fatal(err)
	}
	return registry, obs
}

// scrape returns what Prometheus would read.
func scrape(registry *prometheus.Registry) string {
	w := httptest.NewRecorder()
	promhttp.HandlerFor(registry, promhttp.HandlerOpts{}).ServeHTTP(w, httptest.NewRequest("GET", "/", nil))
	return w.Body.String()
}

// dashboardKnows checks that the dashboard asks for metrics that there are. Those that nothing
// in the incident makes are named here.
func dashboardKnows(t *testing.T, metrics string) {
	t.Helper()
	b, err := os.ReadFile("dashboard.json")
	if err != nil {
		t.Fatal(err)
	}
	if !json.Valid(b) {
		t.Fatal("dashboard.json is not JSON")
	}
	absent := "belfry_call_retries_total belfry_call_hedges_total belfry_circuits belfry_budget_balance "
	for _, m := range regexp.MustCompile(`belfry_(call|attempt|refused|wait|limit|circuits|budget|endpoint|source|in_flight)[a-z_]*`).FindAllString(string(b), -1) {
		if !strings.Contains(metrics, "\n"+m+"{") && !strings.Contains(absent, m+" ") && m != "belfry_endpoint_share" && m != "belfry_endpoint" {
			t.Errorf("the dashboard asks for %s, which does not exist", m)
		}
	}
}

// fires checks with Prometheus that alerts fire ten minutes after the metrics became what
// they are, and that others do not. A counter has grown by its value each minute.
func fires(t *testing.T, metrics string, alerts map[string]string, quiet ...string) {
	t.Helper()
	promtool, err := exec.LookPath("promtool")
	if err != nil {
		t.Log("no promtool found, so the alerts are not checked: install one (apt-get install prometheus)")
		return
	}
	rules, err := filepath.Abs("alerts.yaml")
	if err != nil {
		t.Fatal(err)
	}
	var b strings.Builder
	fmt.Fprintf(&b, "rule_files: [%q]\nevaluation_interval: 1m\ntests:\n- interval: 1m\n  input_series:\n", rules)
	for _, line := range strings.Split(metrics, "\n") {
		i := strings.LastIndexByte(line, ' ')
		if i < 0 || !strings.HasPrefix(line, "belfry_") || strings.Contains(line, "_bucket{") {
			continue
		}
		values := line[i+1:] + "x20"
		if strings.Contains(line, "_total{") {
			values = "0+" + values
		}
		fmt.Fprintf(&b, "  - {series: %q, values: %q}\n", line[:i], values)
	}
	b.WriteString("  promql_expr_test:\n")
	expect := func(alert, labels string, n int) {
		fmt.Fprintf(&b, "  - {expr: %q, eval_time: 10m, exp_samples: [{labels: '{}', value: %d}]}\n",
			fmt.Sprintf(`count(ALERTS{alertname=%q,alertstate="firing"%s}) > bool 0 or vector(0)`, alert, labels), n)
	}
	for alert, labels := range alerts {
		expect(alert, ","+labels, 1)
	}
	for _, alert := range quiet {
		expect(alert, "", 0)
	}
	file := filepath.Join(t.TempDir(), "test.yaml")
	if err := os.WriteFile(file, []byte(b.String()), 0o600); err != nil {
		t.Fatal(err)
	}
	if out, err := exec.Command(promtool, "test", "rules", file).CombinedOutput(); err != nil {
		t.Errorf("promtool: %v\n%s\nof the metrics\n%s", err, out, metrics)
	}
}

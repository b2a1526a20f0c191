// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package xdstest

import (
	"context"
	"encoding/json"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/sdk/metric"
	"go.opentelemetry.io/otel/sdk/metric/metricdata"
	"google.golang.org/grpc"
	"google.golang.org/grpc/balancer"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/resolver"
	"google.golang.org/grpc/serviceconfig"
	"google.golang.org/grpc/stats"
	"google.golang.org/grpc/stats/opentelemetry"

	"github.com/belfry-go/belfry/balancer/p2c"
	"github.com/belfry-go/belfry/internal/test/leaktest"
	"github.com/belfry-go/belfry/internal/testserver"
	testingv1 "github.com/belfry-go/belfry/proto/belfry/testing/v1"
)

func TestMain(m *testing.M) {
	// From here on the policy under its own name is the real one that notes what
	// config it gets.
	balancer.Register(&given)
	leaktest.Main(m)
}

// given is the policy as it is registered in this process, as grpc's registry
// is one for all tests.
var given = notingBuilder{Builder: balancer.Get(p2c.Name)}

// notingBuilder builds the real policy and notes the configs that it is given.
type notingBuilder struct {
	balancer.Builder

	mu       sync.Mutex // guards policies
	policies []*notingPolicy
}

func (b *notingBuilder) Build(cc balancer.ClientConn, opts balancer.BuildOptions) balancer.Balancer {
	p := &notingPolicy{Balancer: b.Builder.Build(cc, opts), target: opts.Target.Endpoint()}
	b.mu.Lock()
	defer b.mu.Unlock()
	b.policies = append(b.policies, p)
	return p
}

func (b *notingBuilder) ParseConfig(js json.RawMessage) (serviceconfig.LoadBalancingConfig, error) {
	return b.Builder.(balancer.ConfigParser).ParseConfig(js)
}

// configs returns the last config of each policy that was built for a target,
// in JSON.
func (b *notingBuilder) configs(target string) []string {
	b.mu.Lock()
	defer b.mu.Unlock()
	var configs []string
	for _, p := range b.policies {
		if p.target == target {
			configs = append(configs, p.lastConfig())
		}
	}
	return configs
}

type notingPolicy struct {
	balancer.Balancer
	target string

	mu     sync.Mutex // guards config; taken with notingBuilder.mu held, never before it
	config string
}

func (p *notingPolicy) UpdateClientConnState(s balancer.ClientConnState) error {
	js, err := json.Marshal(s.BalancerConfig)
	if err != nil {
		js = []byte(err.Error())
	}
	p.mu.Lock()
	p.config = string(js)
	p.mu.Unlock()
	return p.Balancer.UpdateClientConnState(s)
}

func (p *notingPolicy) lastConfig() string {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.config
}

// targets numbers targets, so that each channel has one of its own.
var targets atomic.Int64

func newTarget(t *testing.T) string { return fmt.Sprintf("%s-%d", t.Name(), targets.Add(1)) }

// channel is a real channel with the policy, to real servers on loopback.
type channel struct {
	t       *testing.T
	servers []*testserver.Server
	conn    *grpc.ClientConn
	client  testingv1.TestServiceClient
	target  string // without its scheme
	metrics *metric.ManualReader
}

// newServers starts n servers.
func newServers(t *testing.T, n int) []*testserver.Server {
	t.Helper()
	return testserver.NewCluster(t, n, nil).Servers()
}

// dial opens a channel to the servers, which the resolver for the scheme is to
// find under the target.
func dial(t *testing.T, servers []*testserver.Server, scheme, target string, opts ...grpc.DialOption) *channel {
	t.Helper()
	reader := metric.NewManualReader()
	opts = append(opts, grpc.WithTransportCredentials(insecure.NewCredentials()), opentelemetry.DialOption(opentelemetry.Options{
		MetricsOptions: opentelemetry.MetricsOptions{
			MeterProvider:  metric.NewMeterProvider(metric.WithReader(reader)),
			Metrics:        stats.NewMetricSet("belfry.lb.p2c.picks", "belfry.lb.p2c.endpoints"),
			OptionalLabels: []string{"grpc.lb.locality"},
		},
	}))
	conn, err := grpc.NewClient(scheme+":///"+target, append(opts, p2c.DialOptions()...)...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return &channel{t, servers, conn, testingv1.NewTestServiceClient(conn), target, reader}
}

// testContext returns a context that ends long after a test should have, even on a
// busy machine.
func testContext(t *testing.T) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
	t.Cleanup(cancel)
	return ctx
}

func must[T any](v T, err error) T {
	if err != nil {
		panic(err)
	}
	return v
}

func endpointsOf(servers []*testserver.Server) []resolver.Endpoint {
	var es []resolver.Endpoint
	for _, s := range servers {
		es = append(es, s.Endpoint())
	}
	return es
}

// counts makes n calls, one after the other, and returns how many each server
// answered. It fails the test if one fails.
func (c *channel) counts(n int) map[string]int {
	c.t.Helper()
	ctx := testContext(c.t)
	m := make(map[string]int)
	for range n {
		r, err := c.client.Unary(ctx, &testingv1.UnaryRequest{}, grpc.WaitForReady(true))
		if err != nil {
			c.t.Fatalf("call: %v", err)
		}
		m[r.GetObserved().GetServer()]++
	}
	return m
}

// until makes calls until cond holds after a batch of n; failing calls are
// allowed and count under "".
func (c *channel) until(what string, n int, cond func(map[string]int) bool) {
	c.t.Helper()
	ctx := testContext(c.t)
	for {
		m := make(map[string]int)
		for range n {
			r, _ := c.client.Unary(ctx, &testingv1.UnaryRequest{})
			m[r.GetObserved().GetServer()]++
		}
		if cond(m) {
			return
		}
		if ctx.Err() != nil {
			c.t.Fatalf("waiting until %s: last %d calls by server were %v, endpoints by state %v", what, n, m, c.endpoints())
		}
	}
}

// allReady waits until every endpoint is READY to the policy.
func (c *channel) allReady() {
	c.t.Helper()
	c.until("all endpoints are READY", 1, func(map[string]int) bool { return c.endpoints()["READY"] == len(c.servers) })
}

// endpoints returns the number of endpoints by state, as the policy's metric
// has it.
func (c *channel) endpoints() map[string]int {
	return c.metric("belfry.lb.p2c.endpoints", "belfry.lb.p2c.endpoint_state")
}

// metric returns the values of a sum by one of its labels, those that are not
// zero.
func (c *channel) metric(name, label string) map[string]int {
	c.t.Helper()
	var all metricdata.ResourceMetrics
	if err := c.metrics.Collect(context.Background(), &all); err != nil {
		c.t.Fatalf("collect metrics: %v", err)
	}
	values := make(map[string]int)
	for _, scope := range all.ScopeMetrics {
		i := slices.IndexFunc(scope.Metrics, func(m metricdata.Metrics) bool { return m.Name == name })
		if i < 0 {
			continue
		}
		for _, point := range scope.Metrics[i].Data.(metricdata.Sum[int64]).DataPoints {
			if v, _ := point.Attributes.Value(attribute.Key(label)); point.Value != 0 {
				values[v.AsString()] += int(point.Value)
			}
		}
	}
	return values
}

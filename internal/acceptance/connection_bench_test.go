// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package acceptance

import (
	"context"
	"io"
	"testing"
	"time"

	"google.golang.org/grpc"

	"github.com/belfry-go/belfry"
	"github.com/belfry-go/belfry/balancer/p2c"
	"github.com/belfry-go/belfry/interceptor"
	"github.com/belfry-go/belfry/interceptor/breaker"
	"github.com/belfry-go/belfry/interceptor/buffer"
	"github.com/belfry-go/belfry/interceptor/concurrency"
	"github.com/belfry-go/belfry/interceptor/failfast"
	"github.com/belfry-go/belfry/interceptor/filter"
	"github.com/belfry-go/belfry/interceptor/hedge"
	"github.com/belfry-go/belfry/interceptor/loadshed"
	"github.com/belfry-go/belfry/interceptor/mapping"
	"github.com/belfry-go/belfry/interceptor/ratelimit"
	"github.com/belfry-go/belfry/interceptor/retry"
	"github.com/belfry-go/belfry/interceptor/throttle"
	"github.com/belfry-go/belfry/interceptor/timeout"
	"github.com/belfry-go/belfry/internal/test/calltest"
	"github.com/belfry-go/belfry/internal/test/race"
	"github.com/belfry-go/belfry/internal/testserver"
	testingv1 "github.com/belfry-go/belfry/proto/belfry/testing/v1"
)

// A connCase is a way to dial a server.
type connCase struct {
	name  string
	bare  bool // No stack.
	p2c   bool
	specs []interceptor.Spec
}

// connCases are the rows of the table that BenchmarkConnection makes. The timeout
// tightens no deadline, and the hedge makes no extra attempt.
func connCases() []connCase {
	limit := concurrency.Config{Limit: 1000}
	repeats := retry.Config{AllMethods: true}
	hedges := hedge.Config{AllMethods: true, Delay: time.Hour}
	pass := filter.Predicate(func(context.Context, *interceptor.Call, any) (context.Context, error) { return nil, nil })
	same := mapping.Error(func(_ context.Context, _ string, err error) error { return err })
	return []connCase{
		{name: "bare", bare: true},
		{name: "empty_stack"},
		{name: "timeout", specs: []interceptor.Spec{timeout.Config{Timeout: time.Hour, Lifetime: time.Hour}}},
		{name: "timeout_that_tightens", specs: []interceptor.Spec{timeout.Config{Timeout: time.Minute, Lifetime: time.Minute}}},
		{name: "limit", specs: []interceptor.Spec{limit}},
		{name: "rate", specs: []interceptor.Spec{ratelimit.Config{Limit: 1e9, Burst: 1e9}}},
		{name: "buffer_limit", specs: []interceptor.Spec{buffer.Config{Size: 100}, limit}},
		{name: "shed_limit", specs: []interceptor.Spec{loadshed.Config{}, limit}},
		{name: "failfast_limit", specs: []interceptor.Spec{failfast.Config{}, limit}},
		{name: "throttle", specs: []interceptor.Spec{throttle.Config{}}},
		{name: "breaker", specs: []interceptor.Spec{breaker.Config{}}},
		{name: "filter", specs: []interceptor.Spec{pass}},
		{name: "mapping", specs: []interceptor.Spec{same}},
		{name: "retry", specs: []interceptor.Spec{repeats}},
		{name: "retry_of_no_method", specs: []interceptor.Spec{retry.Config{}}},
		{name: "hedge", specs: []interceptor.Spec{hedges}},
		{name: "hedge_of_no_method", specs: []interceptor.Spec{hedge.Config{Delay: time.Hour}}},
		{name: "hedge_retry", specs: []interceptor.Spec{hedges, repeats}},
		{name: "p2c", bare: true, p2c: true},
		{name: "retry_p2c", p2c: true, specs: []interceptor.Spec{repeats}},
		{name: "hedge_retry_p2c", p2c: true, specs: []interceptor.Spec{hedges, repeats}},
	}
}

// dial returns functions that make one call of each kind on a connection to a real server.
// They have run often enough for pools and windows to be filled.
func (c connCase) dial(t testing.TB) (unary, bidi func()) {
	var opts []grpc.DialOption
	if !c.bare {
		opts = append(opts, calltest.Stack(t, c.specs...).DialOptions()...)
	}
	if c.p2c {
		opts = append(opts, p2c.DialOptions()...)
		opts = append(opts, grpc.WithDefaultServiceConfig(`{"loadBalancingConfig":[{"belfry.p2c":{}}]}`))
	}
	conn := testserver.Dial(t, testserver.New(t), opts...)
	if err := belfry.WaitReady(testContext(t), conn); err != nil { // For a load shed.
		t.Fatal(err)
	}
	client := testingv1.NewTestServiceClient(conn)
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Minute)
	t.Cleanup(cancel)
	unary = func() {
		if _, err := client.Unary(ctx, &testingv1.UnaryRequest{}); err != nil {
			t.Fatal(err)
		}
	}
	bidi = func() {
		s, err := client.Bidi(ctx)
		if err != nil {
			t.Fatal(err)
		}
		if err := s.Send(&testingv1.BidiRequest{}); err != nil {
			t.Fatal(err)
		}
		if _, err := s.Recv(); err != nil {
			t.Fatal(err)
		}
		s.CloseSend()
		if _, err := s.Recv(); err != io.EOF {
			t.Fatal(err)
		}
	}
	for range 100 {
		unary()
		bidi()
	}
	return unary, bidi
}

// BenchmarkConnection makes calls on a connection to a real server in this process, whose
// allocations count too: what a layer costs is the difference to bare. For a table, with
// counts that vary by less than one:
//
//	go test -run='^$' -bench=Connection -benchmem -benchtime=5000x ./internal/acceptance
func BenchmarkConnection(b *testing.B) {
	for _, kind := range []string{"unary", "bidi"} {
		for _, c := range connCases() {
			b.Run(kind+"/"+c.name, func(b *testing.B) {
				call, bidi := c.dial(b)
				if kind == "bidi" {
					call = bidi
				}
				b.ReportAllocs()
				for b.Loop() {
					call()
				}
			})
		}
	}
}

// The counts include the server's, which vary by less than one in a thousand calls.
func TestAllocationsOnAConnection(t *testing.T) {
	if race.Enabled {
		t.Skip("the race detector makes pools forget")
	}
	got := map[string]float64{}
	for _, c := range connCases() {
		switch c.name {
		case "bare", "retry_p2c", "hedge":
			unary, _ := c.dial(t)
			got[c.name] = testing.AllocsPerRun(1000, unary)
		}
	}
	if more := got["retry_p2c"] - got["bare"]; more > 4 {
		t.Errorf("a unary call through a retry and p2c: %v allocations more than bare, want at most 4", more)
	}
	if more := got["hedge"] - got["bare"]; more > 11 {
		t.Errorf("a unary call through a hedge that makes no extra attempt: %v allocations more than bare, want at most 11", more)
	}
}

// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package testserver

import (
	"context"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/belfry-go/belfry/internal/test/leaktest"
	testingv1 "github.com/belfry-go/belfry/proto/belfry/testing/v1"
)

func TestMain(m *testing.M) { leaktest.Main(m) }

// testContext returns a context that ends long after a test should have, even on a
// busy machine.
func testContext(t *testing.T) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
	t.Cleanup(cancel)
	return ctx
}

// dial returns a client of one server.
func dial(t *testing.T, s *Server) testingv1.TestServiceClient {
	t.Helper()
	return testingv1.NewTestServiceClient(Dial(t, s))
}

// unary makes a call with a behaviour and returns its error.
func unary(ctx context.Context, client testingv1.TestServiceClient, b *testingv1.Behaviour) error {
	_, err := client.Unary(ctx, &testingv1.UnaryRequest{Behaviour: b})
	return err
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func wantCode(t *testing.T, err error, want codes.Code) {
	t.Helper()
	if got := status.Code(err); got != want {
		t.Fatalf("code of the call: got %v (%v), want %v", got, err, want)
	}
}

// calls are unary calls in flight, by the order in which they were made.
type calls struct {
	t       *testing.T
	client  testingv1.TestServiceClient
	server  *Server
	results []chan result
}

type result struct {
	err error
	at  time.Time
}

// start makes a call and returns when the server has it.
func (c *calls) start(ctx context.Context) {
	c.t.Helper()
	done := make(chan result, 1)
	c.results = append(c.results, done)
	before := c.server.Stats().Started
	go func() {
		err := unary(ctx, c.client, nil)
		done <- result{err, time.Now()}
	}()
	must(c.t, c.server.WaitStarted(ctx, before+1))
}

// wait returns the result of call i.
func (c *calls) wait(i int) result { return <-c.results[i] }

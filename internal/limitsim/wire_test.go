// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package limitsim

import (
	"context"
	"flag"
	"fmt"
	"math"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc"

	"github.com/belfry-go/belfry/interceptor"
	"github.com/belfry-go/belfry/interceptor/concurrency"
	"github.com/belfry-go/belfry/internal/testserver"
	testingv1 "github.com/belfry-go/belfry/proto/belfry/testing/v1"
)

var wireTime = flag.Duration("wire", 0, "how long TestWire measures the table's scenarios, in virtual time; 0: a short time, and smaller ones")

// The simulation agrees with real gRPC: layers and servers in virtual time. It is a command,
// too, with the servers of the table and 3 %:
//
//	go test ./internal/limitsim -run TestWire -v -wire 5m
func TestWire(t *testing.T) {
	sc := Scenario{Workers: 20, Load: 1.2, WarmUp: time.Minute, Length: *wireTime}
	many, tolerance := 10, 0.03
	if *wireTime == 0 {
		// Such short runs are far from the mean of the simulated ones, but they are the
		// same each time, in virtual time.
		sc = Scenario{Workers: 6, Mean: 20 * time.Millisecond, Load: 1.2, WarmUp: 8 * time.Second, Length: 4 * time.Second}
		many, tolerance = 2, 0.35
	}
	sc.Mean = max(sc.Mean, 10*time.Millisecond)
	for _, clients := range []int{1, many} {
		t.Run(fmt.Sprintf("%d_clients", clients), func(t *testing.T) {
			sc.Clients = clients
			var runs []Result
			for seed := range uint64(5) {
				results, err := Row{Scenario: sc}.Run("auto", seed)
				if err != nil {
					t.Fatal(err)
				}
				runs = append(runs, results[0])
			}
			want := Mean(runs)
			var got Result
			synctest.Test(t, func(t *testing.T) { got = onWire(t, sc) })
			t.Logf("goodput %.1f %%, latency %.3f; simulated %.1f %%, %.3f", 100*got.Goodput, got.Latency, 100*want.Goodput, want.Latency)
			within := func(what string, got, want float64) {
				t.Helper()
				if math.Abs(got-want) > tolerance*want {
					t.Errorf("%s %.3f, simulated %.3f, want it within %.0f %%", what, got, want, 100*tolerance)
				}
			}
			within("goodput", got.Goodput, want.Goodput)
			within("latency", got.Latency, want.Latency)
		})
	}
}

// onWire runs an open-loop scenario with exponential work through real gRPC, for an
// algorithm that is the default.
func onWire(t *testing.T, sc Scenario) Result {
	srv := testserver.New(t, testserver.InMemory(), testserver.Workers(sc.Workers), testserver.KeepWorking(), testserver.Seed(1),
		testserver.ServiceTime(testserver.Exponential(sc.Mean)))
	var served, latency atomic.Int64
	begin := time.Now().Add(sc.WarmUp)
	end := begin.Add(sc.Length)
	var wg sync.WaitGroup
	for i := range sc.Clients {
		stack, err := interceptor.NewStack(concurrency.Config{})
		if err != nil {
			t.Fatal(err)
		}
		client := testingv1.NewTestServiceClient(testserver.Dial(t, srv, grpc.WithUnaryInterceptor(stack.UnaryClientInterceptor())))
		call := func() {
			ctx, cancel := context.WithTimeout(t.Context(), deadline)
			defer cancel()
			sent := time.Now()
			_, err := client.Unary(ctx, &testingv1.UnaryRequest{}, interceptor.WithWait(interceptor.None))
			if now := time.Now(); err == nil && !now.Before(begin) && now.Before(end) {
				served.Add(1)
				latency.Add(int64(now.Sub(sent)))
			}
		}
		wg.Go(func() {
			rng := rand.New(rand.NewPCG(1, uint64(i)))
			between := float64(sc.Mean) * float64(sc.Clients) / (sc.Load * float64(sc.Workers))
			for next := time.Now(); next.Before(end); next = next.Add(time.Duration(rng.ExpFloat64() * between)) {
				time.Sleep(time.Until(next))
				wg.Go(call)
			}
		})
	}
	wg.Wait()
	n := float64(served.Load())
	return Result{
		Goodput: n / sc.Length.Seconds() * sc.Mean.Seconds() / float64(sc.Workers),
		Latency: float64(latency.Load()) / n / float64(sc.Mean),
	}
}

// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package hedge_test

import (
	"context"
	"math/rand/v2"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/status"

	"github.com/belfry-go/belfry/interceptor/budget"
	"github.com/belfry-go/belfry/interceptor/hedge"
	"github.com/belfry-go/belfry/internal/test/calltest"
)

// Each extra attempt is made after the delay that its call began with, however the delay
// changes.
func TestDelayOfConcurrentCalls(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		seed := rand.Uint64()
		t.Logf("seed %d", seed)
		rng := rand.New(rand.NewPCG(seed, 0))
		config := func(d time.Duration) hedge.Config {
			return hedge.Config{AllMethods: true, Delay: d, MaxAttempts: 3, Budget: budget.Config{Ratio: 10, MinPerSecond: 1000}}
		}
		delay := 10 * ms
		l := mustNew(t, config(delay))
		unary := calltest.Stack(t, l).UnaryClientInterceptor()
		var wg sync.WaitGroup
		for i := range 2000 {
			if i%100 == 0 {
				synctest.Wait() // All calls know their delay.
				delay = time.Duration(1+rng.IntN(20)) * ms
				if err := l.Update(config(delay)); err != nil {
					t.Fatal(err)
				}
			}
			took, delay := time.Duration(rng.IntN(40_000))*time.Microsecond, delay
			wg.Go(func() {
				var mu sync.Mutex
				var at []time.Duration
				start := time.Now()
				err := unary(t.Context(), method, nil, nil, nil, func(ctx context.Context, _ string, _, _ any, _ *grpc.ClientConn, _ ...grpc.CallOption) error {
					mu.Lock()
					at = append(at, time.Since(start))
					d := took
					if len(at) > 1 {
						d = time.Hour
					}
					mu.Unlock()
					select {
					case <-time.After(d):
						return nil
					case <-ctx.Done():
						return status.FromContextError(ctx.Err()).Err()
					}
				})
				if err != nil {
					t.Error(err)
				}
				for i, at := range at {
					if at != time.Duration(i)*delay {
						t.Errorf("attempt %d was made after %v, want a delay of %v each", i, at, delay)
					}
				}
				// At the very end of the delay it may be made or not.
				if want := 1 + min(2, int((took-1)/delay)); len(at) < want {
					t.Errorf("%d attempts of a call that took %v, want %d", len(at), took, want)
				}
			})
			time.Sleep(time.Duration(rng.IntN(1000)) * time.Microsecond)
		}
		wg.Wait()
	})
}

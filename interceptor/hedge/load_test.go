// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package hedge_test

import (
	"context"
	"fmt"
	"math/rand/v2"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/status"

	"github.com/belfry-go/belfry/interceptor/budget"
	"github.com/belfry-go/belfry/interceptor/buffer"
	"github.com/belfry-go/belfry/interceptor/concurrency"
	"github.com/belfry-go/belfry/interceptor/hedge"
	"github.com/belfry-go/belfry/interceptor/loadshed"
	"github.com/belfry-go/belfry/interceptor/retry"
	"github.com/belfry-go/belfry/internal/test/calltest"
)

// Callers in a closed loop, a server of which one attempt in twenty takes 200 ms and
// the others 10 ms, and a limit of 20 in the order of the documentation. Twice as
// many callers as permits wait for one permit to become free, about 10 ms, and
// their extra attempts a little: p99 is that of an idle limit, 25 ms, and twice that
// wait. Without waiting no extra attempt would be made, and p99 be 220 ms.
func TestUnderLoad(t *testing.T) {
	for callers, want := range map[int]time.Duration{10: 25 * ms, 15: 25 * ms, 25: 45 * ms, 40: 55 * ms, 60: 75 * ms} {
		t.Run(fmt.Sprintf("%d_callers", callers), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				seed := rand.Uint64()
				t.Logf("seed %d", seed)
				rng := rand.New(rand.NewPCG(seed, 0))
				var mu sync.Mutex
				attempts := 0
				invoke := func(ctx context.Context, _ string, _, _ any, _ *grpc.ClientConn, _ ...grpc.CallOption) error {
					mu.Lock()
					attempts++
					d := 10 * ms
					if rng.Float64() < 0.05 {
						d = 200 * ms
					}
					mu.Unlock()
					select {
					case <-time.After(d):
						return nil
					case <-ctx.Done():
						return status.FromContextError(ctx.Err()).Err()
					}
				}
				unary := calltest.Stack(t,
					loadshed.Config{},
					hedge.Config{AllMethods: true, Delay: 15 * ms, Budget: budget.Config{Ratio: 1}},
					retry.Config{AllMethods: true},
					buffer.Config{Size: 50},
					concurrency.Config{Limit: 20},
				).UnaryClientInterceptor()
				var wg sync.WaitGroup
				var took []time.Duration
				for range callers {
					wg.Go(func() {
						for range 20_000 / callers {
							start := time.Now()
							if err := unary(t.Context(), method, nil, nil, nil, invoke); err != nil {
								t.Errorf("a call failed: %v", err)
							}
							mu.Lock()
							took = append(took, time.Since(start))
							mu.Unlock()
						}
					})
				}
				wg.Wait()
				slices.Sort(took)
				p99, extra := took[len(took)*99/100].Round(ms), float64(attempts)/float64(len(took))-1
				t.Logf("p99 %v, %.1f %% extra attempts", p99, 100*extra)
				if p99 > want {
					t.Errorf("p99 is %v, want at most %v", p99, want)
				}
				if extra < 0.04 || extra > 0.065 {
					t.Errorf("%.1f %% extra attempts, want one for each of the 5 %% that are slow", 100*extra)
				}
			})
		})
	}
}

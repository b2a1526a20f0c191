// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package retry_test

import (
	"context"
	"fmt"
	"math/rand/v2"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc"

	"github.com/belfry-go/belfry/interceptor/budget"
	"github.com/belfry-go/belfry/interceptor/buffer"
	"github.com/belfry-go/belfry/interceptor/concurrency"
	"github.com/belfry-go/belfry/interceptor/loadshed"
	"github.com/belfry-go/belfry/interceptor/retry"
	"github.com/belfry-go/belfry/internal/test/calltest"
	"github.com/belfry-go/belfry/internal/test/race"
)

// Callers in a closed loop, a server that takes 10 ms and fails a part of the
// attempts, and a limit of 20 in the order of the documentation: calls fail as often
// as three attempts do, however many of them wait. Of 60,000 calls that is 0.8 % if
// 20 % of the attempts fail, so that 1 % is five standard deviations away, and
// 0.0125 % if 5 % do, so that 0.1 % is nineteen.
func TestUnderLoad(t *testing.T) {
	for _, failing := range []float64{0.05, 0.2} {
		counts := []int{10, 15, 19, 25, 40, 60}
		if race.Enabled { // Ten times slower.
			counts = []int{40}
		}
		for _, callers := range counts {
			t.Run(fmt.Sprintf("%v%%_failing_%d_callers", 100*failing, callers), func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					seed := rand.Uint64()
					t.Logf("seed %d", seed)
					rng := rand.New(rand.NewPCG(seed, 0))
					var mu sync.Mutex
					fails := func() bool {
						mu.Lock()
						defer mu.Unlock()
						return rng.Float64() < failing
					}
					invoke := func(context.Context, string, any, any, *grpc.ClientConn, ...grpc.CallOption) error {
						time.Sleep(10 * time.Millisecond)
						if fails() {
							return unavailable
						}
						return nil
					}
					unary := calltest.Stack(t,
						loadshed.Config{},
						retry.Config{AllMethods: true, Budget: budget.Config{Ratio: 100}},
						buffer.Config{Size: 50},
						concurrency.Config{Limit: 20},
					).UnaryClientInterceptor()
					each := 60_000 / callers
					var wg sync.WaitGroup
					failed := 0
					for range callers {
						wg.Go(func() {
							for range each {
								if err := unary(t.Context(), method, nil, nil, nil, invoke); err != nil {
									mu.Lock()
									failed++
									mu.Unlock()
								}
							}
						})
					}
					wg.Wait()
					most := map[float64]float64{0.05: 0.001, 0.2: 0.01}[failing]
					if share := float64(failed) / float64(callers*each); share > most {
						t.Errorf("%.3f %% of the calls failed, want at most %.1f %%", 100*share, 100*most)
					} else {
						t.Logf("%.3f %% of the calls failed", 100*share)
					}
				})
			})
		}
	}
}
